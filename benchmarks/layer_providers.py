"""Who computes a case's layer: the published chain, the same compiled, PEFT and other competitors, our backends.

A provider takes the tensors of benchmarks/layer_cases.py by name and gives y [B, T, N]. One that cannot run says why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from routingvl.kernels import routed_adapter, routed_lora, routed_lora_linear
from routingvl.training.compile import compiler_obstacle

from .competitors import WithGraphs, closed_form, in_place_lora
from .layer_cases import Case, Layer, frozen_conv1d, frozen_linear
from .published_layers import published_adapter, published_lora, published_lora_linear, published_merged_linear

PROVIDERS = (
    *("base", "reference", "compile", "closed", "closed_overhead", "peft", "addmm", "split", "eager", "triton"),
)
COMPILED = ("compile", "closed", "closed_overhead")  # by torch.compile
# Not ours, and not what ratios are taken to: the exit status is none of theirs.
COMPETITORS = (*COMPILED, "peft", "addmm", "split")


def providers(
    case: Case, routing: str, dropout: float, device: str, wanted: tuple[str, ...] = PROVIDERS
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers to compare, and for each of ``wanted`` that cannot run the reason.

    "base" is the frozen projection alone (none for an adapter and at level "op"); "reference" comes always, because
    every ratio is taken to it.
    """
    layers: dict[str, Layer] = {}
    skipped: dict[str, str] = {}
    if case.level == "layer" and case.op != "adapter":
        layers["base"] = frozen_linear if case.op == "lora" else frozen_conv1d
    layers["reference"] = _reference(case, routing, dropout)
    makers: dict[str, Callable[[], Layer]] = {
        "compile": lambda: torch.compile(_compilable(case, layers["reference"]), dynamic=False),
        "closed": lambda: torch.compile(closed_form(case, routing, dropout), dynamic=False),
        "closed_overhead": lambda: WithGraphs(closed_form(case, routing, dropout)),
        "peft": lambda: PeftLayer(case, dropout, device),
        "addmm": lambda: partial(in_place_lora, routing, None),
        "split": lambda: partial(in_place_lora, routing, _two_products()),
        "eager": partial(ours, case, routing, dropout, "eager"),
        "triton": partial(ours, case, routing, dropout, "triton"),
    }
    for name in PROVIDERS:
        if name in wanted and name in makers:
            reason = provider_obstacle(name, device, routing, case.op == "lora" and case.level == "layer", dropout)
            if reason is None:
                layers[name] = makers[name]()
            else:
                skipped[name] = reason
    return layers, skipped


def _reference(case: Case, routing: str, dropout: float) -> Layer:
    if case.op == "adapter":
        return partial(published_adapter, routing=routing, activation=case.activation, residual=case.residual)
    options = {"routing": routing, "scaling": 1.0}
    if case.level == "op":
        return partial(published_lora, **options)
    options["dropout"] = dropout
    if case.op == "lora":
        return partial(published_lora_linear, **options)
    return partial(published_merged_linear, **options, groups=case.groups, columns=case.columns)


def _compilable(case: Case, reference: Layer) -> Layer:
    """The reference as a compiler takes it whole."""
    return partial(reference, mask=False) if case.op == "merged_lora" else reference


def ours(case: Case, routing: str, dropout: float, backend: str, relu: bool = False) -> Layer:
    """The case's layer by this library, on one of its backends."""
    options = {"routing": routing, "relu": relu, "backend": backend}
    if case.op == "adapter":
        return partial(routed_adapter, **options, activation=case.activation, residual=case.residual)
    if case.level == "op":
        return partial(routed_lora, **options)
    layout = "nk" if case.op == "lora" else "kn"
    options |= {"groups": case.groups, "columns": case.columns, "weight_layout": layout, "dropout": dropout}
    return partial(routed_lora_linear, **options)


def provider_obstacle(name: str, device: str, routing: str, on_linear: bool, dropout: float = 0.0) -> str | None:
    """Why a provider cannot compute a case here, or None when it can; ``on_linear``: LoRA on nn.Linear."""
    if name in COMPILED:
        return compiler_obstacle(torch.device(device))
    if name == "peft":
        return _peft_obstacle(on_linear, routing)
    if name in ("addmm", "split"):
        if not on_linear:
            return f"{name} is of nn.Linear with LoRA"
        if dropout:
            return f"{name} has no dropout"
    return _triton_obstacle(device) if name in ("split", "triton") else None


def _two_products() -> Callable[..., Tensor]:
    from .split_graph import two_products  # needs triton

    return two_products


def _peft_obstacle(on_linear: bool, routing: str) -> str | None:
    if not on_linear:
        return "PEFT has no such layer: it is compared on nn.Linear with LoRA"
    if routing != "none":
        return "PEFT has no routing"
    try:
        import peft  # noqa: F401
    except ImportError:
        return "peft is not installed"
    return None


def _triton_obstacle(device: str) -> str | None:
    """Why our kernels cannot be timed on a device, or None when they can."""
    if torch.device(device).type == "cpu":
        return "Triton kernels need a GPU; on a CPU they run in an interpreter, whose time says nothing"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return None


class PeftLayer:
    """PEFT's LoRA on nn.Linear, as a function of the case's tensors: weight [N, K], bias [N], a [R, K], b [N, R].

    The tensors take the place of the module's parameters, once for a set of tensors, so that PEFT's forward pass is
    timed as it stands.
    """

    def __init__(self, case: Case, dropout: float, device: str) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        holder = nn.Sequential(nn.Linear(case.K, case.N, device=device))
        config = LoraConfig(r=case.R, lora_alpha=case.R, lora_dropout=dropout, target_modules=["0"])
        self.module = inject_adapter_in_model(config, holder)[0].train()
        self.bound: tuple[Tensor, ...] = ()

    def __call__(self, x: Tensor, v: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        given = (weight, bias, a, b)
        if len(self.bound) != 4 or any(new is not old for new, old in zip(given, self.bound, strict=True)):
            self._bind(given)
        return self.module(x)

    def _bind(self, given: tuple[Tensor, ...]) -> None:
        base, down, up = self.module.base_layer, self.module.lora_A["default"], self.module.lora_B["default"]
        places = ((base, "weight"), (base, "bias"), (down, "weight"), (up, "weight"))
        for (owner, name), tensor in zip(places, given, strict=True):
            owner._parameters.pop(name, None)  # a plain tensor may not replace a parameter
            setattr(owner, name, tensor)
        self.bound = given
