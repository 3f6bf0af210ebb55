"""Products of matrices: mma of one warp, and wgmma of four warps, which reads shared memory through descriptors.

Sums are in float32, in no particular order, as the hardware promises no order either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from .decoding import Action, Modifiers, Table, for_all_lanes, operands
from .lanes import WARP, Lanes, Mask
from .parser import Fault, Instruction
from .values import widened

WARPGROUP = 4 * WARP
OPERANDS = ("bf16", "f16", "tf32")
LANE = np.arange(WARP)
ROW, COLUMN = LANE // 4, LANE % 4  # of a lane in the pieces of a matrix that registers hold
# By the code in a descriptor: bytes of a row in shared memory after which the pattern starts again.
SWIZZLES = {0: 16, 3: 32, 2: 64, 1: 128}


def _left(registers: list[np.ndarray], kind: str, rows: int, depth: int) -> np.ndarray:
    """A [warps, rows, depth] of 16 rows a warp from its registers."""
    values = [widened(bits.reshape(-1, WARP), kind) for bits in registers]
    each = values[0].shape[-1]
    a = np.zeros((len(values[0]), rows, depth), np.float32)
    for index, value in enumerate(values):
        for element in range(each):
            columns = COLUMN * each + element + 4 * each * (index // 2)
            a[:, ROW + 8 * (index % 2), columns] = value[..., element]
    return a


def _right(registers: list[np.ndarray], kind: str, depth: int) -> np.ndarray:
    """B [warps, depth, 8] from registers."""
    values = [widened(bits.reshape(-1, WARP), kind) for bits in registers]
    each = values[0].shape[-1]
    b = np.zeros((len(values[0]), depth, 8), np.float32)
    for index, value in enumerate(values):
        for element in range(each):
            b[:, COLUMN * each + element + 4 * each * index, ROW] = value[..., element]
    return b


def _places(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column, of 16 rows, of what a lane holds in the register ``index`` of an accumulator."""
    return ROW + 8 * (index // 2 % 2), 8 * (index // 4) + 2 * COLUMN + index % 2


def multiply_in_warp(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """mma: d = a b + c of 16 rows and 8 columns, all in the registers of a warp."""
    for name in ("sync", "aligned", "row", "col"):
        modifiers.need(name)
    rows, columns, depth = modifiers.sizes()
    modifiers.type("f32")
    kind = modifiers.type(*OPERANDS)
    modifiers.type(kind)
    modifiers.type("f32")
    if (rows, columns, depth * (2 if kind == "tf32" else 1)) not in ((16, 8, 16), (16, 8, 8)):
        raise Fault(f"unknown shape in {instruction}")
    d, a, b, c = (lanes.vector(operand, 32) for operand in operands(instruction, 4))
    each = 1 if kind == "tf32" else 2
    if (len(a), len(b), len(c), len(d)) != (depth // (2 * each), depth // (4 * each), 4, 4):
        raise Fault(f"registers of another shape: {instruction}")

    def action(mask: Mask) -> None:
        total = np.zeros((lanes.count // WARP, rows, columns), np.float32)
        for index, bits in enumerate(c):
            row, column = _places(index)
            total[:, row, column] = bits.view(np.float32).reshape(-1, WARP)
        total += _left(a, kind, rows, depth) @ _right(b, kind, depth)
        for index, bits in enumerate(d):
            row, column = _places(index)
            bits.view(np.float32)[:] = total[:, row, column].reshape(-1)

    return for_all_lanes(action, instruction)


@cache
def _chunks(code: int, lead: int, stride: int, count: int, depth: int, size: int, along_depth: bool) -> np.ndarray:
    """Offsets of the pieces of 16 bytes of a matrix [count, depth] of ``size`` bytes an element, before swizzling.

    Args:
        code: which swizzling.
        lead, stride: the two distances in bytes of the descriptor.
        along_depth: whether a piece runs along ``depth``; else along ``count``.

    Returns:
        [count, depth pieces], or [depth, count pieces].
    """
    row, each = SWIZZLES[code], 16 // size
    if along_depth:
        i, j = np.meshgrid(np.arange(count), np.arange(depth // each) * 16, indexing="ij")
        return i // 8 * stride + i % 8 * row + j % row + j // row * lead
    k, j = np.meshgrid(np.arange(depth), np.arange(count // each) * 16, indexing="ij")
    if code == 0:
        return j // 16 * stride + k // 8 * lead + k % 8 * 16
    return j // row * lead + k // 8 * stride + k % 8 * row + j % row


@dataclass(frozen=True)
class SharedOperand:
    """A matrix [count, depth] in shared memory; ``size`` is that of an element in bytes."""

    count: int
    depth: int
    kind: str
    along_depth: bool

    @property
    def size(self) -> int:
        return 4 if self.kind == "tf32" else 2

    def addresses(self, descriptor: int, instruction: Instruction) -> np.ndarray:
        """Where its pieces of 16 bytes are, as :func:`_chunks` orders them."""
        start, lead, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        if descriptor >> 49 & 7:
            raise Fault(f"a descriptor with an offset of its base: {instruction}")
        code = descriptor >> 62
        places = start + _chunks(code, lead, stride, self.count, self.depth, self.size, self.along_depth)
        pieces = SWIZZLES[code] // 16 - 1  # which of them a row of 128 bytes mixes
        return places ^ ((places >> 7 & pieces) << 4)

    def values(self, data: np.ndarray) -> np.ndarray:
        """float32 [count, depth] of the bytes of its pieces."""
        elements = widened(data.view(np.uint32), self.kind).reshape(
            self.depth if not self.along_depth else self.count, -1
        )
        return elements if self.along_depth else elements.T


class _Accumulators:
    """Registers that products in flight will write: not to be read or written by anyone else before."""

    def __init__(self, registers: list[np.ndarray]) -> None:
        self.registers = registers
        self._saved: list[np.ndarray] = []
        self._waiting = 0

    def hide(self, instruction: Instruction) -> None:
        """A product starts: until it ends they hold NaN."""
        if self._waiting:
            self._check(instruction)
        else:
            self._saved = [bits.copy() for bits in self.registers]
            for bits in self.registers:
                bits[:] = 0xFFFFFFFF
        self._waiting += 1

    def show(self, instruction: Instruction) -> None:
        """A product ends, and may use them."""
        self._check(instruction)
        for bits, saved in zip(self.registers, self._saved, strict=True):
            bits[:] = saved

    def settle(self) -> None:
        """It has: if others follow, they are hidden again."""
        self._waiting -= 1
        if self._waiting:
            self._saved = [bits.copy() for bits in self.registers]
            for bits in self.registers:
                bits[:] = 0xFFFFFFFF

    def _check(self, instruction: Instruction) -> None:
        if any((bits != 0xFFFFFFFF).any() for bits in self.registers):
            raise Fault(f"an accumulator is written before its wgmma was awaited: {instruction}")


def multiply_in_warpgroup(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """wgmma: d = a b [+ d] of 64 rows; a in shared memory or in registers, b in shared memory."""
    products = lanes.products
    if modifiers.take("mma_async"):
        return for_all_lanes(_product(instruction, modifiers, lanes), instruction)
    modifiers_of_all = ("sync", "aligned")
    kind = modifiers.need("fence", "commit_group", "wait_group")
    for name in modifiers_of_all:
        modifiers.need(name)
    if kind == "fence":
        return for_all_lanes(lambda mask: products.allow(), instruction)
    if kind == "commit_group":
        return for_all_lanes(lambda mask: products.commit(), instruction)
    keep = int(operands(instruction, 1)[0], 0)
    return for_all_lanes(lambda mask: products.wait(keep), instruction)


def _product(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    for name in ("sync", "aligned"):
        modifiers.need(name)
    rows, columns, depth = modifiers.sizes()
    kind = modifiers.type(*OPERANDS)
    modifiers.type(kind)
    modifiers.type("f32")
    if (rows, depth) != (64, 8 if kind == "tf32" else 16) or columns % 8:
        raise Fault(f"unknown shape in {instruction}")
    if lanes.count % WARPGROUP:
        raise Fault(f"not all of its four warps are there: {instruction}")
    d, a, b, add, *signs = instruction.operands
    if signs[:2] != ["1", "1"]:
        raise Fault(f"an operand's sign is changed: {instruction}")
    accumulators = lanes.accumulators.setdefault(d, _Accumulators(lanes.vector(d, 32)))
    if len(accumulators.registers) != columns // 2:
        raise Fault(f"registers of another shape: {instruction}")
    in_registers, flags = a.startswith("{"), [int(flag, 0) for flag in signs[2:]]
    if len(flags) != (0 if kind == "tf32" else 1 if in_registers else 2):
        raise Fault(f"{len(instruction.operands)} operands in {instruction}")
    left = lanes.vector(a, 32) if in_registers else _shared(lanes, a, rows, depth, kind, flags[:1], instruction)
    right = _shared(lanes, b, columns, depth, kind, flags[-1:], instruction)
    accumulate = lanes.predicate(add)

    def action(mask: Mask) -> None:
        lanes.products.check_allowed(instruction)
        keeps = accumulate().copy()
        pieces = [part for part in (None if in_registers else left(), right()) if part is not None]
        accumulators.hide(instruction)

        def finish() -> None:
            accumulators.show(instruction)
            a_values = _left(left, kind, 16, depth).reshape(-1, rows, depth) if in_registers else pieces[0]()
            _accumulate(accumulators.registers, a_values @ pieces[-1]().transpose(0, 2, 1), keeps)
            accumulators.settle()

        lanes.products.open(finish)

    return action


def _shared(
    lanes: Lanes, descriptor: str, count: int, depth: int, kind: str, turned: list[int], instruction: Instruction
) -> Callable[[], Callable[[], np.ndarray]]:
    """An operand [warpgroups, count, depth] by its descriptor, called when the product starts and when it ends."""
    operand, descriptors = SharedOperand(count, depth, kind, turned != [1]), lanes.bits(descriptor, 64)

    def start() -> Callable[[], np.ndarray]:
        shared = lanes.block.shared
        groups = descriptors.reshape(-1, WARPGROUP)
        if (groups != groups[:, :1]).any():
            raise Fault(f"lanes have different descriptors: {instruction}")
        places = [operand.addresses(int(one), instruction).reshape(-1) for one in groups[:, 0]]
        rows = [shared.begin_product(one, instruction) for one in places]
        fetch = [shared.rows_of_16(one) for one in places] if lanes.block.early_copies else None

        def end() -> np.ndarray:
            data = [shared.rows_of_16(one) for one in places] if fetch is None else fetch
            for one in rows:
                shared.end_product(one)
            return np.stack([operand.values(one) for one in data])

        return end

    return start


def _accumulate(registers: list[np.ndarray], products: np.ndarray, keeps: np.ndarray) -> None:
    """Add products [warpgroups, 64, columns] to the accumulators, or put them there where ``keeps`` is off."""
    of_warps = products.reshape(-1, 16, products.shape[-1])
    for index, bits in enumerate(registers):
        row, column = _places(index)
        values = bits.view(np.float32)
        values[:] = np.where(keeps, values, np.float32(0)) + of_warps[:, row, column].reshape(-1)


TABLE: Table = {"mma": multiply_in_warp, "wgmma": multiply_in_warpgroup}
