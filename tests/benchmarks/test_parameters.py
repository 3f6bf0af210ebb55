"""The table of parameters in docs/layers.md: what the command writes, and numbers counted by hand."""

import pytest

from routingvl.benchmarks import parameters
from routingvl.benchmarks.parameters import KINDS, LORA, MODELS, equal_rank, lora_parameters


def test_the_page_is_what_the_command_writes(tmp_path, monkeypatch):
    right = parameters.PAGE.read_text(encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(right.replace("4,718,592", "1"))
    monkeypatch.setattr(parameters, "PAGE", page)
    assert parameters.main(["--check"]) == 1
    assert parameters.main([]) == 0
    assert page.read_text(encoding="utf-8") == right
    assert parameters.main(["--check"]) == 0


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_counts_by_hand(model):
    groups, d, r = 2 // model.each, 768, 128
    narrow, wide, up = groups * r // 4, groups * r, groups * d * r
    hand = {
        LORA: wide * d + up,
        '`image_projection="own"`': 2 * wide * d + up,
        '`two_step="before"`': 2 * narrow * d + 2 * wide * narrow + up,
        '`two_step="after"`': 2 * narrow * d + wide * narrow + up,
        '`two_step="residual"`': 2 * narrow * d + wide * narrow + 2 * narrow + up,
        '`routing="attention"`': 2 * narrow * d + 4 * narrow**2 + wide * narrow + up,
    }
    assert hand.keys() == KINDS.keys()
    for name, options in KINDS.items():
        assert lora_parameters(model, r, options) == 12 * model.each * hand[name], name
    budget = lora_parameters(model, r, KINDS[LORA])
    for options in KINDS.values():
        rank = equal_rank(model, budget, options)
        step = 16 if options["routing"] == "attention" else 4
        assert lora_parameters(model, rank, options) <= budget < lora_parameters(model, rank + step, options)
