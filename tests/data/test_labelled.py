"""Labelled texts in JSON Lines: what is read, and errors that name file and line."""

import json

import pytest
import torch

from routingvl.data.files import DataError
from routingvl.data.labelled import LabelledDataset, load_labelled

ROWS = [
    {"id": "a", "image": "x/1.jpg", "text": " Two dogs. ", "label": "no"},
    {"id": 7, "image": "COCO_val2014_000000000042.jpg", "text": ["It is cold.", "People ski."], "label": "yes", "k": 1},
    {"image": "x/1.jpg", "text": "A dog.", "label": "no"},
]


def write(folder, *rows):
    (folder / "val.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return folder


def test_split(tmp_path):
    (tmp_path / "images" / "val2014").mkdir(parents=True)
    split = load_labelled(write(tmp_path, ROWS[0], "", *ROWS[1:]), "val", tmp_path / "images")
    assert split.labels == ("no", "yes")
    assert [example.id for example in split.examples] == ["a", 7, 4]  # the last by its line
    assert [example.text for example in split.examples] == ["Two dogs.", ("It is cold.", "People ski."), "A dog."]
    paths = [image.path for image in split.images]
    assert paths == [tmp_path / "images" / "x" / "1.jpg", tmp_path / "images" / "val2014" / ROWS[1]["image"]]


def test_dataset(tmp_path):
    split = load_labelled(write(tmp_path, *ROWS), "val")
    features = {image.image_id: torch.full((1, 2), float(n)) for n, image in enumerate(split.images)}
    dataset = LabelledDataset(split, ("yes", "no"), features=features)
    assert [dataset[i]["target"] for i in range(len(dataset))] == [1, 0, 1]
    assert torch.equal(dataset[1]["vision_features"], torch.ones(1, 2))
    assert dataset.texts == [example.text for example in split.examples]
    bare = load_labelled(write(tmp_path, *({**row, "label": None} for row in ROWS)), "val")
    assert bare.labels == ()
    assert LabelledDataset(bare, (), features=features)[0]["target"] is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "val.jsonl has no examples"),
        (["", "  "], "val.jsonl has no examples"),
        ([ROWS[0], '{"image": "x'], r"val.jsonl, line 2 is not valid JSON"),
        ([ROWS[0], "[3]"], r"line 2 must hold an object, not a list"),
        ([ROWS[0], {**ROWS[0], "id": True}], "line 2: id True must be an integer or a string"),
        ([{**ROWS[0], "image": ""}], "image must be the name of a file"),
        ([{"text": "a", "label": "b"}], "line 1 has no key 'image'"),
        ([{"image": "a", "label": "b"}], "line 1 has no key 'text'"),
        ([ROWS[0], {"image": "a", "text": "b"}], "line 2: some lines have a label and others not"),
        ([{"image": "a", "text": "b"}, ROWS[0]], "line 2: some lines have a label and others not"),
        ([ROWS[0], ROWS[0]], "example a is listed twice"),
        ([ROWS[0], {**ROWS[0], "id": 1, "text": "  "}], "line 2: text must be a sentence or a list of two"),
        ([{**ROWS[0], "text": ["a", "b", "c"]}], "line 1: text must be"),
        ([{**ROWS[0], "text": 3}], "line 1: text must be"),
        ([{**ROWS[0], "label": 3}], "line 1: label must be a string that is not empty, not 3"),
        ([{**ROWS[0], "label": ""}], "line 1: label must be"),
        ([{**ROWS[0], "id": 1.5}], "line 1: id 1.5 must be"),
    ],
)
def test_errors(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_labelled(write(tmp_path, *rows), "val")


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"train\.jsonl: .*data\.annotations must be a folder with a file train\.jsonl"):
        load_labelled(tmp_path, "train")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "val.jsonl").write_text(json.dumps(ROWS[0]), encoding="utf-8-sig")
    assert len(load_labelled(tmp_path, "val").examples) == 1
