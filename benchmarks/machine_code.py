"""What stands in a compiled kernel (registers, spills, matrix instructions), and the source it was compiled from."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NARROW = 768  # columns of the narrowest layers in use: there a program moves least beside its spills


@dataclass(frozen=True)
class Usage:
    """What a program of the compiled kernel uses.

    Attributes:
        registers: per thread (gfx942: vector registers).
        spills: instructions that read or write spilled registers (gfx942: registers spilled).
        shared_memory: bytes.
        matrix: {matrix instruction: how many stand in the code}.
        spilled_bytes: that a thread moves by ``spills``, in a loop once for every 64 of ``NARROW`` columns.
    """

    registers: int
    spills: int
    shared_memory: int
    matrix: Mapping[str, int]
    spilled_bytes: int = 0


def read_usage(compiled: Any) -> Usage:
    """What a kernel uses, by the code that ``triton.compile`` made of it."""
    shared = compiled.metadata.shared
    if "cubin" not in compiled.asm:
        code = compiled.asm["amdgcn"]
        spills = _number(r"\.vgpr_spill_count:\s+(\d+)", code)  # scalar ones spill into vector registers, at no cost
        # Each is written once and read once, 4 bytes.
        return Usage(_number(r"\.vgpr_count:\s+(\d+)", code), spills, shared, _counted(r"v_s?mfma", code), 8 * spills)
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    listing = done.stdout + done.stderr
    matrix = _counted(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", compiled.asm["ptx"])
    spills = len(re.findall(r"\b(?:LDL|STL)\b", listing))
    return Usage(_number(r"REG:(\d+)", listing), spills, shared, matrix, spilled_bytes_in(listing))


def spilled_bytes_in(listing: str) -> int:
    """``Usage.spilled_bytes`` by cuobjdump's listing.

    A loop is the code from a conditional jump back to its target; code out of line returns by an unconditional one.
    """
    instruction = r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?(LDL|STL|BRA)(\S*)\s+([^;]*);"
    found = [(int(at, 16), *rest) for at, *rest in re.findall(instruction, listing)]
    jumps = ((at, re.search(r"0x([0-9a-f]+)", where)) for at, when, name, _, where in found if name == "BRA" and when)
    loops = [(int(target[1], 16), at) for at, target in jumps if target and int(target[1], 16) < at]
    total = 0
    for at, _, name, modifiers, _ in found:
        if name != "BRA":
            width = next((bits // 8 for bits in (128, 64, 16, 8) if re.search(rf"\D{bits}\b", modifiers)), 4)
            total += width * (NARROW // 64) ** sum(first <= at <= last for first, last in loops)
    return total


def code_of(function: Any) -> list[tuple[str, str]]:
    """The code of a Triton function and of those of ours that it calls, with the constants that they read, by name.

    Neither comments nor the place in a file are in it.
    """
    return sorted(_collected(function, {}).items())


def _collected(function: Any, found: dict[str, str]) -> dict[str, str]:
    from triton import JITFunction
    from triton.language import constexpr

    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
    definition = tree.body[0]
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    name = f"{function.fn.__module__}.{function.fn.__name__}"
    found[name] = ast.unparse(tree)
    for used in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
        value = function.fn.__globals__.get(used)
        if isinstance(value, constexpr):
            found[f"{name}: {used}"] = str(value.value)
        elif isinstance(value, JITFunction) and f"{value.fn.__module__}.{value.fn.__name__}" not in found:
            _collected(value, found)
    return found


def _number(pattern: str, text: str) -> int:
    return int(re.search(pattern, text)[1])


def _counted(pattern: str, text: str) -> dict[str, int]:
    found = re.findall(pattern, text)
    return {name: found.count(name) for name in dict.fromkeys(found)}
