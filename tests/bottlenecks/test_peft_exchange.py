"""What PEFT's own loaders make of our exports, and we of PEFT's adapters, for every key of its LoraConfig."""

import dataclasses
import json
from functools import partial

import peft
import pytest
import torch
from safetensors.torch import load_file
from text_zoo import text_model
from tiny import answerer, randomise, small_gpt2, small_roberta
from transformers import LlamaConfig, LlamaForCausalLM

from routingvl import RoutingConfig, inject
from routingvl.bottlenecks.beside import RoutedLoRABeside
from routingvl.bottlenecks.checkpoint import CheckpointError
from routingvl.bottlenecks.peft_config import HARMLESS, INITIALISATIONS, REFUSED, PeftLora
from routingvl.bottlenecks.peft_format import export_peft, import_peft

IDS = torch.tensor([[5, 6, 7, 8]])


def small_llama(tied=False):
    torch.manual_seed(6)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": tied, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**shape))


def tied_llama():
    return small_llama(tied=True)


def output(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS)[0]


def ours(factory, targets, train=(), seed=None, **settings):
    """A model with our plain LoRA, in which the parameters whose names end with ``train`` train too."""
    model = factory()
    inject(model, RoutingConfig(**{"rank": 4, "alpha": 6, "routing": "none", "targets": targets} | settings))
    for name, parameter in model.named_parameters():
        if f".{name}".endswith(tuple(f".{end}" for end in train)):
            parameter.requires_grad_(True)
    return model if seed is None else randomise(model)


CASES = {
    "roberta": (small_roberta, None, ()),
    "roberta, a head": (small_roberta, None, ("pooler.dense.weight", "pooler.dense.bias")),
    "roberta, two widths": (small_roberta, ("query", "output.dense"), ()),
    "gpt2, joined slices": (small_gpt2, None, ()),
    "gpt2, two ranks": (small_gpt2, ("c_attn", "c_fc"), ("ln_f.weight",)),
    "phi3, parts of other widths": (partial(text_model, "phi3"), None, ()),
    "gpt_neox, parts by the head": (partial(text_model, "gpt_neox"), None, ()),
    "llama": (small_llama, ("q_proj", "v_proj"), ("norm.weight", "input_layernorm.weight", "lm_head.weight")),
    "llama, tied weights": (tied_llama, ("q_proj", "down_proj"), ("norm.weight", "embed_tokens.weight")),
}


@pytest.mark.parametrize("case", CASES)
def test_exports_run_in_peft_and_come_back(case, tmp_path):
    factory, targets, train = CASES[case]
    model = ours(factory, targets, train, seed=4)
    export_peft(model, tmp_path)
    expected = output(model)
    assert (output(factory()) - expected).abs().max() > 0.1
    theirs = peft.PeftModel.from_pretrained(factory(), tmp_path)
    torch.testing.assert_close(output(theirs), expected, rtol=1e-5, atol=1e-5)
    native = factory()
    native.load_adapter(tmp_path)
    torch.testing.assert_close(output(native), expected, rtol=1e-5, atol=1e-5)
    again = ours(factory, targets)
    import_peft(again, tmp_path)
    assert torch.equal(output(again), expected)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} >= names
    theirs.save_pretrained(tmp_path / "theirs")  # and the way that PEFT writes it anew
    back = ours(factory, targets)
    import_peft(back, tmp_path / "theirs")
    assert torch.equal(output(back), expected)


def test_ranks_that_differ_from_layer_to_layer(tmp_path):
    """Among projections of one name the pattern names each of them."""
    model = ours(small_roberta, ("query",), seed=4)
    layer = model.encoder.layer[1].attention.self.query
    with torch.no_grad():
        layer.lora_A, layer.lora_B = (
            torch.nn.Parameter(torch.cat([p, p], dim)) for p, dim in ((layer.lora_A, 0), (layer.lora_B, 1))
        )
    layer.rank = 8
    export_peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == {
        "^encoder[.]layer[.]1[.]attention[.]self[.]query": 8
    }
    theirs = peft.PeftModel.from_pretrained(small_roberta(), tmp_path)
    torch.testing.assert_close(output(theirs), output(model), rtol=1e-5, atol=1e-5)


def test_a_task_model_exports_its_language_model(tmp_path):
    """PEFT wraps the language model alone; the head of the task stands beside its files, for import_peft."""
    config = RoutingConfig(rank=4, alpha=6, routing="none")
    model = randomise(answerer(config)).eval()
    export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(small_roberta(), tmp_path)
    torch.testing.assert_close(output(theirs), output(model.roberta), rtol=1e-5, atol=1e-5)
    extra = load_file(tmp_path / "extra_parameters.safetensors")
    assert extra
    assert not any(name.startswith("roberta.") for name in extra)
    again = answerer(config)
    import_peft(again, tmp_path)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(dict(again.named_parameters())[name], p) for name, p in trained.items())


@pytest.mark.parametrize(
    ("targets", "train", "message"),
    [
        (("query",), ("1.attention.self.query.weight",), r"query\.weight was trained, for which PEFT has no place"),
        (("overhead",), ("head.weight",), r"head\.weight was trained: PEFT would save .*overhead whole"),
        (("query",), ("free",), r"free was trained, for which PEFT has no place"),
    ],
)
def test_what_peft_has_no_place_for_is_refused(targets, train, message, tmp_path):
    model = small_roberta()
    model.head, model.overhead = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    model.free = torch.nn.Parameter(torch.zeros(3))
    changed = ours(lambda: model, targets, train)
    with pytest.raises(CheckpointError, match=message):
        export_peft(changed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What of each honoured key is tried: settings of LoraConfig, and of ours for the same layers and ranks.
QV = ("query", "value")
TRIED = {
    "r": [({"r": 3, "lora_alpha": 5}, {"rank": 3})],
    "lora_alpha": [({"lora_alpha": 9}, {})],
    "target_modules": [
        ({"target_modules": r".*\.(query|value)"}, {}),
        ({"target_modules": "all-linear", "exclude_modules": ["key", "dense"]}, {}),
    ],
    "lora_dropout": [({"lora_dropout": 0.5}, {})],
    "use_rslora": [({"use_rslora": True}, {}), ({"use_rslora": True, "alpha_pattern": {"query": 9}}, {})],
    "fan_in_fan_out": [({"fan_in_fan_out": True}, {})],
    "exclude_modules": [({"exclude_modules": r".*\.0\..*"}, {"layers": (1,)})],
    "layers_to_transform": [({"layers_to_transform": [1]}, {"layers": (1,)})],
    "layers_pattern": [({"layers_to_transform": 1, "layers_pattern": "layer"}, {"layers": (1,)})],
    "rank_pattern": [({"rank_pattern": ranks, "r": 7}, {}) for ranks in ({"query": 4, "value": 4}, {"layer.*": 4})],
    "alpha_pattern": [({"alpha_pattern": {"query": 9, r"1\..*value": 3}}, {})],
    "modules_to_save": [({"modules_to_save": names}, {}) for names in (["LayerNorm", "pooler.dense"], ["absent"])],
    "bias": [
        ({"bias": bias, "modules_to_save": names}, {})
        for bias in ("all", "lora_only")
        for names in (None, ["LayerNorm"])
    ],
    "init_lora_weights": [({"init_lora_weights": start}, {}) for start in INITIALISATIONS if start != "eva"],
}  # fmt: skip
# A value of each refused key; of those that PEFT would need other layers or data for, as its file would hold it.
ASKED = {
    "alora_invocation_tokens": [3], "arrow_config": {"top_k": 2}, "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2]], "lora_bias": True, "megatron_config": {"x": 1}, "monteclora_config": {"samples": 2},
    "target_parameters": ["weight"], "trainable_token_indices": [1], "use_bdlora": {"nblocks": 2}, "use_dora": True,
    "use_qalora": True, "velora_config": {"groups": 2},
}  # fmt: skip


def test_every_key_of_pefts_config_is_honoured_harmless_or_refused():
    """A key that a later PEFT adds fails here until it is decided what it means."""
    keys = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    honoured = {field.name for field in dataclasses.fields(PeftLora)}
    assert keys == honoured | HARMLESS | set(REFUSED)
    assert len(keys) == len(honoured) + len(HARMLESS) + len(REFUSED)
    assert honoured == set(TRIED)
    assert set(REFUSED) == set(ASKED)


@pytest.mark.parametrize(("key", "which"), [(key, i) for key, rows in TRIED.items() for i in range(len(rows))])
def test_honoured_keys_compute_what_peft_does(key, which, tmp_path):
    settings, same = TRIED[key][which]
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": list(QV)} | settings)
    randomise(peft.get_peft_model(small_roberta(), config), 0.1).save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(small_roberta(), tmp_path)
    model = ours(small_roberta, QV, **same)
    import_peft(model, tmp_path)
    assert (output(small_roberta()) - output(model)).abs().max() > 1e-3
    torch.testing.assert_close(output(model), output(theirs), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An adapter of PEFT's with biases and saved modules."""
    place = tmp_path_factory.mktemp("adapter")
    saved = ["LayerNorm", "word_embeddings"]
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=list(QV), bias="lora_only", modules_to_save=saved)
    randomise(peft.get_peft_model(small_roberta(), config), 0.1).save_pretrained(place)
    return place


def refused(folder, tmp_path, changes, message, factory=small_roberta, targets=QV):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    model = ours(factory, targets)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        import_peft(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("key", ASKED)
def test_refused_keys_name_what_they_ask_for(key, folder, tmp_path):
    refused(folder, tmp_path, {key: ASKED[key]}, rf"adapter_config\.json: {key} .* asks for ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"init_lora_weights": start}, "init_lora_weights .* changes the frozen weights as well; let PEFT save")
          for start in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", "of tomorrow", ["pissa"])),
        ({"bias": "all"}, r"has no .*\.bias, which bias of adapter_config\.json asks for"),
        ({"bias": "none"}, r"holds tensors for which the model has no place: .*base_layer\.bias"),
        ({"bias": "some"}, "bias='some' is not one of"),
        ({"modules_to_save": ["LayerNorm"]}, "no place: .*word_embeddings"),
        ({"modules_to_save": ["LayerNorm", "word_embeddings", "pooler.dense"]}, "has no pooler.dense.weight"),
        ({"modules_to_save": "LayerNorm"}, "modules_to_save='LayerNorm' must be a list"),
        ({"modules_to_save": ["(", 3]}, "modules_to_save=.* must be a list"),
        ({"modules_to_save": ["("]}, "a pattern of modules or layers"),
        ({"modules_to_save": ["query"]}, r"has no .*query\.weight, which modules_to_save"),
        ({"rank_pattern": {"query": 2}}, r"query\.lora_A \[4, 32\] is not of the rank rank_pattern 2"),
        ({"rank_pattern": {"query": 4.5}}, "rank_pattern query: 4.5 must be an integer above 0"),
        ({"rank_pattern": {"(": 4}}, "a pattern of modules or layers"),
        ({"rank_pattern": ["query"]}, "rank_pattern=.* must be an object"),
        ({"alpha_pattern": {"query": 0}}, "alpha_pattern query: 0 must be a number above 0"),
        ({"alpha_pattern": {"query": True}}, "alpha_pattern query: True must be a number above 0"),
        ({"alpha_pattern": {"query": float("nan")}}, "NaN"),
        ({"peft_type": "ROUTED_LORA"}, "after importing routingvl.peft"),
        ({"a_key_of_tomorrow": {"x": 1}}, "a_key_of_tomorrow .* asks for something that this version"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_honoured(changes, message, folder, tmp_path):
    refused(folder, tmp_path, changes, message)


def test_half_of_a_tied_pair_is_refused(tmp_path):
    """PEFT gives a saved module weights of its own; here both places have the same."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    randomise(peft.get_peft_model(tied_llama(), config)).save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    message = "lm_head.weight are one parameter of the model, which the adapter changes in one place only"
    refused(tmp_path / "theirs", tmp_path / "ours", {}, message, tied_llama, ("q_proj",))
    model = ours(small_llama, ("q_proj",))
    import_peft(model, tmp_path / "theirs")


def test_layers_that_are_called_within_ours(tmp_path):
    """Their weights stand one level deeper, as they do in PEFT."""

    class Own(torch.nn.Linear):
        pass

    def other():
        model = small_roberta()
        for layer in model.encoder.layer:
            own = Own(32, 32)
            own.load_state_dict(layer.attention.self.query.state_dict())
            layer.attention.self.query = own
        return model

    def beside():
        model = other().requires_grad_(False)
        for layer in model.encoder.layer:
            layer.attention.self.query = RoutedLoRABeside(layer.attention.self.query, 4, routing="none", alpha=6)
            layer.attention.self.query.base_layer.bias.requires_grad_(True)
            layer.output.LayerNorm.requires_grad_(True)
        return model

    model = randomise(beside())
    export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(other(), tmp_path)
    torch.testing.assert_close(output(theirs), output(model), rtol=1e-5, atol=1e-5)
    again = beside()
    import_peft(again, tmp_path)
    assert torch.equal(output(again), output(model))
