"""Kept casts of frozen weights: the same bits, made once, never stale, and not to be seen from outside."""

import copy
import pickle

import pytest
import torch
from tiny import WIDTH, randomise, small_gpt2, small_roberta
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import routingvl
from routingvl import RoutingConfig, inject, keep_frozen_casts
from routingvl.bottlenecks.frozen_casts import KeepsCasts
from routingvl.bottlenecks.layers import RoutedLoRALinear
from routingvl.training.precision import lower_frozen_weights

IDS = torch.randint(3, 48, (3, 6), generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(3, 1, WIDTH, generator=torch.Generator().manual_seed(2))
BUILD = {"gpt2": small_gpt2, "roberta": small_roberta}


class WeightCasts(TorchDispatchMode):
    """Counts casts of float32 matrices to bfloat16, those of the given parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {p.data_ptr() for p in model.parameters() if not p.requires_grad and p.dim() == 2}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.count += args[0].data_ptr() in self.weights
        return result


def injected(family: str = "gpt2", method: str = "lora", **settings) -> nn.Module:
    model = BUILD[family]()
    inject(model, RoutingConfig(method=method, routing="mul", rank=4, alpha=4, **settings))
    return randomise(model, 0.05).train()


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


@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("family", BUILD)
def test_the_same_bits_and_one_cast_of_each_weight(family, method):
    model = injected(family, method)
    with WeightCasts(model) as plain:
        want = step(model)
    assert plain.count > 8
    keep_frozen_casts(model)
    with WeightCasts(model) as first:
        assert_same(step(model), want)
    with WeightCasts(model) as later:
        assert_same(step(model), want)
    assert (first.count, later.count) == (plain.count, 0)


def test_nothing_of_it_shows_outside_of_autocast():
    model = injected(train_modules=["ln_f"])
    before = copy.deepcopy(model.state_dict())
    names, classes = [n for n, _ in model.named_parameters()], {n: type(m).__name__ for n, m in model.named_modules()}
    with routingvl.bind_image(model, IMAGES):
        want = model(input_ids=IDS)[0]
    keep_frozen_casts(model)
    step(model)
    assert_same(model.state_dict(), before)
    assert [n for n, _ in model.named_parameters()] == names
    assert {n: type(m).__name__ for n, m in model.named_modules()} == classes
    with routingvl.bind_image(model, IMAGES):
        assert torch.equal(model(input_ids=IDS)[0], want)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_saving_and_loading(tmp_path):
    model, other = injected(), injected()
    routingvl.save_adapter(model, tmp_path / "plain")
    keep_frozen_casts(model)
    step(model)
    routingvl.save_adapter(model, tmp_path / "kept")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "kept" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    keep_frozen_casts(other)
    step(other)
    routingvl.load_adapter(other, tmp_path / "kept")
    assert_same(step(other), step(model))


def edit(weight):
    with torch.no_grad():
        weight.mul_(2)


def load(layer):
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})


def replace(layer):
    for name, value in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(2 * value.detach(), requires_grad=False))


def new_data(layer):
    for parameter in layer.parameters():
        parameter.data = 2 * parameter.data


def moved(layer):
    layer.double()
    edit(layer.weight)
    edit(layer.bias)
    layer.float()


CHANGES = {
    "in place": lambda layer: [edit(parameter) for parameter in layer.parameters()],
    "loaded": load,
    "replaced": replace,
    "new data": new_data,
    "moved": moved,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_cast_anew(change):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).requires_grad_(False)
    keep_frozen_casts(layer)
    x = torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        once = layer(x)
        assert layer.weight.dtype == torch.bfloat16
        for _ in range(3):  # freed memory is given out again, at addresses known from before
            want = 2 * layer(x)
            CHANGES[change](layer)
            assert torch.equal(layer(x), want)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert once.dtype == torch.bfloat16


def test_changes_through_data_are_seen_after_another_call():
    layer = nn.Linear(4, 3).requires_grad_(False)
    keep_frozen_casts(layer)
    x = torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
        layer.requires_grad_()  # now it trains
        assert layer.weight.dtype == torch.float32
        layer.requires_grad_(False)
        layer._parameters["weight"].data.mul_(2)
        keep_frozen_casts(layer)
        want = nn.functional.linear(x, layer._parameters["weight"], layer._parameters["bias"])
        assert torch.equal(layer(x), want)


def test_what_is_cast_in_inference_serves_training():
    model = injected()
    want = step(model)
    keep_frozen_casts(model)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), routingvl.bind_image(model, IMAGES):
        model(input_ids=IDS)
    assert_same(step(model), want)
    with torch.autocast("cpu", dtype=torch.float16):
        assert model.lm_head.weight.dtype == torch.float16


def test_a_moved_model_keeps_no_memory_of_the_old_place():
    model = injected()
    keep_frozen_casts(model)
    step(model)
    kept = [module for module in model.modules() if isinstance(module, KeepsCasts)]
    assert any(module.kept_casts for module in kept)
    model.to(torch.float32)
    assert not any(module.kept_casts for module in kept)


def test_copies_and_pickles_start_without_casts():
    model = injected()
    keep_frozen_casts(model)
    want = step(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        kept = [module for module in twin.modules() if isinstance(module, KeepsCasts)]
        assert kept
        assert not any(module.kept_casts for module in kept)
        assert_same(step(twin), want)


def test_undone_and_taken_apart():
    model = injected()
    want = step(model)
    undo = keep_frozen_casts(model)
    step(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), routingvl.disable(model):
        model(input_ids=IDS)
    undo()
    undo()
    assert not any(isinstance(module, KeepsCasts) for module in model.modules())
    assert type(model.transformer.h[0].attn.c_attn) is RoutedLoRALinear
    assert_same(step(model), want)
    keep_frozen_casts(model)
    routingvl.remove(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(input_ids=IDS)[0].isfinite().all()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_trainers_own_lowering_works_on_top_of_it():
    model = injected()
    want, before = step(model), copy.deepcopy(model.state_dict())
    keep_frozen_casts(model)
    restore = lower_frozen_weights(model, torch.bfloat16)
    assert_same(step(model), want)
    restore()
    assert_same(step(model), want)
    assert_same(model.state_dict(), before)
    assert model.lm_head.weight.dtype == torch.float32
    del model.lm_head.weight
    assert not hasattr(model.lm_head, "weight")


def test_compiled_code_reads_the_parameters():
    layer = nn.Linear(4, 3).requires_grad_(False)
    keep_frozen_casts(layer)
    x = torch.randn(2, 4)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = compiled(x)
        assert not layer.kept_casts
        assert torch.equal(layer(x), want)
        assert set(layer.kept_casts) == {"weight", "bias"}


def test_other_modules_are_left_alone():
    class Subclass(nn.Linear):
        pass

    weight_norm = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)).requires_grad_(False)
    model = nn.Sequential(Subclass(4, 4), nn.LayerNorm(4), weight_norm, nn.Linear(4, 4, bias=False).bfloat16())
    model.requires_grad_(False)
    x = torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = model(x)
        keep_frozen_casts(model)
        assert torch.equal(model(x), want)
    assert set(model[0].kept_casts) == {"weight", "bias"}
    assert not model[3].kept_casts
    assert not isinstance(model[1], KeepsCasts)
