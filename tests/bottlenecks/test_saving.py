"""save_adapter and load_adapter for any injected model, quantised ones too."""

import json

import pytest
import torch
from test_injections import IDS, IMAGE, llama, logits, routed, wake
from tiny import captioner, small_gpt2, small_roberta, small_vit
from torch import nn
from transformers import PreTrainedModel

from routingvl import RoutingConfig, bind_image, disable, inject, load_adapter, save_adapter
from routingvl.bottlenecks.checkpoint import CheckpointError
from routingvl.models import load_pretrained
from routingvl.tensor_files import read_tensors

CONFIG = {"rank": 4, "routing": "mul", "targets": ["q_proj", "v_proj"], "train_modules": ["lm_head"]}


def state(model):
    return [(name, type(module).__name__) for name, module in model.named_modules()], {
        name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_that_trains_travels(tmp_path, dtype):
    model = llama(dtype)
    inject(model, RoutingConfig(**CONFIG))
    inject(model, RoutingConfig(rank=2, routing="add", targets=["down_proj"], image_projection="linear"))
    wake(model)
    save_adapter(model, tmp_path)
    saved = read_tensors(tmp_path / "adapter_model.safetensors", CheckpointError)
    assert saved.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"lm_head.weight", "image_projections.48.weight"} < saved.keys()
    want = logits(model, IMAGE.to(dtype))
    fresh, again = llama(dtype), llama(dtype)
    report = load_adapter(fresh, tmp_path)
    assert set(report.names) == saved.keys()
    inject(again, RoutingConfig(**CONFIG, dropout=0.1))
    inject(again, RoutingConfig(rank=2, routing="add", targets=["down_proj"], image_projection="linear"))
    load_adapter(again.eval(), tmp_path)
    for loaded in (fresh, again):
        assert torch.equal(logits(loaded, IMAGE.to(dtype)), want)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ROUTINGVL"


@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("build", [small_gpt2, small_roberta])
def test_biases_and_norms_travel_from_the_part_that_was_injected(tmp_path, build, method):
    def whole():
        return nn.ModuleDict({"text": build().eval(), "other": nn.Linear(3, 3)})

    model = whole()
    inject(model["text"], RoutingConfig(method=method, rank=4, routing="mul"))
    wake(model["text"])
    save_adapter(model, tmp_path)
    loaded = whole()
    load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded["text"]), logits(model["text"]))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json does not fit the model"):
        load_adapter(build(), tmp_path)


LORA, ADAPTER = {"rank": 4, "routing": "mul"}, {"method": "adapter", "rank": 4, "routing": "add"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("build", "first", "second"),
    [
        (small_gpt2, LORA, ADAPTER),
        (small_roberta, ADAPTER | {"position": "pre_norm"}, LORA),
        (llama, ADAPTER, LORA | {"targets": ["o_proj"]}),
        (llama, LORA | {"layers": [0]}, LORA | {"routing": "vllora", "layers": [1]}),
    ],
    ids=["gpt2", "roberta", "llama-same-module", "llama-layers"],
)
def test_two_methods_in_one_model(tmp_path, build, first, second, dtype):
    model, loaded = build().to(dtype).eval(), build().to(dtype).eval()
    want = logits(model)
    for config in (first, second):
        inject(model, RoutingConfig(**config))
    wake(model)
    with disable(model):
        assert torch.equal(model(input_ids=IDS)[0], want)
    save_adapter(model, tmp_path)
    load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded, IMAGE.to(dtype)), logits(model, IMAGE.to(dtype)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = llama()
    inject(model, RoutingConfig(**CONFIG))
    save_adapter(wake(model), folder)
    return folder


def wider(model):
    model.lm_head = nn.Linear(32, 65, bias=False)


def heavier(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.5)


def cut(model):
    del model.model.layers[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wider, "lm_head.weight has shape"),
        (heavier, "trained with another model .fingerprint .* check_base=False"),
        (cut, "does not fit the model|another model"),
        (lambda m: inject(m, RoutingConfig(**CONFIG | {"rank": 8})), "rank is 4, this model was injected with 8"),
        (lambda m: inject(m, RoutingConfig(**CONFIG), image_width=32) and inject(
            m, RoutingConfig(rank=2, targets=["k_proj"])), "has 1 injections, this model 2"),
        (lambda m: inject(m.model, RoutingConfig(rank=4, targets=["q_proj"])), "into module '', this model into 'mod"),
    ],
)  # fmt: skip
def test_another_model_is_refused_and_left_as_it_was(saved, change, message):
    model = llama()
    change(model)
    before = state(model)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=message) as error:
        load_adapter(model, saved)
    assert str(saved) in str(error.value)
    assert state(model) == before
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())


def test_another_base_loads_when_asked_for(saved):
    model = llama()
    heavier(model)
    load_adapter(model, saved, check_base=False)
    assert routed(model)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("injections", {"": []}, "must be a list of injections"),
        ("injections", {"": [{"routing": {"rank": 4}, "image_width": 32}]}, "routing: .* missing"),
        ("injections", {"nowhere": None}, "must be a list"),
        ("injections", 3, "injections=3 must be an object"),
        ("base", {"name": None}, "base: .* missing"),
        ("format_version", 2, "another version of routingvl"),
        ("peft_type", "LORA", "peft_type is 'LORA'"),
        ("surprise", 1, "unknown key 'surprise'"),
    ],
)
def test_damaged_configs(saved, tmp_path, key, value, message):
    config = json.loads((saved / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    (tmp_path / "adapter_model.safetensors").write_bytes((saved / "adapter_model.safetensors").read_bytes())
    model = llama()
    before = state(model)
    with pytest.raises(CheckpointError, match=message) as error:
        load_adapter(model, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert state(model) == before


def test_missing_and_unexpected_tensors(saved, tmp_path):
    from safetensors.torch import save_file

    tensors = read_tensors(saved / "adapter_model.safetensors", CheckpointError)
    tensors["model.layers.0.self_attn.q_proj.lora_C"] = tensors.pop("model.layers.0.self_attn.q_proj.lora_A")
    (tmp_path / "adapter_config.json").write_bytes((saved / "adapter_config.json").read_bytes())
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing .*q_proj\.lora_A; unexpected .*q_proj\.lora_C"):
        load_adapter(llama(), tmp_path)


def test_ready_made_models_use_the_same_functions_and_kinds_are_told_apart(saved, tmp_path):
    model = captioner()
    save_adapter(wake(model), tmp_path)
    other = captioner()
    load_adapter(other, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2())
    with pytest.raises(CheckpointError, match=r"holds an adapter of a LlamaForCausalLM.*routingvl\.load_adapter"):
        load_pretrained(saved)
    with pytest.raises(CheckpointError, match=r"load it with routingvl\.models\.load_pretrained"):
        load_adapter(llama(), tmp_path)
    with pytest.raises(CheckpointError, match="no bottlenecks to save: call inject"):
        save_adapter(llama(), tmp_path)


def bnb8(module):
    import bitsandbytes

    made = bitsandbytes.nn.Linear8bitLt(
        module.in_features, module.out_features, bias=module.bias is not None, has_fp16_weights=False
    )
    made.weight = bitsandbytes.nn.Int8Params(module.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    return made.to("cpu")


def bnb4(module):
    import bitsandbytes

    made = bitsandbytes.nn.Linear4bit(
        module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=torch.float32,
        quant_type="nf4",
    )  # fmt: skip
    made.weight = bitsandbytes.nn.Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4")
    return made.to("cpu")


def quantised(how: str, dtype: torch.dtype) -> PreTrainedModel:
    model = llama(dtype)
    if how in ("bnb8", "bnb4"):
        pytest.importorskip("bitsandbytes")
        for name, module in list(model.model.named_modules()):
            if type(module) is nn.Linear:
                home, _, attribute = name.rpartition(".")
                setattr(model.model.get_submodule(home), attribute, {"bnb8": bnb8, "bnb4": bnb4}[how](module))
    else:
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model.model, getattr(torchao, how)())
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("bnb8", torch.float32),
        ("bnb4", torch.float32),
        ("bnb4", torch.bfloat16),
        ("Int8WeightOnlyConfig", torch.float32),
        ("Int8WeightOnlyConfig", torch.bfloat16),
        ("Float8WeightOnlyConfig", torch.bfloat16),
    ],
)
def test_quantised_bases(tmp_path, how, dtype):
    model = quantised(how, dtype)
    with torch.no_grad():
        want = model(input_ids=IDS).logits
    inject(model, RoutingConfig(rank=4, routing="mul", targets=["q_proj", "v_proj"]))
    assert {p.dtype for layer in routed(model).values() for p in layer.projection} == {torch.float32}
    image = IMAGE.to(dtype)
    with torch.no_grad():
        assert torch.equal(logits(model, image), want)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(5):
        optimizer.zero_grad()
        with bind_image(model, image):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        after = logits(model, image)
        assert not torch.equal(after, logits(model, image.flip(0)))
        save_adapter(model, tmp_path)
        loaded = quantised(how, dtype)
        load_adapter(loaded, tmp_path)
        assert torch.equal(logits(loaded, image), after)
        with pytest.raises(CheckpointError, match="another model"):
            load_adapter(llama(dtype), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_layers_without_weights_to_see():
    model = torch.ao.quantization.quantize_dynamic(llama(), {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        inject(model, RoutingConfig(rank=4, routing="mul", targets=["q_proj", "v_proj"]))
        assert torch.equal(logits(model), want)
        assert not torch.equal(logits(wake(model)), logits(model, IMAGE + 1))


@pytest.mark.parametrize("build", [small_gpt2, captioner])
def test_frozen_bottlenecks_are_not_left_out_in_silence(build, tmp_path):
    model = build()
    if build is small_gpt2:
        inject(model, RoutingConfig(rank=4, routing="mul"))
    model.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"lora_[AB] is frozen \(requires_grad=False\).*would be lost"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
