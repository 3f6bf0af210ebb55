"""README and docs against the code: tables that must not drift, links and commands that must exist."""

import json
import re
import shlex
from pathlib import Path

import pytest

from routingvl.benchmarks.providers import COMPETITORS
from routingvl.cli import COMMANDS
from routingvl.config.schema import known_keys
from routingvl.demo.search import load_search, summarise
from routingvl.demo.variants import Variant
from routingvl.kernels.routing import ROUTINGS, routing_table

ROOT = Path(__file__).parent.parent
TRAINING = {"cpu_training": "Intel Xeon", "cpu_training_amd": "AMD EPYC"}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_shows_the_routing_table():
    text = (ROOT / "README.md").read_text()
    found = re.search(r"<!-- routing table.*?-->\n(.*?)\n<!-- end", text, re.DOTALL)
    assert found is not None
    assert found[1] == routing_table()


def test_readme_flag_table_names_settings_that_exist():
    text = (ROOT / "README.md").read_text().split("### From the published flags to ours")[1].split("\n## ")[0]
    named = set(re.findall(r"`((?:routing|model|train|data)\.\w+)", text))
    assert len(named) >= 10
    assert named <= set(known_keys())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^\s*routingvl ([a-z].*)$", text, re.MULTILINE):
        command = shlex.split(line, comments=True)[0]
        assert command in COMMANDS, f"{page.name}: routingvl {command}"


def test_readme_shows_the_numbers_of_the_committed_search():
    found = summarise(load_search()["runs"], ("CIDEr", "accuracy"))
    text = (ROOT / "README.md").read_text()
    panels = {"captioning, LoRA, CIDEr": ("caption", "lora", True), "VQA, LoRA, accuracy %": ("vqa", "lora", True)}
    panels |= {"captioning, Adapter, CIDEr": ("caption", "adapter", True)}
    panels |= {"captioning, LoRA, no visual prefix, CIDEr": ("caption", "lora", False)}
    for label, panel in panels.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
        cells = [cell.strip(" *") for cell in row.split("|")[2:-1]]
        score, digits = ("CIDEr", 2) if panel[0] == "caption" else ("accuracy", 1)
        for routing, cell in zip(ROUTINGS, cells, strict=True):
            variant = Variant(panel[0], panel[1], routing, panel[2])
            if not cell:
                assert variant not in found
                continue
            mean, std = found[variant]["mean"][score], found[variant]["std"][score]
            assert cell.removesuffix(" (blind)") == f"{mean:.{digits}f} ± {std:.{digits}f}", f"{label}, {routing}"


RANK_ONE = ("expand", "vllora")
LAYERS = {
    "RoBERTa-base LoRA, r 128, M 1280": "roberta_lora_m1280",
    "768-wide LoRA, r 128, M 2040": "linear_lora_m2040",
    "GPT-2 c_attn LoRA, r 128, M 2040": "gpt2_lora_m2040",
    "GPT-2 Adapter, r 128, M 2040": "gpt2_adapter_m2040",
    "RoBERTa Adapter, r 64, M 1280": "roberta_adapter_m1280",
}


def measured_layers(file: str) -> dict[tuple[str, str, str], float]:
    """Milliseconds of forward and backward pass by case, routing and provider; one thread, no dropout."""
    path = ROOT / "benchmarks" / "results" / f"{file}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert not [row for row in rows if row["gate"] == "failed" and row["provider"] not in COMPETITORS]
    timed = [row for row in rows if row["gate"] == "passed" and row.get("dropout", 0) == 0]
    counted = [row for row in timed if row["mode"] == "fwdbwd" and row["threads"] == 1]
    return {(row["case"], row["routing"], row["provider"]): row["ms_p50"] for row in counted}


@pytest.mark.parametrize(("file", "of"), [("cpu_layers", ""), ("cpu_layers_amd", ", AMD EPYC")])
def test_readme_shows_the_speed_of_the_committed_measurement(file, of):
    ms = measured_layers(file)
    table = (ROOT / "README.md").read_text().split(f"| forward + backward, float32{of} |")[1].split("\n\n")[0]
    shown = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in table.splitlines()[2:]}
    assert set(LAYERS) <= set(shown)
    for label, case in LAYERS.items():
        ratios = [ms[case, routing, "reference"] / ms[case, routing, "eager"] for routing in ROUTINGS]
        assert [cell.strip() for cell in shown[label]] == [f"{ratio:.2f}" for ratio in ratios], label


def test_readme_shows_the_time_above_the_frozen_layer():
    ms, case = measured_layers("cpu_layers"), "linear_lora_m2040"
    above = [[ms[case, name, who] - ms[case, name, "base"] for name in ROUTINGS] for who in ("reference", "eager")]
    cells = " | ".join(f"{theirs / ours:.2f}" for theirs, ours in zip(*above, strict=True))
    assert f"| 768-wide LoRA, time above the frozen layer | {cells} |" in (ROOT / "README.md").read_text()


def test_readme_shows_the_time_of_a_layer_on_the_second_cpu():
    ms = measured_layers("cpu_layers_amd")
    layer = {(name, who): round(ms["linear_lora_m2040", name, who]) for name in ROUTINGS for who in ("base", "eager")}
    dense, rank_one = ([layer[name, "eager"] for name in names] for names in (("none", "add", "mul"), RANK_ONE))
    words = " ".join((ROOT / "README.md").read_text().split())
    assert {layer[name, "base"] for name in ROUTINGS} == {44}
    assert f"takes {min(dense)} to {max(dense)} ms with none, add and mul, {min(rank_one)} with expand" in words
    assert max(rank_one) == min(rank_one)
    assert "and 44 without a bottleneck, in torch" in words


def test_readme_shows_the_speed_with_fresh_pages():
    path = ROOT / "benchmarks" / "results" / "cpu_layers_fresh_pages.jsonl"
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row.get("mode") == "fwdbwd"]
    rows = [row for row in rows if row.get("dropout", 0) == 0]
    ms = {(row["routing"], row["provider"]): row["ms_p50"] for row in rows}
    text = (ROOT / "README.md").read_text()
    line = next(row for row in text.splitlines() if row.startswith("| RoBERTa-base LoRA, r 128, M 1280, fresh pages |"))
    assert [cell.strip() for cell in line.split("|")[2:-1]] == [
        f"{ms[routing, 'reference'] / ms[routing, 'eager']:.2f}" for routing in ROUTINGS
    ]


def test_readme_shows_the_speed_of_whole_models():
    path = ROOT / "benchmarks" / "results" / "cpu_models.jsonl"
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["gate"] == "passed"]
    found = {(row["case"], row["routing"], row["provider"], row["mode"]): row for row in rows}
    text = (ROOT / "README.md").read_text()
    for case, name in (("roberta_step_b32", "RoBERTa-base, batch 32"), ("gpt2_step_b8", "GPT-2, batch 8")):
        times = [
            [found[case, routing, who, "fwdbwd"]["ms_p50"] for who in ("reference", "eager")] for routing in ROUTINGS
        ]
        cells = " | ".join(f"{theirs / ours:.2f}" for theirs, ours in times)
        assert f"| ViT-B/16 + {name} | {cells} |" in text
    written = [found["gpt2_generate_b8", "add", who, "generate"]["captions_s"] for who in ("reference", "eager")]
    assert f"15 tokens): {written[0]:.2f} a second published, {written[1]:.2f} ours" in text


def measured_training(file: str) -> dict[str, dict]:
    path = ROOT / "benchmarks" / "results" / f"{file}.jsonl"
    return {row["case"]: row for row in map(json.loads, path.read_text().splitlines())}


@pytest.mark.parametrize(("file", "cpu"), TRAINING.items())
def test_readme_shows_the_training_throughput_of_the_committed_measurement(file, cpu):
    text = (ROOT / "README.md").read_text()
    for case, name in (
        ("vqa", "ViT-B/16 + RoBERTa-base, VQA, batch 32"),
        ("caption", "ViT-B/16 + GPT-2, captions, batch 8"),
    ):
        row = measured_training(file)[f"training_{case}"]
        assert row["gate"] == "passed"
        sides = ("float32", "bfloat16", "float32_compiled", "bfloat16_compiled")
        ours = [f"{row[f'{side}_examples_s']:.1f} ({row[f'{side}_speedup']:.1f}x)" for side in sides]
        assert f"| {name}, {cpu} | {row['published_examples_s']:.1f} | {' | '.join(ours)} |" in text


def test_readme_shows_the_memory_of_the_committed_measurement():
    row = measured_training("cpu_training")["training_caption"]
    steps = [round(row[f"{side}_step_mib"]) for side in ("published", "float32", "bfloat16")]
    peaks = [round(row[f"{side}_process_mib"]) for side in ("published", "float32", "bfloat16")]
    words = " ".join((ROOT / "README.md").read_text().split())
    assert f"come to {steps[0]} MiB in the published step, {steps[1]} in ours ({steps[2]} in bfloat16)" in words
    assert f"the whole process to {peaks[0]} MiB, {peaks[1]} and {peaks[2]}" in words


def test_readme_shows_the_rates_of_the_second_cpu():
    path = ROOT / "benchmarks" / "results" / "cpu_ceilings_amd.jsonl"
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["ceiling"] == "matmul"]
    rates = {row["dtype"]: row["tflop_s"] for row in rows}
    words = " ".join((ROOT / "README.md").read_text().split())
    assert f"float32 at {rates['float32']:.2f} TFLOP/s, in bfloat16 at {rates['bfloat16']:.2f} (" in words


def test_training_page_says_what_compiling_gained():
    gains = {}
    for file in TRAINING:
        for case, row in measured_training(file).items():
            for dtype in ("bfloat16", "float32"):
                gains[file, case, dtype] = row[f"{dtype}_compiled_examples_s"] / row[f"{dtype}_examples_s"]
    half = {key[:2]: f"{gain:.2f}" for key, gain in gains.items() if key[2] == "bfloat16"}
    words = " ".join((ROOT / "docs" / "training.md").read_text().split())
    xeon, epyc = ([half[file, f"training_{case}"] for case in ("vqa", "caption")] for file in TRAINING)
    assert f"were {xeon[0]} times as fast for questions and {xeon[1]} times for captions" in words
    assert f"on an AMD EPYC {epyc[0]} and {epyc[1]} times" in words
    assert f"in float32 at most {max(gain for key, gain in gains.items() if key[2] == 'float32'):.2f} times" in words
