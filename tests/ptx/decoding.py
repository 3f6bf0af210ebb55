"""How an instruction becomes a function: what every group of instructions needs for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from .lanes import Lanes, Mask
from .parser import Fault, Instruction

Action = Callable[[Mask], None]
Decode = Callable[[Instruction, "Modifiers", Lanes], Action]
Table = dict[str, Decode]
TINY = np.finfo(np.float32).tiny


class Modifiers:
    """What stands behind an opcode. Each has to be asked for: one that nobody knows is a fault that names it."""

    def __init__(self, instruction: Instruction) -> None:
        self._instruction = instruction
        self._left = list(instruction.modifiers)

    def take(self, *names: str) -> str | None:
        """The one of these that is there, None if there is none."""
        for name in names:
            if name in self._left:
                self._left.remove(name)
                return name
        return None

    def need(self, *names: str) -> str:
        """The one of these that is there; Fault if there is none."""
        found = self.take(*names)
        if found is None:
            raise Fault(f"none of .{', .'.join(names)} in {self._instruction}")
        return found

    def type(self, *kinds: str) -> str:
        """The last modifier, which has to be one of these types."""
        if not self._left or self._left[-1] not in kinds:
            raise Fault(f"unknown type in {self._instruction}")
        return self._left.pop()

    def sizes(self) -> tuple[int, int, int]:
        """M, N and K of .m16n8k16 and the like."""
        for name in self._left:
            found = re.fullmatch(r"m(\d+)n(\d+)k(\d+)", name)
            if found:
                self._left.remove(name)
                return tuple(map(int, found.groups()))
        raise Fault(f"no shape in {self._instruction}")

    def done(self) -> None:
        """Fault if there is a modifier that nobody asked for."""
        if self._left:
            raise Fault(f"unknown modifier .{self._left[0]} in {self._instruction}")


def operands(instruction: Instruction, *counts: int) -> tuple[str, ...]:
    """The operands, as many as one of ``counts``."""
    if len(instruction.operands) not in counts:
        raise Fault(f"{len(instruction.operands)} operands in {instruction}")
    return instruction.operands


def for_all_lanes(action: Action, instruction: Instruction) -> Action:
    """An instruction that whole warps have to execute together."""

    def checked(mask: Mask) -> None:
        if mask is not None:
            raise Fault(f"not all lanes take part: {instruction}")
        action(mask)

    return checked


def _flushed(values: np.ndarray) -> np.ndarray:
    """float32 without denormals."""
    return np.where(np.abs(values) < TINY, np.copysign(np.float32(0), values), values)


def typed(
    registers: Sequence[str], kind: str, lanes: Lanes
) -> tuple[list[Callable[[], np.ndarray]], Callable[..., None]]:
    """Of a target and the sources behind it, all of one type: the sources' readers and the target's writer."""
    target, *sources = registers
    return [lanes.reader(source, kind) for source in sources], lanes.writer(target, kind)


def elementwise(
    compute: Callable[..., np.ndarray], kind: str, instruction: Instruction, lanes: Lanes, flush: bool = False
) -> Action:
    """target = compute(sources), all of one type."""
    readers, write = typed(instruction.operands, kind, lanes)

    def action(mask: Mask) -> None:
        values = [read() for read in readers]
        if flush:
            values = [_flushed(value) for value in values]
        result = compute(*values)
        write(_flushed(result) if flush else result, mask)

    return action
