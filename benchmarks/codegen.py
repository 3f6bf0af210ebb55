"""Ahead-of-time compilation of every shipped kernel configuration, without a GPU, and what the machine code uses.

``python -m routingvl.benchmarks.codegen`` prints the table (``--help`` for choices).
It must run in a process of its own where TRITON_INTERPRET is set, because Triton reads that once. Triton's own
cache on disk, keyed by the source, makes every later run quick.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from routingvl.benchmarks.machine_code import NARROW, Usage, code_of, read_usage
from routingvl.kernels.activations import ACTIVATIONS
from routingvl.kernels.routing import ROUTINGS, Routing
from routingvl.kernels.triton_common.launch import NO_CODE, image_tile
from routingvl.kernels.triton_common.tiles import SHARED_MEMORY, Tile, padded_rank, tiles_for_call
from routingvl.kernels.triton_common.visual_tokens import MAX_GRAM_WIDTH, Visual, rows_of_one_image

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
RANKS = (16, 32, 64, 128, 256)
TEXT = 20  # rows of text of an image, as in VQA
# Spilled registers go to the processor's L1 cache, 128 bytes a clock, where its share of the memory's rate is 13 (H100:
# 3.0 TB/s, 132 processors, 1.755 GHz). So as many bytes as the program's rows have cost it a tenth; four warps in place
# of eight, with 56 spills, took a fifth off adapter_backward there (results/gpu/tiles.jsonl).
SPILLED_SHARE = 1.0


@dataclass(frozen=True)
class Configuration:
    """One kernel as it would be compiled at its launch.

    Attributes:
        kernel: its name, one of ``VARIANTS``.
        variant: what it computes, a name from there.
        rank: width of the low-rank activation.
        precision: of the products, "half" (here bfloat16), "tf32" or "ieee".
        decode: whether with the tile of few rows.
        arch: one of ``ARCHITECTURES``.
        few: whether with the tile of few rows a processor (16 at most), not so few as in decoding.
    """

    kernel: str
    variant: str
    rank: int
    precision: str
    decode: bool
    arch: str
    few: bool = False

    @property
    def tile_kind(self) -> str:
        """The kind under which the kernel finds its tile."""
        return "lora_backward" if self.kernel == "dropped_gradient" else self.kernel

    @property
    def tile(self) -> Tile:
        """The tile that a launch would try first, for images with TEXT rows where programs have rows of one alone."""
        given = {**_DEFAULTS, **VARIANTS[self.kernel][self.variant]}
        traits = {name: given[name.upper()] for name in ("dropout", "relu", "apart")}
        traits["relu"] |= given["ACT"] == ACTIVATIONS["gelu_new"].code
        if self.kernel == "dropped_gradient":  # which passes none
            traits = {}
        traits |= {"few": self.few, "one_wave": self.few, "two_parts": 16 < TEXT <= 32}
        tile = tiles_for_call(self.tile_kind, self.rank, self.precision, self.decode, self.arch, **traits)[0]
        return image_tile(tile, TEXT, rows_of_one_image(given["VISUAL"]))

    def __str__(self) -> str:
        rows = ["decode"] * self.decode + ["few rows"] * self.few
        return " ".join((self.kernel, self.variant, f"r{self.rank}", self.precision, *rows))


# Constants of the kernels that a variant does not mention.
_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "ROUTING": NO_CODE,
        "RELU": False,
        "VISUAL": int(Visual.ONE_TOKEN),
        "GROUPS": 1,
        "ACT": ACTIVATIONS["gelu"].code,
        "RANK_ONE": False,
        "DROPOUT": False,
        **dict.fromkeys(("ACCUMULATE", "RESIDUAL", "DOWN_BIAS", "UP_BIAS", "SAVE_T"), True),
        **dict.fromkeys(("WRITE_DX", "WRITE_DU", "WRITE_DP", "WRITE_DO", "WRITE_H"), True),
        "WRITE_DZ": False,
        "WRITE_Z": True,
        "ONE_ROW": False,
        "APART": False,
    }
)


def _routing_variants(extra: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the kernels with a low-rank activation are launched with, for every routing function that they compute.

    The first one routes by one visual token and is neither rank one (which has kernels of its own) nor z = t + c u;
    ``extra`` are further variants of it.
    """
    variants: dict[str, dict[str, Any]] = {}
    for row in sorted(ROUTINGS.values(), key=lambda row: not _is_representative(row)):
        for relu in (False, True)[: 1 + row.supports_relu]:
            launched = row.code is not None and (relu or not row.is_rank_one(1))
            constants: dict[str, Any] = {"ROUTING": row.code, "RELU": relu, "WRITE_Z": not relu}
            if not row.uses_image:
                constants |= {"VISUAL": int(Visual.NO_IMAGE), "WRITE_DU": False, "WRITE_Z": False}
            if launched:
                variants[row.name + " relu" * relu] = constants
        if _is_representative(row):
            variants |= {f"{row.name} {name}": {"ROUTING": row.code, **given} for name, given in extra.items()}
        if row.inner_product:
            by_gram = {"VISUAL": int(Visual.GRAM), "WRITE_DU": False, "WRITE_DZ": True}
            variants[f"{row.name} tokens"] = {"ROUTING": row.code, "VISUAL": int(Visual.TOKENS)}
            variants[f"{row.name} gram"] = {"ROUTING": row.code, **by_gram}
    return variants


def _is_representative(row: Routing) -> bool:
    plain = row.code is not None and row.max_visual_tokens == 1
    return plain and row.probe is None and row.image_factor is None


REPRESENTATIVE = next(row for row in ROUTINGS.values() if _is_representative(row))
_LORA = _routing_variants({"dropout": {"DROPOUT": True}, "grouped": {"GROUPS": 2}})
_APART = {f"{REPRESENTATIVE.name} grouped apart": {"ROUTING": REPRESENTATIVE.code, "GROUPS": 2, "APART": True}}
_ADAPTER = {
    **{f"{name} gelu": given for name, given in _routing_variants({}).items()},
    **{
        f"{REPRESENTATIVE.name} {act.name}": {"ROUTING": REPRESENTATIVE.code, "ACT": act.code}
        for act in ACTIVATIONS.values()
        if act.name != "gelu"
    },
    "rank one gelu": {"RANK_ONE": True},
}
_RANK_ONE = {"plain": {}, "dropout": {"DROPOUT": True}, "grouped dropout": {"DROPOUT": True, "GROUPS": 2}}
# {kernel: {variant: constants}}; the first variant is compiled at every rank, the others at ranks 128 and 256.
VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "lora_forward": {**_LORA, **_APART},
        "lora_backward": _LORA,
        "dropped_gradient": {"dropout": {"DROPOUT": True}},
        "rank_one_forward": _RANK_ONE,
        "rank_one_backward": _RANK_ONE,
        "adapter_forward": _ADAPTER,
        "adapter_backward": _ADAPTER,
    }
)
_FLOAT32_POINTERS = {"p_da", "p_c", "p_dp", "p_do"}
_FLOATS = {"scaling", "keep_scale"}
_DIVISIBLE = ("p_", "width", "stride", "column", "rank")  # beginnings of names; by 16, as at every usual size


def configurations(architectures: Sequence[str] = ARCHITECTURES) -> Iterator[Configuration]:
    """Every configuration that is shipped, representative where kernels differ in a constant only."""
    for arch, kernel in itertools.product(architectures, VARIANTS):
        for index, variant in enumerate(VARIANTS[kernel]):
            for rank in _ranks(kernel, variant):
                precisions = ["half"]
                if index == 0 and (rank >= 128 or kernel.startswith("rank_one")):
                    precisions += ["tf32", "ieee"] if arch.startswith("sm_") else ["ieee"]
                for precision in precisions:
                    many = Configuration(kernel, variant, rank, precision, False, arch)
                    few = replace(many, few=True)
                    yield from (many, few) if few.tile != many.tile else (many,)
                if index == 0 and kernel in ("lora_forward", "adapter_forward"):
                    yield Configuration(kernel, variant, rank, "half", True, arch)


def _ranks(kernel: str, variant: str) -> tuple[int, ...]:
    if kernel.startswith("rank_one"):
        return RANKS[:1]  # the rank plays no part
    if "gram" in variant:
        return (MAX_GRAM_WIDTH,)
    if kernel == "lora_forward" and "grouped" in variant:  # wider groups are taken apart
        return (128,)
    return RANKS if variant == next(iter(VARIANTS[kernel])) else RANKS[-2:]


def _kernel_function(name: str) -> Any:
    from routingvl.kernels.adapter import triton as adapter
    from routingvl.kernels.lora import rank_one
    from routingvl.kernels.lora import triton as lora

    homes = {"adapter": adapter, "rank_one": rank_one}
    home = next((module for start, module in homes.items() if name.startswith(start)), lora)
    return getattr(home, f"{name}_kernel")


def compile_configuration(configuration: Configuration) -> Any:
    """The compiled kernel (``triton.compile``'s result), with every size and stride a multiple of 16.

    Raises:
        RuntimeError: this process runs Triton's interpreter.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels cannot be compiled while TRITON_INTERPRET=1 is set")
    function = _kernel_function(configuration.kernel)
    signature, constants, attributes = _arguments(configuration)
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    cuda = configuration.arch.startswith("sm_")
    target = GPUTarget("cuda", int(configuration.arch[3:]), 32) if cuda else GPUTarget("hip", configuration.arch, 64)
    return triton.compile(source, target=target, options=_options(configuration.tile))


def _arguments(configuration: Configuration) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """The types of a kernel's arguments, its constants, and which arguments are multiples of 16, for ``ASTSource``."""
    given = _constants(configuration)
    dtype = "bf16" if configuration.precision == "half" else "fp32"
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(_kernel_function(configuration.kernel).params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", given[name]
            continue
        signature[name] = _type_of(name, dtype, given)
        if name.startswith(_DIVISIBLE) and not parameter.do_not_specialize:
            attributes[index,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _options(tile: Tile) -> dict[str, int]:
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return options | ({"maxnreg": tile.maxnreg} if tile.maxnreg else {})


def _constants(configuration: Configuration) -> dict[str, Any]:
    tile = configuration.tile
    return {
        **_DEFAULTS,
        **VARIANTS[configuration.kernel][configuration.variant],
        "BLOCK_R": padded_rank(configuration.rank),
        "PRECISION": "ieee" if configuration.precision == "ieee" else "tf32",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }


def _type_of(name: str, dtype: str, constants: Mapping[str, Any]) -> str:
    if name in _FLOATS:
        return "fp32"
    if not name.startswith("p_"):
        return "i32"
    if name == "p_seed":
        return "*i64"
    wide = name in _FLOAT32_POINTERS
    wide |= name == "p_image" and constants["VISUAL"] == Visual.GRAM
    wide |= name in ("p_t", "p_dt") and constants["RANK_ONE"]
    return "*fp32" if wide else f"*{dtype}"


def usage_of(configuration: Configuration) -> Usage:
    """Compile a configuration and read from its code what it uses."""
    return read_usage(compile_configuration(configuration))


@functools.cache
def _code_of_kernel(name: str) -> list[tuple[str, str]]:
    return code_of(_kernel_function(name))


def fingerprint(configuration: Configuration) -> str:
    """What the machine code depends on, in 16 hexadecimal digits: the kernel's code with that of all functions it calls
    (not its comments, nor where it stands in a file), argument types, constants, options, and Triton's version.
    """
    import triton

    code = _code_of_kernel(configuration.kernel)
    parts = (triton.__version__, code, _arguments(configuration), _options(configuration.tile))
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


class Results:
    """Usages kept in a file of JSON lines, so that an interrupted run goes on where it stopped.

    A line {"configuration", "fingerprint", "usage"} per configuration; lines whose fingerprint is no longer that of the
    configuration are passed over. Without a file nothing is kept.

    Raises:
        ValueError: a line of the file is none of these; the message names file and line.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[tuple[Configuration, str], Usage] = {}
        if path is None or not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):  # written as the program was killed
            text = text[: text.rfind("\n") + 1]
            path.write_text(text, encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = json.loads(line)
                key = Configuration(**row["configuration"]), row["fingerprint"]
                self._known[key] = Usage(**row["usage"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no result of codegen ({error}): delete it") from error

    def usage(self, configuration: Configuration) -> Usage:
        """What the configuration uses: known from the file, or compiled now and added to it."""
        key = configuration, fingerprint(configuration)
        if key not in self._known:
            self._known[key] = usage_of(configuration)
            if self._path is not None:
                row = {"configuration": asdict(configuration), "fingerprint": key[1], "usage": asdict(self._known[key])}
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        return self._known[key]


def table(rows: Sequence[tuple[Configuration, Usage]]) -> str:
    """Markdown: a line per configuration, a column per architecture ("registers, spills, KiB, matrix instructions")."""
    architectures = [arch for arch in ARCHITECTURES if any(row[0].arch == arch for row in rows)]
    cells: dict[str, dict[str, str]] = {}
    for configuration, usage in rows:
        tile = configuration.tile
        blocks = f"{tile.block_m}x{tile.block_n}x{tile.block_k} {tile.num_warps}w {tile.num_stages}s"
        blocks += f" {tile.maxnreg}r" * bool(tile.maxnreg)
        matrix = " ".join(f"{count} {name.split('.')[0]}" for name, count in usage.matrix.items()) or "none"
        cell = f"{blocks}: {usage.registers}, {usage.spills}, {usage.shared_memory / 1024:.0f}, {matrix}"
        cells.setdefault(str(configuration), {})[configuration.arch] = cell
    lines = [f"| configuration | {' | '.join(architectures)} |", "|---" * (len(architectures) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row.get(arch, '-') for arch in architectures)} |" for name, row in cells.items()]
    return "\n".join(lines)


def spill_limit(configuration: Configuration) -> int:
    """Bytes that a thread's spills may move: ``SPILLED_SHARE`` of its share of the program's rows, read and written."""
    tile = configuration.tile
    threads = tile.num_warps * (32 if configuration.arch.startswith("sm_") else 64)
    size = 2 if configuration.precision == "half" else 4
    return int(SPILLED_SHARE * 2 * tile.block_m * NARROW * size / threads)


def problems(configuration: Configuration, usage: Usage) -> list[str]:
    """What is wrong with a compiled configuration; nothing for those that may be shipped."""
    found = []
    if usage.spilled_bytes > (limit := spill_limit(configuration)):
        found.append(f"{usage.spills} spills move {usage.spilled_bytes} bytes a thread, more than {limit}")
    if usage.shared_memory > SHARED_MEMORY[configuration.arch]:
        found.append(f"{usage.shared_memory} bytes of shared memory exceed {SHARED_MEMORY[configuration.arch]}")
    products = not configuration.kernel.startswith("rank_one") and configuration.precision != "ieee"
    if products and not usage.matrix:
        found.append("no matrix instructions")
    # There the components of the low-rank activation are the rows of the product.
    by_rank = configuration.kernel == "dropped_gradient"
    rows = padded_rank(configuration.rank) if by_rank else configuration.tile.block_m
    if products and configuration.arch == "sm_90" and rows >= 64 and "wgmma.mma_async" not in usage.matrix:
        found.append("no wgmma")
    return found


def examine(chosen: Sequence[Configuration]) -> list[tuple[Configuration, Usage]]:
    """Usage of every configuration, compiled in a fresh process free of Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "routingvl.benchmarks.codegen", "--from-stdin"]
    wanted = "".join(json.dumps(asdict(configuration)) + "\n" for configuration in chosen)
    done = subprocess.run(command, input=wanted, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compiling the kernels failed:\n{done.stderr[-4000:]}")
    usages = [Usage(**json.loads(line)) for line in done.stdout.splitlines()]
    return list(zip(chosen, usages, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit status 1 when a configuration has a problem."""
    parser = argparse.ArgumentParser(prog="python -m routingvl.benchmarks.codegen", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only this one (repeatable)")
    parser.add_argument("--match", default="", help="only configurations whose name matches this regular expression")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep results there; compile only what it lacks")
    parser.add_argument("--from-stdin", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does anyway, without its warning
    if options.from_stdin:
        for line in sys.stdin:
            print(json.dumps(asdict(usage_of(Configuration(**json.loads(line))))), flush=True)
        return 0
    try:
        results = Results(options.resume)
    except (OSError, ValueError) as error:
        parser.error(f"--resume: {error}")
    every = configurations(options.arch or ARCHITECTURES)
    chosen = [configuration for configuration in every if re.search(options.match, str(configuration))]
    rows, bad = [], []
    for done, configuration in enumerate(chosen, 1):
        usage = results.usage(configuration)
        rows.append((configuration, usage))
        faults = [f"{configuration} on {configuration.arch}: {fault}" for fault in problems(configuration, usage)]
        print(f"[{done}/{len(chosen)}] {configuration} on {configuration.arch}", *faults, file=sys.stderr, sep="\n  ")
        bad += faults
    print("\n" + table(rows))
    for fault in bad:
        print(f"PROBLEM: {fault}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
