"""Plans of calls: whatever changes a call changes its key, and a kept plan is never met by another call."""

import itertools

import pytest
import torch

from routingvl.kernels import ROUTINGS, dispatch, project_lora_image, routed_lora, routed_lora_linear
from routingvl.kernels.call_plans import MAX_PLANS, Plans, call_key
from routingvl.kernels.lora import api

SETTINGS = ("mul", 1.0, False, 1, None, None)


def tensors() -> list[torch.Tensor]:
    """x, v, weight, bias, a and b of a linear layer."""
    shapes = ((2, 3, 8), (2, 1, 8), (6, 8), (6,), (4, 8), (6, 4))
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def layer(given: list[torch.Tensor], **options) -> torch.Tensor:
    """The layer of :func:`tensors`."""
    return routed_lora_linear(*given, **{"routing": "mul", "backend": "eager", **options})


def test_every_trait_of_every_tensor_is_in_the_key() -> None:
    given = tensors()
    plain = call_key(given, SETTINGS)
    assert plain == call_key([t.clone().requires_grad_() for t in given], SETTINGS)
    changes = (
        lambda t: t[..., :-1],
        lambda t: t.unsqueeze(0),
        lambda t: t.double(),
        lambda t: t.half(),
        lambda t: t.to("meta"),
        lambda t: None,
    )
    keys = {plain}
    for place, change in itertools.product(range(1, len(given)), changes):
        keys.add(call_key([*given[:place], change(given[place]), *given[place + 1 :]], SETTINGS))
    assert len(keys) == 1 + (len(given) - 1) * len(changes)


def test_settings_and_what_the_process_is_set_to_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors()
    keys = [call_key(given, SETTINGS)]
    for place, value in enumerate(("add", 2.0, True, 2, (0,), "eager")):
        keys.append(call_key(given, (*SETTINGS[:place], value, *SETTINGS[place + 1 :])))
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "triton")
    keys.append(call_key(given, SETTINGS))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            keys.append(call_key(given, SETTINGS))
    monkeypatch.setattr("routingvl.kernels.call_plans.tf32_allowed", lambda: True)
    keys.append(call_key(given, SETTINGS))
    assert len(set(keys)) == len(keys)


def test_what_is_no_plain_call_has_no_key() -> None:
    class Wrapped(torch.Tensor):
        pass

    given = tensors()
    assert call_key([given[0].to("meta")], SETTINGS) is None
    assert call_key([given[0].as_subclass(Wrapped), *given[1:]], SETTINGS) is None
    assert call_key(given, ("mul", torch.tensor(1.0))) is None  # could change and still be the same key
    assert call_key(given, ("mul", [0, 2])) is None
    seen = []
    torch.func.vmap(lambda x: seen.append(call_key([x], SETTINGS)) or x)(given[0])
    with torch._subclasses.FakeTensorMode():
        seen.append(call_key([torch.zeros(2)], SETTINGS))
    assert seen == [None, None]


def test_plans_are_few() -> None:
    plans: Plans[int] = Plans(lambda plan: plan + 1)
    for number in range(MAX_PLANS + 1):
        assert plans.keep(number, number) == number + 1
    assert plans.find(MAX_PLANS) == MAX_PLANS + 1
    assert plans.find(0) is None
    assert plans.keep(None, 5) == 5
    assert plans.find(None) is None


def test_changes_between_equal_calls_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors()
    first = layer(given)
    given[4].mul_(2)  # contents are no part of a plan
    assert not torch.equal(layer(given), first)
    assert not layer(given).requires_grad
    given[4].requires_grad_()
    layer(given).sum().backward()
    assert given[4].grad is not None
    given[4].requires_grad_(False)
    assert not layer(given).requires_grad
    assert layer([t.double() for t in given]).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(given).dtype == torch.bfloat16
    assert layer(given).dtype == torch.float32
    assert torch.equal(layer(given, scaling=0.0), torch.nn.functional.linear(given[0], given[2], given[3]))
    monkeypatch.setattr(api, "_plan_of_linear", lambda *_: pytest.fail("planned again"))
    layer(given)


def test_an_error_is_raised_each_time() -> None:
    given = tensors()
    wrong = [*given[:5], given[5][:-1]]
    mixed = [*given[:5], given[5].double()]
    for _ in range(3):
        layer(given)
        with pytest.raises(ValueError, match="b has 5 rows"):
            layer(wrong)
        with pytest.raises(ValueError, match="float64"):
            layer(mixed)
        with pytest.raises(ValueError, match="overlap or leave"):
            layer(given, columns=[3])


def test_the_backend_variable_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors()
    layer(given, backend=None)
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        layer(given, backend=None)
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE)
    layer(given, backend=None)


def test_columns_of_a_list_are_those_at_the_call() -> None:
    x, v, _, _, a, b = tensors()
    base, columns = torch.zeros(2, 3, 9), [0]
    first = routed_lora(x, v, a, b, base=base, columns=columns, routing="mul", backend="eager")
    columns[0] = 3
    second = routed_lora(x, v, a, b, base=base, columns=columns, routing="mul", backend="eager")
    assert torch.equal(first[..., :6], second[..., 3:])
    assert second[..., :3].abs().max() == 0


def test_a_given_image_and_none_are_different_calls() -> None:
    given = tensors()
    image = project_lora_image(given[1], *given[4:], routing="mul", backend="eager")
    assert torch.allclose(layer(given), layer(given, image=image))
    other = image._replace(u=2 * image.u)
    assert not torch.allclose(layer(given), layer(given, image=other))
    for row in ROUTINGS.values():  # a row, and its name
        assert torch.equal(layer(given, routing=row), layer(given, routing=row.name))
