"""Images with a text and one of n labels, as JSON Lines: visual entailment (SNLI-VE), statements that are true or not.

    {"id": "2407091.jpg#0", "image": "flickr30k/2407091.jpg", "text": "Two people ride a bike.", "label": "entailment"}

docs/data.md says what the keys hold and which may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
)
from routingvl.data.images import ImageRecord
from routingvl.json_files import parse_json, read_text

LABELS_FILE = "labels.json"


class LabelledText(NamedTuple):
    """One example: ``text`` is a sentence or a pair, ``image_id`` the image's name, ``label`` None in a test set."""

    id: int | str
    image_id: str
    text: str | tuple[str, str]
    label: str | None


@dataclass(frozen=True)
class LabelledSplit:
    """The examples of one split, in file order, and their images, each once.

    Attributes:
        name: as asked for.
        images: in the order in which the examples first name them.
        examples: every example; either all have a label or none has.
        labels: every label of the file, in alphabetical order; empty where none is known.
    """

    name: str
    images: list[ImageRecord]
    examples: list[LabelledText]
    labels: tuple[str, ...]

    def example_keys(self) -> Iterator[tuple[Any, ...]]:
        """What makes an example: an image and a text about it."""
        return ((example.image_id, example.text) for example in self.examples)

    def check_labels(self, known: Sequence[str], source: str) -> None:
        """Raise :class:`DataError` for the first example whose label is not among ``known``, which ``source`` gave."""
        for example in self.examples:
            if example.label is not None and example.label not in known:
                raise DataError(
                    f"label {example.label!r} of example {example.id} in split {self.name!r} is none of the "
                    f"{len(known)} labels of {source} ({', '.join(map(repr, known[:8]))})"
                )


@collection_paused()
def load_labelled(
    folder: str | Path, split: str, image_root: str | Path | None = None, *, allow_symlinks: bool = False
) -> LabelledSplit:
    """Read one split.

    Args:
        folder: holds ``{split}.jsonl``.
        split: any name.
        image_root: folder of the images; None when they are not needed.
        allow_symlinks: let symbolic links lead out of ``image_root``.

    Raises:
        DataError: the file is missing or empty, a line is no such object, some lines have a label and others not, or an
            id comes twice. The message names file and line.
    """
    path = Path(folder) / f"{split}.jsonl"
    fix = f"data.annotations must be a folder with a file {path.name} for split {split!r}"
    text = read_text(path, DataError, fix)
    folders, images, examples = ImageFolders(image_root, path, allow_symlinks), {}, []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            example = _example(line, path, number)
            if examples and (example.label is None) is not (examples[0].label is None):
                raise DataError(f"{path}, line {number}: some lines have a label and others not; all or none need one")
            examples.append(example)
            if example.image_id not in images:
                name = example.image_id
                images[name] = ImageRecord(name, name, folders.path(name))
    if not examples:
        raise DataError(f"{path} has no examples")
    check_ids((example.id for example in examples), path, "example", mixed=True)
    labels = {example.label for example in examples} - {None}
    return LabelledSplit(split, list(images.values()), examples, tuple(sorted(labels)))


def _example(line: str, path: Path, number: int) -> LabelledText:
    where = f"{path}, line {number}"
    fields = parse_json(line, where, DataError, dict)
    with required_keys(path, "line", number):
        identity, image, text, label = fields.get("id", number), fields["image"], fields["text"], fields.get("label")
    sentences = text if isinstance(text, list) else [text]
    if not 1 <= len(sentences) <= 2 or not all(isinstance(part, str) and part.strip() for part in sentences):
        raise DataError(f"{where}: text must be a sentence or a list of two, not {text!r:.200}")
    if not isinstance(image, str) or not image:
        raise DataError(f"{where}: image must be the name of a file, not {image!r:.200}")
    if label == "" or not isinstance(label, str | None):
        raise DataError(f"{where}: label must be a string that is not empty, not {label!r:.200}")
    lines = tuple(map(one_line, sentences))
    return LabelledText(check_id(identity, where, "id"), image, lines if len(lines) == 2 else lines[0], label)


def read_labels(path: str | Path) -> tuple[str, ...]:
    """The labels of a JSON list of strings, in the order in which a head numbers them.

    Raises :class:`DataError` for a file that is missing or of another form, and for a label that is listed twice.
    """
    content = read_json(path)
    if not isinstance(content, list) or not content or not all(isinstance(label, str) for label in content):
        raise DataError(f"{path} is not a list of labels")
    check_ids(content, path, "label")
    return tuple(content)


class LabelledDataset(ExampleDataset):
    """Texts with their images and labels.

    Items are dicts with ``id``, ``image_id``, ``text``, ``target`` (number of the label; None when the split has no
    labels) and ``pixel_values`` float32 [3, H, W] or ``vision_features`` [L, d]. See
    :class:`~routingvl.data.examples.ExampleDataset` for the arguments not named here.

    Args:
        split: from :func:`load_labelled`.
        labels: those that the model chooses from, in order.
    """

    def __init__(self, split: LabelledSplit, labels: Sequence[str], *args: Any, **kwargs: Any):
        super().__init__(split, *args, **kwargs)
        self.number = {label: number for number, label in enumerate(labels)}

    @property
    def texts(self) -> list[str | tuple[str, str]]:
        """The texts of all items."""
        return [example.text for example in self.split.examples]

    def __len__(self) -> int:
        return len(self.split.examples)

    def example(self, index: int) -> dict[str, Any]:
        """An item without its image."""
        example = self.split.examples[index]
        target = None if example.label is None else self.number[example.label]
        return {"id": example.id, "image_id": example.image_id, "text": example.text, "target": target}
