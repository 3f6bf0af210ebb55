"""What trains in a model with routed bottlenecks, and which backend runs each of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from routingvl.bottlenecks.layers import RoutedLayer
from routingvl.kernels.dispatch import select_backend


@dataclass(frozen=True)
class LayerReport:
    """One routed bottleneck: its module name, kind, routing, rank, which backend runs it and why, ``routed_by``."""

    name: str
    kind: str
    routing: str
    rank: int
    backend: str
    reason: str
    routed_by: str = "image"


@dataclass(frozen=True)
class TrainableReport:
    """How many parameters of a model train, out of how many (a tied weight counts once), their names and the layers.

    ``skipped`` says what was asked of ``inject`` and not done, and why.
    """

    trainable: int
    total: int
    names: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"trainable {self.trainable:,} of {self.total:,} parameters ({100 * self.trainable / self.total:.2f} %)"
        width = max((len(layer.name) for layer in self.layers), default=0)
        rows = [
            f"  {layer.name:<{width}}  {layer.kind:<7}  {layer.routing:<6}  r={layer.rank:<4} "
            f"{'' if layer.routed_by == 'image' else f'by {layer.routed_by}  '}{layer.backend}: {layer.reason}"
            for layer in self.layers
        ]
        return "\n".join([head, *rows, *(f"  skipped: {line}" for line in self.skipped)])


def trainable_report(model: nn.Module, exclude: str | None = None) -> TrainableReport:
    """Count what trains in ``model``; parameters whose name starts with ``exclude`` do not count."""
    parameters = [(n, p) for n, p in model.named_parameters() if exclude is None or not n.startswith(exclude)]
    trainable = [(name, p.numel()) for name, p in parameters if p.requires_grad]
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, RoutedLayer):
            backend, reason = _backend_of(module)
            described = name, module.kind, module.routing.name, module.rank, backend, reason, module.routed_by
            layers.append(LayerReport(*described))
    return TrainableReport(
        trainable=sum(size for _, size in trainable),
        total=sum(p.numel() for _, p in parameters),
        names=tuple(name for name, _ in trainable),
        layers=tuple(layers),
    )


def _backend_of(layer: RoutedLayer) -> tuple[str, str]:
    """Which backend runs a bottleneck, and why."""
    if layer.two_step is not None:
        what = "two steps down have" if layer.two_step.form else "attention has"
        return "eager", f"{what} no Triton kernel"
    a = layer.projection[0]
    placement = getattr(layer, "placement", "bottleneck")  # Adapters have no other
    options = {"routing": layer.routing, "relu": layer.relu, "placement": placement}
    options["products"] = layer.kind == "adapter" or layer.relu or layer.routing.probe is None
    try:
        return select_backend(a.device.type, layer.backend, dtype=a.dtype, width=a.shape[0], **options)
    except RuntimeError as error:  # a model is often built on the CPU and moved to its GPU afterwards
        return "triton", str(error)
