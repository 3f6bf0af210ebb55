"""Running a kernel, one block after another: who runs when, branches, and barriers of a block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .decoding import Action
from .lanes import WARP, Lanes, Mask
from .memory import GlobalMemory, Memory, SharedMemory
from .parser import Fault, Program
from .products import WARPGROUP
from .table import decode

ORDERS = ("together", "warps", "reversed")
_FORMATS = {"u64": np.uint64, "b64": np.uint64, "s64": np.int64, "u32": np.int32, "b32": np.int32, "s32": np.int32,
            "f32": np.float32}  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """What the hardware leaves open.

    Attributes:
        order: "together": all warps of a block in step; "warps": each runs from barrier to barrier, the first one first
            (four by four where they have wgmma); "reversed": so, the last one first.
        early_copies: asynchronous copies and products read their sources at once; else when they are awaited.
    """

    order: str = "together"
    early_copies: bool = False

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is none of {', '.join(ORDERS)}")


@dataclass
class Step:
    """A decoded instruction: of action, target and the two flags one is set.

    Attributes:
        action: what it does.
        guard, negated: the predicate under which it does, and whether that has to be false.
        target: where a branch goes.
        barrier: all warps meet here.
    """

    action: Action | None = None
    guard: np.ndarray | None = None
    negated: bool = False
    target: int = -1
    barrier: bool = False

    def mask(self, active: Mask, count: int) -> Mask:
        """Which of the active lanes do it; None for all."""
        if self.guard is None:
            return active
        chosen = ~self.guard if self.negated else self.guard
        if active is not None:
            return chosen & active
        return None if chosen.all() else chosen.copy()


class Block:
    """A block of threads; used for one block of the grid after another."""

    def __init__(self, program: Program, shared_bytes: int, schedule: Schedule) -> None:
        self.program, self.early_copies, self._shared_bytes = program, schedule.early_copies, shared_bytes
        step = program.threads
        if schedule.order != "together":
            step = WARPGROUP if program.has_warpgroups else WARP
        firsts = list(range(0, program.threads, step))
        if schedule.order == "reversed":
            firsts.reverse()
        self._runs = [_Run(Lanes(self, program, first, step)) for first in firsts]
        self.parameters: dict[str, np.ndarray] = {}
        self.shared: SharedMemory
        self.everything: GlobalMemory
        self.same: Counter[str] = Counter()

    def memory(self, space: str) -> Memory:
        """Memory by its name in an instruction."""
        return self.everything if space == "global" else self.shared

    @property
    def steps(self) -> int:
        """How many instructions were run so far."""
        return sum(run.steps for run in self._runs)

    def run(self, index: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        """Run the block at this place in the grid to its end."""
        self.shared = SharedMemory(self._shared_bytes)
        for run in self._runs:
            run.start(index, grid)
        met = [True]
        while any(met):
            met = [run.to_barrier() for run in self._runs]
            if any(met) and not all(met):
                raise Fault(f"{self.program.name}: some warps wait at a barrier, others have ended")
            self.shared.barrier()
            self.everything.barrier()
        self.same += self.shared.same


class _Run:
    """Lanes on their way through the program."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes, self._program = lanes, lanes.program
        self._steps = [self._decoded(number) for number in range(len(self._program.instructions))]
        self.steps = 0

    def _decoded(self, number: int) -> Step:
        instruction = self._program.instructions[number]
        guard = self.lanes.register(instruction.guard.lstrip("!")) if instruction.guard else None
        step = Step(guard=guard, negated=instruction.guard.startswith("!"))
        kind = (instruction.opcode, *instruction.modifiers)
        if kind in (("bra",), ("bra", "uni")):
            if instruction.operands[0] not in self._program.labels:
                raise Fault(f"no such label: {instruction}")
            step.target = self._program.labels[instruction.operands[0]]
        elif kind == ("ret",):
            step.target = len(self._program.instructions)
        elif kind == ("bar", "sync"):
            if instruction.operands != ("0",) or guard is not None:
                raise Fault(f"no barrier of a whole block: {instruction}")
            step.barrier = True
        else:
            step.action = decode(instruction, self.lanes)
        return step

    def start(self, index: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        self.lanes.reset(index, grid)
        self._places = np.zeros(self.lanes.count, np.int64)  # of each lane, while they are not at one
        self._together, self._at = True, 0

    def to_barrier(self) -> bool:
        """Run on; True at a barrier, False at the end."""
        steps, end = self._steps, len(self._steps)
        while True:
            active = None
            if not self._together:
                active = self._gather()
            if self._at >= end:
                return False
            step = steps[self._at]
            self.steps += 1
            mask = step.mask(active, self.lanes.count)
            if step.action is not None:
                if mask is None or mask.any():
                    self._act(step.action, mask)
                self._advance(active)
            elif step.barrier:
                if active is not None:
                    raise Fault(f"a barrier that not all lanes reach: {self._program.instructions[self._at]}")
                self._at += 1
                return True
            else:
                self._branch(active, mask, step.target)

    def _act(self, action: Action, mask: Mask) -> None:
        try:
            action(mask)
        except (ValueError, IndexError, TypeError) as error:
            raise Fault(f"cannot run {self._program.instructions[self._at]}: {error!r}") from error

    def _gather(self) -> Mask:
        """The lanes that are the furthest behind run next."""
        self._at = int(self._places.min())
        active = self._places == self._at
        if active.all():
            self._together = True
            return None
        return active

    def _advance(self, active: Mask) -> None:
        self._at += 1
        if active is not None:
            self._places[active] = self._at

    def _branch(self, active: Mask, mask: Mask, target: int) -> None:
        if mask is None:
            self._at = target
            return
        if active is None:
            if not mask.any():
                self._at += 1
                return
            self._together = False
            self._places[:] = self._at + 1
        else:
            self._places[active] = self._at + 1
        self._places[mask] = target


def launch(
    program: Program,
    grid: tuple[int, int, int],
    arguments: Sequence[float],
    memory: GlobalMemory,
    shared_bytes: int,
    schedule: Schedule,
) -> tuple[int, Counter[str]]:
    """Run a kernel on ``memory``.

    Returns:
        How many instructions were run, and by place in the source how many bytes of shared memory two warps wrote with
        one value and no barrier between.

    Raises:
        Fault: see memory.py and decoding.py.
    """
    block = Block(program, shared_bytes, schedule)
    # Triton's own parameters come after those of the kernel; these kernels do not read them.
    given = [*arguments, *[0] * (len(program.parameters) - len(arguments))]
    for (name, kind), value in zip(program.parameters, given, strict=True):
        block.parameters[name] = np.array(value, _FORMATS[kind])
    block.everything = memory
    with np.errstate(all="ignore"):
        for z, y, x in np.ndindex(*reversed(grid)):
            memory.next_block()
            block.run((x, y, z), grid)
    return block.steps, block.same + memory.same
