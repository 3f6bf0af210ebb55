"""Digests: equal for equal content wherever it stands, different for any difference."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tiny import small_roberta

from routingvl.digests import PIECE, backbone_digest, file_digest, tensors_digest, value_digest


@dataclass(frozen=True)
class Split:
    name: str
    images: list
    rows: list


def split(root="/a", last="x", images=(1, 2)):
    return Split("train", [(Path(root, str(i)), i) for i in images], [{"text": "x"}] * (PIECE + 3) + [{"text": last}])


def test_values():
    assert value_digest(split()) == value_digest(split("/b"))  # moved
    assert value_digest(split()) != value_digest(split(last="y"))
    assert value_digest(split()) != value_digest(split(images=(2, 1)))
    same, other = ([Path("a"), Path("a")], [Path("a"), Path("b")])
    assert value_digest(same) != value_digest(other)
    assert value_digest([1, [2]]) != value_digest([1, 2])


def test_tensors():
    a = {"x": torch.arange(4.0), "y": torch.zeros(2, dtype=torch.int8)}
    assert tensors_digest(a.items()) == tensors_digest(reversed(a.items()))
    known = {"x": torch.arange(4.0).view(2, 2), "y": torch.ones(1, dtype=torch.bfloat16)}  # feature caches hold it
    assert tensors_digest(known.items()) == "ce4ca8c96b89f6fa550d9f7eb305f4b5a710e06677ecbaa847834ac1578d6294"
    for other in (a | {"x": torch.arange(4.0).view(2, 2)}, a | {"x": -a["x"]}, {"x": a["x"], "z": a["y"]}):
        assert tensors_digest(a.items()) != tensors_digest(other.items())


def test_backbones():
    one, same, other, trained = (small_roberta().requires_grad_(False) for _ in range(4))
    other.encoder.layer[0].output.dense.weight[1, 1] += 1e-6
    trained.embeddings.LayerNorm.requires_grad_(True)
    before = backbone_digest(trained)
    trained.embeddings.LayerNorm.weight.data += 1
    assert backbone_digest(trained) == before
    assert backbone_digest(one) == backbone_digest(same) != backbone_digest(other)
    same.config.layer_norm_eps = 1e-3
    assert backbone_digest(one) != backbone_digest(same)


def test_files(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
