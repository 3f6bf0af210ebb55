"""The gate's tolerances: what passes, what does not, and what is said."""

from functools import partial

import pytest
import torch

from routingvl.benchmarks import gate


def test_gate_knows_nan_shape_and_the_plain_error() -> None:
    want = {"y": torch.ones(4, dtype=torch.float64)}
    check = partial(gate.failures, oracle=want, dtype=torch.float32)
    assert check({"y": torch.ones(4)}, {"y": torch.ones(4)}) == {}
    assert "nan" in check({"y": torch.full((4,), torch.nan)}, {"y": torch.ones(4)})["y"]
    assert check({"y": torch.ones(5)}, {"y": torch.ones(4)}) == {"y": "has shape [5], not [4]"}
    # 4e-6 is below the cap but more than twice the error of the plain composition.
    assert "above 1.00e-06" in check({"y": torch.ones(4) + 4e-6}, {"y": torch.ones(4)})["y"]
    assert gate.allowed_error(torch.float32, 1e-6) == pytest.approx(3e-6)
    assert gate.allowed_error(torch.float32, 1.0) == gate.CAPS[torch.float32]
    assert gate.relative_rms(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5.0


def test_gate_measures_what_cancels_by_the_largest_tensor() -> None:
    """A gradient that is zero up to rounding has no size of its own, but may not be anything either."""
    oracle = {"y": torch.full((4,), 10.0).double(), "dbias": torch.full((2,), 1e-15).double()}
    errors = gate.relative_errors({"y": torch.full((4,), 10.0), "dbias": torch.full((2,), 3e-6)}, oracle)
    assert errors == {"y": 0.0, "dbias": pytest.approx(3e-7)}
    assert list(gate.failures({**oracle, "dbias": torch.full((2,), 1e-3)}, oracle, oracle, torch.float32)) == ["dbias"]
    rounding = {**oracle, "dbias": torch.full((2,), 3e-5)}  # below the cap, whatever the plain composition has left
    assert gate.failures(rounding, oracle, oracle, torch.float32) == {}
    own = {**oracle, "dbias": torch.full((2,), 1e-6).double()}  # small, and no rounding
    assert gate.relative_errors({**own, "dbias": torch.full((2,), 2e-6)}, own)["dbias"] == pytest.approx(1.0)
