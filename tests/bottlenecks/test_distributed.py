"""DistributedDataParallel and FSDP2 in two processes: the gradients and files of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import PROCESSES, needs_gloo, run_in_processes
from tiny import answerer, batch, captioner, randomise, small_roberta, small_vit
from tolerances import relative_rms
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from routingvl import RoutingConfig, ViTGPT2ForCaptioning
from routingvl.bottlenecks.sharding import is_sharded, whole
from routingvl.models import load_pretrained

pytestmark = [
    pytest.mark.slow,
    needs_gloo,
]

ROWS = 4
TOLERANCE = 1e-4  # relative RMS: the same float32 sums in another order, through a softmax
MODELS = {
    "caption-lora-mul": (captioner, {"routing": "mul"}),
    "caption-lora-vllora": (captioner, {"routing": "vllora"}),
    "caption-adapter-add": (captioner, {"routing": "add", "method": "adapter"}),
    "vqa-lora-expand": (answerer, {"routing": "expand"}),
    "vqa-adapter-vllora": (answerer, {"routing": "vllora", "method": "adapter"}),
}
CASES = [(name, recompute) for name in MODELS for recompute in (False, True)]
IDS = [f"{name}{'-checkpointing' * recompute}" for name, recompute in CASES]


def build(name: str, recompute: bool = False) -> nn.Module:
    """A model in training mode, the same in every process."""
    make, routing = MODELS[name]
    model = randomise(make(RoutingConfig(rank=4, **routing))).train()
    if recompute:
        model.gradient_checkpointing_enable()
    return model


def backward(called: nn.Module, share: slice, processes: int) -> None:
    """Gradients of a weighted sum over the rows in ``share``, scaled so that averaging over processes gives the sum."""
    inputs = {name: tensor[share] for name, tensor in batch(rows=ROWS).items()}
    logits = called(**inputs).logits
    weights = torch.linspace(-1, 1, ROWS * logits[0].numel()).view(ROWS, *logits.shape[1:])
    (processes * (logits * weights[share]).sum()).backward()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradient of every trained parameter, whole."""
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}


def share_of(rank: int) -> slice:
    return slice(rank * ROWS // PROCESSES, (rank + 1) * ROWS // PROCESSES)


def keep(rank: int, path: Path, found: dict) -> None:
    if rank == 0:
        torch.save(found, path)


def ddp(rank: int, folder: Path) -> None:
    """Every case under DistributedDataParallel."""
    for (name, recompute), key in zip(CASES, IDS, strict=True):
        model = build(name, recompute)
        backward(DistributedDataParallel(model), share_of(rank), PROCESSES)
        keep(rank, folder / f"{key}.pt", gradients(model))
    if rank == 0:
        model.save_pretrained(folder / "adapter")


def fsdp(rank: int, folder: Path) -> None:
    """Every case with each transformer layer sharded by itself."""
    from torch.distributed.fsdp import fully_shard

    for (name, recompute), key in zip(CASES, IDS, strict=True):
        model = build(name, recompute)
        body = model.language_model
        blocks = body.transformer.h if isinstance(model, ViTGPT2ForCaptioning) else body.encoder.layer
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
        assert all(map(is_sharded, model.parameters()))
        backward(model, share_of(rank), PROCESSES)
        keep(rank, folder / f"{key}.pt", gradients(model))
    model.save_pretrained(folder / "adapter")


@pytest.fixture(scope="module", params=[ddp, fsdp], ids=lambda work: work.__name__)
def shared(request, tmp_path_factory) -> Path:
    """The folder in which two processes left what they found."""
    if request.param is fsdp:
        pytest.importorskip("torch.distributed.fsdp", reason="a torch without FSDP")
    folder = tmp_path_factory.mktemp(request.param.__name__)
    run_in_processes(request.param, folder)
    return folder


@pytest.mark.parametrize(("name", "recompute"), CASES, ids=IDS)
def test_gradients_are_those_of_one_process(shared: Path, name: str, recompute: bool) -> None:
    found = torch.load(shared / f"{name}{'-checkpointing' * recompute}.pt")
    model = build(name)
    backward(model, slice(ROWS), 1)
    want = gradients(model)
    assert found.keys() == want.keys()
    errors = {name: relative_rms(found[name], want[name]) for name in want if want[name].abs().max() > 0}
    assert len(errors) > len(want) / 2
    assert max(errors.values()) < TOLERANCE, max(errors.items(), key=lambda item: item[1])


def test_the_first_process_saves_the_whole_adapter(shared: Path, tmp_path: Path) -> None:
    model = build(CASES[-1][0])
    model.save_pretrained(tmp_path)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (shared / "adapter" / file).read_bytes() == (tmp_path / file).read_bytes()
    loaded = load_pretrained(shared / "adapter", vision=small_vit(), text=small_roberta())
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))
