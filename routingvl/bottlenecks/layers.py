"""Routed bottlenecks as modules: LoRA beside a frozen projection, and an adapter behind a sublayer.

Both read the image from a :class:`~routingvl.bottlenecks.context.VisualContext`, or take it as a second argument.
B batch, T text tokens, L visual tokens, K inputs, N outputs, R rank; x [B, T, K] text, v [B, L, K] image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from routingvl.bottlenecks.context import VisualContext
from routingvl.bottlenecks.parts import Parts
from routingvl.bottlenecks.projections import is_conv1d, projection_widths
from routingvl.bottlenecks.routed_layer import RoutedLayer
from routingvl.kernels import (
    ImageCode,
    can_project_jointly,
    project_adapter_image,
    project_adapter_images,
    project_lora_image,
    project_lora_images,
    routed_adapter,
    routed_lora,
    routed_lora_linear,
)
from routingvl.kernels.activations import find_activation
from routingvl.kernels.reference import grouped_linear


def in_dtype(like: torch.Tensor, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors in the dtype of ``like``; as they are under autocast, where each operation casts for itself."""
    if torch.is_autocast_enabled(like.device.type):
        return list(tensors)
    return [x if x is None or x.dtype == like.dtype else x.to(like.dtype) for x in tensors]


class RoutedLoRA(RoutedLayer):
    """What every routed LoRA is, wherever its weights are and whatever computes the projection beside it.

    Args:
        widths: (K, N), inputs and outputs of the projection.
        rank: R of each slice.
        routing, relu, placement, routed_by: see :class:`~routingvl.config.RoutingConfig`.
        alpha: the update is scaled by alpha / rank; None for alpha = rank.
        dropout: probability for the bottleneck's inputs, drawn separately for text and image.
        slices: (start, stop) columns of the output that are adapted, equal in width; None for all. G slices share one
            bottleneck of joined rank G*R, in which the image is routed; each is expanded from R of its components.
        parts: instead of slices, the columns of each part, which need not be equally many nor stand side by side.
        image_projection: "own" gives the image a down-projection A_v of its own, ``lora_A_image``; None: A projects it.
        image_width: K_v of the image's own down-projection; None: K.
        two_step, heads: see :class:`~routingvl.config.RoutingConfig`; both run as torch operations on any backend.
        context: where the visual features come from when they are not passed to the call.
        backend: None, "eager" or "triton", see :func:`routingvl.kernels.lora.api`.

    Raises:
        ValueError: slices do not fit the output, or the routing function is not known.
    """

    kind = "lora"

    def __init__(
        self,
        widths: tuple[int, int],
        rank: int,
        *,
        routing: str = "add",
        alpha: float | None = None,
        dropout: float = 0.0,
        relu: bool = False,
        placement: str = "bottleneck",
        slices: Sequence[tuple[int, int]] | None = None,
        parts: Sequence[Sequence[int]] | None = None,
        image_projection: str | None = None,
        image_width: int | None = None,
        two_step: str | None = None,
        heads: int = 4,
        context: VisualContext | None = None,
        backend: str | None = None,
        routed_by: str = "image",
    ) -> None:
        super().__init__(routing, dropout, relu, context, backend, routed_by)
        self.in_features, self.out_features = widths
        self._take_image(self.in_features, image_projection, image_width, two_step, heads)
        self.rank = rank
        self.scaling = (rank if alpha is None else alpha) / rank
        self.placement = placement
        self.columns, self.width = _columns(slices, self.out_features)
        self.parts = None if parts is None else Parts(parts, self.out_features)
        self.groups = 1 if self.columns is None else len(self.columns)  # G, how many slices share the bottleneck
        if parts is not None:
            self.groups = len(parts)
        if self._make_two_step is not None and placement != "bottleneck":
            raise ValueError(f"placement={placement!r}: two steps and attention are in the bottleneck")

    def _make_weights(self, device: torch.device, dtype: torch.dtype) -> None:
        rows = self.groups * self.width if self.parts is None else sum(self.parts.sizes)
        shapes = {"lora_B": (rows, self.rank)}
        if self._make_two_step is not None:
            self.two_step = self._make_two_step(self.rank, self.groups, device=device, dtype=dtype)
        else:
            shapes = {"lora_A": (self.groups * self.rank, self.in_features), **shapes}
            shapes |= {"lora_A_image": (self.groups * self.rank, self.image_width)} if self.has_own else {}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(*shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A ~ U(-1/sqrt(K), 1/sqrt(K)), A_v likewise with K_v, B = 0; two steps start as nn.Linear and LayerNorm do."""
        a, b, *own = self.projection
        if self.two_step is not None:
            for part in self.two_step.children():
                part.reset_parameters()
        for down in (a, *own) if self.two_step is None else ():
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        nn.init.zeros_(b)

    @property
    def projection(self) -> tuple[torch.Tensor, ...]:
        """A [G*R, K], B [G*n, R] and, where the image has its own down-projection, A_v [G*R, K_v].

        In place of A and A_v stand those of two steps down.
        """
        if self.two_step is not None:
            first, *others = self.two_step.parameters()
            return first, self.lora_B, *others
        return (self.lora_A, self.lora_B, self.lora_A_image) if self.has_own else (self.lora_A, self.lora_B)

    def add_to(self, base_output: torch.Tensor, x: torch.Tensor, v: torch.Tensor | None = None) -> torch.Tensor:
        """base_output [..., N] plus the update of x [..., K] (three dimensions when an image is routed in).

        v [B, L, K] is the image, or the context's. The result has base_output's dtype, or the wider one under autocast.
        """
        if not self.enabled:
            return base_output
        v, image, keep, counted, index = self.read_image(x, v)
        rows = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
        base = base_output.reshape(*rows.shape[:-1], self.out_features)
        v, a, b, *own = in_dtype(rows, v, *self.projection[: None if self.two_step is None else 2])
        mixed = base.dtype != rows.dtype and not torch.is_autocast_enabled(rows.device.type)
        if self.drops:
            rows, v = F.dropout(rows, self.dropout), None if v is None else F.dropout(v, self.dropout)
        options = {"image": image, "image_index": index, **_named(own), **self._options()}
        if self.two_step is not None:
            y = self._add_to_columns(base, self.two_step(rows, v, counted, index), b)
        elif self.parts is not None:
            y = self.parts.add(base, routed_lora(rows, v, a, self.parts.even(b), **options))
        else:
            start = torch.zeros_like(base, dtype=rows.dtype) if mixed else base
            y = routed_lora(rows, v, a, b, base=start, columns=self.columns, **options)
            y = base + y.to(base.dtype) if mixed else y
        y = y if keep is None else torch.where(keep, y, base)
        self._watch(y)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _add_to_columns(self, base: torch.Tensor, z: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """base [B, T, N] plus s z Bᵀ of z [B, T, G*R] and B [G*n, R], where its columns are."""
        parts = self.parts
        if parts is None and self.columns is not None:
            parts = Parts([range(start, start + self.width) for start in self.columns], self.out_features)
        update = self.scaling * grouped_linear(z, b if parts is None else parts.even(b), self.groups)
        return base + update if parts is None else parts.add(base, update)

    def project(self, v: torch.Tensor) -> ImageCode | None:
        """See :class:`RoutedLayer`."""
        if self.two_step is not None or (self.parts is not None and not self.parts.is_even):
            return None
        v, a, b, *own = in_dtype(v, v, *self.projection)
        return project_lora_image(v, a, b, decoding=True, **_named(own), **self._options())

    @staticmethod
    def project_jointly(v: torch.Tensor, *weights: Sequence[torch.Tensor], **options: Any) -> list[ImageCode]:
        """See :class:`RoutedLayer`."""
        return project_lora_images(v, *(in_dtype(v, *of_layers) for of_layers in weights), **options)

    def joint_options(self, v: torch.Tensor) -> dict[str, Any] | None:
        """See :class:`RoutedLayer`."""
        apart = self.two_step is not None or (self.parts is not None and not self.parts.is_even)
        if self.drops or apart or not can_project_jointly(self.routing, v.shape[1], self.relu, self.placement):
            return None
        return {"routing": self.routing, "scaling": self.scaling, "groups": self.groups}

    def _options(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("routing", "scaling", "relu", "groups", "placement", "backend")}

    def extra_repr(self) -> str:
        """What print shows."""
        columns = "" if self.columns is None else f", columns={self.columns}"
        columns += "" if self.parts is None else f", parts of {self.parts.sizes} columns"
        if self.has_own and self.two_step is None:
            columns += f", image {self.image_width} -> {self.groups * self.rank}"
        return f"{self.in_features} -> {self.out_features}, {super().extra_repr()}{columns}, placement={self.placement}"


class RoutedLoRALinear(RoutedLoRA):
    """A frozen projection plus a routed low-rank update: ``y = x Wᵀ + bias + (alpha / R) route(x Aᵀ, v Aᵀ) Bᵀ``.

    The module takes over the weight and bias of ``base`` under their own names, so that a model's state dict keeps
    its keys. At initialisation B is 0 and the output is that of ``base``, bit for bit. The update is never merged into
    the weight, because it depends on the image (arXiv 2403.09377, section 3).

    Args:
        base: nn.Linear (weight [N, K]) or transformers' Conv1D (weight [K, N]), with a plain dense weight.
        rank, **options: as for :class:`RoutedLoRA`.
        dtype: of A, B and the bias; None: the weight's. They are cast to the dtype of x in each call.

    Raises:
        TypeError: ``base`` is neither nn.Linear nor Conv1D.
        ValueError: as for :class:`RoutedLoRA`.
    """

    def __init__(self, base: nn.Module, rank: int, *, dtype: torch.dtype | None = None, **options: Any) -> None:
        if not (type(base) is nn.Linear or is_conv1d(base)):
            raise TypeError(f"LoRA stands beside nn.Linear or transformers' Conv1D, not {type(base).__name__}")
        super().__init__(projection_widths(base), rank, **options)
        self.weight_layout = "kn" if is_conv1d(base) else "nk"
        self._base = (base,)  # in a tuple: kept for restore(), not registered as a sub-module
        self.weight = base.weight
        self.bias = base.bias
        self._make_weights(base.weight.device, dtype or base.weight.dtype)
        self.train(base.training)

    def forward(self, x: torch.Tensor, v: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] (three dimensions when an image is routed in), v [B, L, K] or the context's -> y [..., N]."""
        if not self.enabled:
            return self.restore()(x)
        if self.parts is not None or self.two_step is not None:
            weight = self.weight if self.weight_layout == "nk" else self.weight.t()
            return self.add_to(F.linear(x, *in_dtype(x, weight, self.bias)), x, v)
        v, image, keep, _, index = self.read_image(x, v)
        shape = x.shape
        rows = x if x.dim() == 3 else x.reshape(1, -1, shape[-1])
        v, bias, a, b, *own = in_dtype(rows, v, self.bias, *self.projection)
        y = routed_lora_linear(
            rows,
            v,
            self.weight,
            bias,
            a,
            b,
            columns=self.columns,
            weight_layout=self.weight_layout,
            dropout=self.dropout if self.training else 0.0,
            image=image,
            image_index=index,
            **_named(own),
            **self._options(),
        )
        if keep is not None:
            weight = self.weight if self.weight_layout == "nk" else self.weight.t()
            y = torch.where(keep, y, F.linear(rows, weight, bias))
        self._watch(y)
        return y.view(*shape[:-1], self.out_features)

    def restore(self) -> nn.Module:
        """The module this one stands in for, with the current weight and bias; the low-rank update is dropped."""
        (base,), weight, bias = self._base, self._parameters["weight"], self._parameters.get("bias")
        if bias is not None and bias.dtype != weight.dtype:
            bias = nn.Parameter(bias.detach().to(weight.dtype), bias.requires_grad)
        base.weight, base.bias = weight, bias
        return base.train(self.training)


class RoutedAdapter(RoutedLayer):
    """A bottleneck behind a sublayer: ``y = [x +] act(route(x Aᵀ + b_down, v Aᵀ + b_down)) Bᵀ + b_up``.

    Args:
        width: K of text and image.
        rank: R.
        activation: "gelu", "gelu_new", "relu", "silu" or "identity", applied after routing.
        residual: add the input to the output.
        image_projection, image_width, two_step, heads: as for :class:`RoutedLoRA`; the image's own down-projection is
            ``image_down_sampler``.
        routing, dropout, relu, context, backend, routed_by: as for :class:`RoutedLoRALinear`.

    Weights are drawn from N(0, 0.02²), biases start at 0. :meth:`hang_on` puts it behind or in front of other modules,
    which keep their class and the names of their parameters.
    """

    kind = "adapter"

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        routing: str = "add",
        activation: str = "gelu",
        residual: bool = True,
        dropout: float = 0.0,
        relu: bool = False,
        image_projection: str | None = None,
        image_width: int | None = None,
        two_step: str | None = None,
        heads: int = 4,
        context: VisualContext | None = None,
        backend: str | None = None,
        routed_by: str = "image",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(routing, dropout, relu, context, backend, routed_by)
        self.rank = rank
        self._take_image(width, image_projection, image_width, two_step, heads)
        self.activation = activation
        self.residual = residual
        self._handles: list[RemovableHandle] = []
        if self._make_two_step is not None:
            self.two_step = self._make_two_step(rank, 1, device=device, dtype=dtype)
        else:
            self.down_sampler = nn.Linear(width, rank, device=device, dtype=dtype)
        self.up_sampler = nn.Linear(rank, width, device=device, dtype=dtype)
        if self.has_own and self.two_step is None:
            self.image_down_sampler = nn.Linear(self.image_width, rank, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights ~ N(0, 0.02²), biases 0, those of two steps too."""
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: torch.Tensor, v: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, T, K], v [B, L, K] or the context's -> y [B, T, K]."""
        if not self.enabled:
            return x
        v, image, keep, counted, index = self.read_image(x, v)
        dropped = x
        if self.drops:
            dropped, v = F.dropout(x, self.dropout), None if v is None else F.dropout(v, self.dropout)
        if self.two_step is not None:
            z = self.two_step(dropped, *in_dtype(x, v), counted, index)
            up = in_dtype(x, self.up_sampler.weight, self.up_sampler.bias)
            y = F.linear(find_activation(self.activation).forward(z), *up)
            return self._finished(x + y if self.residual else y, x, keep)
        if counted is not None:  # the bias would stand where there is no token
            image = ImageCode(self.project(v).u.masked_fill(~counted.unsqueeze(2), 0))
        up = self.up_sampler
        v, weight, bias, up_weight, up_bias, *own = in_dtype(
            x, v, *self.projection[:2], up.weight, up.bias, *self.projection[2:]
        )
        y = routed_adapter(
            dropped,
            v,
            weight,
            bias,
            up_weight,
            up_bias,
            routing=self.routing,
            activation=self.activation,
            residual=self.residual and dropped is x,
            relu=self.relu,
            backend=self.backend,
            image=image,
            image_index=index,
            **_named(own),
        )
        # The residual path carries the input itself, without the bottleneck's dropout.
        return self._finished(y + x if self.residual and dropped is not x else y, x, keep)

    def _finished(self, y: torch.Tensor, x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        self._watch(y)
        return y if keep is None else torch.where(keep, y, x)

    def hang_on(self, module: nn.Module, before: bool = False) -> None:
        """Send the output of ``module`` through the adapter, or its first argument ``before`` it."""
        hook = module.register_forward_pre_hook(self._before) if before else module.register_forward_hook(self._behind)
        self._handles.append(hook)

    def take_off(self) -> None:
        """Leave all modules that the adapter hangs on as they were."""
        while self._handles:
            self._handles.pop().remove()

    def _before(self, module: nn.Module, args: tuple) -> tuple:
        return self(args[0]), *args[1:]

    def _behind(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return self(output)

    @property
    def projection(self) -> tuple[torch.Tensor, ...]:
        """A [R, K], b_down [R] and, where the image has its own down-projection, that and its bias.

        In place of A and all others stand those of two steps down.
        """
        if self.two_step is not None:
            return tuple(self.two_step.parameters())
        shared = (self.down_sampler.weight, self.down_sampler.bias)
        return (*shared, self.image_down_sampler.weight, self.image_down_sampler.bias) if self.has_own else shared

    def project(self, v: torch.Tensor) -> ImageCode | None:
        """See :class:`RoutedLayer`."""
        if self.two_step is not None:
            return None
        a, bias, *own = in_dtype(v, *self.projection)
        return project_adapter_image(v, a, bias, routing=self.routing, relu=self.relu, decoding=True, **_named(own))

    @staticmethod
    def project_jointly(v: torch.Tensor, *weights: Sequence[torch.Tensor], **options: Any) -> list[ImageCode]:
        """See :class:`RoutedLayer`."""
        return project_adapter_images(v, *(in_dtype(v, *of_layers) for of_layers in weights), **options)

    def joint_options(self, v: torch.Tensor) -> dict[str, Any] | None:
        """See :class:`RoutedLayer`."""
        joint = not self.drops and self.two_step is None and can_project_jointly(self.routing, v.shape[1], self.relu)
        return {"routing": self.routing} if joint else None

    def extra_repr(self) -> str:
        """What print shows."""
        return f"{super().extra_repr()}, activation={self.activation}, residual={self.residual}"


def _named(own: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The image's own down-projection as the kernels' functions name it."""
    return dict(zip(("image_weight", "image_bias"), own, strict=False))


def _columns(slices: Sequence[tuple[int, int]] | None, out_features: int) -> tuple[tuple[int, ...] | None, int]:
    """Start columns and common width of the adapted slices; (None, N) for the whole output."""
    if slices is None:
        return None, out_features
    widths = {stop - start for start, stop in slices}
    ordered = sorted(slices)
    overlap = any(left[1] > right[0] for left, right in itertools.pairwise(ordered))
    if len(widths) != 1 or min(widths) < 1 or overlap or ordered[0][0] < 0 or ordered[-1][1] > out_features:
        raise ValueError(
            f"slices {list(slices)} must be equally wide, apart from each other and within the {out_features} outputs"
        )
    return tuple(start for start, _ in slices), widths.pop()
