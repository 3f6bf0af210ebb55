"""A report as a list of blocks, and its two forms: Markdown with pictures beside it, and one self-contained HTML."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from routingvl.atomic_files import replacing, write_text

_STYLE = """
:root { color-scheme: light; --ink: #1f2430; --soft: #5b6472; --line: #dfe3ea; --tint: #f5f7fa; --accent: #2456a6; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); }
body { max-width: 68rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.9rem; line-height: 1.2; }
h2 { font-size: 1.3rem; margin-top: 2.6rem; border-bottom: 1px solid var(--line); }
p, li { max-width: 48rem; } .scroll { overflow-x: auto; }
figure { margin: 1.2rem 0; } figcaption { color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; margin: 1rem 0; }
th { text-align: left; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
td, th { padding: .35rem .8rem .35rem 0; vertical-align: top; } td { border-bottom: 1px solid var(--line); }
td.number, .scroll td:first-child { white-space: nowrap; } td.number { text-align: right; }
img.plot { max-width: 100%; height: auto; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(30rem, 1fr)); gap: 1.4rem; }
.sample { display: flex; gap: 1rem; background: var(--tint); padding: .8rem; border-radius: .4rem; font-size: .88rem; }
.sample img { width: 126px; height: 126px; image-rendering: pixelated; flex: none; }
.sample table { margin: 0; font-size: .85rem; } .sample th { border-bottom-width: 1px; }
.right { color: #19713b; } .wrong { color: #b3261e; }
"""


@dataclass(frozen=True)
class Sample:
    """An image (PNG bytes) with lines of (label, text, whether it is right; None for the truth itself)."""

    title: str
    png: bytes
    lines: list[tuple[str, str, bool | None]]


@dataclass(frozen=True)
class _Figure:
    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class _Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Document:
    """Blocks in reading order; the methods add one each, the ``to_`` functions write the whole."""

    title: str
    blocks: list[tuple[str, object]] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.blocks.append(("heading", text))

    def paragraph(self, text: str) -> None:
        self.blocks.append(("paragraph", text))

    def items(self, texts: Sequence[str]) -> None:
        if texts:
            self.blocks.append(("items", list(texts)))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.blocks.append(("table", _Table(head, rows)))

    def figure(self, name: str, caption: str, png: bytes) -> None:
        self.blocks.append(("figure", _Figure(name, caption, png)))

    def samples(self, samples: Sequence[Sample]) -> None:
        self.blocks.append(("samples", list(samples)))

    def write_markdown(self, path: Path) -> None:
        """Write the Markdown file, and its pictures into the folder ``figures`` beside it."""
        folder = path.parent / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        parts = [f"# {self.title}"]
        for kind, content in self.blocks:
            parts.append(_MARKDOWN[kind](content, folder))
        write_text(path, "\n\n".join(parts) + "\n")

    def write_html(self, path: Path) -> None:
        """Write one HTML file that needs no other: style and pictures are inside."""
        body = "\n".join(_HTML[kind](content) for kind, content in self.blocks)
        write_text(
            path,
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head>\n"
            f"<body><h1>{escape(self.title)}</h1>\n{body}\n</body></html>\n",
        )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in plain text too; columns of numbers are right-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    numeric = _numeric_columns(rows, len(head))

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width - 1) + ":") if right else "-" * width for width, right in zip(widths, numeric, strict=True)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def _numeric_columns(rows: Sequence[Sequence[str]], columns: int) -> list[bool]:
    def is_number(cell: str) -> bool:
        return cell[:1].isdigit() or cell[:1] in "+-−–" or not cell

    return [bool(rows) and all(is_number(row[column]) for row in rows) for column in range(columns)]


def _markdown_figure(figure: _Figure, folder: Path) -> str:
    with replacing(folder / f"{figure.name}.png") as temporary:
        temporary.write_bytes(figure.png)
    return f"![{figure.caption}](figures/{figure.name}.png)\n\n{figure.caption}"


def _markdown_samples(samples: list[Sample], folder: Path) -> str:
    parts = []
    for number, sample in enumerate(samples):
        name = f"sample-{number:02d}.png"
        with replacing(folder / name) as temporary:
            temporary.write_bytes(sample.png)
        marks = {True: "right", False: "wrong", None: ""}
        rows = [(label, text, marks[right]) for label, text, right in sample.lines]
        parts.append(f"![{sample.title}](figures/{name})\n\n{markdown_table((sample.title, '', ''), rows)}")
    return "\n\n".join(parts)


_MARKDOWN = {
    "heading": lambda text, folder: f"## {text}",
    "paragraph": lambda text, folder: text,
    "items": lambda texts, folder: "\n".join(f"- {text}" for text in texts),
    "table": lambda table, folder: markdown_table(table.head, table.rows),
    "figure": _markdown_figure,
    "samples": _markdown_samples,
}


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _html_table(table: _Table) -> str:
    numeric = _numeric_columns(table.rows, len(table.head))
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = "\n".join(
        "<tr>"
        + "".join(
            f'<td class="number">{escape(cell)}</td>' if right else f"<td>{escape(cell)}</td>"
            for cell, right in zip(row, numeric, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>\n{rows}</table></div>'


def _html_sample(sample: Sample) -> str:
    looks = {True: ("right", " ✓"), False: ("wrong", " ✗"), None: ("", "")}  # not by colour alone
    rows = "".join(
        f'<tr><th>{escape(label)}</th><td class="{looks[right][0]}">{escape(text)}{looks[right][1]}</td></tr>'
        for label, text, right in sample.lines
    )
    picture = f'<img src="{_inline(sample.png)}" alt="{escape(sample.title)}">'
    return f'<div class="sample">{picture}<table>{rows}</table></div>'


_HTML = {
    "heading": lambda text: f"<h2>{escape(text)}</h2>",
    "paragraph": lambda text: f"<p>{escape(text)}</p>",
    "items": lambda texts: "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>",
    "table": _html_table,
    "figure": lambda figure: (
        f'<figure><img class="plot" src="{_inline(figure.png)}" alt="{escape(figure.caption)}">'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    ),
    "samples": lambda samples: f'<div class="samples">{"".join(map(_html_sample, samples))}</div>',
}
