"""Commands on files of one's own: odd names, files that cannot be read, terminals that show ASCII only, full disks."""

import io
import json
import os
import shutil
import sys

import pytest
from test_cli import fails
from tiny import tiny_config

from routingvl.cli import main
from routingvl.train import train

needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for task in ("vqa", "caption", "classify"):
        train(tiny_config(tiny, folder / task, task, max_steps=2, num_beams=1), log="quiet")
    return folder


@pytest.fixture(scope="module")
def images(tiny):
    return [str(path) for path in sorted((tiny / "data" / "val2014").iterdir())]


@pytest.mark.parametrize(("task", "extra"), [("caption", []), ("classify", ["--text", "it is plain"])])
def test_what_can_be_read_is_printed_and_the_rest_named(runs, images, tmp_path, capsys, task, extra):
    bad, gone = tmp_path / "bad.jpg", tmp_path / "gone.jpg"
    bad.write_bytes(b"no image")
    files = [images[0], str(bad), *images[1:6], str(gone)]
    command = ["caption", str(runs / task), "--json"] if task == "caption" else ["predict", str(runs / task)]
    command = [*command, "--eval.batch_size", "3", *extra]
    assert main([*command, "--", *files]) == 2
    output = capsys.readouterr()
    rows = [json.loads(line) for line in output.out.splitlines()]
    assert [row["image"] for row in rows] == images[:6]
    assert [line.split(" cannot ")[0].split(" does ")[0] for line in output.err.splitlines()] == [
        f"routingvl: image {path}" for path in (bad, gone)
    ]
    assert main([*command, "--", *images[:6]]) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(row) for row in again] == [list(row) for row in rows]


def test_file_names_that_could_be_mistaken(runs, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = str(runs / "caption")
    for name in ("--a.jpg", "--debug", "-b.jpg"):
        shutil.copy(images[0], name)
    assert main(["caption", run, "--", "--a.jpg", "-b.jpg", "--debug"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["--a.jpg", "-b.jpg", "--debug"]
    odd = ["two\nlines.jpg", "a\ttab.jpg", os.fsdecode(b"latin\xe9.jpg")]
    for name in odd:
        shutil.copy(images[0], name)
    assert main(["caption", run, *odd, images[0]]) == 0
    output = capsys.readouterr()
    assert [json.loads(line)["image"] for line in output.out.splitlines()] == [*odd, images[0]]
    assert output.err == "routingvl: a file name holds unprintable characters, so the lines are JSON\n"
    assert main(["caption", run, os.fsdecode(b"gone\xe9\n.jpg")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_a_terminal_that_shows_ascii_only(runs, images, tmp_path, monkeypatch):
    name = str(tmp_path / "café.jpg")
    shutil.copy(images[0], name)
    for flags, shown in (([], "caf\\xe9.jpg"), (["--json"], "caf\\u00e9.jpg")):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert main(["caption", str(runs / "caption"), name, *flags]) == 0
        sys.stdout.flush()
        assert shown in raw.getvalue().decode("ascii")
        assert main(["caption", str(runs / "caption"), name + "é"]) == 2
    assert json.loads(raw.getvalue())["image"] == name


def test_a_generated_line_break_stays_in_its_line(runs, images, capsys, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.batch_decode", lambda *_, **__: [" a\nman\triding "])
    assert main(["caption", str(runs / "caption"), images[0]]) == 0
    assert capsys.readouterr().out == f"{images[0]}\ta man riding\n"


@needs_full
def test_standard_output_that_is_full(runs, images, monkeypatch, capsys):
    for command in (["caption", str(runs / "caption"), images[0]], ["predict", str(runs / "caption"), images[0]]):
        full = open("/dev/full", "w")  # noqa: SIM115  (closing it, in the end, is to raise nothing)
        monkeypatch.setattr(sys, "stdout", full)
        assert main(command) == 2
        monkeypatch.undo()
        full.close()
        assert capsys.readouterr().err == "routingvl: [Errno 28] No space left on device: 'standard output'\n"


def test_backbones_that_moved(tiny, runs, images, tmp_path, capsys):
    home = tmp_path / "old"
    shutil.copytree(tiny, home)
    train(tiny_config(home, home / "run", "vqa", max_steps=2), log="quiet")
    run = str(shutil.copytree(home / "run", tmp_path / "run"))
    shutil.move(home, tmp_path / "new")
    vision, text, data = (str(tmp_path / "new" / name) for name in ("vit", "roberta", "data"))
    asked = ["answer", run, images[0], "what color is it?"]
    assert "vision" in fails(capsys, *asked)
    moved = ["--model.vision", vision, "--model.text", text]
    assert main([*asked, *moved]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert main(["predict", run, images[0], *moved, "--text", "what?"]) == 0
    assert main(["export", run, str(tmp_path / "adapter"), *moved]) == 0
    capsys.readouterr()
    assert "data.annotations" in fails(capsys, "evaluate", run, *moved)
    places = ["--data.annotations", data, "--data.images", data]
    assert main(["evaluate", run, "--split", "val", "--quiet", *moved, *places]) == 0
    capsys.readouterr()
    # another backbone in the place, and settings that are fixed
    assert "another text backbone" in fails(capsys, *asked, "--model.vision", vision, "--model.text", change(text))
    assert "model.visual_prefix is fixed" in fails(capsys, *asked, *moved, "--model.visual_prefix", "false")
    assert "unknown flag --data.images" in fails(capsys, "export", run, str(tmp_path / "x"), "--data.images", "y")


def change(folder):
    """The same backbone but for one weight."""
    import torch
    from safetensors.torch import load_file, save_file

    path = f"{folder}/model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("intermediate.dense.weight"))
    tensors[name][13, 7] += 1
    assert torch.isfinite(tensors[name]).all()
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_export_through_a_link(runs, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert main(["export", str(runs / "caption"), str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "adapter_model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "limit=0 must be at least 1"),
        (["--limit", "-1"], "limit=-1 must be at least 1"),
        (["--limit"], "expected one argument"),
        (["--eval.num_beams"], "expected one argument"),
        (["--eval.x", "3"], "unknown flag --eval.x"),
        (["--eval.num_beans", "3"], "unknown flag --eval.num_beans; did you mean '--eval.num_beams'"),
        (["--eval.metrics", "[]"], "--eval.metrics is empty"),
        (["--eval.metrics", "[CIDER]"], "eval.metrics='CIDER' is not one of"),
    ],
)
@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_flags_of_evaluate(runs, capsys, tmp_path, task, flags, message):
    assert message in fails(capsys, "evaluate", str(runs / task), "--output", str(tmp_path / "out"), "--quiet", *flags)
    assert not (tmp_path / "out").exists()


def test_benchmark_refuses_as_all_commands_do(capsys):
    assert "unknown flag --bogus" in fails(capsys, "benchmark", "--bogus")
    assert "invalid choice: 'x'" in fails(capsys, "benchmark", "--suite", "x")


def test_questions_are_one_line_of_utf8(runs, images, capsys):
    run = str(runs / "vqa")
    assert main(["answer", run, images[0], " what color\n\tis it? "]) == 0
    broken = capsys.readouterr().out
    assert main(["answer", run, images[0], "what color is it?"]) == 0
    assert capsys.readouterr().out == broken
    assert "holds bytes that are no UTF-8" in fails(capsys, "answer", run, images[0], os.fsdecode(b"wh\xe4t?"))
    assert "the question is empty" in fails(capsys, "answer", run, images[0], "\n")
