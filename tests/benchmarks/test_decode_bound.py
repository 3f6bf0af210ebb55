"""The bound on what a faster bottleneck could gain in generation: its row, and its gate."""

import json

import torch

from routingvl.benchmarks import decode_bound

QUICK = ["--quick", "--repeats", "2", "--tokens", "3", "--batch", "2", "--beams", "2", "--rank", "4"]


def test_row_and_message(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert decode_bound.main([*QUICK, "--output", str(tmp_path / "rows.jsonl")]) == 0
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["gate"] == "passed"
    assert (row["B"], row["beams"], row["R"], row["clock"]) == (2, 2, 4, "cpu")
    assert row["bound_p20"] <= row["bound_p50"] <= row["bound_p80"]
    assert f"more than {row['bound_p50']}x" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_the_bare_side_has_no_bottleneck_and_the_same_weights():
    models = decode_bound.build_models("tiny", "mul", 4)
    routed, bare = (dict(model.named_parameters()) for model in models.values())
    assert set(routed) - set(bare) == {name for name in routed if "lora_" in name}
    assert all(torch.equal(bare[name], routed[name]) for name in bare)


def test_different_captions_shut_the_gate(tmp_path, capsys, monkeypatch):
    build = decode_bound.build_models

    def spoiled(*args):
        models = build(*args)
        with torch.no_grad():
            for name, parameter in models["routed"].named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(std=10)
        return models

    monkeypatch.setattr(decode_bound, "build_models", spoiled)
    assert decode_bound.main([*QUICK, "--output", str(tmp_path / "rows.jsonl")]) == 1
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["gate"] == "failed"
    assert "bound_p50" not in row
    assert "nothing was timed" in capsys.readouterr().err
