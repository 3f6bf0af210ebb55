"""Routed Adapter: y = [x +] act(route(x D' + d, v D' + d)) U' + c (arXiv 2403.09377)."""

from __future__ import annotations

from torch import Tensor

from .activations import find_activation
from .arguments import cast_for_autocast, check_dtypes, check_shape, check_text_and_image, fold_beams, without_autocast
from .eager_adapter import eager_adapter
from .image import ImageCode, project_adapter_images
from .launch import NoTileFitsError, eager_instead, select_backend
from .routing import find_routing


def routed_adapter(
    x: Tensor,
    v: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    routing: str,
    activation: str = "gelu",
    residual: bool = True,
    relu: bool = False,
    backend: str | None = None,
    image: ImageCode | None = None,
) -> Tensor:
    """A bottleneck whose code the image is routed into, with or without a residual around it.

    Differentiable once in every tensor; runs in float64, float32, float16, bfloat16 and under autocast.

    Args:
        x: text hidden states [B, T, K], or [B*beams, T, K] where consecutive rows are the beams of one image.
        v: visual tokens [B, L, K]; not read (and may be None) for routing "none".
        down_weight: D [R, K], shared by text and image.
        down_bias: d [R], added to text and image alike, or None.
        up_weight: U [K, R].
        up_bias: c [K] or None.
        routing: name in ``ROUTINGS``.
        activation: name in ``ACTIVATIONS``, applied after routing.
        residual: add x to the result.
        relu: ReLU on both factors of vllora's inner product.
        backend: "eager", "triton", or None for the default of :func:`routingvl.kernels.launch.select_backend`.

        image: what :func:`routingvl.kernels.project_adapter_images` made of v for these weights, so that v is not
            projected again; None without.

    Returns:
        [B, T, K] in the dtype of the inputs. Under autocast the products run in its dtype and the residual keeps x's:
        the result has the wider of the two.

    Raises:
        ValueError: unknown name, unfit shapes or dtypes, more visual tokens than the routing takes, v missing.
        RuntimeError: the backend asked for cannot run.
    """
    row = find_routing(routing)
    find_activation(activation)
    check_text_and_image(x, v, row, relu, beams=True)
    check_shape("down_weight", down_weight, ("R", x.shape[2]))
    check_shape("up_weight", up_weight, (x.shape[2], down_weight.shape[0]))
    if down_bias is not None:
        check_shape("down_bias", down_bias, (down_weight.shape[0],))
    if up_bias is not None:
        check_shape("up_bias", up_bias, (x.shape[2],))
    device = x.device.type
    tensors = cast_for_autocast(device, x, v if row.uses_image else None, down_weight, down_bias, up_weight, up_bias)
    names = ("x", "v", "down_weight", "down_bias", "up_weight", "up_bias")
    check_dtypes(**dict(zip(names, tensors, strict=True)))
    name, _ = select_backend(device, backend, dtype=tensors[0].dtype, width=down_weight.shape[0], dense=True)
    if name == "triton":
        from .fused_adapter import fused_adapter as run
    else:
        run = eager_adapter
    narrow, v, *weights = tensors
    options = {"row": row, "activation": activation, "relu": relu}
    with without_autocast(device):
        if v is not None:
            bias = None if weights[1] is None else [weights[1]]
            made = image or project_adapter_images(v, [weights[0]], bias, routing=routing, relu=relu)[0]
            image = made.to(narrow.dtype)
        # A float32 residual stream keeps its precision under autocast, as it would in the plain sum.
        inside = residual and narrow.dtype == x.dtype
        arguments = (fold_beams(narrow, v), image, *weights)
        try:
            y = run(*arguments, residual=inside, **options)
        except NoTileFitsError as error:
            eager_instead(error)
            y = eager_adapter(*arguments, residual=inside, **options)
        y = y if y.shape == x.shape else y.reshape(x.shape)
        return y if inside or not residual else x + y
