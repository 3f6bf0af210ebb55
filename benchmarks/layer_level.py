"""The levels "op" and "layer": one layer of random tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .cases import DTYPES, Case
from .level import Level
from .measure import Checked, Pass, check, measure, memory, obstacle, pass_of
from .providers import providers
from .timing import Timer


class LayerLevel(Level):
    """See :class:`benchmarks.level.Level`; the sides are functions of the case's tensors."""

    case: Case

    def gated(self) -> tuple[dict[str, str], dict[str, Checked]]:
        """The gate looks at layers without dropout; with it they have to run."""
        case, plan, device = self.case, self.setting.plan, self.setting.device
        wanted, skipped = self.setting.providers, {}
        if "compile" in wanted and (why := self.setting.left_out("compile")):
            skipped["compile"] = why
            wanted = tuple(name for name in wanted if name != "compile")
        self.sides, unable = providers(case, self.routing, plan.dropout, str(device), wanted)
        judged = providers(case, self.routing, 0.0, str(device), wanted)[0] if plan.dropout else self.sides
        judged = {name: layer for name, layer in judged.items() if name != "base"}
        gate = check(case, self.routing, judged, DTYPES[plan.dtype], device)
        if plan.dropout:
            for name, found in gate.items():
                what = None if found.raised else obstacle(case, self.sides[name], DTYPES[plan.dtype], device)
                found.missed += [what] if what else []
        return skipped | unable, gate

    def seconds(self, names: Sequence[str], timer: Timer, repeats: int) -> dict[str, dict[str, list[float]]]:
        """By "fwd", "bwd" and "fwdbwd"."""
        layers = {name: self.sides[name] for name in names}
        return measure(self.case, layers, DTYPES[self.setting.plan.dtype], timer, repeats)

    def pass_of(self, provider: str) -> Pass:
        """Through random tensors."""
        return pass_of(self.case, self.sides[provider], DTYPES[self.setting.plan.dtype], self.setting.device)

    def memory(self, provider: str) -> dict[str, float | None]:
        """See :func:`benchmarks.measure.memory`."""
        return memory(self.case, self.sides[provider], DTYPES[self.setting.plan.dtype], self.setting.device)

    def rates(self, provider: str, mode: str, seconds: float) -> dict[str, Any]:
        """Operations and bytes of the formula, their rates, and the device's limit."""
        dtype = self.setting.plan.dtype
        flops, moved = self.case.work(mode, DTYPES[dtype].itemsize, bottleneck=provider != "base")
        least, bound = self.setting.limits().seconds(flops, moved, dtype)
        return {
            "flops": flops,
            "tflop_s": round(flops / seconds / 1e12, 4),
            "bytes_moved": moved,
            "gb_s": round(moved / seconds / 1e9, 3),
            "limit": bound,
            "limit_ms": round(least * 1e3, 5),
            "limit_percent": round(100 * least / seconds, 2),
        }
