"""A finished run applied to images of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from routingvl.backbones.loading import hide_loading_bars
from routingvl.config import ConfigError
from routingvl.evaluate import evaluation_config
from routingvl.tasks.base import CaptionTask, VQATask, load_task
from routingvl.training.accelerator import make_accelerator
from routingvl.training.run_folder import RunFolder


class Predictor:
    """The adapter of a run, ready for single images.

    Args:
        run_dir: folder of a training run.
        checkpoint: "best" or "last".
        **overrides: settings to change, as in :func:`routingvl.evaluate.evaluate`.

    Raises:
        RunError: there is no such run or checkpoint.
    """

    def __init__(self, run_dir: str | Path, *, checkpoint: str = "best", **overrides: Any) -> None:
        folder = RunFolder(Path(run_dir))
        self.config = evaluation_config(folder, **overrides)
        hide_loading_bars(quiet=True)
        self.accelerator = make_accelerator(self.config)
        self.task = load_task(folder, self.config, checkpoint, self.accelerator.device)
        self.task.model.eval()

    def caption(self, images: Sequence[str | Path]) -> list[str]:
        """A caption of each image file; raises ImageError naming a file that cannot be read."""
        if not isinstance(self.task, CaptionTask):
            raise ConfigError("this run answers questions; use routingvl answer, or a captioning run")
        size, captions = self.config.eval.batch_size, []
        for start in range(0, len(images), size):
            pictures = self.task.encode_files(images[start : start + size])
            with torch.inference_mode(), self.accelerator.autocast():
                inputs = self.task.model_inputs(pictures, self.accelerator.device)
                captions += self.task.write(self.config.eval.num_beams, **inputs)
        return captions

    def answer(self, image: str | Path, question: str, top: int = 5) -> list[tuple[str, float]]:
        """The ``top`` likeliest answers to ``question`` about an image file, each with its probability in [0, 1]."""
        if not isinstance(self.task, VQATask):
            raise ConfigError("this run writes captions; use routingvl caption, or a VQA run")
        if not question.strip():
            raise ConfigError("the question is empty")
        if top < 1:
            raise ConfigError(f"top={top} must be at least 1")
        item = {"image_id": 0, "question_id": 0, "question": question, "target": None}
        pictures = {key: rows[0] for key, rows in self.task.encode_files([image]).items()}
        batch = self.task.collator()([item | pictures])
        with torch.inference_mode(), self.accelerator.autocast():
            probabilities = self.task.probabilities(batch)[0]
        best = probabilities.topk(min(top, len(probabilities)))
        answers = self.task.vocabulary.answers
        return [(answers[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
