"""DeepSpeed's ZeRO on the CPU, 1 to 3 in one process, 2 and 3 in two: training, saving, loading. It is no dependency.

Where it is not installed, test_sharding.py has a stand-in.
"""

from __future__ import annotations

import importlib
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from processes import PROCESSES, needs_gloo, run_in_processes
from tiny import batch, captioner, randomise, small_gpt2, small_vit
from torch import nn

import routingvl
from routingvl import RoutingConfig
from routingvl.bottlenecks.sharding import is_sharded, whole
from routingvl.models import load_pretrained

pytestmark = [pytest.mark.slow, needs_gloo]

STAGES = [1, 2, 3]
ROUTING = RoutingConfig(rank=4, routing="mul")
STEPS = 3


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory):
    """deepspeed on the CPU, with a process group of this process alone."""
    settings = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    with pytest.MonkeyPatch.context() as patch:  # undone too where deepspeed is not installed, and this skips
        for name, value in settings.items():
            patch.setenv(name, value)
        module = pytest.importorskip("deepspeed")
        # A C++ extension, compiled for minutes, that one process has no use for.
        patch.setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
        meeting = (tmp_path_factory.mktemp("deepspeed") / "rendezvous").as_uri()
        torch.distributed.init_process_group("gloo", meeting, timeout=timedelta(seconds=60), rank=0, world_size=1)
        module.init_distributed("gloo", dist_init_required=False)
        yield module
        torch.distributed.destroy_process_group()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """For several processes: a gradient of another size shows, and the order of a sum does not."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def steps(deepspeed, model: nn.Module, stage: int, loss, make=adamw) -> list[float]:
    """Losses of a few steps, the mean of all processes; ``loss`` takes what is to be called in place of the model."""
    optimizer = make(model)
    settings = {
        "train_micro_batch_size_per_gpu": 3 // torch.distributed.get_world_size(),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,  # else 1, and the steps are others from the second on
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    assert all(map(is_sharded, model.parameters())) == (stage == 3)
    found = []
    for _ in range(STEPS):
        value = loss(engine)
        engine.backward(value)
        engine.step()
        mean = value.detach().clone()
        torch.distributed.all_reduce(mean)
        found.append(mean.item() / torch.distributed.get_world_size())
    return found


def plain_steps(model: nn.Module, loss, make=adamw) -> list[float]:
    optimizer = make(model)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


def check_same(loaded: nn.Module, trained: nn.Module) -> None:
    want = {name: whole(parameter) for name, parameter in trained.named_parameters()}
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, want[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_task_model_trains_and_is_saved(deepspeed, stage: int, dtype: str, tmp_path: Path) -> None:
    """With a projection of the image, which is held in float32 as the bottlenecks are."""

    def build() -> nn.Module:
        return randomise(captioner(ROUTING, vit_width=16, dtype=dtype)).train()

    def loss(called):
        inputs = batch()
        return called(**inputs, labels=inputs["input_ids"]).loss

    want, model = plain_steps(build(), loss), build()
    assert steps(deepspeed, model, stage, loss) == pytest.approx(want, rel=1e-4)
    model.save_pretrained(tmp_path, is_main_process=True)
    check_same(load_pretrained(tmp_path, vision=small_vit(16), text=small_gpt2(), dtype=dtype), model)


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_of_transformers_trains_and_is_saved(deepspeed, stage: int, tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = small_gpt2()
        routingvl.inject(model, ROUTING)
        return randomise(model).train()

    def loss_in(model: nn.Module):
        inputs, image = batch(), torch.ones(3, 1, 32)
        words = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}

        def loss(called):
            with routingvl.bind_image(model, image):
                return called(**words, labels=words["input_ids"]).loss

        return loss

    alone, model = build(), build()
    want = plain_steps(alone, loss_in(alone))
    assert steps(deepspeed, model, stage, loss_in(model)) == pytest.approx(want, rel=1e-4)
    routingvl.save_adapter(model, tmp_path)
    loaded = small_gpt2()
    routingvl.load_adapter(loaded, tmp_path)
    check_same(loaded, model)


def in_two_processes(rank: int, folder: Path, stage: int) -> None:
    """The trials above with a text for each process, in this one."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "DS_ACCELERATOR": "cpu"}
    module = importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    module.init_distributed("gloo", dist_init_required=False)
    texts, image = batch(), torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(1))

    def caption(called, row: int):
        inputs = {name: values[row : row + 1] for name, values in texts.items()}
        return called(**inputs, labels=inputs["input_ids"]).loss

    def write(called, row: int, model: nn.Module):
        words = {name: texts[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        with routingvl.bind_image(model, image[row : row + 1]):
            return called(**words, labels=words["input_ids"]).loss

    def captioning() -> nn.Module:
        return randomise(captioner(ROUTING, vit_width=16)).train()

    def injected() -> nn.Module:
        model = small_gpt2()
        routingvl.inject(model, ROUTING)
        return randomise(model).train()

    want = plain_steps(captioning(), lambda called: (caption(called, 0) + caption(called, 1)) / 2, sgd)
    model = captioning()
    assert steps(module, model, stage, lambda called: caption(called, rank), sgd) == pytest.approx(want, rel=1e-4)
    model.save_pretrained(folder / "captioner", is_main_process=rank == 0)
    torch.distributed.barrier()
    loaded = load_pretrained(folder / "captioner", vision=small_vit(16), text=small_gpt2())
    check_same(loaded, model)
    alone, model = injected(), injected()
    want = plain_steps(alone, lambda called: (write(called, 0, alone) + write(called, 1, alone)) / 2, sgd)
    got = steps(module, model, stage, lambda called: write(called, rank, model), sgd)
    assert got == pytest.approx(want, rel=1e-4)
    routingvl.save_adapter(model, folder / "gpt2", is_main_process=rank == 0)
    torch.distributed.barrier()
    loaded = small_gpt2()
    routingvl.load_adapter(loaded, folder / "gpt2")
    check_same(loaded, model)


def stage_2(rank: int, folder: Path) -> None:
    """A process of ZeRO 2."""
    in_two_processes(rank, folder, 2)


def stage_3(rank: int, folder: Path) -> None:
    """A process of ZeRO 3."""
    in_two_processes(rank, folder, 3)


@pytest.mark.parametrize("stage", [stage_2, stage_3])
def test_two_processes(stage, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run_in_processes(stage, tmp_path)
