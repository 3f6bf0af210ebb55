"""The threads that run together, and their registers.

An instruction is decoded once for its lanes: its operands become functions that read or write whole registers, an array
with one value a lane, so that running it costs a few calls of numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .parser import Fault, Instruction, Program, members
from .values import DTYPES, UNSIGNED, WIDENED, bits_of, constant, from_bfloat16, is_floating, narrowed, widened

if TYPE_CHECKING:
    from .block import Block

Mask = np.ndarray | None  # which lanes take part, None for all of them
Reader = Callable[[], np.ndarray]
Writer = Callable[[np.ndarray, Mask], None]
WARP = 32


class Pending:
    """Asynchronous work of some lanes, in groups that end in order, each when it is awaited."""

    def __init__(self) -> None:
        self._open: list[Callable[[], None]] = []
        self._groups: list[list[Callable[[], None]]] = []
        self._allowed = False

    def open(self, job: Callable[[], None]) -> None:
        """Work that starts now and is done by ``job``."""
        self._open.append(job)

    def commit(self) -> None:
        """What was started since the last time is a group."""
        self._groups.append(self._open)
        self._open = []

    def wait(self, keep: int, everything: bool = False) -> None:
        """Until at most ``keep`` groups are left; ``everything`` includes what is in no group yet."""
        if everything:
            self.commit()
        while len(self._groups) > keep:
            for job in self._groups.pop(0):
                job()
        self._allowed = False

    def allow(self) -> None:
        """wgmma.fence: registers that were written before are there for the products that follow."""
        self._allowed = True

    def check_allowed(self, instruction: Instruction) -> None:
        """Fault without such a fence since the last wait."""
        if not self._allowed:
            raise Fault(f"no wgmma.fence before: {instruction}")


class Lanes:
    """Neighbouring threads of a block that step through the program together, in any number of whole warps.

    Attributes:
        block: what they run in.
        threads, warps: number of each lane's thread and warp in the block.
        count: of lanes.
        copies, products: what they have started and not yet awaited.
        accumulators: what products in flight write, by operand (products.py).
    """

    def __init__(self, block: Block, program: Program, first: int, count: int) -> None:
        self.block, self.program, self.count = block, program, count
        self.threads = np.arange(first, first + count, dtype=np.uint32)
        self.warps = (self.threads // WARP).astype(np.int64)
        self.copies, self.products = Pending(), Pending()
        self.accumulators: dict[str, Any] = {}
        self._bits = {name: np.empty(count, UNSIGNED[width]) for name, width in program.widths.items()}
        for axis in "xyz":
            for name in ("tid", "ntid", "ctaid", "nctaid"):
                self._bits[f"%{name}.{axis}"] = np.zeros(count, np.uint32)
        self._bits["%laneid"] = self.threads % WARP
        self._bits["%tid.x"][:] = self.threads
        for axis, size in zip("xyz", (program.threads, 1, 1), strict=True):
            self._bits[f"%ntid.{axis}"][:] = size

    def reset(self, index: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        """Prepare for another block: its place in the grid, and registers of which nothing is known."""
        for name in self.program.widths:
            bits = self._bits[name]
            bits[:] = True if bits.dtype == np.bool_ else ~bits.dtype.type(0)  # as a float NaN
        for axis, place, size in zip("xyz", index, grid, strict=True):
            self._bits[f"%ctaid.{axis}"][:] = place
            self._bits[f"%nctaid.{axis}"][:] = size

    def register(self, name: str) -> np.ndarray:
        """The bits of a register as an unsigned array, itself, not a copy.

        Raises:
            Fault: no such register.
        """
        if name not in self._bits:
            raise Fault(f"unknown register {name}")
        return self._bits[name]

    def is_register(self, operand: str) -> bool:
        """Whether an operand names a register and is no constant."""
        return operand in self._bits

    def width_of(self, operand: str, otherwise: int) -> int:
        """Bits of a register; ``otherwise`` for a constant."""
        return self.program.widths.get(operand, otherwise)

    def bits(self, operand: str, width: int) -> np.ndarray:
        """A register's own array, or a constant repeated, as unsigned integers of ``width`` bits."""
        if operand in self.program.symbols:
            return np.zeros(self.count, UNSIGNED[width])  # shared memory starts at 0
        if not self.is_register(operand):
            return np.broadcast_to(constant(operand, width), (self.count,))
        bits = self.register(operand)
        if bits.dtype != UNSIGNED[width]:
            raise Fault(f"{operand} has {bits.dtype.itemsize * 8} bits where {width} are asked for")
        return bits

    def reader(self, operand: str, kind: str) -> Reader:
        """Reads a register or constant as values of a PTX type: bf16 and f16 as float32, pairs as [lanes, 2]."""
        if kind == "pred":
            return self.predicate(operand)
        if kind in WIDENED:
            bits, base = self.bits(operand, bits_of(kind)), kind.removesuffix("x2")
            if kind == "bf16":
                return lambda: from_bfloat16(bits)
            return (lambda: widened(bits, base)) if kind.endswith("x2") else lambda: widened(bits, base)[:, 0]
        values = self.bits(operand, bits_of(kind)).view(DTYPES[kind])
        return lambda: values

    def predicate(self, operand: str) -> Reader:
        """Reads a predicate, negated where "!" stands before it."""
        values = self.bits(operand.lstrip("!"), 1)
        return (lambda: ~values) if operand.startswith("!") else lambda: values

    def writer(self, operand: str, kind: str) -> Writer:
        """Writes values of a PTX type, as :meth:`reader` gives them, into a register; "_" takes none."""
        if operand == "_":
            return lambda values, mask: None
        target = self.register(operand)
        if target.dtype != UNSIGNED[bits_of(kind)]:
            raise Fault(f"{operand} cannot hold .{kind}")
        if kind in WIDENED:
            base, pairs = kind.removesuffix("x2"), kind.endswith("x2")
            return lambda values, mask: _copy(target, narrowed(values if pairs else values[:, None], base), mask)
        typed = target.view(DTYPES[kind])
        return lambda values, mask: _copy(typed, values, mask)

    def extending_writer(self, operand: str, kind: str) -> Writer:
        """The same into a register that may be wider than an integer type, which its sign or zeros fill."""
        width = self.register(operand).dtype.itemsize * 8
        if is_floating(kind) or kind.startswith("b") or width == bits_of(kind):
            return self.writer(operand, kind)
        wider = f"{kind[0]}{width}"
        write, dtype = self.writer(operand, wider), DTYPES[wider]
        return lambda values, mask: write(values.astype(dtype), mask)

    def address(self, operand: str) -> Reader:
        """Reads [register], [register + offset] or [symbol + offset] as int64."""
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        if not operand.startswith("["):
            raise Fault(f"no address: {operand}")
        added = np.int64(int(offset, 0)) if offset else np.int64(0)
        values = np.zeros(self.count, np.uint32) if base in self.program.symbols else self.register(base)
        if values.dtype.itemsize < 4:
            raise Fault(f"no address: {operand}")
        return lambda: values.astype(np.int64) + added

    def vector(self, operand: str, width: int) -> list[np.ndarray]:
        """The registers of {a, b, ...}, or of a plain operand, as bits."""
        return [self.bits(one, width) for one in members(operand)]


def _copy(target: np.ndarray, values: np.ndarray, mask: Mask) -> None:
    if mask is None:
        np.copyto(target, values, casting="equiv")
    else:
        np.copyto(target, values, where=mask, casting="equiv")


def selected(values: np.ndarray, mask: Mask) -> np.ndarray:
    """The values of the lanes that take part."""
    return values if mask is None else values[mask]
