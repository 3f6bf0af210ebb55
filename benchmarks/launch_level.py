"""The level "launch": host time of a layer whose kernel launches do nothing, on a CPU (benchmarks/layer_host_time.py).

It runs in a process of its own, because one has one Triton driver, and that stands for a GPU there. Results mean
nothing, so there is no gate: other levels have it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .comparison import Comparison
from .passes import Checked
from .suites import Plan
from .timing import Spent, Timer

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (ROOT / "tests" / "stub_gpu.py", ROOT / "benchmarks" / "layer_host_time.py")
TURNS_OF_A_REPEAT = 2  # a turn takes milliseconds
SIDES = ("reference", "eager", "triton")


class LaunchError(RuntimeError):
    """The process that measures has failed."""


@dataclass(frozen=True)
class LaunchCase:
    """One case of benchmarks/layer_host_time.py.

    Attributes:
        name: unique name, the key in result files.
        host_case: its name there.
        routings: its routing function.
    """

    name: str
    host_case: str
    routings: tuple[str, ...]
    level: str = "launch"
    quick: bool = False
    takes_dropout: bool = False
    devices: tuple[str, ...] = ("cpu",)

    def labels(self) -> dict[str, str]:
        """What the case is called."""
        return {"case": self.name, "level": self.level}

    def sizes(self) -> dict[str, int]:
        """None: as small as torch's own operations cost nothing but their launch."""
        return {}


LAUNCH_CASES = (
    LaunchCase("launch_linear_mul", "linear/mul", ("mul",)),
    LaunchCase("launch_linear_vllora", "linear/vllora", ("vllora",)),
    LaunchCase("launch_c_attn_mul", "c_attn/mul", ("mul",)),
    LaunchCase("launch_c_attn_vllora", "c_attn/vllora", ("vllora",)),
    LaunchCase("launch_adapter_mul", "adapter/mul", ("mul",)),
    LaunchCase("launch_c_attn_decode", "c_attn/mul/decode", ("mul",)),
)


class LaunchComparison(Comparison):
    """See :class:`benchmarks.comparison.Comparison`."""

    case: LaunchCase

    @staticmethod
    def obstacle(plan: Plan) -> str | None:
        """Only one pass is of this level, and it needs the checkout's stand-in for a GPU, and Triton."""
        if plan.dtype != "float32" or plan.dropout:
            return "launches are timed in float32 without dropout"
        if missing := [str(path.relative_to(ROOT)) for path in NEEDED if not path.exists()]:
            return f"launches that do nothing need {' and '.join(missing)} of a checkout"
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed"
        return None

    def gated(self) -> tuple[dict[str, str], dict[str, Checked]]:
        """Everything asked for, and no gate."""
        wanted = ("reference", *self.setting.providers)
        self.sides = {name: None for name in SIDES if name in wanted}
        return {}, {}

    def seconds(self, names: Sequence[str], timer: Timer, repeats: int) -> dict[str, dict[str, list[Spent]]]:
        """By the mode of the case."""
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-m", f"{__package__}.layer_host_time", "--json", "--case", self.case.host_case]
        command += ["--repeats", str(TURNS_OF_A_REPEAT * repeats)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            raise LaunchError(f"{' '.join(command)} failed with status {done.returncode}: {' '.join(last)}")
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        return {
            row["provider"]: {row["mode"]: [Spent(microseconds / 1e6) for microseconds in row["us"]]}
            for row in rows
            if row["provider"] in names
        }

    def memory(self, provider: str) -> dict[str, float | None]:
        """Nothing of interest at these sizes."""
        return {"saved_mib": None, "peak_mib": None}

    def rates(self, provider: str, mode: str, seconds: float) -> dict[str, Any]:
        """None: nothing is computed."""
        return {}
