"""``routingvl train``: a YAML config, overrides, and one run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from routingvl.commands import json_text, say
from routingvl.config import ConfigError
from routingvl.config.files import command_parser, config_from_namespace

EXAMPLE = "routingvl train --config configs/vqa-lora.yaml --train.lr 3e-4 --routing.rank 64 --output_dir runs/rank64"


def run(args: Sequence[str]) -> int:
    """Parse, train, and say where the results are."""
    parser = command_parser(
        "train", "Train routed bottlenecks. Settings come from --config, then from flags, which win.", EXAMPLE
    )
    parser.add_argument("--resume", metavar="RUN", help="Continue this run folder from its last state, exactly.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the run folder when it is not empty.")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="Train nothing: print parameters, steps, memory and time as JSON, with random weights and one batch.",
    )  # fmt: skip
    namespace = parser.parse_args(with_config_of_resumed_run(list(args)))
    config = config_from_namespace(namespace)

    if namespace.dry_run:
        from routingvl.training.estimate import estimate

        say(json_text(estimate(config), indent=2))
        return 0

    from routingvl.train import train

    log = "quiet" if namespace.quiet else None
    result = train(config, log=log, resume=namespace.resume is not None, overwrite=namespace.overwrite)
    best, at = result.best_metric, result.best_step
    best = "" if best is None else f", best {result.metric} {best:.4f} at {at}"
    say(f"{result.steps} steps in {result.seconds:.1f} s{best}; run folder {result.run_dir}")
    return 0


def with_config_of_resumed_run(args: list[str]) -> list[str]:
    """Put the config of the run that ``--resume`` names in front, so that resuming repeats no flag."""
    for arg, following in zip(args, [*args[1:], ""], strict=False):
        flag, _, value = arg.partition("=")
        if flag == "--resume" and (run := value or following):
            path = Path(run) / "config.yaml"
            if not path.is_file():
                raise ConfigError(f"--resume: {run} has no config.yaml; give the run folder to continue")
            return ["--config", str(path), *args, "--output_dir", run]
    return args
