"""Features of images from the cache: hits and misses, training, evaluation and the command with it."""

import errno
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_config
from torch.utils.data import DataLoader

from routingvl.backbones.vision import image_features
from routingvl.cache_features import cache_features
from routingvl.cli import main
from routingvl.config import ConfigError
from routingvl.config.schema import DataConfig
from routingvl.data.feature_cache import FeatureCacheError
from routingvl.data.feature_store import FeatureStore, vision_key
from routingvl.data.images import ImageError, ImagePreprocessor, ImageRecord
from routingvl.evaluate import evaluate
from routingvl.predict import Predictor
from routingvl.train import train


@pytest.fixture
def opens(monkeypatch):
    """Paths or buffers that Pillow opens from now on."""
    seen, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file, *a, **k: (seen.append(file), original(file, *a, **k))[1])
    return seen


@pytest.fixture
def workers(monkeypatch):
    """Worker counts of the data loaders made from now on."""
    seen, original = [], DataLoader.__init__

    def init(self, *args, **kwargs):
        seen.append(kwargs.get("num_workers", 0))
        original(self, *args, **kwargs)

    monkeypatch.setattr(DataLoader, "__init__", init)
    return seen


def load_vit(tiny):
    from transformers import ViTModel

    return ViTModel.from_pretrained(tiny / "vit").eval()


def store(vit, root, kind="pooler", preprocessor=None, **settings):
    data = DataConfig(feature_cache=None if root is None else str(root), feature_batch_size=3, **settings)
    preprocessor = preprocessor or ImagePreprocessor(size=16)
    return FeatureStore(vit, kind, preprocessor, data)


def records(folder, count=5):
    """Images of noise, each another one."""
    folder.mkdir(exist_ok=True)
    made = []
    for i in range(count):
        path = folder / f"{i}.png"
        data = torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(data.numpy()).save(path)
        made.append(ImageRecord(i, path.name, path))
    return made


def rows(features, images):
    """The features of images, in their order."""
    return [features[image.path] for image in images]


@pytest.mark.parametrize("kind", ["pooler", "tokens"])
@pytest.mark.parametrize("on_disk", [True, False])
def test_features_are_the_vits(tiny, tmp_path, kind, on_disk):
    vit, images = load_vit(tiny), records(tmp_path / "images")
    root = tmp_path / "cache" if on_disk else None
    features = store(vit, root, kind).load(images)
    pixels = torch.stack([ImagePreprocessor(size=16)(image.path) for image in images])
    expected = image_features(vit, pixels, kind)
    found = torch.stack(rows(features, images))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.shape == (5, 1 if kind == "pooler" else 5, 32)


def test_a_tower_in_half_precision_and_another_layer(tiny, tmp_path):
    vit, images = load_vit(tiny), records(tmp_path / "images")
    data = DataConfig(feature_cache=str(tmp_path / "cache"))
    found = {}
    for name, tower, layer in (("whole", vit, None), ("layer", vit, -2), ("half", load_vit(tiny).bfloat16(), -2)):
        made = FeatureStore(tower, "mean", ImagePreprocessor(size=16), data, layer)
        found[name] = torch.stack(rows(made.load(images), images))
        assert made.computed == 5, "no other one's features may be taken"
    assert not torch.allclose(found["layer"], found["whole"], atol=0.1)
    torch.testing.assert_close(found["half"], found["layer"], rtol=0.05, atol=0.05)


def test_each_image_is_decoded_once(tiny, tmp_path, opens):
    vit, images = load_vit(tiny), records(tmp_path / "images")
    first = store(vit, tmp_path / "cache")
    kept = first.load(images[:3])
    assert (first.found, first.computed, len(opens)) == (0, 3, 3)
    again = store(vit, tmp_path / "cache")  # continues where the first stopped
    features = again.load(images)
    assert (again.found, again.computed, len(opens)) == (3, 2, 5)
    assert all(map(torch.equal, rows(features, images[:3]), rows(kept, images[:3])))
    copy = tmp_path / "images" / "copy.png"
    shutil.copy(images[0].path, copy)
    assert torch.equal(again.load([ImageRecord(9, "copy.png", copy)])[copy], kept[images[0].path])
    assert len(opens) == 5, "the same content under another name"


def test_unchanged_files_are_not_even_read(tiny, tmp_path, monkeypatch):
    vit, images = load_vit(tiny), records(tmp_path / "images")
    monkeypatch.setattr("routingvl.data.feature_cache._SETTLED_NS", -(10**12))
    store(vit, tmp_path / "cache").load(images)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} was read"))
    again = store(vit, tmp_path / "cache")
    assert len(again.load(images)) == again.found == 5


def test_a_cache_that_may_not_be_written_is_read_and_what_it_lacks_is_an_error(tiny, tmp_path, monkeypatch, caplog):
    vit, images, root = load_vit(tiny), records(tmp_path / "images"), tmp_path / "cache"
    kept = store(vit, root).load(images[:3])
    monkeypatch.setattr("routingvl.data.feature_cache._SETTLED_NS", -(10**12))
    plain = Path.open

    def guarded(self, mode="r", *args, **kwargs):  # root, who runs tests in containers, may write anywhere
        if root in self.parents and set(mode) & set("wax+"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return plain(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", guarded)
    found = store(vit, root).load(images[:3])
    assert all(map(torch.equal, rows(found, images[:3]), rows(kept, images[:3])))
    assert "cannot be written: image files are read in every run" in caplog.text
    with pytest.raises(FeatureCacheError, match=f"{root} lacks images and cannot be written .* another folder"):
        store(vit, root).load(images)


def test_a_changed_image_is_a_miss(tiny, tmp_path):
    vit, images = load_vit(tiny), records(tmp_path / "images")
    before = rows(store(vit, tmp_path / "cache").load(images), images)
    shutil.copy(images[1].path, images[0].path)
    Image.new("RGB", (24, 20), (1, 2, 3)).save(images[2].path)
    again = store(vit, tmp_path / "cache")
    after = rows(again.load(images), images)
    assert again.computed == 1  # the content of image 1 was known
    assert torch.equal(after[0], before[1])
    assert not torch.allclose(after[2], before[2])


def test_a_changed_model_or_preprocessing_is_a_miss(tiny, tmp_path):
    vit, images, root = load_vit(tiny), records(tmp_path / "images", 2), tmp_path / "cache"
    assert store(vit, root).load(images)
    assert vision_key(vit, "pooler", ImagePreprocessor(16))["weights"]
    changes = [
        {"kind": "cls"},
        {"preprocessor": ImagePreprocessor(16, mean=(0.4, 0.5, 0.5))},
        {"preprocessor": ImagePreprocessor(16, std=(0.4, 0.5, 0.5))},
        {"preprocessor": ImagePreprocessor(16, resample=3)},
        {"preprocessor": ImagePreprocessor(16, rescale=1 / 127)},
        {"feature_dtype": "bfloat16"},
    ]
    for change in changes:
        other = store(vit, root, **change)
        other.load(images)
        assert (other.found, other.computed) == (0, 2), change
    with torch.no_grad():  # the smallest possible change of one weight
        bias = vit.encoder.layer[0].layernorm_before.bias if hasattr(vit, "encoder") else next(vit.parameters())
        bias.view(-1)[0] = torch.nextafter(bias.view(-1)[0], torch.tensor(9.0))
    other = store(vit, root)
    other.load(images)
    assert other.computed == 2
    vit.config.layer_norm_eps = 1e-3
    other = store(vit, root)
    other.load(images)
    assert other.computed == 2


def test_a_damaged_row_is_computed_again(tiny, tmp_path, caplog):
    vit, images, root = load_vit(tiny), records(tmp_path / "images"), tmp_path / "cache"
    first = store(vit, root)
    before = rows(first.load(images), images)
    (path,) = first.cache.directory.glob("*.rows")
    data = bytearray(path.read_bytes())
    data[first.cache.row_bytes + 3] ^= 64
    path.write_bytes(data)
    again = store(vit, root)
    after = rows(again.load(images), images)
    assert (again.found, again.computed) == (4, 1)
    assert str(path) in caplog.text
    for i in range(5):
        torch.testing.assert_close(after[i], before[i], rtol=1e-5, atol=1e-6)


def test_what_was_computed_before_an_unreadable_image_is_kept(tiny, tmp_path):
    vit, images, root = load_vit(tiny), records(tmp_path / "images"), tmp_path / "cache"
    images[4].path.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"4\.png cannot be read"):
        store(vit, root).load(images)
    images[3].path.unlink()
    again = store(vit, root, on_bad_image="skip")
    assert set(again.load(images)) == {image.path for image in images[:3]}
    assert (again.found, again.computed) == (3, 0)


# --------------------------------------------------------------------------------------------------------- training


def losses(result):
    return [record["loss"] for record in result.history if record["kind"] == "train"]


@pytest.mark.parametrize(("task", "remembered"), [("vqa", True), ("caption", False)])
def test_training_is_the_same_and_reads_no_image_again(tiny, tmp_path, task, remembered, opens, workers, monkeypatch):
    # Files younger than this, in ns, are not remembered: none of them, or each.
    monkeypatch.setattr("routingvl.data.feature_cache._SETTLED_NS", 0 if remembered else 10**18)
    settings = {"max_steps": 6, "eval_every": 3, "workers": 1}
    read = train(tiny_config(tiny, tmp_path / "read", task, **settings), log="quiet")
    cached = settings | {"feature_cache": str(tmp_path / "cache")}
    opens.clear()
    first = train(tiny_config(tiny, tmp_path / "first", task, **cached | {"workers": 0}), log="quiet")
    assert len(opens) == 16, "12 training and 4 validation images, once each"
    assert losses(first) == pytest.approx(losses(read), rel=1e-5)
    opens.clear()
    workers.clear()
    second = train(tiny_config(tiny, tmp_path / "second", task, **cached), log="quiet")
    assert opens == []
    if not remembered:
        assert workers.pop(0) == 1, "files that are not remembered are hashed by the workers"
    assert set(workers) == {0}, "training and validation need none"
    assert len(workers) >= 2
    assert losses(second) == losses(first)
    one, other = (load_file(r.run_dir / "last" / "adapter_model.safetensors") for r in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_training_from_half_precision_features(tiny, tmp_path, dtype):
    settings = {"max_steps": 4, "feature_cache": str(tmp_path / "cache")}
    full = train(tiny_config(tiny, tmp_path / "full", "vqa", **settings), log="quiet")
    half = train(tiny_config(tiny, tmp_path / "half", "vqa", feature_dtype=dtype, **settings), log="quiet")
    assert losses(half) == pytest.approx(losses(full), rel=2e-2)
    assert losses(half) != losses(full)


def test_evaluation_and_prediction_use_the_cache_of_the_run(tiny, tmp_path, opens):
    cached = {"max_steps": 3, "num_beams": 1, "feature_cache": str(tmp_path / "cache")}
    for task in ("caption", "vqa"):
        result = train(tiny_config(tiny, tmp_path / task, task, **cached), log="quiet")
        opens.clear()
        scores = evaluate(result.run_dir, "val", log="quiet")
        assert opens == []
        assert scores["n"] == 4
        without = evaluate(result.run_dir, "val", output=tmp_path / "x", log="quiet", feature_cache=None)
        assert len(opens) == 4
        assert Path(scores["predictions"]).read_text() == Path(without["predictions"]).read_text()
        image = tiny / "data" / "val2014" / "COCO_val2014_000000000101.jpg"  # of train, so in the cache
        opens.clear()
        from_cache = predictions(task, result.run_dir, image)
        assert opens == []
        plain = predictions(task, result.run_dir, image, feature_cache=None)
        assert from_cache.keys() == plain.keys()
        assert list(from_cache.values()) == pytest.approx(list(plain.values()), rel=1e-4)


def predictions(task, run_dir, image, **overrides):
    """{text: probability, or 1 for a caption} of one image."""
    predictor = Predictor(run_dir, **overrides)
    if task == "caption":
        return dict.fromkeys(predictor.caption([image]), 1.0)
    return dict(predictor.answer(image, "what color is it?"))


# ---------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def distinct(tiny, tmp_path):
    """The tiny inputs with another picture in each image file."""
    folder = shutil.copytree(tiny, tmp_path / "distinct")
    for i, path in enumerate(sorted((folder / "data" / "val2014").iterdir())):
        Image.new("RGB", (24, 20), (10 * i, 255 - 10 * i, 99)).save(path)
    return folder


def arguments(tiny, task="caption"):
    text = "gpt2" if task == "caption" else "roberta"
    return [
        "--task", task, "--device", "cpu", "--model.vision", str(tiny / "vit"), "--model.text", str(tiny / text),
        "--data.annotations", str(tiny / "data"), "--data.images", str(tiny / "data"),
    ]  # fmt: skip


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_command(distinct, tmp_path, capsys, opens, task):
    cache = str(tmp_path / "features")
    assert main(["cache-features", *arguments(distinct, task), "--feature-cache", cache]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "train: 12 images, 0 found, 12 computed", "val: 4 images, 0 found, 4 computed", f"features are in {cache}"
    ]  # fmt: skip
    more = [*arguments(distinct, task), "--data.feature_cache", cache, "--splits", "val", "test"]
    assert main(["cache-features", *more]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "val: 4 images, 4 found, 0 computed", "test: 5 images, 0 found, 5 computed"
    ]  # fmt: skip
    opens.clear()
    command = ["train", *arguments(distinct, task), "--feature-cache", cache, "--output_dir", str(tmp_path / "run")]
    assert main([*command, "--train.max_steps", "2", "--train.batch_size", "4", "--routing.rank", "4", "--quiet"]) == 0
    assert opens == []
    assert f"feature_cache: {cache}" in (tmp_path / "run" / "config.yaml").read_text()


def test_command_errors(tiny, tmp_path, capsys):
    def fails(*args):
        assert main(list(args)) == 2
        return capsys.readouterr().err

    assert "feature_cache is not set; add --feature-cache FOLDER" in fails("cache-features", *arguments(tiny))
    file = tmp_path / "file"
    file.write_text("")
    assert f"{file} is a file; name a folder" in fails("cache-features", *arguments(tiny), "--feature-cache", str(file))
    assert "feature_cache is empty" in fails("cache-features", *arguments(tiny), "--feature-cache", "")
    assert "feature_dtype" in fails("train", *arguments(tiny), "--data.feature_dtype", "int8")
    gone = [*arguments(tiny)[:-1], str(tmp_path / "gone")]
    assert "data.images" in fails("cache-features", *gone, "--feature-cache", str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()
    with pytest.raises(ConfigError, match="feature_cache is not set"):
        cache_features(tiny_config(tiny, tmp_path / "x", "vqa"))


def test_threads_share_a_predictor_with_a_cache(tiny, tmp_path):
    cached = {"max_steps": 2, "num_beams": 1}
    result = train(tiny_config(tiny, tmp_path / "run", "vqa", **cached), log="quiet")
    images = [record.path for record in records(tmp_path / "own", 24)]
    alone = Predictor(result.run_dir)
    expected = [alone.answer(image, "what color is it?") for image in images]
    shared = Predictor(result.run_dir, feature_cache=str(tmp_path / "cache"))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda image: shared.answer(image, "what color is it?"), images * 3))
    for one, other in zip(found, expected * 3, strict=True):
        assert dict(one) == pytest.approx(dict(other), rel=1e-4)
    index = [path.stat().st_size for path in (tmp_path / "cache").rglob("*.index")]
    assert sum(index) == 48 * len(images), "each image was computed once"
