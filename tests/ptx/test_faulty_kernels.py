"""The emulator bites: correct kernels with one thing broken fail loudly, each for its own reason."""

from collections.abc import Callable
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from ptx.cases import Case, compared, drawn, ops
from ptx.parser import Fault, Instruction, Program, read_instruction

NOTHING = read_instruction("bar.warp.sync -1")
WIDE = Case("mul", sizes=(3, 20, 200, 136, 64))


def changed(program: Program, opcode: str, change: Callable[[Instruction], Instruction]) -> Program:
    """The program with every instruction that begins with ``opcode`` changed; there has to be one."""
    found = [i for i in program.instructions if i.text.startswith(opcode)]
    instructions = [change(i) if i in found else i for i in program.instructions]
    return replace(program, instructions=instructions)


def without(opcode: str) -> Callable[[Program], Program]:
    return lambda program: changed(program, opcode, lambda instruction: replace(NOTHING, line=instruction.line))


def one_more_in_flight(opcode: str) -> Callable[[Program], Program]:
    def later(instruction: Instruction) -> Instruction:
        return replace(instruction, operands=(str(int(instruction.operands[0], 0) + 1),))

    return lambda program: changed(program, opcode, later)


def renamed(old: str, new: str) -> Callable[[Program], Program]:
    def other(instruction: Instruction) -> Instruction:
        return read_instruction(instruction.text.replace(old, new, 1), instruction.line)

    return lambda program: changed(program, old, other)


CHANGES = {
    "no barriers": (without("bar.sync"), "race in shared memory|may still use"),
    "a copy is awaited too early": (one_more_in_flight("cp.async.wait_group"), "before an asynchronous copy"),
    "a product is awaited too early": (one_more_in_flight("wgmma.wait_group"), "while a wgmma may still read|accumul"),
    "no fence before a product reads": (without("fence.proxy.async"), "without fence.proxy.async"),
    "no fence of registers": (without("wgmma.fence"), "no wgmma.fence before"),
    "an unknown instruction": (renamed("shl.b32", "shuffle.b32"), "unknown instruction shuffle.b32"),
    "an unknown modifier": (renamed("add.f32", "add.sat.f32"), "unknown modifier .sat in add.sat.f32"),
}


def run_changed(arch: int, name: str, case: Case, span_change: int = 0) -> dict[str, str]:
    import torch
    from ptx.driver import emulated

    rounded = {key: tensor.to(torch.bfloat16) for key, tensor in drawn(case).items()}
    exact = {key: tensor.double() for key, tensor in rounded.items()}
    with emulated(arch) as launches:
        launches.alter = CHANGES[name][0] if name else None
        launches.span_change = span_change
        return compared(case, *ops(case), rounded, exact, launches).wrong


@pytest.mark.parametrize("name", CHANGES)
def test_a_broken_kernel_is_found(name: str, emulated) -> None:
    with pytest.raises(Fault, match=CHANGES[name][1]):
        emulated(90, run_changed, name, WIDE)


def test_a_tensor_one_element_short_is_found(emulated) -> None:
    with pytest.raises(Fault, match="outside of every tensor"):
        emulated(90, run_changed, "", WIDE, -2)


def test_nothing_is_found_where_nothing_is_broken(emulated) -> None:
    assert emulated(90, run_changed, "", WIDE) == {}
