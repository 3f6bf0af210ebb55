"""The demo's report: what was run, what came out (better or worse), and how it was chosen."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routingvl.demo import plots
from routingvl.demo.document import Document, Sample, markdown_table
from routingvl.demo.jobs import Record
from routingvl.demo.search import against_none, at_the_edge, best_rates, is_blind, summarise, variant_of
from routingvl.demo.variants import (
    FEWER_ROUTINGS,
    METHOD_TITLES,
    SCORES,
    VARIANTS,
    DemoSettings,
    Variant,
    settings_to_dict,
)

COLUMNS = {"caption": ("CIDEr", "BLEU-4", "exact"), "vqa": ("accuracy",)}
DIGITS = {"CIDEr": 2, "BLEU-4": 3, "exact": 3, "accuracy": 1}
NOTHING = "–"
UNSEARCHED = "no search yet"
SHOWN_IMAGES = 8

Panel = tuple[str, str, bool]
TASK_TITLES = {"caption": "Captioning", "vqa": "VQA"}


@dataclass(frozen=True)
class Report:
    """Paths of the written report, and its main table as plain text."""

    html: Path
    markdown: Path
    table: str


def panel_title(panel: Panel) -> str:
    """Name of a group of variants that are compared with each other."""
    task, method, prefix = panel
    return f"{TASK_TITLES[task]}, {METHOD_TITLES[method]}{'' if prefix else ', no prefix'}"


def full_title(variant: Variant) -> str:
    """A variant's name outside of its panel."""
    return f"{panel_title(variant.panel)} {variant.routing}"


@dataclass(frozen=True)
class _Results:
    """This run and the committed search, by variant in reading order."""

    current: dict[Variant, Record]
    searched: dict[Variant, dict[str, Any]]

    @property
    def panels(self) -> dict[Panel, list[Variant]]:
        grouped: dict[Panel, list[Variant]] = {}
        for variant in VARIANTS:
            if variant in self.searched or variant in self.current:
                grouped.setdefault(variant.panel, []).append(variant)
        return grouped


def write_report(
    work: Path,
    *,
    settings: DemoSettings,
    mode: str,
    records: Iterable[Record],
    committed: Mapping[str, Any],
    quality: Mapping[str, Any],
    environment: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> Report:
    """Write ``report.md`` and ``report.html`` into ``work``, and ``figures/`` for the former.

    Args:
        work: the demo's folder, with the data whose images are shown.
        settings: what this run was made with.
        mode: "quick", "default" or "full".
        records: this run's results.
        committed: a search result (see :func:`routingvl.demo.search.load_search`).
        quality: of the backbones, as ``build_backbones`` returns it.
        environment: as ``routingvl.environment.environment`` returns it.
        seconds: wall time of "data", "backbones" and "all".
    """
    results = _Results(at_best_rate(records), summarise(committed["runs"], [s for c in COLUMNS.values() for s in c]))
    document = Document("routingvl demo: what routing functions gain, and where they do not")
    _introduce(document, mode, settings, committed, results)
    prefixed = {panel: members for panel, members in results.panels.items() if panel[2]}
    _compare(document, prefixed, results)
    _draw(document, results)
    _no_prefix(document, results)
    _show_samples(document, work, results)
    _costs(document, results, seconds)
    _backbones(document, quality)
    _provenance(document, settings, committed, environment)
    report = Report(work / "report.html", work / "report.md", markdown_table(*_overview(results)))
    document.write_markdown(report.markdown)
    document.write_html(report.html)
    return report


def at_best_rate(records: Iterable[Record]) -> dict[Variant, Record]:
    """One record per variant, in reading order: the first seed at the rate with the best validation score."""
    records = list(records)
    best = best_rates(records)
    chosen: dict[Variant, Record] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        variant = variant_of(record)
        if record["lr"] == best[variant]:
            chosen.setdefault(variant, record)
    return {variant: chosen[variant] for variant in VARIANTS if variant in chosen}


def _introduce(
    document: Document, mode: str, settings: DemoSettings, committed: Mapping[str, Any], results: _Results
) -> None:
    size = {
        "quick": "This is the quick size: without routing and with mul only.",
        "default": "This is the default size: every variant once, at the rate that the committed search found.",
        "full": "This is the full search: every variant at every learning rate, then two more seeds at its best.",
    }[mode]
    document.paragraph(
        "A small frozen ViT sees coloured shapes on a 3 x 3 grid; a small frozen GPT-2 describes them and a small "
        "frozen RoBERTa answers questions about them. Only low-rank bottlenecks (LoRA or Adapters), LayerNorms, "
        "adapted biases and the answer head train. The variants differ in one thing: the routing function that mixes "
        f"the image into the bottleneck (arXiv 2403.09377). {size}"
    )
    document.paragraph(
        f"Every variant of a task has the same data, backbones, rank ({settings.rank}), batch "
        f"({_per_task(settings.batch)}), steps ({_per_task(settings.steps)}) and learning rates to choose from. The "
        "rate is chosen on validation images, the scores are on test images. 'Search' columns are mean ± standard "
        "deviation over the seeds of the committed search; a seed varies the bottlenecks' initial values and the order "
        "of examples, while data and backbones stay the same."
    )
    if committed["settings"] != settings_to_dict(settings):
        document.paragraph(
            "Note: this run's settings differ from those of the committed search, so the two do not compare."
        )
    if unsearched := [variant for variant in results.current if variant not in results.searched]:
        names = "; ".join(f"{full_title(v)} at {results.current[v]['lr']:g}" for v in unsearched)
        document.paragraph(
            f"Note: the committed search has not tried {names}. They ran at the default rate of their task, which may "
            "not suit them; `routingvl demo --full` searches."
        )


def _per_task(values: Mapping[str, int]) -> str:
    return ", ".join(f"{task} {value}" for task, value in values.items())


def _compare(document: Document, panels: Mapping[Panel, list[Variant]], results: _Results) -> None:
    document.heading("Results")
    document.items([line for panel, members in panels.items() for line in _verdicts(panel, members, results)])
    for panel, members in panels.items():
        document.paragraph(f"{panel_title(panel)}:")
        document.table(*_panel_table(panel, members, results))
    document.paragraph(
        "CIDEr is at most about 10 here, BLEU-4 and 'exact' (share of captions that equal a reference word for "
        "word) at most 1, VQA accuracy is in percent. 'Against none' compares search means; 'ranges apart' says that "
        "every seed of one lies beyond every seed of the other, 'overlap' that the seeds do not tell them apart. Under "
        "'another's image' each test example of this run saw the image of another: what it loses there is what it owes "
        "to its image."
    )


def _verdicts(panel: Panel, members: Sequence[Variant], results: _Results) -> list[str]:
    """One plain sentence per panel: which routing functions are better, worse, or not told apart in the search."""
    groups: dict[str, list[str]] = {"better than none": [], "worse than none": [], "not told apart from none": []}
    for variant in members:
        if comparison := against_none(variant, results.searched):
            better, worse, unclear = groups.values()
            group = unclear if not comparison.apart else better if comparison.gain > 0 else worse
            group.append(f"{variant.routing} ({100 * comparison.gain:+.1f} %)")
    parts = [f"{kind}: {', '.join(names)}" for kind, names in groups.items() if names]
    return [f"{panel_title(panel)}, {SCORES[panel[0]]} in the search: {'; '.join(parts)}."] if parts else []


def _panel_table(panel: Panel, members: Sequence[Variant], results: _Results) -> tuple[list[str], list[list[str]]]:
    scores = COLUMNS[panel[0]]
    head = ["variant", "rate", *(f"{score}, this run" for score in scores), f"{scores[0]}, another's image"]
    head += [*(f"{score}, search" for score in scores), "seeds", "against none"]
    rows = []
    for variant in members:
        record, found = results.current.get(variant), results.searched.get(variant)
        row = [variant.title, f"{(record or found)['lr']:g}"]
        row += [_number(record["test"][score], score) if record else NOTHING for score in scores]
        row.append(_control(record, scores[0]))
        row += [_spread(found, score) if found else UNSEARCHED for score in scores]
        row += [str(found["n"]) if found else NOTHING, str(against_none(variant, results.searched) or NOTHING)]
        rows.append(row)
    return head, rows


def _number(value: float, score: str) -> str:
    return f"{value:.{DIGITS[score]}f}"


def _control(record: Record | None, score: str) -> str:
    """The score with the images of other examples; records of earlier versions have none."""
    return _number(record["shuffled"][score], score) if record and "shuffled" in record else NOTHING


def _spread(found: Mapping[str, Any], score: str) -> str:
    std = found["std"][score]
    mean = _number(found["mean"][score], score)
    return mean if std is None else f"{mean} ± {_number(std, score)}"


def _overview(results: _Results) -> tuple[list[str], list[list[str]]]:
    """The table for the terminal: every variant of this run beside the search, by its main score."""
    rows = []
    for panel, members in results.panels.items():
        score = SCORES[panel[0]]
        for variant in members:
            if record := results.current.get(variant):
                found = results.searched.get(variant)
                searched = _spread(found, score) if found else UNSEARCHED
                rows.append([full_title(variant), score, _number(record["test"][score], score), searched])
    return ["variant", "score", "this run", "search (mean ± std)"], rows


def _draw(document: Document, results: _Results) -> None:
    bars, curves = {}, {}
    for panel, members in results.panels.items():
        score = SCORES[panel[0]]
        title = panel_title(panel)
        bars[title] = (score, {v.routing: _bar(v, score, results) for v in members})
        lines = {v.routing: results.current[v]["curve"] for v in members if v in results.current}
        if lines:
            curves[title] = (score, lines)
    document.heading("Pictures")
    caption = "Test scores. Bars are means of the committed search, dots its seeds, black diamonds this run."
    document.figure("scores", caption, plots.bars(bars))
    document.figure("curves", "Validation score while training, this run.", plots.curves(curves))


def _bar(variant: Variant, score: str, results: _Results) -> tuple[list[float], float | None]:
    found, record = results.searched.get(variant), results.current.get(variant)
    return (found["values"][score] if found else []), (record["test"][score] if record else None)


def _no_prefix(document: Document, results: _Results) -> None:
    panels = {panel: members for panel, members in results.panels.items() if not panel[2]}
    if not panels:
        return
    document.heading("Without the visual prefix: routing is the only way in for the image")
    document.paragraph(
        "Here the image does not stand in front of the text, so without routing the model is blind by construction and "
        "can only write a likely caption. This is no fair contest for it; the panel shows how much of the image each "
        "routing function carries on its own."
    )
    for panel, members in panels.items():
        head, rows = _panel_table(panel, members, results)
        blind = {variant.title for variant in members if is_blind(variant)}
        document.table(head, [[f"{row[0]} (blind)" if row[0] in blind else row[0], *row[1:]] for row in rows])


def _show_samples(document: Document, work: Path, results: _Results) -> None:
    from routingvl.data.coco import load_captions
    from routingvl.data.vqa import load_vqa

    references = load_captions(work / "annotations", "test").references
    split = load_vqa(work / "annotations", "test")
    asked: dict[int, list[Any]] = {}
    for question in split.questions:
        asked.setdefault(question.image_id, []).append(question)
    shown = [variant for variant in results.current if variant.routing in FEWER_ROUTINGS and variant.prefix]
    samples = []
    for image_id in sorted(references)[:SHOWN_IMAGES]:
        lines: list[tuple[str, str, bool | None]] = [("truth", references[image_id][0], None)]
        for variant in (v for v in shown if v.task == "caption"):
            text = results.current[variant]["predictions"].get(str(image_id))
            if text is not None:
                lines.append((variant.title, text, text in references[image_id]))
        for question in asked.get(image_id, [])[:2]:
            truth = question.answers[0]
            lines.append((question.text, truth, None))
            for variant in (v for v in shown if v.task == "vqa"):
                answer = results.current[variant]["predictions"].get(str(question.question_id))
                if answer is not None:
                    lines.append((variant.title, answer, answer == truth))
        samples.append(Sample(f"test image {image_id}", _enlarged(work, image_id), lines))
    document.heading("Test images")
    document.paragraph(
        f"The first {len(samples)} test images, not picked: a true caption, then what this run's models wrote; a "
        "question with its true answer, then what they answered."
    )
    document.samples(samples)


def _enlarged(work: Path, image_id: int, factor: int = 4) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(work / "data" / "Images" / "val2014" / f"COCO_val2014_{image_id:012d}.jpg") as image:
        image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def _costs(document: Document, results: _Results, seconds: Mapping[str, float]) -> None:
    document.heading("Costs")
    rows = []
    for variant, record in results.current.items():
        times = record["seconds"]
        share = f"{100 * record['trainable'] / record['total']:.1f} %"
        rows.append(
            [full_title(variant), f"{record['trainable']:,}", f"{record['total']:,}", share, f"{times['train']:.0f}"]
        )
        rows[-1] += [f"{times['evaluate']:.0f}", f"{times['all']:.0f}"]
    document.table(["variant", "trained", "language model and head", "share", "train s", "evaluate s", "all s"], rows)
    document.paragraph(
        f"Wall time: data {seconds['data']:.0f} s, backbones {seconds['backbones']:.0f} s, everything "
        f"{seconds['all']:.0f} s (runs found finished in the output folder took none of it). Routing functions have no "
        "parameters, so the variants of a method train equally many. 'All' includes encoding every image once."
    )


def _backbones(document: Document, quality: Mapping[str, Any]) -> None:
    document.heading("Backbones")
    document.paragraph(
        "Each was pretrained on one modality, on examples of its own, and is frozen here. The ViT learnt to tell, for "
        "each colour, whether it is there, and its shape, row and column; RoBERTa read questions and GPT-2 captions, "
        "both without images."
    )
    rows = []
    for name, facts in quality.items():
        measures = "; ".join(f"{key} {value:.3f}" for key, value in facts.items() if "accuracy" in key or "loss" in key)
        rows.append([name, f"{facts['parameters']:,}", measures, f"{facts['seconds']:.0f}"])
    document.table(["backbone", "parameters", "held-out quality", "seconds"], rows)


def _provenance(
    document: Document, settings: DemoSettings, committed: Mapping[str, Any], environment: Mapping[str, Any]
) -> None:
    document.heading("How this was chosen, and what it does not show")
    document.items(CANDOUR)
    document.paragraph(f"This run: {_machine(environment)}. Committed search: {_machine(committed['environment'])}.")
    rates = {task: sorted({r["lr"] for r in committed["runs"] if r["variant"]["task"] == task}) for task in SCORES}
    tried = "; ".join(f"{task} {', '.join(f'{lr:g}' for lr in values)}" for task, values in rates.items() if values)
    document.paragraph(
        f"The search has {len(committed['runs'])} runs, at learning rates {tried}; every one, with its scores, curve "
        "and time, is in routingvl/demo/search.json."
    )
    if edge := at_the_edge(committed["runs"]):
        names = "; ".join(map(full_title, edge))
        document.paragraph(
            f"The best rate found lies on the edge of what was tried, so it may not be the best, for: {names}."
        )
    data = settings.data
    document.paragraph(
        f"Data (seed {data.seed}): {data.train_images:,} training, {data.val_images} validation and {data.test_images} "
        f"test images with two captions each; about {data.train_questions:,}, {data.val_questions:,} and "
        f"{data.test_questions:,} questions, in equal shares of type and, within a type, of answer."
    )


CANDOUR = (
    "The task was not drawn blindly. Of two caption designs tried earlier, one (three objects of six colours) was too "
    "hard for every variant in minutes; this one was kept, on which a gain from routing had been seen.",
    "Numbers of steps were set by the time limit, after single runs with more of them: with 800 steps and more images, "
    "LoRA captioning scored the same without routing as with mul (CIDEr 8.96 and 8.94, one seed, one rate).",
    "Scenes are few (3,888 but for jitter and noise), so most test scenes also occur in training, with other pixels.",
    "One set of backbones and one draw of the data: the spread over seeds does not include theirs.",
    "Few steps favour what learns fast. A gain here is a gain at this budget, not at convergence.",
    "Relative gains on this toy say nothing about their size on COCO or VQAv2.",
)


def _machine(environment: Mapping[str, Any]) -> str:
    packages, hardware, git = environment["packages"], environment["hardware"], environment["git"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if packages.get(name))
    commit = f", commit {git['commit'][:10]}{' with changes' if git['dirty'] else ''}" if git else ""
    return (
        f"{environment['time']}, {hardware['cpus']} CPUs, {hardware['platform']}, Python {environment['python']}, "
        f"{versions}{commit}"
    )
