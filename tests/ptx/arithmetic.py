"""Moves, conversions, comparisons, and arithmetic on integers and floating-point numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .bits import BITS, LOGIC
from .decoding import Action, Modifiers, Table, elementwise, operands
from .lanes import Lanes, Mask
from .parser import Fault, Instruction, members
from .values import DTYPES, INTEGERS, UNSIGNED, WIDENED, bits_of, is_floating, narrowed, to_tf32

WHOLE = ("f32", "f64")
HALVES = tuple(WIDENED)
# Rounding of a value to an integer.
ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c rounded once."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers divided and rounded towards zero; nothing is said of a division by 0."""
    divisor = np.where(b == 0, np.ones_like(b), b)
    floor = a // divisor
    if a.dtype.kind == "u":
        return floor
    return floor + ((a % divisor != 0) & ((a < 0) != (divisor < 0))).astype(a.dtype)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _quotient(a, b) * b


# Opcode: with integers, with floating-point numbers; None where there is no such instruction.
ARITHMETIC: dict[str, tuple[Callable | None, Callable | None]] = {
    "add": (np.add, np.add),
    "sub": (np.subtract, np.subtract),
    "neg": (np.negative, np.negative),
    "abs": (np.abs, np.abs),
    "div": (_quotient, np.divide),
    "rem": (_remainder, None),
    "min": (np.minimum, np.fmin),
    "max": (np.maximum, np.fmax),
    "fma": (None, _fused),
}
# Single precision, in the approximation that the hardware has or better.
SPECIAL: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: np.float32(1) / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: np.float32(1) / np.sqrt(x),
    "tanh": np.tanh,
}
COMPARISONS: dict[str, Callable] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def arithmetic(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """add, sub, neg, abs, div, rem, min, max, fma."""
    kind = modifiers.type(*INTEGERS, *WHOLE, *HALVES)
    compute = ARITHMETIC[instruction.opcode][is_floating(kind)]
    if compute is None:
        raise Fault(f"unknown type in {instruction}")
    flush = False
    if is_floating(kind):
        modifiers.take("rn", "full", "approx")  # to the nearest; a quotient at least as exact as asked for
        flush = modifiers.take("ftz") is not None
        if instruction.opcode in ("min", "max") and modifiers.take("NaN"):
            compute = np.minimum if instruction.opcode == "min" else np.maximum
    if kind == "f64" and instruction.opcode == "fma":
        raise Fault(f"unknown type in {instruction}")
    return elementwise(compute, kind, instruction, lanes, flush)


def multiply(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """mul, and mad with a third operand: of integers the lower or upper half of the product, or all of it."""
    kind = modifiers.type(*INTEGERS, *WHOLE, *HALVES)
    add = instruction.opcode == "mad"
    if is_floating(kind):
        modifiers.take("rn")
        flush = modifiers.take("ftz") is not None
        if kind == "f64" and add:
            raise Fault(f"unknown type in {instruction}")
        return elementwise(_fused if add else np.multiply, kind, instruction, lanes, flush)
    part, width = modifiers.need("lo", "hi", "wide"), bits_of(kind)
    if part == "lo":
        return elementwise((lambda a, b, c: a * b + c) if add else np.multiply, kind, instruction, lanes)
    if width > 32:
        raise Fault(f"unknown type in {instruction}")
    double = kind[0] + str(2 * width)
    wide, result = DTYPES[double], double if part == "wide" else kind
    target, *sources = operands(instruction, 4 if add else 3)
    a, b = (lanes.reader(source, kind) for source in sources[:2])
    c, write = lanes.reader(sources[2], result) if add else None, lanes.writer(target, result)

    def action(mask: Mask) -> None:
        product = a().astype(wide) * b().astype(wide)
        if part == "hi":
            product = (product >> wide(width)).astype(DTYPES[kind])
        write(product if c is None else product + c(), mask)

    return action


def special(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """ex2, lg2, rcp, sqrt, rsqrt, tanh."""
    modifiers.take("approx", "rn")
    flush = modifiers.take("ftz") is not None
    kind = modifiers.type("f32")
    return elementwise(SPECIAL[instruction.opcode], kind, instruction, lanes, flush)


def copysign(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """The second operand with the sign of the first."""
    kind = modifiers.type(*WHOLE)
    return elementwise(lambda sign, size: np.copysign(size, sign), kind, instruction, lanes)


def compare(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """setp: a predicate, or two for a pair; and joined with another one."""
    kind = modifiers.type(*INTEGERS, "b16", "b32", "b64", *WHOLE, *HALVES)
    relation = modifiers.need(*COMPARISONS, *(f"{name}u" for name in COMPARISONS), "num", "nan")
    joined = modifiers.take("and", "or", "xor")
    modifiers.take("ftz")
    target, left, right, *other = operands(instruction, 4 if joined else 3)
    a, b = lanes.reader(left, kind), lanes.reader(right, kind)
    extra = lanes.predicate(other[0]) if joined else None
    writers = [lanes.writer(name.strip(), "pred") for name in target.split("|")]
    pairs = kind.endswith("x2")
    if len(writers) != 1 + pairs:
        raise Fault(f"{len(writers)} predicates for .{kind}: {instruction}")

    def action(mask: Mask) -> None:
        found = _compared(relation, a(), b())
        if extra is not None:
            found = LOGIC[joined](found, extra())
        for index, write in enumerate(writers):
            write(found[:, index] if pairs else found, mask)

    return action


def _compared(relation: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Relations that end in u hold for NaN too, the others do not."""
    if a.dtype.kind != "f":
        return COMPARISONS[relation](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if relation in ("num", "nan"):
        return unordered if relation == "nan" else ~unordered
    found = COMPARISONS[relation.removesuffix("u")](a, b)
    return found | unordered if relation.endswith("u") else found & ~unordered


def select(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """selp: the first operand where the predicate holds, else the second."""
    kind = modifiers.type(*INTEGERS, "b16", "b32", "b64", *WHOLE)
    target, first, second, choice = operands(instruction, 4)
    a, b, chosen = lanes.reader(first, kind), lanes.reader(second, kind), lanes.predicate(choice)
    write = lanes.writer(target, kind)
    return lambda mask: write(np.where(chosen(), a(), b()), mask)


def move(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """mov: of one register, or of a register from or into several narrower ones."""
    kind = modifiers.type(*BITS, *INTEGERS, *WHOLE)
    target, source = operands(instruction, 2)
    if not target.startswith("{") and not source.startswith("{"):
        write, read = lanes.writer(target, kind), lanes.reader(source, kind)
        return lambda mask: write(read(), mask)
    parts, whole = members(target if target.startswith("{") else source), bits_of(kind)
    narrow = f"b{whole // len(parts)}"
    if target.startswith("{"):
        read, writers = lanes.reader(source, kind), [lanes.writer(part, narrow) for part in parts]

        def unpack(mask: Mask) -> None:
            columns = np.ascontiguousarray(read()).view(DTYPES[narrow]).reshape(-1, len(parts))
            for write, column in zip(writers, columns.T, strict=True):
                write(column, mask)

        return unpack
    readers, write = [lanes.reader(part, narrow) for part in parts], lanes.writer(target, kind)

    def pack(mask: Mask) -> None:
        columns = np.stack([read() for read in readers], 1)
        write(columns.view(DTYPES[kind])[:, 0], mask)

    return pack


def to_generic(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """cvta of addresses in global memory, which are the same in both ways of writing them."""
    modifiers.take("to")
    modifiers.need("global")
    modifiers.type("u64")
    target, source = operands(instruction, 2)
    read, write = lanes.reader(source, "u64"), lanes.writer(target, "u64")
    return lambda mask: write(read(), mask)


def convert(instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    """cvt between types, between widths, and of two float32 into a pair."""
    source_kind = modifiers.type(*INTEGERS, "u8", "s8", *WHOLE, "bf16", "f16")
    kind = modifiers.type(*INTEGERS, "u8", "s8", *WHOLE, *HALVES, "tf32")
    if kind.endswith("x2"):
        return _convert_pair(kind, source_kind, instruction, modifiers, lanes)
    target, source = operands(instruction, 2)
    if kind == "tf32":
        modifiers.need("rna")
        if source_kind != "f32":
            raise Fault(f"unknown type in {instruction}")
        bits, write = lanes.reader(source, "b32"), lanes.writer(target, "b32")
        return lambda mask: write(to_tf32(bits()), mask)
    rounding = modifiers.take(*ROUNDINGS)
    modifiers.take("rn")
    modifiers.take("ftz")
    if is_floating(source_kind) and not is_floating(kind) and rounding is None:
        raise Fault(f"no rounding in {instruction}")
    read, write = _reader_of_part(source, source_kind, lanes), lanes.extending_writer(target, kind)

    def action(mask: Mask) -> None:
        values = read()
        if rounding:
            values = ROUNDINGS[rounding](values)
        write(_as_type(values, kind), mask)

    return action


def _reader_of_part(source: str, kind: str, lanes: Lanes) -> Callable[[], np.ndarray]:
    """Reads the lower bits of a register that may be wider than the type."""
    if not lanes.is_register(source) or is_floating(kind) or lanes.register(source).dtype == UNSIGNED[bits_of(kind)]:
        return lanes.reader(source, kind)
    bits = lanes.register(source)
    return lambda: bits.astype(UNSIGNED[bits_of(kind)]).view(DTYPES[kind])


def _as_type(values: np.ndarray, kind: str) -> np.ndarray:
    """Values in the dtype in which registers of this type are written; integers are cut off, never out of range."""
    if is_floating(kind):
        return values.astype(np.float32 if kind in WIDENED else DTYPES[kind])
    dtype = DTYPES[kind]
    if values.dtype.kind == "f":
        limits = np.iinfo(dtype)
        values = np.nan_to_num(values.astype(np.float64), nan=0.0).clip(float(limits.min), float(limits.max))
        return np.where(values >= limits.max, limits.max, values.astype(dtype)).astype(dtype)
    return values.astype(dtype)


def _convert_pair(kind: str, source_kind: str, instruction: Instruction, modifiers: Modifiers, lanes: Lanes) -> Action:
    modifiers.need("rn")
    target, high, low = operands(instruction, 3)
    if source_kind != "f32":
        raise Fault(f"unknown type in {instruction}")
    readers, write = [lanes.reader(low, "f32"), lanes.reader(high, "f32")], lanes.writer(target, "b32")
    base = kind.removesuffix("x2")
    return lambda mask: write(narrowed(np.stack([read() for read in readers], 1), base), mask)


TABLE: Table = {
    **dict.fromkeys(ARITHMETIC, arithmetic),
    **dict.fromkeys(SPECIAL, special),
    **dict.fromkeys(("mul", "mad"), multiply),
    "setp": compare,
    "selp": select,
    "mov": move,
    "cvta": to_generic,
    "cvt": convert,
    "copysign": copysign,
}
