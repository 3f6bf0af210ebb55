"""One run of a suite: every case is gated first, then timed with all providers in turns."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import closing

import torch

from .ceilings import Limits, measure_ceilings
from .comparison import TIME_LIMIT, Comparison, Setting
from .cuda_graphs import gated_graph, measure_replays
from .environment import describe_environment
from .kernel_times import KernelTimesError
from .launch_level import LaunchCase, LaunchComparison, LaunchError
from .layer_cases import DTYPES, Case
from .layer_comparison import LayerComparison
from .layer_providers import COMPILED
from .model_cases import ModelCase
from .passes import Checked
from .suites import Plan, Suite
from .timing import Spent, Timer, quantiles


def comparison_of(case: LaunchCase | Case | ModelCase) -> type[Comparison]:
    """Who measures a case."""
    if isinstance(case, Case):
        return LayerComparison
    if isinstance(case, LaunchCase):
        return LaunchComparison
    from .model_comparisons import MODEL_COMPARISONS  # here, because it needs transformers

    return MODEL_COMPARISONS[case.level]


class SuiteRun:
    """One run of a suite: its device, clocks, ceilings and what time is left."""

    def __init__(self, suite: Suite, threads: int) -> None:
        self.suite, self.device, self.threads = suite, torch.device(suite.device), threads
        self.begun = time.monotonic()
        self.timers = {plan.clock: Timer(self.device, threads, plan.clock) for plan in suite.plans}
        self.environment = describe_environment(self.device, threads)

    @functools.cached_property
    def limits(self) -> Limits:
        """What the device can do at most, measured when first asked for."""
        # Events rather than wall time on a GPU: a limit is of the device, not of launching.
        cuda, plans = self.device.type == "cuda", self.suite.plans
        timer = Timer(self.device, self.threads, "gpu") if cuda else self.timers[plans[0].clock]
        return Limits(measure_ceilings(timer, list(dict.fromkeys(plan.dtype for plan in plans))))

    def is_late(self, share: float = 1.0) -> bool:
        """Whether this share of the time limit is spent."""
        return self.suite.time_limit is not None and time.monotonic() - self.begun > share * self.suite.time_limit

    def fields(self, case: LaunchCase | Case | ModelCase, routing: str, plan: Plan) -> dict:
        """What all rows of one case say: what is measured, then where."""
        what = {**case.labels(), "routing": routing, "dtype": plan.dtype, **case.sizes()}
        what |= {"pure": True} if plan.pure else {}
        return {**what, "dropout": plan.dropout, "clock": self.timers[plan.clock].clock, **self.environment}

    def rows(self, case: LaunchCase | Case | ModelCase, routing: str, plan: Plan) -> Iterator[dict]:
        """Gate and measure one case: a row for each provider and mode, one for each provider left out."""
        shared, kind = self.fields(case, routing, plan), comparison_of(case)
        if why := TIME_LIMIT if self.is_late() else kind.obstacle(plan):
            yield {**shared, "provider": "all", "gate": "skipped", "skipped": why}
            return
        torch.compiler.reset()  # else the compiler gives up after some cases that share their code
        setting = Setting(plan, self.device, self.suite.providers, self.is_late, lambda: self.limits)
        with closing(kind(case, routing, setting)) as comparison:
            yield from self._rows_of(comparison, shared)

    def _rows_of(self, comparison: Comparison, shared: dict) -> Iterator[dict]:
        skipped, gate = comparison.gated()
        for name in COMPILED:
            if name in gate and gate[name].raised:  # the compiler's failure is none of the layer
                skipped[name] = gate.pop(name).missed[0]
                comparison.sides.pop(name, None)
        missed = {name: found.missed for name, found in gate.items() if found.missed}
        for name, what in missed.items():
            yield {**shared, "provider": name, "gate": "failed", "gate_missed": what}
        for name, why in skipped.items():
            yield {**shared, "provider": name, "gate": "skipped", "skipped": why}
        if "reference" in missed:
            return  # nothing to compare with
        timer = self.timers[comparison.setting.plan.clock]
        repeats = (
            self.suite.repeats
            if isinstance(comparison, (LayerComparison, LaunchComparison))
            else self.suite.model_repeats
        )
        names = [name for name in comparison.sides if name not in missed]
        try:
            seconds = comparison.seconds(names, timer, repeats)
        except KernelTimesError as error:  # no profiler here: the other clocks still tell
            yield {**shared, "provider": "all", "gate": "skipped", "skipped": f"no kernel times: {error}"}
            seconds = {}
        except LaunchError as error:
            yield {**shared, "provider": "all", "gate": "failed", "gate_missed": [str(error)]}
            seconds = {}
        for provider, modes in seconds.items():
            kept = comparison.memory(provider)
            for mode, values in modes.items():
                fields = {**shared, "provider": provider, "mode": mode, **_quantiles(values), **kept}
                fields |= comparison.rates(provider, mode, fields["ms_p50"] / 1e3)
                yield {**fields, "repeats": repeats, **_passed(gate.get(provider))}
        if self.suite.graphs:
            yield from self._graph_rows(comparison, names, {**shared, "graphs": True}, repeats)

    def _graph_rows(self, comparison: Comparison, names: list[str], shared: dict, repeats: int) -> Iterator[dict]:
        """Forward and backward pass of the sides named, replayed from a CUDA graph."""
        plan, replays, gate = comparison.setting.plan, {}, {}
        for name in names:
            whole = comparison.pass_of(name)
            if whole is None or self.is_late():
                why = TIME_LIMIT if whole else "this level has no pass to capture in a CUDA graph"
                yield {**shared, "provider": name, "gate": "skipped", "skipped": why}
                continue
            replay, found = gated_graph(whole, DTYPES[plan.dtype], plan.dropout > 0, self.device)
            if found.raised:
                why = f"not captured in a CUDA graph: {found.missed[0]}"
                yield {**shared, "provider": name, "gate": "skipped", "skipped": why}
            elif found.missed:
                yield {**shared, "provider": name, "gate": "failed", "gate_missed": found.missed}
            else:
                replays[name], gate[name] = replay, found
        for provider, values in measure_replays(replays, self.timers[plan.clock], repeats).items():
            fields = {**shared, "provider": provider, "mode": "fwdbwd", **quantiles(values)}
            fields |= comparison.rates(provider, "fwdbwd", fields["ms_p50"] / 1e3)
            yield {**fields, "repeats": repeats, **_passed(gate[provider])}


def _quantiles(values: Sequence[Spent]) -> dict[str, float]:
    """Of the seconds, and where it was measured of the host's."""
    found = quantiles([one.seconds for one in values])
    hosts = [one.host for one in values]
    return found if None in hosts else found | quantiles(hosts, "host_ms")


def _passed(found: Checked | None) -> dict:
    """The gate's fields of a provider that is timed; the frozen projection alone has no gate."""
    return {
        "gate": "passed",
        "gate_worst_error": found.worst_error if found else None,
        "first_call_s": found.first_call_s if found else None,
    }
