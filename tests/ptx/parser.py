"""PTX as Triton writes it, read into instructions: one kernel a text, with its registers, labels and parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_LOCATION = re.compile(r"\.loc\b.*?//\s*(\S+)")
_IGNORED = (".loc", ".pragma")  # where a statement comes from, and advice to the assembler


class Fault(Exception):
    """Something that must not happen on a GPU, or that the emulator does not know; the message names the instruction.

    No RuntimeError: the library would take some of those for a kernel that does not compile.
    """


@dataclass(frozen=True)
class Instruction:
    """One statement.

    Attributes:
        text: as written, without its guard's @.
        opcode: what stands before the first dot.
        modifiers: what stands between and after the dots, in order.
        operands: as written; vectors keep their braces.
        guard: name of the predicate under which it runs, with "!" before it where that is negated; "" for always.
        line: file, line and column of the Python source, "" if unknown.
    """

    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str = ""
    line: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.line})" if self.line else self.text


@dataclass
class Program:
    """A kernel.

    Attributes:
        name: of the kernel.
        threads: in a block.
        parameters: name and type ("u64", ...) of each.
        widths: bits of each register, 1 for predicates.
        instructions: in order.
        labels: label -> index of the instruction after it.
        symbols: names of what lies at the start of shared memory.
    """

    name: str
    threads: int
    parameters: list[tuple[str, str]]
    symbols: set[str]
    widths: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def has_warpgroups(self) -> bool:
        """Whether four warps work together in an instruction."""
        return any(instruction.opcode == "wgmma" for instruction in self.instructions)


def parse(source: str) -> Program:
    """Read the text of one kernel.

    Raises:
        Fault: the text has something besides one kernel, or a directive that is not known.
    """
    entries = re.findall(r"\.(?:entry|func)\b", source)
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", source, re.S)
    if len(entries) != 1 or head is None:
        raise Fault(f"expected one kernel and no functions, found {len(entries)}")
    name, parameters, attributes = head.groups()
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", attributes)
    if threads is None:
        raise Fault(f"{name} does not say how many threads it has")
    declared = re.findall(r"\.param\s+\.(\w+)[^,]*?([\w$]+)\s*(?:,|$)", re.sub(r"//[^\n]*", "", parameters).strip())
    symbols = set(re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]", source[: head.start()]))
    program = Program(name, int(threads[1]), [(name, kind) for kind, name in declared], symbols)
    for statement, line in _statements(source[head.end() :]):
        _add(program, statement, line)
    return program


def _statements(body: str) -> Iterator[tuple[str, str]]:
    """Statements, labels and directives of a body up to its closing brace, each with the source line it belongs to."""
    depth, line = 1, ""
    for text in body.splitlines():
        located = _LOCATION.search(text)
        if located:
            line = located[1]
        for piece in re.sub(r"//.*", "", text).split(";"):
            statement = " ".join(piece.split())
            while statement[:1] in ("{", "}") and statement:  # scopes of inline assembly; no statement begins so
                depth += 1 if statement[0] == "{" else -1
                statement = statement[1:].strip()
                if depth == 0:
                    return
            if statement:
                yield statement, line
    raise Fault("the kernel has no end")


def _add(program: Program, statement: str, line: str) -> None:
    label = re.match(r"([$\w]+):\s*", statement)
    if label:
        program.labels[label[1]] = len(program.instructions)
        statement = statement[label.end() :]
    if not statement or statement.startswith(_IGNORED):
        return
    if statement.startswith(".reg"):
        _declare(program, statement)
    elif statement.startswith("."):
        raise Fault(f"unknown directive: {statement}")
    else:
        program.instructions.append(read_instruction(statement, line))


def _declare(program: Program, statement: str) -> None:
    kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", statement).groups()
    width = 1 if kind == "pred" else int(kind[1:])
    for name in names.split(","):
        many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name.strip())
        every = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
        for one in every:
            if program.widths.setdefault(one, width) != width:
                raise Fault(f"two registers of different widths share a name: {statement}")


def read_instruction(statement: str, line: str = "") -> Instruction:
    """One statement as an instruction."""
    guard = ""
    if statement.startswith("@"):
        guard, statement = statement[1:].split(None, 1)
    mnemonic, _, rest = statement.partition(" ")
    opcode, *modifiers = mnemonic.split(".")
    return Instruction(statement, opcode, tuple(modifiers), tuple(split_operands(rest)), guard, line)


def split_operands(text: str) -> list[str]:
    """Operands between commas, those inside of brackets and braces apart."""
    parts = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+", text)
    return [part.strip() for part in parts if part.strip()]


def members(operand: str) -> list[str]:
    """The registers of a vector operand, or the one of a plain operand."""
    return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]
