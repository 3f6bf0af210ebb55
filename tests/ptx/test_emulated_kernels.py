"""Every kernel in each of its forms, as compiled for sm_90 and sm_80, in the emulator, against the definition.

What a launch really compiles is run: arguments specialised, loops pipelined, shared memory swizzled, matrices
multiplied by mma and wgmma; and every access to memory is checked (memory.py).
"""

import pytest

pytest.importorskip("triton")

from ptx.cases import Case, kernels_of, run_case

LAYERS = [
    Case("mul"),
    Case("vllora"),
    Case("vllora", "c_attn", tokens=40),
    Case("vllora", "adapter"),
]


def check(emulated, arch: int, case: Case) -> None:
    found = emulated(arch, run_case, case)
    assert not found.wrong
    assert sorted(set(found.launched)) == kernels_of(case)
    assert found.instructions > 1000


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_kernels_are_the_definition_on_sm_90(case: Case, emulated) -> None:
    check(emulated, 90, case)


def test_kernels_are_the_definition_on_sm_80(emulated) -> None:
    check(emulated, 80, Case("mul", "adapter"))
