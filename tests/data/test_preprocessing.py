"""Preprocessing of every tower's published file; the oracle is transformers' own image processor from that folder."""

import json
import pickle

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from routingvl.data.files import DataError
from routingvl.data.image_files import ImageError
from routingvl.data.images import ImageDataset, ImageRecord
from routingvl.data.preprocessing import ImagePreprocessor

HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}


def square(side):
    return {"height": side, "width": side}


# As the checkpoints of each tower come with them.
PUBLISHED = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": square(224), "resample": 2} | STEPS | HALF,
    "deit": {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224, "resample": 3}
    | {"do_resize": True, "do_center_crop": True, "do_normalize": True}
    | IMAGENET,
    "beit": {"feature_extractor_type": "BeitFeatureExtractor", "size": 224, "crop_size": 224, "resample": 2}
    | {"do_resize": True, "do_center_crop": False, "do_normalize": True}
    | HALF,
    "dinov2": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "resample": 3}
    | {"crop_size": square(224), "do_center_crop": True, "do_convert_rgb": True}
    | STEPS
    | IMAGENET,
    "clip": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}
    | {"do_resize": True, "do_center_crop": True, "do_normalize": True}
    | OPENAI,
    "clip_new": {"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 336}, "resample": 3}
    | {"crop_size": square(336), "do_center_crop": True, "do_convert_rgb": True}
    | STEPS
    | OPENAI,
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": square(224), "resample": 3} | STEPS | HALF,
    "siglip2": {"image_processor_type": "SiglipImageProcessor", "size": square(256), "resample": 2} | STEPS | HALF,
    "swin": {"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "resample": 3}
    | {"do_resize": True, "do_normalize": True}
    | IMAGENET,
    "convnext": {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 0.875, "resample": 3}
    | {"do_resize": True, "do_normalize": True}
    | IMAGENET,
    "convnext_384": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "resample": 3}
    | {"crop_pct": None}
    | STEPS
    | IMAGENET,
    "resnet": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "resample": 3}
    | {"crop_pct": 0.875}
    | STEPS
    | IMAGENET,
    "no_rescaling": {"image_processor_type": "CLIPImageProcessor", "do_rescale": False},
    "no_normalisation": {"image_processor_type": "CLIPImageProcessor", "do_normalize": False},
    "defaults_of_the_class": {"image_processor_type": "SiglipImageProcessor"},
}
PLAIN = ("vit", "beit", "siglip", "siglip2", "swin", "convnext_384", "defaults_of_the_class")


def picture(height, width, mode="RGB"):
    """Smooth shapes with noise, so that filters and offsets differ."""
    generator = np.random.default_rng(height)
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(rows / 9) + np.cos(columns / 5), np.sin(columns / 11), np.cos(rows * columns / 900)], -1)
    pixels = 128 + 50 * waves + generator.normal(0, 20, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def folder_of(tmp_path, config, name="preprocessor_config.json"):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("name", PUBLISHED)
def test_bit_identical_to_transformers(tmp_path, name):
    folder = folder_of(tmp_path, PUBLISHED[name])
    theirs = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    ours = ImagePreprocessor.from_pretrained(folder)
    assert (ours.settings is None) is (name in PLAIN)
    converts = getattr(theirs, "do_convert_rgb", None)
    for shape, mode in (((301, 517), "RGB"), ((640, 333), "L"), ((97, 100), "RGBA"), ((224, 224), "RGB")):
        image = picture(*shape, mode)
        want = theirs(image if converts else image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        found = ours(image)
        assert found.dtype == torch.float32
        assert tuple(found.shape[1:]) == ours.size
        assert torch.equal(found, want.float()), (shape, mode)
    path = tmp_path / "photo.png"
    picture(301, 517).save(path)
    assert torch.equal(ours(path), theirs(picture(301, 517), return_tensors="pt")["pixel_values"][0].float())


@pytest.mark.parametrize("name", PUBLISHED)
def test_written_and_read_back_it_is_the_same(name):
    ours = ImagePreprocessor.from_dict(PUBLISHED[name])
    written = json.loads(json.dumps(ours.to_dict()))
    again = ImagePreprocessor.from_dict(written)
    assert again == ours
    assert again.to_dict() == written
    assert torch.equal(pickle.loads(pickle.dumps(again))(picture(50, 70)), ours(picture(50, 70)))


def test_dinov3_is_resized_in_float_and_then_normalised():
    """transformers' own class needs torchvision; by hand: rescale, resize with antialiasing, normalise."""
    config = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": square(64), "resample": 2}
    ours = ImagePreprocessor.from_dict(config | STEPS | IMAGENET)
    image = picture(301, 517)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] * (1 / 255)
    pixels = torch.nn.functional.interpolate(pixels, (64, 64), mode="bilinear", antialias=True, align_corners=False)
    mean, std = (torch.tensor(IMAGENET[key])[:, None, None] for key in ("image_mean", "image_std"))
    torch.testing.assert_close(ours(image), (pixels[0] - mean) / std, rtol=1e-5, atol=1e-5)
    # Pillow resizes 8-bit images, so the plain way is near, a step or so of 255 away, but another.
    plain = ImagePreprocessor(size=64, mean=IMAGENET["image_mean"], std=IMAGENET["image_std"])
    step = 1 / 255 / 0.224
    assert 0.1 * step < (ours(image) - plain(image)).abs().max() < 2 * step
    assert ImagePreprocessor.from_dict(ours.to_dict()) == ours
    with pytest.raises(DataError, match="resample=1 is not one of"):
        ImagePreprocessor.from_dict(config | {"resample": 1})


def test_the_file_of_a_whole_processor(tmp_path):
    """What transformers 5 writes for CLIP and the like holds the image processor's settings inside."""
    folder = folder_of(tmp_path, {"image_processor": PUBLISHED["clip_new"]}, "processor_config.json")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    assert ImagePreprocessor.from_pretrained(folder) == ImagePreprocessor.from_dict(PUBLISHED["clip_new"])


@pytest.mark.parametrize("kind", ["clip", "siglip_vision_model", "dinov2"])
def test_other_towers_than_vit_need_their_file(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "image_size": 224}))
    with pytest.raises(DataError, match=rf"has no preprocessor_config.json: take the one that belongs to the {kind}"):
        ImagePreprocessor.from_pretrained(tmp_path)
    folder_of(tmp_path, {"size": 224})
    with pytest.raises(DataError, match=r"preprocessor_config.json lacks image_processor_type"):
        ImagePreprocessor.from_pretrained(tmp_path)


CLIP = {"image_processor_type": "CLIPImageProcessor"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_processor_type": "Siglip2ImageProcessor"}, r"fixed height and width .* shape \[256, 768\]"),
        (
            {"image_processor_type": "Sam3ImageProcessor"},
            "'Sam3ImageProcessor' is no image processor that works",
        ),
        ({"image_processor_type": "os.system"}, "is no image processor"),
        ({"image_processor_type": "PreTrainedModel"}, "is no image processor"),
        (CLIP | {"do_center_crop": False}, r"fixed height and width .* or \[3, "),
        (CLIP | {"do_resize": False, "do_center_crop": False}, "fixed height and width"),
        (CLIP | {"size": {"shortest_edge": 10**7}}, "size=.* must have sides from 1 to 4096"),
        (CLIP | {"size": {"shortest_edge": -3}}, "size=.* must have sides"),
        (CLIP | {"size": True}, "size=True must have sides"),
        (CLIP | {"size": "big"}, "size"),
        (CLIP | {"crop_size": {"height": 10**6, "width": 10**6}}, "crop_size=.* must have sides"),
        (CLIP | {"crop_size": {"height": 1e3, "width": 3}}, "crop_size=.* must have sides"),
        (CLIP | {"resample": "2"}, "resample='2' is none"),
        (CLIP | {"image_mean": ["a", 0, 0]}, "mean="),
        (CLIP | {"image_std": [0, 1, 1]}, "std="),
        (CLIP | {"rescale_factor": "x"}, "rescale='x'"),
        (CLIP | {"do_center_crop": "yes"}, "do_center_crop must be true or false"),
        ({"do_center_crop": True}, "crop_size"),
    ],
)
def test_faults_name_the_file(config, message):
    with pytest.raises(DataError, match=f"^some/preprocessor_config.json: .*{message}") as error:
        ImagePreprocessor.from_dict(config, source="some/preprocessor_config.json")
    assert len(str(error.value)) < 400


def test_a_picture_as_narrow_as_a_thread_is_an_error_where_its_shorter_side_is_resized(tmp_path):
    ours = ImagePreprocessor.from_dict(PUBLISHED["clip"])
    path = tmp_path / "thread.png"
    Image.new("RGB", (3000, 5)).save(path)
    with pytest.raises(ImageError, match=r"thread.png cannot be resized: it has 3000 x 5 pixels"):
        ours(path)
    with pytest.raises(ImageError, match=r"thread.png cannot be resized"):
        ImageDataset([ImageRecord(1, "x", path)], ours)[0]
    assert ImagePreprocessor(8)(path).shape == (3, 8, 8)
