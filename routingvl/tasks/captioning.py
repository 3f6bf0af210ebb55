"""Captioning: write a sentence about an image; COCO's caption metrics (arXiv 2403.09377, COCO captions)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from routingvl.config import ConfigError
from routingvl.data.coco import CaptionDataset, CaptionSplit, load_captions
from routingvl.data.collate import IGNORED, IMAGE_INPUTS, CaptionCollator
from routingvl.data.files import DataError
from routingvl.data.text_to_text import TextExample, TextToTextDataset
from routingvl.metrics import caption_scores, coco_results_name, write_coco_results
from routingvl.metrics.ptb import find_java
from routingvl.models import VisionTextForCaptioning
from routingvl.tasks.base import Batch, Task, register
from routingvl.tasks.writing import GenerateTask, WritingTask


class CaptionFiles(Task):
    """Captions of COCO's forms, with their scores and result file, however they are written."""

    percent = 100.0  # CIDEr, as papers print it

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.config.eval.caption_tokenizer == "ptb" and find_java() is None:
            raise ConfigError("eval.caption_tokenizer='ptb' needs Java, which is not on PATH; use 'auto' or 'python'")

    def load_split(self, split: str, limit: int | None = None, training: bool = False) -> CaptionSplit:
        """Read images and captions; ``limit`` counts captions for training, else images."""
        loaded = load_captions(self.config.data.annotations, split, **self.file_arguments)
        if limit is None:
            return loaded
        kept = (
            {c.image_id for c in loaded.captions[:limit]} if training else {i.image_id for i in loaded.images[:limit]}
        )
        captions = loaded.captions[:limit] if training else [c for c in loaded.captions if c.image_id in kept]
        return replace(loaded, images=[i for i in loaded.images if i.image_id in kept], captions=captions)

    def selection_metric(self, split: CaptionSplit) -> str:
        """CIDEr; DataError when the split has no captions."""
        if not split.captions:
            raise DataError(
                f"split {split.name!r} has no captions to validate with; set data.val_split (null for none)"
            )
        return "CIDEr"

    def scores(self, split: CaptionSplit, predictions: Mapping[int, str]) -> dict[str, Any]:
        """Every caption metric that can run; "missing" gives the reason for each other one."""
        settings = self.config.eval
        scores = self._caption_scores(split, predictions, settings.metrics, settings.caption_tokenizer)
        scores.pop("per_image", None)
        return {"n": len(predictions)} | scores

    def validation_scores(self, predictions: Mapping[int, str]) -> dict[str, float]:
        """CIDEr with the Python tokenizer, which is the same everywhere and starts no Java; DataError for none."""
        scores = self._caption_scores(self.val_set.split, predictions, ("CIDEr",), "python")
        if scores.get("CIDEr") is None:
            raise DataError("; ".join(scores["missing"].values()))
        return {"CIDEr": scores["CIDEr"]}

    def _caption_scores(
        self, split: CaptionSplit, predictions: Mapping[int, str], metrics: tuple[str, ...] | None, tokenizer: str
    ) -> dict[str, Any]:
        described = {i: text for i, text in predictions.items() if i in split.references}
        if not described:
            return {"missing": {"captions": f"split {split.name!r} has no reference captions"}}
        references = {image_id: split.references[image_id] for image_id in described}
        return caption_scores(described, references, metrics=metrics, tokenizer=tokenizer)

    def write_predictions(self, folder: Path, split: str, method: str, predictions: Mapping[int, str]) -> Path:
        """Captions in COCO's form, under its name."""
        return write_coco_results(folder / coco_results_name(split, method), predictions)


@register
class CaptionTask(CaptionFiles, WritingTask):
    """Write a caption."""

    name = "caption"
    model_class = VisionTextForCaptioning
    model_settings = ("caption_loss",)
    text_model = "gpt2"
    max_text_length = 50
    command = "caption"
    takes_text = False

    def use_model(self, model: VisionTextForCaptioning) -> None:
        """Take ``model``; ConfigError unless it begins and ends captions with the tokens that the tokenizer gives."""
        super().use_model(model)
        start = self.tokenizer.bos_token_id
        if not model.written_behind and start is not None:
            self.check_token("begin", "bos_token_id", start, [model.start_token])

    def dataset(self, split: CaptionSplit, training: bool) -> CaptionDataset:
        """One item per caption for training, else per image."""
        return CaptionDataset(split, per_image=not training, **self.picture_arguments)

    def collator(self) -> CaptionCollator:
        """Captions, with their own tokens as labels."""
        return CaptionCollator(
            self.tokenizer,
            self.text_length,
            self.config.data.padding,
            prefix=self.model.written_behind,
            start=self.model.start_token,
            loss=self.model.caption_loss,
        )

    def supervised_items(self, batch: Batch) -> int:
        """The tokens that count."""
        return int((self.model.next_tokens(batch["labels"]) != IGNORED).sum())

    def predict(self, batch: Batch, num_beams: int) -> dict[int, str]:
        """Captions by image id."""
        return dict(zip(batch["image_ids"], self._write(batch, num_beams), strict=True))

    def predict_single(self, batch: Batch, num_beams: int, top: int) -> list[dict[str, Any]]:
        """The ``caption`` of each image."""
        return [{"caption": text} for text in self._write(batch, num_beams)]

    def _write(self, batch: Batch, num_beams: int) -> list[str]:
        """From the images alone: batches of the training set have captions too."""
        return self.write({key: batch[key] for key in IMAGE_INPUTS if key in batch}, num_beams)


@register
class CaptionGenerateTask(CaptionFiles, GenerateTask):
    """Write a caption with an encoder-decoder whose encoder reads the image and nothing, or a prompt, behind it."""

    name = "caption-generate"
    max_text_length = 50
    command = "caption"
    takes_text = False

    def examples(self, split: CaptionSplit) -> list[TextExample]:
        """One per caption, with its number."""
        images = {image.image_id: image for image in split.images}
        return [TextExample(c.caption_id, "", c.text, (images[c.image_id],)) for c in split.captions]

    def dataset(self, split: CaptionSplit, training: bool) -> TextToTextDataset:
        """The examples for training; else one per image, with its id and nothing to be written."""
        if training:
            return super().dataset(split, training)
        examples = [TextExample(image.image_id, "", None, (image,)) for image in split.images]
        return TextToTextDataset(split, examples, **self.picture_arguments)

    def predict_single(self, batch: Batch, num_beams: int, top: int) -> list[dict[str, Any]]:
        """The ``caption`` of each image."""
        return [{"caption": text} for text in self.write(batch, num_beams)]
