"""Write the tables of docs/benchmarks.md from the committed rows of benchmarks/results.

    python -m benchmarks.tables             # after new rows are committed
    python -m benchmarks.tables --check     # only say which tables are out of date

A table stands between the lines ``<!-- table: NAME -->`` and ``<!-- end of table -->``. Its columns are the routing
functions that its rows were measured with.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from routingvl.kernels import ROUTINGS

from .results import Key, Results, collect, read_rows

RESULTS = Path(__file__).with_name("results")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Value = Callable[[Results, Key, str], float | None]


@functools.cache
def results(file: str) -> Results:
    """The rows of benchmarks/results/FILE.jsonl."""
    return collect(read_rows([RESULTS / f"{file}.jsonl"]))


def rows_by_case(file: str) -> dict[str, Mapping]:
    """The rows of a file that has one row per case."""
    lines = (RESULTS / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["case"]: row for row in map(json.loads, lines)}


def speed_up(found: Results, key: Key, provider: str) -> float | None:
    """The published chain's time over the provider's."""
    return found.ratio(key, provider)


def overhead(found: Results, key: Key, provider: str) -> float | None:
    """The same of the times above that of the frozen projection."""
    published, ours, frozen = (found.whole(key, name) for name in ("reference", provider, "base"))
    if published is None or ours is None or frozen is None:
        return None
    return (published["ms_p50"] - frozen["ms_p50"]) / (ours["ms_p50"] - frozen["ms_p50"])


@dataclass(frozen=True)
class Line:
    """A line of a table with a column per routing function: what it is called, and where its numbers are."""

    label: str
    file: str
    case: str
    value: Value = speed_up
    dtype: str = "float32"
    clock: str = "cpu"
    provider: str = "eager"

    def values(self) -> dict[str, float]:
        """By routing function, those that were measured."""
        found = results(self.file)
        keys = {name: Key(self.case, name, self.dtype, 0.0, self.clock) for name in ROUTINGS}
        values = {name: self.value(found, key, self.provider) for name, key in keys.items() if key in found.measured}
        return {name: value for name, value in values.items() if value is not None}


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column holds names and the others numbers."""
    rule = f"|{'|'.join(['---', *['---:'] * (len(head) - 1)])}|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def by_routing(title: str, *lines: Line) -> str:
    """A line each, a column per routing function that one of them has."""
    found = [(line.label, line.values()) for line in lines]
    names = [name for name in ROUTINGS if any(name in values for _, values in found)]
    cells = [[label, *(f"{values[name]:.2f}" if name in values else "" for name in names)] for label, values in found]
    return markdown([title, *names], cells)


def layer_lines(file: str) -> list[Line]:
    """The layers of the paper's recipes."""
    return [
        Line("RoBERTa-base LoRA, r 128, M 1280", file, "roberta_lora_m1280"),
        Line("768-wide LoRA, r 128, M 2040", file, "linear_lora_m2040"),
        Line("GPT-2 c_attn LoRA, r 128, M 2040", file, "gpt2_lora_m2040"),
        Line("GPT-2 Adapter, r 128, M 2040", file, "gpt2_adapter_m2040"),
        Line("RoBERTa Adapter, r 64, M 1280", file, "roberta_adapter_m1280"),
    ]


def intel_layers() -> str:
    """One thread of the Xeon; also with fresh pages, and above the frozen layer."""
    first, *others = layer_lines("cpu_layers")
    fresh = Line(f"{first.label}, fresh pages", "cpu_layers_fresh_pages", first.case)
    cases = {"768-wide LoRA": "linear_lora_m2040", "GPT-2 c_attn LoRA": "gpt2_lora_m2040"}
    above = [
        Line(f"{label}, time above the frozen layer{isa}", file, case, overhead)
        for label, case in cases.items()
        for file, isa in (("cpu_layers", ""), ("cpu_layers_avx2", ", AVX2"))
    ]
    return by_routing("forward + backward, float32", first, fresh, *others, *above)


def amd_layers() -> str:
    """One thread of the EPYC."""
    return by_routing("forward + backward, float32, AMD EPYC", *layer_lines("cpu_layers_amd"))


def models() -> str:
    """Two threads of the Xeon, whose clock is wall time."""
    return by_routing(
        "published step divided by ours",
        Line("ViT-B/16 + RoBERTa-base, batch 32", "cpu_models", "roberta_step_b32", clock="wall"),
        Line("ViT-B/16 + GPT-2, batch 8", "cpu_models", "gpt2_step_b8", clock="wall"),
    )


def captions() -> str:
    """Beam search, in captions per second."""
    found, lines = results("cpu_models"), []
    for key in found.measured:
        if key.case == "gpt2_generate_b8":
            rates = [found.whole(key, name)["captions_s"] for name in ("reference", "eager")]
            lines.append([f"GPT-2, {key.routing}, 8 images, 5 beams, 15 tokens", *(f"{rate:.2f}" for rate in rates)])
    return markdown(["captions per second", "published", "ours"], lines)


CPUS = {"cpu_training": "Intel Xeon", "cpu_training_amd": "AMD EPYC"}
RECIPES = {
    "training_vqa": "ViT-B/16 + RoBERTa-base, VQA, batch 32",
    "training_caption": "ViT-B/16 + GPT-2, captions, batch 8",
}
SIDES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float32_compiled": "float32, compiled",
    "bfloat16_compiled": "bfloat16, compiled",
}


def training() -> str:
    """Examples per second of training, with the ratio to the published recipe."""
    lines = []
    for case, recipe in RECIPES.items():
        for file, cpu in CPUS.items():
            row = rows_by_case(file)[case]
            ours = [f"{row[f'{side}_examples_s']:.1f} ({row[f'{side}_speedup']:.1f}x)" for side in SIDES]
            lines.append([f"{recipe}, {cpu}", f"{row['published_examples_s']:.1f}", *ours])
    return markdown(["examples per second", "published", *SIDES.values()], lines)


def training_memory() -> str:
    """MiB of a captioning step."""
    sides = ("published", "float32", "bfloat16")
    kinds = {"step": "tensors beside the model", "process": "the whole process at its peak"}
    row = rows_by_case("cpu_training")["training_caption"]
    lines = [[words, *(f"{row[f'{side}_{kind}_mib']:.0f}" for side in sides)] for kind, words in kinds.items()]
    return markdown(["MiB in a captioning step, Intel Xeon", *sides], lines)


def gpu_layers() -> str:
    """The layers of the targets on an H100: the published chain's time over that of the kernels, each with its gate."""
    rows = [json.loads(line) for line in (RESULTS / "gpu" / "targets.jsonl").read_text(encoding="utf-8").splitlines()]
    times: dict[tuple[str, ...], dict[str, dict]] = {}
    for row in rows:
        if row.get("gate") == "passed" and "us" in row:
            name = (row["case"], row["routing"], row["dtype"], f"dropout {row['dropout']}" if row["dropout"] else "")
            times.setdefault(name, {})[row["side"]] = row["us"]
    columns = {
        "kernels, forward": ("reference", "kernels_fwd"),
        "kernels": ("reference", "kernels_fwdbwd"),
        "kernels, over the compiled chain": ("compile", "kernels_fwdbwd"),
        "CUDA graph": ("reference", "graph_fwdbwd"),
        "wall": ("reference", "wall_fwdbwd"),
    }
    lines = []
    for name, sides in times.items():
        if "triton" not in sides or "kernels_fwdbwd" not in sides["triton"]:
            continue  # decoding has a forward pass only
        cells = []
        for side, clock in columns.values():
            pair = [sides.get(which, {}).get(clock, [0, 0])[1] for which in (side, "triton")]
            cells.append(f"{pair[0] / pair[1]:.2f}" if all(pair) else "")
        lines.append([", ".join(filter(None, name)), *cells])
    return markdown(["published divided by ours, H100, forward + backward", *columns], lines)


def waterfall() -> str:
    """MiB of a training step by technique, with the change in percent, and its time as a share of the published.

    The task with the most techniques has all of them, in their order.
    """
    rows = [json.loads(line) for line in (RESULTS / "cpu_waterfall.jsonl").read_text(encoding="utf-8").splitlines()]
    tasks = {"waterfall_vqa": "VQA, batch 32", "waterfall_caption": "captions, batch 8"}
    found = {(row["case"], row["technique"]): row for row in rows}
    tasks = {task: words for task, words in tasks.items() if (task, "published") in found}
    before: dict[str, float] = {}
    lines = []
    for technique in max(([name for case, name in found if case == task] for task in tasks), key=len):
        cells = []
        for task in tasks:
            if (row := found.get((task, technique))) is None:
                cells += ["", ""]
                continue
            mib = row["step_mib"]
            change = f" ({100 * (mib / before[task] - 1):+.0f} %)" if task in before else ""
            cells += [f"{mib:.0f}{change}", f"{row['ms_p50'] / found[task, 'published']['ms_p50']:.2f}"]
            before[task] = mib
        lines.append([technique, *cells])
    heads = (head for words in tasks.values() for head in (f"{words}: MiB", "time"))
    return markdown(["a training step", *heads], lines)


def convergence() -> str:
    """How far ours strays from the published chain in training, and how far rounding alone does."""
    from .convergence import judged  # needs transformers

    rows = [json.loads(line) for line in (RESULTS / "cpu_convergence.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [
        [f"{one['case'].removeprefix('convergence_')}, {one['dtype']}", f"{one['ours']:.1e}", f"{one['nudged']:.1e}",
         f"{one['widest']:.1e}", f"{one['last']:.4f}" + f" ± {one['error']:.4f}" * (one["starts"] > 1)]
        for one in judged(rows)
    ]  # fmt: skip
    head = [
        "200 steps on a CPU",
        "gap of ours",
        "of rounding alone",
        "widest allowed",
        "ours / published, last 20 losses",
    ]
    return markdown(head, lines)


TABLES: dict[str, Callable[[], str]] = {
    "cpu-layers-intel": intel_layers,
    "cpu-layers-amd": amd_layers,
    "cpu-models": models,
    "cpu-captions": captions,
    "cpu-training": training,
    "cpu-training-memory": training_memory,
    "gpu-layers": gpu_layers,
    "cpu-waterfall": waterfall,
    "cpu-convergence": convergence,
}


def fill(text: str) -> str:
    """``text`` with every marked table written anew.

    Raises:
        ValueError: a marker names no table, or a table has no marker.
    """
    named = [match[2] for match in MARKED.finditer(text)]
    if sorted(named) != sorted(TABLES):
        raise ValueError(f"the marked tables are {', '.join(named)}; benchmarks/tables.py makes {', '.join(TABLES)}")
    return MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; with ``--check`` 1 if it is out of date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a table is out of date")
    args = parser.parse_args(argv)
    text = PAGE.read_text(encoding="utf-8")
    new = fill(text)
    if args.check:
        stale = [
            old[2] for old, made in zip(MARKED.finditer(text), MARKED.finditer(new), strict=True) if old[0] != made[0]
        ]
        print(f"out of date: {', '.join(stale)}" if stale else "every table is up to date")
        return 1 if stale else 0
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
