"""Routed bottlenecks as differentiable functions of tensors. Imports torch and, where it is installed, triton; nothing
else.
"""

from .activations import ACTIVATIONS
from .launch import select_backend
from .routed_adapter import routed_adapter
from .routed_lora import routed_lora, routed_lora_linear
from .routing import ROUTINGS, Routing

__all__ = [
    "ACTIVATIONS",
    "ROUTINGS",
    "Routing",
    "routed_adapter",
    "routed_lora",
    "routed_lora_linear",
    "select_backend",
]
