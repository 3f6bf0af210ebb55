"""Commands run in a forked child of the test's process: killed, starved of disk or memory, it takes nothing with it.

A fork has everything imported, so a command takes a fraction of a second, and patches made in it end with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_forks = multiprocessing.get_context("fork")
Task = Callable[[], object]


@dataclass(frozen=True)
class Outcome:
    """How a child ended: exit status (negative: the signal that killed it), and what it printed."""

    status: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"status {self.status}\n{self.out[-1000:]}\n{self.err[-3000:]}"

    def assert_fine(self) -> Outcome:
        """It ended well."""
        assert self.status == 0, self
        return self

    def assert_refused(self, *words: str, status: int = 2) -> Outcome:
        """It ended with one clear sentence that holds ``words``, without a traceback."""
        assert self.status == status, self
        assert "Traceback" not in self.err, self
        sentence = (self.err.splitlines() or [""])[-1]
        assert sentence.startswith("routingvl: "), self
        missing = [word for word in words if word.lower() not in sentence.lower()]
        assert not missing, f"{missing} not in {sentence}"
        return self


class Child:
    """``task()`` in a process group of its own; with ``args`` the command line instead.

    Args:
        before: called in the child first, to patch or limit it.
        stdin: what it can read from its standard input.
    """

    def __init__(
        self, *args: str | Path, task: Task | None = None, before: Task | None = None, stdin: str = ""
    ) -> None:
        self.files = [tempfile.TemporaryFile("w+") for _ in range(3)]  # noqa: SIM115 (closed in wait)
        self.files[0].write(stdin)
        self.files[0].seek(0)
        self.process = _forks.Process(target=self._run, args=(list(map(str, args)), task, before))
        self.process.start()
        self.pid = self.process.pid

    def _run(self, args: list[str], task: Task | None, before: Task | None) -> None:
        os.setsid()
        for number, file in enumerate(self.files):
            os.dup2(file.fileno(), number)
        # pytest has put objects of its own in their place.
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", errors="backslashreplace")  # noqa: SIM115
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0)  # pytest's, for its own process
        torch.set_num_threads(1)
        if before is not None:
            before()
        if task is not None:
            task()
            return
        from routingvl.cli import main

        raise SystemExit(main(args))

    def send(self, number: int, group: bool = False) -> None:
        """Send a signal, to its workers as well with ``group``."""
        os.killpg(self.pid, number) if group else os.kill(self.pid, number)

    def wait(self, seconds: float = 60) -> Outcome:
        """Its outcome; one that hangs is killed, and fails the test."""
        self.process.join(seconds)
        hung = self.process.is_alive()
        with contextlib.suppress(ProcessLookupError):  # whoever is left of its group
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join()
        texts = []
        for file in self.files[1:]:
            file.seek(0)
            texts.append(file.read())
        for file in self.files:
            file.close()
        outcome = Outcome(self.process.exitcode, *texts)
        assert not hung, f"hung for {seconds} s: {outcome}"
        return outcome


class Meeting:
    """A place in a child's work at which the test waits for it, and it for the test."""

    def __init__(self) -> None:
        self._here, self._free = os.pipe(), os.pipe()

    def reach(self, seconds: float | None = None) -> None:
        """In the child: say so, and wait so long, or until :meth:`let_go`."""
        os.close(self._free[1])
        os.write(self._here[1], b"x")
        if seconds is None:
            os.read(self._free[0], 1)
        else:
            time.sleep(seconds)

    def wait_for(self, child: Child) -> None:
        """In the test: until the child is there; AssertionError when it ends before."""
        os.close(self._here[1])
        os.close(self._free[0])
        assert os.read(self._here[0], 1) == b"x", child.wait()
        os.close(self._here[0])

    def let_go(self) -> None:
        os.close(self._free[1])


def at_step(step: int, then: Callable[[], object]) -> Task:
    """A patch that calls ``then`` when this training step has been logged."""

    def patch() -> None:
        from routingvl.training.log import RunLog

        record = RunLog.record

        def watched(self, kind, at, values):
            record(self, kind, at, values)
            if kind == "train" and at == step:
                then()

        RunLog.record = watched

    return patch


def command(*args: str | Path, before: Task | None = None, stdin: str = "", seconds: float = 60) -> Outcome:
    """Run one command line to its end."""
    return Child(*args, before=before, stdin=stdin).wait(seconds)


def obey_permissions() -> None:
    """In a child: give up what lets root write into read-only folders (all capabilities, on Linux)."""
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    ctypes.CDLL(None).capset(header, nothing)


def files_below(folder: Path) -> dict[str, bytes]:
    """The content of every file below ``folder``, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(folder: Path) -> list[str]:
    """Temporary names in and beside ``folder``."""
    found = [folder.parent, *(path for path in folder.rglob("*") if path.is_dir()), folder]
    names = {str(path) for place in found if place.is_dir() for path in place.iterdir()}
    return sorted(name for name in names if Path(name).name.endswith((".tmp", ".old")))


def config_file(tiny: Path, output: Path, task: str = "vqa", **settings: object) -> Path:
    """The YAML of :func:`tiny.tiny_config`, beside the run folder ``output``."""
    from tiny import tiny_config

    from routingvl.config.files import config_to_yaml

    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f"{output.name}.yaml")
    path.write_text(config_to_yaml(tiny_config(tiny, output, task, **settings)), encoding="utf-8")
    return path
