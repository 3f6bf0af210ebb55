"""docs/models.md: that it is what ``make models`` prints today, and a few of its trials in every run of the tests."""

from pathlib import Path

import pytest
import torch
from model_trials import Differs, compare, families, page, said, towers, vlms, writers

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
CORE = [
    *(("families", "gpt2", way) for way in ("LoRA, its own places", "adapters", "LoRA by PEFT")),
    *(("families", kind, "LoRA, named") for kind in ("llama", "t5", "deberta-v2")),
    ("towers", "clip", "tokens"),
    ("towers", "resnet", "pooler"),
    ("writers", "bart", "LoRA, encoder"),
    ("writers", "t5", "adapters, encoder_tokens"),
    ("vlms", "llava, inject", "mul"),
    ("vlms", "qwen2_vl, PEFT", "vllora"),
]


@pytest.mark.parametrize("cell", CORE, ids=" ".join)
def test_core(cell):
    part, row, column = cell
    trials = {"families": families, "towers": towers, "writers": writers, "vlms": vlms}[part]()
    assert said(trials[row][column]) == "yes"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_page_is_what_the_trials_come_to():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_a_trial_says_why():
    def refused(folder):
        raise ValueError(f"{folder}/x does not fit; give another\nfor this")

    assert said(refused) == "DIR/x does not fit"
    ones = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with pytest.raises(Differs, match="other numbers"):
        compare(*ones, lambda model, image: [model.weight])
    with pytest.raises(Differs, match="changes nothing"):
        compare(ones[0], ones[0], lambda model, image: [model.weight])
