"""The table of routing functions: the single place that says which exist, what each one computes and what it can do.

A routing function mixes the image into a low-rank bottleneck and has no parameters of its own (arXiv 2403.09377,
section 3). With t = x Aᵀ [B, T, R] of the text and u = v Aᵀ [B, L, R] of the image it returns z [B, T, R], which the
bottleneck then projects up (docs/notation.md has all letters).

Both backends, the choice between them, configuration, command line, documentation and tests read this table. To add a
function, edit this file only:

1. Write it as a pair of torch functions, ``route(t, u, relu) -> z`` and ``route_backward(dz, t, u, relu) -> (dt, du)``.
2. Add a :class:`Routing` to ``_ROWS``: name, formula, how many visual tokens it takes, and, only where it is true,
   what makes it cheaper (``probe``, ``image_factor``, ``inner_product``). The tests hold every such claim against
   ``route``. With code None it runs eagerly on every device, and the layer report says so.
3. For the Triton kernels, give it a code of its own, a constant below the table (a kernel reads a global only as a
   ``constexpr``), and a branch in :func:`route_fwd` and in :func:`route_bwd`, for one visual token.

What the paper only ablates stands in a table beside it, ``ABLATIONS``: found by name, and offered nowhere else.

Functions of several visual tokens run in the kernels only as ``inner_product``; any other runs eagerly for L > 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import rectified
from .find_by_name import find_by_name
from .linear import inner_products
from .optional_triton import constexpr, jit, tl

Route = Callable[[Tensor, Tensor | None, bool], Tensor]
RouteBackward = Callable[[Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]]
Probe = Callable[[Tensor], Tensor]
ProbeBackward = Callable[[Tensor, Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)  # a row is equal to itself only, which makes it a quick key of a dictionary
class Routing:
    """One routing function.

    Attributes:
        name: the string that chooses it in every configuration.
        code: the number by which the kernels choose their branch; None: they have none, it runs eagerly.
        formula: z as a function of t and u, for documentation and help texts.
        max_visual_tokens: largest L it is defined for; 0 when it takes no image, None when any L will do.
        supports_relu: whether ``relu=True`` is defined.
        route: ``route(t, u, relu) -> z``, a plain differentiable expression; u is None when it takes no image.
        route_backward: ``route_backward(dz, t, u, relu) -> (dt, du)``; du is None when there is no image.
        probe: for a function that is rank one in each image with one visual token, p(u) such that z = <t, p(u)> u, else
            None. ReLU, where it is supported, acts on t and on p(u).
        probe_backward: ``probe_backward(dp, u) -> du``, None where p does not depend on u. Without it the kernels leave
            the image's gradients to autograd, which takes longer.
        image_factor: for z = t + c u (at most one visual token), c; None for any other function.
        inner_product: whether for any L z is exactly (t uᵀ) u, with ReLU (relu(t) relu(u)ᵀ) u, so that what is built
            for that form may compute it: the kernels for several visual tokens, and z = t (uᵀ u).
        takes_padding: whether visual tokens of zeros, which is how padding reads, change nothing in z.
        elementwise: whether each component of z depends on that component of t and u alone, so that the components of
            several projections need not meet in one program.
        mixes_text: whether a row of z depends on other rows of t than its own. Such a function takes whole texts only,
            and is no function for a causal model.
    """

    name: str
    code: int | None
    formula: str
    max_visual_tokens: int | None
    supports_relu: bool
    route: Route
    route_backward: RouteBackward
    probe: Probe | None = None
    probe_backward: ProbeBackward | None = None
    image_factor: float | None = None
    inner_product: bool = False
    takes_padding: bool = False
    elementwise: bool = False
    mixes_text: bool = False

    def __post_init__(self) -> None:
        if self.image_factor is not None and self.max_visual_tokens not in (0, 1):
            raise ValueError(f"routing {self.name!r}: image_factor is for functions of at most one visual token")

    def __reduce__(self):  # a copied or loaded module refers to the table's row
        return find_routing, (self.name,)

    @property
    def uses_image(self) -> bool:
        """Whether the function reads visual tokens at all."""
        return self.max_visual_tokens != 0

    def is_rank_one(self, visual_tokens: int) -> bool:
        """Whether z is rank one in each image with this many visual tokens, without ReLU z = <t, p(u)> u."""
        return self.probe is not None and visual_tokens == 1

    def moves_before_up(self, visual_tokens: int, relu: bool) -> bool:
        """Whether routing after the up-projection comes to something that needs no activations as wide as the output.

        z = t + c u may be taken on either side, because the up-projection is linear, and what is rank one stays so.
        """
        return self.image_factor is not None or (self.is_rank_one(visual_tokens) and not relu)

    def kernel_obstacle(self, visual_tokens: int | None, relu: bool, placement: str) -> str | None:
        """Why the Triton kernels cannot compute it, or None when they can.

        Args:
            visual_tokens: L; None for the most favourable one.
            relu, placement: as in :func:`routingvl.kernels.routed_lora`.
        """
        tokens = visual_tokens or min(1, 1 if self.max_visual_tokens is None else self.max_visual_tokens)
        if placement == "output" and not self.moves_before_up(tokens, relu):
            return f"the Triton kernels do not route {self.name!r} after the up-projection"
        if tokens > 1:
            if not self.inner_product:
                return f"routing {self.name!r} of several visual tokens has no Triton kernel"
        elif self.code is None and (relu or not self.is_rank_one(tokens)):
            return f"routing {self.name!r} has no branch in the Triton kernels"
        return None

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
            able = " or ".join(repr(row.name) for row in ROUTINGS.values() if row.max_visual_tokens is None)
            raise ValueError(
                f"routing {self.name!r} takes {self.max_visual_tokens} visual token per image, got L={visual_tokens}: "
                f"mean-pool first (v.mean(1, keepdim=True)), or use routing {able}"
            )


def gram_is_cheaper(text_tokens: int, visual_tokens: int, rank: int) -> bool:
    """Whether t (uᵀ u) takes fewer products than (t uᵀ) u: L R^2 + T R^2 against 2 T L R."""
    return (visual_tokens + text_tokens) * rank < 2 * text_tokens * visual_tokens


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def gram_of(u: Tensor, relu: bool) -> Tensor:
    """relu(u)ᵀ u [B, R, R] of u [B, L, R], the ReLU if asked for.

    In float32 at least: a sum over many tokens loses too much in half precision.
    """
    wide = _at_least_float32(u)
    return (F.relu(wide) if relu else wide).mT @ wide


def route_by_gram(t: Tensor, gram: Tensor, relu: bool) -> Tensor:
    """z of an ``inner_product`` function from what :func:`gram_of` made of the image."""
    return ((F.relu(t) if relu else t).to(gram.dtype) @ gram).to(t.dtype)


def _vllora(t: Tensor, u: Tensor, relu: bool) -> Tensor:
    if t.shape[1] == u.shape[1] == 1:  # each token of the text has an image of its own: no products of matrices
        return (_inner(F.relu(t), F.relu(u)) if relu else _inner(t, u)) * u
    if gram_is_cheaper(t.shape[1], u.shape[1], t.shape[2]):
        return route_by_gram(t, gram_of(u, relu), relu)
    left, right = (F.relu(t), F.relu(u)) if relu else (t, u)
    return (left @ right.mT) @ u


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> of each row [..., 1], summed in float32 at least."""
    return (_at_least_float32(x) * y).sum(-1, keepdim=True).to(x.dtype)


def _vllora_backward(dz: Tensor, t: Tensor, u: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    if t.shape[1] == u.shape[1] == 1:
        left, right, dc = F.relu(t) if relu else t, F.relu(u) if relu else u, _inner(dz, u)
        dt, dright = dc * right, dc * left
        dt, dright = (dt * (t > 0), dright * (u > 0)) if relu else (dt, dright)
        return dt, _inner(left, right) * dz + dright
    if gram_is_cheaper(t.shape[1], u.shape[1], t.shape[2]):
        dt = (_at_least_float32(dz) @ gram_of(u, relu).mT).to(t.dtype)
    else:
        dt = (dz @ u.mT) @ (F.relu(u) if relu else u)
    return dt * (t > 0) if relu else dt, inner_product_image_gradient(dz, t, u, relu)


def inner_product_image_gradient(dz: Tensor, t: Tensor, u: Tensor, relu: bool) -> Tensor:
    """du [B, L, R] of an ``inner_product`` function for any number of visual tokens."""
    left, right = (F.relu(t), F.relu(u)) if relu else (t, u)
    if gram_is_cheaper(t.shape[1], u.shape[1], t.shape[2]):
        wide_u, wide_right = _at_least_float32(u), _at_least_float32(right)
        dgram = _at_least_float32(left).mT @ _at_least_float32(dz)  # [B, R, R]
        dright, du = (wide_u @ dgram.mT).to(u.dtype), (wide_right @ dgram).to(u.dtype)
    else:
        dright, forward = (dz @ u.mT).mT @ left, (left @ right.mT).mT
        return torch.baddbmm(dright * (u > 0) if relu else dright, forward, dz)
    return du + (dright * (u > 0) if relu else dright)


_ROWS = (
    Routing("none", 0, "z = t", 0, False,
            route=lambda t, u, relu: t,
            route_backward=lambda dz, t, u, relu: (dz, None), image_factor=0.0, elementwise=True),
    Routing("add", 1, "z = t + u", 1, False,
            route=lambda t, u, relu: t + u,
            route_backward=lambda dz, t, u, relu: (dz, dz.sum(1, keepdim=True)), image_factor=1.0, elementwise=True),
    Routing("mul", 2, "z = t * u", 1, False,
            route=lambda t, u, relu: t * u,
            route_backward=lambda dz, t, u, relu: (dz * u, (dz * t).sum(1, keepdim=True)), elementwise=True),
    # t times u repeated to [R, R] is (sum of t) u: the square matrix is never needed.
    Routing("expand", 3, "z = (sum_j t_j) u", 1, False,
            route=lambda t, u, relu: t.sum(-1, keepdim=True) * u,
            route_backward=lambda dz, t, u, relu: (
                inner_products(dz, u.squeeze(1)).expand_as(t), t.sum(-1, keepdim=True).mT @ dz),
            probe=torch.ones_like, probe_backward=lambda dp, u: None),
    Routing("vllora", 4, "z = t uᵀ u", None, True, _vllora, _vllora_backward,
            probe=lambda u: u, probe_backward=lambda dp, u: dp, inner_product=True,
            takes_padding=True),
)  # fmt: skip


def _ones(t: Tensor, u: Tensor, relu: bool) -> Tensor:
    left, right = (F.relu(t), F.relu(u)) if relu else (t, u)
    return (left * right.sum(1, keepdim=True)).sum(-1, keepdim=True).expand_as(t)


def _ones_backward(dz: Tensor, t: Tensor, u: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    left, right, dc = F.relu(t) if relu else t, F.relu(u) if relu else u, dz.sum(-1, keepdim=True)
    dt, du = dc * right.sum(1, keepdim=True), (dc * left).sum(1, keepdim=True).expand_as(u)
    return (dt * (t > 0), du * (u > 0)) if relu else (dt, du)


def _text_by_text(t: Tensor, u: Tensor, relu: bool, reshaped: bool = False) -> Tensor:
    return (t * _sum_of_texts(t, reshaped)).sum(-1, keepdim=True) * u


def _sum_of_texts(t: Tensor, reshaped: bool) -> Tensor:
    """The rows of tᵀ [R, T], or of t's numbers read as [R, T] row by row, each added up; [B, 1, R]."""
    return t.reshape(t.shape[0], 1, t.shape[2], t.shape[1]).sum(-1) if reshaped else t.sum(1, keepdim=True)


def _text_by_text_backward(
    dz: Tensor, t: Tensor, u: Tensor, relu: bool, reshaped: bool = False
) -> tuple[Tensor, Tensor]:
    whole, dc = _sum_of_texts(t, reshaped), (dz * u).sum(-1, keepdim=True)
    c, dwhole = (t * whole).sum(-1, keepdim=True), (dc * t).sum(1, keepdim=True)
    if reshaped:
        dwhole = dwhole.mT.expand(-1, -1, t.shape[1]).reshape(t.shape)
    return dc * whole + dwhole, (c * dz).sum(1, keepdim=True)


_ABLATIONS = (
    Routing("vllora_ones", None, "z = t uᵀ 1", None, True, _ones, _ones_backward, takes_padding=True),
    # t tᵀ [T, T] times u repeated over the T rows: the square matrix is never needed.
    Routing(
        "text_by_text", None, "z = t (sum_i t_i)ᵀ u", 1, False, _text_by_text, _text_by_text_backward, mixes_text=True
    ),
    # With what the published code has in place of the transpose.
    Routing(
        "text_by_text_reshaped",
        None,
        "z = t S u, S [R, T] the numbers of t [T, R] row by row",
        1,
        False,
        partial(_text_by_text, reshaped=True),
        partial(_text_by_text_backward, reshaped=True),
        mixes_text=True,
    ),
)


def _by_name(rows: Sequence[Routing]) -> Mapping[str, Routing]:
    for what in ("name", "code"):
        taken = [value for row in rows if (value := getattr(row, what)) is not None]
        if len(taken) != len(set(taken)):
            raise ValueError(f"two routing functions have one {what}: {taken}")
    return MappingProxyType({row.name: row for row in rows})


ROUTINGS = _by_name(_ROWS)
ABLATIONS = _by_name(_ABLATIONS)


def find_routing(name: str | Routing) -> Routing:
    """The row called ``name``, one of ``ABLATIONS`` too; ``ValueError`` names the known ones and the nearest when there
    is none.

    A row is returned as it is.
    """
    if isinstance(name, Routing):
        return name
    return ABLATIONS[name] if name in ABLATIONS else find_by_name(ROUTINGS, name, "routing")


def routing_table() -> str:
    """The table as Markdown, for the documentation (a test compares the two)."""
    lines = ["| name | formula | visual tokens | relu |", "|---|---|---|---|"]
    for row in ROUTINGS.values():
        tokens = {None: "any", 0: "-"}.get(row.max_visual_tokens, str(row.max_visual_tokens))
        lines.append(f"| {row.name} | `{row.formula}` | {tokens} | {'yes' if row.supports_relu else 'no'} |")
    return "\n".join(lines)


# The same functions inside a Triton kernel, for one visual token or none. t, u and dz are float32 tiles [rows, padded
# R]; u holds for each row of text that of its image, and means nothing where the function takes none. Components beyond
# R are 0 in t, u and dz.
NONE, ADD, MUL = (constexpr(ROUTINGS[name].code) for name in ("none", "add", "mul"))
EXPAND, VLLORA = (constexpr(ROUTINGS[name].code) for name in ("expand", "vllora"))


@jit
def sum_of_products(a, b, axis: tl.constexpr):
    """sum of a b along an axis, the same bits in every thread that holds it.

    As a plain product it would become one rounding with the first addition between threads, a b + c there and c + a b
    here; and where the layout changes next, such threads write one place of shared memory.
    """
    return tl.sum(tl.fma(a, b, 0.0), axis)


@jit
def route_fwd(t, u, ROUTING: tl.constexpr, RELU: tl.constexpr):
    """z [rows, padded R]."""
    if ROUTING == NONE:
        z = t
    elif ROUTING == ADD:
        z = t + u
    elif ROUTING == MUL:
        z = t * u
    elif ROUTING == EXPAND:
        z = tl.sum(t, 1)[:, None] * u
    elif ROUTING == VLLORA:
        if RELU:
            z = sum_of_products(rectified(t), rectified(u), 1)[:, None] * u
        else:
            z = sum_of_products(t, u, 1)[:, None] * u
    else:
        z = t
        tl.static_assert(False, "route_fwd has no branch for this code of a routing function")
    return z


@jit
def route_bwd(dz, t, u, ROUTING: tl.constexpr, RELU: tl.constexpr):
    """dt, and what each row of text adds to the gradient of its image's u, both [rows, padded R]; the second
    means nothing where the function takes no image. Components beyond R are not read.
    """
    if ROUTING == NONE or ROUTING == ADD:  # noqa: SIM109 (a kernel knows no "in")
        dt = dz
        du = dz
    elif ROUTING == MUL:
        dt = dz * u
        du = dz * t
    elif ROUTING == EXPAND:
        dt = tl.broadcast_to(sum_of_products(dz, u, 1)[:, None], dz.shape)
        du = tl.sum(t, 1)[:, None] * dz
    elif ROUTING == VLLORA:
        dc = sum_of_products(dz, u, 1)[:, None]
        if RELU:
            left = rectified(t)
            right = rectified(u)
            c = sum_of_products(left, right, 1)[:, None]
            dt = tl.where(t > 0, dc * right, 0.0)
            du = c * dz + tl.where(u > 0, dc * left, 0.0)
        else:
            dt = dc * u
            du = sum_of_products(t, u, 1)[:, None] * dz + dc * t
    else:
        dt = dz
        du = dz
        tl.static_assert(False, "route_bwd has no branch for this code of a routing function")
    return dt, du
