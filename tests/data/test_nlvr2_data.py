"""NLVR2's official files: what is read, where the images lie, and errors that name file and line."""

import json

import pytest
import torch
from pair_and_gqa_data import FIXTURES, write_nlvr2

from routingvl.data.collate import collate_images
from routingvl.data.files import DataError
from routingvl.data.images import ImageError, ImagePreprocessor
from routingvl.data.nlvr2 import NLVR2Dataset, load_nlvr2

NLVR2 = FIXTURES / "nlvr2"
ROWS = [
    {"identifier": "train-10-0-0", "sentence": " Two\ndogs. ", "label": "True", "directory": 7, "left_url": "u"},
    {"identifier": "train-10-0-1", "sentence": "No dogs.", "label": "False", "directory": 7},
    {"identifier": "train-10-1-0", "sentence": "Two dogs.", "label": "False", "directory": 7},
]


def write(folder, *rows, split="train"):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / f"{split}.json").write_text(text)
    return folder


def test_split(tmp_path):
    folder = write_nlvr2(tmp_path / "nlvr2")
    split = load_nlvr2(folder, "train", folder / "images")
    assert (len(split.examples), len(split.images)) == (32, 32)  # four pairs of each of four sets, two sentences each
    assert split.examples[3].image_ids == ("train-10-1-img0.png", "train-10-1-img1.png")
    assert split.images[0].path == folder / "images" / "train" / "0" / "train-10-0-img0.png"
    dev = load_nlvr2(folder, "dev", folder / "images")
    assert dev.images[1].path == folder / "images" / "dev" / "dev-20-0-img1.png"
    assert next(dev.example_keys()) == ("dev-20-0-img0.png", "dev-20-0-img1.png", "The left image shows a red square.")
    flat = tmp_path / "flat"
    flat.mkdir()
    assert load_nlvr2(folder, "train", flat).images[0].path == flat / "train-10-0-img0.png"
    assert load_nlvr2(NLVR2, "train").images[0].path is None


def test_dataset(tmp_path):
    split = load_nlvr2(write(tmp_path, ROWS[0], "", *ROWS[1:]), "train")
    assert [example.text for example in split.examples] == ["Two dogs.", "No dogs.", "Two dogs."]
    features = {image.image_id: torch.full((3, 2), float(n)) for n, image in enumerate(split.images)}
    data = NLVR2Dataset(split, features=features)
    assert [data[i]["target"] for i in range(3)] == [1, 0, 0]
    assert data[2]["vision_features"].shape == (2, 3, 2)
    assert data[2]["vision_features"][:, 0, 0].tolist() == [2.0, 3.0]  # left, right
    assert collate_images([data[0], data[2]])["vision_features"].shape == (2, 2, 3, 2)
    unknown = load_nlvr2(write(tmp_path, *({**row, "label": None} for row in ROWS)), "train")
    assert not unknown.has_labels
    assert NLVR2Dataset(unknown, features=features)[0]["target"] is None


def test_missing_images(tmp_path):
    folder = write_nlvr2(tmp_path / "nlvr2")
    split = load_nlvr2(folder, "dev", folder / "images")
    split.images[1].path.unlink()
    data = NLVR2Dataset(split, ImagePreprocessor(size=16))
    with pytest.raises(ImageError, match=r"dev-20-0-img1\.png does not exist"):
        data.check_images()
    data.on_bad_image = "skip"
    kept = [data[i] is not None for i in range(len(data))]
    assert kept == [False, False] + [True] * 14  # the pair of that image has two sentences
    assert data.skipped == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train.json has no examples"),
        ([ROWS[0], '{"identifier": "x'], r"train.json, line 2 is not valid JSON"),
        ([ROWS[0], "[3]"], "line 2 must hold an object, not a list"),
        ([{"sentence": "a", "label": "True"}], "line 1 has no key 'identifier'"),
        ([{"identifier": "train-1-0-0"}], "line 1 has no key 'sentence'"),
        ([ROWS[0], {**ROWS[1], "identifier": "train-1-0"}], "line 2: identifier 'train-1-0' must be of the form"),
        ([ROWS[0], {**ROWS[1], "identifier": 3}], "line 2: identifier 3 must be of the form train-10171-0-0"),
        ([ROWS[0], {**ROWS[1], "sentence": " "}], "line 2: sentence of train-10-0-1 must be a text"),
        ([ROWS[0], {**ROWS[1], "label": "true"}], 'line 2: label of train-10-0-1 must be the string "True" or "False"'),
        ([{**ROWS[0], "label": True}], "line 1: label of train-10-0-0 must be the string .*, not True"),
        ([{**ROWS[0], "directory": True}], "line 1: directory must be the number of a folder"),
        ([ROWS[0], {**ROWS[1], "label": None}], "line 2: some lines have a label and others not"),
        ([ROWS[0], ROWS[0]], "identifier train-10-0-0 is listed twice"),
    ],
)
def test_errors(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_nlvr2(write(tmp_path, *rows), "train")


def test_names_stay_below_the_images(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="leaves the image folder"):
        load_nlvr2(write(tmp_path, {**ROWS[0], "directory": "../.."}), "train", tmp_path)
    with pytest.raises(DataError, match=r"dev\.json: .*data\.annotations must be a folder with a file dev\.json"):
        load_nlvr2(tmp_path, "dev")
