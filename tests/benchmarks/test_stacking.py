"""The comparison of stacked with per-layer projections: its rows, and its gate."""

import json

import pytest
import torch

from routingvl import kernels
from routingvl.benchmarks import stacking
from routingvl.bottlenecks import layers

QUICK = ["--quick", "--repeats", "2", "--rank", "4", "--routing", "vllora"]


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_rows_and_messages(tmp_path, capsys, method):
    assert stacking.main([*QUICK, "--method", method, "--output", str(tmp_path / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == ["stacking_vqa", "stacking_caption", "stacking_generate"]
    assert all(row["gate"] == "passed" and row["gain_p20"] <= row["gain_p50"] <= row["gain_p80"] for row in rows)
    assert f"vqa vllora: {rows[0]['stacked_ms_p50']} ms stacked" in capsys.readouterr().out


@pytest.mark.parametrize("task", list(stacking.TASKS))
def test_a_wrong_projection_shuts_the_gate(tmp_path, capsys, monkeypatch, task):
    def spoiled(*args, **options):
        codes = kernels.project_lora_images(*args, **options)
        return [
            kernels.ImageCode(-1e4 * c.u, None if c.factors is None else (c.factors[0], -1e4 * c.factors[1]))
            for c in codes
        ]

    monkeypatch.setattr(layers, "project_lora_images", spoiled)
    assert stacking.main([*QUICK, "--task", task, "--output", str(tmp_path / "rows.jsonl")]) == 1
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["gate"] == "failed"
    assert "gain_p50" not in row
    assert "not timed" in capsys.readouterr().out


def test_both_ways_really_differ():
    """Stacked, nothing is projected inside the layers; layer by layer, everything is."""
    model = stacking.trained_model("vqa", "tiny", stacking.RoutingConfig(routing="add", rank=4))
    features = torch.randn(2, 1, model.vision_width)
    for stacked in (True, False):
        model.context.stacked = stacked
        with model.context.bind(features):
            held = [m.prepared_image(features) is not None for m in model.modules() if hasattr(m, "prepared_image")]
        assert held == [stacked] * len(held)
        assert held
