"""How exactly torch is allowed to multiply float32, by whichever of its interfaces that was said."""

from __future__ import annotations

import torch

# What torch.backends.cuda.matmul.fp32_precision calls, in a fifth of its time: every call of a layer asks for it.
_fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", None)


def tf32_allowed() -> bool:
    """Whether products of float32 on a GPU may be rounded to tf32.

    torch has two interfaces for it, ``allow_tf32`` with ``set_float32_matmul_precision``, and ``fp32_precision``
    (torch 2.9), which transformers' ``TrainingArguments(tf32=True)`` uses. The older one raises once the newer was
    used; the newer one knows of both.
    """
    if _fp32_precision is None:  # an older torch
        return torch.backends.cuda.matmul.allow_tf32
    return _fp32_precision("cuda", "matmul") == "tf32"


@torch.compiler.assume_constant_result
def exact_on_cpu() -> bool:
    """Whether products of float32 on a CPU are to be exact: oneDNN has been allowed neither bfloat16 nor tf32."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "highest"
