"""Training throughput with cached features against the published recipe's step, both sides in turns.

    python -m benchmarks.training_speed --output results.jsonl

ViT-B/16 with RoBERTa-base (VQA, batch 32) or GPT-2 (captions, batch 8), LoRA of rank 128, routing add, random weights.
The published step sends each image through the ViT, pads texts to 20 (VQA, prefix included) or 50 tokens and keeps all
logits, in float32. Ours is a step of any epoch after the first: features from a memory-mapped file, texts in the order
and batches of `train.group_by_length`, the loss at supervised positions only, float32 and bfloat16. Lengths of the
made-up texts are log-normal: captions with mean 12 and 99 % under 25 tokens, questions with mean 8.

First the gate: on one batch both sides must give the same loss and gradients. A ratio is printed only then.
"""

from __future__ import annotations

import argparse
import copy
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from routingvl.config import RoutingConfig
from routingvl.data.collate import IGNORED
from routingvl.execution import lower_frozen_weights
from routingvl.models.base import RoutedVLModel
from routingvl.run_config import TrainConfig
from routingvl.schedule import BatchOrder

from .environment import describe_environment
from .gate import relative_rms
from .memory import can_measure, cuda_peak, process_peak
from .models import build_model
from .published_models import published_model, published_optimizer
from .timing import Timer, append_rows, cpu_threads

# batch, mean and 99th percentile of the lengths, special tokens a text, fixed text length of the published recipe
TASKS = {"vqa": (32, 8, 16, 2, 19), "caption": (8, 12, 25, 1, 50)}
EXAMPLES = 4000
# Largest relative RMS error of the loss and of all gradients together, against the published step in float32.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
# Steps of ours a round; the published side takes one.
STEPS = {"float32": 3, "bfloat16": 6}

Inputs = dict[str, Tensor]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the script out")
    parser.add_argument(
        "--size", choices=["base", "large"], default="base", help="large: ViT-L/16, RoBERTa-large, GPT-2 medium"
    )
    parser.add_argument(
        "--published-dtype", choices=list(STEPS), default="float32", help="precision of the published step, once gated"
    )
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this (repeatable; default: both)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda:0")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument(
        "--peak-of",
        choices=["published", *STEPS],
        help="only print the peak memory of this process in MiB while it takes one side's captioning step",
    )
    parser.add_argument("--output", type=Path, help="append the rows to this file (JSON lines)")
    return parser


def routed_model(task: str, size: str) -> RoutedVLModel:
    """The model of a task whose bottlenecks' updates are not zero."""
    rank = 4 if size == "tiny" else 128
    model = build_model(task, size, RoutingConfig(routing="add", rank=rank, alpha=rank), vision=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def text_lengths(task: str, examples: int = EXAMPLES) -> np.ndarray:
    """Tokens of each text without special tokens: log-normal, at least 3, at most what the recipe leaves room for."""
    _, mean, high, special, fixed = TASKS[task]
    # mean = exp(m + s^2 / 2) and the 99th percentile = exp(m + 2.326 s), solved for s.
    spread = 2.326 - math.sqrt(2.326**2 - 2 * math.log(high / mean))
    drawn = np.random.default_rng(0).lognormal(math.log(mean) - spread**2 / 2, spread, examples)
    return drawn.round().astype(int).clip(3, fixed - special)


class Data:
    """Made-up texts, and features of their images in a memory-mapped file."""

    def __init__(self, task: str, model: RoutedVLModel, folder: Path) -> None:
        self.task, self.model = task, model
        self.batch, _, _, self.special, self.fixed = TASKS[task]
        self.lengths = text_lengths(task) + self.special
        self.random = torch.Generator().manual_seed(0)
        vocabulary = model.language_model.config.vocab_size
        # Token ids from 3 up: 0 is no target of the published loss, 1 pads RoBERTa's texts.
        self.ids = [torch.randint(3, vocabulary - 1, (n,), generator=self.random) for n in self.lengths.tolist()]
        width, file = model.vision_width, folder / f"{task}.f32"
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(EXAMPLES, 1, width))[:] = torch.randn(
            EXAMPLES, 1, width, generator=self.random
        ).numpy()
        self.features = np.load(file, mmap_mode="r")

    def order(self) -> Iterator[list[int]]:
        """Index lists of steps from the second epoch on."""
        config, first = TrainConfig(batch_size=self.batch), EXAMPLES // self.batch + 1
        return iter(BatchOrder(EXAMPLES, config, first, first + 10**6, lengths=self.lengths))

    def texts(self, indices: Sequence[int], length: int | None = None, all_count: bool = False) -> Inputs:
        """Padded texts and labels; ``length`` None pads to the longest. ``all_count``: labels for padding too."""
        rows = [self.ids[index] for index in indices]
        length = length or max(map(len, rows))
        ids = torch.ones(len(rows), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, ones, row in zip(ids, mask, rows, strict=True):
            line[: len(row)], ones[: len(row)] = row, 1
        if self.task == "vqa":
            labels = torch.zeros(len(rows), self.model.num_labels)
            labels[torch.arange(len(rows)), torch.tensor(indices) % self.model.num_labels] = 1.0
        else:
            labels = ids if all_count else ids.masked_fill(mask == 0, IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def images(self, count: int) -> Tensor:
        """Images as they come out of the preprocessing: [count, 3, H, W]."""
        size = self.model.vit.config.image_size
        return torch.randn(count, 3, size, size, generator=self.random)


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The precision of a side."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def gate(data: Data, reference: RoutedVLModel, ours: RoutedVLModel, dtype: str, device: torch.device) -> float:
    """Largest relative RMS error of our loss, and of our gradients together, on one batch without dropout."""
    indices = next(data.order())
    texts = {key: value.to(device) for key, value in data.texts(indices).items()}
    images = data.images(len(indices)).to(device)
    found = []
    for model, precision in ((reference, "float32"), (ours, dtype)):
        model.eval()
        inputs = (
            {"pixel_values": images} if model is reference else {"vision_features": reference.encode_images(images)}
        )
        if model is ours and data.task == "caption":
            inputs["return_logits"] = False
        with autocast(device, precision):
            loss = model(**inputs, **texts).loss
        loss.backward()
        gradients = [p.grad.flatten().float() for _, p in sorted(model.named_parameters()) if p.grad is not None]
        found.append((loss.detach().float(), torch.cat(gradients)))
        model.zero_grad()
        model.train()
    return max(relative_rms(got, want) for got, want in zip(found[1], found[0], strict=True))


def published_step(
    data: Data, model: RoutedVLModel, device: torch.device, dtype: str = "float32"
) -> Callable[[list[int]], None]:
    """One step of the published recipe, of given examples."""
    optimizer = published_optimizer(model)
    images = data.images(data.batch)  # read and decoded beforehand, to its advantage

    def step(indices: list[int]) -> None:
        texts = {key: value.to(device) for key, value in data.texts(indices, data.fixed, all_count=True).items()}
        optimizer.zero_grad()
        with autocast(device, dtype):
            loss = model(pixel_values=images.to(device), **texts).loss
        loss.backward()
        optimizer.step()

    return step


def our_step(data: Data, model: RoutedVLModel, dtype: str, device: torch.device) -> Callable[[list[int]], None]:
    """One step as ``routingvl train`` takes it when features are cached."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-5, eps=1e-6, weight_decay=0.0, fused=device.type == "cpu" or None)
    lean = {"return_logits": False} if data.task == "caption" else {}

    def step(indices: list[int]) -> None:
        features = torch.from_numpy(data.features[np.asarray(indices)]).to(device)
        texts = {key: value.to(device) for key, value in data.texts(indices).items()}
        with autocast(device, dtype):
            loss = model(vision_features=features, **texts, **lean).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_ours(model: RoutedVLModel, dtype: str) -> RoutedVLModel:
    """``model`` itself as it trains with cached features: without ViT, frozen weights as mixed precision has them."""
    model.vit = None
    if dtype == "bfloat16":
        lower_frozen_weights(model.language_model, torch.bfloat16, keep=False)
    return model


def one_side(
    task: str, side: str, size: str, published_dtype: str, folder: Path
) -> tuple[Data, Callable[[list[int]], None]]:
    """Data and step of one side, "published" or a dtype of ours, on the CPU; of the other nothing is kept in memory."""
    model, device = routed_model(task, size), torch.device("cpu")
    if side == "published":
        model = published_model(model).train()
        if task == "caption":
            model.caption_loss = "reference"
        data = Data(task, model, folder)
        return data, published_step(data, model, device, published_dtype)
    make_ours(model, side)
    data = Data(task, model.train(), folder)
    return data, our_step(data, model, side, device)


def own_peak(side: str, size: str, published_dtype: str) -> float:
    """MiB that this process occupies during a captioning step of one side, model, optimiser and libraries included."""
    with tempfile.TemporaryDirectory() as folder:
        data, step = one_side("caption", side, size, published_dtype, Path(folder))
        longest = long_batch(data)
        for _ in range(2):  # the optimiser's state comes into being
            step(longest)
        return round(process_peak(lambda: step(longest)), 1)


def peak_elsewhere(side: str, args: argparse.Namespace) -> float:
    """:func:`own_peak` of a new process, because freed memory of the other side may stay with this one."""
    command = [sys.executable, "-m", f"{__package__}.training_speed", "--peak-of", side, "--threads", str(args.threads)]
    command += ["--size", args.size, "--published-dtype", args.published_dtype]
    done = subprocess.run(command + ["--quick"] * args.quick, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr.strip()}")
    return float(done.stdout)


def step_memory(step: Callable[[list[int]], None], indices: list[int], device: torch.device) -> float:
    """MiB of tensors that a step holds at its peak beyond what is held before it."""
    if device.type == "cuda":
        return cuda_peak(lambda: step(indices), device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(indices)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(np.cumsum([event.nbytes() for event in events]).max(), 0) / 2**20


def measure(task: str, args: argparse.Namespace, folder: Path) -> dict:
    """One row: examples a second of each side, ratios to the published step, memory."""
    device = torch.device(args.device)
    model = routed_model(task, "tiny" if args.quick else args.size)
    if task == "caption":
        model.caption_loss = "reference"  # on both sides, so that the gate compares like with like
    reference = published_model(model).to(device)
    data, sides = Data(task, model, folder), {}
    row = {"case": f"training_{task}", "size": "tiny" if args.quick else args.size, "routing": "add"}
    row |= {"R": model.routing.rank, "B": data.batch, "published_dtype": args.published_dtype}
    environment = describe_environment(device, args.threads)
    for dtype in STEPS:
        ours = make_ours(copy.deepcopy(model).to(device), dtype)
        row[f"{dtype}_error"] = gate(data, reference, ours, dtype, device)
        if not row[f"{dtype}_error"] <= TOLERANCES[dtype]:
            return {**row, "gate": "failed", **environment}
        sides[dtype] = our_step(data, ours, dtype, device)
        if task == "caption":
            ours.caption_loss = "sound"  # what training uses by default
    published = published_step(data, reference, device, args.published_dtype)
    for batch in batches_of_each_length(data):
        for step in sides.values():
            step(batch)
    timer, order = Timer(device, args.threads, "wall"), data.order()
    spent: dict[str, list[float]] = {name: [] for name in ("published", *sides)}
    for turn in range(-1, args.rounds):  # a round to warm up
        round_of = {"published": timer(lambda: published(next(order)))[0]}
        for name, step in sides.items():
            batches = [next(order) for _ in range(STEPS[name])]
            spent_on_all, _ = timer(lambda step=step, batches=batches: [step(batch) for batch in batches])
            round_of[name] = spent_on_all / len(batches)
        if turn >= 0:
            for name, value in round_of.items():
                spent[name].append(value)
    rates = {name: data.batch * len(values) / sum(values) for name, values in spent.items()}
    row |= {f"{name}_examples_s": round(rate, 3) for name, rate in rates.items()}
    for name, step in sides.items():
        row[f"{name}_speedup"] = round(rates[name] / rates["published"], 3)
        each = np.array(spent["published"]) / np.array(spent[name])
        row[f"{name}_speedup_rounds"] = [round(float(value), 3) for value in np.sort(each)]
        row[f"{name}_step_mib"] = round(step_memory(step, long_batch(data), device), 1)
    reference.zero_grad()  # as ours, which are dropped at the end of a step
    row["published_step_mib"] = round(step_memory(published, long_batch(data), device), 1)
    if task == "caption" and device.type == "cpu" and can_measure():
        row |= {f"{name}_process_mib": peak_elsewhere(name, args) for name in spent}
    return {**row, "rounds": args.rounds, "clock": timer.clock, "gate": "passed", **environment}


def long_batch(data: Data) -> list[int]:
    """The longest of the first ten batches, so that the memory is not that of a lucky one."""
    batches = [batch for batch, _ in zip(data.order(), range(10), strict=False)]
    return max(batches, key=lambda batch: data.lengths[batch].max())


def batches_of_each_length(data: Data) -> list[list[int]]:
    """A batch of each padded length of an epoch: what later epochs find made for a shape, ours has to have met."""
    found: dict[int, list[int]] = {}
    for batch, _ in zip(data.order(), range(EXAMPLES // data.batch), strict=False):
        found.setdefault(int(data.lengths[batch].max()), batch)
    return list(found.values())


def describe(row: dict) -> str:
    """A row in words."""
    if row["gate"] == "failed":
        return f"{row['case']}: loss or gradients differ from the published step's: nothing was timed"
    lines = [
        f"{row['case']}: published {row['published_examples_s']} examples/s, {row['published_step_mib']} MiB a step"
    ]
    lines += [
        f"  {name}: {row[f'{name}_examples_s']} examples/s = {row[f'{name}_speedup']}x "
        f"(rounds {row[f'{name}_speedup_rounds'][0]} to {row[f'{name}_speedup_rounds'][-1]}), "
        f"{row[f'{name}_step_mib']} MiB"
        for name in STEPS
    ]
    if "published_process_mib" in row:
        peaks = [f"{name} {row[f'{name}_process_mib']} MiB" for name in ("published", *STEPS)]
        lines.append(f"  the whole process at its peak: {', '.join(peaks)}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a gate stayed shut, else 0."""
    args = build_parser().parse_args(argv)
    rows = []
    with cpu_threads(args.threads):
        if args.peak_of:
            print(own_peak(args.peak_of, "tiny" if args.quick else args.size, args.published_dtype))
            return 0
        with tempfile.TemporaryDirectory() as folder:
            for task in args.task or TASKS:
                rows.append(measure(task, args, Path(folder)))
                print(describe(rows[-1]), flush=True)
    append_rows(args.output, rows)
    return 1 if any(row["gate"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
