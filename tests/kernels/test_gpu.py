"""What only a GPU can show of the kernels: `pytest -m gpu`; conftest.py adds the kernels' other tests to it there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from golden_cases import LAYER_CASES, Tensors, build_layer
from tiny import answerer, batch, captioner, randomise
from tolerances import relative_rms
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from routingvl import RoutingConfig
from routingvl.kernels import ImageCode, project_lora_image, routed_adapter, routed_lora_linear

pytest.importorskip("triton")
from routingvl.benchmarks.each_kernel import CALLS, SIZES, missed_by
from routingvl.benchmarks.gate import FACTOR, SLACK

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ODD = [{"B": 1, "T": 1, "K": 1, "N": 1, "R": 1}, {"B": 3, "T": 67, "K": 130, "N": 130, "R": 33}]
ODD += [{"B": 2, "T": 200, "K": 100, "N": 100, "R": 100}]
# Routings that take each of the three ways through the kernels: with r components, rank one, many visual tokens.
WAYS = [("mul", 1), ("vllora", 1), ("vllora", 9)]


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """A dtype; for "tf32" float32 with torch's permission to round the products' operands."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param == "tf32"
    yield DTYPES[request.param]
    torch.backends.cuda.matmul.allow_tf32 = before


def drawn(batch: int, text: int, tokens: int, width: int = 96, rank: int = 24, dtype=torch.float32, device=DEVICE):
    """x, v, weight, bias, a, b of a LoRA layer; all but v and weight need a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (batch, text, width), "v": (batch, tokens, width), "weight": (width, width), "bias": (width,)}
    shapes |= {"a": (rank, width), "b": (width, rank)}
    made = {name: torch.randn(*shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    return {name: tensor.to(device, dtype).requires_grad_(name not in ("v", "weight")) for name, tensor in made.items()}


def gradients(op, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients of its weighted sum."""
    y = op(**leaves)
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype)
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    grads = torch.autograd.grad(y, [leaves[name] for name in wanted], dy)
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_alike(got: dict[str, Tensor], want: dict[str, Tensor], limit: float = 5e-6) -> None:
    assert got.keys() == want.keys()
    errors = {name: relative_rms(got[name].cpu(), want[name].cpu()) for name in want}
    assert max(errors.values()) <= limit, errors


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_every_kernel_against_float64(call, kind: str) -> None:
    assert missed_by(call, SIZES["small"], DTYPES[kind], DEVICE) == []


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
@pytest.mark.parametrize("sizes", [*ODD, SIZES["paper"]], ids=lambda sizes: "-".join(map(str, sizes.values())))
def test_odd_and_real_sizes(call, sizes: dict[str, int]) -> None:
    kind = torch.bfloat16 if sizes is SIZES["paper"] else torch.float32
    assert missed_by(call, sizes, kind, DEVICE) == []


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda case: case["id"])
def test_golden_layers(case: dict, dtype: torch.dtype) -> None:
    """The published numbers: the kernels err little more than torch does in the same type on the same GPU."""
    tensors = Tensors(case)
    want = tensors if case["reference_equals_true_transpose_formula"] else tensors.under("true_transpose")
    errors = {}
    for backend in ("triton", "eager"):
        layer = build_layer(case, tensors.under("param")).to(DEVICE, dtype)
        layer.backend = backend
        x, v, cotangent = (
            tensors[name].to(DEVICE, dtype) if name in tensors else None
            for name in ("input/x", "input/vis_feat", "input/cotangent")
        )
        y = layer(x.requires_grad_(), v)
        y.backward(cotangent)
        found = {"output/y": y, "grad_input/x": x.grad}
        found |= {f"grad/{name}": p.grad for name, p in layer.named_parameters() if p.requires_grad}
        errors[backend] = {name: relative_rms(tensor.cpu(), want[name]) for name, tensor in found.items()}
    # What the plain chain may lose to a happy cancellation, in units of the type's own rounding.
    floor = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}[dtype]
    floor = 5e-4 if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else floor
    for name, error in errors["triton"].items():
        assert error <= FACTOR * errors["eager"][name] + floor + SLACK, (name, error, errors["eager"][name])


@pytest.mark.parametrize(("routing", "tokens"), WAYS)
def test_addresses_beyond_two_to_the_31(routing: str, tokens: int) -> None:
    images, text, width = 2**13 + 1, 256, 1024  # 2^31 elements of x and one image more
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    leaves = drawn(1, 1, tokens, width, 16, torch.bfloat16)
    torch.manual_seed(0)
    leaves["x"] = torch.randn(images, text, width, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    leaves["v"] = torch.randn(images, tokens, width, device=DEVICE, dtype=torch.bfloat16) / width**0.5
    op = partial(routed_lora_linear, routing=routing, backend="triton")
    y = op(**leaves)
    y.backward(torch.ones_like(y[:, :1]).expand_as(y))
    for image in (0, images - 1):
        alone = leaves | {"x": leaves["x"][image, None].detach().requires_grad_(), "v": leaves["v"][image, None]}
        small = op(**alone)
        small.sum().backward(inputs=[alone["x"]])
        assert relative_rms(y[image], small[0]) < 1e-2
        assert relative_rms(leaves["x"].grad[image], alone["x"].grad[0]) < 1e-2


@pytest.mark.parametrize(("routing", "tokens"), WAYS)
def test_second_gpu(routing: str, tokens: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    op = partial(routed_lora_linear, routing=routing, backend="triton")
    first, second = (drawn(3, 40, tokens, device=f"cuda:{index}") for index in range(2))
    assert torch.cuda.current_device() == 0
    assert_alike(gradients(op, second), gradients(op, first), 0)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("routing", "tokens"), WAYS)
def test_cuda_graph(routing: str, tokens: int, dropout: float) -> None:
    """Captured once, a training step replays on new values, with another mask each time."""
    op = partial(routed_lora_linear, routing=routing, backend="triton", dropout=dropout)
    leaves = drawn(3, 40, tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            gradients(op, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(op, leaves)
    graph.replay()
    first = {name: tensor.clone() for name, tensor in captured.items()}
    if dropout:
        graph.replay()
        assert not torch.equal(captured["y"], first["y"])
        return
    assert_alike(first, gradients(op, leaves))
    with torch.no_grad():
        leaves["x"].mul_(-2)
    graph.replay()
    assert_alike(captured, gradients(op, leaves))


@pytest.mark.parametrize(("routing", "tokens"), WAYS)
def test_compiled_by_inductor(routing: str, tokens: int) -> None:
    torch._dynamo.reset()

    def lora(x, v, weight, bias, a, b) -> Tensor:
        y = routed_lora_linear(x, v, weight, bias, a, b, routing=routing, backend="triton")
        return routed_adapter(y.relu(), v, a, None, b, bias, routing=routing, backend="triton")

    leaves = drawn(3, 40, tokens)
    assert_alike(gradients(torch.compile(lora, fullgraph=True), leaves), gradients(lora, leaves), 1e-5)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize(("routing", "tokens"), WAYS)
def test_autocast_over_float32_weights(routing: str, tokens: int, kind: str) -> None:
    leaves, found = drawn(3, 40, tokens), {}
    for backend in ("triton", "eager"):
        op = partial(routed_lora_linear, routing=routing, backend=backend)
        with torch.autocast(DEVICE, DTYPES[kind]):
            found[backend] = gradients(op, leaves)
    assert found["triton"]["y"].dtype == DTYPES[kind]
    assert found["triton"]["a"].dtype == torch.float32
    assert_alike(found["triton"], found["eager"], 2e-2 if kind == "bfloat16" else 3e-3)


@pytest.mark.parametrize(("routing", "tokens"), WAYS)
def test_dropout_is_repeated_by_activation_checkpointing(routing: str, tokens: int) -> None:
    op = partial(routed_lora_linear, routing=routing, backend="triton", dropout=0.3)
    leaves, found = drawn(3, 40, tokens), []

    # By position: torch keeps the generators of those devices only that positional arguments are on.
    def again(**given: Tensor) -> Tensor:
        return checkpoint(
            lambda *values: op(**dict(zip(given, values, strict=True))), *given.values(), use_reentrant=False
        )

    for function in (op, again):
        torch.manual_seed(1)
        found.append(gradients(function, leaves))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    torch.manual_seed(2)
    assert not torch.equal(op(**leaves), found[0]["y"])


@pytest.mark.parametrize(("routing", "tokens"), WAYS)
def test_decoding_with_a_prepared_image(routing: str, tokens: int) -> None:
    """One row of text for each of five beams an image, the image projected beforehand."""
    leaves = {name: leaf.detach() for name, leaf in drawn(8, 1, tokens, dtype=torch.bfloat16).items()}
    x = torch.randn(40, 1, 96, device=DEVICE, dtype=torch.bfloat16)
    op = partial(routed_lora_linear, routing=routing, backend="triton")
    image = project_lora_image(leaves["v"], leaves["a"], leaves["b"], routing=routing, decoding=True)
    assert isinstance(image, ImageCode)
    want = op(**leaves | {"x": x, "v": leaves["v"].repeat_interleave(5, 0)})
    assert relative_rms(op(**leaves | {"x": x}, image=image), want) < 1e-2


@pytest.mark.parametrize(("routing", "tokens"), WAYS)
def test_the_images_own_projection(routing: str, tokens: int) -> None:
    found = []
    for device, backend, dtype in (("cpu", "eager", torch.float64), (DEVICE, "triton", torch.float32)):
        leaves = drawn(3, 40, tokens, dtype=dtype, device=device)
        own = torch.linspace(-0.2, 0.3, 24 * 130).view(24, 130).sin().to(device, dtype).requires_grad_()
        leaves |= {"v": leaves["v"][:, :, :1].repeat(1, 1, 130), "image_weight": own}  # an image of another width
        found.append(gradients(partial(routed_lora_linear, routing=routing, backend=backend), leaves))
    assert_alike(found[1], found[0])


@pytest.mark.parametrize("build", [captioner, answerer])
@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("routing", ["add", "mul", "expand", "vllora"])
def test_models_train_as_on_the_cpu(build, method: str, routing: str) -> None:
    found = []
    for device, backend in (("cpu", "eager"), (DEVICE, "triton")):
        config = RoutingConfig(rank=4, routing=routing, method=method)
        model = randomise(build(config, backend=backend)).to(device).train()
        logits = model(**{name: tensor.to(device) for name, tensor in batch().items()}).logits
        logits.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"logits": logits})
    # RoBERTa's queries get gradients so small that rounding is 2e-4 of them, in the interpreter as well.
    assert_alike(found[1], found[0], 2e-3)


@pytest.mark.parametrize("routing", ["mul", "vllora"])
def test_captions_are_those_of_the_cpu(routing: str) -> None:
    found = []
    for device, backend in (("cpu", "eager"), (DEVICE, "triton")):
        config = RoutingConfig(rank=4, routing=routing)
        model = randomise(captioner(config, backend=backend), 0.2).to(device).eval()
        features = 2 * torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(7))
        found.append(model.generate(vision_features=features.to(device), num_beams=3, max_new_tokens=6).cpu())
    assert torch.equal(*found)
