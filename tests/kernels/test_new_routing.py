"""A further routing function is an edit of kernels/routing.py, made here in a copy of the packages as by hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import routingvl
from routingvl.kernels.optional_triton import triton

ROOT = Path(routingvl.__file__).parents[1]

FUNCTIONS = """
def _new_sub(t, u, relu):
    return t - u


def _new_sub_backward(dz, t, u, relu):
    return dz, -dz.sum(1, keepdim=True)


def _new_mean(t, u, relu):
    return t * u.mean(1, keepdim=True)


def _new_mean_backward(dz, t, u, relu):
    du = (dz * t).sum(1, keepdim=True) / u.shape[1]
    return dz * u.mean(1, keepdim=True), du.expand_as(u)


def _new_ratio(t, u, relu):
    return t / (1 + u * u)


def _new_ratio_backward(dz, t, u, relu):
    d = 1 + u * u
    return dz / d, (-2 * dz * t * u / d**2).sum(1, keepdim=True)


def _new_double(t, u, relu):
    return 2 * t


def _new_double_backward(dz, t, u, relu):
    return 2 * dz, None


_ROWS = (
    Routing("new_sub", 101, "z = t - u", 1, False, _new_sub, _new_sub_backward, image_factor=-1.0),
    Routing("new_mean", 102, "z = t * mean_l u_l", None, False, _new_mean, _new_mean_backward),
    Routing("new_ratio", None, "z = t / (1 + u^2)", 1, False, _new_ratio, _new_ratio_backward),
    Routing("new_double", 103, "z = 2 t", 0, False, _new_double, _new_double_backward),
"""
CONSTANTS = """
NEW_SUB, NEW_MEAN, NEW_DOUBLE = (constexpr(ROUTINGS[name].code) for name in ("new_sub", "new_mean", "new_double"))


@jit
def route_fwd"""
FORWARD = """    if ROUTING == NONE:
        z = t
    elif ROUTING == NEW_SUB:
        z = t - u
    elif ROUTING == NEW_MEAN:
        z = t * u
    elif ROUTING == NEW_DOUBLE:
        z = 2 * t
"""
BACKWARD = """    elif ROUTING == NEW_SUB:
        dt = dz
        du = -dz
    elif ROUTING == NEW_DOUBLE:
        dt = 2 * dz
        du = dz
    elif ROUTING == MUL or ROUTING == NEW_MEAN:
        dt = dz * u
"""
EDITS = [
    ("_ROWS = (\n", FUNCTIONS.lstrip("\n")),
    ("\n\n@jit\ndef route_fwd", CONSTANTS),
    ("    if ROUTING == NONE:\n        z = t\n", FORWARD),
    ("    elif ROUTING == MUL:\n        dt = dz * u\n", BACKWARD),
]

TESTS = [str(ROOT / "tests" / name) for name in ("", "kernels/lora", "kernels/adapter")]
PRELUDE = """
import sys
sys.path += {tests!r}
import conftest
conftest.pytest_configure()
import routingvl.kernels
assert routingvl.kernels.__file__.startswith({folder!r}), routingvl.kernels.__file__
"""
PROGRAM = """
from functools import partial
import torch
import routingvl.kernels.routing as routing
from routed_cases import LAYOUTS, defined_linear, options, tensors
from test_routed_adapter import pair, tensors as adapter_tensors
from tolerances import assert_as_good_as
from routingvl.kernels import project_adapter_image, project_lora_image, routed_adapter, routed_lora_linear
from routingvl.kernels import select_backend
from routingvl.benchmarks.each_kernel import CALLS, launched_kernels, missed_by, SIZES

from routingvl import RoutingConfig
ROUTINGS = routing.ROUTINGS
for name in ("new_sub", "new_mean", "new_ratio", "new_double"):
    for tokens in (1, 9) if name == "new_mean" else (1,):
        for placement in ("bottleneck", "output"):
            for layout in ("plain", "c_attn"):
                chosen = options(name, False, layout, placement=placement)
                given = tensors(tokens, layout)
                plain = partial(defined_linear, **chosen)
                assert_as_good_as(partial(routed_lora_linear, **chosen), plain, given)
                op = partial(routed_lora_linear, backend="triton", **chosen)
                with launched_kernels() as launched:
                    assert_as_good_as(op, plain, given, torch.float32)
                row, visual = ROUTINGS[name], tokens if ROUTINGS[name].uses_image else 0
                why = row.kernel_obstacle(visual, False, placement)
                assert launched == ([] if why else ["lora_forward", "lora_backward"]), (name, tokens, launched)
                chosen = select_backend("cpu", "triton", routing=name, visual_tokens=visual, placement=placement)
                assert chosen == ("eager", why) if why else chosen[0] == "triton"
        large = tensors(tokens, sizes=(2, 40, 12, 8, 3))  # rows enough to merge W + s B A where z = t + c u
        chosen = options(name, False, n=8)
        assert_as_good_as(partial(routed_lora_linear, **chosen), partial(defined_linear, **chosen), large)
        leaves = [t.requires_grad_() for t in tensors(tokens, sizes=(2, 3, 4, 2, 2)).values()]
        assert torch.autograd.gradcheck(partial(routed_lora_linear, **options(name, False, n=2)), leaves)
        op, plain = pair(name, False, activation="silu")
        assert_as_good_as(op, plain, adapter_tensors(tokens))
        assert_as_good_as(partial(op, backend="triton"), plain, adapter_tensors(tokens), torch.float32)
        leaves = [t.requires_grad_() for t in adapter_tensors(tokens, sizes=(2, 3, 4, 2)).values()]
        assert torch.autograd.gradcheck(op, leaves)
        with torch.no_grad():
            for backend in ("eager", "triton"):
                lora = {key: t.float() for key, t in tensors(tokens).items()}
                kept = project_lora_image(lora["v"], lora["a"], lora["b"], routing=name, scaling=1.7, decoding=True)
                call = partial(routed_lora_linear, **lora, **options(name, False), backend=backend)
                torch.testing.assert_close(call(image=kept), call())
                adapter = {key: t.float() for key, t in adapter_tensors(tokens).items()}
                weights = adapter["down_weight"], adapter["down_bias"]
                kept = project_adapter_image(adapter["v"], *weights, routing=name, decoding=True)
                call = partial(routed_adapter, **adapter, routing=name, backend=backend)
                torch.testing.assert_close(call(image=kept), call())
assert "several visual tokens" in select_backend("cpu", "triton", routing="new_mean")[1]
assert "no branch" in select_backend("cpu", "triton", routing="new_ratio")[1]
new = [call for call in CALLS if call.routing in ("new_sub", "new_mean", "new_double")]
assert new and not any(call.routing == "new_ratio" for call in CALLS)
for call in new:
    assert missed_by(call, SIZES["small"], torch.float32, "cpu") == []
print(routing.routing_table())
assert RoutingConfig(routing="new_sub").routing == "new_sub"
"""


def copy_with(folder: Path, edits: list[tuple[str, str]], file: str = "kernels/routing.py") -> Path:
    """A copy of the packages with ``file`` edited: (what stands there once, what stands there then)."""
    for name in ("kernels", "routingvl", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results", "demo"))
    shutil.copy(ROOT / "setup.py", folder)
    for before, after in edits:
        edit(folder / file, before, after)
    return folder


def edit(file: Path, before: str, after: str) -> None:
    """Replace what stands there once."""
    text = file.read_text(encoding="utf-8")
    assert text.count(before) == 1, before
    file.write_text(text.replace(before, after), encoding="utf-8")


def run_in(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program on that copy, kernels in Triton's interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", PRELUDE.format(tests=TESTS, folder=str(folder)) + program]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


needs_triton = pytest.mark.skipif(triton is None, reason="no triton")


@needs_triton
def test_new_functions_work_everywhere(tmp_path: Path) -> None:
    done = run_in(copy_with(tmp_path, EDITS), PROGRAM)
    assert done.returncode == 0, done.stderr[-4000:]
    for line in ("| new_sub | `z = t - u` | 1 | no |", "| new_mean | `z = t * mean_l u_l` | any | no |"):
        assert line in done.stdout


@needs_triton
@pytest.mark.parametrize("missing", ["route_fwd", "route_bwd"])
def test_a_code_without_a_branch_does_not_compile(tmp_path: Path, missing: str) -> None:
    """Neither where it is interpreted nor compiled is it taken for another function."""
    left_out = EDITS[2:3] if missing == "route_fwd" else EDITS[3:4]
    folder = copy_with(tmp_path, [pair for pair in EDITS if pair not in left_out])
    program = """
import torch
from routingvl.kernels import routed_lora
x, v, a, b = (torch.ones(s, requires_grad=True) for s in ((2, 3, 8), (2, 1, 8), (4, 8), (8, 4)))
routed_lora(x, v, a, b, routing="new_sub", backend="triton").sum().backward()
"""
    done = run_in(folder, program)
    assert done.returncode != 0
    assert f"{missing} has no branch for this code" in done.stderr


@needs_triton
def test_a_new_argument_of_a_kernel_is_added_in_two_places(tmp_path: Path) -> None:
    """A parameter of the kernel (used there), and a field of the options: the bottleneck grows with it."""
    folder = copy_with(tmp_path, [("z = (z * scaling)", "z = (z * scaling * gain)")], "kernels/lora/triton.py")
    kernel = (folder / "kernels/lora/triton.py").read_text(encoding="utf-8")
    first = kernel.partition("    keep_scale,\n")
    (folder / "kernels/lora/triton.py").write_text(f"{first[0]}{first[1]}    gain,\n{first[2]}", encoding="utf-8")
    field = "    dropout: float = 0.0\n"
    edit(folder / "kernels/lora/options.py", field, f"{field}    gain: float = 3.0\n")
    program = """
import torch
from routingvl.kernels import routed_lora
torch.manual_seed(0)
x, v, a, b = (torch.randn(s) for s in ((2, 3, 8), (2, 1, 8), (4, 8), (8, 4)))
eager, triton = (routed_lora(x, v, a, b, routing="mul", backend=backend) for backend in ("eager", "triton"))
torch.testing.assert_close(triton, 3 * eager, rtol=1e-4, atol=1e-4)
"""
    done = run_in(folder, program)
    assert done.returncode == 0, done.stderr[-4000:]
