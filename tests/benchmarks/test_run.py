"""A benchmark run that is stopped keeps what it has measured, and goes on from there."""

import json
from pathlib import Path

import pytest

from routingvl.benchmarks import ceilings, layer_comparison, main, run, suite_run
from routingvl.benchmarks.layer_cases import Case

CASES = (
    Case("first", "lora", B=2, T=3, L=1, K=8, N=8, R=4, routings=("add", "mul"), quick=True),
    Case("second", "adapter", B=2, T=3, L=1, K=8, N=8, R=4, routings=("add",), quick=True),
)
COMMAND = ["--quick", "--provider", "eager", "--repeats", "1", "--dropout", "0"]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Two tiny cases, measured in an environment that can be changed."""
    environment = {"device": "some CPU", "threads": 1, "torch": "2", "commit": "abc1234", "dirty": False}
    monkeypatch.setattr(run, "CASES", CASES)
    monkeypatch.setitem(ceilings.SIZES, "cpu", (2**16, 32, 32, 32))
    monkeypatch.setattr(suite_run, "describe_environment", lambda device, threads: dict(environment))
    return environment


def groups(output: Path) -> list[tuple[str, str]]:
    """Case and routing of every row."""
    return [(row["case"], row["routing"]) for row in map(json.loads, output.read_text().splitlines())]


def test_an_interrupted_run_leaves_whole_cases_and_is_resumed(
    clean: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.jsonl"
    measure = layer_comparison.measure

    def interrupted(case, *args):
        if case.name == "second":
            raise KeyboardInterrupt
        return measure(case, *args)

    monkeypatch.setattr(layer_comparison, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([*COMMAND, "--output", str(output)])
    first = [("first", routing) for routing in ("add", "mul") for _ in range(9)]  # three providers in three modes
    assert groups(output) == first
    monkeypatch.setattr(layer_comparison, "measure", measure)
    assert main([*COMMAND, "--output", str(output), "--resume"]) == 0
    assert groups(output) == first + [("second", "add")] * 6
    printed = capsys.readouterr()
    assert [line for line in printed.err.splitlines() if line.startswith("first")] == [
        *("first add float32 dropout 0 ...", "first mul float32 dropout 0 ..."),
    ]
    assert "| first | mul |" in printed.out  # the table has what was there before too
    assert "| second | add |" in printed.out


@pytest.mark.parametrize(
    "changes", [{"commit": "fff0000"}, {"device": "another CPU"}, {"threads": 2}, {"dirty": True}, {}]
)
def test_only_the_same_thing_counts_as_measured(clean: dict, tmp_path: Path, changes: dict) -> None:
    output = tmp_path / "rows.jsonl"
    command = [*COMMAND, "--case", "second", "--output", str(output), "--resume"]
    clean |= {"dirty": True} if "dirty" in changes else {}
    assert main(command) == 0
    clean |= changes
    assert main(command) == 0
    assert len(groups(output)) == (12 if changes else 6)


def test_what_failed_or_came_too_late_is_measured_again(
    clean: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "rows.jsonl"
    command = [*COMMAND, "--case", "second", "--output", str(output), "--resume"]
    assert main([*command, "--time-limit", "1e-9"]) == 0
    right = layer_comparison.check

    def shut(*args):
        found = right(*args)
        found["eager"].missed.append("y bad")
        return found

    monkeypatch.setattr(layer_comparison, "check", shut)
    assert main(command) == 1
    gates = [json.loads(line)["gate"] for line in output.read_text().splitlines()]
    assert gates == ["skipped", "failed", "passed", "passed", "passed"]
    monkeypatch.setattr(layer_comparison, "check", right)
    assert main(command) == 0
    assert len(groups(output)) == 11


def test_resume_needs_a_file_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.jsonl").write_text('{"case": "f')
    for command, message in (
        ([], "--resume needs --output"),
        (["--output", str(tmp_path / "broken.jsonl")], "broken.jsonl, line 1: not JSON"),
    ):
        with pytest.raises(SystemExit):
            main([*COMMAND, "--resume", *command])
        assert message in capsys.readouterr().err
