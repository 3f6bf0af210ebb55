"""How the image reaches a kernel, and routing by several visual tokens there.

R stands for the width of the low-rank activation, G*R where G groups share it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from torch import Tensor

from ..optional_triton import constexpr, jit, tl
from ..routing import gram_is_cheaper, gram_of
from .products import dot


class Visual(IntEnum):
    """What a kernel takes for the image (its constant VISUAL).

    TOKENS and GRAM are for ``inner_product`` functions, and a program's rows are of one image then.
    """

    NO_IMAGE = 0
    ONE_TOKEN = 1  # u [B, R]
    TOKENS = 2  # u [B, L, R], for z = (t uᵀ) u
    GRAM = 3  # uᵀ u [B, R, R] in float32, for z = t (uᵀ u)


# In the form in which a kernel can read a global.
NO_IMAGE, ONE_TOKEN, GRAM = (constexpr(int(way)) for way in (Visual.NO_IMAGE, Visual.ONE_TOKEN, Visual.GRAM))
# A wider uᵀ u would need more than half of the shared memory of some GPUs.
MAX_GRAM_WIDTH = 64
BLOCK_L = 32  # visual tokens taken in one step


def image_operand(u: Tensor | None, tokens: int, relu: bool, gram: Tensor | None = None) -> tuple[int, Tensor | None]:
    """How u [B, L, R] goes into the kernels, and what they take for it.

    uᵀ u saves work when an image has many rows of text (``tokens``), or where ``gram`` has it already.
    """
    if u is None:
        return int(Visual.NO_IMAGE), None
    if u.shape[1] == 1:
        return int(Visual.ONE_TOKEN), u.contiguous()
    cheaper = gram is not None or gram_is_cheaper(tokens, u.shape[1], u.shape[2])
    if cheaper and u.shape[2] <= MAX_GRAM_WIDTH:
        return int(Visual.GRAM), gram_of(u, relu) if gram is None else gram
    return int(Visual.TOKENS), u.contiguous()


def rows_of_one_image(visual: int) -> bool:
    """Whether a program must own rows of one image only."""
    return visual in (Visual.TOKENS, Visual.GRAM)


def image_arguments(image: Tensor | None, visual: int, unused: Tensor) -> dict[str, Any]:
    """What the kernels take for the image; ``unused`` is any tensor, for a pointer that is not read."""
    return {
        "p_image": unused if image is None else image,
        "visual": visual,
        "visual_tokens": 1 if image is None else image.shape[1],
        "block_l": BLOCK_L,
    }


@jit
def route_tokens(
    t,  # [BLOCK_M, BLOCK_R] float32, rows of one image
    p_image,
    block,
    span,
    visual_tokens,
    width,
    RELU: tl.constexpr,
    VISUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """z = relu(t) relu(u)ᵀ u [BLOCK_M, BLOCK_R], the ReLU where RELU."""
    image = block // tl.cdiv(span, BLOCK_M)
    i_c = tl.arange(0, BLOCK_R)
    m_c = i_c < width
    if RELU:
        t = tl.maximum(t, 0.0)
    if VISUAL == GRAM:
        p_gram = p_image + image.to(tl.int64) * width * width
        m_cc = m_c[:, None] & m_c[None, :]
        gram = tl.load(p_gram + i_c[:, None] * width + i_c[None, :], mask=m_cc, other=0.0)
        z = dot(t, gram, None, PRECISION)
    else:
        z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        left = t.to(p_image.dtype.element_ty)
        p_u = p_image + image.to(tl.int64) * visual_tokens * width
        for o_l in range(0, visual_tokens, BLOCK_L):
            i_l = o_l + tl.arange(0, BLOCK_L)
            m_l = (i_l < visual_tokens)[:, None] & m_c[None, :]
            u = tl.load(p_u + i_l[:, None] * width + i_c[None, :], mask=m_l, other=0.0)
            right = u
            if RELU:
                right = tl.maximum(u.to(tl.float32), 0.0).to(u.dtype)
            scores = dot(left, tl.trans(right), None, PRECISION).to(u.dtype)
            z = dot(scores, u, z, PRECISION)
    return z


@jit
def route_tokens_back(
    dz,  # [BLOCK_M, BLOCK_R] float32, rows of one image
    t,  # likewise
    p_image,
    block,
    span,
    visual_tokens,
    width,
    RELU: tl.constexpr,
    VISUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """dt [BLOCK_M, BLOCK_R] of :func:`route_tokens`."""
    image = block // tl.cdiv(span, BLOCK_M)
    i_c = tl.arange(0, BLOCK_R)
    m_c = i_c < width
    if VISUAL == GRAM:
        p_gram = p_image + image.to(tl.int64) * width * width
        m_cc = m_c[:, None] & m_c[None, :]
        transposed = tl.load(p_gram + i_c[None, :] * width + i_c[:, None], mask=m_cc, other=0.0)
        dt = dot(dz, transposed, None, PRECISION)
    else:
        dt = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        narrow = dz.to(p_image.dtype.element_ty)
        p_u = p_image + image.to(tl.int64) * visual_tokens * width
        for o_l in range(0, visual_tokens, BLOCK_L):
            i_l = o_l + tl.arange(0, BLOCK_L)
            m_l = (i_l < visual_tokens)[:, None] & m_c[None, :]
            u = tl.load(p_u + i_l[:, None] * width + i_c[None, :], mask=m_l, other=0.0)
            right = u
            if RELU:
                right = tl.maximum(u.to(tl.float32), 0.0).to(u.dtype)
            dscores = dot(narrow, tl.trans(u), None, PRECISION).to(u.dtype)
            dt = dot(dscores, right, dt, PRECISION)
    if RELU:
        dt = tl.where(t > 0, dt, 0.0)
    return dt
