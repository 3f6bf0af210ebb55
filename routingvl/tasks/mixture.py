"""Several data sets, of one task or of several, in one run and one model: the multi-task setting of VL-Adapter."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from routingvl.config import ConfigError, check_choice
from routingvl.config.mixture import OF_DATA, MixturePart, mixture_parts
from routingvl.config.schema import RunConfig
from routingvl.data.files import DataError
from routingvl.data.images import ImagePreprocessor, ImageRecord
from routingvl.data.text_to_text import TextExample, TextToTextDataset
from routingvl.tasks.base import Predictions, Split, find_task, register
from routingvl.tasks.writing import GenerateTask

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class MixtureSplit:
    """A split of each data set, by the name of the data set."""

    name: str
    parts: dict[str, Split]

    @property
    def images(self) -> list[ImageRecord]:
        """Those of all data sets, each file once."""
        return list({image.key: image for split in self.parts.values() for image in split.images}.values())

    def example_keys(self) -> Iterator[tuple[Any, ...]]:
        """What makes an example of each data set, with the data set's name."""
        return ((name, *key) for name, split in self.parts.items() for key in split.example_keys())


class Part:
    """One data set: its settings, and the task that reads, scores and writes its files."""

    def __init__(
        self, name: str, settings: MixturePart, config: RunConfig, tokenizer: Any, preprocessor: ImagePreprocessor
    ) -> None:
        try:
            task = find_task(settings.task)
        except ConfigError as error:
            raise ConfigError(f"data.mixture.{name}: {error}") from error
        if not issubclass(task, GenerateTask) or task.mixes:
            raise ConfigError(
                f"data.mixture.{name}.task: the one model of a mixture reads and writes texts, as that of task "
                f"{task.name!r} does not; take one such as vqa-generate"
            )
        self.name, self.settings = name, settings
        self.task = task(replace(config, task=task.name, data=config.data.parts[name]), tokenizer, preprocessor)

    @contextlib.contextmanager
    def faults_named(self) -> Iterator[None]:
        """Have errors of its data speak of its own settings, where its task speaks of those of a single data set."""
        try:
            yield
        except DataError as error:
            own = f"data.mixture.{self.name}"
            text = re.sub(rf"\bdata(?=\.({'|'.join(OF_DATA)})\b)", own, str(error))
            raise DataError(text if own in text else f"{own}: {text}") from error

    def examples(self, split: Split, training: bool) -> Iterator[tuple[int | str, TextExample]]:
        """Its examples, with the prompt in front and an id among those of all data sets; and before each its own id."""
        prompt = self.settings.prompt or ""
        for example in self.task.dataset(split, training).examples:
            yield example.id, replace(example, id=f"{self.name}:{example.id}", prompt=f"{prompt}{example.prompt}")


@register
class MixtureTask(GenerateTask):
    """Learn the data sets of ``data.mixture`` together; each has a task of its own, whose model writes.

    An epoch goes through the examples of all, in one order drawn at random, so that a data set has the share of its
    size. The splits "train", "val" and "test" are those of the data sets, and "NAME:SPLIT" is any split of one of them.
    The best checkpoint is that of the best mean of the data sets' scores, percentages all (CIDEr times 100).
    """

    name = "mixture"
    max_text_length = 64
    mixes = True

    def __init__(self, config: RunConfig, tokenizer: Any, preprocessor: ImagePreprocessor) -> None:
        super().__init__(config, tokenizer, preprocessor)
        settings = mixture_parts(config.data.mixture)
        self.parts = {name: Part(name, part, config, tokenizer, preprocessor) for name, part in settings.items()}
        self.own_ids: dict[str, tuple[str, int | str]] = {}  # of examples to predict: the data set, and the id there

    @property
    def most_images(self) -> int:
        """Of all data sets."""
        return max(part.task.images for part in self.parts.values())

    def read_training_splits(self) -> tuple[MixtureSplit, MixtureSplit | None]:
        """Those of all data sets; DataError when one's two splits share an example."""
        found = {}
        for name, part in self.parts.items():
            with part.faults_named():
                found[name] = part.task.read_training_splits()
        val = {name: own for name, (_, own) in found.items() if own is not None}
        train = MixtureSplit("train", {name: own for name, (own, _) in found.items()})
        return train, MixtureSplit("val", val) if val else None

    def load_split(self, split: str, limit: int | None = None, training: bool = False) -> MixtureSplit:
        """Read a split of all data sets, or of one; ``limit`` is of each."""
        name, colon, own = split.partition(":")
        if colon:
            check_choice("the data set of split", name, tuple(self.parts))
            wanted = {name: own}
        else:
            check_choice("split", split, (*SPLITS, *(f"{name}:SPLIT" for name in self.parts)))
            wanted = {name: self._split_of(part, split) for name, part in self.parts.items()}
        loaded = {}
        for name, own in wanted.items():
            data = self.parts[name].task.config.data
            with self.parts[name].faults_named():
                loaded[name] = self.parts[name].task.load_split(own, limit, training)
            if not (getattr(loaded[name], "split_in_file", True) or data.allow_shared_splits or split == "train"):
                raise DataError(
                    f"{data.annotations} names no splits, so it cannot be trained on and serve as {own!r} too: give "
                    f"data.mixture.{name}.annotations a folder, or set data.allow_shared_splits=true"
                )
        return MixtureSplit(split, loaded)

    def _split_of(self, part: Part, split: str) -> str:
        data = part.task.config.data
        own = {"train": data.train_split, "val": data.val_split, "test": part.settings.test_split}[split]
        if own is None:
            raise DataError("data.val_split is null, so there is no split 'val' to load")
        return own

    def dataset(self, split: MixtureSplit, training: bool) -> TextToTextDataset:
        """The examples of all data sets, one data set behind the other; for training each as often as it weighs."""
        examples = []
        for name, own in split.parts.items():
            part = self.parts[name]
            part.task.features = self.features
            with part.faults_named():
                rows = list(part.examples(own, training))
            if not training:
                self.own_ids |= {example.id: (name, own_id) for own_id, example in rows}
            examples += [example for _, example in rows] * (part.settings.weight if training else 1)
        return TextToTextDataset(split, examples, **self.picture_arguments)

    def by_part(self, predictions: Predictions) -> dict[str, dict[int | str, str]]:
        """Predictions of each data set, by its name and then by its own ids."""
        found: dict[str, dict[int | str, str]] = {name: {} for name in self.parts}
        for i, text in predictions.items():
            name, own = self.own_ids[i]
            found[name][own] = text
        return found

    def selection_metric(self, split: MixtureSplit) -> str:
        """The mean of the data sets' own; DataError when one has nothing to be scored by."""
        for name, own in split.parts.items():
            task = self.parts[name].task
            with self.parts[name].faults_named():
                task.val_set, task.metric = task.dataset(own, training=False), task.selection_metric(own)
        return "mean"

    def validation_scores(self, predictions: Predictions) -> dict[str, float]:
        """The scores of each data set, under its name, and the mean."""
        scores, shares, found_by = {}, [], self.by_part(predictions)
        for name in self.val_set.split.parts:
            task = self.parts[name].task
            found = task.validation_scores(found_by[name])
            shares.append(found[task.metric] * task.percent)
            scores |= {f"{name}/{key}": value for key, value in found.items()}
        return scores | {"mean": sum(shares) / len(shares)}

    def scores(self, split: MixtureSplit, predictions: Predictions) -> dict[str, Any]:
        """The report of each data set, under its name, and the mean of those scores that choose a checkpoint."""
        reports, shares, missing, found = {}, [], {}, self.by_part(predictions)
        for name, own in split.parts.items():
            task = self.parts[name].task
            reports[name] = task.scores(own, found[name])
            try:
                shares.append(reports[name][task.selection_metric(own)] * task.percent)
            except (DataError, KeyError, TypeError):  # no answers; not scored; a metric that could not run
                missing["mean"] = f"{name} has no score"
        mean = {} if missing else {"mean": round(sum(shares) / len(shares), 4)}
        return {"n": len(predictions), **mean, "tasks": reports, "missing": missing}

    def write_predictions(self, folder: Path, split: str, method: str, predictions: Predictions) -> Path:
        """A file for each data set, in its own form; returns the folder, or the one file there is."""
        files = []
        for name, found in self.by_part(predictions).items():
            if found:
                own = split.partition(":")[2] or self._split_of(self.parts[name], split)
                files.append(self.parts[name].task.write_predictions(folder, own, f"{method}-{name}", found))
        return files[0] if len(files) == 1 else folder
