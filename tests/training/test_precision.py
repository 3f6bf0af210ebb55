"""Frozen weights held in low precision: the same results, and a model that comes back as it was."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import answerer, batch, captioner, randomise, tiny_config, write_tiny
from torch import nn

from routingvl import train as train_module
from routingvl.bottlenecks.frozen_weights import lower_frozen_weights
from routingvl.config import RoutingConfig
from routingvl.config.schema import override
from routingvl.models import load_pretrained
from routingvl.train import train
from routingvl.training.precision import frozen_weights_lowered


def loss_and_gradients(model, inputs):
    model.zero_grad()
    if hasattr(model, "gpt"):
        inputs = inputs | {"labels": inputs["input_ids"], "return_logits": False}
    else:
        inputs = inputs | {"labels": torch.ones(len(inputs["input_ids"]), model.num_labels)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", [captioner, answerer])
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_same_results_to_the_bit_and_back_again(build, method):
    model, inputs = randomise(build(RoutingConfig(method=method, rank=4, routing="mul")), 0.05).train(), batch()
    want = loss_and_gradients(model, inputs)
    before = copy.deepcopy(model.state_dict())
    restore = lower_frozen_weights(model.language_model, torch.bfloat16)
    modules = [m for m in model.language_model.modules() if getattr(m, "weight", None) is not None]
    for module in modules:
        exact = isinstance(module, (nn.LayerNorm, nn.Embedding)) or module.weight.requires_grad
        assert module.weight.dtype == (torch.float32 if exact else torch.bfloat16), module
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    found = loss_and_gradients(model, inputs)
    assert torch.equal(found[0], want[0])
    assert found[1].keys() == want[1].keys()
    for name, gradient in found[1].items():
        assert torch.equal(gradient, want[1][name]), name
    restore()
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name
    if build is captioner:
        assert model.gpt.lm_head.weight is model.gpt.transformer.wte.weight


def test_float32_weights_are_freed_unless_kept():
    model = captioner()
    lower_frozen_weights(model.language_model, torch.bfloat16, keep=False)()
    assert model.gpt.transformer.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert model.gpt.lm_head.weight is model.gpt.transformer.wte.weight


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_training_with_lowered_weights_changes_no_result(tmp_path, task, monkeypatch):
    torch.set_num_threads(1)
    tiny = write_tiny(tmp_path / "tiny")
    settings = {"mixed_precision": "bf16", "max_steps": 4, "eval_every": 2}
    lowered = train(tiny_config(tiny, tmp_path / "lowered", task, **settings), log="quiet")
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "frozen_weights_lowered", lambda *args, **kwargs: nullcontext())
        plain = train(tiny_config(tiny, tmp_path / "plain", task, **settings), log="quiet")
    name = "last/adapter_model.safetensors"
    found, want = load_file(lowered.run_dir / name), load_file(plain.run_dir / name)
    for key, value in want.items():
        assert torch.equal(found[key], value), key
    assert (lowered.best_metric, lowered.total) == (plain.best_metric, plain.total)
    model = load_pretrained(lowered.run_dir / "last")  # the fingerprint of the backbone still fits
    config = override(tiny_config(tiny, tmp_path / "given", task, **settings))
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    train(config, model=model, log="quiet")
    for key, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad or torch.equal(parameter, before[key])


def test_the_model_is_on_its_device_before_shared_weights_are_cast():
    # A cast copy of a shared weight is a plain tensor, which model.to would leave behind.
    model = captioner(RoutingConfig(rank=4))
    accelerator = SimpleNamespace(mixed_precision="bf16", device=torch.device("meta"))
    with frozen_weights_lowered(model, accelerator, keep=False):
        head = model.gpt.lm_head.weight
        assert (head.device.type, head.dtype) == ("meta", torch.bfloat16)
