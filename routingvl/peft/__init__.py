"""Routed LoRA as a method of PEFT: importing this registers the type ``ROUTED_LORA``.

``get_peft_model``, ``PeftModel.from_pretrained``, transformers' ``load_adapter`` and hot-swapping then know it::

    from routingvl.peft import RoutedLoraConfig

    model = get_peft_model(base, RoutedLoraConfig(routing="mul", target_modules=["q_proj", "v_proj"], image_from=...))
"""

from __future__ import annotations

import importlib.metadata

TESTED = ("0.21.0", "0.21.2")  # the first and the last version of PEFT that the tests ran with


def check_version() -> None:
    """Raise ImportError unless a version of PEFT is installed whose inner parts are those that this package extends."""
    try:
        installed = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("routingvl.peft needs PEFT: pip install 'routingvl[peft]'") from None
    series = TESTED[0].rpartition(".")[0]
    if installed.split(".")[:2] != series.split("."):
        raise ImportError(
            f"routingvl.peft extends inner parts of PEFT {TESTED[0]} to {TESTED[1]}, and PEFT {installed} is "
            f"installed, where they differ: pip install 'peft=={series}.*'"
        )


check_version()

from routingvl.peft.config import PeftMethodError, RoutedLoraConfig  # noqa: E402
from routingvl.peft.model import RoutedLoraModel, register  # noqa: E402

register()

__all__ = ["PeftMethodError", "RoutedLoraConfig", "RoutedLoraModel"]
