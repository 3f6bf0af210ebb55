"""NLVR2: statements about two photographs that are true or not, in the official JSON Lines.

    {"identifier": "train-10171-0-0", "sentence": "...", "label": "True", "directory": 54, "left_url": "...", ...}

The images of that example are train-10171-0-img0.png, the left one, and train-10171-0-img1.png. docs/data.md says where
they lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from routingvl.data.examples import ExampleDataset
from routingvl.data.files import DataError, ImageFolders, check_ids, collection_paused, one_line, required_keys
from routingvl.data.images import ImageRecord
from routingvl.json_files import parse_json, read_text

LABELS = ("False", "True")
# Identifiers are SPLIT-SET-PAIR-SENTENCE; both sentences about a pair of images share the images.
_IDENTIFIER = re.compile(r"[a-z]+\d*-\d+-\d+-\d+", re.ASCII)


class Statement(NamedTuple):
    """One example: ``images`` are the names of the left and the right one, ``label`` is None in a hidden test set."""

    identifier: str
    image_ids: tuple[str, str]
    text: str
    label: str | None


@dataclass(frozen=True)
class NLVR2Split:
    """The statements of one split, in file order, and their images, each once.

    Attributes:
        name: as asked for.
        images: in the order in which the statements first name them.
        examples: every statement; either all have a label or none has.
    """

    name: str
    images: list[ImageRecord]
    examples: list[Statement]

    @property
    def has_labels(self) -> bool:
        """Whether it can be learned or scored."""
        return self.examples[0].label is not None

    def example_keys(self) -> Iterator[tuple[Any, ...]]:
        """What makes an example: two images and a sentence about them."""
        return ((*example.image_ids, example.text) for example in self.examples)


@collection_paused()
def load_nlvr2(
    folder: str | Path, split: str, image_root: str | Path | None = None, *, allow_symlinks: bool = False
) -> NLVR2Split:
    """Read one split.

    Args:
        folder: holds ``{split}.json``: the official train.json, dev.json and test1.json, or others of their form.
        split: any name.
        image_root: folder that holds ``train/DIRECTORY/``, ``dev/`` and ``test1/``, or all images itself; None when
            they are not needed.
        allow_symlinks: let symbolic links lead out of ``image_root``.

    Raises:
        DataError: the file is missing or empty, a line is no such object, some lines have a label and others not, or an
            identifier comes twice. The message names file and line.
    """
    path = Path(folder) / f"{split}.json"
    text = read_text(path, DataError, f"data.annotations must be a folder with a file {path.name} for split {split!r}")
    places, images, examples = _Places(image_root, path, allow_symlinks), {}, []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        fields = parse_json(line, where, DataError, dict)
        with required_keys(path, "line", number):
            example, directory = _statement(fields, where), fields.get("directory")
        if examples and (example.label is None) is not (examples[0].label is None):
            raise DataError(f"{where}: some lines have a label and others not; all or none need one")
        examples.append(example)
        for name in example.image_ids:
            if name not in images:
                images[name] = places.image(name, directory, where)
    if not examples:
        raise DataError(f"{path} has no examples")
    check_ids((example.identifier for example in examples), path, "identifier")
    return NLVR2Split(split, list(images.values()), examples)


def _statement(fields: Mapping[str, Any], where: str) -> Statement:
    identifier, sentence, label = fields["identifier"], fields["sentence"], fields.get("label")
    if not isinstance(identifier, str) or not _IDENTIFIER.fullmatch(identifier):
        raise DataError(f"{where}: identifier {identifier!r:.60} must be of the form train-10171-0-0")
    if not isinstance(sentence, str) or not (text := one_line(sentence)):
        raise DataError(f"{where}: sentence of {identifier} must be a text that is not empty, not {sentence!r:.60}")
    if label is not None and label not in LABELS:
        raise DataError(f'{where}: label of {identifier} must be the string "True" or "False", not {label!r:.60}')
    pair = identifier.rpartition("-")[0]
    return Statement(identifier, (f"{pair}-img0.png", f"{pair}-img1.png"), text, label)


class _Places:
    """Where images lie: as in the archives of the authors, or all in one folder, as their download script puts them."""

    def __init__(self, root: str | Path | None, source: Path, allow_symlinks: bool) -> None:
        self.folders = ImageFolders(root, source, allow_symlinks)
        self.sorted: dict[str, bool] = {}  # whether there is a folder of a split

    def image(self, name: str, directory: Any, where: str) -> ImageRecord:
        """The image called ``name`` of an example with this ``directory``, an integer, or None outside of train."""
        if directory is not None and (isinstance(directory, bool) or not isinstance(directory, int | str)):
            raise DataError(f"{where}: directory must be the number of a folder of images, not {directory!r:.60}")
        part, root = name.partition("-")[0], self.folders.root
        if part not in self.sorted:
            self.sorted[part] = root is None or (root / part).is_dir()
        below = [part] + ([] if directory is None else [str(directory)]) if self.sorted[part] else []
        file_name = "/".join([*below, name])
        return ImageRecord(name, file_name, self.folders.path(file_name))


class NLVR2Dataset(ExampleDataset):
    """Statements with their two images and labels.

    Items are dicts with ``id``, ``image_id`` (of the left image), ``text``, ``target`` (0 for False, 1 for True; None
    when the split has no labels) and, of both images, the left one first, ``pixel_values`` float32 [2, 3, H, W] or
    ``vision_features`` [2, L, d]. See :class:`~routingvl.data.examples.ExampleDataset` for the arguments.
    """

    @property
    def texts(self) -> list[str]:
        """The sentences of all items."""
        return [example.text for example in self.split.examples]

    def __len__(self) -> int:
        return len(self.split.examples)

    def images_of(self, index: int, example: dict[str, Any]) -> tuple[ImageRecord, ...]:
        """The left and the right image."""
        return tuple(self._images[name] for name in self.split.examples[index].image_ids)

    def example(self, index: int) -> dict[str, Any]:
        """An item without its images."""
        example = self.split.examples[index]
        target = None if example.label is None else LABELS.index(example.label)
        return {
            "id": example.identifier,
            "image_id": example.image_ids[0],
            "text": example.text,
            "target": target,
        }
