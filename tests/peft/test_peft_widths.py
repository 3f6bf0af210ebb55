"""Targets of other widths than the image's: an adapter's projections of the image, and what PEFT does with them."""

import copy

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from peft.utils.other import ModulesToSaveWrapper
from peft_cases import IDS, IMAGES, ROWS, adapted, config, fill, llama, logits, train
from torch.distributed.device_mesh import init_device_mesh

import routingvl
from routingvl import RoutingConfig, VisualContext, inject
from routingvl.peft import PeftMethodError
from routingvl.peft.model import routed_layers

NARROW = torch.randn(ROWS, 1, 24, generator=torch.Generator().manual_seed(4))
HELD = "lora_project_image"


def wide(**changes):
    """All projections of the Llama: 32 features go into all but the down-projections, 48 into those."""
    return config(**{"target_modules": "all-linear", "image_projection": "linear"} | changes)


def narrow(**changes):
    """Queries and down-projections, and an image as wide as neither."""
    return wide(**{"target_modules": ["q_proj", "down_proj"], "image_width": 24} | changes)


def held(model, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The weights of an adapter's projections of the image."""
    return {name: weight for name, weight in model.named_parameters() if f"{HELD}.{adapter}." in name}


def own(model, seed: int = 7):
    """Random up-projections and projections of the image."""
    return fill(fill(model, seed), seed, HELD).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{kind: folder} of adapters, and their logits."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for name, model, images in (
        ("wide", own(get_peft_model(llama(), wide())), IMAGES),
        ("narrow", own(get_peft_model(llama(), narrow())), NARROW),
        ("other", own(get_peft_model(llama(), wide()), seed=3), IMAGES),
    ):
        model.save_pretrained(folder / name)
        found[name] = folder / name, logits(model, images)
    return found


def test_training_moves_the_projections_and_files_keep_them(tmp_path):
    model = fill(get_peft_model(llama(), wide()))
    assert {name.split("layers.")[1] for name in held(model)} == {
        f"0.mlp.down_proj.{HELD}.default.{part}" for part in ("weight", "bias")
    }
    before = {name: weight.detach().clone() for name, weight in held(model).items()}
    train(model, 3)
    assert all(not torch.equal(weight, before[name]) for name, weight in held(model).items())
    assert not torch.allclose(logits(model), logits(model, IMAGES.flip(0)), atol=1e-2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert loaded.peft_config["default"].image_width == 32
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    torch.testing.assert_close(held(loaded), held(model), rtol=0, atol=0)


@pytest.mark.parametrize(("settings", "images"), [(wide, IMAGES), (narrow, NARROW)])
def test_equal_to_inject(settings, images):
    model = own(get_peft_model(llama(), settings()))
    base, context = llama(), VisualContext()
    targets = "all-linear" if settings is wide else ("q_proj", "down_proj")
    like = RoutingConfig(routing="mul", rank=4, alpha=8, targets=targets, image_projection="linear")
    inject(base, like, context, image_width=images.shape[2])
    with torch.no_grad():
        for name, layer in model.base_model.model.named_modules():
            if hasattr(layer, "routed"):
                ours = base.get_submodule(name)
                ours.lora_A.copy_(layer.lora_A["default"].weight)
                ours.lora_B.copy_(layer.lora_B["default"].weight)
                for projection in layer.lora_project_image.values():
                    base.image_projections[str(layer.in_features)].load_state_dict(projection.state_dict())
        with context.bind(images):
            want = base.eval()(input_ids=IDS).logits
    assert len(base.image_projections) == (1 if settings is wide else 2)
    torch.testing.assert_close(logits(model, images), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}])
def test_every_way_to_open(saved, options):
    folder, want = saved["narrow"]
    loaded = PeftModel.from_pretrained(llama(), folder, **options).eval()
    torch.testing.assert_close(logits(loaded, NARROW), want, rtol=0, atol=0)
    direct = llama()
    direct.load_adapter(folder)
    torch.testing.assert_close(logits(direct.eval(), NARROW), want, rtol=0, atol=0)
    direct.delete_adapter("default")
    assert not held(direct)


def test_copies_have_their_own(saved):
    model = PeftModel.from_pretrained(llama(), saved["wide"][0]).eval()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(logits(twin), saved["wide"][1], rtol=0, atol=0)
    fill(twin, 11, HELD)
    assert not torch.allclose(logits(twin), saved["wide"][1], atol=1e-2)
    torch.testing.assert_close(logits(model), saved["wide"][1], rtol=0, atol=0)


def test_two_adapters_each_with_its_projections(saved):
    model = PeftModel.from_pretrained(llama(), saved["wide"][0], is_trainable=True)
    model.load_adapter(saved["other"][0], "second", is_trainable=True)
    model.eval()
    torch.testing.assert_close(logits(model), saved["wide"][1], rtol=0, atol=0)
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), saved["other"][1], rtol=0, atol=0)
    assert all(weight.requires_grad for weight in held(model, "second").values())
    assert not any(weight.requires_grad for weight in held(model).values())
    mixed = logits(model, adapter_names=["second", "default", "__base__"])
    for row, want in enumerate((saved["other"][1], saved["wide"][1], logits(llama()))):
        torch.testing.assert_close(mixed[row], want[row], rtol=0, atol=1e-5)
    with routingvl.bind_image(model, IMAGES, decoding=True):
        assert model.generate(input_ids=IDS, max_new_tokens=3, num_beams=2, do_sample=False).shape[0] == ROWS
    model.delete_adapter("default")
    assert len(held(model, "second")) == 2
    assert not held(model)
    torch.testing.assert_close(logits(model), saved["other"][1], rtol=0, atol=0)
    model.delete_adapter("second")
    assert not held(model, "second")


def test_hotswap(saved, tmp_path):
    model = PeftModel.from_pretrained(llama(), saved["wide"][0]).eval()
    hotswap_adapter(model, saved["other"][0], adapter_name="default")
    torch.testing.assert_close(logits(model), saved["other"][1], rtol=0, atol=0)
    adapted(config(target_modules="all-linear", exclude_modules=["down_proj"])).save_pretrained(tmp_path)
    for folder, setting in ((tmp_path, "image_projection"), (saved["narrow"][0], "image_width")):
        with pytest.raises(ValueError, match=f"Configs are incompatible: for {setting}"):
            hotswap_adapter(model, folder, adapter_name="default")


def test_float32_over_bfloat16():
    model = own(get_peft_model(llama().to(torch.bfloat16), narrow()))
    assert {weight.dtype for weight in held(model).values()} == {torch.float32}
    assert len(held(model)) == 4
    out = logits(model, NARROW.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    want = logits(own(get_peft_model(llama(), narrow())), NARROW)
    torch.testing.assert_close(out.float(), want, rtol=0, atol=0.03 * want.abs().max().item())
    before = {name: weight.detach().clone() for name, weight in held(model).items()}
    train(model, 1, NARROW)
    assert all(not torch.equal(weight, before[name]) for name, weight in held(model).items())


def test_one_image_for_all_adapters():
    model = get_peft_model(llama(), narrow())
    with pytest.raises(PeftMethodError, match="image_width=32: another adapter of the model reads an image of 24"):
        model.add_adapter("second", wide(image_width=32))
    with pytest.raises(PeftMethodError, match=r"q_proj takes 32 features.*another adapter reads has 24"):
        model.add_adapter("second", config())
    assert list(model.peft_config) == ["default"]
    model.add_adapter("second", wide())
    assert model.peft_config["second"].image_width == 24
    assert {tuple(weight.shape) for name, weight in held(model, "second").items() if "weight" in name} == {
        (32, 24),
        (48, 24),
    }
    plain = get_peft_model(llama(), wide(routing="none"))
    assert not held(plain)
    assert len(list(routed_layers(plain))) == 14


@pytest.fixture
def alone():
    """A group of this one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_fsdp2_over_the_model_and_over_each_layer(saved, alone):
    from torch.distributed.fsdp import fully_shard

    model = PeftModel.from_pretrained(llama(), saved["wide"][0]).eval()
    fully_shard(model, mesh=alone)
    torch.testing.assert_close(logits(model), saved["wide"][1], rtol=0, atol=1e-6)
    model = PeftModel.from_pretrained(llama(), saved["wide"][0]).eval()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=alone)
    fully_shard(model, mesh=alone)
    with pytest.raises(PeftMethodError, match=r"image_projection: FSDP2 shards the layers one by one"):
        logits(model)


def test_a_module_of_the_base_called_image_projection_is_saved_by_that_name():
    """PEFT finds modules_to_save by how their names end."""
    base = llama()
    base.image_projection = torch.nn.Linear(3, 32)
    model = get_peft_model(base, narrow(modules_to_save=["image_projection"]))
    kept = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    assert kept == ["base_model.model.image_projection"]
    assert len(held(model)) == 4


@pytest.mark.parametrize("settings", [config, narrow])
@pytest.mark.parametrize("width", [20, 32])
def test_an_image_of_another_width_is_an_error(settings, width):
    """Also one as wide as some of the layers, which read it through their projection."""
    model = adapted(settings())
    images, read = torch.ones(ROWS, 2, width), 32 if settings is config else 24
    if width == read:
        logits(model, images)
        return
    message = f"features are {width} wide, and the routed layers read {read}: .* image_width={width}"
    with pytest.raises(ValueError, match=message), routingvl.bind_image(model, images):
        model(input_ids=IDS)
    with pytest.raises(ValueError, match=message), routingvl.bind_image(model, images, decoding=True):
        model.generate(input_ids=IDS, max_new_tokens=2)
