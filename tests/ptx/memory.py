"""Global and shared memory that say what is wrong with an access.

Every access is checked for bounds and alignment. For each byte it is kept which warp wrote and which read it last, and
in which interval between two barriers of the block: two warps that meet there without a barrier between them, one of
them writing, are a fault, as are two blocks that do so at any time. Only warps that write what is there already are let
pass, and are counted.
"""

from __future__ import annotations

import ctypes
from collections import Counter

import numpy as np

from .parser import Fault, Instruction

_SLOTS = 64  # stamps are interval * _SLOTS + warp
_SEVERAL = 63  # in place of a warp: more than one has read the byte in this interval
_ANY = 2**61  # read by several blocks
_PENDING = 2**62  # an asynchronous copy to this place is under way
_VIEWS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Memory:
    """``size`` bytes, read and written by rows: one row of 1 to 16 bytes for each address.

    Attributes:
        same: by place in the source, how many bytes two warps wrote without a barrier between, with one value.
    """

    what = "memory"

    def __init__(self, size: int) -> None:
        size = -(-size // 16) * 16
        # Of the highest alignment that an access can ask for.
        whole = np.empty(size + 16, np.uint8)
        start = -whole.ctypes.data % 16
        self.data = whole[start : start + size]
        self._wrote, self._read = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self._interval = 1
        self._block_start = 0  # the stamps before are those of other blocks
        self.same: Counter[str] = Counter()

    def barrier(self) -> None:
        """All warps of the block have met."""
        self._interval += 1

    def place(self, addresses: np.ndarray, size: int, instruction: Instruction) -> np.ndarray:
        """Where in ``data`` the rows of ``size`` bytes begin, in units of ``size``; Fault if they are not all there."""
        raise NotImplementedError

    def load(self, addresses: np.ndarray, size: int, warps: np.ndarray, instruction: Instruction) -> np.ndarray:
        """Bytes [addresses, size]."""
        rows = self.place(addresses, size, instruction)
        self._note_read(rows, size, warps, instruction)
        return self._rows(rows, size)

    def store(self, addresses: np.ndarray, data: np.ndarray, warps: np.ndarray, instruction: Instruction) -> None:
        """Write bytes ``data`` [addresses, size]."""
        size = data.shape[1]
        rows = self.place(addresses, size, instruction)
        self._note_write(rows, data, warps, instruction)
        self._write(rows, data, instruction)

    def _rows(self, rows: np.ndarray, size: int) -> np.ndarray:
        if size in _VIEWS:
            return self.data.view(_VIEWS[size])[rows].view(np.uint8).reshape(-1, size)
        return self.data.view(np.uint64).reshape(-1, size // 8)[rows].view(np.uint8).reshape(-1, size)

    def _write(self, rows: np.ndarray, data: np.ndarray, instruction: Instruction) -> None:
        size = data.shape[1]
        if size in _VIEWS:
            self.data.view(_VIEWS[size])[rows] = np.ascontiguousarray(data).view(_VIEWS[size])[:, 0]
        else:
            self.data.view(np.uint64).reshape(-1, size // 8)[rows] = np.ascontiguousarray(data).view(np.uint64)
        if (self._rows(rows, size) != data).any():
            raise Fault(f"conflicting store, two lanes write different values to one place: {instruction}")

    def _hazard(self, stamps: np.ndarray, mine: np.ndarray) -> np.ndarray:
        earlier_blocks = (stamps > 0) & (stamps < self._block_start)
        return (stamps != mine) & ((stamps >= self._interval * _SLOTS) | earlier_blocks)

    def _note_read(self, rows: np.ndarray, size: int, warps: np.ndarray, instruction: Instruction) -> None:
        self._check_written(rows, size, warps, instruction)
        mine = (self._interval * _SLOTS + warps)[:, None]
        read = self._read.reshape(-1, size)
        old = read[rows]
        several = self._interval * _SLOTS + _SEVERAL
        stamps = np.where((old >= self._interval * _SLOTS) & (old != mine), several, mine)
        stamps[(old > 0) & (old < self._block_start) | (old == _ANY)] = _ANY
        read[rows] = stamps
        kept = read[rows]
        overwritten = (kept != mine) & (kept < _ANY)  # by another warp of the same instruction
        if overwritten.any():
            read[rows[overwritten.any(1)]] = several

    def _check_written(self, rows: np.ndarray, size: int, warps: np.ndarray, instruction: Instruction) -> None:
        wrote = self._wrote.reshape(-1, size)[rows]
        if (wrote == _PENDING).any():
            raise Fault(f"{self.what} is read before an asynchronous copy to it was awaited: {instruction}")
        if self._hazard(wrote, (self._interval * _SLOTS + warps)[:, None]).any():
            raise Fault(f"race in {self.what}, read while another warp writes: {instruction}")

    def _note_write(self, rows: np.ndarray, data: np.ndarray, warps: np.ndarray, instruction: Instruction) -> None:
        size = data.shape[1]
        mine = np.broadcast_to((self._interval * _SLOTS + warps)[:, None], data.shape)
        old = self._wrote.reshape(-1, size)[rows]
        if (old == _PENDING).any():
            raise Fault(f"{self.what} is written before an asynchronous copy to it was awaited: {instruction}")
        changed = self._rows(rows, size) != data
        twice = self._hazard(old, mine)
        if (twice & changed).any():
            raise Fault(f"race in {self.what}, two warps write different values: {instruction}")
        if (self._hazard(self._read.reshape(-1, size)[rows], mine) & changed).any():
            raise Fault(f"race in {self.what}, written while another warp reads: {instruction}")
        self._wrote.reshape(-1, size)[rows] = mine
        twice |= self._wrote.reshape(-1, size)[rows] != mine  # warps of the same instruction
        if twice.any():
            self.same[instruction.line] += int(twice.sum())


class SharedMemory(Memory):
    """A block's shared memory. Nothing may be read that was not written.

    ``wgmma`` reads it through a path of its own: what other instructions wrote has to be fenced before, and may not be
    changed until the product has been awaited.
    """

    what = "shared memory"

    def __init__(self, size: int) -> None:
        super().__init__(max(size, 16))
        self.size = size
        self.data[:] = 0xFF
        self._unfenced = np.zeros(len(self.data), np.bool_)
        self._products = np.zeros(len(self.data), np.int16)  # that may still read the byte

    def place(self, addresses: np.ndarray, size: int, instruction: Instruction) -> np.ndarray:
        if len(addresses) == 0:
            return addresses
        if (addresses % size).any():
            raise Fault(f"misaligned access to shared memory: {instruction}")
        low, high = int(addresses.min()), int(addresses.max()) + size
        if low < 0 or high > self.size:
            raise Fault(f"shared memory has {self.size} bytes, {low} to {high} are accessed: {instruction}")
        return addresses // size

    def _check_written(self, rows: np.ndarray, size: int, warps: np.ndarray, instruction: Instruction) -> None:
        if (self._wrote.reshape(-1, size)[rows] == 0).any():
            raise Fault(f"uninitialised shared memory is read: {instruction}")
        super()._check_written(rows, size, warps, instruction)

    def _note_write(self, rows: np.ndarray, data: np.ndarray, warps: np.ndarray, instruction: Instruction) -> None:
        super()._note_write(rows, data, warps, instruction)
        size = data.shape[1]
        self._check_products(rows, size, instruction)
        self._unfenced.reshape(-1, size)[rows] = True

    def _check_products(self, rows: np.ndarray, size: int, instruction: Instruction) -> None:
        if self._products.reshape(-1, size)[rows].any():
            raise Fault(f"shared memory is written while a wgmma may still read it: {instruction}")

    def fence(self, warps: np.ndarray) -> None:
        """What these warps have written, and what they have met at a barrier, becomes visible to wgmma."""
        own = np.isin(self._wrote % _SLOTS, np.unique(warps))
        self._unfenced &= ~(own | (self._wrote < self._interval * _SLOTS))

    def begin_copy(self, addresses: np.ndarray, size: int, warps: np.ndarray, instruction: Instruction) -> None:
        """An asynchronous copy to rows of ``size`` bytes starts: from now on they can change at any time."""
        rows = self.place(addresses, size, instruction)
        mine = (self._interval * _SLOTS + warps)[:, None]
        wrote = self._wrote.reshape(-1, size)
        self._check_products(rows, size, instruction)
        for stamps in (wrote[rows], self._read.reshape(-1, size)[rows]):
            if (stamps == _PENDING).any() or self._hazard(stamps, mine).any():
                raise Fault(f"an asynchronous copy overwrites what another warp may still use: {instruction}")
        wrote[rows] = _PENDING

    def end_copy(self, addresses: np.ndarray, data: np.ndarray, warps: np.ndarray, instruction: Instruction) -> None:
        """Such a copy was awaited by the warps that started it."""
        size = data.shape[1]
        rows = self.place(addresses, size, instruction)
        self._wrote.reshape(-1, size)[rows] = (self._interval * _SLOTS + warps)[:, None]
        self._unfenced.reshape(-1, size)[rows] = False
        self._write(rows, data, instruction)

    def begin_product(self, addresses: np.ndarray, instruction: Instruction) -> np.ndarray:
        """A wgmma of four warps reads rows of 16 bytes from now on; returns which, for :meth:`end_product`."""
        rows = np.unique(self.place(addresses, 16, instruction))
        wrote = self._wrote.reshape(-1, 16)[rows]
        if (wrote == 0).any():
            raise Fault(f"uninitialised shared memory is read: {instruction}")
        if (wrote >= self._interval * _SLOTS).any():  # also by a warp of its own: the others have not met it
            raise Fault(f"race in shared memory, a wgmma reads what was written after the last barrier: {instruction}")
        if self._unfenced.reshape(-1, 16)[rows].any():
            raise Fault(f"a wgmma reads what was written without fence.proxy.async: {instruction}")
        self._products.reshape(-1, 16)[rows] += 1
        return rows

    def end_product(self, rows: np.ndarray) -> None:
        """That product was awaited; other warps may still be at it until the next barrier."""
        self._products.reshape(-1, 16)[rows] -= 1
        self._read.reshape(-1, 16)[rows] = self._interval * _SLOTS + _SEVERAL

    def rows_of_16(self, addresses: np.ndarray) -> np.ndarray:
        """The bytes [addresses, 16] that a product reads."""
        return self._rows(addresses // 16, 16)


class GlobalMemory(Memory):
    """A copy of what the tensors of a launch span, which :meth:`write_back` brings back."""

    what = "global memory"

    def __init__(self, spans: list[tuple[int, int]]) -> None:
        """``spans``: first address and bytes of each tensor; those that overlap are one."""
        merged: list[list[int]] = []
        for start, size in sorted(span for span in spans if span[1] > 0):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], start + size)
            else:
                merged.append([start, start + size])
        self._starts = np.array([start for start, _ in merged] or [0], np.int64)
        self._ends = np.array([end for _, end in merged] or [0], np.int64)
        offsets, total = [], 0
        for start, end in merged:
            offsets.append(total + start % 16)
            total += start % 16 + end - start
            total = -(-total // 16) * 16
        super().__init__(total)
        self._shifts = np.array(offsets or [0], np.int64) - self._starts
        self._places = [(start, offset, end - start) for (start, end), offset in zip(merged, offsets, strict=True)]
        for start, offset, size in self._places:
            ctypes.memmove(self.data.ctypes.data + offset, start, size)

    def write_back(self) -> None:
        """Copy everything to where it came from."""
        for start, offset, size in self._places:
            ctypes.memmove(start, self.data.ctypes.data + offset, size)

    def next_block(self) -> None:
        """What follows is another block's."""
        self._interval += 1
        self._block_start = self._interval * _SLOTS

    def place(self, addresses: np.ndarray, size: int, instruction: Instruction) -> np.ndarray:
        if (addresses % size).any():
            raise Fault(f"misaligned access to global memory: {instruction}")
        span = np.searchsorted(self._starts, addresses, side="right") - 1
        outside = (span < 0) | (addresses + size > self._ends[span])
        if outside.any():
            raise Fault(f"outside of every tensor, {int(outside.sum())} of {len(addresses)} lanes: {instruction}")
        return (addresses + self._shifts[span]) // size
