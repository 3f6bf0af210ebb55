"""Choice of the backend, and launching with less when a tile does not fit."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from routingvl.kernels import dispatch, routed_adapter, routed_lora, select_backend
from routingvl.kernels.optional_triton import interpreted, triton
from routingvl.kernels.triton_common import launch
from routingvl.kernels.triton_common.tiles import tiles_for

needs_triton = pytest.mark.skipif(triton is None, reason="no triton")


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROUTINGVL_BACKEND", raising=False)


@pytest.fixture
def gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled ones, not interpreted, as in a process without TRITON_INTERPRET."""
    for module in (dispatch, launch):
        monkeypatch.setattr(module, "interpreted", lambda: False)


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


def test_asked_for_backend_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch, gpu_kernels: None) -> None:
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run: .*use 'eager'"):
        select_backend("cpu", "triton")
    monkeypatch.setenv("ROUTINGVL_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="ROUTINGVL_BACKEND=triton cannot run"):
        select_backend("cpu")


@needs_triton
def test_exact_products_of_float32_are_torchs_on_a_gpu_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    name, reason = select_backend("cuda", dtype=torch.float32, width=8, products=True)
    assert name == "eager"
    assert "backend='triton' overrides" in reason
    for dtype, products, backend in (
        (torch.float32, False, None),  # rank one: no products
        (torch.bfloat16, True, None),
        (torch.float32, True, "triton"),
    ):
        assert select_backend("cuda", backend, dtype=dtype, width=8, products=products)[0] == "triton"
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert select_backend("cuda", dtype=torch.float32, width=8, products=True)[0] == "triton"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    monkeypatch.setenv("ROUTINGVL_BACKEND", "triton")
    assert select_backend("cuda", dtype=torch.float32, width=8, products=True)[0] == "triton"


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend='cuda': unknown backend; known are 'eager', 'triton'"):
        select_backend("cpu", "cuda")
    monkeypatch.setenv("ROUTINGVL_BACKEND", "tritn")
    with pytest.raises(ValueError, match="ROUTINGVL_BACKEND=tritn: unknown backend"):
        select_backend("cpu")


@needs_triton
def test_on_a_gpu_the_default_is_triton() -> None:
    assert select_backend("cuda")[0] == "triton"
    assert select_backend("xpu") == ("triton", "default on 'xpu' devices, untested there")
    assert select_backend("mps") == ("eager", "there are no Triton kernels for 'mps' devices")


@needs_triton
def test_what_the_kernels_do_not_cover_is_eager_with_the_reason() -> None:
    assert select_backend("cuda", dtype=torch.bfloat16, width=256)[0] == "triton"
    for given, word in (({"dtype": torch.float64}, "torch.float64"), ({"width": 257}, "257")):
        for backend in (None, "triton"):
            name, reason = select_backend("cuda", backend, **given)
            assert name == "eager"
            assert word in reason


@needs_triton
def test_without_triton_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton", None)
    assert select_backend("cuda") == ("eager", "triton is not installed")
    with pytest.raises(RuntimeError, match="triton is not installed"):
        select_backend("cuda", "triton")


@pytest.mark.skipif(not interpreted(), reason="kernels are compiled")
def test_the_interpreter_runs_on_a_cpu_when_asked_for() -> None:
    assert select_backend("cpu", "triton") == ("triton", "backend='triton', in Triton's interpreter")


@needs_triton
def test_a_tile_that_does_not_fit_gives_way_to_a_smaller_one(
    gpu_kernels: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launch, "_first_fit", {})
    tiles = tiles_for("lora_forward", 128, "half", False, "sm_90")
    tried = []

    def attempt(tile):
        tried.append(tile)
        if len(tried) < 3:
            raise triton.OutOfResources(300_000, 232_448, "shared memory")
        return "done"

    with caplog.at_level(logging.WARNING):
        assert launch.launch("lora_forward", tiles, attempt) == "done"
        assert launch.launch("lora_forward", tiles, attempt) == "done"
    assert tried == [*tiles[:3], tiles[2]]  # the second call starts where the first one ended
    assert len(caplog.records) == 2


@needs_triton
def test_when_no_tile_fits_the_error_names_the_way_out(gpu_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_first_fit", {})

    def attempt(tile):
        raise triton.OutOfResources(300_000, 1, "shared memory")

    with pytest.raises(RuntimeError, match="no tile of lora_forward fits this device: set ROUTINGVL_BACKEND=eager"):
        launch.launch("lora_forward", tiles_for("lora_forward", 128, "half", False, "sm_90"), attempt)


@needs_triton
@pytest.mark.skipif(not interpreted(), reason="the kernels are there to be launched on a CPU only when interpreted")
@pytest.mark.parametrize("routing", ["mul", "vllora"])
def test_a_forward_pass_that_fits_nowhere_is_eager_and_says_so_once(
    routing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts, launch_one = [], launch.launch

    def too_big(tile):
        attempts.append(tile)
        raise triton.OutOfResources(300_000, 1, "shared memory")

    def refuse(kind, tiles, attempt):
        monkeypatch.setattr(launch, "interpreted", lambda: False)
        try:
            return launch_one(kind, tiles, too_big)
        finally:
            monkeypatch.setattr(launch, "interpreted", interpreted)

    monkeypatch.setattr(launch, "_first_fit", {})
    monkeypatch.setattr(launch, "_said", set())
    monkeypatch.setattr(launch, "launch", refuse)
    x, v = torch.randn(2, 3, 8), torch.randn(2, 1, 8)
    a, b = torch.randn(4, 8), torch.randn(8, 4).requires_grad_()
    for op, tensors in ((routed_lora, (x, v, a, b)), (routed_adapter, (x, v, a, None, b, None))):
        wanted = op(*tensors, routing=routing, backend="eager")
        (gradient,) = torch.autograd.grad(wanted.square().sum(), b)
        caplog.clear()
        for call in range(2):
            before = len(attempts)
            found = op(*tensors, routing=routing, backend="triton")
            assert (len(attempts) > before) == (call == 0)  # the second call tries nothing
            torch.testing.assert_close(found, wanted)
            torch.testing.assert_close(torch.autograd.grad(found.square().sum(), b)[0], gradient)
        assert sum("computed eagerly" in record.message for record in caplog.records) == 1


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


@needs_triton
def test_without_the_interpreter_a_cpu_has_no_triton_backend() -> None:
    program = "from routingvl.kernels import select_backend; select_backend('cpu', 'triton')"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert "TRITON_INTERPRET=1" in done.stderr


@needs_triton
@pytest.mark.skipif(not interpreted(), reason="about Triton's interpreter")
def test_bfloat16_is_not_interpreted_wrongly() -> None:
    # A fresh process has the interpreter as Triton ships it; this one has it mended by conftest.py.
    program = (
        "import torch\n"
        "from routingvl.kernels import routed_lora, select_backend\n"
        "name, reason = select_backend('cpu', 'triton', dtype=torch.bfloat16)\n"
        "g = torch.Generator().manual_seed(0)\n"
        "x, v, a, b = (torch.randn(*s, generator=g).bfloat16() for s in ((2, 3, 16), (2, 1, 16), (4, 16), (16, 4)))\n"
        "y, plain = (routed_lora(x, v, a, b, routing='mul', backend=k) for k in ('triton', 'eager'))\n"
        "assert torch.equal(y, plain) or name == 'triton'\n"
        "torch.testing.assert_close(y, plain, rtol=0.05, atol=0.5)\n"
        "assert name == 'triton' or 'multiplies bfloat16 wrongly' in reason, reason\n"
        "assert select_backend('cpu', 'triton', dtype=torch.float16)[0] == 'triton'\n"
        "print(name)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert select_backend("cpu", "triton", dtype=torch.bfloat16)[0] == "triton"


def test_a_wrong_self_check_leads_to_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    monkeypatch.setattr(dispatch, "interpreter_multiplies_bfloat16", lambda: False)
    assert dispatch.call_obstacle(torch.float32, 16) is None
    assert "multiplies bfloat16 wrongly" in dispatch.call_obstacle(torch.bfloat16, 16)


@needs_triton
def test_what_fits_nowhere_is_in_the_reason_and_in_the_report(
    gpu_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import nn

    from routingvl.bottlenecks.layers import RoutedLoRALinear
    from routingvl.bottlenecks.report import trainable_report

    monkeypatch.setattr(launch, "_first_fit", {})
    layer = RoutedLoRALinear(nn.Linear(8, 8), routing="mul", rank=4, alpha=4)
    assert select_backend("cuda") == ("triton", "default on 'cuda' devices")

    def attempt(tile):
        raise triton.OutOfResources(300_000, 1, "shared memory")

    with pytest.raises(launch.NoTileFitsError) as raised:
        launch.launch("lora_backward", tiles_for("lora_backward", 128, "half", False, "sm_90"), attempt)
    for part in (
        "no tile of lora_backward",
        "no gradients",
        "ROUTINGVL_BACKEND=eager",
        "model.backend",
        "smaller rank",
    ):
        assert part in str(raised.value)
    assert launch.unfit_kernels() == ("lora_backward",)
    name, reason = select_backend("cuda")
    assert name == "triton"
    assert str(raised.value) in reason
    assert select_backend("cuda", "eager") == ("eager", "backend='eager'")
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda device_type: None)
    layer.backend = "triton"
    assert str(raised.value) in trainable_report(layer).layers[0].reason


def test_gpus_without_matrix_instructions_for_triton_are_eager(monkeypatch: pytest.MonkeyPatch, gpu_kernels) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for arch, expected in (("sm_75", "eager"), ("sm_70", "eager"), ("sm_80", "triton"), ("sm_120", "triton")):
        monkeypatch.setattr(dispatch, "_current_arch", lambda arch=arch: arch)
        name, reason = select_backend("cuda", dtype=torch.bfloat16, routing="mul", visual_tokens=1)
        assert name == expected
        assert (arch in reason) == (expected == "eager")
        assert select_backend("cuda", "triton", dtype=torch.bfloat16)[0] == "triton"


@needs_triton
@pytest.mark.parametrize("error", [triton.CompilationError("", None, "no"), RuntimeError("PassManager::run failed")])
def test_a_kernel_that_does_not_compile_is_left_to_eager(error, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_first_fit", {})
    monkeypatch.setattr(launch, "_not_compiled", {})
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    calls = []

    def attempt(tile):
        calls.append(tile)
        raise error

    tiles = tiles_for("lora_forward", 128, "half", False, "gfx950")
    for _ in range(2):
        with pytest.raises(launch.NoTileFitsError, match="lora_forward does not compile for this device"):
            launch.launch("lora_forward", tiles, attempt)
    assert len(calls) == 1
    assert launch.unfit_kernels() == ("lora_forward",)


@needs_triton
def test_other_errors_of_a_launch_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreted", lambda: False)

    def attempt(tile):
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        launch.launch("lora_forward", tiles_for("lora_forward", 128, "half", False, "sm_90"), attempt)
