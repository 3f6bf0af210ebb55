"""routingvl: fine-tune vision-language models through routed low-rank bottlenecks (arXiv 2403.09377)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# In a checkout the kernels stand beside the package; an installed copy has them inside it (setup.py's package_dir).
# A top-level import package called `kernels` would shadow the public one that transformers imports.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "kernels" / "__init__.py").is_file():
    __path__.append(str(_checkout))

_PUBLIC = {
    "RoutingConfig": "routingvl.config",
    "VisualContext": "routingvl.bottlenecks.context",
    "attach": "routingvl.bottlenecks.attach",
    "bind_image": "routingvl.bottlenecks.attach",
    "disable": "routingvl.bottlenecks.inject",
    "inject": "routingvl.bottlenecks.inject",
    "lower_frozen_weights": "routingvl.bottlenecks.frozen_weights",
    "load_adapter": "routingvl.bottlenecks.saving",
    "remove": "routingvl.bottlenecks.inject",
    "save_adapter": "routingvl.bottlenecks.saving",
    "VisionTextForClassification": "routingvl.models",
    "VisionTextForVQA": "routingvl.models",
    "VisionTextForCaptioning": "routingvl.models",
    "VisionTextForGeneration": "routingvl.models",
    "ViTRobertaForClassification": "routingvl.models",
    "ViTRobertaForVQA": "routingvl.models",
    "ViTGPT2ForCaptioning": "routingvl.models",
    "load_reference_state_dict": "routingvl.bottlenecks.published",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    # Public names load on first use, so that the command line answers --help without importing torch.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'routingvl' has no attribute {name!r}")
