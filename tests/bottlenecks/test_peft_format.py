"""Plain LoRA written for PEFT and read from it; what PEFT cannot run is refused."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import answerer, captioner, randomise, small_gpt2, small_roberta

from routingvl import RoutingConfig, inject
from routingvl.bottlenecks.checkpoint import CheckpointError
from routingvl.bottlenecks.peft_format import export_peft, import_peft
from routingvl.digests import file_digest


def test_peft_refuses_a_routed_adapter(tmp_path):
    captioner().save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"ROUTINGVL|routingvl's own format"):
        peft.PeftModel.from_pretrained(small_gpt2(), tmp_path)


@pytest.mark.parametrize(("factory", "targets"), [(small_gpt2, ["c_attn"]), (small_roberta, ["query", "value"])])
def test_peft_export_runs_the_same_function(factory, targets, tmp_path):
    config = RoutingConfig(rank=4, alpha=6, routing="none", train_layer_norm=False, train_bias=False)
    model = factory().eval()
    inject(model, config)
    randomise(model)
    export_peft(model, tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    theirs = peft.PeftModel.from_pretrained(factory().eval(), tmp_path)
    torch.testing.assert_close(theirs(input_ids=ids)[0], model(input_ids=ids)[0], rtol=1e-5, atol=1e-5)
    again = factory().eval()
    inject(again, config)
    import_peft(again, tmp_path)
    assert torch.equal(again(input_ids=ids)[0], model(input_ids=ids)[0])


def test_peft_export_refuses_what_peft_cannot_run(tmp_path):
    with pytest.raises(CheckpointError, match="'mul': PEFT would drop the image"):
        export_peft(captioner(), tmp_path / "out")
    with pytest.raises(CheckpointError, match="adapters have no PEFT form"):
        export_peft(captioner(RoutingConfig(method="adapter", rank=4, routing="none")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peft_import_of_a_foreign_lora(tmp_path):
    """PEFT's own LoRA on c_attn may change k too, which ours cannot hold: an error, not a silent loss."""
    theirs = peft.get_peft_model(
        small_gpt2(), peft.LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path)
    model = small_gpt2()
    inject(model, RoutingConfig(rank=4, routing="none"))
    with pytest.raises(CheckpointError, match="outside the adapted slices"):
        import_peft(model, tmp_path)


PLAIN = {"routing": "none", "rank": 4, "alpha": 6, "targets": ("query", "value")}


@pytest.fixture
def adapter(tmp_path):
    """A folder of PEFT's with a LoRA on RoBERTa's query and value, and the model that it is of."""
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["query", "value"], init_lora_weights=False)
    theirs = peft.get_peft_model(small_roberta(), config)
    theirs.save_pretrained(tmp_path)
    return tmp_path, theirs.eval()


def injected():
    model = small_roberta()
    inject(model, RoutingConfig(**PLAIN))
    return model.eval()


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_foreign_lora_computes_what_peft_does(adapter):
    folder, theirs = adapter
    ids = torch.tensor([[5, 6, 7, 8]])
    model = injected()
    import_peft(model, folder)
    torch.testing.assert_close(model(input_ids=ids)[0], theirs(input_ids=ids)[0], rtol=1e-5, atol=1e-5)
    change_config(folder, use_rslora=True)
    rslora = peft.PeftModel.from_pretrained(small_roberta().eval(), folder)
    import_peft(model, folder)
    torch.testing.assert_close(model(input_ids=ids)[0], rslora(input_ids=ids)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", -4), ("r", None), ("r", True), ("r", 8), ("r", 4.0), ("lora_alpha", float("nan")), ("lora_alpha", "8"),
        ("lora_alpha", 0), ("lora_alpha", None), ("use_dora", True), ("use_rslora", "no"),
        ("rank_pattern", {"query": 8}), ("alpha_pattern", {"query": "8"}), ("bias", "all"),
        ("modules_to_save", ["pooler"]), ("lora_bias", True),
        ("lora_dropout", 2), ("lora_dropout", -0.1), ("lora_dropout", "0"), ("target_modules", ["dense"]),
        ("target_modules", ["query"]),
        ("target_modules", "all-linear"), ("target_modules", ["query", "value", "key"]), ("target_modules", None),
        ("target_modules", "(query"), ("target_modules", r".*query"), ("target_modules", 3), ("target_modules", []),
        ("exclude_modules", ["encoder.layer.0.attention.self.query"]), ("exclude_modules", r".*\.1\..*"),
        ("exclude_modules", 3), ("layers_to_transform", [0]), ("layers_to_transform", 1),
        ("layers_to_transform", "0"), ("layers_pattern", "layer"), ("fan_in_fan_out", "no"),
        ("init_lora_weights", "pissa"), ("layer_replication", [[0, 2]]), ("something_new", 3), ("peft_type", "IA3"),
    ],
)  # fmt: skip
def test_keys_that_cannot_be_honoured_are_refused_before_the_model_changes(adapter, key, value):
    folder, model = adapter[0], injected()
    change_config(folder, **{key: value})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        CheckpointError,
        match=rf"adapter_config\.json.*{key}|a pattern of modules|{key}.* NaN|of the rank {key}|holds NaN"
        rf"|{key} of adapter_config",
    ):
        import_peft(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("layers", "changes"),
    [
        (None, {"target_modules": r"encoder\..*\.(query|value)"}),
        (None, {"exclude_modules": ["pooler.dense"], "layers_to_transform": [0, 1], "layers_pattern": "layer"}),
        (None, {"layers_to_transform": [], "layers_pattern": [], "exclude_modules": [], "lora_dropout": 0.5}),
        ((1,), {"layers_to_transform": 1}),
        ((1,), {"layers_to_transform": [1], "layers_pattern": ["layer", "h"]}),
        ((1,), {"exclude_modules": r".*\.0\..*"}),
    ],
)
def test_targets_choose_what_they_do_in_peft(tmp_path, layers, changes):
    chosen = {"layers_to_transform": list(layers) if layers else None}
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["query", "value"], init_lora_weights=False, **chosen)
    peft.get_peft_model(small_roberta(), config).save_pretrained(tmp_path)
    change_config(tmp_path, layers_to_transform=None)
    change_config(tmp_path, **changes)
    model = small_roberta().eval()
    inject(model, RoutingConfig(**PLAIN, layers=layers))
    import_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(small_roberta().eval(), tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(model(input_ids=ids)[0], theirs(input_ids=ids)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.long(), "is of type torch.int64"),
        (lambda t: t > 0, "is of type torch.bool"),
        (lambda t: t.to(torch.float8_e4m3fn), "is of type torch.float8_e4m3fn"),
        (lambda t: t / 0, "holds NaN or infinity"),
        (lambda t: t[:2], "is not of the rank r 4"),
        (lambda t: t.double() * 1e300, "holds numbers too large for torch.float32"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(adapter, change, message):
    folder, model = adapter[0], injected()
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    save_file(tensors | {name: change(tensors[name]).contiguous()}, folder / "adapter_model.safetensors")
    before = model.encoder.layer[0].attention.self.value.lora_A.clone()
    with pytest.raises(CheckpointError, match=message):
        import_peft(model, folder)
    assert torch.equal(model.encoder.layer[0].attention.self.value.lora_A, before)


def test_damaged_folders(adapter):
    folder, model = adapter[0], injected()
    for name, content in {
        "adapter_model.safetensors": (b"", (10 * 2**30).to_bytes(8, "little") + b"{}"),
        "adapter_config.json": (b"[1]", b"{", b"[" * 100_000),
    }.items():
        good = (folder / name).read_bytes()
        for bad in content:
            (folder / name).write_bytes(bad)
            with pytest.raises(CheckpointError, match=name):
                import_peft(model, folder)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            import_peft(model, folder)
        (folder / name).write_bytes(good)
    routed = small_roberta()
    inject(routed, RoutingConfig(rank=4, routing="mul"))
    with pytest.raises(CheckpointError, match="does not route"):
        import_peft(routed, folder)


def test_exports_of_before_come_back(tmp_path):
    """They held trained norms and biases in a file of ours beside PEFT's."""
    config = RoutingConfig(rank=4, alpha=6, routing="none")
    model, again, other = (small_gpt2().eval() for _ in range(3))
    inject(model, config)
    randomise(model)
    export_peft(model, tmp_path)
    weights, extra = tmp_path / "adapter_model.safetensors", tmp_path / "extra_parameters.safetensors"
    assert not extra.exists()
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file({name: tensor for name, tensor in trained.items() if "lora_" not in name}, extra)
    matrices = {name: tensor for name, tensor in load_file(weights).items() if "lora_" in name}
    save_file(matrices, weights, metadata={"format": "pt", "extra_parameters": file_digest(extra)})
    change_config(tmp_path, bias="none", modules_to_save=None)
    inject(again, config)
    import_peft(again, tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(again(input_ids=ids)[0], model(input_ids=ids)[0])
    plain = RoutingConfig(rank=4, alpha=6, routing="none", train_layer_norm=False, train_bias=False)
    inject(other, plain)
    with pytest.raises(CheckpointError, match=r"unexpected .*ln_1"):
        import_peft(other, tmp_path)
    save_file({name: tensor + 1 for name, tensor in load_file(extra).items()}, extra)
    with pytest.raises(CheckpointError, match=r"extra_parameters\.safetensors was not written together with"):
        import_peft(again, tmp_path)
    extra.unlink()
    with pytest.raises(CheckpointError, match=r"extra_parameters\.safetensors is gone"):
        import_peft(again, tmp_path)
    export_peft(answerer(config), tmp_path)
    assert extra.exists()  # the head of the task, which is no part of the language model
    export_peft(other, tmp_path)  # in its place, without
    assert not extra.exists()
    import_peft(other, tmp_path)


def test_export_refuses_numbers_that_are_none(tmp_path):
    broken = injected()
    with torch.no_grad():
        broken.encoder.layer[0].attention.self.query.lora_A[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"query.*holds NaN or infinity"):
        export_peft(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
