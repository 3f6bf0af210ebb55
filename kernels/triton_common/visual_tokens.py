"""How the image reaches a kernel, and routing by several visual tokens there.

R stands for the width of the low-rank activation, G*R where G groups share it.
"""

from __future__ import annotations

from enum import IntEnum

from torch import Tensor

from ..activations import rectified
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
BLOCK_L = constexpr(32)  # visual tokens taken in one step


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


def new_image_gradients(
    like: Tensor, image: Tensor | None, visual: int, width: int, need_u: bool
) -> tuple[Tensor, Tensor]:
    """Memory for dz [M, R], which the image's gradient is made of where it goes in as GRAM, and for du [B, L, R], which
    it is elsewhere; empty where not needed. ``like`` has M rows and the dtype.
    """
    gram, direct = need_u and visual == Visual.GRAM, need_u and visual in (Visual.ONE_TOKEN, Visual.TOKENS)
    images, tokens = (image.shape[0] if direct else 0), (image.shape[1] if visual == Visual.TOKENS else 1)
    return like.new_empty(like.shape[0] if gram else 0, width), like.new_empty(images, tokens, width)


def visual_tokens(image: Tensor | None) -> int:
    """How many visual tokens the kernels are told of."""
    return 1 if image is None else image.shape[1]


@jit
def route_tokens(
    t,  # [BLOCK_M, BLOCK_R] float32, rows of one image
    dz,  # likewise, read where BACK only
    p_image,
    p_du,  # [B, L, R] result, where WRITE_DU only
    block,
    span,
    visual_tokens,
    width,
    BACK: tl.constexpr,
    RELU: tl.constexpr,
    VISUAL: tl.constexpr,
    WRITE_DU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """z = relu(t) relu(u)ᵀ u [BLOCK_M, BLOCK_R], the ReLU where RELU; with BACK dt from dz.

    WRITE_DU is for TOKENS, and for programs that own all rows of their image: du = (relu(t) relu(u)ᵀ)ᵀ dz +
    (dz uᵀ)ᵀ relu(t), the second term where relu lets u through.
    """
    image = (block // tl.cdiv(span, BLOCK_M)).to(tl.int64)
    i_c = tl.arange(0, BLOCK_R)
    m_c = i_c < width
    left = rectified(t) if RELU else t
    rows = dz if BACK else left
    if VISUAL == GRAM:
        o_g = i_c[None, :] * width + i_c[:, None] if BACK else i_c[:, None] * width + i_c[None, :]  # transposed in BACK
        gram = tl.load(p_image + image * width * width + o_g, mask=m_c[:, None] & m_c[None, :], other=0.0)
        routed = dot(rows, gram, None, PRECISION)
    else:
        routed = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        narrow = rows.to(p_image.dtype.element_ty)
        # With ReLU Triton (3.4 to 3.9, sm_90) would load visual tokens of a later step to where a product still
        # reads, and with WRITE_DU there are more such products.
        for o_l in tl.range(0, visual_tokens, BLOCK_L, num_stages=1 if RELU or WRITE_DU else None):
            i_l = o_l + tl.arange(0, BLOCK_L)
            m_l = (i_l < visual_tokens)[:, None] & m_c[None, :]
            o_u = (image * visual_tokens + i_l[:, None]) * width + i_c[None, :]
            u = tl.load(p_image + o_u, mask=m_l, other=0.0)
            right = rectified(u.to(tl.float32)).to(u.dtype) if RELU else u
            scores = dot(narrow, tl.trans(u if BACK else right), None, PRECISION).to(u.dtype)
            routed = dot(scores, right if BACK else u, routed, PRECISION)
            if WRITE_DU:
                text = left.to(u.dtype)
                du = dot(tl.trans(scores), text, None, PRECISION)
                if RELU:
                    du = tl.where(u.to(tl.float32) > 0, du, 0.0)
                forward = dot(text, tl.trans(right), None, PRECISION).to(u.dtype)
                du = dot(tl.trans(forward), narrow, du, PRECISION)
                tl.store(p_du + o_u, du.to(p_du.dtype.element_ty), mask=m_l)
    if BACK and RELU:
        routed = tl.where(t > 0, routed, 0.0)
    # Scores that overflow would make NaN of the zeros beyond the width, and products with it NaN of everything.
    return tl.where(m_c[None, :], routed, 0.0)


@jit
def store_image_gradient(
    p_du,
    du,
    block,
    i_m,
    m_m,
    i_c,
    m_c,
    span,
    tokens,
    images,
    width,
    ONE_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """du [BLOCK_M, BLOCK_R], what each row adds to the gradient of its image's u, summed over a program's rows of each
    of its images, into p_du [B, blocks per image, R]; nobody else adds to these sums. ONE_ROW: tokens is 1.
    """
    if ONE_ROW:
        o_du = i_m.to(tl.int64)[:, None] * width + i_c[None, :]
        tl.store(p_du + o_du, du.to(p_du.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])
    else:
        blocks = tl.cdiv(span, BLOCK_M)
        first = (block // blocks) * (span // tokens)
        p_total = p_du + (first.to(tl.int64) * blocks + block % blocks) * width
        for image in range(first, tl.minimum(first + span // tokens, images)):
            mine = m_m & (i_m // tokens == image)
            total = tl.sum(tl.where(mine[:, None], du, 0.0), 0)
            tl.store(p_total + i_c, total.to(p_du.dtype.element_ty), mask=m_c)
            p_total += blocks * width
