"""The comparison of training steps with PEFT's own LoRA."""

import json

import pytest
import torch

pytest.importorskip("peft.tuners")

from benchmarks import peft_steps


def test_a_quick_run_writes_a_row_for_each_model(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    threads = str(torch.get_num_threads())
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--rounds", "1", "--threads", threads, "--output", str(path)])
    peft_steps.main()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["model"] for row in rows] == ["gpt2", "llama"]
    for row in rows:
        assert row["difference"] <= 1e-5
        assert row["none_speed"] == pytest.approx(row["peft_ms"] / row["none_ms"], rel=1e-2)
        assert min(row["peft_ms"], row["mul_ms"]) > 0


def test_another_result_than_pefts_is_not_timed(monkeypatch):
    args = peft_steps.build_parser().parse_args(["--quick"])
    monkeypatch.setattr(peft_steps, "RANK", 3)
    adapted = peft_steps.adapted

    def changed(kind, side, args):
        model, width = adapted(kind, side, args)
        if side == "none":
            with torch.no_grad():
                next(weight for weight in model.parameters() if weight.requires_grad).mul_(1.01)
        return model, width

    monkeypatch.setattr(peft_steps, "adapted", changed)
    with pytest.raises(RuntimeError, match="gpt2: routing none differs from PEFT's LoRA"):
        peft_steps.check_same("gpt2", args)
