"""COCO captions with the Karpathy split.

Ids are COCO's (``cocoid``), never the running ``imgid`` of dataset_coco.json.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from routingvl.data.examples import ExampleDataset
from routingvl.data.files import (
    DataError,
    ImageFolders,
    check_id,
    check_ids,
    collection_paused,
    one_line,
    read_json,
    required_keys,
    required_list,
)
from routingvl.data.images import ImageRecord

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
# Karpathy's name -> the split it belongs to
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
DATASET_FILE = "dataset_coco.json"
_EXPECTED = f"{DATASET_FILE} of caption_datasets.zip or a file in the form of COCO's captions"
_SPLIT_FILE = re.compile(r"captions_(\w+)_karpathy\.json")


def caption_file(split: str) -> str:
    """Name of the per-split caption file, ``captions_{split}_karpathy.json``."""
    return f"captions_{split}_karpathy.json"


class Caption(NamedTuple):
    """One caption of one image, on one line; ``caption_id`` is COCO's (Karpathy's ``sentid``)."""

    image_id: int | str
    text: str
    caption_id: int | str


@dataclass(frozen=True)
class CaptionSplit:
    """The images and captions of one split, in file order.

    Attributes:
        name: train, val or test.
        images: every image of the split.
        captions: every caption of those images; each image has one, or none has.
        split_in_file: whether the file tells which examples are of the split; otherwise it serves any split alike.
    """

    name: str
    images: list[ImageRecord]
    captions: list[Caption]
    split_in_file: bool = True

    def example_keys(self) -> Iterator[tuple[Any, ...]]:
        """What makes an example in evaluation: the image."""
        return ((image.path or image.file_name,) for image in self.images)

    @cached_property
    def references(self) -> dict[int | str, list[str]]:
        """All captions of each image that has any."""
        grouped: dict[int | str, list[str]] = {}
        for caption in self.captions:
            grouped.setdefault(caption.image_id, []).append(caption.text)
        return grouped


@collection_paused()
def load_captions(
    annotations: str | Path, split: str, image_root: str | Path | None = None, *, allow_symlinks: bool = False
) -> CaptionSplit:
    """Read one split of COCO captions.

    Args:
        annotations: a file in either form (see the module), or a folder with one of them, in it or in its
            ``annotations`` folder; the per-split file goes first.
        split: train, val or test (a ``karpathy_`` in front is allowed).
        image_root: folder with ``Images/val2014/...`` or ``val2014/...``; None when images are not needed.
        allow_symlinks: let symbolic links lead out of ``image_root``.

    Raises:
        DataError: a file, image folder or key is missing or of another form, a caption is empty, an image has none
            while others have, an id comes twice, an image name leaves ``image_root``, or the file is that of another
            split. The message names the file and the entry.
    """
    split = split.removeprefix("karpathy_")
    if split not in SPLITS:
        raise DataError(f"unknown caption split {split!r}; the splits are {', '.join(SPLITS)}")
    path = _find_annotations(Path(annotations), split)
    if (named := _SPLIT_FILE.fullmatch(path.name)) and named.group(1) != split:
        raise DataError(f"{path} holds the split {named.group(1)!r}, but {split!r} was asked for")
    content = read_json(path, kind=dict)
    folders = ImageFolders(image_root, path, allow_symlinks)
    official = "annotations" in content
    images, captions = (_parse_coco if official else _parse_karpathy)(content, path, split, folders)
    if not images:
        raise DataError(f"{path} has no images of split {split!r}")
    check_ids((caption.caption_id for caption in captions), path, "caption")
    described = {caption.image_id for caption in captions}
    if bare := [image.image_id for image in images if captions and image.image_id not in described]:
        raise DataError(
            f"{path}: image {bare[0]} (and {len(bare) - 1} more) has no caption while others have; remove it or add one"
        )
    if wordless := [c for c in captions if not (c.text[0].isalnum() or any(map(str.isalnum, c.text)))]:
        text, image_id = wordless[0].text, wordless[0].image_id
        logger.warning("%s: %d captions have no word, first %r of image %s", path, len(wordless), text, image_id)
    return CaptionSplit(split, images, captions, split_in_file=not official or named is not None)


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
    check_ids((image.image_id for image in images), path, "image")
    return images, captions


def _parse_coco(
    content: Mapping[str, Any], path: Path, split: str, folders: ImageFolders
) -> tuple[list[ImageRecord], list[Caption]]:
    images, captions = [], []
    for position, entry in enumerate(required_list(content, "images", path, _EXPECTED)):
        with required_keys(path, "image number", position):
            name = entry["file_name"]
            images.append(ImageRecord(check_id(entry["id"], path, "image id"), name, folders.path(name)))
    check_ids((image.image_id for image in images), path, "image")
    known = {image.image_id for image in images}
    for position, entry in enumerate(required_list(content, "annotations", path, _EXPECTED)):
        with required_keys(path, "annotation number", position):
            image_id = check_id(entry["image_id"], path, "annotation number #: image_id", position)
            captions.append(_caption(entry["caption"], entry["id"], image_id, path))
        if image_id not in known:
            raise DataError(f"{path}: caption {entry['id']} belongs to image {image_id}, which is not among the images")
    return images, captions


def karpathy_images(content: Any, path: Path, split: str | None = None) -> Iterator[Mapping[str, Any]]:
    """Yield the image entries of dataset_coco.json, of all or of one split, with ``restval`` renamed to train.

    Raises :class:`DataError` for an entry without id and split, and for an image that is listed twice, in whatever
    splits.
    """
    seen: set[Any] = set()
    for position, entry in enumerate(required_list(content, "images", path, _EXPECTED)):
        with required_keys(path, "image number", position):
            name, image_id = entry["split"], check_id(entry["cocoid"], path, "image number #: cocoid", position)
            file = (entry.get("filepath"), entry.get("filename"))
            if not isinstance(name, str) or name not in KARPATHY_SPLITS:
                raise DataError(f"{path}: image {image_id} has unknown split {name!r}")
            if image_id in seen:
                raise DataError(f"{path}: image {image_id} is listed twice")
            if file[1] is not None and file in seen:
                raise DataError(f"{path}: file {file[1]!r} of image {image_id} is listed twice")
        seen |= {image_id, file}
        if split in (None, KARPATHY_SPLITS[name]):
            yield {**entry, "split": KARPATHY_SPLITS[name]}


def image_splits(dataset_coco: str | Path) -> dict[int | str, tuple[str, str | None]]:
    """COCO image id -> (train, val or test; file name), read from dataset_coco.json."""
    path = Path(dataset_coco)
    entries = karpathy_images(read_json(path), path)
    return {entry["cocoid"]: (entry["split"], entry.get("filename")) for entry in entries}


def _caption(raw: str, caption_id: int | str, image_id: int | str, path: Path) -> Caption:
    if not (text := one_line(raw)):
        raise DataError(f"{path}: caption {caption_id} of image {image_id} is empty; remove it from the file")
    return Caption(image_id, text, check_id(caption_id, path, "caption id"))


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
