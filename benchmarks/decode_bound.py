"""The most that a faster bottleneck could gain in caption generation: routed layers against their bare projections.

    python -m benchmarks.decode_bound --threads 2 --output results.jsonl

Both sides run the same beam search on the same weights, in turns; one of them has its bottlenecks taken out. No
implementation of the bottleneck, compiled or not, can be faster than none at all, so the ratio of the two is an upper
bound for what one could gain. The up-projections are zero, so both must write the same tokens: that is the gate, before
anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from routingvl.bottlenecks.inject import remove
from routingvl.config import RoutingConfig
from routingvl.kernels import ROUTINGS
from routingvl.models import ViTGPT2ForCaptioning

from .environment import describe_environment
from .random_models import SIZES, build_model, write_captions
from .timing import Timer, append_rows, cpu_threads, quantiles


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_bound", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script out")
    parser.add_argument("--routing", choices=list(ROUTINGS), default="mul", help="routing function (default mul)")
    parser.add_argument("--rank", type=int, default=128, help="rank of the LoRA (default 128)")
    parser.add_argument("--batch", type=int, default=8, help="images at a time (default 8)")
    parser.add_argument("--beams", type=int, default=5, help="beams an image (default 5)")
    parser.add_argument("--tokens", type=int, default=15, help="tokens of each caption (default 15)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each side (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1, whose CPU time is measured)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: under autocast")
    parser.add_argument("--output", type=Path, help="append the row to this file (JSON lines)")
    return parser


def build_models(size: str, routing: str, rank: int) -> dict[str, ViTGPT2ForCaptioning]:
    """ "routed" and "bare": one GPT-2 of random weights, and its copy without bottlenecks."""
    routed = build_model("caption", size, RoutingConfig(routing=routing, rank=rank, alpha=rank))
    bare = copy.deepcopy(routed)
    remove(bare.language_model)
    return {"routed": routed.eval(), "bare": bare.eval()}


def write(model: ViTGPT2ForCaptioning, features: Tensor, args: argparse.Namespace) -> Tensor:
    """Token ids [batch, tokens] of the search that the command line asks for."""
    return write_captions(model, features, beams=args.beams, tokens=args.tokens, dtype=args.dtype)


def measure(args: argparse.Namespace) -> dict:
    """The row of one run: seconds a caption of both sides, and the bound."""
    size = "tiny" if args.quick else "base"
    models = build_models(size, args.routing, args.rank)
    features = torch.randn(args.batch, 1, SIZES[size].width, generator=torch.Generator().manual_seed(1))
    timer = Timer(torch.device("cpu"), args.threads)
    # Also the warm-up.
    written = {name: write(model, features, args) for name, model in models.items()}
    row = {
        "case": "tiny_decode" if args.quick else "gpt2_decode",
        "routing": args.routing,
        "R": args.rank,
        "B": args.batch,
        "beams": args.beams,
        "tokens": args.tokens,
        "dtype": args.dtype,
    }
    environment = describe_environment(timer.device, args.threads)
    if not torch.equal(*written.values()):
        return {**row, "gate": "failed", **environment}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(args.repeats):
        for name in list(models)[:: 1 if repeat % 2 else -1]:
            seconds[name].append(timer(lambda name=name: write(models[name], features, args))[0])
    ratios = [routed / bare for routed, bare in zip(seconds["routed"], seconds["bare"], strict=True)]
    speed = {name: args.batch / torch.tensor(values).median().item() for name, values in seconds.items()}
    return {
        **row,
        "routed_captions_s": round(speed["routed"], 3),
        "bare_captions_s": round(speed["bare"], 3),
        **quantiles(ratios, "bound", 1.0),
        "repeats": args.repeats,
        "clock": timer.clock,
        "gate": "passed",
        **environment,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when the two sides write different captions, else 0."""
    args = build_parser().parse_args(argv)
    with cpu_threads(args.threads):
        row = measure(args)
    append_rows(args.output, [row])
    if row["gate"] == "failed":
        print("the two sides write different captions: nothing was timed", file=sys.stderr)
        return 1
    print(
        f"routed layers {row['routed_captions_s']} captions/s, bare projections {row['bare_captions_s']} captions/s "
        f"({row['clock']} time): no bottleneck can gain more than {row['bound_p50']}x "
        f"({row['bound_p20']} to {row['bound_p80']})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
