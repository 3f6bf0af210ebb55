"""Digests of what decides a result: plain values, tensors and files. SHA-256, in hexadecimal."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing torch takes seconds, and files and values need none of it
    import torch

PIECE = 1000  # items of a list whose text is made at a time


def value_digest(value: Any) -> str:
    """Of plain values, arrays, mappings, and dataclasses or other objects with them; they may hold millions.

    A path counts by whether it is the same as another one, not by its name: a file that moved is the same file.
    """
    places: dict[Path, int] = {}
    names: dict[type, list[str]] = {}

    def plain(part: Any) -> Any:
        if isinstance(part, Path):
            return {"path": places.setdefault(part, len(places))}
        if dataclasses.is_dataclass(part):
            if (kind := type(part)) not in names:
                names[kind] = [field.name for field in dataclasses.fields(part)]
            return [getattr(part, name) for name in names[kind]]
        if isinstance(part, Mapping):
            return dict(part)
        if hasattr(part, "tolist"):
            return part.tolist()
        if hasattr(part, "__dict__"):
            return vars(part)
        raise TypeError(f"a {type(part).__name__} has no digest")

    digest = hashlib.sha256()
    encoder = json.JSONEncoder(default=plain)
    for part in plain(value) if dataclasses.is_dataclass(value) else [value]:
        # The long lists of a data set in pieces: the text of a whole one would take as much memory again.
        pieces = [part[i : i + PIECE] for i in range(0, len(part), PIECE)] if isinstance(part, list) else [part]
        for piece in pieces:
            digest.update(encoder.encode(piece).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Of named tensors, in any order: names, shapes, dtypes and all values, bit for bit."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Of a file's content. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def backbone_digest(backbone: torch.nn.Module) -> str:
    """Of a frozen backbone: its settings, and every weight and buffer that does not train.

    Neither the folder it was loaded from nor versions count, nor the bottlenecks in it.
    """
    settings = settings_of(backbone.config.to_diff_dict())
    frozen = [(name, p) for name, p in backbone.named_parameters() if not p.requires_grad]
    settings = json.dumps(settings, sort_keys=True, default=str)
    return value_digest([settings, tensors_digest([*frozen, *backbone.named_buffers()])])


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a backbone's config that say what it computes, not where it came from."""
    return {name: value for name, value in config.items() if name not in _NOT_COMPUTED and not name.startswith("_")}


_NOT_COMPUTED = ("transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id")
