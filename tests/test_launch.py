"""Choice of the backend."""

import subprocess
import sys

import pytest
import torch

from routingvl.kernels import routed_adapter, routed_lora, select_backend


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROUTINGVL_BACKEND", raising=False)


def test_default_on_a_cpu_is_eager_with_a_reason() -> None:
    name, reason = select_backend("cpu")
    assert name == "eager"
    assert "cpu" in reason


def test_argument_goes_before_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTINGVL_BACKEND", "triton")
    assert select_backend("cpu", "eager") == ("eager", "backend='eager'")
    monkeypatch.setenv("ROUTINGVL_BACKEND", "eager")
    assert select_backend("cpu") == ("eager", "ROUTINGVL_BACKEND=eager")
    monkeypatch.setenv("ROUTINGVL_BACKEND", "")
    assert select_backend("cpu")[0] == "eager"


def test_asked_for_backend_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run: .*use 'eager'"):
        select_backend("cpu", "triton")
    monkeypatch.setenv("ROUTINGVL_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="ROUTINGVL_BACKEND=triton cannot run"):
        select_backend("cpu")


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend='cuda': unknown backend; known are 'eager', 'triton'"):
        select_backend("cpu", "cuda")
    monkeypatch.setenv("ROUTINGVL_BACKEND", "tritn")
    with pytest.raises(ValueError, match="ROUTINGVL_BACKEND=tritn: unknown backend"):
        select_backend("cpu")


def test_the_ops_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTINGVL_BACKEND", "nonsense")
    x, a, b = torch.randn(1, 2, 4), torch.randn(3, 4), torch.randn(4, 3)
    with pytest.raises(ValueError, match="unknown backend"):
        routed_lora(x, None, a, b, routing="none")
    with pytest.raises(ValueError, match="unknown backend"):
        routed_adapter(x, None, a, None, b, None, routing="none")
    assert routed_lora(x, None, a, b, routing="none", backend="eager").shape == (1, 2, 4)


def test_kernels_work_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from routingvl.kernels import routed_lora\n"
        "print(routed_lora(torch.ones(1, 1, 2), None, torch.ones(1, 2), torch.ones(3, 1), routing='none').tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[[[2.0, 2.0, 2.0]]]", done.stderr
