"""What a model returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput as TransformersOutput


@dataclass
class ModelOutput(TransformersOutput):
    """loss: scalar, or None without labels; logits: see the model, None where they were not asked for.

    A ModelOutput of transformers, so that Trainer and accelerate read it: the entries that are not None by key, all by
    name. It also unpacks into ``loss, logits``, and ``[0]`` and ``[1]`` are these two whether they are None or not.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def __iter__(self) -> Iterator[torch.Tensor | None]:
        return iter((self.loss, self.logits))

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else (self.loss, self.logits)[key]


@dataclass
class UnalignedOutput(ModelOutput):
    """Logits of a caption, whose position i does not predict the label at position i.

    Trainer's label smoothing reads ``output["logits"]`` of a call without labels, and would pair the two by position
    without a word; so that way to read them is an error here.
    """

    def __getitem__(self, key: str | int | slice) -> Any:
        if key == "logits" and self.loss is None:
            raise ValueError(
                "output['logits'] of captions without labels: their position i does not predict label i, which "
                "is what Trainer's label_smoothing_factor takes them for. Set label_smoothing_factor=0, and smooth in "
                "Trainer's compute_loss_func (docs/howto-trainer.md); other code reads output.logits"
            )
        return super().__getitem__(key)

    def to_tuple(self) -> tuple[torch.Tensor, ...]:
        """The entries that are not None."""
        return tuple(entry for entry in self if entry is not None)
