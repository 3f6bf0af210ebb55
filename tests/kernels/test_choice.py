"""Which calls are left to torch on a GPU: the table, and that it decides nothing where somebody asked for a backend."""

import pytest
import torch

from routingvl.kernels import dispatch
from routingvl.kernels.choice import TABLE, torch_wins
from routingvl.kernels.dispatch import select_backend


@pytest.mark.parametrize(
    ("plain", "grouped", "dropout", "wins"),
    [
        (True, False, False, (1, 40, 672, 2040, 10240)),
        (False, False, False, (672,)),
        (False, False, True, (672,)),
        (False, True, False, (672,)),
        (False, True, True, (672, 2040)),
    ],
)
def test_the_table(plain: bool, grouped: bool, dropout: bool, wins: tuple[int, ...]) -> None:
    call = {"plain": plain, "grouped": grouped, "dropout": dropout}
    for rows in (1, 40, 672, 2040, 10240):
        found = torch_wins("sm_90", torch.bfloat16, rows, **call)
        assert (found is not None) == (rows in wins)
        for arch, dtype in (("sm_80", torch.bfloat16), ("gfx942", torch.float16), ("sm_90", torch.float32)):
            assert torch_wins(arch, dtype, rows, **call) is None


def test_each_entry_has_its_times() -> None:
    assert all(any(letter.isdigit() for letter in entry.why) for entry in TABLE)


def test_a_default_goes_by_the_table_and_a_name_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROUTINGVL_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda device_type: None)
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "_current_arch", lambda: "sm_90")

    def chosen(backend: str | None = None, **changes: object) -> tuple[str, str]:
        call = {"dtype": torch.bfloat16, "width": 256, "routing": "mul", "visual_tokens": 1, "products": True}
        given = {**call, "rows": 2040, "grouped": True, "dropout": True, **changes}
        return select_backend("cuda", backend, **given)

    name, reason = chosen()
    assert name == "eager"
    assert "118 us, kernels 162" in reason
    assert chosen(rows=40)[0] == chosen(dropout=False)[0] == chosen(rows=None)[0] == "triton"
    assert chosen(routing="vllora", products=False)[0] == chosen(routing="vllora", visual_tokens=9)[0] == "triton"
    assert chosen("triton")[0] == "triton"
    monkeypatch.setenv("ROUTINGVL_BACKEND", "triton")
    assert chosen()[0] == "triton"
