"""Whether our layers train as the published chain does: the same steps with both, and their losses overlaid.

    routingvl demo --quick --output runs/demo
    python -m benchmarks.convergence runs/demo/runs/vqa-lora-mul-seed0 --output convergence.jsonl --plot convergence.png
    python -m benchmarks.convergence --read convergence.jsonl --plot convergence.png     # draw and judge again
    python -m benchmarks.convergence RUN --dtype bfloat16 --starts 6 --output convergence.jsonl

A run folder (or its config.yaml) gives model, data, order of examples, optimiser and schedule; bottlenecks are LoRA,
which the published models have. From the same weights these sides take the same steps, without dropout, because they
would draw other masks: "published", the published chain; "nudged", the same with its trained weights moved as far as
their dtype may round them, which shows how far mere rounding carries a run; "ours". Each in float32, and in bfloat16
under autocast, where ours has its frozen weights in bfloat16 as ``routingvl train`` has them. A row (JSON lines) is a
side in a dtype, with the loss of every step.

One pair of runs says little where runs that only round differently end apart. ``--starts`` takes further pairs, whose
weights are moved so, both sides' alike: rows with "start", which decide nothing but the last losses' ratio.

The gap of a side is the root mean square, over all steps, of its loss less the published one, over the published mean.
Ours must not be further away than rounding may carry it: twice the nudged side's gap in the same dtype, in half
precision or twice what separates the published side from itself in float32, and never held to less than 1e-4. The exit
status is 1 when a gap of ours is wider, or a loss is not finite.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from routingvl.config import ConfigError
from routingvl.config.files import load_config
from routingvl.config.schema import RunConfig
from routingvl.kernels.dispatch import select_backend
from routingvl.models.base import RoutedVLModel
from routingvl.tasks.base import Task, build_task
from routingvl.training.schedule import BatchOrder, learning_rate_schedule

from .environment import describe_environment
from .gate import exact_convolutions
from .published_models import published_model
from .random_models import autocast
from .timing import append_rows, cpu_threads
from .training_steps import make_ours

DTYPES = ("float32", "bfloat16")
SIDES = ("published", "nudged", "ours")
NUDGE = {"float32": 1e-6, "bfloat16": 2.0**-9}  # of a weight: in bfloat16 what its rounding may move it by
LEAST = 1e-4  # no gap is held to less
FACTOR = 2.0  # how much further than rounding carried another side


def read_config(path: Path, steps: int, lr: float | None) -> RunConfig:
    """The run of a folder or of a config.yaml, as LoRA without dropout, for so many steps.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    config = load_config(path / "config.yaml" if path.is_dir() else path)
    train = replace(config.train, max_steps=steps, **({} if lr is None else {"lr": lr}))
    return replace(config, routing=replace(config.routing, method="lora", dropout=0.0), train=train)


def make_side(name: str, model: RoutedVLModel, dtype: str, device: torch.device, start: int = 0) -> RoutedVLModel:
    """A copy of ``model`` on the device, in evaluation mode, so without dropout; any ``start`` but 0 is a moved one."""
    made = make_ours(copy.deepcopy(model), dtype) if name == "ours" else published_model(model)
    made = made.to(device).eval()
    if name == "nudged" or start:
        random = torch.Generator().manual_seed(start)
        with torch.no_grad():
            for _, weight in sorted((key, p) for key, p in made.named_parameters() if p.requires_grad):
                weight.mul_(1 + NUDGE[dtype] * torch.randn(weight.shape, generator=random).to(device))
    return made


@exact_convolutions()
def train(task: Task, model: RoutedVLModel, config: RunConfig, dtype: str, device: torch.device) -> list[float]:
    """The loss of every step of ``model``, in the order of examples that ``routingvl train`` has."""
    settings, trained = config.train, [p for p in model.parameters() if p.requires_grad]
    names = ("lr", "betas", "eps", "weight_decay")
    optimizer = torch.optim.AdamW(trained, **{name: getattr(settings, name) for name in names})
    schedule = learning_rate_schedule(optimizer, settings, settings.max_steps)
    data, losses = task.train_set, []
    lengths = None if data.tokens is None else data.tokens.lengths
    settings = replace(settings, accumulation=1)
    for batch in task.loader(data, BatchOrder(len(data), settings, 0, settings.max_steps, lengths=lengths)):
        with autocast(device, dtype):
            loss = model(**task.training_inputs(batch, device)).loss
        loss.backward()
        if settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).double().tolist()


def measure(config: RunConfig, device: torch.device, dtypes: Sequence[str] = DTYPES, starts: int = 0) -> list[dict]:
    """A row for every side and dtype of one run, and for both sides from further starts."""
    torch.manual_seed(config.train.seed)
    task = build_task(config, model=None, tokenizer=None, device=device)
    model = task.model.to(device)
    what = {"case": f"convergence_{config.task}", "routing": config.routing.routing, "R": config.routing.rank}
    what |= {"B": config.train.batch_size, "lr": config.train.lr, "steps": config.train.max_steps}
    what |= {"backend": select_backend(device.type, config.model.backend)[0]}
    environment, rows = describe_environment(device, torch.get_num_threads()), []
    pairs = [(name, start) for start in range(1, starts + 1) for name in ("published", "ours")]
    for dtype in dtypes:
        for name, start in [*((side, 0) for side in SIDES), *pairs]:
            losses = train(task, make_side(name, model, dtype, device, start), config, dtype, device)
            side = {"dtype": dtype, "side": name, **({"start": start} if start else {})}
            print(f"{what['case']} {side}: {losses[0]:.4f} to {np.mean(losses[-20:]):.4f}", flush=True)
            rows.append({**what, **side, "losses": [round(loss, 7) for loss in losses]})
    return [{**row, **environment} for row in rows]


def gap(losses: Sequence[float], published: Sequence[float]) -> float:
    """Root mean square of the difference over the published mean."""
    one, other = np.array(losses), np.array(published)
    return float(np.sqrt(np.mean((one - other) ** 2)) / np.mean(other))


def judged(rows: Sequence[dict]) -> list[dict]:
    """By case and dtype: the gaps of both sides, the widest that passes, and whether ours does; later rows count.

    "last" is the mean over all starts of the last 20 losses' ratio, ours over published, "error" its standard error (0
    for one start), "starts" their number.
    """
    losses = _losses(rows)
    found = []
    for case, dtype in dict.fromkeys(key[:2] for key in losses):
        published = losses[case, dtype, "published"]
        ours, nudged = (gap(losses[case, dtype, side], published) for side in ("ours", "nudged"))
        exact = losses.get((case, DTYPES[0], "published"))
        rounding = nudged if exact is None else max(nudged, gap(published, exact))
        widest = max(FACTOR * rounding, LEAST)
        last = _last_ratios(rows, case, dtype)
        error = np.std(last, ddof=1) / len(last) ** 0.5 if len(last) > 1 else 0.0
        numbers = {"ours": ours, "nudged": nudged, "widest": widest}
        numbers |= {"last": float(np.mean(last)), "error": float(error), "starts": len(last)}
        found.append({"case": case, "dtype": dtype, **numbers, "passed": ours <= widest})
    return found


def _losses(rows: Sequence[dict]) -> dict[tuple[str, str, str], list[float]]:
    """The losses of the first start by case, dtype and side."""
    return {(row["case"], row["dtype"], row["side"]): row["losses"] for row in rows if not row.get("start")}


def _last_ratios(rows: Sequence[dict], case: str, dtype: str) -> list[float]:
    """The last 20 losses of ours over those of the published chain, for each start."""
    last: dict[str, dict[int, float]] = {}
    for row in rows:
        if (row["case"], row["dtype"]) == (case, dtype):
            last.setdefault(row["side"], {})[row.get("start", 0)] = float(np.mean(row["losses"][-20:]))
    return [ours / last["published"][start] for start, ours in last["ours"].items() if start in last["published"]]


def table(verdicts: Sequence[dict]) -> str:
    """Markdown; "last 20" is the mean loss of ours over the published one's, mean of all starts and its error."""
    lines = [
        "| run | dtype | gap of ours | of rounding alone | widest | last 20 | starts | |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for v in verdicts:
        last = f"{v['last']:.4f} ± {v['error']:.4f} | {v['starts']}"
        numbers = f"{v['ours']:.2e} | {v['nudged']:.2e} | {v['widest']:.2e} | {last}"
        lines.append(f"| {v['case']} | {v['dtype']} | {numbers} | {'passed' if v['passed'] else 'FAILED'} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict], path: Path) -> None:
    """Losses by step above, the distance to the published ones below; a column for every case and dtype."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = _losses(rows)
    columns = list(dict.fromkeys(key[:2] for key in losses))
    figure = Figure(figsize=(3.6 * len(columns), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(columns), squeeze=False, sharex=True)
    styles = {"published": ("black", "-"), "nudged": ("tab:gray", ":"), "ours": ("tab:red", "--")}
    for (case, dtype), upper, lower in zip(columns, axes[0], axes[1], strict=True):
        published = np.array(losses[case, dtype, "published"])
        for side in SIDES:
            values, (colour, stroke) = np.array(losses[case, dtype, side]), styles[side]
            look = {"color": colour, "linestyle": stroke, "linewidth": 1, "label": side}
            steps = range(1, len(values) + 1)
            if side != "nudged":
                upper.plot(steps, values, **look)
            if side != "published":
                lower.plot(steps, np.maximum(abs(values - published) / published, 1e-9), **look)
        upper.set_title(f"{case}, {dtype}", fontsize=8)
        upper.set_ylabel("loss")
        lower.set(yscale="log", xlabel="step", ylabel="distance / published")
        for axis in (upper, lower):
            axis.legend(fontsize=7)
            axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=80)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__.partition("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="run folder of LoRA or an Adapter, or its config.yaml")
    parser.add_argument("--read", type=Path, help="judge and draw these rows; nothing is trained")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps (default 200)")
    parser.add_argument("--lr", type=float, help="learning rate instead of the run's")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this one (repeatable)")
    parser.add_argument("--starts", type=int, default=0, help="further pairs of runs, from moved weights (default 0)")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda:0")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--output", type=Path, help="append the rows to this file (JSON lines)")
    parser.add_argument("--plot", type=Path, help="write the curves of all rows to this PNG file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train, judge, draw; the exit status is in the module's docstring, 2 for what cannot be trained."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.run is None) == (args.read is None):
        parser.error("give a run folder to train, or --read FILE")
    if args.starts < 0:
        parser.error(f"--starts {args.starts} must not be negative")
    if args.steps < 1:
        parser.error(f"--steps {args.steps} must be at least 1")
    rows = []
    if args.read:
        rows = [json.loads(line) for line in args.read.read_text(encoding="utf-8").splitlines()]
    else:
        try:
            config = read_config(args.run, args.steps, args.lr)
            with cpu_threads(args.threads):
                rows = measure(config, torch.device(args.device), args.dtype or DTYPES, args.starts)
        except (ConfigError, OSError) as error:
            parser.error(str(error))
        append_rows(args.output, rows)
    verdicts = judged(rows)
    print(table(verdicts))
    if args.plot:
        draw(rows, args.plot)
    finite = all(np.isfinite(row["losses"]).all() for row in rows)
    return 0 if finite and all(verdict["passed"] for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
