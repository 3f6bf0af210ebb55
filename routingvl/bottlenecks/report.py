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
            a = module.projection[0]
            placement = getattr(module, "placement", "bottleneck")  # Adapters have no other
            options = {"routing": module.routing, "relu": module.relu, "placement": placement}
            options["products"] = module.kind == "adapter" or module.relu or module.routing.probe is None
            try:
                backend, reason = select_backend(
                    a.device.type, module.backend, dtype=a.dtype, width=a.shape[0], **options
                )
            except RuntimeError as error:  # a model is often built on the CPU and moved to its GPU afterwards
                backend, reason = "triton", str(error)
            described = name, module.kind, module.routing.name, module.rank, backend, reason, module.routed_by
            layers.append(LayerReport(*described))
    return TrainableReport(
        trainable=sum(size for _, size in trainable),
        total=sum(p.numel() for _, p in parameters),
        names=tuple(name for name, _ in trainable),
        layers=tuple(layers),
    )
