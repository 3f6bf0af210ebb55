"""What every routed bottleneck shares: its options, and how the image reaches it.

The image comes from a :class:`~routingvl.bottlenecks.context.VisualContext`, or as an argument.
B batch, T text tokens, L visual tokens, K inputs, R rank; x [B, T, K] text, v [B, L, K] image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from routingvl.bottlenecks.binding import Reading
from routingvl.bottlenecks.context import VisualContext
from routingvl.bottlenecks.two_step import TwoStep
from routingvl.config.routing import POOLED, TWO_STEP, source_of
from routingvl.kernels import ImageCode
from routingvl.kernels.attention import ATTENTION, find_function

_NO_IMAGE = Reading(None)


class RoutedLayer(nn.Module):
    """What both bottlenecks share: the routing function, and how the image reaches them.

    Attributes:
        enabled: False makes the layer do what the model did without it.
        has_own: whether the image has a down-projection of its own.
        two_step: what makes z, where the way down is in two steps or by attention; None: one down-projection does.
        kind: the method that the layer belongs to, "lora" or "adapter".
        routing: the routing function's row of :data:`routingvl.kernels.ROUTINGS`.
        routed_by: what v is, see :class:`~routingvl.config.RoutingConfig`.
        rank: R.
        image_width: K_v, how wide the image has to be: as the text (K) unless it has a down-projection of its own.
        projection: the weights that the image meets; the first is the down-projection A. The image's own, if it has
            one, stands behind those that text and image share.
        project: what v [B, L, K] comes to in this layer before any text, made for decoding; None: nothing can be.
        project_jointly: the same for the weights of several layers, with ``joint_options``.
        joint_options: its options for v [B, L, K]; None: this layer does not have it projected jointly.
    """

    enabled = True
    has_own = False
    kind: str
    rank: int
    image_width: int
    projection: tuple[torch.Tensor, ...]
    project: Callable[[torch.Tensor], ImageCode | None]
    project_jointly: Callable[..., list[ImageCode]]
    joint_options: Callable[[torch.Tensor], dict[str, Any] | None]

    def __init__(
        self,
        routing: str,
        dropout: float,
        relu: bool,
        context: VisualContext | None,
        backend: str | None,
        routed_by: str = "image",
    ):
        super().__init__()
        self.routed_by, self._source = routed_by, source_of(routed_by)
        self._image_projection: tuple[nn.Module, ...] = ()
        self.routing = find_function(routing)
        self.two_step: TwoStep | None = None
        self.dropout, self.relu, self.context, self.backend = dropout, relu, context, backend
        if context is not None:
            context.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.context is not None:
            self.context.add(self)

    def takes(self, v: torch.Tensor) -> bool:
        """Whether v [B, L, K] fits the weights, which are cast to its dtype."""
        weights = self.projection
        mixed = torch.float64 in (dtypes := {v.dtype, *(w.dtype for w in weights)}) and len(dtypes) > 1
        return v.shape[2] == self.image_width and v.device == weights[0].device and not mixed

    def _take_image(
        self, width: int, image_projection: str | None, image_width: int | None, two_step: str | None, heads: int
    ) -> None:
        """Set what the options say of the image, for a layer whose text is ``width`` wide."""
        attends = self.routing is ATTENTION
        if image_projection not in (None, "own"):
            raise ValueError(f"image_projection={image_projection!r} is not one of None and 'own' in a layer")
        if image_projection == "own" and not self.routing.uses_image:
            raise ValueError(
                f"image_projection='own' is for an image, which routing {self.routing.name!r} does not read"
            )
        if two_step not in (None, *TWO_STEP):
            raise ValueError(f"two_step={two_step!r} is not one of None, {', '.join(map(repr, TWO_STEP))}")
        if two_step is not None and (attends or not self.routing.uses_image):
            raise ValueError(f"two_step={two_step!r} is for a routing function of the image, not {self.routing.name!r}")
        apart = attends or two_step is not None
        if image_width is not None and image_projection is None and not apart:
            raise ValueError(f"image_width={image_width} is the width of an image_projection='own'")
        self.has_own = image_projection == "own" or apart
        self.image_width = image_width if self.has_own and image_width is not None else width
        self._make_two_step = None
        if apart:
            options = {"form": two_step, "routing": self.routing, "relu": self.relu, "heads": heads}
            self._make_two_step = partial(TwoStep, (width, self.image_width), **options)

    @property
    def drops(self) -> bool:
        """Whether the layer's own dropout draws in this call."""
        return self.training and self.dropout > 0

    @property
    def reads_image(self) -> bool:
        """Whether the image reaches the layer."""
        return self.routing.uses_image and self.routed_by == "image"

    @property
    def pooled(self) -> bool:
        """Whether the layer reads one visual token, the mean of all: the routing takes one, or it is asked for."""
        return self.routing.max_visual_tokens == 1 or self.routed_by in POOLED

    @property
    def image_projection(self) -> nn.Module | None:
        """What brings the context's features to the width of this layer, registered elsewhere; None: they have it."""
        return self._image_projection[0] if self._image_projection else None

    def project_image_by(self, projection: nn.Module | None) -> None:
        """Set :attr:`image_projection`, [..., d] -> [..., K]."""
        self._image_projection = () if projection is None else (projection,)

    def to_own_width(self, v: torch.Tensor) -> torch.Tensor:
        """The context's features [B, L, d] in the width of this layer [B, L, K]; padding stays zero."""
        if not self._image_projection or v.shape[2] == self.image_width:
            return v
        (projection,) = self._image_projection
        return self.context.blank(projection(v.to(projection.weight.dtype)).to(v.dtype))

    def read_image(self, x: torch.Tensor, v: torch.Tensor | None) -> Reading:
        """What to route ``x`` with: the argument ``v`` [B, L, K], else the context's, or for "text" x itself.

        Raises:
            RuntimeError, ValueError: as :meth:`VisualContext.read`; padding for a routing that it would change.
        """
        if not self.routing.uses_image:
            return _NO_IMAGE
        if v is not None:
            return Reading(v)
        if self._source == "text":
            return self._checked(self._own_text(x))
        if self.context is None:
            raise RuntimeError(f"{type(self).__name__} has no context: pass the visual features as second argument")
        weights, width = self.projection, self.image_width
        read = self.image_projection.in_features if self._image_projection else width
        v, _, keep, counted, index = self._checked(
            self.context.reading(x, pooled=self.pooled, width=width, image_width=read)
        )
        projected = self.to_own_width(v)
        if self.drops or (counted is not None and self.kind != "lora"):
            return Reading(projected, None, keep, counted, index)
        return Reading(projected, self.context.image_code(self, weights), keep, counted, index)

    def _own_text(self, x: torch.Tensor) -> Reading:
        if x.dim() != 3:
            raise ValueError(
                f"routed_by={self.routed_by!r} is for text [B, T, K], and the layer was given {list(x.shape)}"
            )
        if self.context is None:  # no padding
            return Reading(x.mean(1, keepdim=True) if self.pooled else x)
        return self.context.own_text(x, pooled=self.pooled)

    def _checked(self, reading: Reading) -> Reading:
        if reading.counted is not None and not self.routing.takes_padding:
            fix = "bind as many visual tokens for every image, without mask="
            if self.routed_by != "image":
                fix = f"use routed_by={self._source!r}, the mean"
            raise ValueError(f"routing {self.routing.name!r} may read something in zero padding: {fix}")
        return reading

    def _watch(self, y: torch.Tensor) -> None:
        if self.context is not None and self.routing.uses_image and self.training:
            self.context.watch(y)

    def extra_repr(self) -> str:
        """What print shows."""
        relu = ", relu" if self.relu else ""
        dropout = f", dropout={self.dropout}" if self.dropout else ""
        routed_by = "" if self.routed_by == "image" else f", routed_by={self.routed_by}"
        return f"routing={self.routing.name}, rank={self.rank}{relu}{dropout}{routed_by}"
