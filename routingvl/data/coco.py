"""COCO captions with the Karpathy split.

Ids are COCO's (``cocoid``), never the running ``imgid`` of dataset_coco.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from routingvl.data.examples import ExampleDataset
from routingvl.data.files import DataError, ImageFolders, collection_paused, read_json, required_keys
from routingvl.data.images import ImageRecord

SPLITS = ("train", "val", "test")
# Karpathy's name -> the split it belongs to
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
DATASET_FILE = "dataset_coco.json"
_SPLIT_FILE = re.compile(r"captions_(\w+)_karpathy\.json")


def caption_file(split: str) -> str:
    """Name of the per-split caption file, ``captions_{split}_karpathy.json``."""
    return f"captions_{split}_karpathy.json"


class Caption(NamedTuple):
    """One caption of one image, stripped of surrounding space; ``caption_id`` is COCO's (Karpathy's ``sentid``)."""

    image_id: int
    text: str
    caption_id: int


@dataclass(frozen=True)
class CaptionSplit:
    """The images and captions of one split, in file order.

    Attributes:
        name: train, val or test.
        images: every image of the split, also one without captions.
        captions: every caption of those images.
    """

    name: str
    images: list[ImageRecord]
    captions: list[Caption]

    @cached_property
    def references(self) -> dict[int, list[str]]:
        """All captions of each image that has any."""
        grouped: dict[int, list[str]] = {}
        for caption in self.captions:
            grouped.setdefault(caption.image_id, []).append(caption.text)
        return grouped


@collection_paused()
def load_captions(annotations: str | Path, split: str, image_root: str | Path | None = None) -> CaptionSplit:
    """Read one split of COCO captions.

    Args:
        annotations: a file in either form (see the module), or a folder with one of them, in it or in its
            ``annotations`` folder; the per-split file goes first.
        split: train, val or test (a ``karpathy_`` in front is allowed).
        image_root: folder with ``Images/val2014/...`` or ``val2014/...``; None when images are not needed.

    Raises:
        DataError: a file, image folder or key is missing, a caption is empty, an image is listed twice, or the file is
            that of another split. The message names the file and the entry.
    """
    split = split.removeprefix("karpathy_")
    if split not in SPLITS:
        raise DataError(f"unknown caption split {split!r}; the splits are {', '.join(SPLITS)}")
    path = _find_annotations(Path(annotations), split)
    if (named := _SPLIT_FILE.fullmatch(path.name)) and named.group(1) != split:
        raise DataError(f"{path} holds the split {named.group(1)!r}, but {split!r} was asked for")
    content = read_json(path)
    if not isinstance(content, Mapping) or "images" not in content:
        raise DataError(f'{path} has no "images"; expected {DATASET_FILE} or {caption_file(split)}')
    folders = ImageFolders(image_root)
    parse = _parse_coco if "annotations" in content else _parse_karpathy
    images, captions = parse(content, path, split, folders)
    check_unique((image.image_id for image in images), path)
    if not images:
        raise DataError(f"{path} has no images of split {split!r}")
    return CaptionSplit(split, images, captions)


def _find_annotations(annotations: Path, split: str) -> Path:
    if annotations.is_file():
        return annotations
    folders = (annotations, annotations / "annotations")
    candidates = [folder / name for folder in folders for name in (caption_file(split), DATASET_FILE)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DataError(
        f"no caption annotations of split {split!r}; looked for {', '.join(map(str, candidates))}. {DATASET_FILE} is "
        "in Karpathy's caption_datasets.zip; `routingvl prepare-data` makes the other files from it"
    )


def _parse_karpathy(
    content: Mapping[str, Any], path: Path, split: str, folders: ImageFolders
) -> tuple[list[ImageRecord], list[Caption]]:
    images, captions = [], []
    for entry in karpathy_images(content, path, split):
        image_id = entry["cocoid"]
        with required_keys(path, "image", image_id):
            name = entry["filename"]
            images.append(ImageRecord(image_id, name, folders.path(name, entry.get("filepath", ""))))
            for sentence in entry["sentences"]:
                captions.append(_caption(sentence["raw"], sentence["sentid"], image_id, path))
    return images, captions


def _parse_coco(
    content: Mapping[str, Any], path: Path, split: str, folders: ImageFolders
) -> tuple[list[ImageRecord], list[Caption]]:
    images, captions = [], []
    for position, entry in enumerate(content["images"]):
        with required_keys(path, "image number", position):
            images.append(ImageRecord(entry["id"], entry["file_name"], folders.path(entry["file_name"])))
    known = {image.image_id for image in images}
    for position, entry in enumerate(content["annotations"]):
        with required_keys(path, "annotation number", position):
            image_id = entry["image_id"]
            captions.append(_caption(entry["caption"], entry["id"], image_id, path))
        if image_id not in known:
            raise DataError(f"{path}: caption {entry['id']} belongs to image {image_id}, which is not among the images")
    return images, captions


def karpathy_images(content: Any, path: Path, split: str | None = None) -> Iterator[Mapping[str, Any]]:
    """Yield the image entries of dataset_coco.json, of all or of one split, with ``restval`` renamed to train."""
    if not isinstance(content, Mapping) or not isinstance(content.get("images"), list):
        raise DataError(f'{path} has no list "images"; expected {DATASET_FILE} of caption_datasets.zip')
    for position, entry in enumerate(content["images"]):
        with required_keys(path, "image number", position):
            name, image_id = entry["split"], entry["cocoid"]
        if name not in KARPATHY_SPLITS:
            raise DataError(f"{path}: image {image_id} has unknown split {name!r}")
        if split in (None, KARPATHY_SPLITS[name]):
            yield {**entry, "split": KARPATHY_SPLITS[name]}


def image_splits(dataset_coco: str | Path) -> dict[int, str]:
    """COCO image id -> train, val or test, read from dataset_coco.json."""
    path = Path(dataset_coco)
    return {entry["cocoid"]: entry["split"] for entry in karpathy_images(read_json(path), path)}


def _caption(raw: str, caption_id: int, image_id: int, path: Path) -> Caption:
    if not (text := raw.strip()):
        raise DataError(f"{path}: caption {caption_id} of image {image_id} is empty; remove it from the file")
    return Caption(image_id, text, caption_id)


def check_unique(ids: Iterable[int | str], path: Path, kind: str = "image") -> None:
    """Raise :class:`DataError` for the first id that occurs twice."""
    seen: set[int | str] = set()
    for identity in ids:
        if identity in seen:
            raise DataError(f"{path}: {kind} {identity} is listed twice")
        seen.add(identity)


class CaptionDataset(ExampleDataset):
    """Captions with their images: one item per caption for training, or one item per image for evaluation.

    Items are dicts with ``image_id``, ``caption`` (unless ``per_image``) and ``pixel_values`` float32 [3, H, W] or
    ``vision_features`` [L, d]; see :class:`~routingvl.data.examples.ExampleDataset` for the arguments not named here.

    Args:
        split: from :func:`load_captions`.
        per_image: one item per image, without a caption.

    Raises:
        DataError: there is nothing to train on.
    """

    def __init__(self, split: CaptionSplit, *args: Any, per_image: bool = False, **kwargs: Any):
        if not per_image and not split.captions:
            raise DataError(f"split {split.name!r} has no captions; use per_image=True to describe its images")
        super().__init__(split, *args, **kwargs)
        self.per_image = per_image

    @property
    def texts(self) -> list[str]:
        """The captions of all items; none with ``per_image``."""
        return [] if self.per_image else [caption.text for caption in self.split.captions]

    def __len__(self) -> int:
        return len(self.split.images if self.per_image else self.split.captions)

    def example(self, index: int) -> dict[str, Any]:
        """An item without its image."""
        if self.per_image:
            return {"image_id": self.split.images[index].image_id}
        caption = self.split.captions[index]
        return {"image_id": caption.image_id, "caption": caption.text}
