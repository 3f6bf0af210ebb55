"""Loads and stores, asynchronous copies, and the instructions that move 8 x 8 matrices through shared memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decoding import Action, Modifiers, Table, for_all_lanes, operands
from .lanes import WARP, Lanes, Mask, selected
from .parser import Fault, Instruction, members
from .values import DTYPES, UNSIGNED

PLAIN = (*(f"{letter}{width}" for letter in "bus" for width in (8, 16, 32, 64)), "f32", "f64")
VECTORS = {None: 1, "v2": 2, "v4": 4}
SHARED = ("shared", "shared::cta")


def load(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """ld from global or shared memory, or from the kernel's parameters."""
    kind = modifiers.type(*PLAIN)
    if modifiers.take("param"):
        return _load_parameter(instruction, kind, lanes)
    space = modifiers.need("global", *SHARED)
    count = VECTORS[modifiers.take(*filter(None, VECTORS))]
    target, place = operands(instruction, 2)
    dtype, address = np.dtype(DTYPES[kind]), lanes.address(place)
    targets = [lanes.register(name) for name in members(target)]
    _check_vector(instruction, targets, count, dtype)
    targets = [bits.view(f"{dtype.kind}{bits.itemsize}") for bits in targets]  # a wider one is filled by sign or zeros
    size = count * dtype.itemsize

    def action(mask: Mask) -> None:
        memory = lanes.block.memory(space)
        data = memory.load(selected(address(), mask), size, selected(lanes.warps, mask), instruction)
        for column, register in zip(np.ascontiguousarray(data).view(dtype).T, targets, strict=True):
            register[... if mask is None else mask] = column

    return action


def _check_vector(instruction: Instruction, registers: list[np.ndarray], count: int, dtype: np.dtype) -> None:
    """A register may be wider than what it holds, if that is an integer."""
    widest = dtype.itemsize if dtype.kind == "f" else 8
    if len(registers) != count or not all(dtype.itemsize <= bits.itemsize <= widest for bits in registers):
        raise Fault(f"the registers do not fit: {instruction}")


def _load_parameter(instruction: Instruction, kind: str, lanes: Lanes) -> Action:
    target, place = operands(instruction, 2)
    name, write = place.strip("[] "), lanes.extending_writer(target, kind)

    def action(mask: Mask) -> None:
        value = lanes.block.parameters[name].view(DTYPES[kind])
        write(np.broadcast_to(value, (lanes.count,)), mask)

    return action


def store(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """st to global or shared memory."""
    kind = modifiers.type(*PLAIN)
    space = modifiers.need("global", *SHARED)
    count = VECTORS[modifiers.take(*filter(None, VECTORS))]
    place, source = operands(instruction, 2)
    dtype, address = np.dtype(DTYPES[kind]), lanes.address(place)
    sources = [lanes.bits(one, lanes.width_of(one, 8 * dtype.itemsize)) for one in members(source)]
    _check_vector(instruction, sources, count, dtype)
    stored = UNSIGNED[8 * dtype.itemsize]

    def action(mask: Mask) -> None:
        data = np.stack([selected(bits, mask).astype(stored, copy=False) for bits in sources], 1).view(np.uint8)
        lanes.block.memory(space).store(selected(address(), mask), data, selected(lanes.warps, mask), instruction)

    return action


def copy(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """cp.async: a copy from global to shared memory that runs on until it is awaited."""
    modifiers.need("async")
    copies = lanes.copies
    if modifiers.take("commit_group"):
        return for_all_lanes(lambda mask: copies.commit(), instruction)
    if modifiers.take("wait_all"):
        return for_all_lanes(lambda mask: copies.wait(0, everything=True), instruction)
    if modifiers.take("wait_group"):
        keep = int(operands(instruction, 1)[0], 0)
        return for_all_lanes(lambda mask: copies.wait(keep), instruction)
    modifiers.need("ca", "cg")
    modifiers.need(*SHARED)
    modifiers.need("global")
    target, source, size, *available = operands(instruction, 3, 4)
    to, origin, size = lanes.address(target), lanes.address(source), int(size, 0)
    given = lanes.reader(available[0], "u32") if available else lambda: np.full(lanes.count, size, np.uint32)

    def action(mask: Mask) -> None:
        warps = selected(lanes.warps, mask)
        places, origins = selected(to(), mask), selected(origin(), mask)
        whole = selected(given(), mask) == size
        if (selected(given(), mask)[~whole] != 0).any():
            raise Fault(f"a part of a copy: {instruction}")
        shared, everything = lanes.block.shared, lanes.block.everything
        shared.begin_copy(places, size, warps, instruction)

        def fetch() -> np.ndarray:
            data = np.zeros((len(places), size), np.uint8)
            data[whole] = everything.load(origins[whole], size, warps[whole], instruction)
            return data

        early = fetch() if lanes.block.early_copies else None
        copies.open(lambda: shared.end_copy(places, fetch() if early is None else early, warps, instruction))

    return action


def _matrices(
    instruction: Instruction, modifiers: Modifiers, lanes: Lanes, registers_at: int
) -> tuple[list[np.ndarray], Callable[[], np.ndarray], np.ndarray, bool]:
    """The registers of matrices of 8 x 8, the addresses of their rows, whose warps those are, whether transposed.

    ``registers_at`` is the place of the registers among the two operands; the address is the other.
    """
    for name in ("sync", "aligned", "m8n8"):
        modifiers.need(name)
    count = int(modifiers.need("x1", "x2", "x4")[1])
    transposed = modifiers.take("trans") is not None
    modifiers.need(*SHARED)
    modifiers.type("b16")
    both = operands(instruction, 2)
    registers, address = lanes.vector(both[registers_at], 32), lanes.address(both[1 - registers_at])
    _check_vector(instruction, registers, count, np.dtype(np.uint32))
    return registers, address, lanes.warps.reshape(-1, WARP)[:, :8].reshape(-1), transposed


def _rows_of(addresses: np.ndarray, matrix: int) -> np.ndarray:
    """The addresses of a matrix' eight rows, which eight lanes of each warp hold."""
    return addresses.reshape(-1, WARP)[:, 8 * matrix : 8 * matrix + 8].reshape(-1)


def load_matrix(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """ldmatrix: lane l of a warp gets elements 2 (l % 4) and the next of row l // 4 of each matrix."""
    registers, address, warps, transposed = _matrices(instruction, modifiers, lanes, registers_at=0)

    def action(mask: Mask) -> None:
        addresses = address()
        for matrix, register in enumerate(registers):
            data = lanes.block.shared.load(_rows_of(addresses, matrix), 16, warps, instruction)
            elements = data.view(np.uint16).reshape(-1, 8, 8)
            elements = elements.transpose(0, 2, 1) if transposed else elements
            register[:] = np.ascontiguousarray(elements).view(np.uint32).reshape(-1)

    return for_all_lanes(action, instruction)


def store_matrix(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """stmatrix: the reverse of ldmatrix."""
    registers, address, warps, transposed = _matrices(instruction, modifiers, lanes, registers_at=1)

    def action(mask: Mask) -> None:
        addresses = address()
        for matrix, register in enumerate(registers):
            elements = np.ascontiguousarray(register).view(np.uint16).reshape(-1, 8, 8)
            elements = np.ascontiguousarray(elements.transpose(0, 2, 1)) if transposed else elements
            data = elements.reshape(-1, 8).view(np.uint8)
            lanes.block.shared.store(_rows_of(addresses, matrix), data, warps, instruction)

    return for_all_lanes(action, instruction)


TABLE: Table = {"ld": load, "st": store, "cp": copy, "ldmatrix": load_matrix, "stmatrix": store_matrix}
