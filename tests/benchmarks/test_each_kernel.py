"""benchmarks/each_kernel.py: it runs every kernel there is, and notices wrong results."""

import pytest
import torch

from routingvl.kernels.optional_triton import interpreted

pytest.importorskip("triton")
from routingvl.benchmarks import each_kernel
from routingvl.benchmarks.each_kernel import CALLS, KERNELS, SIZES, main, missed_by
from routingvl.kernels.adapter import ops as triton_adapter_ops
from routingvl.kernels.lora import rank_one as triton_rank_one
from routingvl.kernels.lora import triton as triton_lora

DEVICE = "cpu" if interpreted() else "cuda"
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no interpreter, no GPU")


def test_no_kernel_is_left_out() -> None:
    defined = set()
    for module in (triton_lora, triton_rank_one, triton_adapter_ops):
        defined |= {
            name.removesuffix("_kernel")
            for name in vars(module)
            if name.endswith("_kernel") and name != "launch_kernel"
        }
    assert defined == set(KERNELS)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_each_call_is_right(call) -> None:
    assert missed_by(call, SIZES["small"], torch.float32, DEVICE) == []


def test_wrong_results_and_missing_launches_fail(monkeypatch, capsys) -> None:
    good = each_kernel.layer_of

    def doubled(call, case):
        layer = good(call, case)
        return lambda **leaves: 2 * layer(**leaves)

    monkeypatch.setattr(each_kernel, "layer_of", doubled)
    assert main(["--device", DEVICE, "--only", "lora-mul"]) == 1
    assert "y relative RMS error" in capsys.readouterr().out
    monkeypatch.setattr(
        each_kernel, "layer_of", lambda call, case: each_kernel.definition(case, call.routing, call.relu)
    )
    assert main(["--device", DEVICE, "--only", "lora-mul"]) == 1
    assert "lora_forward was not launched" in capsys.readouterr().out
