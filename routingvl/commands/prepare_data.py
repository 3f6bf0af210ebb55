"""``routingvl prepare-data``: official files in, every derived annotation file out."""

from __future__ import annotations

import json
from collections.abc import Sequence

from routingvl.commands import CommandParser
from routingvl.config import ConfigError

EXAMPLE = """routingvl prepare-data vqa --dataset_coco dataset_coco.json --output data/VQAv2 \\
             --questions v2_OpenEnded_mscoco_{train,val}2014_questions.json \\
             --annotations v2_mscoco_{train,val}2014_annotations.json"""

# Which data sets take an option, and which options each needs.
_USES = {
    "dataset_coco": ("coco", "vqa"),
    "questions": ("vqa", "gqa"),
    "annotations": ("vqa",),
    "answers": ("vqa",),
    "min_questions": ("vqa", "gqa"),
}
_NEEDS = {"coco": ("dataset_coco",), "vqa": ("dataset_coco", "questions", "annotations"), "gqa": ("questions",)}


def run(args: Sequence[str]) -> int:
    """Write the files and print the manifest as JSON."""
    parser = CommandParser(
        "prepare-data",
        "coco: captions_{train,val,test}_karpathy.json from Karpathy's dataset_coco.json.\n"
        "vqa: karpathy_{train,val,test}.json and the answer vocabulary from the official VQAv2 files.\n"
        "gqa: the answer vocabulary of the official question files (--questions), which are read as they are.",
        EXAMPLE,
    )
    parser.add_argument("dataset", choices=("coco", "vqa", "gqa"), help="what to prepare")
    parser.add_argument("--dataset_coco", metavar="FILE", help="coco, vqa: Karpathy's dataset_coco.json")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder for the results")
    parser.add_argument("--questions", nargs="+", metavar="FILE", help="vqa, gqa: official question files")
    parser.add_argument("--annotations", nargs="+", metavar="FILE", help="vqa: official annotation files")
    parser.add_argument("--answers", metavar="FILE", help="vqa: a published trainval_label2ans.json to use")
    parser.add_argument(
        "--min_questions", type=int, metavar="N",
        help="vqa, gqa: least questions an answer of a new vocabulary has (9 in vqa, 1 in gqa)",
    )  # fmt: skip
    options = parser.parse_args(args)
    given = {name: value for name in _USES if (value := getattr(options, name)) is not None}
    for name in given:
        if options.dataset not in _USES[name]:
            raise ConfigError(f"--{name} belongs to prepare-data {' and '.join(_USES[name])}")
    for name in _NEEDS[options.dataset]:
        if name not in given:
            files = "FILE" if name == "dataset_coco" else "FILE [FILE ...]"
            raise ConfigError(f"prepare-data {options.dataset} needs --{name} {files}")
    if {"answers", "min_questions"} <= given.keys():
        raise ConfigError("--min_questions derives a vocabulary and --answers takes one; give one of them")

    from routingvl.data.prepare import prepare_coco, prepare_gqa, prepare_vqa

    renamed = {"dataset_coco": "dataset_coco_json", "answers": "vocabulary"}
    prepare = {"coco": prepare_coco, "vqa": prepare_vqa, "gqa": prepare_gqa}[options.dataset]
    manifest = prepare(output_dir=options.output, **{renamed.get(name, name): value for name, value in given.items()})
    print(json.dumps(manifest, indent=2, ensure_ascii=False))
    return 0
