"""Frozen weights held in half precision in models of inject and PEFT: the same bits, and back again."""

import copy

import pytest
import torch
from tiny import WIDTH, randomise, small_gpt2, small_roberta
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import routingvl
from routingvl import RoutingConfig, inject, lower_frozen_weights

IDS = torch.randint(3, 48, (3, 6), generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(3, 1, WIDTH, generator=torch.Generator().manual_seed(2))


class WeightCasts(TorchDispatchMode):
    """Counts casts of float32 to bfloat16 of a model's frozen matrices."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {p.data_ptr() for p in model.parameters() if not p.requires_grad and p.dim() == 2}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.count += args[0].data_ptr() in self.weights
        return result


def injected(build, method):
    model = build()
    inject(model, RoutingConfig(method=method, routing="mul", rank=4, alpha=4))
    return randomise(model, 0.05).train()


def of_peft(slices):
    from peft import get_peft_model

    from routingvl.peft import RoutedLoraConfig

    config = RoutedLoraConfig(r=4, lora_alpha=4, routing="mul", target_modules=["c_attn"], slices=slices)
    return randomise(get_peft_model(small_gpt2(), config), 0.05).train()


MODELS = {
    "GPT-2, LoRA": lambda: injected(small_gpt2, "lora"),
    "GPT-2, Adapter": lambda: injected(small_gpt2, "adapter"),
    "RoBERTa, LoRA": lambda: injected(small_roberta, "lora"),
    "PEFT": lambda: of_peft(None),
    "PEFT, slices": lambda: of_peft("family"),
}


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Output and gradients of a training step under autocast."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16), routingvl.bind_image(model, IMAGES):
        y = model(input_ids=IDS)[0]
    y.float().square().mean().backward()
    return {"y": y.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_without_casts_and_back_again(name):
    if "PEFT" in name:
        pytest.importorskip("peft.tuners")
    model = MODELS[name]()
    with WeightCasts(model) as plain:
        want = step(model)
    assert plain.count > 4
    before = copy.deepcopy(model.state_dict())
    restore = lower_frozen_weights(model, torch.bfloat16)
    with WeightCasts(model) as lowered:
        assert_same(step(model), want)
    assert lowered.count == 0
    with routingvl.bind_image(model, IMAGES), pytest.raises((RuntimeError, ValueError), match=r"dtype|cast one"):
        model(input_ids=IDS)  # without autocast
    restore()
    assert_same(model.state_dict(), before)
    assert_same(step(model), want)


def test_what_is_saved_is_the_same(tmp_path):
    model, other = (injected(small_gpt2, "lora") for _ in range(2))
    routingvl.save_adapter(model, tmp_path / "plain")
    lower_frozen_weights(model, torch.bfloat16)
    routingvl.save_adapter(model, tmp_path / "lowered")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "lowered" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    routingvl.load_adapter(other, tmp_path / "lowered")
    assert_same(step(other), step(model))


def test_adapters_that_are_not_active_keep_their_type():
    pytest.importorskip("peft.tuners")
    from routingvl.peft import RoutedLoraConfig

    model = of_peft(None)
    other = RoutedLoraConfig(r=4, lora_alpha=4, routing="none", target_modules=["c_attn"], modules_to_save=["mlp.c_fc"])
    model.add_adapter("other", other)
    lower_frozen_weights(model, torch.bfloat16)
    kinds = {name: weight.dtype for name, weight in model.named_parameters() if "lora_" in name or ".other." in name}
    assert sum(".other." in name for name in kinds) > 4
    assert set(kinds.values()) == {torch.float32}
    assert model.base_model.model.transformer.h[0].attn.c_attn.base_layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, "bf16"])
def test_other_types_are_refused(dtype):
    with pytest.raises(ValueError, match=r"must be torch\.bfloat16 or torch\.float16"):
        lower_frozen_weights(nn.Linear(2, 2), dtype)


def test_not_a_number_comes_back_with_its_neighbours():
    layer = nn.Linear(4, 4).requires_grad_(False)
    layer.weight[0, 0] = torch.nan
    before = layer.weight.clone()
    lower_frozen_weights(layer, torch.bfloat16)()
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=0, equal_nan=True)
    layer.weight.data = before = before.t()
    restore = lower_frozen_weights(layer, torch.bfloat16)
    layer.float()
    restore()
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=0, equal_nan=True)


def test_what_was_changed_meanwhile_stays_changed():
    layer = nn.Linear(4, 4).requires_grad_(False)
    kept, changed = layer.bias.clone(), (2 * layer.weight).bfloat16().float()
    restore = lower_frozen_weights(layer, torch.bfloat16)
    layer.weight.data *= 2  # as PEFT merges
    restore()
    assert torch.equal(layer.bias, kept)
    assert torch.equal(layer.weight, changed)
