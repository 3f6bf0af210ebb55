"""Routed adapters beside quantised layers: each calls the base layer, whatever it is, and adds the bottleneck."""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft_cases import ROWS, TARGETS, adapted, config, fill, llama, logits, train
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from routingvl.kernels import routed_lora
from routingvl.peft import PeftMethodError
from routingvl.peft.model import routed_layers

WIDTH = 64  # the block of 4-bit quantisation
IMAGES = torch.randn(ROWS, 1, WIDTH, generator=torch.Generator().manual_seed(2))


class PackedLinear(nn.Module):
    """As GPTQ's layers: no weight, packed integers and scales; widths under GPTQ's own names."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        return nn.functional.linear(x, (self.qweight * self.scales).to(x.dtype))


def packed(folder) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in list(model.named_modules()):
        if name.endswith(("q_proj", "v_proj")):
            home, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(home), leaf, PackedLinear(module))
    return model.requires_grad_(False)


def bits_and_bytes(folder, **bits) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **bits)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def torchao(folder) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = AutoModelForCausalLM.from_pretrained(folder)
    picked = lambda module, name: name.endswith(("q_proj", "v_proj"))  # noqa: E731
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=picked)
    return model.requires_grad_(False)


BASES = {
    "bitsandbytes 8 bit": lambda folder: bits_and_bytes(folder, load_in_8bit=True),
    "bitsandbytes 4 bit": lambda folder: bits_and_bytes(folder, load_in_4bit=True),
    "torchao": torchao,
    "GPTQ-like": packed,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama that each kind of quantisation starts from."""
    path = tmp_path_factory.mktemp("base")
    llama(hidden_size=WIDTH, intermediate_size=WIDTH).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.filterwarnings("ignore")
def test_quantised(kind, folder, tmp_path):
    model = get_peft_model(BASES[kind](folder), config())
    # Trained first: on a CPU, bitsandbytes packs 4-bit weights for good at the first call in evaluation.
    train(fill(model), images=IMAGES)
    layers = list(routed_layers(model))
    assert len(layers) == 4
    layer = layers[0]
    assert type(layer.base_layer) is not nn.Linear or type(layer.base_layer.weight) is not nn.Parameter
    a, b = layer.weights_of("default")
    assert a.dtype == b.dtype == torch.float32
    assert a.grad.abs().max() > 0
    assert b.grad.abs().max() > 0

    # One layer by its formula.
    x = torch.randn(ROWS, 5, WIDTH)
    with torch.no_grad(), layer.context.bind(IMAGES):
        got, below = layer(x), layer.base_layer(x)
    want = below.float() + routed_lora(x, IMAGES, a, b, routing="mul", scaling=2.0).float()
    torch.testing.assert_close(got.float(), want, rtol=0, atol=2e-2 if got.dtype == torch.bfloat16 else 1e-4)

    # The whole model, saved and opened on the same base.
    assert not torch.allclose(logits(model, IMAGES), logits(model, IMAGES.flip(0)), atol=1e-2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BASES[kind](folder), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, IMAGES), logits(model, IMAGES), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_weight_takes_no_merged_adapter(folder):
    model = adapted(config("none"), packed(folder))
    with pytest.raises(PeftMethodError, match="adapter 'default' cannot be merged into a PackedLinear"):
        model.merge_adapter()
    pytest.importorskip("bitsandbytes")
    model = adapted(config("none"), BASES["bitsandbytes 4 bit"](folder))
    with pytest.raises(PeftMethodError, match="cannot be merged into a Linear4bit"):
        model.merge_and_unload()


def test_a_subclass_of_linear_keeps_its_own_forward():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    base = llama()
    for layer in base.model.layers:
        layer.self_attn.q_proj.__class__ = Doubled
    want = logits(base)
    model = get_peft_model(base, config(target_modules=TARGETS))
    torch.testing.assert_close(logits(model, IMAGES[..., :32]), want, rtol=0, atol=0)  # B is 0
    assert not torch.allclose(logits(fill(model), IMAGES[..., :32]), want, atol=1e-2)
