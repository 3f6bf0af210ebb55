"""The kernels where each token of the text names its image: on a GPU where there is one, else interpreted."""

from functools import partial

import pytest
import torch
from index_cases import INDEX, ROUTED, adapter_tensors, looped_adapter, looped_lora, lora_tensors
from routed_cases import options
from tolerances import assert_as_good_as, run

from routingvl.kernels import routed_adapter, routed_lora_linear

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def there(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


@pytest.mark.parametrize("layout", ["plain", "c_attn"])
@pytest.mark.parametrize(("name", "relu"), ROUTED)
def test_lora_is_the_loop_over_the_images(name: str, relu: bool, layout: str) -> None:
    op = partial(routed_lora_linear, **options(name, relu, layout), image_index=INDEX.to(DEVICE), backend="triton")
    assert_as_good_as(op, looped_lora(name, relu, layout), there(lora_tensors(layout)), torch.float32)


@pytest.mark.parametrize(("name", "relu"), ROUTED)
def test_adapter_is_the_loop_over_the_images(name: str, relu: bool) -> None:
    op = partial(routed_adapter, routing=name, relu=relu, image_index=INDEX.to(DEVICE), backend="triton")
    assert_as_good_as(op, looped_adapter(name, relu, True), there(adapter_tensors()), torch.float32)


def test_dropout_draws_what_it_draws_for_rows_in_order() -> None:
    given = {name: tensor.float() for name, tensor in there(lora_tensors("plain")).items()}
    given["v"] = given["v"][:2]
    index = torch.arange(2, device=DEVICE)[:, None].expand(2, INDEX.shape[1]).contiguous()
    op = partial(routed_lora_linear, **options("mul", False), dropout=0.5, backend="triton")
    dy, found = torch.randn(*INDEX.shape, 4).to(DEVICE), []
    for more in ({}, {"image_index": index}):
        torch.manual_seed(0)
        found.append(run(partial(op, **more), given, dy))
    torch.testing.assert_close(found[1], found[0])
    assert not torch.allclose(found[0]["y"], op(**given))  # another mask
