"""Vision-language models with routed bottlenecks: a frozen ViT beside a RoBERTa (VQA) or a GPT-2 (captioning)."""

from routingvl.models.base import ModelOutput, RoutedVLModel, load_pretrained
from routingvl.models.captioning import ViTGPT2ForCaptioning
from routingvl.models.classification import ViTRobertaForVQA

__all__ = ["ModelOutput", "RoutedVLModel", "ViTGPT2ForCaptioning", "ViTRobertaForVQA", "load_pretrained"]
