"""inject on models of every kind: several injections, disable, heads, patterns, widths, precision, called layers."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from tiny import small_gpt2, small_roberta
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from routingvl import RoutingConfig, VisualContext, bind_image, inject
from routingvl.bottlenecks.beside import RoutedLoRABeside
from routingvl.bottlenecks.inject import SurgeryError, check_in_memory, disable, remove
from routingvl.bottlenecks.layers import RoutedAdapter, RoutedLayer, RoutedLoRALinear

IDS = torch.tensor([[5, 6, 7], [8, 9, 3]])
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
IMAGE = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(1))


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TEXT, pad_token_id=0)).to(dtype).eval()


def logits(model, image=IMAGE):
    if not any(isinstance(module, RoutedLayer) for module in model.modules()):
        return model(input_ids=IDS)[0]
    with bind_image(model, image):
        return model(input_ids=IDS)[0]


def wake(model):
    """Weights of which every bottleneck acts."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * (0.3 if "lora" in name else 0.05))
    return model


def train(model, steps, lr=1e-4, image=IMAGE):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        with bind_image(model, image):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
    return loss


def routed(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedLayer)}


def test_several_injections_share_the_image_and_keep_what_trains():
    model = llama()
    inject(model, RoutingConfig(rank=4, routing="mul", targets="q_proj"))
    model.lm_head.requires_grad_(True)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    report = inject(model, RoutingConfig(rank=2, routing="vllora", targets=r".*layers\.1\..*v_proj"))
    assert before < set(report.names)
    assert [(layer.routing, layer.rank) for layer in report.layers] == [("mul", 4), ("mul", 4), ("vllora", 2)]
    assert len({id(layer.context) for layer in routed(model).values()}) == 1
    wake(model)
    assert not torch.equal(logits(model), logits(model, IMAGE + 1))
    with pytest.raises(SurgeryError, match=r"layers\.0\.self_attn\.q_proj has a routed bottleneck already.*remove"):
        inject(model, RoutingConfig(rank=4, targets=["q_proj", "o_proj"]))
    assert "o_proj" not in str(list(routed(model)))
    remove(model)
    assert routed(model) == {}
    assert inject(model, RoutingConfig(rank=4, targets=["q_proj"])).layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("build", "config"),
    [
        (llama, {"targets": ["q_proj", "down_proj"], "train_modules": ["lm_head"], "image_projection": "linear"}),
        (small_gpt2, {}),
        (small_gpt2, {"method": "adapter"}),
        (small_roberta, {"method": "adapter", "position": "pre_norm"}),
    ],
    ids=["llama", "gpt2", "gpt2-adapter", "roberta-adapter"],
)
def test_disable_gives_the_base_bit_for_bit(build, config, dtype):
    model = build().to(dtype).eval()
    for name, parameter in model.named_parameters():  # norms and biases that are not 1 and 0
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float("norm" in name or "ln_" in name), std=0.1)
    want = logits(model)
    inject(model, RoutingConfig(rank=4, routing="mul", **config))
    if config.get("method") != "adapter":
        assert torch.equal(logits(model, IMAGE.to(dtype)), want)
    wake(model)
    changed = logits(model, IMAGE.to(dtype))
    assert not torch.equal(changed, want)
    with disable(model):
        assert torch.equal(model(input_ids=IDS)[0], want)
    assert torch.equal(logits(model, IMAGE.to(dtype)), changed)
    twin = copy.deepcopy(model)
    with disable(twin):
        assert torch.equal(twin(input_ids=IDS)[0], want)
        assert torch.equal(logits(model, IMAGE.to(dtype)), changed)
    remove(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with pytest.raises(SurgeryError, match="no routed bottlenecks to disable"), disable(model):
        pass


def test_bfloat16_models_train_in_float32_whatever_the_features():
    for features in (IMAGE, IMAGE.bfloat16()):
        model = llama(torch.bfloat16)
        inject(model, RoutingConfig(rank=8, routing="mul", targets=["q_proj", "v_proj"], train_modules="lm_head"))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32}
        assert any("layernorm" in name for name in trained)
        before = {name: p.detach().clone() for name, p in trained.items()}
        train(model, 20, image=features)
        for kind in ("lora_A", "lora_B", "layernorm", "lm_head"):
            moved = torch.cat([(p != before[name]).flatten() for name, p in trained.items() if kind in name])
            assert moved.float().mean() > 0.95, kind
    same = llama(torch.bfloat16)
    inject(same, RoutingConfig(rank=8, targets=["q_proj"], bottleneck_dtype="model"))
    assert {p.dtype for p in same.parameters()} == {torch.bfloat16}
    double = llama(torch.float64)
    inject(double, RoutingConfig(rank=8, targets=["q_proj"]))
    assert {p.dtype for p in double.parameters()} == {torch.float64}


def test_patterns_of_rank_and_alpha_and_what_they_must_fit():
    model = llama()
    config = RoutingConfig(
        rank=8, alpha=16, targets=["q_proj", "v_proj"], exclude=r".*layers\.0\..*v_proj",
        rank_pattern={"v_proj": 2}, alpha_pattern={r".*\.1\..*q_proj": 4},
    )  # fmt: skip
    inject(model, config)
    found = {name.removeprefix("model.layers."): (m.rank, m.scaling) for name, m in routed(model).items()}
    assert found == {"0.self_attn.q_proj": (8, 2.0), "1.self_attn.q_proj": (8, 0.5), "1.self_attn.v_proj": (2, 8.0)}
    with pytest.raises(
        SurgeryError, match=r"rank_pattern: 'k_proj' fits none of the bottlenecks, which are model\.lay"
    ):
        inject(llama(), RoutingConfig(rank=8, targets=["q_proj"], rank_pattern={"k_proj": 2}))
    adapted = small_gpt2()
    inject(adapted, RoutingConfig(method="adapter", rank=4, rank_pattern={"h.1.adapter": 2}))
    assert [m.rank for m in routed(adapted).values()] == [4, 2]


def test_train_modules_name_what_trains_beside():
    model = llama()
    report = inject(model, RoutingConfig(rank=4, targets=["q_proj"], train_modules=["lm_head"], train_layer_norm=False))
    assert "lm_head.weight" in report.names
    assert "model.embed_tokens.weight" not in report.names
    with pytest.raises(SurgeryError, match="train_modules: 'lmhead' fits no module with weights; nearest: lm_head"):
        inject(llama(), RoutingConfig(rank=4, targets=["q_proj"], train_modules=["lmhead"]))


def test_image_projection_serves_every_layer_of_its_width():
    config = {"rank": 4, "routing": "mul", "targets": ["q_proj", "down_proj", "o_proj"]}
    message = r"layers\.0\.mlp\.down_proj takes 48 features; .* the image's \(32\), or set image_projection='linear'"
    with pytest.raises(SurgeryError, match=message):
        inject(llama(), RoutingConfig(**config))
    model = llama()
    report = inject(model, RoutingConfig(**config, image_projection="linear"))
    assert {name for name in report.names if "image_projections" in name} == {
        "image_projections.48.weight",
        "image_projections.48.bias",
    }
    train(wake(model), 1)
    projection = model.image_projections["48"]
    assert projection.weight.grad.abs().sum() > 0
    assert {id(layer.image_projection) for n, layer in routed(model).items() if "down" in n} == {id(projection)}
    with pytest.raises(SurgeryError, match="image_width=24: an earlier injection reads features of width 32"):
        inject(model, RoutingConfig(rank=4, targets=["gate_proj"]), image_width=24)
    other = llama()
    inject(other, RoutingConfig(rank=4, targets=["q_proj"], image_projection="linear"), image_width=24)
    wake(other)
    assert not torch.equal(logits(other, torch.randn(2, 1, 24)), logits(other, torch.randn(2, 1, 24)))
    with pytest.raises(SurgeryError, match=r"q_proj takes 32 features; .* the image's \(24\)"):
        inject(llama(), RoutingConfig(rank=4, targets=["q_proj"]), image_width=24)


class Gain(nn.Linear):
    """A projection that is more than its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses_and_hooked_layers_are_called():
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj.__class__ = Gain
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, output: output + 1)
    want = logits(model)
    inject(model, RoutingConfig(rank=4, routing="mul", targets=["q_proj", "v_proj", "k_proj"]))
    kinds = {name.rpartition(".")[2]: type(module) for name, module in routed(model).items()}
    assert kinds == {"q_proj": RoutedLoRABeside, "v_proj": RoutedLoRABeside, "k_proj": RoutedLoRALinear}
    assert torch.equal(logits(model), want)
    wake(model)
    assert not torch.equal(logits(model), want)
    remove(model)
    assert type(model.model.layers[0].self_attn.q_proj) is Gain


def llava():
    torch.manual_seed(0)
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16,
    }  # fmt: skip
    text = TEXT | {"model_type": "llama", "pad_token_id": 0}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    ).eval()


def test_a_vision_language_model_is_adapted_in_its_language_model_only():
    for targets in (None, ["q_proj", "v_proj"], "all-linear"):
        model = llava()
        projecting = {"image_projection": "linear"} if targets == "all-linear" else {}
        report = inject(model, RoutingConfig(rank=4, routing="mul", targets=targets, **projecting))
        assert report.layers
        assert all("language_model" in layer.name for layer in report.layers)
        assert not [name for name in report.names if "vision" in name or "multi_modal" in name]
        assert bool(report.skipped) == (targets == ["q_proj", "v_proj"])
    assert "vision_tower" in inject(llava(), RoutingConfig(rank=4, targets=["q_proj"])).skipped[0]
    outright = r".*vision_tower.*q_proj"
    named = inject(llava(), RoutingConfig(rank=4, targets=outright, train_layer_norm=False), image_width=16)
    assert all("vision_tower" in layer.name for layer in named.layers)


def test_what_is_no_projection_is_said():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(8, 8), "c": nn.Conv1d(8, 8, 1)})])

    report = inject(Mixed(), RoutingConfig(rank=2, targets=["a", "c"]))
    assert report.skipped == ("blocks.0.c: LoRA stands beside linear projections, not a Conv1d",)
    assert "skipped: blocks.0.c: LoRA stands beside" in str(report)


def test_offloaded_weights_are_refused_and_may_be_offloaded_afterwards():
    model = llama()
    want = logits(model)
    cpu_offload(model)
    for check in (check_in_memory, lambda m: inject(m, RoutingConfig(rank=4, targets=["q_proj"]))):
        with pytest.raises(
            SurgeryError, match=r"the weights of model\.embed_tokens are offloaded .* bottlenecks first"
        ):
            check(model)
    peft, method = pytest.importorskip("peft"), pytest.importorskip("routingvl.peft")
    with pytest.raises(SurgeryError, match="bottlenecks first"):
        peft.get_peft_model(model, method.RoutedLoraConfig(r=4, target_modules=["q_proj"]))
    later = llama()
    inject(later, RoutingConfig(rank=4, targets=["q_proj"]))
    cpu_offload(later)
    with torch.no_grad():
        assert torch.equal(logits(later), want)


def test_the_context_of_earlier_injections_must_be_one():
    model = llama()
    inject(model, RoutingConfig(rank=4, targets=["q_proj"]), VisualContext())
    inject(model, RoutingConfig(rank=4, targets=["k_proj"]), VisualContext())
    with pytest.raises(SurgeryError, match="several contexts: pass context="):
        inject(model, RoutingConfig(rank=4, targets=["v_proj"]))
    assert not any(isinstance(m, RoutedAdapter) for m in model.modules())
