"""``routingvl prepare-data``: official files in, every derived annotation file out."""

from __future__ import annotations

import json
from collections.abc import Sequence

from routingvl.commands import CommandParser
from routingvl.config import ConfigError

EXAMPLE = """routingvl prepare-data vqa --dataset_coco dataset_coco.json --output data/VQAv2 \\
             --questions v2_OpenEnded_mscoco_{train,val}2014_questions.json \\
             --annotations v2_mscoco_{train,val}2014_annotations.json"""


def run(args: Sequence[str]) -> int:
    """Write the files and print the manifest as JSON."""
    parser = CommandParser(
        "prepare-data",
        "coco: captions_{train,val,test}_karpathy.json from Karpathy's dataset_coco.json.\n"
        "vqa: karpathy_{train,val,test}.json and the answer vocabulary from the official VQAv2 files.",
        EXAMPLE,
    )
    parser.add_argument("dataset", choices=("coco", "vqa"), help="what to prepare")
    parser.add_argument("--dataset_coco", required=True, metavar="FILE", help="Karpathy's dataset_coco.json")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder for the results")
    parser.add_argument("--questions", nargs="+", metavar="FILE", help="vqa: official question files")
    parser.add_argument("--annotations", nargs="+", metavar="FILE", help="vqa: official annotation files")
    parser.add_argument("--answers", metavar="FILE", help="vqa: a published trainval_label2ans.json to use")
    parser.add_argument(
        "--min_questions", type=int, metavar="N", help="vqa: least questions an answer of a new vocabulary has (9)"
    )
    options = parser.parse_args(args)
    vqa_only = ("questions", "annotations", "answers", "min_questions")
    given = {name: getattr(options, name) for name in vqa_only if getattr(options, name) is not None}

    from routingvl.data.prepare import prepare_coco, prepare_vqa

    if options.dataset == "coco":
        if given:
            raise ConfigError(f"--{next(iter(given))} belongs to prepare-data vqa")
        manifest = prepare_coco(options.dataset_coco, options.output)
    else:
        if missing := [name for name in vqa_only[:2] if name not in given]:
            raise ConfigError(f"prepare-data vqa needs --{missing[0]} FILE [FILE ...]")
        if {"answers", "min_questions"} <= given.keys():
            raise ConfigError("--min_questions derives a vocabulary and --answers takes one; give one of them")
        vocabulary = given.pop("answers", None)
        manifest = prepare_vqa(
            dataset_coco_json=options.dataset_coco, output_dir=options.output, vocabulary=vocabulary, **given
        )
    print(json.dumps(manifest, indent=2, ensure_ascii=False))
    return 0
