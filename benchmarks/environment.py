"""What a measurement was made on and with: device, versions, commit."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

from routingvl.environment import git_state, package_version

# What a timing depends on; a change elsewhere in the checkout does not make it dirty.
MEASURED_PATHS = ("kernels", "routingvl", "benchmarks/*.py")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_environment(device: torch.device, threads: int) -> dict[str, str | int | bool | None]:
    """Fields that every row carries: device, driver, threads, versions, commit, dirty, timestamp (UTC)."""
    cuda = device.type == "cuda"
    state = git_state(*MEASURED_PATHS)  # None for an installed copy, which has no repository
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "driver": f"cuda {torch.version.cuda}" if cuda else None,
        "threads": threads,
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "transformers": package_version("transformers"),
        "commit": state and state["commit"][:7],
        "dirty": state and state["dirty"],
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
