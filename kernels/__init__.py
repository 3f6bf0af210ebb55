"""Routed bottlenecks as differentiable functions of tensors. Imports torch and, where it is installed, triton; nothing
else. The letters of formulas, shapes and code are those of docs/notation.md.
"""

from .activations import ACTIVATIONS
from .adapter.api import routed_adapter
from .dispatch import select_backend
from .image_code import (
    ImageCode,
    can_project_jointly,
    project_adapter_image,
    project_adapter_images,
    project_lora_image,
    project_lora_images,
)
from .lora.api import routed_lora, routed_lora_linear
from .routing import ABLATIONS, ROUTINGS, Routing, find_routing

__all__ = [
    "ABLATIONS",
    "ACTIVATIONS",
    "ROUTINGS",
    "ImageCode",
    "Routing",
    "can_project_jointly",
    "find_routing",
    "project_adapter_image",
    "project_adapter_images",
    "project_lora_image",
    "project_lora_images",
    "routed_adapter",
    "routed_lora",
    "routed_lora_linear",
    "select_backend",
]
