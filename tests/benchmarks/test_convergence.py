"""Training parity: which rows decide, and what the sides are."""

from __future__ import annotations

import pytest
import torch

from routingvl.benchmarks.convergence import NUDGE, judged, main, make_side, table
from routingvl.benchmarks.random_models import routed_model

CPU = torch.device("cpu")


def rows(ours: float, nudged: float = 1.001, further: tuple[float, ...] = ()) -> list[dict]:
    """Rows in float32 of constant losses; ``further`` are those of ours from further starts, where published has 1."""
    sides = [("published", 0, 1.0), ("nudged", 0, nudged), ("ours", 0, ours)]
    for start, loss in enumerate(further, 1):
        sides += [("published", start, 1.0), ("ours", start, loss)]
    return [
        {"case": "c", "dtype": "float32", "side": side, "losses": [loss] * 30, **({"start": start} if start else {})}
        for side, start, loss in sides
    ]


@pytest.mark.parametrize(("ours", "passed"), [(1.0015, True), (1.003, False)])
def test_ours_may_stray_twice_as_far_as_rounding(ours: float, passed: bool) -> None:
    (verdict,) = judged(rows(ours))
    assert verdict["passed"] == passed
    assert verdict["widest"] == pytest.approx(2e-3)
    assert (verdict["last"], verdict["error"], verdict["starts"]) == (pytest.approx(ours), 0.0, 1)
    assert table([verdict]).endswith("passed |" if passed else "FAILED |")


def test_further_starts_decide_the_last_losses_alone() -> None:
    (verdict,) = judged(rows(1.0, further=(1.2, 0.7)))
    assert verdict["passed"]
    assert verdict["ours"] == 0
    assert verdict["starts"] == 3
    assert verdict["last"] == pytest.approx((1.0 + 1.2 + 0.7) / 3)
    assert verdict["error"] == pytest.approx(0.1453, abs=1e-4)


def test_both_sides_of_a_start_are_moved_alike() -> None:
    model = routed_model("caption", "tiny", vision=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    ours, published = (make_side(name, model, "bfloat16", CPU, 3) for name in ("ours", "published"))
    found = [dict(side.named_parameters()) for side in (ours, published)]
    moved = 0.0
    for name, weight in before.items():
        assert torch.equal(found[0][name], found[1][name])
        moved = max(moved, ((found[0][name] - weight).abs() / weight.abs().clamp(min=1e-9)).max().item())
    assert 1 < moved / NUDGE["bfloat16"] < 10


def test_the_command_line_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--starts", "-1"])
    assert "--starts -1 must not be negative" in capsys.readouterr().err
