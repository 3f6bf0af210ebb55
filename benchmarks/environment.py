"""What a measurement was made on and with: device, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# What a timing depends on; a change elsewhere in the checkout does not make it dirty.
MEASURED_PATHS = ("kernels", "routingvl", "benchmarks/*.py")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *command], cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed copy has no repository
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_environment(device: torch.device, threads: int) -> dict[str, str | int | bool | None]:
    """Fields that every row carries: device, driver, threads, versions, commit, dirty, timestamp (UTC)."""
    cuda = device.type == "cuda"
    changes = _git("status", "--porcelain", "--", *MEASURED_PATHS)
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "driver": f"cuda {torch.version.cuda}" if cuda else None,
        "threads": threads,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
