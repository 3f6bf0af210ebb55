"""The published layers' chain of operations, written from its description, as the baseline that is beaten or not.

What makes it slow is kept on purpose: text and image projected one after the other, expand and vllora through batched
products (expand through a matrix of [R, R] for each image), the scale as a pass of its own, the result added in place
to the projection's output, and for GPT-2's joined projection a grouped convolution followed by a scatter into zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from routingvl.kernels import ROUTINGS


def published_route(t: Tensor, u: Tensor | None, routing: str) -> Tensor:
    """Routing as the published code computes it: t [B, T, R], u [B, L, R] -> z [B, T, R].

    A function that the published code does not have is computed as its row of the table defines it.
    """
    if routing == "none":
        return t
    if routing == "add":
        return t + u
    if routing == "mul":
        return t * u
    if routing == "expand":
        return torch.bmm(t, u.expand(-1, t.shape[-1], -1))
    if routing == "vllora":
        return torch.bmm(torch.bmm(t, u.transpose(1, 2)), u)
    return ROUTINGS[routing].route(t, u, False)


def published_lora(
    x: Tensor, v: Tensor, a: Tensor, b: Tensor, *, routing: str, scaling: float, dropout: float = 0.0
) -> Tensor:
    """The bottleneck alone: x [B, T, K], v [B, L, K], a [R, K], b [N, R] -> [B, T, N].

    ``dropout`` is drawn for text and image separately, as in training.
    """
    t = _drop(x, dropout) @ a.transpose(0, 1)
    u = _drop(v, dropout) @ a.transpose(0, 1) if ROUTINGS[routing].uses_image else None
    return (published_route(t, u, routing) @ b.transpose(0, 1)) * scaling


def published_lora_linear(
    x: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    routing: str,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """nn.Linear with a routed LoRA: x [B, T, K], weight [N, K], a [R, K], b [N, R] -> [B, T, N]."""
    result = F.linear(x, weight, bias)
    result += published_lora(x, v, a, b, routing=routing, scaling=scaling, dropout=dropout)
    return result


def published_merged_linear(
    x: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    routing: str,
    scaling: float,
    groups: int,
    columns: Sequence[int],
    dropout: float = 0.0,
    mask: bool = True,
) -> Tensor:
    """Conv1D with a joined, grouped LoRA: weight [K, N], a [G*R, K], b [G*n, R] -> [B, T, N].

    The published scatter goes through a boolean mask, at which torch.compile breaks its graph; with ``mask`` off it
    goes through the numbers of the columns, which compile whole.
    """
    result = F.linear(x, weight.transpose(0, 1), bias)
    t = F.linear(_drop(x, dropout), a)
    u = F.linear(_drop(v, dropout), a) if ROUTINGS[routing].uses_image else None
    z = published_route(t, u, routing)
    up = F.conv1d(z.transpose(-2, -1), b.unsqueeze(-1), groups=groups).transpose(-2, -1)
    width = b.shape[0] // groups
    enabled = torch.zeros(result.shape[-1], dtype=torch.bool)
    for column in columns:
        enabled[column : column + width] = True
    padded = up.new_zeros(x.shape[0] * x.shape[1], result.shape[-1])
    if mask:
        padded[:, enabled] = up.reshape(-1, up.shape[-1])
    else:
        numbers = torch.cat([torch.arange(column, column + width, device=x.device) for column in columns])
        padded = padded.index_copy(1, numbers, up.reshape(-1, up.shape[-1]))
    result += padded.view(*x.shape[:-1], -1) * scaling
    return result


def published_adapter(
    x: Tensor,
    v: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    *,
    routing: str,
    activation: str,
    residual: bool,
) -> Tensor:
    """Adapter: x [B, T, K], down_weight [R, K], up_weight [K, R] -> [B, T, K]."""
    t = F.linear(x, down_weight, down_bias)
    u = F.linear(v, down_weight, down_bias) if ROUTINGS[routing].uses_image else None
    z = published_route(t, u, routing)
    y = F.linear(_activate(z, activation), up_weight, up_bias)
    return y + x if residual else y


def _drop(x: Tensor, dropout: float) -> Tensor:
    return F.dropout(x, dropout) if dropout > 0 else x  # with 0 the published layers have no dropout module


def _activate(z: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(z)
    # transformers' gelu_new, one elementwise operation at a time.
    return 0.5 * z * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * torch.pow(z, 3.0))))
