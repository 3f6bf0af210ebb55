"""Backbones from hub names and folders, through transformers, which is imported only when something is loaded."""

from __future__ import annotations

import sys

import torch
from torch import nn


class BackboneError(ValueError):
    """A backbone is of a kind that has no row, or lacks what is asked of it; the message names both."""


def model_type(backbone: nn.Module | str) -> str | None:
    """``model_type`` in the config of a module of transformers, or of a hub name or folder; None for other modules.

    Raises OSError when the name or folder holds no model (transformers' message names it).
    """
    if isinstance(backbone, nn.Module):
        return getattr(getattr(backbone, "config", None), "model_type", None)
    from transformers import PretrainedConfig

    return PretrainedConfig.get_config_dict(backbone)[0].get("model_type")


def load_float32(class_name: str, name: str) -> nn.Module:
    """The model of a hub name or folder as the named class of transformers, in float32 and evaluation mode."""
    import transformers

    return getattr(transformers, class_name).from_pretrained(name, dtype=torch.float32)


def hide_loading_bars(quiet: bool) -> None:
    """Hide the bars that transformers draws while it loads models, when output is not wanted or goes to a file."""
    from transformers.utils import logging

    if quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()
