"""Loading COCO captions in both public forms."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from routingvl.data.coco import CaptionDataset, image_splits, load_captions
from routingvl.data.files import DataError
from routingvl.data.images import ImageError, ImagePreprocessor

FIXTURES = Path(__file__).parents[1] / "fixtures"
KARPATHY = FIXTURES / "dataset_coco.json"


def changed_karpathy(folder: Path, change) -> Path:
    """A copy of the fixture after ``change(images)``."""
    content = json.loads(KARPATHY.read_text())
    change(content["images"])
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def image_root(tmp_path):
    """Image files of the fixture, except the one of the test split."""
    for name in ("COCO_train2014_000000000009.jpg", "COCO_val2014_000000000042.jpg", "COCO_val2014_000000000073.jpg"):
        folder = tmp_path / "Images" / name.split("_")[1]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (200, 30, 30)).save(folder / name)
    return tmp_path


class TestLoadCaptions:
    @pytest.mark.parametrize(
        ("split", "references"),
        [
            ("train", {9: ["A red ball.", "One ball"], 42: ["A blue cup."]}),  # 42 is restval; "One ball " is stripped
            ("val", {73: ["A cat", "The cat sits."]}),
            ("test", {74: ["A dog", "A dog on a rug."]}),
        ],
    )
    def test_both_forms_agree(self, split, references):
        from_karpathy = load_captions(KARPATHY, split)
        assert from_karpathy.references == references
        assert from_karpathy == load_captions(FIXTURES / f"captions_{split}_karpathy.json", split)
        assert from_karpathy == load_captions(FIXTURES, f"karpathy_{split}")

    def test_ids_are_cocoid_not_imgid(self):
        assert [image.image_id for image in load_captions(KARPATHY, "train").images] == [9, 42]

    def test_folder_with_the_karpathy_file_alone_or_in_annotations(self, tmp_path):
        (tmp_path / "annotations").mkdir()
        (tmp_path / "annotations" / "dataset_coco.json").write_bytes(KARPATHY.read_bytes())
        assert load_captions(tmp_path, "val") == load_captions(KARPATHY, "val")
        assert load_captions(tmp_path / "annotations", "val") == load_captions(KARPATHY, "val")

    def test_restval_images_lie_in_val2014(self, image_root):
        paths = [image.path for image in load_captions(KARPATHY, "train", image_root).images]
        assert [path.parent.name for path in paths] == ["train2014", "val2014"]
        assert all(path.is_file() for path in paths)

    def test_image_splits(self):
        found = image_splits(KARPATHY)
        assert {image: split for image, (split, _) in found.items()} == {9: "train", 42: "train", 73: "val", 74: "test"}
        assert found[42][1] == "COCO_val2014_000000000042.jpg"


class TestBadInput:
    def test_missing_annotations_say_what_was_looked_for_and_how_to_make_it(self, tmp_path):
        with pytest.raises(DataError) as error:
            load_captions(tmp_path, "val")
        for text in ("captions_val_karpathy.json", "dataset_coco.json", "prepare-data", str(tmp_path)):
            assert text in str(error.value)

    def test_unknown_split(self):
        with pytest.raises(DataError, match=r"'restval'.*train, val, test"):
            load_captions(KARPATHY, "restval")

    def test_file_of_another_split(self):
        with pytest.raises(DataError, match=r"holds the split 'val', but 'train'"):
            load_captions(FIXTURES / "captions_val_karpathy.json", "train")

    def test_empty_caption_names_file_and_ids(self, tmp_path):
        path = changed_karpathy(tmp_path, lambda images: images[0]["sentences"][1].update(raw=" \n"))
        with pytest.raises(DataError, match=r"dataset_coco\.json: caption 2 of image 9 is empty"):
            load_captions(path, "train")

    def test_empty_caption_in_the_other_form(self, tmp_path):
        content = json.loads((FIXTURES / "captions_val_karpathy.json").read_text())
        content["annotations"][0]["caption"] = ""
        path = tmp_path / "captions_val_karpathy.json"
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"captions_val_karpathy\.json: caption 4 of image 73 is empty"):
            load_captions(path, "val")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda images: images[0].pop("cocoid"), "image number 0 has no key 'cocoid'"),
            (lambda images: images[0]["sentences"][0].pop("raw"), "image 9 has no key 'raw'"),
            (lambda images: images[0].update(split="trian"), "image 9 has unknown split 'trian'"),
            (lambda images: images[1].update(cocoid=9), "image 9 is listed twice"),
            (lambda images: images.clear(), "no images of split 'train'"),
            (lambda images: images[0].update(sentences=[{"raw": 3, "sentid": 1}]), "expected form"),
        ],
    )
    def test_broken_entries(self, tmp_path, change, message):
        with pytest.raises(DataError, match=message):
            load_captions(changed_karpathy(tmp_path, change), "train")

    def test_caption_of_an_unlisted_image(self, tmp_path):
        content = json.loads((FIXTURES / "captions_val_karpathy.json").read_text())
        content["images"] = [{"id": 1, "file_name": "COCO_val2014_000000000001.jpg"}]
        path = tmp_path / "own.json"
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match="caption 4 belongs to image 73"):
            load_captions(path, "val")

    @pytest.mark.parametrize("content", ["", '{"images": [', "[]", '{"questions": []}'])
    def test_other_files(self, tmp_path, content):
        path = tmp_path / "dataset_coco.json"
        path.write_text(content)
        with pytest.raises(DataError, match=r"dataset_coco\.json"):
            load_captions(path, "train")


class TestCaptionDataset:
    def test_one_item_a_caption(self, image_root):
        dataset = CaptionDataset(load_captions(KARPATHY, "train", image_root), ImagePreprocessor(8))
        assert [dataset[i]["caption"] for i in range(len(dataset))] == ["A red ball.", "One ball", "A blue cup."]
        assert [dataset[i]["image_id"] for i in range(len(dataset))] == [9, 9, 42]
        assert dataset[2]["pixel_values"].shape == (3, 8, 8)

    def test_one_item_an_image(self, image_root):
        dataset = CaptionDataset(load_captions(KARPATHY, "train", image_root), ImagePreprocessor(8), per_image=True)
        assert [dataset[i]["image_id"] for i in range(len(dataset))] == [9, 42]
        assert "caption" not in dataset[0]

    def test_features_in_place_of_images(self):
        features = {9: torch.zeros(1, 4), 42: torch.ones(1, 4)}
        dataset = CaptionDataset(load_captions(KARPATHY, "train"), features=features)
        assert torch.equal(dataset[2]["vision_features"], features[42])
        assert "pixel_values" not in dataset[2]

    def test_missing_image_fails_or_is_skipped_and_counted(self, image_root):
        split = load_captions(KARPATHY, "test", image_root)
        with pytest.raises(ImageError, match=r"COCO_val2014_000000000074\.jpg does not exist"):
            CaptionDataset(split, ImagePreprocessor(8))[0]
        dataset = CaptionDataset(split, ImagePreprocessor(8), on_bad_image="skip")
        assert [dataset[i] for i in range(len(dataset))] == [None, None]
        assert dataset.skipped == 2

    def test_split_without_captions(self, tmp_path):
        (tmp_path / "own.json").write_text(
            json.dumps({"images": [{"id": 1, "file_name": "one.jpg"}], "annotations": []})
        )
        split = load_captions(tmp_path / "own.json", "test", tmp_path)
        with pytest.raises(DataError, match="has no captions"):
            CaptionDataset(split, ImagePreprocessor(8))
        assert len(CaptionDataset(split, ImagePreprocessor(8), per_image=True)) == 1
