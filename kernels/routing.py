"""The table of routing functions: the single place that says which exist and what each one computes.

A routing function mixes the image into the code of a low-rank bottleneck and has no parameters of its own
(arXiv 2403.09377, section 3). With t = x a' [B, T, R] the code of the text and u = v a' [B, L, R] the code of the image
it returns z [B, T, R]. The bottleneck then expands z.

Config validation, command line choices, both backends, the documentation and the tests read this table. A further
function is one more pair ``route`` and ``route_backward``, one more row, and a branch in the kernels' :func:`route_fwd`
and :func:`route_bwd` beside the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import inner_products
from .lookup import find_row
from .optional_triton import constexpr, jit, tl

Route = Callable[[Tensor, Tensor | None, bool], Tensor]
RouteBackward = Callable[[Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]]
Probe = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Routing:
    """One routing function.

    Attributes:
        name: the string that chooses it in every configuration.
        code: small integer that chooses it inside a kernel.
        formula: z as a function of the text code t and the image code v, for documentation and help texts.
        max_visual_tokens: largest L it is defined for; 0 when it takes no image, None when any L will do.
        supports_relu: whether ReLU on both factors of the inner product is defined.
        route: ``route(t, u, relu) -> z``, a plain differentiable expression.
        route_backward: ``route_backward(dz, t, u, relu) -> (dt, du)``; du is None when there is no image.
        probe: for a function that is rank one in each image with one visual token, p(u) such that z = <t, p(u)> u, else
            None. ReLU, where it is supported, acts on t and on p(u).
        additive: z is t plus what depends on the image alone (u, where the image is used), so that the text's path
            through the bottleneck is linear.
    """

    name: str
    code: int
    formula: str
    max_visual_tokens: int | None
    supports_relu: bool
    route: Route
    route_backward: RouteBackward
    probe: Probe | None = None
    additive: bool = False

    def __reduce__(self):  # a copied or loaded module refers to the table's row
        return find_routing, (self.name,)

    @property
    def uses_image(self) -> bool:
        """Whether the function reads visual tokens at all."""
        return self.max_visual_tokens != 0

    def check(self, visual_tokens: int | None, relu: bool) -> None:
        """Raise ``ValueError`` unless this many visual tokens (None: no image) and this ``relu`` are defined."""
        if relu and not self.supports_relu:
            able = ", ".join(row.name for row in ROUTINGS.values() if row.supports_relu)
            raise ValueError(f"relu=True is defined for routing {able}, not for {self.name!r}")
        if not self.uses_image:
            return
        if visual_tokens is None:
            raise ValueError(f"routing {self.name!r} needs the visual tokens v [B, L, K], got v=None")
        if visual_tokens < 1:
            raise ValueError(f"routing {self.name!r} needs at least one visual token, got L=0")
        if self.max_visual_tokens is not None and visual_tokens > self.max_visual_tokens:
            raise ValueError(
                f"routing {self.name!r} takes {self.max_visual_tokens} visual token per image, got L={visual_tokens}: "
                f"mean-pool first (v.mean(1, keepdim=True)), or use routing 'vllora'"
            )


def _none(t: Tensor, u: Tensor | None, relu: bool) -> Tensor:
    return t


def _none_backward(dz: Tensor, t: Tensor, u: Tensor | None, relu: bool) -> tuple[Tensor, Tensor | None]:
    return dz, None


def _add(t: Tensor, u: Tensor, relu: bool) -> Tensor:
    return t + u


def _add_backward(dz: Tensor, t: Tensor, u: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    return dz, dz.sum(1, keepdim=True)


def _mul(t: Tensor, u: Tensor, relu: bool) -> Tensor:
    return t * u


def _mul_backward(dz: Tensor, t: Tensor, u: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    return dz * u, (dz * t).sum(1, keepdim=True)


def _expand(t: Tensor, u: Tensor, relu: bool) -> Tensor:
    # t times u repeated to [R, R] is (sum of t) u: the square matrix is never needed.
    return t.sum(-1, keepdim=True) * u


def _expand_backward(dz: Tensor, t: Tensor, u: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    dt = inner_products(dz, u.squeeze(1)).expand_as(t)
    return dt, t.sum(-1, keepdim=True).mT @ dz


def gram_is_cheaper(text_tokens: int, visual_tokens: int, rank: int) -> bool:
    """Whether t (u' u) takes fewer products than (t u') u: L R^2 + T R^2 against 2 T L R."""
    return (visual_tokens + text_tokens) * rank < 2 * text_tokens * visual_tokens


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _vllora(t: Tensor, u: Tensor, relu: bool) -> Tensor:
    left, right = (F.relu(t), F.relu(u)) if relu else (t, u)
    if gram_is_cheaper(t.shape[1], u.shape[1], t.shape[2]):
        # Sums of squares over many tokens: half precision would lose them.
        gram = _at_least_float32(right).mT @ _at_least_float32(u)  # [B, R, R]
        return (_at_least_float32(left) @ gram).to(t.dtype)
    return (left @ right.mT) @ u


def _vllora_backward(dz: Tensor, t: Tensor, u: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    right = F.relu(u) if relu else u
    if gram_is_cheaper(t.shape[1], u.shape[1], t.shape[2]):
        wide_u, wide_right, wide_dz = (_at_least_float32(x) for x in (u, right, dz))
        dt = (wide_dz @ (wide_u.mT @ wide_right)).to(t.dtype)
    else:
        dt = (dz @ u.mT) @ right
    return dt * (t > 0) if relu else dt, vllora_image_gradient(dz, t, u, relu)


def vllora_image_gradient(dz: Tensor, t: Tensor, u: Tensor, relu: bool) -> Tensor:
    """du [B, L, R] of vllora for any number of visual tokens."""
    left, right = (F.relu(t), F.relu(u)) if relu else (t, u)
    if gram_is_cheaper(t.shape[1], u.shape[1], t.shape[2]):
        wide_u, wide_right = _at_least_float32(u), _at_least_float32(right)
        dgram = _at_least_float32(left).mT @ _at_least_float32(dz)  # [B, R, R]
        dright, du = (wide_u @ dgram.mT).to(u.dtype), (wide_right @ dgram).to(u.dtype)
    else:
        dright, du = (dz @ u.mT).mT @ left, (left @ right.mT).mT @ dz
    return du + (dright * (u > 0) if relu else dright)


def route_image(row: Routing, t: Tensor, u: Tensor | None, relu: bool, gram: Tensor | None) -> Tensor:
    """``row.route(t, u, relu)``; by ``gram`` = relu(u)' u [B, C, C] (the ReLU where ``relu``) where that is given."""
    if gram is None:
        return row.route(t, u, relu)
    return ((F.relu(t) if relu else t).to(gram.dtype) @ gram).to(t.dtype)


def _identity(u: Tensor) -> Tensor:
    return u


_ROWS = (
    Routing("none", 0, "z = t", 0, False, _none, _none_backward, additive=True),
    Routing("add", 1, "z = t + v", 1, False, _add, _add_backward, additive=True),
    Routing("mul", 2, "z = t * v", 1, False, _mul, _mul_backward),
    Routing("expand", 3, "z = (sum_j t_j) v", 1, False, _expand, _expand_backward, torch.ones_like),
    Routing("vllora", 4, "z = t v' v", None, True, _vllora, _vllora_backward, _identity),
)
ROUTINGS: Mapping[str, Routing] = MappingProxyType({row.name: row for row in _ROWS})


def find_routing(name: str | Routing) -> Routing:
    """The row called ``name``; ``ValueError`` names the known ones and the nearest when there is none.

    A row is returned as it is.
    """
    return name if isinstance(name, Routing) else find_row(ROUTINGS, name, "routing")


def routing_table() -> str:
    """The table as Markdown, for the documentation (a test compares the two)."""
    lines = ["| name | formula | visual tokens | relu |", "|---|---|---|---|"]
    for row in ROUTINGS.values():
        tokens = {None: "any", 0: "-"}.get(row.max_visual_tokens, str(row.max_visual_tokens))
        lines.append(f"| {row.name} | `{row.formula}` | {tokens} | {'yes' if row.supports_relu else 'no'} |")
    return "\n".join(lines)


# The same functions inside a Triton kernel, for one visual token. t, u and dz are float32 tiles [rows, code]; u holds
# for each row the code of its image. Components beyond the code's width are 0 in t, u and dz. The codes of the table,
# in the form in which a kernel can read a global:
ADD, MUL = constexpr(ROUTINGS["add"].code), constexpr(ROUTINGS["mul"].code)
EXPAND, VLLORA = constexpr(ROUTINGS["expand"].code), constexpr(ROUTINGS["vllora"].code)


@jit
def route_fwd(t, u, ROUTING: tl.constexpr, RELU: tl.constexpr):
    """z [rows, code]."""
    if ROUTING == ADD:
        z = t + u
    elif ROUTING == MUL:
        z = t * u
    elif ROUTING == EXPAND:
        z = tl.sum(t, 1)[:, None] * u
    elif ROUTING == VLLORA:
        if RELU:
            z = tl.sum(tl.maximum(t, 0.0) * tl.maximum(u, 0.0), 1)[:, None] * u
        else:
            z = tl.sum(t * u, 1)[:, None] * u
    else:
        z = t
    return z


@jit
def route_bwd(dz, t, u, ROUTING: tl.constexpr, RELU: tl.constexpr):
    """dt, and each row's share of the gradient of its image's code, both [rows, code]; without an image the second is
    meaningless. Components of dt beyond the code's width are undefined.
    """
    dt = dz
    du = dz
    if ROUTING == MUL:
        dt = dz * u
        du = dz * t
    elif ROUTING == EXPAND:
        dt = tl.broadcast_to(tl.sum(dz * u, 1)[:, None], dz.shape)
        du = tl.sum(t, 1)[:, None] * dz
    elif ROUTING == VLLORA:
        dc = tl.sum(dz * u, 1)[:, None]
        if RELU:
            left = tl.maximum(t, 0.0)
            right = tl.maximum(u, 0.0)
            c = tl.sum(left * right, 1)[:, None]
            dt = tl.where(t > 0, dc * right, 0.0)
            du = c * dz + tl.where(u > 0, dc * left, 0.0)
        else:
            dt = dc * u
            du = tl.sum(t * u, 1)[:, None] * dz + dc * t
    return dt, du
