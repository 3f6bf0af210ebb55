"""Matrix products in the form in which torch is fastest, and the frozen projection beside a LoRA bottleneck.

Which library multiplies float32 on a CPU is decided in :mod:`.cpu_library`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .cpu_library import measured, onednn_is_faster, onednn_linear, onednn_product
from .float32_precision import exact_on_cpu
from .tracing import transformed


def inner_products(x: Tensor, p: Tensor) -> Tensor:
    """<x_b, p_b> for every row of every image: x [B, T, K] and p [B, K] give [B, T, 1]."""
    # In this order CPU libraries run six times faster than for x pᵀ.
    return torch.bmm(p.unsqueeze(1), x.mT).mT


def product(left: Tensor, right: Tensor) -> Tensor:
    """left right: [M, K] and [K, N], in any layout, give [M, N]."""
    if _through_onednn(left, right):
        return onednn_product(left, right)
    return torch.mm(left, right)


def plus_product(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """y + left right in new memory: y [M, N] contiguous, left [M, K], right [K, N] in any layout."""
    if _through_onednn(y, left, right):
        return onednn_linear(left, right.t(), None, plus=y)
    return torch.addmm(y, left, right)


def add_product_(y: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, beta: int = 1) -> Tensor:
    """y = beta y + alpha left right in place, with beta 0 or 1: y [M, N], left [M, K], right [K, N], in any layout."""
    if not _through_onednn(y, left, right):
        return y.addmm_(left, right, beta=beta, alpha=alpha)
    found = onednn_product(left, right)
    return y.add_(found, alpha=alpha) if beta else torch.mul(found, alpha, out=y)


def column_sums(rows: Tensor) -> Tensor:
    """Sum of the rows of a matrix [M, N]: [N].

    For half types on a GPU a product with ones: on an H100 it takes half as long as torch's sum.
    """
    if rows.device.type == "cuda" and rows.dtype.itemsize == 2 and rows.shape[0]:
        return torch.mv(rows.t(), rows.new_ones(rows.shape[0]))
    return rows.sum(0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x [B, T, K], weight [N, K], bias [N] or None -> [B, T, N]."""
    return _onednn_rows(x, weight, bias) if _through_onednn(x, weight) else F.linear(x, weight, bias)


def fresh_linear(x: Tensor, weight: Tensor, bias: Tensor | None, exact: bool = False, *, plain: bool = False) -> Tensor:
    """F.linear in memory that is no view: x [B, T, K], weight [N, K], bias [N] or None -> [B, T, N].

    F.linear returns a view of a matrix, and what an autograd function returns must be none, or modifying it in place
    later is an error. With ``exact`` the values are those of F.linear to the bit. ``plain``: it is known that nothing
    traces or transforms the call.
    """
    if not exact and _through_onednn(x, weight):
        return _onednn_rows(x, weight, bias)
    if x.is_contiguous() and (plain or not transformed()):
        batch, tokens, width = x.shape
        return F.linear(x.view(-1, width), weight, bias).resize_(batch, tokens, weight.shape[0])
    if not x.is_contiguous():
        return F.linear(x, weight, bias).clone(memory_format=torch.contiguous_format)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows, out = x.flatten(0, 1), y.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)
    return y


def frozen_projection(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    layout: str,
    width: int,
    *,
    plain: bool = False,
) -> Tensor:
    """What a LoRA bottleneck is added to, [B, T, N] and contiguous: x Wᵀ + bias, or a copy of ``base``.

    With neither (:func:`accumulates` is False) it is memory of N = ``width`` columns that is not initialised. It is
    nobody else's, so the bottleneck may be accumulated into it. ``layout`` of W: "nk" or "kn"; ``plain`` as in
    :func:`fresh_linear`.
    """
    if weight is None:
        empty = x.new_empty(*x.shape[:-1], width)
        return empty if base is None else base.clone(memory_format=torch.contiguous_format)
    # Exact: while b is 0, a layer's output is that of the layer without bottleneck to the bit.
    return fresh_linear(x, weight if layout == "nk" else weight.t(), bias, exact=True, plain=plain)


def accumulates(weight: Tensor | None, base: Tensor | None) -> bool:
    """Whether the bottleneck is added to anything at all."""
    return weight is not None or base is not None


def frozen_projection_gradients(
    rows: Tensor, x: Tensor, weight: Tensor | None, layout: str, needs: Sequence[bool]
) -> list[Tensor | None]:
    """dx [M, K] (of the projection alone), dweight and dbias of :func:`frozen_projection` from rows of dy [M, N].

    ``needs`` says which.
    """
    dx = dweight = dbias = None
    if weight is not None:
        if needs[0]:
            dx = product(rows, weight if layout == "nk" else weight.t())
        if needs[1]:
            left, right = (rows, x.flatten(0, 1)) if layout == "nk" else (x.flatten(0, 1), rows)
            dweight = product(left.t(), right)
        if needs[2]:
            dbias = column_sums(rows)
    return [dx, dweight, dbias]


def _through_onednn(*operands: Tensor) -> bool:
    """Whether products of these are float32 products that run faster through oneDNN than as torch computes them."""
    if not operands[0].is_cpu or torch.compiler.is_compiling() or measured() is False:
        return False
    # At other precisions torch itself gives float32 products to oneDNN.
    wanted = torch.backends.mkldnn.enabled and exact_on_cpu()
    return wanted and all(map(_is_plain, operands)) and onednn_is_faster()


def _is_plain(x: Tensor) -> bool:
    """Whether oneDNN takes it; subclasses of tensors (fake, distributed) may not know the operation."""
    return type(x) in (Tensor, Parameter) and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0


def _onednn_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`linear`, in memory that is no view."""
    y = onednn_linear(x.flatten(0, 1), weight, bias)
    return y.resize_(*x.shape[:-1], weight.shape[0])  # in place, so it is none
