"""Routed low-rank adaptation: y = base + scaling route(x Aᵀ, v Aᵀ) Bᵀ (arXiv 2403.09377)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..by_index import check_index, code_of_each_token, each_token, of_each_token
from ..call_plans import Plans, call_key
from ..dispatch import select_backend
from ..image_code import ImageCode, lora_image
from ..inputs import (
    PLAIN,
    cast_for_autocast,
    check_devices,
    check_dtypes,
    check_shape,
    check_text_and_image,
    dtype_of_call,
    fold_beams,
    without_autocast,
)
from ..routing import Routing, find_routing
from ..triton_common.launch import NoTileFitsError, eager_instead, remembering
from .eager import eager_lora
from .options import PLACEMENTS, WEIGHT_LAYOUTS, LoRAOptions, Weights


def routed_lora(
    x: Tensor,
    v: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    routing: str | Routing,
    scaling: float = 1.0,
    base: Tensor | None = None,
    backend: str | None = None,
    relu: bool = False,
    groups: int = 1,
    columns: Sequence[int] | None = None,
    placement: str = "bottleneck",
    image: ImageCode | None = None,
    image_index: Tensor | None = None,
    image_weight: Tensor | None = None,
) -> Tensor:
    """Add a routed bottleneck to the output of a frozen projection.

    Differentiable once in x, v, a, b and base; runs in float64, float32, float16, bfloat16 and under autocast. ``base``
    is never modified: the result is one copy of it, into which the bottleneck is accumulated.
    :func:`routed_lora_linear` computes the frozen projection itself and needs no copy.

    Args:
        x: text hidden states [B, T, K], or [B*beams, T, K] where consecutive rows are the beams of one image.
        v: visual tokens [B, L, K]; not read (and may be None) where the routing takes no image.
        a: down-projection [G*R, K], shared by text and image unless there is ``image_weight``.
        b: up-projection [G*n, R]; rows g*n to (g+1)*n take components g*R to (g+1)*R of what was routed.
        routing: name in ``ROUTINGS``, or its row; it acts on the G*R components of all groups together.
        scaling: factor of the bottleneck's output, alpha / R in the paper.
        base: output of the frozen projection [B, T, N], N = G*n unless ``columns`` is given; None: bottleneck alone.
        backend: "eager", "triton", or None for the default of :func:`routingvl.kernels.dispatch.select_backend`.
        relu: ReLU on both factors of the inner product, for routings that have one (``supports_relu``).
        groups: G, how many projections share the joined bottleneck (GPT-2's query and value: 2).
        columns: for each group the column of base at which its n outputs are added; the rest of base is only copied.
        placement: "bottleneck" routes before the up-projection, "output" after it (all groups together).
        image, image_index, image_weight: as in :func:`routed_lora_linear`.

    Returns:
        [B, T, N] in the dtype of the inputs. Under autocast the products run in its dtype and base keeps its own: the
        result has the wider of the two.

    Raises:
        ValueError: unknown name, unfit shapes or dtypes, more visual tokens than the routing takes, v missing.
        RuntimeError: the backend asked for cannot run.
    """
    if columns is not None:
        columns = tuple(columns)
    settings = (routing, scaling, relu, groups, columns, placement, backend)
    key = call_key((x, v, a, b, base, None if image is None else image.u, image_index, image_weight), settings)
    plan = _plans.find(key)
    if plan is None:
        tensors = {"x": x, "v": v, "a": a, "b": b, "base": base, "image_weight": image_weight}
        plan = _plans.keep(key, _plan_of_added(tensors, image, image_index, settings))
    if not plan.reads:
        v = None
    if key is not None and plan.direct and plan.dtype is None:
        y = _run_directly(plan, x, v, image, (a, b, None, None, base))
        if y is not None:
            return y
    x, v, a, b, own = cast_for_autocast(x.device.type, x, v, a, b, image_weight)
    if base is not None and base.dtype != x.dtype:
        # A wider base keeps its precision, as it would in the plain sum.
        with without_autocast(x.device.type):
            zeros = torch.zeros_like(base, dtype=x.dtype)
            return base + _run(plan, x, v, image, image_index, (a, b, None, None, zeros), own)
    return _run(plan, x, v, image, image_index, (a, b, None, None, base), own)


def routed_lora_linear(
    x: Tensor,
    v: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    routing: str | Routing,
    scaling: float = 1.0,
    relu: bool = False,
    groups: int = 1,
    columns: Sequence[int] | None = None,
    placement: str = "bottleneck",
    weight_layout: str = "nk",
    dropout: float = 0.0,
    backend: str | None = None,
    image: ImageCode | None = None,
    image_index: Tensor | None = None,
    image_weight: Tensor | None = None,
) -> Tensor:
    """The frozen projection and its routed bottleneck in one differentiable step: x Wᵀ + bias + scaling route(...) Bᵀ.

    Because the projection's output is made here, the bottleneck is accumulated in place, and so is what it adds
    to dx in the backward pass. With b = 0 the result has the same bits as the projection alone.

    Args:
        x, v, a, b, routing, scaling, relu, groups, columns, placement, backend: as in :func:`routed_lora`.
        weight: frozen projection, [N, K] in layout "nk" (nn.Linear) or [K, N] in layout "kn" (transformers' Conv1D). It
            gets a gradient only if it requires one.
        bias: [N] or None.
        weight_layout: "nk" or "kn".
        dropout: probability of dropping a component of the bottleneck's inputs (text and image drawn separately, kept
            ones scaled by 1 / (1 - dropout)); 0 outside training. The frozen projection sees x whole.
        image: what :func:`routingvl.kernels.project_lora_image` made of v for these weights, so that v is not
            projected again; None without. Not together with dropout, which draws a mask for v in every call.
        image_index: int64 [B, T], which entry of v [I, 1, K] each token of the text reads; its values are not checked.
            None: rows of the text belong to the entries in order, which is faster.
        image_weight: the image's own down-projection A_v [G*R, K_v], for v [B, L, K_v] of any width; None: ``a``
            projects the image too.

    Returns:
        [B, T, N].

    Raises:
        ValueError, RuntimeError: as :func:`routed_lora`.
    """
    if columns is not None:
        columns = tuple(columns)
    settings = (routing, scaling, relu, groups, columns, placement, weight_layout, dropout, backend)
    code = None if image is None else image.u
    key = call_key((x, v, weight, bias, a, b, code, image_index, image_weight), settings)
    plan = _plans.find(key)
    if plan is None:
        tensors = {"x": x, "v": v, "a": a, "b": b, "weight": weight, "bias": bias, "image_weight": image_weight}
        plan = _plans.keep(key, _plan_of_linear(tensors, image, image_index, settings))
    if not plan.reads:
        v = None
    if key is not None and plan.direct:
        y = _run_directly(plan, x, v, image, (a, b, weight, bias, None))
        if y is not None:
            return y
    device, base = x.device.type, None
    if type(weight) not in PLAIN:  # quantised, for example: only what it returns can be relied on
        base = F.linear(x, weight if weight_layout == "nk" else weight.t(), bias)
        weight = bias = None
    x, v, weight, bias, a, b, own = cast_for_autocast(device, x, v, weight, bias, a, b, image_weight)
    return _run(plan, x, v, image, image_index, (a, b, weight, bias, base), own)


class _Plan(NamedTuple):
    """What is decided of a call.

    Attributes:
        options: of the call.
        fused: computes it by kernels; None: the eager backend does.
        before_up: whether the routing acts before the up-projection there.
        reads: whether the routing reads v.
        dtype: to which autocast casts the tensors of the call; None: it does not.
        direct: whether :func:`_run_directly` can run such calls of plain tensors: nothing is dropped, looked up by an
            index or projected by weights of the image's own.
    """

    options: LoRAOptions
    fused: Callable[..., Tensor] | None
    before_up: bool
    reads: bool
    dtype: torch.dtype | None
    direct: bool


def _kept(plan: _Plan) -> _Plan:
    """The plan for every call like this one, which may then keep its launches."""
    return plan if plan.fused is None else plan._replace(options=remembering(plan.options))


_plans = Plans(_kept)


def _plan_of_added(
    tensors: Mapping[str, Tensor | None], image: ImageCode | None, image_index: Tensor | None, settings: Sequence[Any]
) -> _Plan:
    """Check the arguments of :func:`routed_lora`."""
    routing, scaling, relu, groups, columns, placement, backend = settings
    x, b, base = (tensors[name] for name in ("x", "b", "base"))
    row = find_routing(routing)
    _check(tensors, row, relu, groups, placement, image_index)
    check_shape("base", base, (*x.shape[:2], "N" if columns else b.shape[0]))
    starts = _start_columns(columns, groups, b.shape[0] // groups, None if base is None else base.shape[2])
    options = LoRAOptions(row, relu, scaling, starts, placement)
    checked = dict(tensors) if row.uses_image else {**tensors, "v": None, "image_weight": None}
    if torch.is_autocast_enabled(x.device.type):
        del checked["base"]
    check_dtypes(**checked)
    return _plan(backend, tensors, image, image_index, options)


def _plan_of_linear(
    tensors: Mapping[str, Tensor | None], image: ImageCode | None, image_index: Tensor | None, settings: Sequence[Any]
) -> _Plan:
    """Check the arguments of :func:`routed_lora_linear`."""
    routing, scaling, relu, groups, columns, placement, weight_layout, dropout, backend = settings
    x, b, weight, bias = (tensors[name] for name in ("x", "b", "weight", "bias"))
    row = find_routing(routing)
    _check(tensors, row, relu, groups, placement, image_index)
    if weight_layout not in WEIGHT_LAYOUTS:
        raise ValueError(f"weight_layout={weight_layout!r} is not one of 'nk' (nn.Linear) and 'kn' (Conv1D)")
    check_shape("weight", weight, ("N", x.shape[2]) if weight_layout == "nk" else (x.shape[2], "N"))
    outputs = weight.shape[0 if weight_layout == "nk" else 1]
    check_shape("bias", bias, (outputs,))
    if columns is None and outputs != b.shape[0]:
        raise ValueError(
            f"b has {b.shape[0]} rows and the projection {outputs} outputs: give columns to say where they belong"
        )
    starts = _start_columns(columns, groups, b.shape[0] // groups, outputs)
    options = LoRAOptions(row, relu, scaling, starts, placement, weight_layout, dropout)
    if image is not None and dropout > 0:
        raise ValueError(f"dropout={dropout} draws a mask for v: image= holds a v that was projected without one")
    checked = dict(tensors) if row.uses_image else {**tensors, "v": None, "image_weight": None}
    if type(weight) not in PLAIN:
        del checked["weight"], checked["bias"]
    check_dtypes(**checked)
    return _plan(backend, tensors, image, image_index, options)


def _plan(
    backend: str | None,
    tensors: Mapping[str, Tensor | None],
    image: ImageCode | None,
    image_index: Tensor | None,
    options: LoRAOptions,
) -> _Plan:
    """Choose the backend for checked arguments."""
    x, v, a = (tensors[name] for name in "xva")
    routing, relu, placement = options.routing, options.relu, options.placement
    own = tensors["image_weight"] if routing.uses_image else None
    v, image_index = (v, image_index) if routing.uses_image else (None, None)
    visual_tokens = 0 if v is None else v.shape[1]
    name, _ = select_backend(
        x.device.type, backend, dtype=dtype_of_call(x), width=a.shape[0], routing=routing, visual_tokens=visual_tokens,
        relu=relu, placement=placement,
        products=relu or image_index is not None or not routing.is_rank_one(visual_tokens),
        rows=x.shape[0] * x.shape[1], grouped=options.groups > 1, dropout=options.dropout > 0,
    )  # fmt: skip
    fused = None
    if name == "triton" and options.equally_spaced:
        from .fused import fused_lora as fused  # here, because it needs triton

        check_devices(**{**tensors, "v": v, "image_weight": own}, image=None if image is None else image.u)
    dtype = dtype_of_call(x) if torch.is_autocast_enabled(x.device.type) else None
    if image is not None and image.u.dtype != x.dtype:
        dtype = dtype_of_call(x)
    direct = fused is not None and options.dropout == 0 and image_index is None and own is None
    before_up = placement == "bottleneck" or routing.moves_before_up(visual_tokens, relu)
    return _Plan(options, fused, before_up, routing.uses_image, dtype, direct)


def _run_directly(plan: _Plan, x: Tensor, v: Tensor | None, image: ImageCode | None, weights: Weights) -> Tensor | None:
    """What :func:`_run` does for a ``direct`` plan, without looking for what is not there; None: no tile fits."""
    try:
        if plan.dtype is None:
            return plan.fused(x, v, image, weights, plan.options)
        with without_autocast(x.device.type):
            return plan.fused(x, v, image, weights, plan.options, plan.dtype)
    except NoTileFitsError:
        return None


def _run(
    plan: _Plan,
    x: Tensor,
    v: Tensor | None,
    image: ImageCode | None,
    image_index: Tensor | None,
    weights: Weights,
    own: Tensor | None,
) -> Tensor:
    """Hand checked arguments, and what the image comes to, to the backend; ``own`` is image_weight."""
    a, b, *frozen, base = weights
    options, fused, before_up, *_ = plan
    dropout, shape = options.dropout, x.shape
    indexed = image_index is not None and options.routing.uses_image
    if indexed:
        x, base = each_token(x), each_token(base)
    else:
        x, base = fold_beams(x, v), fold_beams(base, v)
    weights = (a, b, *frozen, base)
    with without_autocast(x.device.type):
        # The image's mask is torch's own on any backend: v is B*L rows against M of text.
        dropped = F.dropout(x, dropout) if dropout > 0 and fused is None else x
        v = F.dropout(v, dropout) if dropout > 0 and v is not None else v
        image = None if image is None else image.to(x.dtype)
        if indexed and (options.placement == "bottleneck" or options.routing.image_factor is not None):
            image = lora_image(v, a, b, options, own, factors=False) if image is None else image
            image = code_of_each_token(image, image_index)
        elif indexed:
            v, image = of_each_token(v, image_index), None
        if own is not None and v is not None and image is None and before_up:
            image = lora_image(v, a, b, options, own, factors=fused is None or not options.relu)
        if fused is not None:
            try:
                y = fused(x, v, image, weights, options)
            except NoTileFitsError as error:
                eager_instead(error)
                fused, dropped = None, F.dropout(x, dropout) if dropout > 0 else x
        if fused is None:
            if v is not None and image is None and before_up:
                image = lora_image(v, a, b, options)
            y = eager_lora(x, dropped, v, image, weights, options, own)
    return y if y.shape[:2] == shape[:2] else y.reshape(*shape[:2], y.shape[2])


def _check(
    tensors: Mapping[str, Tensor | None],
    routing: Routing,
    relu: bool,
    groups: int,
    placement: str,
    image_index: Tensor | None,
) -> None:
    x, v, a, b = (tensors[name] for name in "xvab")
    own = tensors["image_weight"] if routing.uses_image else None
    check_shape("image_weight", own, (a.shape[0], "K_v"))
    width = None if own is None else own.shape[1]
    if placement not in PLACEMENTS:
        raise ValueError(f"placement={placement!r} is not one of {', '.join(map(repr, PLACEMENTS))}")
    if image_index is None or not routing.uses_image:
        check_text_and_image(x, v, routing, relu, width)
    else:
        check_index(image_index, x, v, routing, relu, width)
    check_shape("b", b, ("G*n", "R"))
    if groups < 1 or b.shape[0] % groups:
        raise ValueError(f"groups={groups} must be at least 1 and divide the {b.shape[0]} rows of b")
    check_shape("a", a, (groups * b.shape[1], x.shape[2]))


def _start_columns(columns: Sequence[int] | None, groups: int, width: int, outputs: int | None) -> tuple[int, ...]:
    """Start column of each group's ``width`` outputs, side by side unless told otherwise. ``outputs`` is N, None
    without base.
    """
    if columns is None:
        return tuple(group * width for group in range(groups))
    if outputs is None:
        raise ValueError("columns says where in base to add, so base must be given")
    columns = tuple(columns)
    if len(columns) != groups:
        raise ValueError(f"columns={columns} must name one start column for each of the {groups} groups")
    ordered = sorted(columns)
    ends = [*ordered[1:], outputs]
    if ordered[0] < 0 or any(start + width > end for start, end in zip(ordered, ends, strict=True)):
        raise ValueError(f"columns={columns} with {width} outputs each overlap or leave the {outputs} columns of base")
    return columns
