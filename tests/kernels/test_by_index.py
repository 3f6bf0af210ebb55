"""Each token of the text names its image: as a loop over the images, and what is refused."""

from functools import partial

import pytest
import torch
from index_cases import INDEX, ROUTED, adapter_tensors, looped_adapter, looped_lora, lora_tensors
from routed_cases import LAYOUTS, options
from tolerances import assert_as_good_as, run

from routingvl.kernels import project_adapter_image, project_lora_image, routed_adapter, routed_lora, routed_lora_linear


@pytest.mark.parametrize("placement", ["bottleneck", "output"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "relu"), ROUTED)
def test_lora_is_the_loop_over_the_images(name: str, relu: bool, layout: str, placement: str) -> None:
    op = partial(
        routed_lora_linear, **options(name, relu, layout, placement=placement), image_index=INDEX, backend="eager"
    )
    assert_as_good_as(op, looped_lora(name, relu, layout, placement), lora_tensors(layout))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("name", "relu"), ROUTED)
def test_adapter_is_the_loop_over_the_images(name: str, relu: bool, residual: bool) -> None:
    op = partial(routed_adapter, routing=name, relu=relu, residual=residual, image_index=INDEX, backend="eager")
    assert_as_good_as(op, looped_adapter(name, relu, residual), adapter_tensors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "relu"), ROUTED)
def test_other_dtypes_err_no_more_than_the_loop(name: str, relu: bool, dtype: torch.dtype) -> None:
    op = partial(routed_lora_linear, **options(name, relu, "c_attn"), image_index=INDEX, backend="eager")
    assert_as_good_as(op, looped_lora(name, relu, "c_attn"), lora_tensors("c_attn"), dtype)


@pytest.mark.parametrize(("name", "relu"), ROUTED)
def test_rows_in_order_are_the_fast_form(name: str, relu: bool) -> None:
    given, chosen = lora_tensors("plain"), options(name, relu)
    given["v"] = given["v"][:2]
    index = torch.arange(2)[:, None].expand(2, INDEX.shape[1])
    dy = torch.randn(*INDEX.shape, 4, dtype=torch.float64)
    got = run(partial(routed_lora_linear, **chosen, image_index=index), given, dy)
    torch.testing.assert_close(got, run(partial(routed_lora_linear, **chosen), given, dy))


def test_a_base_is_added_to() -> None:
    given = lora_tensors("plain")
    base = torch.nn.functional.linear(given["x"], given.pop("weight"), given.pop("bias"))
    got = routed_lora(**given, base=base, **options("mul", False), image_index=INDEX)
    torch.testing.assert_close(got, looped_lora("mul", False, "plain")(**lora_tensors("plain")))


def test_a_code_made_beforehand_is_read() -> None:
    given, chosen = lora_tensors("plain"), options("expand", False)
    few = {key: chosen[key] for key in ("routing", "scaling", "relu", "groups")}
    code = project_lora_image(given["v"], given["a"], given["b"], **few, decoding=True)
    got = routed_lora_linear(**given, **chosen, image=code, image_index=INDEX)
    torch.testing.assert_close(got, routed_lora_linear(**given, **chosen, image_index=INDEX))
    given = adapter_tensors()
    code = project_adapter_image(given["v"], given["down_weight"], given["down_bias"], routing="vllora")
    got = routed_adapter(**given, routing="vllora", image=code, image_index=INDEX)
    torch.testing.assert_close(got, looped_adapter("vllora", False, True)(**given))


def test_dropout_draws_one_mask_for_each_image() -> None:
    """Half of the text's inputs are 0 and half of each image's, the same half for all its tokens."""
    x, v = torch.ones(1, 4, 64), torch.ones(2, 1, 64)
    weight, a, b = torch.zeros(64, 64), torch.eye(64), torch.eye(64)
    index = torch.tensor([[0, 0, 1, 1]])
    options_ = {"routing": "add", "dropout": 0.5, "image_index": index, "backend": "eager"}
    torch.manual_seed(0)
    y = routed_lora_linear(x, v, weight, None, a, b, **options_)[0]
    assert set(y.unique().tolist()) == {0.0, 2.0, 4.0}
    of_image = y.view(2, 2, 64)
    # Where the image is dropped no token has more than its own 2, where it is not none has less.
    dropped = (of_image == 0).any(1)
    assert dropped.any()
    assert (of_image.amax(1)[dropped] <= 2).all()
    torch.manual_seed(0)
    assert torch.equal(routed_lora_linear(x, v, weight, None, a, b, **options_)[0], y)


def test_equal_calls_give_equal_bits() -> None:
    torch.manual_seed(0)
    index = torch.randint(5, (4, 50))
    given = {"x": torch.randn(4, 50, 16), "v": torch.randn(5, 1, 16), "weight": torch.randn(16, 16), "bias": None}
    given |= {"a": torch.randn(8, 16), "b": torch.randn(16, 8)}
    dy = torch.randn(4, 50, 16)
    op = partial(routed_lora_linear, routing="mul", image_index=index)
    first, second = run(op, given, dy), run(op, given, dy)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_autocast_and_a_compiler() -> None:
    given = {name: tensor.float() for name, tensor in lora_tensors("plain").items()}
    op = partial(routed_lora_linear, **options("mul", False), image_index=INDEX)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(**given)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), op(**given), rtol=0.1, atol=0.3)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**given), op(**given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_index": INDEX[:, :4]}, r"image_index must have shape \[2, 5\], got \[2, 4\]"),
        ({"image_index": INDEX.int()}, "image_index must be torch.int64 on cpu, got torch.int32 on cpu"),
        ({"image_index": INDEX.to("meta")}, "image_index must be torch.int64 on cpu, got torch.int64 on meta"),
        ({"v": torch.zeros(3, 2, 6, dtype=torch.float64)}, "one visual token per image, got L=2"),
        ({"v": None}, "v has to be given"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    for op, given, chosen in (
        (routed_lora_linear, lora_tensors("plain"), options("vllora", False)),
        (routed_adapter, adapter_tensors(), {"routing": "vllora"}),
    ):
        with pytest.raises(ValueError, match=message):
            op(**{**given, **chosen, "image_index": INDEX, **change})


def test_a_routing_without_image_reads_no_index() -> None:
    given = lora_tensors("plain") | {"v": None}
    y = routed_lora_linear(**given, **options("none", False), image_index=INDEX)
    assert torch.equal(y, routed_lora_linear(**given, **options("none", False)))


def test_an_empty_batch_keeps_its_shape():
    x, v, index = torch.randn(0, 3, 6), torch.randn(2, 1, 6), torch.zeros(0, 3, dtype=torch.long)
    a, b, base = torch.randn(2, 6), torch.randn(4, 2), torch.randn(0, 3, 4)
    assert routed_lora(x, v, a, b, routing="mul", base=base, image_index=index).shape == (0, 3, 4)
