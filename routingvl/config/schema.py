"""The settings of one run: frozen dataclasses with one default each, every value checked when it is made.

The bottlenecks' settings are in config/routing.py; config/files.py reads all from YAML and the command line. The four
published recipes are files in ``configs/``; docs/configuration.md explains every key.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from routingvl.backbones.vision import FEATURES
from routingvl.config.checks import ConfigError, check_settings, check_value, from_dict, nearest, setting, types_of
from routingvl.config.mixture import mixture_parts
from routingvl.config.routing import NEWER, RoutingConfig
from routingvl.kernels.dispatch import BACKENDS

DEFAULT_VISION = "google/vit-base-patch16-224-in21k"

# Names of choices that other modules look up; each is declared here and nowhere else.
IMAGE_POOLINGS = ("mean",)
# Settings that runs of before did not record; by default they ask for what all of these did.
NEWER_KEYS = ("data.mixture", "model.image_pooling", "model.project_features", *(f"routing.{name}" for name in NEWER))
TEXT_EMBEDDINGS = ("published", "single")
CAPTION_LOSSES = ("sound", "reference")
CLASSIFIER_LAYERS = (1, 2)
PADDINGS = ("longest", "max_length")
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}  # -> transformers' name
MIXED_PRECISION = {"no": None, "bf16": "bfloat16", "fp16": "float16"}  # -> torch's name
FEATURE_DTYPES = ("float32", "float16", "bfloat16")
TRACKERS = ("tensorboard", "wandb")
ON_BAD_IMAGE = ("fail", "skip")
LARGEST_BATCH = 2**16  # examples that are read at once


@dataclass(frozen=True)
class ModelConfig:
    """Backbones and head; both backbones stay frozen but for what ``routing`` trains.

    Attributes:
        vision: vision tower, a hub name or a local folder.
        text: language model, a hub name or a local folder; null takes the task's.
        tokenizer: hub name or local folder; null takes the one of the language model.
        vision_features: what of the vision tower is used: pooler, cls, mean or tokens (all of them; with routing vllora
            or image_pooling mean).
        vision_layer: transformer layer of the vision tower whose output is used, from the end and without a norm (-2:
            the last but one); null takes the tower's own output.
        visual_prefix: put the image in front of the text as well as into the bottlenecks.
        image_pooling: what the bottlenecks read of several visual tokens: mean, their mean, while the prefix keeps them
            all; null, the tokens themselves (routing vllora only).
        project_features: put a trained linear layer between vision tower and language model even where their widths
            agree.
        classifier_layers: linear layers in the head over answers or labels, 1 or 2.
        text_embedding: RoBERTa with a prefix embeds text twice in the published code (published) or once (single);
            null takes published for RoBERTa and single, which is all they have, for others.
        caption_loss: sound (the prefix predicts the first word, padding is ignored) or reference (the published one).
        activation_checkpointing: recompute activations in backward, which saves memory and costs time.
        backend: how bottlenecks are computed: null (the best that runs here), eager or triton.
    """

    vision: str = DEFAULT_VISION
    text: str | None = None
    tokenizer: str | None = None
    vision_features: str = setting("pooler", choices=tuple(FEATURES))
    vision_layer: int | None = setting(None, least=-1000, most=-1)
    visual_prefix: bool = True
    image_pooling: str | None = setting(None, choices=IMAGE_POOLINGS)
    project_features: bool = False
    classifier_layers: int = setting(2, choices=CLASSIFIER_LAYERS)
    text_embedding: str | None = setting(None, choices=TEXT_EMBEDDINGS)
    caption_loss: str = setting("sound", choices=CAPTION_LOSSES)
    activation_checkpointing: bool = False
    backend: str | None = setting(None, choices=BACKENDS)
    __post_init__ = check_settings


@dataclass(frozen=True)
class DataConfig:
    """Files and how they become batches; ``routingvl prepare-data`` derives the files from the official ones.

    Attributes:
        annotations: folder (or file) of questions, captions or labelled texts, in a form of docs/data.md.
        images: folder that holds train2014/, val2014/ and test2015/.
        answers: JSON list of the answers (vqa, gqa) or labels (classify) to choose from; null takes the one of the
            annotations folder (trainval_label2ans.json, labels.json).
        train_split: examples to train on.
        val_split: examples that choose the best checkpoint; null does not validate.
        max_text_length: longest text in tokens, special tokens included and the prefix not; null takes the task's.
        padding: pad texts to the longest of their batch (longest) or to max_text_length (max_length).
        on_bad_image: an unreadable image stops the run (fail) or drops its example and is counted (skip).
        precompute_features: run the frozen ViT once per image at the start and keep its output in memory.
        feature_cache: folder that keeps the ViT's output of each image for all runs; missing images are added first.
        feature_dtype: type in which features are kept: float32, float16 or bfloat16.
        feature_batch_size: images per batch while features are computed.
        workers: processes that load batches; 0 loads in the training process.
        train_limit: use only the first so many captions or questions for training.
        val_limit: use only the first so many images (caption) or questions (vqa) for validation.
        allow_shared_splits: let validation and evaluation use examples of the training split.
        allow_symlinks: let symbolic links below images lead out of that folder.
        exif_orientation: turn images as their EXIF data say; the published recipes do not.
        mixture: the data sets of task mixture, `{name: {task: ..., prompt: ..., annotations: ...}}`.
    """

    annotations: str | None = None
    images: str | None = None
    answers: str | None = None
    train_split: str = "train"
    val_split: str | None = "val"
    max_text_length: int | None = setting(None, least=3)
    padding: str = setting("longest", choices=PADDINGS)
    on_bad_image: str = setting("fail", choices=ON_BAD_IMAGE)
    precompute_features: bool = False
    feature_cache: str | None = None
    feature_dtype: str = setting("float32", choices=FEATURE_DTYPES)
    feature_batch_size: int = setting(64, least=1, most=LARGEST_BATCH)
    workers: int = setting(0, least=0, most=256)
    train_limit: int | None = setting(None, least=1)
    val_limit: int | None = setting(None, least=1)
    allow_shared_splits: bool = False
    allow_symlinks: bool = False
    exif_orientation: bool = False
    mixture: dict | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.mixture is not None:
            mixture_parts(self.mixture)

    @property
    def parts(self) -> dict[str, DataConfig]:
        """The settings of each data set of a mixture, by name; of a single one, under no name."""
        if self.mixture is None:
            return {"": self}
        parts = mixture_parts(self.mixture)
        return {name: dataclasses.replace(self, mixture=None, **part.of_data) for name, part in parts.items()}

    @property
    def keeps_features(self) -> bool:
        """Whether the ViT runs once per image, before the first step, instead of in each step."""
        return self.precompute_features or self.feature_cache is not None


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation: AdamW on the trainable parameters, one schedule, and when to validate and save.

    Attributes:
        lr: highest learning rate.
        epochs: passes over the training examples; may be a fraction.
        max_steps: optimiser steps; when given it decides instead of epochs.
        batch_size: examples of one optimiser step, over all processes and micro-batches together.
        accumulation: micro-batches into which each process splits its share of a batch, to save memory.
        warmup: steps of linear warm-up when an integer (5000), share of all steps when a fraction (0.05).
        group_by_length: fill a step with texts of similar length, which saves padding.
        schedule: learning rate after the warm-up: linear (to zero), cosine (to zero) or constant.
        weight_decay: of AdamW.
        eps: of AdamW.
        betas: of AdamW.
        max_grad_norm: clip the gradient to this norm; null does not clip.
        mixed_precision: no, bf16 or fp16 (fp16 needs a GPU).
        compile: run the language model through torch.compile in training (a CPU needs a C++ compiler).
        seed: of weights, data order and dropout.
        log_every: steps between training lines in metrics.jsonl.
        eval_every: steps between validations; null validates after each epoch, 0 only at the end.
        save_every: steps between saves of the resumable state; null saves after each validation.
        trackers: further logs beside metrics.jsonl: tensorboard, wandb.
    """

    lr: float = setting(3e-4, above=0)
    epochs: float = setting(20, above=0, most=1e6)
    max_steps: int | None = setting(None, least=1)
    batch_size: int = setting(64, least=1, most=LARGEST_BATCH)
    accumulation: int = setting(1, least=1)
    warmup: int | float = setting(0.05, least=0)
    group_by_length: bool = True
    schedule: str = setting("linear", choices=tuple(SCHEDULES))
    weight_decay: float = setting(0.0, least=0)
    eps: float = setting(1e-6, least=1e-30, most=1)
    betas: tuple[float, float] = setting((0.9, 0.999), least=0, below=1)
    max_grad_norm: float | None = setting(None, above=0)
    mixed_precision: str = setting("no", choices=tuple(MIXED_PRECISION))
    compile: bool = False
    seed: int = setting(0, least=0, most=2**32 - 1)
    log_every: int = setting(50, least=1)
    eval_every: int | None = setting(None, least=0)
    save_every: int | None = setting(None, least=1)
    trackers: tuple[str, ...] = setting((), choices=TRACKERS)

    def __post_init__(self) -> None:
        check_settings(self)
        if isinstance(self.warmup, float) and self.warmup >= 1:
            if not self.warmup.is_integer() or self.warmup == 1:
                raise ConfigError(f"warmup={self.warmup!r} must be an integer (steps) or a fraction below 1")
            object.__setattr__(self, "warmup", int(self.warmup))
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size={self.batch_size} is not divisible by accumulation={self.accumulation}; change one of them"
            )

    def warmup_steps(self, total_steps: int) -> int:
        """Steps of warm-up out of ``total_steps``; a fraction is rounded to the nearest step."""
        return self.warmup if isinstance(self.warmup, int) else round(self.warmup * total_steps)


@dataclass(frozen=True)
class EvalConfig:
    """How answers and captions are predicted and scored.

    Attributes:
        batch_size: examples per batch.
        num_beams: beams of caption generation in ``evaluate`` and ``caption``; 1 is greedy.
        val_num_beams: beams while training, when only the choice of a checkpoint depends on it.
        max_new_tokens: longest caption in tokens.
        length_penalty: exponent of beam search's length normalisation.
        metrics: caption metrics of ``evaluate``; null computes all that can run here.
        caption_tokenizer: of the caption metrics: auto (Java's PTB when there is Java), ptb or python.
        vqa_rule: official VQA accuracy as since 2021 or as before it (2016).
    """

    batch_size: int = setting(64, least=1, most=LARGEST_BATCH)
    num_beams: int = setting(5, least=1, most=1000)
    val_num_beams: int = setting(1, least=1, most=1000)
    max_new_tokens: int = setting(20, least=1)
    length_penalty: float = setting(1.0, least=-100, most=100)
    metrics: tuple[str, ...] | None = None
    caption_tokenizer: str = setting("auto", choices=("auto", "ptb", "python"))
    vqa_rule: str = setting("2021", choices=("2021", "2016"))
    __post_init__ = check_settings


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run.

    Attributes:
        task: vqa (choose an answer to a question), vqa-generate (write it), caption (write one), classify (choose one
            of n labels), gqa, nlvr2, mixture (several data sets), or another one of routingvl/tasks.
        output_dir: run folder: config, environment, logs, adapters, metrics.
        device: auto (a GPU when there is one) or cpu.
        model: backbones and head.
        routing: the trained bottlenecks.
        data: files.
        train: optimisation.
        eval: prediction and scores.
    """

    task: str = "vqa"
    output_dir: str = "runs/latest"
    device: str = setting("auto", choices=("auto", "cpu"))
    model: ModelConfig = field(default_factory=ModelConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.train.compile and self.model.activation_checkpointing:
            raise ConfigError("train.compile and model.activation_checkpointing exclude each other; turn one off")

    def absolute(self) -> RunConfig:
        """The same config with every local path made absolute, so that its run works from any folder."""

        def resolved(part: Any, *keys: str) -> Any:
            paths = {key: value for key in keys if (value := getattr(part, key)) and os.path.exists(value)}
            return dataclasses.replace(part, **{key: os.path.abspath(value) for key, value in paths.items()})

        data = resolved(self.data, "annotations", "images", "answers")
        if data.mixture is not None:
            parts = mixture_parts(data.mixture).items()
            places = {name: resolved(part, "annotations", "images").of_data for name, part in parts}
            mixture = {name: {**part, **places[name]} for name, part in data.mixture.items()}
            data = dataclasses.replace(data, mixture=mixture)
        if data.feature_cache is not None:  # may still be to make
            data = dataclasses.replace(data, feature_cache=os.path.abspath(data.feature_cache))
        return dataclasses.replace(
            self,
            output_dir=os.path.abspath(self.output_dir),
            model=resolved(self.model, "vision", "text", "tokenizer"),
            data=data,
        )

    def check_files(self) -> None:
        """Raise :class:`ConfigError` when a path of ``data`` is missing, before anything slow starts."""
        for name, data in self.data.parts.items():
            of = f"data.mixture.{name}" if name else "data"
            for key, needed in (("annotations", True), ("images", True), ("answers", False)):
                value = getattr(data, key)
                if value is None:
                    if needed:
                        how = f"give --data.{key} PATH or set it in the config file"
                        raise ConfigError(f"{of}.{key} is not set; {how}")
                elif not os.path.exists(value):
                    raise ConfigError(
                        f"{of}.{key}: {value} does not exist; correct the path or run routingvl prepare-data"
                    )
        if (cache := self.data.feature_cache) is not None and os.path.exists(cache) and not os.path.isdir(cache):
            raise ConfigError(f"data.feature_cache: {cache} is a file; name a folder")


PARTS = {f.name: f.default_factory for f in dataclasses.fields(RunConfig) if f.default is dataclasses.MISSING}


def run_config_from_dict(data: Mapping[str, Any]) -> RunConfig:
    """Build a :class:`RunConfig` from nested mappings of plain values.

    Raises :class:`ConfigError`, which names the part, for an unknown key or an impossible value.
    """
    parts = {
        name: data[name] if isinstance(data[name], cls) else from_dict(cls, data[name], source=name)
        for name, cls in PARTS.items()
        if name in data
    }
    return from_dict(RunConfig, {**data, **parts}, source="run")


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values (lists for tuples) from which :func:`run_config_from_dict` rebuilds the same config."""
    plain = lambda items: {key: list(value) if isinstance(value, tuple) else value for key, value in items}  # noqa: E731
    return dataclasses.asdict(config, dict_factory=plain)


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every setting under its dotted name, such as ``train.lr``."""
    values = config_to_dict(config)
    parts = {name: values.pop(name) for name in PARTS}
    return values | {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}


def known_keys() -> list[str]:
    """Dotted names of every setting."""
    return list(flatten(RunConfig()))


def explanations() -> dict[str, str]:
    """What the docstrings above say of each setting, by dotted name."""
    texts = {}
    for part, cls in {"": RunConfig, **PARTS}.items():
        for name, text in re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", cls.__doc__ or "", re.MULTILINE):
            texts[f"{part}.{name}".lstrip(".")] = " ".join(text.split())
    return texts


def type_of(key: str) -> tuple[Any, ...]:
    """The types that the setting of this dotted name can have."""
    part, _, name = key.rpartition(".")
    return types_of(PARTS[part] if part else RunConfig)[name]


def check_one(key: str, value: Any) -> None:
    """Raise :class:`ConfigError` when the setting of this dotted name cannot have this value, whatever the others."""
    part, _, name = key.rpartition(".")
    field = {f.name: f for f in dataclasses.fields(PARTS[part] if part else RunConfig)}[name]
    check_value(key, value, type_of(key), field.metadata)
    if key == "data.mixture" and value is not None:
        try:
            mixture_parts(value)
        except ConfigError as error:  # which names the setting from its last part on
            raise ConfigError(f"{part}.{error}") from error


def changed_settings(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (old value, new value) of every setting that differs."""
    before, after = flatten(old), flatten(new)
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def override(config: RunConfig, **settings: Any) -> RunConfig:
    """``config`` with some settings changed, each under its dotted name or its last part (``num_beams=1``).

    Raises :class:`ConfigError` for a name that is unknown, or that belongs to several parts, and for impossible values.
    """
    values, known = config_to_dict(config), known_keys()
    for name, value in settings.items():
        found = [name] if name in known else [key for key in known if key.rsplit(".", 1)[-1] == name]
        if not found:
            leaves = [key.rsplit(".", 1)[-1] for key in known]
            raise ConfigError(f"unknown setting {name!r}{nearest(name, known if '.' in name else leaves)}")
        if len(found) > 1:
            raise ConfigError(f"{name!r} could be {' or '.join(found)}; give the dotted name")
        part, _, key = found[0].rpartition(".")
        (values[part] if part else values)[key] = value
    return run_config_from_dict(values)
