"""Routed Adapter: y = [x +] act(route(x Aᵀ + b_down, v Aᵀ + b_down)) Bᵀ + b_up (arXiv 2403.09377)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..activations import find_activation
from ..by_index import check_index, code_of_each_token, each_token
from ..call_plans import Plans, call_key
from ..dispatch import select_backend
from ..image_code import ImageCode, adapter_image
from ..inputs import (
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
from .eager import eager_adapter
from .options import AdapterOptions


def routed_adapter(
    x: Tensor,
    v: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    routing: str | Routing,
    activation: str = "gelu",
    residual: bool = True,
    relu: bool = False,
    backend: str | None = None,
    image: ImageCode | None = None,
    image_index: Tensor | None = None,
    image_weight: Tensor | None = None,
    image_bias: Tensor | None = None,
) -> Tensor:
    """A bottleneck that the image is routed into, with or without a residual around it.

    Differentiable once in every tensor; runs in float64, float32, float16, bfloat16 and under autocast.

    Args:
        x: text hidden states [B, T, K], or [B*beams, T, K] where consecutive rows are the beams of one image.
        v: visual tokens [B, L, K]; not read (and may be None) where the routing takes no image.
        down_weight: A [R, K], shared by text and image unless there is ``image_weight``.
        down_bias: b_down [R], added to text and image alike, or None.
        up_weight: B [K, R].
        up_bias: b_up [K] or None.
        routing: name in ``ROUTINGS``, or its row.
        activation: name in ``ACTIVATIONS``, applied after routing.
        residual: add x to the result.
        relu: ReLU on both factors of the inner product, for routings that have one (``supports_relu``).
        backend: "eager", "triton", or None for the default of :func:`routingvl.kernels.dispatch.select_backend`.
        image: what :func:`routingvl.kernels.project_adapter_image` made of v for these weights, so that v is not
            projected again; None without.
        image_index: int64 [B, T], which entry of v [I, 1, K] each token of the text reads; its values are not checked.
            None: rows of the text belong to the entries in order, which is faster.
        image_weight, image_bias: the image's own down-projection A_v [R, K_v] and its bias [R] or None, for v
            [B, L, K_v] of any width; None: ``down_weight`` and ``down_bias`` project the image too.

    Returns:
        [B, T, K] in the dtype of the inputs. Under autocast the products run in its dtype and the residual keeps x's:
        the result has the wider of the two.

    Raises:
        ValueError: unknown name, unfit shapes or dtypes, more visual tokens than the routing takes, v missing.
        RuntimeError: the backend asked for cannot run.
    """
    settings = (routing, activation, residual, relu, backend)
    tensors = (x, v, down_weight, down_bias, up_weight, up_bias)
    own = (image_weight, image_bias)
    key = call_key((*tensors, None if image is None else image.u, image_index, *own), settings)
    plan = _plans.find(key)
    if plan is None:
        plan = _plans.keep(key, _plan(tensors, own, image, image_index, *settings))
    options, run = plan
    if not options.routing.uses_image:
        v = image_index = None
    device = x.device.type
    narrow, v, *weights = cast_for_autocast(device, x, v, *tensors[2:])
    with without_autocast(device):
        if v is not None:
            if image is None:
                own = cast_for_autocast(device, *own)
                image = adapter_image(v, *weights[:2], options.routing, relu, own=own)
            image = image.to(narrow.dtype)
        if image_index is not None:
            text, image = each_token(narrow), code_of_each_token(image, image_index)
        else:
            text = fold_beams(narrow, v)
        arguments = (text, image, weights, options)
        try:
            y = run(*arguments)
        except NoTileFitsError as error:
            eager_instead(error)
            y = eager_adapter(*arguments)
        y = y if y.shape == x.shape else y.reshape(x.shape)
        return y if options.residual or not residual else x + y


class _Plan(NamedTuple):
    """What is decided of a call: its options, and the function that computes it."""

    options: AdapterOptions
    run: Callable[..., Tensor]


def _kept(plan: _Plan) -> _Plan:
    """The plan for every call like this one, which may then keep its launches."""
    return plan if plan.run is eager_adapter else plan._replace(options=remembering(plan.options))


_plans = Plans(_kept)


def _plan(
    tensors: Sequence[Tensor | None],
    own: Sequence[Tensor | None],
    image: ImageCode | None,
    image_index: Tensor | None,
    routing: str | Routing,
    activation: str,
    residual: bool,
    relu: bool,
    backend: str | None,
) -> _Plan:
    """Check the arguments of :func:`routed_adapter` and choose the backend; ``own`` are image_weight and image_bias."""
    row, act = find_routing(routing), find_activation(activation)
    x, v, down_weight, down_bias, up_weight, up_bias = tensors
    own = own if row.uses_image else (None, None)
    check_shape("image_weight", own[0], (down_weight.shape[0], "K_v"))
    check_shape("image_bias", own[1], (down_weight.shape[0],))
    width = None if own[0] is None else own[0].shape[1]
    if image_index is None or not row.uses_image:
        check_text_and_image(x, v, row, relu, width)
    else:
        check_index(image_index, x, v, row, relu, width)
    check_shape("down_weight", down_weight, ("R", x.shape[2]))
    check_shape("up_weight", up_weight, (x.shape[2], down_weight.shape[0]))
    check_shape("down_bias", down_bias, (down_weight.shape[0],))
    check_shape("up_bias", up_bias, (x.shape[2],))
    v = v if row.uses_image else None
    names = ("x", "v", "down_weight", "down_bias", "up_weight", "up_bias", "image_weight", "image_bias")
    named = dict(zip(names, (x, v, *tensors[2:], *own), strict=True))
    check_dtypes(**named)
    dtype = dtype_of_call(x)
    name, _ = select_backend(
        x.device.type, backend, dtype=dtype, width=down_weight.shape[0], routing=row,
        visual_tokens=0 if v is None else v.shape[1], relu=relu, products=True,
    )  # fmt: skip
    run = eager_adapter
    if name == "triton":
        from .fused import fused_adapter as run

        check_devices(**named, image=None if image is None else image.u)
    # A float32 residual stream keeps its precision under autocast, as it would in the plain sum.
    return _Plan(AdapterOptions(row, relu, act, residual and dtype == x.dtype), run)
