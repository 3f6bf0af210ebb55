"""Time per training step of a routed LoRA in PEFT against PEFT's own LoRA, in turns, in one process.

    python -m benchmarks.peft_steps --output results.jsonl

GPT-2 and Llama shaped models of random weights, LoRA of rank 64 at the queries and values (GPT-2: at c_attn as a
whole), a batch of 8 texts of 32 tokens, one visual token an image. A step is forward, backward and AdamW. Routing none
is gated first: its loss and gradients must be PEFT's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from .environment import describe_environment
from .timing import append_rows

ROWS, TOKENS, RANK = 8, 32, 64
SIDES = ("peft", "none", "mul")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peft_steps", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the script out")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each side (default 15)")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda:0")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--output", type=Path, help="append the rows to this file (JSON lines)")
    return parser


def base_model(kind: str, quick: bool) -> tuple[nn.Module, int, list[str]]:
    """A frozen model, its width, and the names of what is adapted."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64} if quick else {}
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = GPT2Config(bos_token_id=1, eos_token_id=2, **drops, **sizes)
        return GPT2LMHeadModel(config), config.n_embd, ["c_attn"]
    width, layers = (32, 2) if quick else (576, 30)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=4 if quick else 9, vocab_size=8192,
        num_key_value_heads=2 if quick else 3, intermediate_size=64 if quick else 1536, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config), width, ["q_proj", "v_proj"]


def adapted(kind: str, side: str, args: argparse.Namespace) -> tuple[nn.Module, int]:
    """The model of one side, with B that is not 0, and its width."""
    from peft import LoraConfig, get_peft_model

    from routingvl.peft import RoutedLoraConfig

    base, width, targets = base_model(kind, args.quick)
    shared = {"r": RANK, "lora_alpha": RANK, "target_modules": targets, "fan_in_fan_out": kind == "gpt2"}
    settings = LoraConfig(**shared) if side == "peft" else RoutedLoraConfig(routing=side, **shared)
    torch.manual_seed(1)
    model = get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return model.to(args.device).train(), width


def training_step(kind: str, side: str, args: argparse.Namespace) -> tuple[Callable[[], float], nn.Module]:
    """One step, which returns the loss, and its model."""
    import routingvl

    model, width = adapted(kind, side, args)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (ROWS, TOKENS), generator=generator).to(args.device)
    image = torch.randn(ROWS, 1, width, generator=generator).to(args.device)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> float:
        if side == "mul":
            with routingvl.bind_image(model, image):
                loss = model(input_ids=ids, labels=ids).loss
        else:
            loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.item()  # waits for the device

    return step, model


def check_same(kind: str, args: argparse.Namespace) -> float:
    """The largest relative difference between PEFT's loss and gradients and those of routing none.

    Raises:
        RuntimeError: it is above 1e-5.
    """
    found = []
    for side in ("peft", "none"):
        step, model = training_step(kind, side, args)
        loss = torch.tensor([step()], device=args.device)
        found.append([loss, *(w.grad for w in model.parameters() if w.requires_grad)])
    worst = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*found, strict=True))
    if not worst <= 1e-5:
        raise RuntimeError(f"{kind}: routing none differs from PEFT's LoRA by {worst:.1e}")
    return worst


def measure(kind: str, args: argparse.Namespace) -> dict:
    """Medians of all sides, in milliseconds."""
    difference = check_same(kind, args)
    steps = {side: training_step(kind, side, args)[0] for side in SIDES}
    times = {side: [] for side in SIDES}
    for turn in range(args.rounds + 2):
        order = SIDES if turn % 2 else SIDES[::-1]
        for side in order:
            start = time.perf_counter()
            steps[side]()
            if turn >= 2:
                times[side].append(1e3 * (time.perf_counter() - start))
    row = {f"{side}_ms": round(statistics.median(found), 2) for side, found in times.items()}
    for side in ("none", "mul"):  # each turn by itself, so that a slow moment of the machine cancels
        ratios = [peft / own for peft, own in zip(times["peft"], times[side], strict=True)]
        row[f"{side}_speed"] = round(statistics.median(ratios), 3)
    return {"model": kind, "difference": difference, **row, "rounds": args.rounds, "quick": args.quick}


def main(argv: Sequence[str] | None = None) -> int:
    """Gate, time, print and write; 0."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    import peft

    rows = []
    for kind in ("gpt2", "llama"):
        row = measure(kind, args)
        print(row, flush=True)
        rows.append(row | {"peft": peft.__version__})
    environment = describe_environment(torch.device(args.device), args.threads)
    append_rows(args.output, [row | environment for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
