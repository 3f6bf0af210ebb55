"""Writes the study's tables into docs/study.md and README.md, from the committed rows.

python -m examples.study.report
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.study.arms import ARMS, STUDIES, Study
from examples.study.rows import COMMITTED, Row, digits, read_rows, results, spread, tables
from routingvl.atomic_files import write_text

ROOT = Path(__file__).resolve().parents[2]
INTRODUCTION = """\
On pretrained models and drawn pictures of things that no training picture shows ([docs/study.md](docs/study.md)): test
scores, mean ± standard deviation over {seeds}, each arm at its own best learning rate of one grid. A guess is
right on 50 % of the questions."""
METHODS = {"LoRA": "lora", "Adapter": "adapter"}
COLUMNS = tuple(arm.routing["routing"] for arm in ARMS if arm.name == f"lora-{arm.routing['routing']}")
BLOCK = re.compile(
    r"(<!-- study: written by python -m examples\.study\.report -->\n).*?(<!-- end of the study -->)", re.S
)


def readme_block(rows: Sequence[Row]) -> str:
    """The routing functions side by side, each study and method, with its control below."""
    seeds = {len(result.tests) for study in STUDIES for result in results(rows, study)}
    count = " to ".join(map(str, sorted({min(seeds), max(seeds)})))
    lines = [INTRODUCTION.format(seeds=f"{count} seed{'s' if count != '1' else ''}"), ""]
    lines += [f"| | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for study in STUDIES:
        for title, method in METHODS.items():
            lines += method_lines(rows, study, title, method)
    return "\n".join(lines)


def method_lines(rows: Sequence[Row], study: Study, title: str, method: str) -> list[str]:
    """Two lines, or none where no arm of the method was tested: the score, and with another example's picture."""
    found = {result.arm.name: result for result in results(rows, study)}
    own = [found.get(f"{method}-{name}") for name in COLUMNS]
    if not any(own):
        return []

    def cells(part: str) -> str:
        return " | ".join(spread(one.values(part), digits(study)) if one else "" for one in own)

    return [
        f"| {study.title}, {title}, {study.unit} | {cells('test')} |",
        f"| with another's picture | {cells('shuffled')} |",
    ]


def pages(rows: Sequence[Row]) -> dict[Path, str]:
    """The pages with what stands between their marks written anew; nothing where there are no rows."""
    blocks = {ROOT / "README.md": readme_block, ROOT / "docs/study.md": tables}
    texts = {}
    for page, write in blocks.items():
        block = f"\n{write(rows)}\n\n" if rows else ""
        texts[page] = BLOCK.sub(
            lambda found, block=block: found[1] + block + found[2], page.read_text(encoding="utf-8")
        )
    return texts


def main() -> int:
    """Write the pages."""
    for page, text in pages(read_rows(COMMITTED)).items():
        write_text(page, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
