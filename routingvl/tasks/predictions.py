"""Predictions of a task's model for a whole data set, shared out over the processes of a run."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import Dataset
from tqdm import tqdm

from routingvl.tasks.base import Task


def predict_dataset(
    task: Task, dataset: Dataset, accelerator: Accelerator, *, num_beams: int, progress: bool = False
) -> dict[int, str]:
    """Predictions for every example of ``dataset`` by image or question id, the same in every process.

    Each process takes every n-th example, so none is predicted twice and no padding has to be removed again.
    """
    task.model.eval()
    mine = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    size = task.config.eval.batch_size
    batches = [list(mine[start : start + size]) for start in range(0, len(mine), size)]
    found: dict[int, str] = {}
    hidden = not (progress and accelerator.is_main_process)
    with torch.inference_mode(), accelerator.autocast():
        loader = task.loader(dataset, batches)
        for batch in tqdm(loader, desc="predict", disable=hidden, leave=False, dynamic_ncols=True):
            if batch is not None:
                found |= task.predict(batch, num_beams)
    merged: dict[int, str] = {}
    for part in gather_object([found]):
        merged |= part
    return merged
