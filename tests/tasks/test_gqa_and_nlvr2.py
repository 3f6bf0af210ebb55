"""The tasks gqa and nlvr2 end to end: training, evaluation, controls, single images, estimates, faults."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from pair_and_gqa_data import config_of, write_gqa, write_nlvr2
from PIL import Image
from tiny import COLOURS, batch, randomise, small_roberta, small_vit, write_backbones
from training_runs import losses

from routingvl import RoutingConfig, ViTRobertaForClassification
from routingvl.cli import main
from routingvl.config import ConfigError
from routingvl.config.files import config_to_yaml
from routingvl.data.files import DataError
from routingvl.evaluate import evaluate
from routingvl.metrics import read_gqa_results, read_nlvr2_results
from routingvl.predict import Predictor
from routingvl.train import train

STATEMENT = "Both squares have the same color."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    write_backbones(folder)
    return folder


@pytest.fixture(scope="module")
def gqa(tmp_path_factory):
    return write_gqa(tmp_path_factory.mktemp("data") / "gqa")


@pytest.fixture(scope="module")
def nlvr2(tmp_path_factory):
    return write_nlvr2(tmp_path_factory.mktemp("data") / "nlvr2")


@pytest.fixture(scope="module")
def answers(tiny, gqa, tmp_path_factory):
    config = config_of(tiny, gqa, tmp_path_factory.mktemp("runs") / "gqa", "gqa", max_steps=3)
    return train(config, log="quiet")


@pytest.fixture(scope="module")
def pairs(tiny, nlvr2, tmp_path_factory):
    config = config_of(
        tiny, nlvr2, tmp_path_factory.mktemp("runs") / "nlvr2", "nlvr2", val_split="dev", max_steps=3,
        vision_features="tokens", **{"routing.routing": "vllora"},
    )  # fmt: skip
    return train(config, log="quiet")


def test_gqa(answers, gqa, tmp_path, capsys):
    run = answers.run_dir
    assert json.loads((run / "label2ans.json").read_text()) == ["no", "yes", "blue", "green", "red", "white"]
    metrics = evaluate(run, "val_all", log="quiet")
    assert (metrics["n"], metrics["balanced"], metrics["missing"]) == (13, 9, {})
    found = read_gqa_results(metrics["predictions"])
    content = json.loads((gqa / "val_balanced_questions.json").read_text())
    right = [found[i] == entry["answer"] for i, entry in content.items()]
    assert metrics["accuracy"] == round(100 * sum(right) / 9, 2)
    assert Path(metrics["predictions"]).name == "gqa_val_all_gqa_results.json"
    balanced = evaluate(run, "val", log="quiet")
    assert balanced["missing"].keys() == {"consistency"}
    test = evaluate(run, "test", log="quiet")
    assert test["missing"] == {"accuracy": "split 'test' has no balanced questions with answers"}
    assert len(read_gqa_results(test["predictions"])) == 4
    shuffled = evaluate(run, "val", image_control="shuffled", log="quiet")
    assert shuffled["n"] == 9
    assert main(["answer", str(run), str(gqa / "images" / "2300001.jpg"), "What color?", "--top", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_gqa_answers_from_a_file(tiny, gqa, answers, tmp_path):
    (tmp_path / "answers.json").write_text('["yes", "no", "red"]')
    config = config_of(tiny, gqa, tmp_path / "run", "gqa", max_steps=1, answers=str(tmp_path / "answers.json"))
    assert json.loads((train(config, log="quiet").run_dir / "label2ans.json").read_text()) == ["yes", "no", "red"]
    with pytest.raises(DataError, match="split 'test' has no answers to learn"):
        train(config_of(tiny, gqa, tmp_path / "other", "gqa", train_split="test", val_split=None), log="quiet")
    with pytest.raises(DataError, match="split 'test' has no balanced questions with answers to validate"):
        train(config_of(tiny, gqa, tmp_path / "other", "gqa", val_split="test"), log="quiet")
    damaged = tmp_path / "gqa"
    write_gqa(damaged)
    (damaged / "val_choices.json").write_text("[]")
    metrics = evaluate(answers.run_dir, "val", annotations=str(damaged), output=tmp_path / "out", log="quiet")
    assert "val_choices.json must hold an object" in metrics["missing"]["validity"]
    assert "accuracy" in metrics


def test_nlvr2(pairs, nlvr2):
    metrics = evaluate(pairs.run_dir, "test1", log="quiet")
    rows = [json.loads(line) for line in (nlvr2 / "test1.json").read_text().splitlines()]
    found = read_nlvr2_results(metrics["predictions"])
    assert metrics["accuracy"] == round(100 * sum(found[row["identifier"]] == row["label"] for row in rows) / 16, 2)
    assert (metrics["n"], metrics["sentences"], metrics["missing"]) == (16, 4, {})
    for control in ("shuffled", "noise"):
        assert evaluate(pairs.run_dir, "test1", image_control=control, log="quiet")["n"] == 16
    assert evaluate(pairs.run_dir, "test1", limit=3, log="quiet")["n"] == 3


def test_features_of_pairs_from_the_cache(tiny, nlvr2, pairs, tmp_path):
    settings = {"val_split": "dev", "max_steps": 3, "vision_features": "tokens", "routing.routing": "vllora"}
    config = config_of(tiny, nlvr2, tmp_path / "run", "nlvr2", feature_cache=str(tmp_path / "features"), **settings)
    assert losses(train(config, log="quiet")) == pytest.approx(losses(pairs), rel=1e-5)


def test_pairs_on_the_command_line(pairs, nlvr2, tmp_path, capsys):
    images = [str(path) for path in sorted((nlvr2 / "images" / "test1").iterdir())[:4]]
    assert main(["predict", str(pairs.run_dir), *images, "--text", STATEMENT]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["images"] for row in rows] == [images[:2], images[2:]]
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1)
    assert main(["predict", str(pairs.run_dir), *images[:3], "--text", STATEMENT]) == 2
    assert "an example of task 'nlvr2' has 2 images, in their order: give so many, not 3" in capsys.readouterr().err
    assert main(["predict", str(pairs.run_dir), images[0], "gone.png", *images[2:], "--text", STATEMENT]) == 2
    captured = capsys.readouterr()
    assert "gone.png does not exist" in captured.err
    assert json.loads(captured.out)["images"] == images[2:]
    predictor = Predictor(pairs.run_dir)
    left, right = (predictor.predict(order, STATEMENT)[0]["probabilities"] for order in (images[1:3], images[2:0:-1]))
    assert left != right  # the images differ, and their order counts


def test_nlvr2_faults(tiny, nlvr2, tmp_path):
    with pytest.raises(ConfigError, match="task 'nlvr2' has the labels False and True; leave it null"):
        train(config_of(tiny, nlvr2, tmp_path / "run", "nlvr2", answers=str(nlvr2 / "dev.json")), log="quiet")
    rows = [json.loads(line) for line in (nlvr2 / "dev.json").read_text().splitlines()]
    (tmp_path / "train.json").write_text((nlvr2 / "train.json").read_text())
    (tmp_path / "dev.json").write_text("\n".join(json.dumps({**row, "label": None}) for row in rows))
    settings = {"annotations": str(tmp_path), "max_steps": 1}
    with pytest.raises(DataError, match="split 'dev' has no labels to validate with"):
        train(config_of(tiny, nlvr2, tmp_path / "run", "nlvr2", val_split="dev", **settings), log="quiet")
    with pytest.raises(DataError, match="split 'dev' has no labels to learn"):
        train(config_of(tiny, nlvr2, tmp_path / "run", "nlvr2", train_split="dev", **settings), log="quiet")
    run = train(config_of(tiny, nlvr2, tmp_path / "run", "nlvr2", val_split=None, **settings), log="quiet").run_dir
    assert evaluate(run, "dev", log="quiet")["missing"]["consistency"] == "split 'dev' has no labels"


@pytest.mark.parametrize("task", ["gqa", "nlvr2"])
def test_estimates(tiny, gqa, nlvr2, tmp_path, capsys, task):
    for folder in (gqa if task == "gqa" else nlvr2, tmp_path / "gone"):
        config = config_of(tiny, folder, tmp_path / "run", task, val_split="val" if task == "gqa" else "dev")
        (tmp_path / "config.yaml").write_text(config_to_yaml(config))
        assert main(["train", "--config", str(tmp_path / "config.yaml"), "--dry-run"]) == 0
        estimate = json.loads(capsys.readouterr().out)
        assert estimate["examples"] == (None if folder.name == "gone" else {"gqa": 16, "nlvr2": 32}[task])


@pytest.mark.parametrize("routing", ["add", "vllora"])
def test_two_images_are_tokens_one_behind_the_other(routing):
    config = RoutingConfig(rank=4, alpha=8, routing=routing)
    model = ViTRobertaForClassification.from_backbones(small_vit(), small_roberta(), config, num_labels=2)
    randomise(model).eval()
    inputs = batch()
    left, right = inputs.pop("pixel_values"), torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    logits = model(pixel_values=torch.stack([left, right], dim=1), **inputs).logits
    features = torch.stack([model.encode_images(left), model.encode_images(right)], dim=1)
    assert torch.equal(model(vision_features=features, **inputs).logits, logits)
    side = features.flatten(1, 2)  # [B, 2, d]
    if routing == "vllora":
        assert torch.equal(model(vision_features=side, **inputs).logits, logits)
    else:
        with pytest.raises(ConfigError, match="takes 1 visual token per image, got L=2"):
            model(vision_features=side, **inputs)
    # Bottlenecks of one visual token read the mean of both images, the prefix has each of them.
    with model.context.bind(side.mean(1, keepdim=True) if routing == "add" else side):
        text = model.text_inputs(side, inputs["input_ids"], inputs["attention_mask"])
        states = model.language_model(**text).pooler_output
    torch.testing.assert_close(model.classifier(states), logits)
    assert not torch.allclose(model(vision_features=features.flip(1), **inputs).logits, logits)
    assert model.encode_images(torch.stack([left, right], dim=1)).shape == (3, 2, 1, 32)


@pytest.mark.slow
def test_what_was_learned_of_the_left_image_is_lost_with_other_images(tiny, tmp_path):
    random = Random(0)
    (tmp_path / "images").mkdir()
    for split, count in (("train", 400), ("dev", 60), ("test1", 100)):
        rows = []
        for number in range(count):
            asked, other = random.sample(list(COLOURS), 2)
            sides = (asked, other) if number % 2 else (other, asked)  # only the order tells
            for side, colour in enumerate(sides):
                name = f"{split}-{number}-0-img{side}.png"
                Image.new("RGB", (24, 20), COLOURS[colour]).save(tmp_path / "images" / name)
            row = {"identifier": f"{split}-{number}-0-0", "sentence": f"the left one is {asked}"}
            rows.append(row | {"label": str(sides[0] == asked)})
        (tmp_path / f"{split}.json").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "max_steps": 400,
        "train.batch_size": 32,
        "lr": 5e-3,
        "rank": 8,
        "routing.alpha": 16,
        "val_split": "dev",
    }
    config = config_of(tiny, tmp_path, tmp_path / "run", "nlvr2", precompute_features=True, **settings)
    run = train(config, log="quiet").run_dir
    scores = [evaluate(run, "test1", image_control=control, log="quiet")["accuracy"] for control in (None, "shuffled")]
    assert scores[0] > 90
    assert scores[1] < 70
