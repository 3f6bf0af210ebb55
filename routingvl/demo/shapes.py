"""Coloured shapes on a grid, with captions and questions, written in the public formats of COCO and VQAv2.

The embedded demo needs real files that nobody has to download: JPEG images under COCO names, ``dataset_coco.json``
(Karpathy's form) and the official VQAv2 question and annotation files. Scenes are in the manner of Sort-of-CLEVR: two
objects of different colours in a 3 x 3 grid of 12-pixel cells, 36 x 36 pixels in all, with jitter and noise. Everything
is a function of one seed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from routingvl.atomic_files import replacing

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.9, 0.15, 0.15),
    "green": (0.15, 0.75, 0.2),
    "blue": (0.2, 0.3, 0.95),
    "yellow": (0.95, 0.85, 0.15),
}
SHAPES = ("circle", "square", "triangle")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
OBJECTS_PER_SCENE = 2
CELL = 12  # pixels
IMAGE_SIZE = CELL * len(ROWS)  # pixels
JITTER = 1.5  # pixels, either way
RADIUS = 4.0  # pixels
NOISE = 0.03  # standard deviation, of an intensity range of 1
BACKGROUND = 0.5
JPEG_QUALITY = 95  # with full-resolution colour (4:4:4), so that a 12-pixel object keeps its hue

SPLITS = ("train", "val", "test")
_FOLDERS = {"train": "train2014", "val": "val2014", "test": "val2014"}
_FIRST_IMAGE_ID = {"train": 1, "val": 200_001, "test": 300_001}
_STAMP = "shapes.json"


@dataclass(frozen=True)
class ShapeObject:
    """One object: a colour and a shape by name, and its cell's row and column by name."""

    colour: str
    shape: str
    row: str
    column: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} in the {self.row} {self.column}"


@dataclass(frozen=True)
class Question:
    """A question with its one true answer, under VQAv2's two ways to sort questions."""

    text: str
    answer: str
    question_type: str
    answer_type: str


@dataclass(frozen=True)
class ShapesConfig:
    """What is generated.

    Attributes:
        seed: decides every scene, pixel, question and order.
        train_images, val_images, test_images: number of images of each split.
        train_questions, val_questions, test_questions: at most so many questions of each split (kinds and their
            answers in equal shares, so a split may come out a few questions smaller).
    """

    seed: int = 0
    train_images: int = 5000
    val_images: int = 300
    test_images: int = 300
    train_questions: int = 12_000
    val_questions: int = 1400
    test_questions: int = 1400

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "seed" and value < 1:
                raise ValueError(f"ShapesConfig.{name}={value} must be at least 1")

    def images(self, split: str) -> int:
        return getattr(self, f"{split}_images")

    def questions(self, split: str) -> int:
        return getattr(self, f"{split}_questions")


Scene = tuple[ShapeObject, ...]


def draw_scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    """``count`` scenes of two objects: distinct colours, distinct cells, any shapes, all uniform."""
    colours = list(COLOURS)
    cells = list(product(ROWS, COLUMNS))
    scenes = []
    for _ in range(count):
        chosen_colours = rng.permutation(len(colours))[:OBJECTS_PER_SCENE]
        chosen_cells = rng.permutation(len(cells))[:OBJECTS_PER_SCENE]
        chosen_shapes = rng.integers(len(SHAPES), size=OBJECTS_PER_SCENE)
        scenes.append(
            tuple(
                ShapeObject(colours[colour], SHAPES[shape], *cells[cell])
                for colour, shape, cell in zip(chosen_colours, chosen_shapes, chosen_cells, strict=True)
            )
        )
    return scenes


def render(scenes: Sequence[Scene], rng: np.random.Generator) -> np.ndarray:
    """Paint scenes into uint8 images [N, 36, 36, 3]: anti-aliased shapes, position jitter, Gaussian noise."""
    images = np.full((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND, dtype=np.float32)
    pixel_y, pixel_x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) + 0.5
    for image, scene in zip(images, scenes, strict=True):
        for item in scene:
            shift_x, shift_y = rng.uniform(-JITTER, JITTER, size=2)
            dx = pixel_x - (COLUMNS.index(item.column) + 0.5) * CELL - shift_x
            dy = pixel_y - (ROWS.index(item.row) + 0.5) * CELL - shift_y
            cover = np.clip(0.5 - _signed_distance(item.shape, dx, dy), 0, 1)[..., None]
            image += cover * (np.asarray(COLOURS[item.colour], dtype=np.float32) - image)
    images += rng.normal(0, NOISE, size=images.shape).astype(np.float32)
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def _signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Distance in pixels of each offset from the shape's outline, negative inside (near enough for smooth edges)."""
    if shape == "circle":
        return np.hypot(dx, dy) - RADIUS
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * RADIUS
    # Triangle, apex up: its base is one half-plane, its two sides, mirrored in x, another.
    sides = (2 * np.abs(dx) - dy) / np.sqrt(5) - RADIUS / np.sqrt(5)
    return np.maximum(dy - RADIUS, sides)


def captions(scene: Scene) -> list[str]:
    """Every correct caption: one template, the objects in either order."""
    return [" and ".join(map(str, order)) for order in permutations(scene)]


def questions(scene: Scene) -> Iterator[Question]:
    """Every question about a scene that the generator knows, unbalanced; see :func:`balanced_questions`."""
    for item in scene:
        yield Question(f"what shape is the {item.colour} object?", item.shape, "what shape is the", "other")
        yield Question(f"which row is the {item.colour} object in?", item.row, "which row is the", "other")
        yield Question(f"which column is the {item.colour} object in?", item.column, "which column is the", "other")
    present = {(item.colour, item.shape) for item in scene}
    for colour, shape in product(COLOURS, SHAPES):
        answer = "yes" if (colour, shape) in present else "no"
        yield Question(f"is there a {colour} {shape}?", answer, "is there a", "yes/no")
    for shape in SHAPES:
        count = sum(item.shape == shape for item in scene)
        yield Question(f"how many {shape}s are there?", str(count), "how many", "number")
    for one, other in permutations(scene):
        if one.column != other.column:
            answer = "yes" if COLUMNS.index(one.column) < COLUMNS.index(other.column) else "no"
            text = f"is the {one.colour} object left of the {other.colour} object?"
            yield Question(text, answer, "is the (left of)", "yes/no")
        if one.row != other.row:
            answer = "yes" if ROWS.index(one.row) < ROWS.index(other.row) else "no"
            text = f"is the {one.colour} object above the {other.colour} object?"
            yield Question(text, answer, "is the (above)", "yes/no")


def balanced_questions(scenes: Sequence[Scene], count: int, rng: np.random.Generator) -> list[tuple[int, Question]]:
    """About ``count`` questions as (index of scene, question), in scene order.

    The question types have equal shares, and within a type its answers have equal shares, so that "always yes" earns a
    half at most. A share that the scenes cannot fill is cut for all answers of its type alike.
    """
    pools: dict[str, dict[str, list[tuple[int, Question]]]] = defaultdict(lambda: defaultdict(list))
    for index, scene in enumerate(scenes):
        for question in questions(scene):
            pools[question.question_type][question.answer].append((index, question))
    chosen = []
    for _, answers in sorted(pools.items()):
        share = min(count // (len(pools) * len(answers)), *map(len, answers.values()))
        for _, pool in sorted(answers.items()):
            chosen += [pool[place] for place in rng.permutation(len(pool))[:share]]
    return sorted(chosen, key=lambda item: (item[0], item[1].text))


@dataclass(frozen=True)
class ShapesSplit:
    """One split in memory: scenes, COCO image ids and file names, uint8 images [N, 36, 36, 3], chosen questions."""

    name: str
    scenes: list[Scene]
    image_ids: list[int]
    file_names: list[str]
    images: np.ndarray
    questions: list[tuple[int, Question]]


def make_split(name: str, config: ShapesConfig) -> ShapesSplit:
    """Generate the split ``name`` ("train", "val" or "test"); its draws do not depend on the other splits."""
    rng = np.random.default_rng([config.seed, SPLITS.index(name)])
    scenes = draw_scenes(config.images(name), rng)
    first = _FIRST_IMAGE_ID[name]
    image_ids = list(range(first, first + len(scenes)))
    file_names = [f"COCO_{_FOLDERS[name]}_{image_id:012d}.jpg" for image_id in image_ids]
    images = render(scenes, rng)
    return ShapesSplit(
        name, scenes, image_ids, file_names, images, balanced_questions(scenes, config.questions(name), rng)
    )


def write_shapes(root: str | Path, config: ShapesConfig | None = None) -> Path:
    """Generate the whole set under ``root`` and return it; a set already there with the same settings is kept.

    Layout: ``Images/{train2014,val2014}/COCO_*.jpg``, ``dataset_coco.json``, and the official
    ``v2_OpenEnded_mscoco_*_questions.json`` and ``v2_mscoco_*_annotations.json`` of train2014 and val2014 (validation
    and test images both lie in val2014, as in COCO; Karpathy's file says which is which). The folder appears as a
    whole, or not at all.

    Raises:
        FileExistsError: ``root`` holds something else.
    """
    root, config = Path(root), config or ShapesConfig()
    stamp = {"generator": "routingvl.demo.shapes", "version": 1, **asdict(config)}
    if root.exists():
        stamp_file = root / _STAMP
        if not stamp_file.is_file():
            raise FileExistsError(f"{root} exists and is no generated shapes set: choose another folder or remove it")
        if json.loads(stamp_file.read_text(encoding="utf-8")) == stamp:
            return root
    splits = [make_split(name, config) for name in SPLITS]
    with replacing(root) as partial:
        partial.mkdir()
        for split in splits:
            _write_images(partial / "Images" / _FOLDERS[split.name], split)
        _write_json(partial / "dataset_coco.json", karpathy_file(splits))
        for subset in ("train2014", "val2014"):
            members = [split for split in splits if _FOLDERS[split.name] == subset]
            questions_file, annotations_file = vqa_files(members, subset)
            _write_json(partial / f"v2_OpenEnded_mscoco_{subset}_questions.json", questions_file)
            _write_json(partial / f"v2_mscoco_{subset}_annotations.json", annotations_file)
        _write_json(partial / _STAMP, stamp)
    return root


def karpathy_file(splits: Sequence[ShapesSplit]) -> dict[str, Any]:
    """The content of ``dataset_coco.json``: ``cocoid`` is the image id, ``imgid`` and ``sentid`` count up."""
    images: list[dict[str, Any]] = []
    sentence_id = 0
    for split in splits:
        for scene, image_id, file_name in zip(split.scenes, split.image_ids, split.file_names, strict=True):
            sentences = []
            for caption in captions(scene):
                sentence = {"tokens": caption.split(), "raw": caption, "imgid": len(images), "sentid": sentence_id}
                sentences.append(sentence)
                sentence_id += 1
            images.append(
                {
                    "filepath": _FOLDERS[split.name],
                    "sentids": [sentence["sentid"] for sentence in sentences],
                    "filename": file_name,
                    "imgid": len(images),
                    "split": split.name,
                    "sentences": sentences,
                    "cocoid": image_id,
                }
            )
    return {"images": images, "dataset": "coco"}


def vqa_files(splits: Sequence[ShapesSplit], subset: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of the official question and annotation files of one subset ("train2014" or "val2014").

    The ten answers of a question agree, since the scene decides them. Question ids are image id * 1000 + k.
    """
    head = {
        "info": {"description": "routingvl shapes", "version": "2.0", "year": 2026, "contributor": "", "url": ""},
        "license": {"name": "Apache-2.0", "url": ""},
        "data_type": "mscoco",
        "data_subtype": subset,
    }
    asked, annotated = [], []
    for split in splits:
        numbers: dict[int, int] = defaultdict(int)
        for index, question in split.questions:
            image_id = split.image_ids[index]
            question_id = image_id * 1000 + numbers[image_id]
            numbers[image_id] += 1
            asked.append({"image_id": image_id, "question": question.text, "question_id": question_id})
            answers = [
                {"answer": question.answer, "answer_confidence": "yes", "answer_id": number} for number in range(1, 11)
            ]
            annotated.append(
                {
                    "question_type": question.question_type,
                    "multiple_choice_answer": question.answer,
                    "answers": answers,
                    "image_id": image_id,
                    "answer_type": question.answer_type,
                    "question_id": question_id,
                }
            )
    return {**head, "task_type": "Open-Ended", "questions": asked}, {**head, "annotations": annotated}


def _write_images(folder: Path, split: ShapesSplit) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for pixels, file_name in zip(split.images, split.file_names, strict=True):
        Image.fromarray(pixels).save(folder / file_name, quality=JPEG_QUALITY, subsampling=0)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    # One line without spaces: the annotations hold ten answers per question.
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
