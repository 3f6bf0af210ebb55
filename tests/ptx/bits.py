"""Operations on bits: logic, shifts, and parts of registers."""

from __future__ import annotations

import numpy as np

from .decoding import Action, Modifiers, Table, elementwise, operands, typed
from .lanes import Lanes, Mask
from .parser import Fault, Instruction
from .values import INTEGERS, bits_of, is_signed

BITS = ("pred", "b16", "b32", "b64")
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


def logic(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """and, or, xor, not."""
    kind = modifiers.type(*BITS)
    return elementwise(LOGIC[instruction.opcode], kind, instruction, lanes)


def three_input_logic(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """lop3: any function of three bits, by its table."""
    modifiers.type("b32")
    *registers, table = operands(instruction, 5)
    readers, write = typed(registers, "b32", lanes)
    ones = [row for row in range(8) if int(table.rstrip("U"), 0) >> row & 1]

    def action(mask: Mask) -> None:
        a, b, c = (read() for read in readers)
        result = np.zeros_like(a)
        for row in ones:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        write(result, mask)

    return action


def shift(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """shl and shr; by more than the width everything is shifted out."""
    kind = modifiers.type("b16", "b32", "b64", *INTEGERS)
    target, value, by = operands(instruction, 3)
    read, amount, write = lanes.reader(value, kind), lanes.reader(by, "u32"), lanes.writer(target, kind)
    move = np.left_shift if instruction.opcode == "shl" else np.right_shift
    width = bits_of(kind)

    def action(mask: Mask) -> None:
        values, count = read(), amount()
        moved = move(values, np.minimum(count, width - 1).astype(values.dtype))
        rest = move(moved, values.dtype.type(1))  # the last bit, where the count is the width or more
        write(np.where(count >= width, rest, moved), mask)

    return action


def funnel_shift(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """shf: two registers shifted as one of 64 bits."""
    left = modifiers.need("l", "r") == "l"
    clamp = modifiers.need("clamp", "wrap") == "clamp"
    modifiers.type("b32")
    readers, write = typed(operands(instruction, 4), "b32", lanes)

    def action(mask: Mask) -> None:
        low, high, count = (read().astype(np.uint64) for read in readers)
        count = np.minimum(count, np.uint64(32)) if clamp else count & np.uint64(31)
        both = low | high << np.uint64(32)
        write((both << count >> np.uint64(32) if left else both >> count).astype(np.uint32), mask)

    return action


def extract_bits(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """bfe: bits from a position on, as a number with or without a sign."""
    kind = modifiers.type("u32", "s32")
    readers, write = typed(operands(instruction, 4), "u32", lanes)

    def action(mask: Mask) -> None:
        value, position, length = (read().astype(np.int64) for read in readers)
        if ((length < 1) | (position + length > 32)).any():
            raise Fault(f"bits beyond the register: {instruction}")
        found = value >> position & (np.int64(1) << length) - 1
        if is_signed(kind):
            found -= (found >> length - 1) << length
        write(found.astype(np.uint32), mask)

    return action


def insert_bits(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """bfi: the first operand put into the second."""
    modifiers.type("b32")
    readers, write = typed(operands(instruction, 5), "b32", lanes)

    def action(mask: Mask) -> None:
        value, into, position, length = (read().astype(np.int64) for read in readers)
        place = (np.int64(1) << length) - 1 << position
        write((into & ~place | value << position & place).astype(np.uint32), mask)

    return action


def permute_bytes(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """prmt: four of the eight bytes of two registers, each chosen by four bits."""
    modifiers.type("b32")
    readers, write = typed(operands(instruction, 4), "b32", lanes)

    def action(mask: Mask) -> None:
        a, b, choice = (read().astype(np.uint64) for read in readers)
        if (choice & np.uint64(0x8888)).any():
            raise Fault(f"a byte's sign is asked for: {instruction}")
        both, result = a | b << np.uint64(32), np.zeros_like(a)
        for byte in range(4):
            chosen = choice >> np.uint64(4 * byte) & np.uint64(7)
            result |= (both >> chosen * np.uint64(8) & np.uint64(255)) << np.uint64(8 * byte)
        write(result.astype(np.uint32), mask)

    return action


TABLE: Table = {
    **dict.fromkeys(LOGIC, logic),
    **dict.fromkeys(("shl", "shr"), shift),
    "lop3": three_input_logic,
    "shf": funnel_shift,
    "bfe": extract_bits,
    "bfi": insert_bits,
    "prmt": permute_bytes,
}
