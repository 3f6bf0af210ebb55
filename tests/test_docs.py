"""README and docs against the code: tables that must not drift, links and commands that must exist."""

import re
import shlex
from pathlib import Path

import pytest

from routingvl.cli import COMMANDS
from routingvl.demo.search import load_search, summarise
from routingvl.demo.variants import Variant
from routingvl.kernels.routing import ROUTINGS, routing_table
from routingvl.run_config import known_keys

ROOT = Path(__file__).parent.parent
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
