"""Vision-language models with routed bottlenecks: a frozen ViT beside a RoBERTa (labels) or a GPT-2 (captions)."""

from routingvl.models.base import ModelOutput, RoutedVLModel, load_pretrained
from routingvl.models.captioning import ViTGPT2ForCaptioning
from routingvl.models.classification import ViTRobertaForClassification, ViTRobertaForVQA

__all__ = [
    "ModelOutput",
    "RoutedVLModel",
    "ViTGPT2ForCaptioning",
    "ViTRobertaForClassification",
    "ViTRobertaForVQA",
    "load_pretrained",
]
