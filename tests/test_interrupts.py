"""Signals: one sentence and no torn step, for the program and its data workers."""

import os
import signal
import subprocess
import sys

import pytest
from torch.utils.data import DataLoader

from routingvl import interrupts
from routingvl.data.images import ImageError
from routingvl.interrupts import ENDING, INTERRUPTED, ignore_signals, message_of, signals_interrupt, stop_request


@pytest.mark.parametrize("number", ENDING)
def test_signals_interrupt(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), signals_interrupt():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_a_signal_during_an_import_ends_the_program(tmp_path):
    (tmp_path / "slow.py").write_text(
        "try:\n    print('here', flush=True)\n    import time; time.sleep(60)\nexcept: pass\n"
    )
    program = "from routingvl.interrupts import signals_interrupt\nwith signals_interrupt():\n    import slow"
    command = [sys.executable, "-c", program]
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(command, env=os.environ | paths, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        process.terminate()
        assert process.communicate(timeout=30)[1] == b"routingvl: interrupted\n"
    assert process.returncode == INTERRUPTED


def test_a_stop_request_is_made_once_and_insisted_on_later(monkeypatch):
    with stop_request() as stop:
        for _ in range(2):  # what comes together is one wish
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_set()
        monkeypatch.setattr(interrupts, "SAME_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_program_under_nohup_does_not_hear_the_hangup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_request() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_set()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Numbers(list):
    def __getitem__(self, index):
        return os.getpid()


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="a system without sigwaitinfo")
def test_a_worker_outlives_signals_but_not_its_loader():
    batches = iter(DataLoader(Numbers(range(40)), num_workers=1, worker_init_fn=ignore_signals))
    worker = int(next(batches))
    helper = os.fork()
    if helper == 0:  # signals to a process group come from another process than the one that reads the batches
        for number in ENDING:
            os.kill(worker, number)
        os._exit(0)
    os.waitpid(helper, 0)
    assert [int(batch) for batch in batches] == [worker] * 39
    batches = iter(DataLoader(Numbers(range(40)), num_workers=1, worker_init_fn=ignore_signals))
    worker = int(next(batches))
    os.kill(worker, signal.SIGTERM)  # as torch does to one that does not end
    (process,) = batches._workers
    process.join(10)
    assert process.exitcode == 0


class Broken(list):
    def __getitem__(self, index):
        raise ImageError("image x is broken:\nreally")


@pytest.mark.parametrize("workers", [0, 1])
def test_message_of_a_workers_error(workers):
    with pytest.raises(ImageError) as caught:
        next(iter(DataLoader(Broken([1]), num_workers=workers)))
    assert message_of(caught.value).endswith("really")
    assert "Traceback" not in message_of(caught.value)


def test_signals_are_heard_again_afterwards():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        with stop_request():
            pass
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
