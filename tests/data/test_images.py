"""Image reading and preprocessing; the oracle is transformers' ViTImageProcessorPil."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from routingvl.data.collate import collate_images
from routingvl.data.files import DataError, ImageFolders
from routingvl.data.image_files import to_rgb
from routingvl.data.images import (
    ImageDataset,
    ImageError,
    ImagePreprocessor,
    ImageRecord,
    PictureSource,
    load_image,
)


def picture(height: int = 37, width: int = 53, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def jpeg(tmp_path):
    path = tmp_path / "good.jpg"
    picture().save(path)
    return path


@pytest.fixture
def truncated(tmp_path):
    path = tmp_path / "truncated.jpg"
    picture(200, 200).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return path


class TestLoadImage:
    @pytest.mark.parametrize(
        ("mode", "suffix"), [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("1", "png"), ("LA", "png"), ("RGBA", "png")]
    )
    def test_every_mode_becomes_rgb(self, tmp_path, mode, suffix):
        path = tmp_path / f"image.{suffix}"
        picture().convert(mode).save(path)
        loaded = load_image(path)
        assert (loaded.mode, loaded.size) == ("RGB", (53, 37))
        assert np.ptp(np.asarray(loaded)) > 100

    def test_grey_is_the_same_in_every_channel(self, tmp_path):
        picture().convert("L").save(tmp_path / "grey.png")
        pixels = np.asarray(load_image(tmp_path / "grey.png"))
        np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])
        np.testing.assert_array_equal(pixels[..., 0], np.asarray(picture().convert("L")))

    def test_sixteen_bits_are_scaled_not_clipped(self, tmp_path):
        wide = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
        Image.fromarray(wide).save(tmp_path / "wide.png")
        np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "wide.png"))[..., 1], wide >> 8)

    def test_transparent_palette_gives_no_warning(self, tmp_path, recwarn):
        image = picture().convert("P")
        image.save(tmp_path / "clear.png", transparency=bytes(range(256)))
        assert load_image(tmp_path / "clear.png").mode == "RGB"
        assert not recwarn.list

    def test_truncated_jpeg_is_an_error_that_names_the_file(self, truncated):
        with pytest.raises(ImageError, match=r"truncated\.jpg cannot be read"):
            load_image(truncated)

    def test_missing_file(self, tmp_path):
        with pytest.raises(ImageError, match=r"absent\.jpg does not exist"):
            load_image(tmp_path / "absent.jpg")

    @pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff"])
    def test_not_an_image(self, tmp_path, content):
        (tmp_path / "bad.jpg").write_bytes(content)
        with pytest.raises(ImageError, match=r"bad\.jpg cannot be read"):
            load_image(tmp_path / "bad.jpg")

    def test_folder_in_place_of_a_file(self, tmp_path):
        with pytest.raises(ImageError, match="cannot be read"):
            load_image(tmp_path)

    def test_error_survives_the_way_back_from_a_worker(self):
        assert "x.jpg" in str(pickle.loads(pickle.dumps(ImageError("image x.jpg does not exist"))))


CONFIGS = [
    {},
    {"size": {"height": 32, "width": 48}},
    {"size": {"height": 16, "width": 16}, "resample": 3},
    {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "size": {"height": 40, "width": 40}},
    {"do_normalize": False, "size": {"height": 24, "width": 24}},
    {"rescale_factor": 1 / 127.5, "size": {"height": 24, "width": 24}},
    {"do_rescale": False, "size": {"height": 24, "width": 24}},
]


class TestPreprocessor:
    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("shape", [(37, 53), (300, 200), (24, 24)])
    def test_bit_identical_to_transformers(self, config, shape):
        from transformers import ViTImageProcessorPil

        image = picture(*shape)
        expected = ViTImageProcessorPil(**config)(image, return_tensors="pt")["pixel_values"][0]
        actual = ImagePreprocessor.from_dict(config)(image)
        assert actual.dtype == torch.float32
        assert actual.is_contiguous()
        assert torch.equal(actual, expected)

    def test_values_are_the_formula_to_the_bit(self):
        mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
        resized = np.asarray(picture().resize((30, 20), resample=3)).transpose(2, 0, 1)
        rescaled = (resized * np.float64(1 / 255)).astype(np.float32)
        columns = [np.array(values, dtype=np.float32)[:, None, None] for values in (mean, std)]
        found = ImagePreprocessor(size=(20, 30), mean=mean, std=std, resample=3)(picture())
        assert torch.equal(found, torch.from_numpy((rescaled - columns[0]) / columns[1]))

    @pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA"])
    def test_file_and_image_of_any_mode(self, tmp_path, mode):
        path = tmp_path / "image.tif"
        picture().convert(mode).save(path)
        preprocess = ImagePreprocessor(size=(20, 30))
        assert preprocess(path).shape == (3, 20, 30)
        assert torch.equal(preprocess(path), preprocess(to_rgb(Image.open(path))))

    def test_to_dict_is_read_back_by_us_and_by_transformers(self):
        from transformers import ViTImageProcessorPil

        ours = ImagePreprocessor(size=(20, 30), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), resample=3)
        assert ImagePreprocessor.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours
        theirs = ViTImageProcessorPil.from_dict(ours.to_dict())
        assert torch.equal(ours(picture()), theirs(picture(), return_tensors="pt")["pixel_values"][0])

    @pytest.mark.parametrize("kind", [{"feature_extractor_type": "ViTFeatureExtractor", "size": 18}, None])
    def test_from_pretrained_folder(self, tmp_path, kind):
        from transformers import ViTImageProcessorPil

        if kind is None:
            ViTImageProcessorPil(size={"height": 18, "width": 18}).save_pretrained(tmp_path)
        else:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(kind))
        assert ImagePreprocessor.from_pretrained(tmp_path) == ImagePreprocessor(size=18)

    def test_falls_back_to_the_image_size_of_the_model_and_says_so(self, tmp_path, caplog):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": 36}))
        assert ImagePreprocessor.from_pretrained(tmp_path) == ImagePreprocessor(
            size=36, mean=(0.5,) * 3, std=(0.5,) * 3
        )
        assert "preprocessor_config.json" in caplog.text

    def test_folder_of_no_vision_model(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        with pytest.raises(DataError, match=r"neither preprocessor_config\.json nor a config\.json with image_size"):
            ImagePreprocessor.from_pretrained(tmp_path)

    def test_unknown_hub_name(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(DataError, match="no-such-organisation/no-such-vit"):
            ImagePreprocessor.from_pretrained("no-such-organisation/no-such-vit")

    @pytest.mark.parametrize(
        "config",
        [
            {"size": {"shortest_edge": 224}},
            {"do_center_crop": True},
            {"do_resize": False},
            {"image_mean": [0.5]},
            {"do_flip_channel_order": True},
            {"do_resize": "false"},
        ],
    )
    def test_unsupported_config_names_its_file(self, config):
        with pytest.raises(DataError, match=r"some/preprocessor_config\.json"):
            ImagePreprocessor.from_dict(config, source="some/preprocessor_config.json")

    @pytest.mark.parametrize("options", [{"size": 0}, {"size": (3, 4, 5)}, {"std": 0.0}, {"mean": (0.5, 0.5)}])
    def test_impossible_values(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            ImagePreprocessor(**options)

    def test_pickles_for_workers(self):
        preprocess = ImagePreprocessor(size=8)
        assert torch.equal(pickle.loads(pickle.dumps(preprocess))(picture()), preprocess(picture()))


class TestImageFolders:
    @pytest.mark.parametrize("layout", ["Images/val2014", "val2014"])
    def test_folder_comes_from_the_file_name(self, tmp_path, layout):
        (tmp_path / layout).mkdir(parents=True)
        name = "COCO_val2014_000000000042.jpg"
        assert ImageFolders(tmp_path).path(name, folder="train2014") == tmp_path / layout / name

    def test_name_without_prefix(self, tmp_path):
        (tmp_path / "own").mkdir()
        assert ImageFolders(tmp_path).path("x.jpg") == tmp_path / "x.jpg"
        assert ImageFolders(tmp_path).path("x.jpg", folder="own") == tmp_path / "own" / "x.jpg"

    def test_missing_folders_are_named(self, tmp_path):
        with pytest.raises(DataError, match="absent does not exist"):
            ImageFolders(tmp_path / "absent")
        with pytest.raises(DataError, match=r"Images/train2014 and .*train2014"):
            ImageFolders(tmp_path).path("COCO_train2014_000000000001.jpg")


class TestPictureSource:
    def test_features_win_and_images_are_never_opened(self):
        features = {7: torch.ones(1, 4)}
        record = ImageRecord(7, "absent.jpg", None)
        for given in (features, features.__getitem__):
            assert torch.equal(PictureSource(features=given).picture(record)["vision_features"], features[7])

    def test_missing_features_name_the_image(self):
        with pytest.raises(DataError, match="image 8"):
            PictureSource(features={7: torch.ones(1, 4)}).picture(ImageRecord(8, "eight.jpg"))

    def test_no_image_folder(self):
        with pytest.raises(DataError, match="without an image folder"):
            PictureSource(ImagePreprocessor(8)).picture(ImageRecord(8, "eight.jpg"))

    def test_needs_a_source_and_a_known_policy(self):
        with pytest.raises(ValueError, match="preprocessor"):
            PictureSource()
        with pytest.raises(ValueError, match="on_bad_image='ignore'"):
            PictureSource(ImagePreprocessor(8), on_bad_image="ignore")

    def test_fail_raises(self, truncated):
        with pytest.raises(ImageError, match=r"truncated\.jpg"):
            PictureSource(ImagePreprocessor(8)).picture(ImageRecord(1, "truncated.jpg", truncated))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_skip_drops_and_counts_also_with_workers(self, jpeg, truncated, tmp_path, workers):
        paths = [jpeg, truncated, jpeg, truncated, truncated, tmp_path / "absent.jpg", jpeg]
        records = [ImageRecord(i, path.name, path) for i, path in enumerate(paths)]
        dataset = ImageDataset(records, ImagePreprocessor(8), on_bad_image="skip")
        loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=collate_images)
        batches = list(loader)
        assert [batch and batch["image_ids"] for batch in batches] == [[0], [2], None, [6]]
        assert batches[0]["pixel_values"].shape == (1, 3, 8, 8)
        assert dataset.skipped == 4

    def test_failure_in_a_worker_names_the_file(self, truncated):
        dataset = ImageDataset([ImageRecord(1, "truncated.jpg", truncated)], ImagePreprocessor(8))
        with pytest.raises(ImageError, match=r"truncated\.jpg"):
            list(DataLoader(dataset, num_workers=1, collate_fn=collate_images))


@pytest.mark.filterwarnings("ignore")  # of Pillow, about damaged metadata
class TestFaultyFiles:
    @pytest.mark.parametrize("fault", ["fifo", "folder", "device", "name", "long", "empty"])
    def test_what_is_no_file_is_refused_before_it_is_opened(self, tmp_path, fault):
        path = tmp_path / "x.jpg"
        if fault == "fifo":
            os.mkfifo(path)
        elif fault == "folder":
            path.mkdir()
        path = {"device": "/dev/zero", "name": "a\0b.jpg", "long": "a" * 5000, "empty": ""}.get(fault, path)
        with pytest.raises(ImageError, match=r"cannot be read|does not exist") as caught:
            load_image(path)
        assert len(str(caught.value)) < 500
        with pytest.raises(ImageError):
            ImageDataset([ImageRecord(1, "x", Path(path))], ImagePreprocessor(8))[0]

    @pytest.mark.parametrize("suffix", ["eps", "dds", "tga", "ico", "ppm", "pcx", "icns", "avif", "jp2", "pdf"])
    def test_other_formats_are_not_opened(self, tmp_path, suffix, monkeypatch):
        Image.init()
        if f".{suffix}" not in Image.EXTENSION:
            pytest.skip(f"Pillow writes no {suffix} here")
        original = tmp_path / f"image.{suffix}"
        try:
            picture(32, 32).save(original)
        except (OSError, ValueError) as error:
            pytest.skip(str(error))
        monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: pytest.fail("a program was started"))
        path = original.rename(tmp_path / "image.jpg")
        for start in (load_image, ImagePreprocessor(8)):
            with pytest.raises(ImageError, match=r"image\.jpg cannot be read: it is none of JPEG, PNG, WEBP, GIF"):
                start(path)

    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
    def test_every_format_is_read_whatever_its_name_and_damage_is_an_image_error(self, tmp_path, suffix):
        original = tmp_path / f"image.{suffix}"
        frames = {"save_all": True, "append_images": [picture(seed=1)]} if suffix == "gif" else {}
        picture().save(original, **frames)
        whole = original.read_bytes()
        path = tmp_path / "image.dat"
        path.write_bytes(whole)
        loaded = load_image(path)
        assert (loaded.mode, loaded.size) == ("RGB", (53, 37))
        assert np.abs(np.asarray(loaded).astype(int) - np.asarray(picture())).mean() < 60, "the first frame"
        generator = np.random.default_rng(0)
        for _ in range(60):
            data = bytearray(whole)
            for position in generator.integers(0, min(len(data), 400), 4):
                data[position] = generator.integers(0, 256)
            path.write_bytes(data[: generator.integers(1, len(data) + 1)])
            try:
                load_image(path)
            except ImageError as error:
                assert str(path) in str(error)  # noqa: PT017
            ImageDataset([ImageRecord(1, "x", path)], ImagePreprocessor(8), on_bad_image="skip")[0]

    def test_a_decompression_bomb(self, tmp_path):
        Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
        assert (tmp_path / "bomb.png").stat().st_size < 100_000
        with pytest.raises(ImageError, match=r"bomb\.png cannot be read: .*decompression bomb"):
            load_image(tmp_path / "bomb.png")

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
            (np.array([[0, 100.4, 255]], np.float32), [0, 100, 255]),
            (np.array([[0, 32768, 65535]], np.float32), [0, 128, 255]),
            (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
            (np.array([[0, 5e5, 1e6]], np.float32), [0, 128, 255]),
            (np.array([[3, 3, 3]], np.float32), [3, 3, 3]),
            (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
            (np.array([[0, 300, 65535]], np.int32), [0, 1, 255]),
            (np.array([[0, 2**20, 2**30]], np.int32), [0, 0, 255]),
            (np.array([[0, 0x8000, 0xFFFF]], np.uint16), [0, 128, 255]),
        ],
    )
    def test_deep_grey_is_scaled(self, tmp_path, values, expected):
        Image.fromarray(values).save(tmp_path / "deep.tif")
        assert np.asarray(load_image(tmp_path / "deep.tif"))[0, :, 1].tolist() == expected

    def test_values_that_are_not_finite(self, tmp_path):
        Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "nan.tif")
        with pytest.raises(ImageError, match=r"nan\.tif cannot be read: it holds values that are not finite"):
            load_image(tmp_path / "nan.tif")


class TestOrientation:
    @pytest.fixture
    def turned(self, tmp_path):
        """A file whose EXIF data say that it lies on its side."""
        exif = Image.Exif()
        exif[0x0112] = 6
        picture().save(tmp_path / "turned.png", exif=exif)
        return tmp_path / "turned.png"

    def test_applied_by_option(self, turned):
        assert load_image(turned).size == (53, 37)
        upright = np.asarray(load_image(turned, exif=True))
        np.testing.assert_array_equal(upright, np.rot90(np.asarray(picture()), -1))
        assert ImagePreprocessor(8, exif=True).to_dict() == ImagePreprocessor(8).to_dict()
        assert not torch.equal(ImagePreprocessor(8, exif=True)(turned), ImagePreprocessor(8)(turned))

    def test_turned_pictures_have_a_digest_of_their_own(self, turned, jpeg):
        for path, same in ((turned, False), (jpeg, True)):
            items = [
                ImageDataset([ImageRecord(1, "x", path)], ImagePreprocessor(8, exif=on))[0] for on in (False, True)
            ]
            assert (items[0]["digest"] == items[1]["digest"]) is same

    def test_damaged_exif_data_turn_nothing(self, tmp_path):
        picture().save(tmp_path / "odd.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x01")
        assert load_image(tmp_path / "odd.jpg", exif=True).size == (53, 37)


class TestPreprocessorFiles:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[]", "must hold an object, not a list"),
            ('{"size"', "not valid JSON"),
            ('{"size": 1000000}', "size=1000000 must be an integer from 1 to 4096"),
            ('{"size": true}', "size=True must be"),
            ('{"size": {"height": 16.5, "width": 16}}', "size="),
            ('{"size": "big"}', "size="),
            ('{"resample": 99}', "resample=99 is none of Pillow's filters"),
            ('{"resample": "2"}', "resample='2' is none"),
            ('{"rescale_factor": Infinity}', "holds Infinity"),
            ('{"rescale_factor": 0}', "rescale=0 must be a number above zero"),
            ('{"rescale_factor": "x"}', "rescale='x' must be"),
            ('{"image_mean": [1e999, 0, 0]}', "too large a number"),
            ('{"image_mean": ["a", 0, 0]}', "mean="),
            ('{"image_std": [0, 1, 1]}', "std="),
            ('{"image_std": [-1, 1, 1]}', "std="),
            ('{"size": 24}', "gives images of 24 x 24 pixels, but .*config.json is of a ViT for 16"),
        ],
    )
    def test_faults_name_the_file(self, tmp_path, content, message):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": 16}))
        (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(DataError, match=message) as caught:
            ImagePreprocessor.from_pretrained(tmp_path)
        assert str(tmp_path / "preprocessor_config.json") in str(caught.value)

    @pytest.mark.parametrize("size", [0, "big", True, [1, 2, 3]])
    def test_image_size_of_the_model(self, tmp_path, size):
        (tmp_path / "config.json").write_text(json.dumps({"image_size": size}))
        with pytest.raises(DataError, match=r"config\.json: "):
            ImagePreprocessor.from_pretrained(tmp_path)
