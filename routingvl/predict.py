"""A finished run applied to images of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from routingvl.backbones.loading import hide_loading_bars
from routingvl.config import ConfigError
from routingvl.data.files import one_line
from routingvl.data.images import ImageError, stack_pictures
from routingvl.evaluate import evaluation_config, load_run
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
        self.task, self.accelerator = load_run(folder, checkpoint, self.config)
        self.task.model.eval()
        # Of own photos the right way up is seen, whatever the images of the training were.
        self.task.preprocessor = replace(self.task.preprocessor, exif=True)

    def predict(
        self, images: Sequence[str | Path], text: str | Sequence[str] | None = None, top: int = 5
    ) -> list[dict[str, Any]]:
        """What the task of the run says of each image file, in plain values.

        Args:
            images: any number of image files; where an example has two (NLVR2), each two in turn belong together.
            text: the question or statement about each of them, or a pair of sentences; None for a captioning run.
            top: how many of the choices are listed with their probabilities.

        Returns:
            For each image, or all images of an example, ``{"caption": str}``,
            ``{"answer": str, "probabilities": {answer: probability}}`` or
            ``{"label": str, "probabilities": {label: probability}}``, the likeliest first.

        Raises:
            ImageError: a file cannot be read; the message names it.
            ConfigError: the task needs a text and there is none, or the other way round, or ``top`` is below 1.
        """
        rows = []
        for row in self.predict_each(images, text, top):
            if isinstance(row, ImageError):
                raise row
            rows.append(row)
        return rows

    def predict_each(
        self, images: Sequence[str | Path], text: str | Sequence[str] | None = None, top: int = 5
    ) -> Iterator[dict[str, Any] | ImageError]:
        """As :meth:`predict`, a batch at a time; for a file that cannot be read comes its ImageError."""
        if self.task.takes_text is (text is None):
            raise ConfigError(f"a run of task {self.task.name!r} needs {'a' if self.task.takes_text else 'no'} text")
        sentences = [one_line(part) for part in ([text] if isinstance(text, str) else text or ())]
        if len(sentences) > 2 or not all(sentences):
            raise ConfigError(f"the text must be a sentence or two, none of them empty, not {text!r}")
        if any("\ud800" <= character <= "\udfff" for part in sentences for character in part):
            raise ConfigError(f"the text holds bytes that are no UTF-8: {text!r}")
        if top < 1:
            raise ConfigError(f"top={top} must be at least 1")
        groups, size = self.groups(images), self.config.eval.batch_size
        item, collate = self.task.single_item(*sentences), self.task.collator()
        for start in range(0, len(groups), size):
            pictures = self._inputs(groups[start : start + size])
            rows: Iterator[dict[str, Any]] = iter(())
            if batch := collate([item | picture for picture in pictures if not isinstance(picture, ImageError)]):
                with torch.inference_mode(), self.accelerator.autocast():
                    rows = iter(self.task.predict_single(batch, self.config.eval.num_beams, top))
            for picture in pictures:
                yield picture if isinstance(picture, ImageError) else next(rows)

    def groups(self, images: Sequence[str | Path]) -> list[tuple[str | Path, ...]]:
        """The images of each example; ConfigError when there are too few for the last one."""
        count = self.task.images
        if len(images) % count:
            raise ConfigError(
                f"an example of task {self.task.name!r} has {count} images, in their order: give so many, not "
                f"{len(images)}"
            )
        return [tuple(images[start : start + count]) for start in range(0, len(images), count)]

    def _inputs(self, groups: Sequence[tuple[str | Path, ...]]) -> list[dict[str, torch.Tensor] | ImageError]:
        """The model's input of the images of each example, or why there is none."""
        encoded = iter(self._encode([image for images in groups for image in images]))
        rows = []
        for images in groups:
            found = [next(encoded) for _ in images]
            error = next((picture for picture in found if isinstance(picture, ImageError)), None)
            rows.append(error or stack_pictures(found))
        return rows

    def _encode(self, images: Sequence[str | Path]) -> list[dict[str, torch.Tensor] | ImageError]:
        """The model's input of each image, or why there is none."""
        try:
            ((name, tensors),) = self.task.encode_files(images).items()
            return [{name: tensor} for tensor in tensors]
        except ImageError as error:
            return [error] if len(images) == 1 else [one for image in images for one in self._encode([image])]

    def caption(self, images: Sequence[str | Path]) -> list[str]:
        """A caption of each image file; raises ImageError naming a file that cannot be read."""
        self.check_command("caption")
        return [row["caption"] for row in self.predict(images)]

    def answer(self, image: str | Path, question: str, top: int = 5) -> list[tuple[str, float]]:
        """The ``top`` likeliest answers to ``question`` about an image file, each with its probability in [0, 1]."""
        self.check_command("answer")
        if not question.strip():
            raise ConfigError("the question is empty")
        return list(self.predict([image], question, top)[0]["probabilities"].items())

    def check_command(self, command: str) -> None:
        """Raise ConfigError when the task of the run is not the one that ``routingvl command`` is for."""
        if self.task.command != command:
            raise ConfigError(
                f"this run's task is {self.task.name!r}: use routingvl {self.task.command}, or a run for {command}"
            )
