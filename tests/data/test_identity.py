"""An image is its file: numbers that two images share mix up nothing, with stored features as without."""

import json

import pytest
import torch
from PIL import Image
from tiny import COLOURS, QUESTION, caption, tiny_config, write_backbones

from routingvl.backbones.vision import image_features, load_tower
from routingvl.config.schema import DataConfig
from routingvl.data import AnswerVocabulary, CaptionDataset, DataError, VQADataset, load_captions, load_vqa
from routingvl.data.feature_store import FeatureStore
from routingvl.data.images import ImagePreprocessor
from routingvl.evaluate import evaluate
from routingvl.train import train

COUNTS = {"train": 8, "val": 4}


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Images that both splits number from 1: cat_1.png and dog_1.png, of other colours than each other."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("numbered")
    write_backbones(folder)
    data = folder / "data"
    data.mkdir()
    for shift, (split, count) in enumerate(COUNTS.items()):
        questions, images, captions = [], [], []
        for number in range(1, count + 1):
            colour = list(COLOURS)[(number + shift) % 4]
            name = f"{('cat', 'dog')[shift]}_{number}"
            Image.new("RGB", (24, 20), COLOURS[colour]).save(data / f"{name}.jpg")
            questions.append(
                {
                    "question_id": 100 * number + shift,
                    "img_id": name,
                    "sent": QUESTION,
                    "label": {colour: 1.0},
                    "answers": [colour] * 10,
                }
            )
            images.append({"id": number, "file_name": f"{name}.jpg"})
            captions.append({"id": number, "image_id": number, "caption": caption(colour, 0)})
        (data / f"karpathy_{split}.json").write_text(json.dumps(questions))
        content = {"images": images, "annotations": captions}
        (data / f"captions_{split}_karpathy.json").write_text(json.dumps(content))
    (data / "trainval_label2ans.json").write_text(json.dumps(list(COLOURS)))
    return folder


@pytest.mark.parametrize("on_disk", [True, False])
def test_each_example_has_the_features_of_its_own_image(numbered, tmp_path, on_disk):
    data = numbered / "data"
    tower, preprocessor = load_tower(str(numbered / "vit")), ImagePreprocessor.from_pretrained(numbered / "vit")
    settings = DataConfig(feature_cache=str(tmp_path) if on_disk else None)
    captions = [load_captions(data, split, data) for split in COUNTS]
    questions = [load_vqa(data, split, data) for split in COUNTS]
    both = load_vqa(written(tmp_path / "both.json", data), "train", data)
    splits = [*captions, *questions, both]
    store = FeatureStore(tower, "pooler", preprocessor, settings)
    features = store.load([image for split in splits for image in split.images])
    assert len(features) == 12
    for split in splits:
        dataset = CaptionDataset if split in captions else VQADataset
        options = {} if split in captions else {"vocabulary": AnswerVocabulary.load(data)}
        stored, read = (
            dataset(split, features=features, **options),
            dataset(split, preprocessor=preprocessor, **options),
        )
        for one, other in zip(stored, read, strict=True):
            expected = image_features(tower, other["pixel_values"][None], "pooler")[0]
            torch.testing.assert_close(one["vision_features"], expected, rtol=1e-5, atol=1e-6)
    assert len({item["vision_features"].numpy().tobytes() for item in stored}) == len(COLOURS)


def written(path, data):
    """Both lists of questions as one, so that cat_1 and dog_1 are in one split."""
    lists = [json.loads((data / f"karpathy_{split}.json").read_text()) for split in COUNTS]
    path.write_text(json.dumps([*lists[0], *lists[1]]))
    return path


def test_features_by_id_cannot_tell_them_apart(numbered, tmp_path):
    split = load_vqa(written(tmp_path / "both.json", numbered / "data"), "train")
    vocabulary = AnswerVocabulary.load(numbered / "data")
    with pytest.raises(DataError, match=r"dog_1\.jpg and cat_1\.jpg both have the id 1"):
        VQADataset(split, vocabulary, features={n: torch.zeros(1, 4) for n in range(1, 9)})


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_a_run_scores_the_same_with_and_without_stored_features(numbered, tmp_path, task):
    found = []
    for n, kept in enumerate(({}, {"precompute_features": True}, {"feature_cache": str(tmp_path / "cache")})):
        config = tiny_config(numbered, tmp_path / str(n), task, max_steps=12, num_beams=1, **kept)
        result = train(config, log="quiet")
        losses = [record["loss"] for record in result.history if record["kind"] == "train"]
        scores = evaluate(result.run_dir, "val", log="quiet", metrics=("CIDEr",), caption_tokenizer="python")
        found.append([*losses, scores["accuracy" if task == "vqa" else "CIDEr"]])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)
