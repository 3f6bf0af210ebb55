"""Signals that end a program, and data workers: who hears them, and what is told of a worker's error or death."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
INTERRUPTED = 130  # exit status
SAME_SECONDS = 1.0  # signals that come together are one wish: terminals, shells and schedulers pass them on twice


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt in the block.

    While a module is imported they end the program: half-imported packages swallow the exception, or fail later.
    """

    def interrupt(number: int, frame: Any) -> None:
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                os.write(2, b"routingvl: interrupted\n")
                os._exit(INTERRUPTED)
            frame = frame.f_back
        raise KeyboardInterrupt

    with _handling(interrupt):
        yield


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """The first of these signals sets the event, so that a step is never torn; one a second later acts as before."""
    event = threading.Event()
    first = 0.0

    def request(number: int, frame: Any) -> None:
        nonlocal first
        if not event.is_set():
            first = time.monotonic()
            event.set()
        elif time.monotonic() - first > SAME_SECONDS:
            raise KeyboardInterrupt

    with _handling(request):
        yield event


@contextmanager
def _handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """The handler of these signals inside the block; they stay as they are outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in ENDING}
    if previous.get(hangup := getattr(signal, "SIGHUP", None)) is signal.SIG_IGN:
        del previous[hangup]  # nohup wants it ignored
    for number in previous:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old or signal.SIG_DFL)  # None for one that Python did not set


@contextmanager
def child_deaths_wait() -> Iterator[None]:
    """In the block, the death of a data worker is told where the next batch is asked for.

    torch's handler of SIGCHLD, which the first loader with workers sets, would raise at any moment, also in the middle
    of a step, which then could not be saved.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL) or signal.SIG_DFL
    try:
        yield
    except BaseException:
        # The error may keep a loader with a dead worker alive, for which torch's handler would raise once more.
        if getattr(previous, "__module__", "").startswith("torch."):
            previous = signal.SIG_DFL
        raise
    finally:
        signal.signal(signal.SIGCHLD, previous)


def ignore_signals(worker: int = 0) -> None:
    """For a worker process, as ``worker_init_fn``: signals to the whole group are for the process that it works for.

    The worker ends when that process tells it to, or within seconds of its death.
    """
    for number in ENDING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere torch's own handler ends the worker, whoever sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def message_of(error: BaseException) -> str:
    """The message of an error on one line; of one that a data worker passed on, without the traceback in it."""
    text = str(error).strip()
    if text.startswith("Caught ") and "in DataLoader worker process" in text:
        text = re.split(rf"(?m)^[\w.]*{type(error).__name__}: ", text)[-1]
    return " ".join(text.split())
