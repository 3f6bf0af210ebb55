"""The programs of docs/howto-*.md, and README.md's with PEFT, run on tiny random models in place of those they name."""

import re
from pathlib import Path

import pytest
import torch
from test_docs import fences
from text_zoo import text_batch, text_model
from tower_zoo import vision_tower
from transformers import TrainingArguments
from vlms import batch_for, make

README = Path(__file__).resolve().parent.parent / "README.md"
DOCS = README.parent / "docs"
HUB = {
    "llava-hf/llava-1.5-7b-hf": lambda: make("llava"),
    "HuggingFaceTB/SmolLM2-135M": lambda: text_model("llama"),
    "google/siglip-base-patch16-224": lambda: vision_tower("siglip"),
}
OWN_TEST = "howto-trainer.md"  # tests/models/test_howto_trainer.py
PAGES = sorted(path.name for path in DOCS.glob("howto-*.md") if path.name != OWN_TEST)


def rows(batch):
    """The rows of a batch, as a data set has them."""
    return [{key: value[index] for key, value in batch.items()} for index in range(len(batch["input_ids"]))]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder with a tiny model for each name of the hub."""
    folder = tmp_path_factory.mktemp("hub")
    for name, build in HUB.items():
        build().save_pretrained(folder / name)
    return folder


def run(program, hub, name, **given):
    """The program with models of ``hub`` in place of those that it names."""
    for name in HUB:
        program = program.replace(f'"{name}"', repr(str(hub / name)))
    assert not re.search(r'from_pretrained\("[\w-]+/', program)
    torch.manual_seed(0)
    exec(compile(program, name, "exec"), given := {"__name__": name, **given})
    return given


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A folder to write into, and no hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_readmes_program_with_peft_runs(hub, offline):
    programs = fences(README.read_text(encoding="utf-8"), ("python",))
    (program,) = (block for block in programs if "get_peft_model" in block)
    batch = batch_for("llava")
    given = {"data": rows(batch), "args": TrainingArguments("runs", max_steps=2, use_cpu=True, report_to=[])}
    given["batch"] = {key: value for key, value in batch.items() if key != "labels"}
    ran = run(program, hub, "README.md", **given)
    assert ran["model"].peft_config["default"].image_from == "model.multi_modal_projector"
    up = [weight for name, weight in ran["model"].named_parameters() if "lora_B" in name]
    assert up
    assert all(weight.any() for weight in up)  # it trained, and the file held it


@pytest.mark.parametrize("page", PAGES)
def test_the_programs_run(page, hub, offline):
    program = "\n".join(fences((DOCS / page).read_text(encoding="utf-8"), ("python",)))
    assert program
    # Smaller than what a page says: the tiny models take seconds then.
    program = program.replace(
        'TrainingArguments("', 'TrainingArguments(max_steps=2, use_cpu=True, report_to=[], output_dir="'
    )
    batch, words = batch_for("llava"), text_batch("llama")
    given = {"data": rows(batch_for("llava", (1,) * 4)), "words": {k: v for k, v in words.items() if k != "labels"}}
    given["pixels"] = torch.randn(3, 3, 16, 16)
    given["batch"] = {key: value for key, value in batch.items() if key != "labels"}
    run(program, hub, page, **given)
