"""How many parameters of the bottlenecks train, by kind, and at which rank each has as many as a LoRA: a table.

``python -m benchmarks.parameters`` writes it into docs/layers.md. Counted are the parameters of layers that are built
on the meta device, at the shapes of GPT-2 and RoBERTa-base. Norms, biases and heads are the same for all and left out.
"""

from __future__ import annotations

import argparse
import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from routingvl.bottlenecks.layers import RoutedLoRALinear

PAGE = Path(__file__).resolve().parent.parent / "docs" / "layers.md"
MARKED = re.compile(r"(<!-- table: parameters -->\n).*?(<!-- end of table -->)", re.DOTALL)
WIDTH, LAYERS, RANK, LARGE = 768, 12, 128, 1024
LORA = "LoRA, with any routing function or none"
# Name -> options of a layer.
KINDS: dict[str, dict[str, Any]] = {
    LORA: {"routing": "mul"},
    '`image_projection="own"`': {"routing": "mul", "image_projection": "own"},
    '`two_step="before"`': {"routing": "vllora", "two_step": "before"},
    '`two_step="after"`': {"routing": "vllora", "two_step": "after"},
    '`two_step="residual"`': {"routing": "vllora", "two_step": "residual"},
    '`routing="attention"`': {"routing": "attention"},
}


class Model(NamedTuple):
    """What stands in each layer of a model: projections of ``outputs`` columns, with slices of the width or without."""

    name: str
    outputs: int
    slices: list[tuple[int, int]] | None
    each: int  # how many of them


MODELS = (
    Model("GPT-2", 3 * WIDTH, [(0, WIDTH), (2 * WIDTH, 3 * WIDTH)], 1),
    Model("RoBERTa-base", WIDTH, None, 2),
)


def lora_parameters(model: Model, rank: int, options: dict[str, Any], image_width: int = WIDTH) -> int:
    """How many parameters the bottlenecks at query and value have in the whole model."""
    if options != KINDS[LORA]:
        options = {**options, "image_width": image_width}
    base = nn.Linear(WIDTH, model.outputs, device="meta")
    layer = RoutedLoRALinear(base, rank, slices=model.slices, **options)
    frozen = WIDTH * model.outputs + model.outputs
    return LAYERS * model.each * (sum(p.numel() for p in layer.parameters()) - frozen)


def equal_rank(model: Model, budget: int, options: dict[str, Any]) -> int:
    """The largest rank with at most ``budget`` parameters, of those divisible by 4 (for attention by 16)."""
    step = 16 if options["routing"] == "attention" else 4
    ranks = range(step, 4 * RANK, step)
    return ranks[bisect_right(ranks, budget, key=lambda rank: lora_parameters(model, rank, options)) - 1]


def table() -> str:
    """The table in Markdown."""
    heads = [f"{model.name}: rank {RANK} | image {LARGE} wide | rank at equal budget" for model in MODELS]
    lines = [f"| bottleneck | {' | '.join(heads)} |", "|---|" + "---:|" * (3 * len(MODELS))]
    for name, options in KINDS.items():
        cells = [name]
        for model in MODELS:
            budget = lora_parameters(model, RANK, KINDS[LORA])
            rank = equal_rank(model, budget, options)
            cells += [f"{lora_parameters(model, RANK, options):,}", _at_large(model, options)]
            cells.append(f"{rank} ({lora_parameters(model, rank, options):,})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _at_large(model: Model, options: dict[str, Any]) -> str:
    count, narrow = (lora_parameters(model, RANK, options, width) for width in (LARGE, WIDTH))
    return f"{count:,}" if count != narrow else "-"


def fill(text: str) -> str:
    """The page with the table between its marks."""
    return MARKED.sub(lambda found: f"{found[1]}{table()}{found[2]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; with ``--check`` 1 if it is out of date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parameters", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the table is out of date")
    check = parser.parse_args(argv).check
    text = PAGE.read_text(encoding="utf-8")
    if check:
        return int(fill(text) != text)
    PAGE.write_text(fill(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
