"""What a number depends on beside its settings: versions, commit, hardware, command and time."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = (
    "routingvl torch triton transformers accelerate safetensors numpy Pillow PyYAML tqdm matplotlib "
    "pycocoevalcap tokenizers tensorboard wandb peft"
).split()


def environment() -> dict[str, Any]:
    """What a reader needs to repeat a run: versions, commit, hardware, command and time (UTC)."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": package_versions(),
        "git": git_state(),
        "hardware": hardware(),
    }


def package_version(name: str) -> str | None:
    """The installed version of a package; None when it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_versions() -> dict[str, str | None]:
    """Installed version of every package that can matter to a number; None when it is absent."""
    return {name: package_version(name) for name in PACKAGES}


def git_state(*paths: str) -> dict[str, Any] | None:
    """The commit, and whether tracked files differ from it, when routingvl runs from a checkout; None elsewhere.

    With ``paths`` (of the repository, wildcards allowed), only what differs below them counts.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", *paths)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(dirty)}
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """Processors and accelerators that torch sees."""
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
        "cuda": torch.version.cuda,
    }
