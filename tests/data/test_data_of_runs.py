"""What runs make of odd data: refused before a run folder exists, read as asked, or skipped."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tiny import SIZE, tiny_config

from routingvl.data import DataError, ImageError, ImagePreprocessor
from routingvl.evaluate import evaluate
from routingvl.predict import Predictor
from routingvl.train import train


@pytest.fixture
def data(tiny, tmp_path):
    return shutil.copytree(tiny / "data", tmp_path / "data")


def start(tiny, data, run, task="vqa", **settings):
    settings = {"max_steps": 2, "annotations": str(data), "images": str(data)} | settings
    return train(tiny_config(tiny, run, task, **settings), log="quiet")


def image(data, number):
    return data / "val2014" / f"COCO_val2014_{number:012d}.jpg"


@pytest.mark.parametrize("task", ["vqa", "caption", "classify"])
def test_a_missing_image_is_refused_before_anything_is_written(tiny, data, tmp_path, task):
    for number in (112, 113):  # of train, and of val
        moved = image(data, number).rename(tmp_path / "moved.jpg")
        with pytest.raises(ImageError, match=f"{image(data, number)} does not exist"):
            start(tiny, data, tmp_path / "run", task)
        moved.rename(image(data, number))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("split", "numbers"), [("train", range(101, 113)), ("val", range(113, 117))])
def test_a_split_without_a_readable_image_cannot_be_skipped(tiny, data, tmp_path, kept, split, numbers):
    for number in numbers:
        image(data, number).write_bytes(b"no image")
    with pytest.raises(ImageError, match=f"no image of split '{split}' can be read; the last: "):
        start(tiny, data, tmp_path / "run", on_bad_image="skip", precompute_features=kept)
    assert not (tmp_path / "run").exists()


def test_questions_without_answers_are_refused(tiny, data, tmp_path):
    for split, words in (("train", "no answers to learn"), ("val", "no answers to validate with")):
        path = data / f"karpathy_{split}.json"
        whole = path.read_text()
        rows = [{key: row[key] for key in ("img_id", "question_id", "sent")} for row in json.loads(whole)]
        path.write_text(json.dumps(rows))
        with pytest.raises(DataError, match=f"split '{split}' has {words}"):
            start(tiny, data, tmp_path / "run")
        path.write_text(whole)
    assert not (tmp_path / "run").exists()


def test_shared_splits_by_name_only(tiny, data, tmp_path):
    with pytest.raises(DataError, match=r"splits 'train' and 'train' share examples.*data.allow_shared_splits=true"):
        start(tiny, data, tmp_path / "run", val_split="train")
    assert not (tmp_path / "run").exists()
    assert start(tiny, data, tmp_path / "run", val_split="train", allow_shared_splits=True).best_step == 2


def test_a_file_without_splits_serves_one(tiny, data, tmp_path):
    own = shutil.copy(data / "karpathy_train.json", data / "mine.json")
    settings = {"annotations": str(own), "answers": str(data / "trainval_label2ans.json")}
    with pytest.raises(DataError, match="share examples"):
        start(tiny, data, tmp_path / "run", **settings)
    result = start(tiny, data, tmp_path / "run", val_split=None, **settings)
    for split in ("test", "val"):
        with pytest.raises(DataError, match=rf"mine\.json, which names no splits, so it cannot serve as '{split}' too"):
            evaluate(result.run_dir, split, log="quiet")
    for split, changed in (
        ("train", {}),
        ("test", {"allow_shared_splits": True}),
        ("test", {"annotations": str(data / "karpathy_test.json")}),
    ):
        assert evaluate(result.run_dir, split, log="quiet", output=tmp_path / "out", **changed)["n"] in (5, 12)


@pytest.mark.parametrize("cached", [False, True])
def test_own_photos_are_seen_the_right_way_up(tiny, tmp_path, cached):
    settings = {"feature_cache": str(tmp_path / "cache")} if cached else {}
    result = train(tiny_config(tiny, tmp_path / "run", "vqa", max_steps=2, **settings), log="quiet")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.effect_noise((30, 20), 60).convert("RGB")
    picture.save(tmp_path / "turned.png", exif=exif)
    picture.rotate(-90, expand=True).save(tmp_path / "upright.png")
    predictor = Predictor(result.run_dir)
    turned, upright = (
        next(iter(predictor.task.encode_files([tmp_path / name]).values())) for name in ("turned.png", "upright.png")
    )
    torch.testing.assert_close(turned, upright, rtol=1e-5, atol=1e-6)
    if not cached:
        assert not torch.equal(turned[0], ImagePreprocessor(size=SIZE)(tmp_path / "turned.png"))


def test_training_turns_images_by_option(tiny, data, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    noise = Image.effect_noise((24, 20), 90).convert("RGB")
    for number in range(101, 122):
        noise.save(image(data, number), exif=exif)
    found = []
    for turned in (False, True):
        result = start(tiny, data, tmp_path / str(turned), exif_orientation=turned)
        found.append([record["loss"] for record in result.history if record["kind"] == "train"])
    for number in range(101, 122):
        noise.rotate(180).save(image(data, number))
    result = start(tiny, data, tmp_path / "upright")
    upright = [record["loss"] for record in result.history if record["kind"] == "train"]
    assert found[0] != found[1]
    assert found[1] == pytest.approx(upright, rel=1e-2)


def test_symbolic_links_are_followed_by_option(tiny, data, tmp_path):
    outside = shutil.move(data / "val2014", tmp_path / "elsewhere")
    (data / "val2014").symlink_to(outside)
    with pytest.raises(DataError, match=r"leads out of data.images .* data.allow_symlinks=true"):
        start(tiny, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert start(tiny, data, tmp_path / "run", allow_symlinks=True).best_step == 2
