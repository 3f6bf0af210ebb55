"""Predictions of a task's model for a whole data set, shared out over the processes of a run."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset
from tqdm import tqdm

from routingvl.data.files import DataError
from routingvl.interrupts import message_of
from routingvl.tasks.base import Task


def predict_dataset(
    task: Task, dataset: Dataset, accelerator: Accelerator, *, num_beams: int, progress: bool = False
) -> dict[int, str]:
    """Predictions for every example of ``dataset`` by image or question id, the same in every process.

    Each process takes every n-th example, so none is predicted twice and no padding has to be removed again. An error
    in one of them is raised in all, which would wait for it otherwise: in the others as :class:`DataError`.
    """
    task.model.eval()
    mine = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    size = task.config.eval.batch_size
    batches = [list(mine[start : start + size]) for start in range(0, len(mine), size)]
    found: dict[int, str] = {}
    failure: Exception | None = None
    hidden = not (progress and accelerator.is_main_process)
    try:
        with torch.inference_mode(), accelerator.autocast():
            loader = task.loader(dataset, batches)
            for batch in tqdm(loader, desc="predict", disable=hidden, leave=False, dynamic_ncols=True):
                if batch is not None:
                    found |= task.predict(batch, num_beams)
    except Exception as error:
        failure = error
    merged: dict[int, str] = {}
    for part, message in gather_object([(found, failure and message_of(failure))]):
        merged |= part
        if message is not None:
            raise failure or DataError(message)
    return merged
