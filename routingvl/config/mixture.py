"""The settings of one data set among several that a run trains on together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from routingvl.config.checks import ConfigError, check_settings, from_dict, setting, shown

OF_DATA = ("annotations", "images", "train_split", "val_split", "train_limit", "val_limit")


@dataclass(frozen=True)
class MixturePart:
    """A data set of ``data.mixture``; what is null is as in ``data``.

    Attributes:
        task: that reads, scores and writes its files: vqa-generate, gqa-generate, nlvr2-generate, caption-generate, or
            another one whose model writes.
        prompt: what stands in front of each of its texts that are read, a blank at its end included.
        weight: how often an epoch goes through its training examples.
        test_split: the one of the split "test".
        annotations, images, train_split, val_split, train_limit, val_limit: see :class:`DataConfig`.
    """

    task: str
    prompt: str | None = None
    weight: int = setting(1, least=1, most=1000)
    test_split: str = "test"
    annotations: str | None = None
    images: str | None = None
    train_split: str | None = None
    val_split: str | None = None
    train_limit: int | None = setting(None, least=1)
    val_limit: int | None = setting(None, least=1)
    __post_init__ = check_settings

    @property
    def of_data(self) -> dict[str, Any]:
        """What it sets of ``data``."""
        return {name: value for name in OF_DATA if (value := getattr(self, name)) is not None}


def mixture_parts(mixture: Mapping[str, Any]) -> dict[str, MixturePart]:
    """The data sets of ``data.mixture``, by name; ConfigError, which names the key, for what none can be."""
    for name in mixture:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ConfigError(f"mixture: {shown(name)} must be a name of letters, digits, - and _")
    if not mixture:
        raise ConfigError("mixture is empty: name at least one data set")
    return {name: from_dict(MixturePart, part, f"mixture.{name}") for name, part in mixture.items()}
