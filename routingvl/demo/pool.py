"""Worker processes for the demo: fresh interpreters with one torch thread each."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """A pool of ``workers`` spawned processes; nets this small run fastest with one thread per process."""
    # Set before the children start, since OpenMP reads it once; torch.set_num_threads alone leaves MKL's own count.
    for variable in _THREAD_VARIABLES:
        os.environ.setdefault(variable, "1")
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker)


def _prepare_worker() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Bars and hints of two processes at once would bury the demo's own lines.
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _end_with_parent() -> None:
    """A worker whose parent was killed would finish its job, for nobody, and then wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
