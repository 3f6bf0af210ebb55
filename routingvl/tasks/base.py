"""What a task is, and the registry of tasks.

A task is a class in a file of this folder, derived from :class:`Task` and decorated with :func:`register`. It says
everything that differs between tasks: the files that are read, data set and batches, the model, what is predicted, how
that is scored and written, what a run folder holds beside the adapter. Nothing outside of its file asks which task
runs: :func:`find_task` looks the name up, :func:`build_task` makes the task of a new run, :func:`load_task` that of a
finished one.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from routingvl.atomic_files import write_json
from routingvl.backbones.loading import BackboneError, find_source, loading
from routingvl.backbones.text import text_kind
from routingvl.backbones.vision import check_image_size
from routingvl.bottlenecks.checkpoint import CONFIG, CheckpointError
from routingvl.config import ConfigError, check_choice
from routingvl.config.schema import RunConfig
from routingvl.data.examples import ExampleDataset, check_separate
from routingvl.data.feature_store import FeatureStore
from routingvl.data.images import ImagePreprocessor, ImageRecord
from routingvl.data.tokens import TokenTable
from routingvl.interrupts import ignore_signals
from routingvl.json_files import read_json
from routingvl.metrics.captions import METRICS
from routingvl.models import RoutedVLModel

Batch = dict[str, Any]
Split = Any  # what load_split reads: it has name, images and example_keys(), as the splits of routingvl.data
Predictions = Mapping[int | str, str]  # by the id of an example

TASKS: dict[str, type[Task]] = {}
TOKENIZER, PREPROCESSOR = "tokenizer", "preprocessor_config.json"  # of every task, in the run folder


class Task(ABC):
    """Model and data of one run.

    Attributes of the class:
        name: value of the setting ``task``.
        model_class: of its model.
        model_settings: settings of ``model`` that only this model class takes, by the names of its options.
        text_model: hub name or folder of the language model when ``model.text`` is null.
        max_text_length: longest text in tokens when ``data.max_text_length`` is null.
        command: sub-command that answers for single images.
        takes_text: whether a single image comes with a text.
        images: how many images an example has.
        mixes: whether it reads the several data sets of ``data.mixture``.
        percent: factor that makes its :attr:`metric` a percentage, for a mean over tasks.

    Attributes:
        model: set by :func:`build_task` or :func:`load_task`.
        train_set, val_set: data sets, once :meth:`load_training_data` ran; val_set is None without validation.
        metric: the validation score that chooses the best checkpoint, known from then on.
    """

    name: ClassVar[str]
    model_class: ClassVar[type[RoutedVLModel]]
    model_settings: ClassVar[tuple[str, ...]] = ()
    text_model: ClassVar[str]
    max_text_length: ClassVar[int]
    command: ClassVar[str] = "predict"
    takes_text: ClassVar[bool] = True
    images: ClassVar[int] = 1
    mixes: ClassVar[bool] = False
    percent: ClassVar[float] = 1.0

    model: RoutedVLModel

    def __init__(self, config: RunConfig, tokenizer: Any, preprocessor: ImagePreprocessor) -> None:
        if self.mixes is (config.data.mixture is None):
            problem = "needs data.mixture, several data sets" if self.mixes else "reads one data set, not data.mixture"
            raise ConfigError(f"task {self.name!r} {problem}")
        for name in config.eval.metrics or ():
            check_choice("eval.metrics", name, METRICS)
        self.config, self.tokenizer = config, tokenizer
        self.preprocessor = replace(preprocessor, exif=config.data.exif_orientation)
        self.text_length = config.data.max_text_length or self.max_text_length
        self.features: Mapping[Path, torch.Tensor] = {}  # by the path of the image
        self.train_set: ExampleDataset | None = None
        self.val_set: ExampleDataset | None = None
        self.metric = ""

    # ------------------------------------------------------------------------------------- what a task has to say

    @abstractmethod
    def load_split(self, split: str, limit: int | None = None, training: bool = False) -> Split:
        """Read the annotations of a split; ``limit`` keeps its first examples."""

    @abstractmethod
    def dataset(self, split: Split, training: bool) -> ExampleDataset:
        """The examples of what :meth:`load_split` read."""

    @abstractmethod
    def collator(self) -> Callable[[Sequence[Any]], Batch | None]:
        """Turns examples into a batch; its ``encode`` turns texts into token ids."""

    @abstractmethod
    def supervised_items(self, batch: Batch) -> int:
        """How many items the model's mean loss over ``batch`` averages over."""

    @abstractmethod
    def predict(self, batch: Batch, num_beams: int) -> Predictions:
        """Predictions of a batch by the ids of its examples."""

    @abstractmethod
    def predict_single(self, batch: Batch, num_beams: int, top: int) -> list[dict[str, Any]]:
        """What ``routingvl predict`` says of each image of a batch, as JSON; ``top`` limits the number of choices."""

    @abstractmethod
    def selection_metric(self, split: Split) -> str:
        """The validation score on ``split`` that chooses the best checkpoint; higher is better."""

    @abstractmethod
    def scores(self, split: Split, predictions: Predictions) -> dict[str, Any]:
        """The full report of predictions on ``split``; a metric that cannot be had is in "missing" with its reason."""

    @abstractmethod
    def write_predictions(self, folder: Path, split: str, method: str, predictions: Predictions) -> Path:
        """Write the result file into ``folder``, which is there; ``method`` names the run. Returns its path."""

    # ---------------------------------------------------------------------------- what some tasks add to or change

    def model_options(self) -> dict[str, Any]:
        """Options of the model class that follow from the data."""
        return {}

    def made_up_labels(self, ids: torch.Tensor, model: RoutedVLModel) -> torch.Tensor:
        """Labels of any kind for texts [B, T], for an estimate of a step's time; by default the texts themselves."""
        return ids

    def use_model(self, model: RoutedVLModel) -> None:
        """Take ``model`` for the run's; ConfigError when it is not of the task's class, or does not fit the data.

        A subclass is of the class too, unless it is another task's.
        """
        classes = {task.model_class for task in TASKS.values()}
        if next((cls for cls in type(model).__mro__ if cls in classes), None) is not self.model_class:
            wanted, found = self.model_class.__name__, type(model).__name__
            raise ConfigError(f"task {self.name!r} trains a {wanted}, not a {found}")
        if model.vit is not None:
            check_image_size(model.vit, self.preprocessor.size)
        token, number = max(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        if number >= model.vocabulary_size:
            raise ConfigError(
                f"token {token!r} of the tokenizer has the id {number}, but the language model knows "
                f"{model.vocabulary_size} tokens only: set model.tokenizer to the one that belongs to it"
            )
        self.model = model

    def single_item(self, *sentences: str) -> dict[str, Any]:
        """The item, without its image, that the collator makes a batch of for :meth:`predict_single`."""
        return {"image_id": 0}

    def read_training_splits(self) -> tuple[Split, Split | None]:
        """The annotations of the training split, and of the validation split or None; DataError when they overlap."""
        data = self.config.data
        train = self.load_split(data.train_split, data.train_limit, training=True)
        if data.val_split is None:
            return train, None
        val = self.load_split(data.val_split, data.val_limit)
        if not data.allow_shared_splits:
            check_separate(train, val)
        return train, val

    def validation_scores(self, predictions: Predictions) -> dict[str, float]:
        """Numbers on the validation set, :attr:`metric` among them: by default those of :meth:`scores`."""
        scores = self.scores(self.val_set.split, predictions)
        return {name: value for name, value in scores.items() if isinstance(value, float)}

    def decided_by(self) -> dict[str, Any]:
        """What decides training and validation, beside settings, model and images, in plain values by their names.

        A run may be resumed only while these are the same.
        """
        examples = "the {} examples (data.annotations)"
        splits = {examples.format("training"): self.train_set, examples.format("validation"): self.val_set}
        sets = {name: data for name, data in splits.items() if data is not None}
        tokens = [[data.tokens.lengths, data.tokens.ids] for data in sets.values() if data.tokens is not None]
        return {
            **{name: data.split for name, data in sets.items()},
            "the tokenizer (model.tokenizer)": [sorted(self.tokenizer.get_vocab().items()), tokens],
            "the image preprocessing (model.vision)": self.preprocessor.to_dict(),
        }

    def training_inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """The arguments of the model's call in a training step; only its loss is read."""
        return self.model_inputs(batch, device)

    def save_files(self, folder: Path) -> None:
        """Put into the run folder what evaluation needs beside the adapter: tokenizer and preprocessing."""
        self.tokenizer.save_pretrained(folder / TOKENIZER)
        write_json(folder / PREPROCESSOR, self.preprocessor.to_dict())

    @classmethod
    def from_folder(cls, folder: Path, config: RunConfig) -> Task:
        """The task with what :meth:`save_files` wrote, still without a model."""
        path = folder / PREPROCESSOR
        preprocessor = ImagePreprocessor.from_dict(read_json(path, CheckpointError, dict), source=str(path))
        return cls(config, load_tokenizer(str(folder / TOKENIZER)), preprocessor)

    # --------------------------------------------------------------------------------------- what all tasks share

    def build_model(self, vision: nn.Module | None = None, text: nn.Module | None = None) -> RoutedVLModel:
        """A new model as the config describes it; from these backbones where they are given."""
        settings = self.config.model
        shared = ("vision_features", "vision_layer", "visual_prefix", "image_pooling", "project_features", "backend")
        return self.model_class.from_backbones(
            vision or settings.vision,
            text or settings.text or self.text_model,
            self.config.routing,
            **{name: getattr(settings, name) for name in (*shared, *self.model_settings)},
            **self.model_options(),
        )

    def load_training_data(self, train: Split, val: Split | None) -> None:
        """Make the data sets of two splits: texts tokenised, and images encoded when features are precomputed."""
        self.precompute([*train.images, *(val.images if val else [])])
        self.train_set = self.dataset(train, training=True)
        if val is not None:
            self.val_set, self.metric = self.dataset(val, training=False), self.selection_metric(val)
        encode = self.collator().encode
        for dataset in (self.train_set, self.val_set):
            if dataset is not None:
                dataset.check_images()
                if dataset.texts:
                    dataset.tokens = TokenTable(dataset.texts, encode)
                    self.check_length(int(dataset.tokens.lengths.max()))

    def check_length(self, longest: int) -> None:
        """ConfigError when texts of ``longest`` tokens do not fit the model's position embeddings."""
        length = self.text_length if self.config.data.padding == "max_length" else longest
        room = self.model.max_positions - (self.most_images * self.visual_tokens if self.model.visual_prefix else 0)
        if length > room:
            raise ConfigError(
                f"texts have up to {length} tokens, and the language model has positions for {room}: set "
                f"data.max_text_length to {room} or less"
            )

    @property
    def most_images(self) -> int:
        """How many images an example has at most."""
        return self.images

    @property
    def visual_tokens(self) -> int:
        """How many visual tokens the model makes of an image."""
        several = self.model.vision_features == "tokens" and self.model.vit is not None
        return self.feature_shape[0] if several else 1

    @cached_property
    def feature_shape(self) -> tuple[int, int]:
        """[L, d] of the features that the vision tower gives of an image, as it gives them of a black one."""
        return tuple(self.model.encode_images(torch.zeros(1, 3, *self.preprocessor.size)).shape[1:])

    def precompute(self, images: Iterable[ImageRecord], progress: bool = False) -> None:
        """Have the features of ``images`` at hand if the config says that features are kept; see FeatureStore.load."""
        new = [image for image in images if image.path not in self.features]
        if self.config.data.keeps_features and new:
            loaded = self.feature_store.load(new, progress=progress)
            self.features = self.features | loaded if self.features else loaded

    @cached_property
    def feature_store(self) -> FeatureStore:
        """Computes and keeps the features of images, in memory or in ``data.feature_cache``."""
        model = self.model
        return FeatureStore(model.vit, model.vision_features, self.preprocessor, self.config.data, model.vision_layer)

    def encode_files(self, paths: Sequence[str | os.PathLike[str]]) -> dict[str, torch.Tensor]:
        """Image files as an input of the model: ``pixel_values`` or, with a feature cache, ``vision_features``.

        Raises ImageError naming a file that cannot be read.
        """
        if self.config.data.feature_cache is None:
            return {"pixel_values": torch.stack([self.preprocessor(path) for path in paths])}
        images = [ImageRecord(i, os.fspath(path), Path(path)) for i, path in enumerate(paths)]
        features = self.feature_store.load(images, on_bad_image="fail")
        return {"vision_features": torch.stack([features[image.path] for image in images])}

    @property
    def file_arguments(self) -> dict[str, Any]:
        """Where the images of a split are."""
        return {"image_root": self.config.data.images, "allow_symlinks": self.config.data.allow_symlinks}

    @property
    def picture_arguments(self) -> dict[str, Any]:
        """How data sets get at an image: stored features, or its file."""
        data = self.config.data
        features = self.features if data.keeps_features else None
        return {"preprocessor": self.preprocessor, "features": features, "on_bad_image": data.on_bad_image}

    @property
    def skipped_images(self) -> int:
        """Examples left out so far because their image is unreadable."""
        return sum(d.skipped for d in (self.train_set, self.val_set) if d is not None)

    def loader(self, dataset: ExampleDataset, batches: Iterable[list[int]]) -> DataLoader:
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
            worker_init_fn=ignore_signals,
            pin_memory=self.model.device.type == "cuda",
            # Its own generator: making an iterator would otherwise draw from the one dropout uses.
            generator=torch.Generator().manual_seed(0),
        )

    def model_inputs(self, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors of a batch, on ``device``."""
        return {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, torch.Tensor)}


def register(task: type[Task]) -> type[Task]:
    """Enter a task in the registry, under its name; a decorator."""
    if TASKS.setdefault(task.name, task) is not task:
        raise ValueError(f"two tasks are called {task.name!r}")
    return task


def find_task(name: str) -> type[Task]:
    """The task called ``name``. Raises :class:`~routingvl.config.ConfigError`, with the nearest name, for none."""
    package = importlib.import_module("routingvl.tasks")
    for module in pkgutil.iter_modules(package.__path__, "routingvl.tasks."):
        importlib.import_module(module.name)
    check_choice("task", name, tuple(TASKS))
    return TASKS[name]


def build_task(config: RunConfig, *, model: RoutedVLModel | None, tokenizer: Any, device: torch.device) -> Task:
    """The task of a new run, its training data read and its model (a given one, or a new one) on ``device``.

    Annotations are read first, so that a wrong path fails before backbones load.

    Raises ConfigError, DataError or OSError naming what is missing.
    """
    task_class, settings = find_task(config.task), config.model
    if model is None and settings.text is not None:
        text_kind(settings.text)  # a folder of another kind may have no tokenizer, and the error would be of that
    tokenizer = tokenizer or load_tokenizer(settings.tokenizer or settings.text or task_class.text_model)
    task = task_class(config, tokenizer, ImagePreprocessor.from_pretrained(settings.vision))
    train, val = task.read_training_splits()
    task.use_model((model or task.build_model()).to(device))
    if settings.activation_checkpointing:
        task.model.gradient_checkpointing_enable()
    task.load_training_data(train, val)
    return task


def load_task(
    folder: Path, adapter: Path, config: RunConfig, device: torch.device, backbones: Mapping[str, str] | None = None
) -> Task:
    """The task of a finished run with the adapter in the folder ``adapter``; no data is read.

    ``backbones`` are the places, by "vision" and "text", of those that have moved.

    Raises CheckpointError or BackboneError when files of the run or of its backbones are missing, damaged or others.
    """
    task = find_task(config.task).from_folder(folder, config)
    model = task.model_class.from_pretrained(adapter, backend=config.model.backend, **(backbones or {}))
    if model.vit is None:
        raise CheckpointError(f"{adapter / CONFIG}: backbones.vision is null, but a run has a vision tower")
    task.use_model(model.to(device))
    return task


def load_tokenizer(name: str) -> Any:
    """A transformers tokenizer of a hub name or folder; raises BackboneError, which names it, for anything else.

    No code that comes with it is run, and nobody is asked whether it may.
    """
    from transformers import AutoTokenizer

    source, local = find_source(name)
    with loading(f"the tokenizer of {name}", local) as options:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise BackboneError(f"the tokenizer of {name} knows no token beside its special ones; its files are damaged")
    return tokenizer
