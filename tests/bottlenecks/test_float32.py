"""Trained norms and heads in float32 inside half-precision models."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from routingvl.bottlenecks.float32 import hold_in_float32, release


@pytest.fixture(params=[nn.LayerNorm, LlamaRMSNorm, lambda width: nn.Linear(width, width)])
def module(request):
    module = request.param(8).bfloat16()
    nn.init.normal_(module.weight)
    return module


def test_forward_is_the_same_to_the_bit_and_gradients_are_float32(module):
    x = torch.randn(3, 8).bfloat16()
    want, names, keys = module(x), {name for name, _ in module.named_parameters()}, list(module.state_dict())
    cls = type(module)
    hold_in_float32(module, dict.fromkeys(names, torch.bfloat16))
    assert torch.equal(module(x), want)
    assert isinstance(module, cls)
    assert list(module.state_dict()) == keys
    module(x).float().sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {p.dtype for p in module.parameters()} == {torch.float32}
    for _ in range(20):  # each step would be rounded away
        with torch.no_grad():
            dict(module.named_parameters())["weight"].add_(1e-4)
    assert not torch.equal(module(x), want)
    trained = module(x)
    release(module)
    assert type(module) is cls
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert torch.equal(module(x), trained)


def test_copies_pickles_and_moves(module):
    x = torch.randn(3, 8).bfloat16()
    hold_in_float32(module, {"weight": torch.bfloat16})
    want = module(x)
    twin = copy.deepcopy(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert torch.equal(other(x), want)
        assert dict(other.named_parameters())["weight"] is not dict(module.named_parameters())["weight"]
    twin.float()
    assert twin(x.float()).dtype == torch.float32
    twin.half()
    assert twin(x.half()).dtype == torch.float16


def test_is_held_again_for_further_parameters():
    module = nn.Linear(8, 8).bfloat16()
    x = torch.randn(3, 8).bfloat16()
    want = module(x)
    hold_in_float32(module, {"bias": torch.bfloat16})
    hold_in_float32(module, {"weight": torch.bfloat16})
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert torch.equal(module(x), want)
    release(module)
    assert type(module) is nn.Linear
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
