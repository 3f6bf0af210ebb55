"""The command line: speed and completeness of its help, exit statuses, messages, and every command on a tiny run."""

import json
import os
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
import torch.distributed as dist
from processes import needs_gloo
from tiny import tiny_config

from routingvl.cli import COMMANDS, main
from routingvl.commands import doctor
from routingvl.config.files import config_to_yaml
from routingvl.train import train


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for task, routing in (("vqa", "none"), ("caption", "mul")):
        settings = {"max_steps": 8, "routing.routing": routing, "num_beams": 1}
        train(tiny_config(tiny, folder / task, task, **settings), log="quiet")
    return folder


def fails(capsys, *args):
    """The message of a command that must end with status 2 and one line on stderr."""
    assert main(list(args)) == 2
    output = capsys.readouterr()
    assert output.err.startswith("routingvl: ")
    assert output.err.count("\n") == 1
    assert output.out == ""
    return output.err


def test_help_is_quick_and_loads_no_torch():
    check = "import sys; from routingvl.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "routingvl", "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1
    for name in COMMANDS:
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    try:
        status = main([command, "--help"])
    except SystemExit as end:  # argparse leaves this way
        status = end.code
    assert not status
    assert "example" in capsys.readouterr().out


def test_bare_and_unknown_commands(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out
    assert "unknown command 'evalute'; did you mean 'evaluate'" in fails(capsys, "evalute")
    assert "routingvl --help" in fails(capsys, "xyzzy")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("routingvl ")


def test_bad_flags(capsys, runs):
    assert "unknown flag --train.lrr; did you mean '--train.lr'" in fails(capsys, "train", "--train.lrr", "3")
    assert "unknown flag --quite; did you mean '--quiet'" in fails(capsys, "train", "--quite")
    assert fails(capsys, "caption", "x", "y", "--quite").startswith("routingvl: caption: unknown flag --quite")
    assert "unknown flag --splt; did you mean '--split'" in fails(capsys, "evaluate", str(runs / "vqa"), "--splt", "x")
    run = str(runs / "vqa")
    assert "did you mean '--eval.num_beams'" in fails(capsys, "evaluate", run, "--eval.num_beem", "2")
    assert "routing.rank is fixed" in fails(capsys, "evaluate", run, "--routing.rank", "2")
    assert "has no config.yaml" in fails(capsys, "train", "--resume", "nowhere")
    assert "belongs to prepare-data vqa" in fails(
        capsys, "prepare-data", "coco", "--dataset_coco", "x", "--output", "y", "--questions", "z"
    )


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match=r"train.lrr"):
        main(["train", "--train.lrr", "3", "--debug"])


@pytest.mark.slow
@needs_gloo
def test_two_processes_train_from_the_command_line(tiny, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(config_to_yaml(tiny_config(tiny, tmp_path / "run", "vqa")))
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "routingvl"]
    command = [sys.executable, "-m", *launch, "train", "--config", str(config)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu" in done.stdout + done.stderr
    assert (tmp_path / "run" / "last" / "adapter_model.safetensors").is_file()


@needs_gloo
def test_a_command_leaves_the_process_group_that_it_joined(tmp_path, monkeypatch):
    def run(args):
        dist.init_process_group("gloo", init_method=(tmp_path / "meet").as_uri(), rank=0, world_size=1)
        return 0

    monkeypatch.setattr(doctor, "run", run)
    try:
        assert main(["doctor"]) == 0
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_print_config(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--task", "caption", "--train.lr", "0.25", "--print_config"])
    assert not end.value.code
    assert "lr: 0.25" in capsys.readouterr().out


def test_train_evaluate_resume(tiny, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(tiny_config(tiny, tmp_path / "run", "vqa")))
    assert main(["train", "--config", str(path), "--train.max_steps", "2", "--quiet"]) == 0
    assert "2 steps in" in capsys.readouterr().out
    assert "is not empty" in fails(capsys, "train", "--config", str(path), "--quiet")
    assert main(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert "2 steps in" in capsys.readouterr().out
    assert main(["train", "--config", str(path), "--train.max_steps", "1", "--overwrite", "--quiet"]) == 0
    assert "1 steps in" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run"), "--split", "val", "--eval.batch_size", "2", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "val"


def test_caption_and_answer(tiny, runs, capsys):
    images = [str(path) for path in sorted((tiny / "data" / "val2014").iterdir())[:2]]
    assert main(["caption", str(runs / "caption"), *images, "--eval.num_beams", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == images
    assert main(["caption", str(runs / "caption"), images[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image"] == images[0]
    assert main(["answer", str(runs / "vqa"), images[0], "what color is it?", "--top", "3", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3
    assert rows[0]["probability"] >= rows[1]["probability"]
    assert "missing.jpg" in fails(capsys, "answer", str(runs / "vqa"), "missing.jpg", "what?")
    assert "use routingvl answer" in fails(capsys, "caption", str(runs / "vqa"), images[0])
    assert "top=0" in fails(capsys, "answer", str(runs / "vqa"), images[0], "what?", "--top", "0")


def test_prepare_data(tiny, tmp_path, capsys):
    source = str(tiny / "data" / "dataset_coco.json")
    assert main(["prepare-data", "coco", "--dataset_coco", source, "--output", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["files"]["captions_train_karpathy.json"]["images"] == 12
    assert (tmp_path / "out" / "captions_test_karpathy.json").is_file()
    message = fails(capsys, "prepare-data", "coco", "--dataset_coco", "gone.json", "--output", str(tmp_path / "no"))
    assert "gone.json" in message
    assert not (tmp_path / "no").exists()
    assert "needs --questions" in fails(
        capsys, "prepare-data", "vqa", "--dataset_coco", source, "--output", str(tmp_path / "no")
    )


def test_export(runs, tmp_path, capsys):
    assert main(["export", str(runs / "vqa"), str(tmp_path / "peft"), "--format", "peft"]) == 0
    assert "extra_parameters.safetensors, which PEFT does not read" in capsys.readouterr().out
    import peft
    import torch
    from transformers import AutoModel

    from routingvl.models import load_pretrained

    ours = load_pretrained(runs / "vqa" / "best")
    base = AutoModel.from_pretrained(
        json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    ids, theirs = torch.tensor([[5, 6, 7, 8]]), peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids)[0], ours.roberta.eval()(ids)[0], rtol=1e-5, atol=1e-5)
    assert main(["export", str(runs / "caption"), str(tmp_path / "ours")]) == 0
    capsys.readouterr()
    assert load_pretrained(tmp_path / "ours").routing.routing == "mul"
    assert "is not an empty folder" in fails(capsys, "export", str(runs / "vqa"), str(tmp_path / "ours"))
    message = fails(capsys, "export", str(runs / "caption"), str(tmp_path / "refused"), "--format", "peft")
    assert "PEFT would drop the image" in message
    assert not (tmp_path / "refused").exists()


def test_doctor(capsys):
    assert main(["doctor", "--json"]) in (0, 1)
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == version("torch")
    assert report["bottlenecks"]["backend"] in ("eager", "triton")
    assert report["bottlenecks"]["reason"]
    assert report["bottlenecks"]["float32 on a CPU"]
    assert report["checks"]["transformers"].startswith("ViTModel, ")
    assert report["checks"]["transformers"].endswith(", RobertaModel, GPT2LMHeadModel import")
    assert set(report["optional packages"]) == {"tensorboard", "wandb", "peft"}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run on a CPU only when interpreted")
def test_doctor_tries_the_kernels(monkeypatch):
    pytest.importorskip("triton")
    from routingvl.kernels.triton_common import launch

    assert doctor.try_kernels("cpu", rank=4) == "run forward and backward at rank 4 in float32"
    tiles = ()
    monkeypatch.setattr(launch, "_first_fit", {("lora_forward", tiles): len(tiles)})
    assert doctor.try_kernels("cpu", rank=4).startswith("PROBLEM: no tile of lora_forward fits this device")

    def refuse_backward(kind, *rest):
        if kind == "lora_backward":
            raise launch.NoTileFitsError(launch.unfit_message(kind))
        return unhindered(kind, *rest)

    unhindered = launch.launch
    monkeypatch.setattr(launch, "launch", refuse_backward)
    assert "no tile of lora_backward fits this device, so there are no gradients" in doctor.try_kernels("cpu", rank=4)
