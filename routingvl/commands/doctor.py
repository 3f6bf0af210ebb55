"""``routingvl doctor``: what this machine has, what runs here, and what to do about the rest."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from routingvl.commands import CommandParser
from routingvl.metrics.ptb import cocoevalcap_folder, find_java

EXAMPLE = "routingvl doctor --json"
RECIPES = ("RobertaModel", "GPT2LMHeadModel")  # classes of the recipes' language models
OPTIONAL = {
    "tensorboard": "train.trackers=[tensorboard]",
    "wandb": "train.trackers=[wandb]",
    "peft": "loading what export --format peft writes",
}


def run(args: Sequence[str]) -> int:
    """Print the report; exit status 1 when something that every command needs is broken."""
    parser = CommandParser("doctor", "Report versions, devices, backend, Java and optional packages.", EXAMPLE)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--codegen",
        action="store_true",
        help="compile every Triton kernel for four GPU architectures (no GPU needed, many minutes the first time) and "
        "print registers, spills, shared memory and matrix instructions",
    )
    options = parser.parse_args(args)
    if options.codegen:
        return compile_kernels()
    report = examine()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        for section, entries in report.items():
            print(section)
            for name, value in entries.items():
                print(f"  {name:<20}{'not installed' if value is None else value}")
    return 1 if any("PROBLEM" in str(value) for entries in report.values() for value in entries.values()) else 0


def compile_kernels() -> int:
    """Print the table of :mod:`routingvl.benchmarks.codegen`, made in a process without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "routingvl.benchmarks.codegen"]
    return subprocess.run(command, env=environment, check=False).returncode


def examine() -> dict[str, dict[str, Any]]:
    """Every finding by section; a value that starts with PROBLEM needs action."""
    import torch

    from routingvl.environment import git_state, hardware, package_versions
    from routingvl.kernels import cpu_library
    from routingvl.kernels.dispatch import select_backend

    devices = hardware()
    devices["cuda"] = devices["cuda"] or "this torch is built without CUDA"
    devices["gpus"] = ", ".join(f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in devices["gpus"]) or "none"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        backend, reason = select_backend(device)
    except (RuntimeError, ValueError) as error:
        backend, reason = f"PROBLEM: {error}", "see above"
    kernels = try_kernels(device) if backend == "triton" else "not in use"
    versions = package_versions()
    state = git_state()
    return {
        "versions": {
            "python": sys.version.split()[0],
            **{name: version for name, version in versions.items() if name not in OPTIONAL},
            "commit": "not a checkout" if state is None else state["commit"][:12] + " (changed)" * state["dirty"],
        },
        "devices": devices,
        "bottlenecks": {
            "backend": backend,
            "reason": reason,
            "kernels": kernels,
            "float32 on a CPU": cpu_library.in_words(),
        },
        "checks": {"torchvision": check_torchvision(), "transformers": check_transformers()},
        "caption metrics": check_caption_metrics(),
        "optional packages": {
            name: versions[name] or f"not installed; only {use} needs it" for name, use in OPTIONAL.items()
        },
    }


def try_kernels(device: str, rank: int = 128) -> str:
    """Whether the Triton kernels of training run on ``device``: one small LoRA and Adapter, forward and backward."""
    import torch

    from routingvl.kernels import routed_adapter, routed_lora
    from routingvl.kernels.dispatch import unfit_kernels

    x, v = torch.ones(2, 64, 128, device=device), torch.ones(2, 1, 128, device=device)
    down = torch.zeros(rank, 128, device=device, requires_grad=True)
    up = torch.zeros(128, rank, device=device, requires_grad=True)
    layers = ((routed_lora, (x, v, down, up)), (routed_adapter, (x, v, down, None, up, None)))
    problems = []
    for (layer, tensors), routing in itertools.product(layers, ("mul", "vllora")):
        try:
            layer(*tensors, routing=routing, backend="triton").sum().backward()
        except (RuntimeError, ValueError) as error:
            problems.append(str(error))
    problems += [f"no tile of {kind} fits this device" for kind in unfit_kernels() if kind not in " ".join(problems)]
    if problems:
        return f"PROBLEM: {'; '.join(dict.fromkeys(problems))}; set ROUTINGVL_BACKEND=eager"
    return f"run forward and backward at rank {rank} in float32"


def check_torchvision() -> str:
    """A torchvision that does not fit torch breaks the import of transformers' models, though nothing here needs it."""
    if importlib.util.find_spec("torchvision") is None:
        return "absent, and not needed"
    error = _import_error("import torchvision")
    return f"PROBLEM: does not fit torch ({error}); pip uninstall torchvision" if error else "fits torch (not needed)"


def check_transformers() -> str:
    """Whether the classes of the backbones import."""
    from routingvl.backbones.vision import TOWERS

    names = ", ".join([*(tower.model_class for tower in TOWERS.values()), *RECIPES])
    error = _import_error(f"from transformers import {names}")
    return f"PROBLEM: {error}" if error else f"{names} import"


def check_caption_metrics() -> dict[str, str]:
    """Which caption metrics can run here, and why the others cannot."""
    java = find_java()
    if java is None:
        tokenizer = "Python's, in place of Stanford's, which needs Java"
        return {"java": "not on PATH", "METEOR, SPICE": "cannot run without Java", "tokenizer": tokenizer}
    done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)
    lines = (done.stderr or done.stdout).strip().splitlines()
    spice = any((cocoevalcap_folder() / "spice" / "lib").glob("stanford-corenlp-*-models.jar"))
    return {
        "java": f"{lines[0] if lines else 'no version'} ({java})",
        "METEOR": "can run",
        "SPICE": "can run" if spice else "lacks its models (384 MB, docs/metrics.md)",
        "tokenizer": "Stanford's",
    }


def _import_error(statement: str) -> str | None:
    """The last line of what ``statement`` prints to stderr in a fresh interpreter when it fails, else None."""
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, timeout=300, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["unknown error"])[-1]
