"""Host time of whole models whose kernel launches do nothing: the published chain, our eager and our Triton backend.

    python -m benchmarks.model_host_time
    python -m benchmarks.model_host_time --case gpt2/decode --json

As :mod:`.layer_host_time` for layers: a CPU's time for reaching torch's operations and launching kernels, in one
process, in turns. Models are random and small (64 wide, 2 layers, LoRA of rank 4 with mul), images come as features. A
training step is a forward and a backward pass. A decoding case is eight forward passes of GPT-2, each with one further
token for each of three beams of two images. What all sides spend in transformers is in all times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence

import torch

from .environment import describe_environment
from .layer_host_time import SIDES, ratios, stand_for_a_gpu, timed

IMAGES, BEAMS, TOKENS = 2, 3, 8
CALLS = 2  # timed at a time
CASES = ("gpt2/train", "roberta/train", "gpt2/decode")


def sides(case: str) -> dict[str, Callable[[], None]]:
    """A step of the case's model by each side."""
    from .model_providers import make_side
    from .random_models import routed_model, step_inputs

    family, _, kind = case.partition("/")
    task = "vqa" if family == "roberta" else "caption"
    model = routed_model(task, "tiny", "mul", vision=False).eval()
    inputs = step_inputs(task, model, IMAGES, TOKENS)
    step = decoding_step if kind == "decode" else training_step
    return {name: step(make_side(name, model).model, inputs) for name in SIDES}


def training_step(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A forward and a backward pass."""

    def step() -> None:
        model(**inputs).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def decoding_step(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A short caption after a text of TOKENS tokens: as many further ones for every beam, one at a time.

    The image is projected for the first of them and kept, as in a generation.
    """
    features, ids = inputs["vision_features"], inputs["input_ids"].repeat_interleave(BEAMS, 0)
    language_model = model.language_model
    with torch.inference_mode(), model.context.bind(features, beams=BEAMS, decoding=True):
        kept = language_model(input_ids=ids, use_cache=True).past_key_values

    def caption() -> None:
        with torch.inference_mode(), model.context.bind(features, beams=BEAMS, decoding=True):
            for _ in range(TOKENS):
                language_model(input_ids=ids[:, :1], past_key_values=kept, use_cache=True)
        kept.crop(-TOKENS)

    return caption


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model_host_time", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable (default: all)")
    parser.add_argument("--repeats", type=int, default=15, help="timed turns of each side (default 15)")
    parser.add_argument("--json", action="store_true", help="a JSON object per case and side")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a line per case; 0."""
    args = build_parser().parse_args(argv)
    stand_for_a_gpu()
    environment = describe_environment(torch.device("cpu"), torch.get_num_threads())
    for case in args.case or CASES:
        times = timed(sides(case), args.repeats, CALLS)
        told = []
        for name, ratio in ratios(times).items():
            if args.json:
                us = [round(value, 1) for value in times[name]]
                row = {"case": case, "provider": name, "us": us, "ratio": round(ratio, 3)}
                print(json.dumps({**row, **environment}), flush=True)
            told.append(f"{name} {statistics.median(times[name]) / 1000:.2f} ms ({ratio:.2f})")
        if not args.json:
            print(f"{case}: {', '.join(told)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
