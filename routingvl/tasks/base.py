"""The two tasks behind one interface, so that training and evaluation have a single loop.

A :class:`Task` holds model, tokenizer and preprocessing, makes data sets and batches, predicts, and scores.
:func:`build_task` makes one from a config, :func:`load_task` from a finished run.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from routingvl.atomic_files import write_json
from routingvl.config import ConfigError, check_choice
from routingvl.config.schema import RunConfig
from routingvl.data.coco import CaptionDataset, CaptionSplit, load_captions
from routingvl.data.collate import IGNORED, CaptionCollator, VQACollator
from routingvl.data.feature_store import FeatureStore
from routingvl.data.files import DataError
from routingvl.data.images import ImagePreprocessor, ImageRecord
from routingvl.data.tokens import TokenTable
from routingvl.data.vocabulary import AnswerVocabulary, soft_scores
from routingvl.data.vqa import VQADataset, VQASplit, load_vqa
from routingvl.metrics import caption_scores, soft_score_report, vqa_report
from routingvl.metrics.captions import METRICS
from routingvl.metrics.ptb import find_java
from routingvl.models import RoutedVLModel, ViTGPT2ForCaptioning, ViTRobertaForVQA, load_pretrained
from routingvl.training.run_folder import RunFolder

Batch = dict[str, Any]
Split = CaptionSplit | VQASplit


class Task(ABC):
    """Model and data of one run.

    Attributes:
        model: set by :func:`build_task` or :func:`load_task`.
        train_set, val_set: data sets, once :meth:`load_training_data` ran; val_set is None without validation.
        metric: the validation score that chooses the best checkpoint, known from then on.
    """

    model: RoutedVLModel

    def __init__(self, config: RunConfig, tokenizer: Any, preprocessor: ImagePreprocessor) -> None:
        self.config, self.tokenizer, self.preprocessor = config, tokenizer, preprocessor
        self.features: dict[int, torch.Tensor] = {}
        self.train_set: Dataset | None = None
        self.val_set: Dataset | None = None
        self.metric = ""

    @abstractmethod
    def build_model(self) -> RoutedVLModel:
        """A new model as the config describes it."""

    @abstractmethod
    def load_split(self, split: str, limit: int | None = None, training: bool = False) -> Split:
        """Read the annotations of a split; ``limit`` keeps its first examples."""

    @abstractmethod
    def dataset(self, split: Split, training: bool) -> Dataset:
        """The examples of what :meth:`load_split` read."""

    @abstractmethod
    def supervised_items(self, batch: Batch) -> int:
        """How many items the model's mean loss over ``batch`` averages over."""

    @abstractmethod
    def predict(self, batch: Batch, num_beams: int) -> dict[int, str]:
        """Predictions of a batch by image or question id."""

    @abstractmethod
    def selection_metric(self, split: Split) -> str:
        """The validation score on ``split`` that chooses the best checkpoint; higher is better."""

    @abstractmethod
    def scores(self, split: Split, predictions: Mapping[int, str]) -> dict[str, Any]:
        """The full report of predictions on ``split``; a metric that cannot be had is in "missing" with its reason."""

    @abstractmethod
    def validation_scores(self, predictions: Mapping[int, str]) -> dict[str, float]:
        """Numbers on the validation set, :attr:`metric` among them."""

    @abstractmethod
    def collator(self) -> Callable[[Sequence[Any]], Batch | None]:
        """Turns examples into a batch."""

    def read_training_splits(self) -> tuple[Split, Split | None]:
        """The annotations of the training split, and of the validation split or None."""
        data = self.config.data
        train = self.load_split(data.train_split, data.train_limit, training=True)
        return train, None if data.val_split is None else self.load_split(data.val_split, data.val_limit)

    def load_training_data(self, train: Split, val: Split | None) -> None:
        """Make the data sets of two splits, tokenise their texts, and encode their images when features are
        precomputed.
        """
        self.precompute([*train.images, *(val.images if val else [])])
        self.train_set = self.dataset(train, training=True)
        if val is not None:
            self.val_set, self.metric = self.dataset(val, training=False), self.selection_metric(val)
        encode = self.collator().encode
        for dataset in (self.train_set, self.val_set):
            if dataset is not None and dataset.texts:
                dataset.tokens = TokenTable(dataset.texts, encode)

    def precompute(self, images: Iterable[ImageRecord], progress: bool = False) -> None:
        """Have the features of ``images`` at hand if the config says that features are kept; see FeatureStore.load."""
        new = [image for image in images if image.image_id not in self.features]
        if self.config.data.keeps_features and new:
            self.features |= self.feature_store.load(new, progress=progress)

    @cached_property
    def feature_store(self) -> FeatureStore:
        """Computes and keeps the features of images, in memory or in ``data.feature_cache``."""
        model = self.model
        return FeatureStore(model.encode_images, model.vit, model.vision_features, self.preprocessor, self.config.data)

    def encode_files(self, paths: Sequence[str | os.PathLike[str]]) -> dict[str, torch.Tensor]:
        """Image files as an input of the model: ``pixel_values`` or, with a feature cache, ``vision_features``.

        Raises ImageError naming a file that cannot be read.
        """
        if self.config.data.feature_cache is None:
            return {"pixel_values": torch.stack([self.preprocessor(path) for path in paths])}
        images = [ImageRecord(i, os.fspath(path), Path(path)) for i, path in enumerate(paths)]
        features = self.feature_store.load(images, on_bad_image="fail")
        return {"vision_features": torch.stack([features[i] for i in range(len(images))])}

    @property
    def picture_arguments(self) -> dict[str, Any]:
        """How data sets get at an image: stored features, or its file."""
        features = self.features if self.config.data.keeps_features else None
        return {
            "preprocessor": self.preprocessor,
            "features": features,
            "on_bad_image": self.config.data.on_bad_image,
        }

    @property
    def skipped_images(self) -> int:
        """Examples left out so far because their image is unreadable."""
        return sum(d.skipped for d in (self.train_set, self.val_set) if d is not None)

    def loader(self, dataset: Dataset, batches: Iterable[list[int]]) -> DataLoader:
        """Batches of the given index lists, in order; worker processes serve only to read images."""
        workers = 0 if self.config.data.keeps_features else self.config.data.workers
        if workers:
            # The tokenizer's own threads do not survive the fork into a worker, and it would warn in each.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=self.collator(),
            pin_memory=self.model.device.type == "cuda",
            # Its own generator: making an iterator would otherwise draw from the one dropout uses.
            generator=_own_rng(),
        )

    def model_inputs(self, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors of a batch, on ``device``."""
        return {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, torch.Tensor)}

    def training_inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """The arguments of the model's call in a training step; only its loss is read."""
        return self.model_inputs(batch, device)

    def save_files(self, folder: RunFolder) -> None:
        """Put into the run folder what evaluation needs beside the adapter: tokenizer and preprocessing."""
        self.tokenizer.save_pretrained(folder.tokenizer)
        write_json(folder.preprocessor, self.preprocessor.to_dict())


class VQATask(Task):
    """Choose one of the answers."""

    def __init__(self, *args: Any, vocabulary: AnswerVocabulary) -> None:
        super().__init__(*args)
        self.vocabulary = vocabulary

    def build_model(self) -> ViTRobertaForVQA:
        model = self.config.model
        return ViTRobertaForVQA.from_backbones(
            model.vision,
            self.config.text_model,
            self.config.routing,
            num_labels=len(self.vocabulary),
            classifier_layers=model.classifier_layers,
            text_embedding=model.text_embedding,
            vision_features=model.vision_features,
            visual_prefix=model.visual_prefix,
            backend=model.backend,
        )

    def load_split(self, split: str, limit: int | None = None, training: bool = False) -> VQASplit:
        loaded = load_vqa(self.config.data.annotations, split, self.config.data.images)
        if limit is None:
            return loaded
        questions = loaded.questions[:limit]
        wanted = {question.image_id for question in questions}
        return replace(loaded, questions=questions, images=[i for i in loaded.images if i.image_id in wanted])

    def dataset(self, split: VQASplit, training: bool) -> VQADataset:
        return VQADataset(split, self.vocabulary, **self.picture_arguments)

    def collator(self) -> VQACollator:
        config = self.config
        return VQACollator(self.tokenizer, config.max_text_length, len(self.vocabulary), config.data.padding)

    def supervised_items(self, batch: Batch) -> int:
        if "labels" not in batch:
            raise DataError(f"split {self.config.data.train_split!r} has no answers to learn; set data.train_split")
        return batch["labels"].numel()

    def probabilities(self, batch: Batch) -> torch.Tensor:
        """Probability of each answer [B, labels], each between 0 and 1 on its own (the head is trained with BCE)."""
        inputs = self.model_inputs(batch, self.model.device)
        inputs.pop("labels", None)
        return self.model(**inputs).logits.float().sigmoid()

    def predict(self, batch: Batch, num_beams: int) -> dict[int, str]:
        labels = self.probabilities(batch).argmax(dim=-1).tolist()
        answers = (self.vocabulary.answers[label] for label in labels)
        return dict(zip(batch["question_ids"], answers, strict=True))

    def selection_metric(self, split: VQASplit) -> str:
        return "accuracy" if split.annotations() else "soft_score"

    def scores(self, split: VQASplit, predictions: Mapping[int, str]) -> dict[str, Any]:
        """Percent: official accuracy, by type too, where annotators' answers are known; soft score where labels are."""
        annotations = [
            entry | {key: entry[key] or "unknown" for key in ("answer_type", "question_type")}
            for entry in split.annotations()
            if entry["question_id"] in predictions
        ]
        labels = {
            question.question_id: question.label or soft_scores(question.answers or (), self.vocabulary)
            for question in split.questions
            if question.question_id in predictions and (question.label is not None or question.answers is not None)
        }
        scores: dict[str, Any] = {"n": len(predictions)}
        if annotations:
            known = {entry["question_id"]: predictions[entry["question_id"]] for entry in annotations}
            report = vqa_report(known, annotations, rule=self.config.eval.vqa_rule)
            scores |= {"accuracy": report.pop("overall")} | report
        if labels:
            scores |= {"soft_score": soft_score_report({i: predictions[i] for i in labels}, labels)["soft_score"]}
        unknown = [name for name, known in (("accuracy", annotations), ("soft_score", labels)) if not known]
        return scores | {"missing": dict.fromkeys(unknown, f"split {split.name!r} has no answers")}

    def validation_scores(self, predictions: Mapping[int, str]) -> dict[str, float]:
        scores = self.scores(self.val_set.split, predictions)
        return {name: scores[name] for name in ("accuracy", "soft_score") if name in scores}

    def save_files(self, folder: RunFolder) -> None:
        super().save_files(folder)
        write_json(folder.answers, list(self.vocabulary.answers))


class CaptionTask(Task):
    """Write a caption."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        settings = self.config.eval
        for name in settings.metrics or ():
            check_choice("eval.metrics", name, METRICS)
        if settings.caption_tokenizer == "ptb" and find_java() is None:
            raise ConfigError("eval.caption_tokenizer='ptb' needs Java, which is not on PATH; use 'auto' or 'python'")

    def build_model(self) -> ViTGPT2ForCaptioning:
        model = self.config.model
        return ViTGPT2ForCaptioning.from_backbones(
            model.vision,
            self.config.text_model,
            self.config.routing,
            caption_loss=model.caption_loss,
            vision_features=model.vision_features,
            visual_prefix=model.visual_prefix,
            backend=model.backend,
        )

    def load_split(self, split: str, limit: int | None = None, training: bool = False) -> CaptionSplit:
        loaded = load_captions(self.config.data.annotations, split, self.config.data.images)
        if limit is None:
            return loaded
        kept = (
            {c.image_id for c in loaded.captions[:limit]} if training else {i.image_id for i in loaded.images[:limit]}
        )
        captions = loaded.captions[:limit] if training else [c for c in loaded.captions if c.image_id in kept]
        return replace(loaded, images=[i for i in loaded.images if i.image_id in kept], captions=captions)

    def dataset(self, split: CaptionSplit, training: bool) -> CaptionDataset:
        return CaptionDataset(split, per_image=not training, **self.picture_arguments)

    def collator(self) -> CaptionCollator:
        return CaptionCollator(
            self.tokenizer,
            self.config.max_text_length,
            self.config.data.padding,
            prefix=self.model.visual_prefix,
            loss=self.model.caption_loss,
        )

    def supervised_items(self, batch: Batch) -> int:
        return int((self.model.next_tokens(batch["labels"]) != IGNORED).sum())

    def training_inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        # The labels stay on the host, where choosing the positions that count waits for nothing.
        rest = {key: value for key, value in batch.items() if key != "labels"}
        return self.model_inputs(rest, device) | {"labels": batch["labels"], "return_logits": False}

    def predict(self, batch: Batch, num_beams: int) -> dict[int, str]:
        inputs = self.model_inputs(batch, self.model.device)
        pictures = {key: inputs[key] for key in ("pixel_values", "vision_features") if key in inputs}
        return dict(zip(batch["image_ids"], self.write(num_beams=num_beams, **pictures), strict=True))

    def write(self, num_beams: int, **pictures: torch.Tensor) -> list[str]:
        """Captions of a batch of pixel_values= or vision_features=."""
        settings = self.config.eval
        beams = {"length_penalty": settings.length_penalty} if num_beams > 1 else {}
        tokens = self.model.generate(**pictures, num_beams=num_beams, max_new_tokens=settings.max_new_tokens, **beams)
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def selection_metric(self, split: CaptionSplit) -> str:
        return "CIDEr"

    def scores(self, split: CaptionSplit, predictions: Mapping[int, str]) -> dict[str, Any]:
        """Every caption metric that can run; "missing" gives the reason for each other one."""
        settings = self.config.eval
        scores = self._caption_scores(split, predictions, settings.metrics, settings.caption_tokenizer)
        scores.pop("per_image", None)
        return {"n": len(predictions)} | scores

    def validation_scores(self, predictions: Mapping[int, str]) -> dict[str, float]:
        # The Python tokenizer is the same everywhere and starts no Java.
        return {"CIDEr": self._caption_scores(self.val_set.split, predictions, ("CIDEr",), "python")["CIDEr"]}

    def _caption_scores(
        self, split: CaptionSplit, predictions: Mapping[int, str], metrics: tuple[str, ...] | None, tokenizer: str
    ) -> dict[str, Any]:
        described = {i: text for i, text in predictions.items() if i in split.references}
        if not described:
            return {"missing": {"captions": f"split {split.name!r} has no reference captions"}}
        references = {image_id: split.references[image_id] for image_id in described}
        return caption_scores(described, references, metrics=metrics, tokenizer=tokenizer)


def build_task(config: RunConfig, *, model: RoutedVLModel | None, tokenizer: Any, device: torch.device) -> Task:
    """The task of a new run, its training data read and its model (a given one, or a new one) on ``device``.

    Annotations are read first, so that a wrong path fails before backbones load.

    Raises ConfigError, DataError or OSError naming what is missing.
    """
    tokenizer = tokenizer or load_tokenizer(config.model.tokenizer or config.text_model)
    preprocessor = ImagePreprocessor.from_pretrained(config.model.vision)
    vocabulary = AnswerVocabulary.load(config.data.answers or config.data.annotations) if config.task == "vqa" else None
    task = make_task(config, tokenizer, preprocessor, vocabulary)
    train, val = task.read_training_splits()
    task.model = (model or task.build_model()).to(device)
    if vocabulary is not None and task.model.num_labels != len(vocabulary):
        raise ConfigError(f"the model has {task.model.num_labels} answers, the vocabulary {len(vocabulary)}")
    if config.model.activation_checkpointing:
        task.model.gradient_checkpointing_enable()
    task.load_training_data(train, val)
    return task


def load_task(folder: RunFolder, config: RunConfig, checkpoint: str, device: torch.device) -> Task:
    """The task of a finished run with its adapter called ``checkpoint``; no data is read.

    Raises RunError when the run has no such adapter.
    """
    adapter = folder.adapter(checkpoint)
    vocabulary = AnswerVocabulary.load(folder.answers) if config.task == "vqa" else None
    preprocessor = ImagePreprocessor.from_dict(json.loads(folder.preprocessor.read_text(encoding="utf-8")))
    task = make_task(config, load_tokenizer(str(folder.tokenizer)), preprocessor, vocabulary)
    task.model = load_pretrained(adapter, backend=config.model.backend).to(device)
    return task


def make_task(
    config: RunConfig, tokenizer: Any, preprocessor: ImagePreprocessor, vocabulary: AnswerVocabulary | None
) -> Task:
    """The task that ``config.task`` names, still without a model."""
    if vocabulary is not None:
        return VQATask(config, tokenizer, preprocessor, vocabulary=vocabulary)
    return CaptionTask(config, tokenizer, preprocessor)


def load_tokenizer(name: str) -> Any:
    """A transformers tokenizer of a hub name or folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _own_rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
