"""Vision-language models with routed bottlenecks: a frozen vision tower beside a language model."""

from pathlib import Path
from typing import Any

from routingvl.bottlenecks.checkpoint import CheckpointError, read_adapter_config
from routingvl.models.base import RoutedVLModel
from routingvl.models.captioning import VisionTextForCaptioning, ViTGPT2ForCaptioning
from routingvl.models.classification import (
    VisionTextForClassification,
    VisionTextForVQA,
    ViTRobertaForClassification,
    ViTRobertaForVQA,
)
from routingvl.models.generation import VisionTextForGeneration
from routingvl.models.hub import DOWNLOAD_OPTIONS, adapter_folder
from routingvl.models.output import ModelOutput

__all__ = [
    "ModelOutput",
    "RoutedVLModel",
    "ViTGPT2ForCaptioning",
    "ViTRobertaForClassification",
    "ViTRobertaForVQA",
    "VisionTextForCaptioning",
    "VisionTextForClassification",
    "VisionTextForGeneration",
    "VisionTextForVQA",
    "load_pretrained",
]
CLASSES = (VisionTextForCaptioning, VisionTextForClassification, VisionTextForGeneration, VisionTextForVQA)
MODELS = {name: cls for cls in CLASSES for name in (cls.__name__, *cls.former_names)}


def load_pretrained(directory: str | Path, **kwargs: Any) -> RoutedVLModel:
    """Load a saved model of any class, of a folder or the hub; see :meth:`RoutedVLModel.from_pretrained`."""
    directory = adapter_folder(directory, **{name: kwargs.pop(name, None) for name in DOWNLOAD_OPTIONS})
    name = read_adapter_config(directory)["model_class"]
    if name not in MODELS:
        raise CheckpointError(f"{directory}: model_class {name!r} is not a model of this library")
    return MODELS[name].from_pretrained(directory, **kwargs)
