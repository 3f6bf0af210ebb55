"""How others would compute a routed layer, as functions of the tensors of benchmarks/layer_cases.py.

"closed" writes our closed forms in plain torch, for torch.compile to fuse; "addmm" is the order of operations of
Unsloth's LoRA (unsloth/kernels/fast_lora.py: the update added in place to the frozen product, nothing kept but the
input), "split" that of LoRAFusion (arXiv 2510.00206: t apart, then x W and t B in one kernel, likewise dy W and dt A),
both with routing between the projections. Written from their descriptions; benchmarks/split_graph.py has the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from routingvl.kernels import ROUTINGS
from routingvl.kernels.activations import find_activation
from routingvl.kernels.routing import Routing

from .layer_cases import Case, Layer

FusedProducts = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]


def closed_form(case: Case, routing: str, dropout: float) -> Layer:
    """The layer by the fewest operations that plain torch can write down, differentiated by autograd."""
    row = ROUTINGS[routing]
    if case.op == "adapter":
        return partial(_closed_adapter, row, case.activation, case.residual)
    columns = case.columns or (0,)

    def layer(x: Tensor, v: Tensor, a: Tensor, b: Tensor, weight: Tensor | None = None, bias: Tensor | None = None):
        left, image = (F.dropout(each, dropout) for each in (x, v)) if dropout else (x, v)
        delta = _closed_update(row, left, image, a, b, case.groups)
        if weight is None:
            return delta
        base = F.linear(x, weight if case.op == "lora" else weight.t(), bias)
        return base + delta if case.op == "lora" else _spread(base, delta, columns, b.shape[0] // case.groups)

    return layer


def _closed_update(row: Routing, x: Tensor, v: Tensor, a: Tensor, b: Tensor, groups: int) -> Tensor:
    """route(x Aᵀ, v Aᵀ) Bᵀ [B, T, G*n]; where it is rank one, without ever forming x Aᵀ."""
    u = F.linear(v, a) if row.uses_image else None
    ups = b.chunk(groups, 0)
    if row.is_rank_one(v.shape[1]):
        c = torch.bmm(x, (row.probe(u) @ a).transpose(1, 2))  # [B, T, 1]
        return c * torch.cat([part @ up.t() for part, up in zip(u.chunk(groups, -1), ups, strict=True)], -1)
    z = row.route(F.linear(x, a), u, False)
    return torch.cat([part @ up.t() for part, up in zip(z.chunk(groups, -1), ups, strict=True)], -1)


def _spread(base: Tensor, delta: Tensor, columns: tuple[int, ...], width: int) -> Tensor:
    """``base`` with each group's ``width`` columns of ``delta`` added from its column on."""
    parts, end = [], 0
    for start, part in zip(columns, delta.split(width, -1), strict=True):
        parts += [base[..., end:start], base[..., start : start + width] + part]
        end = start + width
    return torch.cat([*parts, base[..., end:]], -1)


def _closed_adapter(
    row: Routing,
    activation: str,
    residual: bool,
    x: Tensor,
    v: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
) -> Tensor:
    u = F.linear(v, down_weight, down_bias) if row.uses_image else None
    if row.is_rank_one(v.shape[1]):
        probe = row.probe(u)
        c = torch.bmm(x, (probe @ down_weight).transpose(1, 2)) + (probe * down_bias).sum(-1, keepdim=True)
        z = c * u
    else:
        z = row.route(F.linear(x, down_weight, down_bias), u, False)
    y = F.linear(find_activation(activation).forward(z), up_weight, up_bias)
    return x + y if residual else y


class WithGraphs:
    """A layer compiled with mode reduce-overhead, told where each pass begins, so that it may reuse its memory."""

    def __init__(self, layer: Layer) -> None:
        self.compiled = torch.compile(layer, dynamic=False, mode="reduce-overhead")

    def __call__(self, **tensors: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(**tensors)


class InPlaceLoRA(torch.autograd.Function):
    """y = x Wᵀ + bias + route(x Aᵀ, v Aᵀ) Bᵀ on rows x [B, T, K]; saved: x, v and the weights, so t is computed twice.

    ``fused`` makes x Wᵀ + bias + z Bᵀ, and dy W + dt A, in one kernel; None: a product, and a product added in place.
    """

    @staticmethod
    def forward(ctx, x, v, weight, bias, a, b, row: Routing, fused: FusedProducts | None) -> Tensor:
        t = F.linear(x, a)
        u = F.linear(v, a) if row.uses_image else None
        z = row.route(t, u, False)
        ctx.save_for_backward(x, v, weight, a, b, None if fused is None else t)
        ctx.row, ctx.fused = row, fused
        if fused is not None:
            return fused(x.flatten(0, 1), weight.t(), bias, z.flatten(0, 1), b.t()).view(*x.shape[:2], -1)
        y = F.linear(x, weight, bias)
        y.flatten(0, 1).addmm_(z.flatten(0, 1), b.t())
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, v, weight, a, b, t = ctx.saved_tensors
        dy = dy.contiguous()
        rows, dy_rows, row = x.flatten(0, 1), dy.flatten(0, 1), ctx.row
        t = F.linear(x, a) if t is None else t
        u = F.linear(v, a) if row.uses_image else None
        z = row.route(t, u, False)
        dt, du = row.route_backward((dy_rows @ b).view_as(t), t, u, False)
        dt = dt.flatten(0, 1)
        db = dy_rows.t() @ z.flatten(0, 1)
        da = dt.t() @ rows
        if du is not None:
            da.addmm_(du.flatten(0, 1).t(), v.flatten(0, 1))
        if ctx.fused is None:
            dx = (dy_rows @ weight).addmm_(dt, a)
        else:
            dx = ctx.fused(dy_rows, weight, None, dt, a)
        return dx.view_as(x), None, None, dy_rows.sum(0), da, db, None, None


def in_place_lora(routing: str, fused: FusedProducts | None, x, v, weight, bias, a, b) -> Tensor:
    """:class:`InPlaceLoRA` on tensors of any dtype: under autocast they are cast once, at the door."""
    tensors, kind = (x, v, weight, bias, a, b), x.device.type
    if torch.is_autocast_enabled(kind):
        tensors = [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]
    with torch.autocast(kind, enabled=False):
        return InPlaceLoRA.apply(*tensors, ROUTINGS[routing], fused)
