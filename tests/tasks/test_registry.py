"""The registry of tasks: every member is complete, and one more class is all that a further task needs."""

import ast
import inspect
import json
from pathlib import Path

import pytest
import torch
from tiny import SPLITS, tiny_config, write_tiny

import routingvl
from routingvl.cache_features import cache_features
from routingvl.cli import main
from routingvl.config import ConfigError
from routingvl.config.files import config_to_yaml
from routingvl.config.schema import ModelConfig
from routingvl.data.coco import load_captions
from routingvl.data.collate import TextCollator
from routingvl.data.examples import ExampleDataset
from routingvl.evaluate import evaluate
from routingvl.models import RoutedVLModel, ViTRobertaForClassification
from routingvl.predict import Predictor
from routingvl.tasks import base
from routingvl.tasks.base import Task, find_task
from routingvl.train import train

PACKAGE = Path(routingvl.__file__).parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.set_num_threads(1)
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", ["vqa", "vqa-generate", "caption", "classify", "gqa", "nlvr2", "mixture"])
def test_members(name):
    task = find_task(name)
    assert task.name == name
    assert issubclass(task.model_class, RoutedVLModel)
    assert task.max_text_length > 0
    options = inspect.signature(task.model_class.__init__).parameters.keys()
    assert set(task.model_settings) <= options & ModelConfig.__dataclass_fields__.keys()
    assert find_task(name) is task


def test_unknown_task_fails_before_anything_starts(tiny, tmp_path, capsys):
    config = tiny_config(tiny, tmp_path / "run", "captoin", images=str(tmp_path / "gone"), feature_cache="cache")
    for start in (train, cache_features):
        with pytest.raises(ConfigError, match=r"task='captoin' is not one of .*did you mean 'caption'"):
            start(config)
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
    assert "did you mean 'caption'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_no_module_outside_of_its_file_knows_a_task():
    files = {path.stem for path in (PACKAGE / "tasks").glob("*.py")} - {
        "__init__",
        "base",
        "predictions",
        "choice",
        "writing",
        "controls",
    }
    assert files >= {"vqa", "captioning", "classify", "gqa", "nlvr2", "mixture"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                assert not [n for n in names if n.startswith("routingvl.tasks.") and n.split(".")[2] in files], path
            elif isinstance(node, ast.Compare) and "demo" not in path.parts:  # the demo has its own list of tasks
                assert not [n for n in (node.left, *node.comparators) if getattr(n, "attr", "") == "task"], path


class Statements(ExampleDataset):
    """Each image with its first caption and with the first caption of the image behind it."""

    @property
    def texts(self):
        texts = [self.split.references[image.image_id][0] for image in self.split.images]
        return [*texts, *texts[1:], texts[0]]

    def __len__(self):
        return 2 * len(self.split.images)

    def example(self, index):
        own, count = index < len(self.split.images), len(self.split.images)
        image = self.split.images[index % count].image_id
        return {"id": index, "image_id": image, "text": self.texts[index], "target": int(own)}


class StatementCollator(TextCollator):
    text_key, id_key, padding = "text", "id", "longest"

    def __init__(self, tokenizer, max_length):
        self.tokenizer, self.max_length = tokenizer, max_length

    def labels(self, targets):
        return torch.tensor(targets)


class MatchTask(Task):
    """Whether a caption is of an image."""

    name = "match"
    model_class = ViTRobertaForClassification
    model_settings = ("classifier_layers",)
    text_model = "roberta-base"
    max_text_length = 9

    def model_options(self):
        return {"num_labels": 2}

    def load_split(self, split, limit=None, training=False):
        return load_captions(self.config.data.annotations, split, self.config.data.images)

    def dataset(self, split, training):
        return Statements(split, **self.picture_arguments)

    def collator(self):
        return StatementCollator(self.tokenizer, self.text_length)

    def supervised_items(self, batch):
        return len(batch["labels"])

    def chances(self, batch):
        inputs = self.model_inputs(batch, self.model.device)
        inputs.pop("labels", None)
        return self.model.probabilities(self.model(**inputs).logits)[:, 1].tolist()

    def predict(self, batch, num_beams):
        return {i: "yes" if p > 0.5 else "no" for i, p in zip(batch["ids"], self.chances(batch), strict=True)}

    def single_item(self, *sentences):
        return super().single_item() | {"id": 0, "text": sentences[0], "target": None}

    def predict_single(self, batch, num_beams, top):
        return [{"match": p} for p in self.chances(batch)]

    def selection_metric(self, split):
        return "right"

    def scores(self, split, predictions):
        count = len(split.images)
        return {"right": sum((found == "yes") is (i < count) for i, found in predictions.items()), "missing": {}}

    def validation_scores(self, predictions):
        return self.scores(self.val_set.split, predictions)

    def write_predictions(self, folder, split, method, predictions):
        path = folder / f"{method}.json"
        path.write_text(json.dumps(predictions))
        return path


@pytest.fixture
def match(monkeypatch):
    monkeypatch.setattr(base, "TASKS", dict(base.TASKS))
    return base.register(MatchTask)


def test_a_further_task_is_one_class(tiny, tmp_path, match, capsys):
    with pytest.raises(ValueError, match="two tasks are called 'match'"):
        base.register(type("OtherTask", (Task,), {"name": "match"}))
    config = tiny_config(
        tiny, tmp_path / "run", "match", feature_cache=str(tmp_path / "features"), max_text_length=None
    )
    counts = [(split, found + computed) for split, found, computed in cache_features(config)]
    assert counts == [("train", SPLITS["train"]), ("val", SPLITS["val"])]
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert main(["train", "--config", str(tmp_path / "config.yaml"), "--train.max_steps", "3", "--quiet"]) == 0
    assert "best right" in capsys.readouterr().out
    metrics = evaluate(tmp_path / "run", log="quiet")
    assert 0 <= metrics["right"] <= 2 * SPLITS["test"]
    assert len(json.loads(Path(metrics["predictions"]).read_text())) == 2 * SPLITS["test"]
    image = str(next((tiny / "data" / "val2014").iterdir()))
    assert main(["predict", str(tmp_path / "run"), image, "--text", "a red square"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["image"], set(row)) == (image, {"image", "match"})
    with pytest.raises(ConfigError, match="this run's task is 'match': use routingvl predict, or a run for answer"):
        Predictor(tmp_path / "run").answer(image, "what?")
