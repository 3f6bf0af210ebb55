"""One run of a suite: every case is gated first, then timed with all providers in turns."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from .cases import DTYPES, Case
from .ceilings import Limits, measure_ceilings
from .environment import describe_environment
from .measure import Checked, check, measure, memory, obstacle
from .providers import providers
from .suites import Plan, Suite
from .timing import Timer, quantiles

TIME_LIMIT = "time limit"  # why something was left out


class Bench:
    """One run of a suite: its device, clocks, ceilings and what time is left."""

    def __init__(self, suite: Suite, threads: int) -> None:
        self.suite, self.device = suite, torch.device(suite.device)
        self.begun = time.monotonic()
        self.timers = {plan.clock: Timer(self.device, threads, plan.clock) for plan in suite.plans}
        self.environment = describe_environment(self.device, threads)
        # Events rather than wall time on a GPU: a limit is of the device, not of launching.
        timer = Timer(self.device, threads, "gpu") if self.device.type == "cuda" else self.timers[suite.plans[0].clock]
        self.limits = Limits(measure_ceilings(timer, list(dict.fromkeys(plan.dtype for plan in suite.plans))))

    def is_late(self, share: float = 1.0) -> bool:
        """Whether this share of the time limit is spent."""
        return self.suite.time_limit is not None and time.monotonic() - self.begun > share * self.suite.time_limit

    def fields(self, case: Case, routing: str, plan: Plan) -> dict:
        """What all rows of one case say: what is measured, then where."""
        what = {"case": case.name, "op": case.op, "level": case.level, "routing": routing, "dtype": plan.dtype}
        what |= {**case.sizes(), "dropout": plan.dropout, "clock": self.timers[plan.clock].clock}
        return what | self.environment

    def rows(self, case: Case, routing: str, plan: Plan) -> Iterator[dict]:
        """Gate and measure one case: a row for each provider and mode, one for each provider left out."""
        shared, timer = self.fields(case, routing, plan), self.timers[plan.clock]
        if self.is_late():
            yield {**shared, "provider": "all", "gate": "skipped", "skipped": TIME_LIMIT}
            return
        layers, skipped, gate = self._gated(case, routing, plan)
        missed = {name: found.missed for name, found in gate.items() if found.missed}
        for name, what in missed.items():
            yield {**shared, "provider": name, "gate": "failed", "gate_missed": what}
        for name, why in skipped.items():
            yield {**shared, "provider": name, "gate": "skipped", "skipped": why}
        if "reference" in missed:
            return  # nothing to compare with
        layers = {name: layer for name, layer in layers.items() if name not in missed}
        seconds = measure(case, layers, DTYPES[plan.dtype], timer, self.suite.repeats)
        for provider, modes in seconds.items():
            kept = memory(case, layers[provider], DTYPES[plan.dtype], self.device)
            for mode, values in modes.items():
                fields = {**shared, "provider": provider, "mode": mode, **quantiles(values), **kept}
                fields |= self._work(case, provider, mode, plan.dtype, fields["ms_p50"] / 1e3)
                yield {**fields, "repeats": self.suite.repeats, **_passed(gate.get(provider))}

    def _gated(self, case: Case, routing: str, plan: Plan) -> tuple[dict, dict[str, str], dict[str, Checked]]:
        """The layers to time, why others are left out, and what the gate found; it looks at them without dropout."""
        wanted, skipped = self.suite.providers, {}
        if "compile" in wanted and (not plan.compiled or self.is_late(0.5)):
            skipped["compile"] = "not compiled in this pass of the suite" if not plan.compiled else TIME_LIMIT
            wanted = tuple(name for name in wanted if name != "compile")
        torch.compiler.reset()  # else the compiler gives up after some cases that share their code
        layers, unable = providers(case, routing, plan.dropout, self.suite.device, wanted)
        judged = providers(case, routing, 0.0, self.suite.device, wanted)[0] if plan.dropout else layers
        judged = {name: layer for name, layer in judged.items() if name != "base"}
        gate = check(case, routing, judged, DTYPES[plan.dtype], self.device)
        if "compile" in gate and gate["compile"].raised:  # the compiler's failure is none of the layer
            skipped["compile"] = gate.pop("compile").missed[0]
            del layers["compile"]
        if plan.dropout:
            for name in gate:
                what = obstacle(case, layers[name], DTYPES[plan.dtype], self.device)
                gate[name].missed += [what] if what else []
        return layers, skipped | unable, gate

    def _work(self, case: Case, provider: str, mode: str, dtype: str, seconds: float) -> dict:
        flops, moved = case.work(mode, DTYPES[dtype].itemsize, bottleneck=provider != "base")
        least, bound = self.limits.seconds(flops, moved, dtype)
        return {
            "flops": flops,
            "tflop_s": round(flops / seconds / 1e12, 4),
            "bytes_moved": moved,
            "gb_s": round(moved / seconds / 1e9, 3),
            "limit": bound,
            "limit_ms": round(least * 1e3, 5),
            "limit_percent": round(100 * least / seconds, 2),
        }


def _passed(found: Checked | None) -> dict:
    """The gate's fields of a provider that is timed; the frozen projection alone has no gate."""
    return {
        "gate": "passed",
        "gate_worst_error": found.worst_error if found else None,
        "first_call_s": found.first_call_s if found else None,
    }
