"""The losses of the models: captions token by token, and labels by softmax or each for itself.

Where only the loss of a caption is wanted, :func:`linear_cross_entropy` computes it without a tensor of all logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from routingvl.data.collate import IGNORED
from routingvl.kernels.linear import product
from routingvl.models.checks import check_values

# Logits that exist at one time: 64 MiB in float32, which is 333 rows of GPT-2's vocabulary.
CHUNK_ELEMENTS = 2**24
PADDED_ROWS = 32
CACHED_ROWS = 8  # rows of logits whose softmax is computed together on a CPU


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross entropy in nats, mean over the batch: logits [B, labels], labels int64 [B] -> float32 scalar."""
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels {list(labels.shape)} must have one number for each of {len(logits)} examples")
    check_values("labels", labels, 0, logits.shape[1] - 1)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def soft_label_loss(logits: Tensor, scores: Tensor) -> Tensor:
    """Binary cross entropy in nats, mean over batch and labels: logits and scores in [0, 1], both [B, labels]."""
    if scores.shape != logits.shape:
        raise ValueError(f"labels {list(scores.shape)} must have the shape of the logits, {list(logits.shape)}")
    check_values("labels", scores, 0, 1)
    return F.binary_cross_entropy_with_logits(logits, scores.to(logits.dtype))


def caption_targets(labels: Tensor, loss: str, prefix: bool) -> Tensor:
    """The token that each position is to predict, -100 where none counts; these are the items of the mean.

    Args:
        labels: int64 [B, T], the caption's token ids, -100 for those that do not count.
        loss: "sound" or "reference" (the published loss: never the first token, never token id 0).
        prefix: the image stands in front of the text.

    Returns:
        int64 [B, 1 + T] with a prefix, whose last position is the first column, else [B, T].
    """
    first = 1 if loss == "reference" or not prefix else 0  # earliest token that counts
    targets = F.pad(labels[:, first:], (first if prefix else 0, 1), value=IGNORED)
    return targets.masked_fill(targets == 0, IGNORED) if loss == "reference" else targets


def caption_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy in nats, mean over the targets that count (0 if none does), in float32 or float64.

    logits [B, S, V], whose last positions predict targets int64 [B, <= S] of :func:`caption_targets`.
    """
    logits = logits[:, -targets.shape[1] :].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def caption_loss_without_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """:func:`caption_loss` of the head's inputs: hidden [B, S, d], weight [V, d]; only targets that count cost time.

    The targets may stay on the CPU: choosing those that count then waits for no GPU.
    """
    hidden, targets = hidden[:, -targets.shape[1] :].flatten(0, 1), targets.flatten()
    positions = (targets != IGNORED).nonzero()[:, 0]
    targets, positions = (t.to(hidden.device, non_blocking=True) for t in (targets[positions], positions))
    return linear_cross_entropy(hidden.index_select(0, positions), weight, targets)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Mean over n of ``-log softmax(hidden weightᵀ)[targets]``, in nats.

    The gradient is computed beside the loss, chunk by chunk, so that neither pass holds more than ``chunk`` rows of
    logits; what is kept for backward has the size of ``hidden`` (and of ``weight``, where that is trained). Under
    autocast the products run in its dtype; softmax and sum are float32 (float64 for float64 input) at any rate.

    Args:
        hidden: [n, d] states that predict something.
        weight: [V, d] of the head.
        targets: [n] int64, each in [0, V).
        chunk: rows at a time; None for as many as give ``CHUNK_ELEMENTS`` logits.

    Returns:
        A scalar, float32 or float64; 0 when n is 0.

    Raises:
        ValueError: shapes do not fit, or ``chunk`` is below 1.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [n, d] and [V, d]")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {list(targets.shape)} must have one entry for each of {hidden.shape[0]} rows")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (hidden, weight))
    chunk = chunk or max(1, CHUNK_ELEMENTS // weight.shape[0])
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight)]
    with torch.autocast(device, enabled=False):
        total, _, _ = _LinearCrossEntropy.apply(hidden, weight, targets, chunk, *needs)
        return total / max(1, hidden.shape[0])


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses, with d sum / d hidden and d sum / d weight as further outputs (None when not needed)."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, hidden_grad: bool, weight_grad: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=exact)
        dhidden = torch.empty_like(hidden) if hidden_grad else None
        dweight = torch.zeros_like(weight, dtype=exact) if weight_grad else None
        for start in range(0, hidden.shape[0], chunk):
            labels = targets[start : start + chunk, None]
            rows = _padded(hidden[start : start + chunk])
            logits = product(rows, weight.t())
            gradient = logits if hidden_grad or weight_grad else None  # takes the place of what is no longer needed
            # A few rows at a time stay in a CPU's cache through all of it; a GPU would rather have them all.
            block = CACHED_ROWS if logits.device.type == "cpu" else chunk
            for first in range(0, len(labels), block):
                part = slice(first, min(first + block, len(labels)))
                total += _softmax_loss(
                    logits[part].to(exact), labels[part], None if gradient is None else gradient[part]
                )
            logits[len(labels) :] = 0  # the gradient of padding
            if hidden_grad:
                dhidden[start : start + chunk] = product(gradient, weight)[: len(labels)]
            if weight_grad:
                dweight += product(gradient.t(), rows)
        return total, dhidden, dweight

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        _, dhidden, dweight = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(extra for extra in (dhidden, dweight) if extra is not None))
        ctx.dtypes = [t.dtype for t in inputs[:2]]
        ctx.save_for_backward(dhidden, dweight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        gradients = [None, None]
        if scale is not None:
            gradients = [
                None if saved is None else (saved * scale).to(dtype)
                for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            ]
        return (*gradients, None, None, None, None)


def _padded(rows: Tensor) -> Tensor:
    """``rows`` [m, d] with zero rows up to a multiple of ``PADDED_ROWS``, on a CPU and from that many rows on.

    oneDNN makes code for every shape it meets, which for these products takes longer than the products; and the number
    of positions that count is another one in almost every batch.
    """
    extra = -len(rows) % PADDED_ROWS
    if not extra or len(rows) < PADDED_ROWS or rows.device.type != "cpu":
        return rows
    return torch.cat([rows, rows.new_zeros(extra, rows.shape[1])])


def _softmax_loss(logits: Tensor, labels: Tensor, gradient: Tensor | None) -> Tensor:
    """Summed loss of logits [m, V] and labels [m, 1]; d loss / d logits goes into ``gradient``, if given."""
    shifted = logits - logits.amax(dim=1, keepdim=True)
    right = shifted.gather(1, labels)
    sums = shifted.exp_().sum(dim=1, keepdim=True)
    if gradient is not None:
        # softmax - 1 at the target
        shifted.div_(sums).scatter_add_(1, labels, shifted.new_full(labels.shape, -1.0))
        gradient.copy_(shifted)
    return (sums.log() - right).sum()
