"""The tasks with language models of every kind: only --model.text differs, and what cannot work is said at once."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from task_texts import KINDS, SEQ2SEQ, tokenizer, write_text_model
from tiny import QUESTION, STATEMENT, tiny_config, write_tiny
from training_runs import losses

from routingvl.cli import main
from routingvl.config import ConfigError
from routingvl.config.files import config_to_yaml
from routingvl.data.collate import CaptionCollator, LabelCollator
from routingvl.evaluate import evaluate
from routingvl.predict import Predictor
from routingvl.train import train

FAST = {"eval.metrics": ["CIDEr"], "eval.caption_tokenizer": "python", "max_steps": 3}
RUNS = [(kind, "caption") for kind in ("llama", "opt", "gemma", "t5", "bart")]
RUNS += [(kind, "vqa") for kind in ("bert", "deberta-v3", "modernbert", "llama", "bart")]
RUNS += [("bert", "classify"), ("t5", "classify"), ("t5", "vqa-generate"), ("bart", "vqa-generate")]
SLOW = [(kind, task) for kind in KINDS for task in ("caption", "vqa") if (kind, task) not in RUNS]
SLOW = [(kind, task) for kind, task in SLOW if task == "vqa" or KINDS[kind][0].endswith(("CausalLM", "Generation"))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.set_num_threads(1)
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A function: the folder of a tiny language model of a kind, made once."""
    home, made = tmp_path_factory.mktemp("text"), {}

    def folder(kind):
        if kind not in made:
            made[kind] = write_text_model(home / kind, kind)
        return made[kind]

    return folder


def config_for(tiny, folder, run, kind, task, **settings):
    return tiny_config(tiny, run, task, text=str(folder), targets=KINDS[kind][4], **FAST | settings)


def check_run(tiny, folder, tmp_path, kind, task):
    """Train, resume, evaluate and answer for single images, from Python and from the command line."""
    whole = train(config_for(tiny, folder, tmp_path / "whole", kind, task), log="quiet")
    assert len(losses(whole)) == 3
    metrics = evaluate(whole.run_dir, limit=3, log="quiet")
    assert metrics["missing"] == {}
    images = [str(path) for path in sorted((tiny / "data" / "val2014").iterdir())[:2]]
    text = {"caption": None, "vqa": QUESTION, "vqa-generate": QUESTION, "classify": (QUESTION, STATEMENT)}[task]
    rows = Predictor(whole.run_dir).predict(images, text)
    if task in ("caption", "vqa-generate"):
        assert all(isinstance(row["caption" if task == "caption" else "answer"], str) for row in rows)
    else:
        for row in rows:
            assert all(0 <= p <= 1 for p in row["probabilities"].values())
    return images, rows


@pytest.mark.parametrize(("kind", "task"), RUNS)
def test_trains_evaluates_and_predicts(tiny, backbone, tmp_path, kind, task):
    check_run(tiny, backbone(kind), tmp_path, kind, task)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "task"), SLOW)
def test_trains_evaluates_and_predicts_further_kinds(tiny, backbone, tmp_path, kind, task):
    check_run(tiny, backbone(kind), tmp_path, kind, task)


@pytest.mark.parametrize(
    ("kind", "recipe", "command"), [("llama", "caption-lora", "caption"), ("t5", "vqa-lora", "answer")]
)
def test_from_the_command_line_with_a_recipe(tiny, backbone, tmp_path, capsys, kind, recipe, command):
    settings = {"model.vision": tiny / "vit", "model.text": backbone(kind), "data.annotations": tiny / "data"}
    settings |= {"data.images": tiny / "data", "routing.targets": json.dumps(KINDS[kind][4]), "routing.rank": 4}
    settings |= {"train.max_steps": 2, "train.batch_size": 4, "train.warmup": 0, "device": "cpu", "eval.num_beams": 2}
    flags = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    run = str(tmp_path / "run")
    assert main(["train", "--config", recipe, "--output_dir", run, "--quiet", *flags]) == 0
    image = str(next((tiny / "data" / "val2014").iterdir()))
    capsys.readouterr()
    assert main([command, run, image, *([QUESTION] if command == "answer" else [])]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_resuming_is_going_on(tiny, backbone, tmp_path, kind):
    config = config_for(tiny, backbone(kind), tmp_path / "whole", kind, "caption", max_steps=4)
    whole = train(config, log="quiet")

    def stop(record):
        if record.get("step") == 2 and "loss" in record:
            raise KeyboardInterrupt

    broken = config_for(tiny, backbone(kind), tmp_path / "broken", kind, "caption", max_steps=4, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(broken, log=stop)
    resumed = train(broken, log="quiet", resume=True)
    assert losses(resumed) == losses(whole)


# ------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("kind", ["llama", "opt", "gemma", "t5", "bart", "mbart"])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_caption_ends_in_one_end_token_and_nothing_else_is_added(kind, prefix):
    words = tokenizer(kind)
    captions = ["a red square", "the square is blue and plain"]
    items = [{"image_id": i, "caption": text, "pixel_values": torch.zeros(3, 2, 2)} for i, text in enumerate(captions)]
    prefix = prefix or kind in SEQ2SEQ
    batch = CaptionCollator(words, 30, prefix=prefix, start=words.bos_token_id)(items)
    for ids, mask, labels, text in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], captions, strict=True
    ):
        row = ids[mask].tolist()
        if not prefix:
            assert row.pop(0) == words.bos_token_id
            assert labels[0] == -100
        assert row[-1] == words.eos_token_id
        assert row.count(words.eos_token_id) == 1
        assert words.decode(row[:-1]).strip() == text
        assert labels[labels != -100].tolist() == row
        assert (labels[~mask] == -100).all()


def test_the_sentences_of_a_pair_are_told_apart(tiny, backbone, tmp_path):
    words = tokenizer("bert")
    pair, single = (QUESTION, STATEMENT), QUESTION
    items = [
        {"id": i, "image_id": i, "text": text, "target": 0, "pixel_values": torch.zeros(3, 2, 2)}
        for i, text in enumerate([pair, single])
    ]
    batch = LabelCollator(words, 30, token_types=2)(items)
    want = words(*pair, return_token_type_ids=True)
    assert batch["input_ids"][0].tolist() == want["input_ids"]
    assert batch["token_type_ids"][0].tolist() == want["token_type_ids"]
    assert batch["token_type_ids"][1].sum() == 0
    assert 1 in want["token_type_ids"]
    assert "token_type_ids" not in LabelCollator(words, 30)(items)
    assert "token_type_ids" not in LabelCollator(tokenizer("llama"), 30, token_types=2)(items)
    words = deepcopy(words)
    words.sep_token = "[CLS]"
    with pytest.raises(ValueError, match="marks the two sentences of a pair otherwise than BERT's"):
        LabelCollator(words, 30, token_types=2)(items)


@pytest.fixture
def copy(backbone, tmp_path):
    """A function: a copy of a language model's folder with changes of its config and its tokenizer."""

    def changed(kind, config=None, change=None):
        folder = shutil.copytree(backbone(kind), tmp_path / kind)
        if config:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if change:
            words = tokenizer(kind).__class__.from_pretrained(folder)
            change(words)
            words.save_pretrained(folder)
        return folder

    return changed


def pad_beyond(words):
    words.add_special_tokens({"pad_token": "[MORE]"})


def end_elsewhere(words):
    words.eos_token = "<unk>"


@pytest.mark.parametrize(
    ("kind", "task", "config", "change", "message"),
    [
        ("bert", "vqa", {"pad_token_id": 999}, None, r"bert: pad_token_id 999 is not a token of its vocabulary of \d+"),
        ("llama", "caption", {"pad_token_id": 999}, None, "llama: pad_token_id 999 is not a token of its vocabulary"),
        ("llama", "caption", {"eos_token_id": [2, -1]}, None, "eos_token_id -1 is not a token of its vocabulary"),
        ("llama", "caption", None, pad_beyond, r"token '\[MORE\]' of the tokenizer has the id \d+, but .* knows \d+"),
        ("llama", "vqa", None, pad_beyond, r"token '\[MORE\]' of the tokenizer has the id \d+, but .* knows \d+"),
        ("llama", "caption", None, end_elsewhere, "end with token 0 of the tokenizer, but with eos_token_id 2"),
        ("t5", "caption", {"eos_token_id": 5}, None, "end with token 1 of the tokenizer, but with eos_token_id 5"),
        ("llama", "caption", {"eos_token_id": [7, 9]}, None, "token 2 of the tokenizer, but with eos_token_id 7 or 9"),
        ("bert", "caption", None, None, "'bert' is an encoder, which cannot write"),
    ],
)  # fmt: skip
def test_tokens_that_cannot_work_are_found_before_the_first_step(
    tiny, copy, tmp_path, kind, task, config, change, message
):
    folder = copy(kind, config, change)
    with pytest.raises(ConfigError, match=message):
        train(config_for(tiny, folder, tmp_path / "run", kind, task), log="quiet")
    assert not (tmp_path / "run").exists()


def test_one_of_several_end_tokens_is_the_tokenizers(tiny, copy, tmp_path):
    folder = copy("llama", {"eos_token_id": [7, 2]})
    result = train(config_for(tiny, folder, tmp_path / "run", "llama", "caption", max_steps=1), log="quiet")
    assert Predictor(result.run_dir).task.model.end_tokens == [7, 2]


def test_a_tokenizer_without_a_begin_token(tiny, copy, tmp_path):
    """Qwen's: captions without an image in front begin with the token that the model's config names."""
    folder = copy("qwen3", None, lambda words: setattr(words, "bos_token", None))
    config = config_for(tiny, folder, tmp_path / "run", "qwen3", "caption", max_steps=1, visual_prefix=False)
    task = Predictor(train(config, log="quiet").run_dir).task
    batch = task.collator()([{"image_id": 0, "caption": "a red square", "pixel_values": torch.zeros(3, 2, 2)}])
    assert (task.tokenizer.bos_token_id, batch["input_ids"][0, 0].item()) == (None, 1)


def test_targets_of_another_width_than_the_states_are_refused(tiny, backbone, tmp_path, capsys):
    """By a training run and its dry run, before any step, in one sentence."""
    settings = {"routing.routed_by": "encoder", "routing.routing": "mul"}
    config = config_for(tiny, backbone("bart"), tmp_path / "run", "bart", "vqa-generate", **settings)
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    given = ["train", "--config", str(tmp_path / "config.yaml"), "--routing.targets", '[".*decoder.*fc2"]']
    for more in ([], ["--dry-run"]):
        assert main([*given, *more]) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert "decoder.layers.0.fc2 takes 48 features and the encoder's states have 32" in message
        assert "image_projection='own'" in message
        assert message.startswith("routingvl: ")
    assert not (tmp_path / "run").exists()
