"""Layers whose kernels the emulator runs, as data, and what runs them: in a process of :mod:`.child` only."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Case:
    """One layer, forward and backward.

    Attributes:
        routing, relu, tokens: function, its ReLU, and L visual tokens.
        layout: of a LoRA, a name in routed_cases.LAYOUTS; or "adapter".
        dtype: a name of torch, or "tf32" for float32 multiplied so.
        sizes: B, T, K, n (of an Adapter not read) and R.
        dropout: of a LoRA's inputs.
        activation, residual: of an Adapter.
    """

    routing: str
    layout: str = "plain"
    dtype: str = "bfloat16"
    sizes: tuple[int, int, int, int, int] = (3, 20, 72, 40, 24)
    tokens: int = 1
    relu: bool = False
    dropout: float = 0.0
    activation: str = "gelu"
    residual: bool = True

    def __str__(self) -> str:
        default = asdict(Case(""))
        changed = {name: value for name, value in asdict(self).items() if value != default[name]}
        return "-".join(
            "x".join(map(str, value)) if isinstance(value, tuple) else name if value is True else str(value)
            for name, value in changed.items()
        )


@dataclass(frozen=True)
class Found:
    """What a run of a case came to.

    Attributes:
        wrong: what missed the tolerance, in words.
        launched: the kernels, in order.
        instructions: run in all.
        same: see :func:`.block.launch`.
        digests: of the output and each gradient, by name.
    """

    wrong: dict[str, str]
    launched: list[str]
    instructions: int
    same: Counter[str]
    digests: dict[str, str]


def kernels_of(case: Case) -> list[str]:
    """The kernels that the case has to launch, without repetition, in alphabetical order."""
    if case.layout == "adapter":
        return ["adapter_backward_kernel", "adapter_forward_kernel"]
    if case.routing in ("expand", "vllora") and case.tokens == 1 and not case.relu:
        return ["rank_one_backward_kernel", "rank_one_forward_kernel"]
    kernels = ["lora_backward_kernel", "lora_forward_kernel"]
    return ["dropped_gradient_kernel", *kernels] if case.dropout else kernels


def drawn(case: Case) -> dict[str, Any]:
    """Operands in float64. The image code has about unit length, so that no function is ill-conditioned."""
    import torch
    from routed_cases import tensors

    batch, text, width, _, rank = case.sizes
    if case.layout != "adapter":
        operands = tensors(case.tokens, case.layout, sizes=case.sizes)
        operands["v"] *= (len(operands["a"]) * case.tokens) ** -0.5
        return operands
    torch.manual_seed(0)
    draw, small = partial(torch.randn, dtype=torch.float64), (rank * case.tokens) ** -0.5
    return {
        "x": draw(batch, text, width), "v": draw(batch, case.tokens, width) * small,
        "down_weight": draw(rank, width) / width**0.5, "down_bias": draw(rank) * small,
        "up_weight": draw(width, rank) / rank**0.5, "up_bias": draw(width),
    }  # fmt: skip


def ops(case: Case) -> tuple[Any, Any]:
    """The layer on the Triton backend, and its definition."""
    from routed_cases import defined_linear, options

    from routingvl.kernels import routed_adapter, routed_lora_linear
    from routingvl.kernels.reference import reference_adapter

    if case.layout == "adapter":
        same = dict(routing=case.routing, relu=case.relu, activation=case.activation, residual=case.residual)
        return partial(routed_adapter, backend="triton", **same), partial(reference_adapter, **same)
    same = options(case.routing, case.relu, case.layout, n=case.sizes[3])
    return partial(routed_lora_linear, backend="triton", **same), partial(defined_linear, **same)


SEED = 5  # of what a layer with dropout draws


def _with_masks(case: Case, ours: Any, plain: Any, x: Any, v: Any) -> tuple[Any, Any]:
    """The same layers, both with the masks of one seed: torch's for the image, and Philox's for the text."""
    import torch
    import torch.nn.functional as F
    from routed_cases import options

    from routingvl.kernels.reference import reference_lora

    batch, text, width, n, _ = case.sizes
    torch.manual_seed(SEED)
    image_mask = F.dropout(torch.ones_like(v), case.dropout).double() if case.routing != "none" else 1.0
    kept = philox_mask(torch.randint(2**62, (1,)).item(), batch * text, width, case.dropout)
    text_mask = torch.from_numpy(kept).view_as(x) / (1 - case.dropout)

    def dropped(**operands: Any) -> Any:
        torch.manual_seed(SEED)
        return ours(**operands, dropout=case.dropout)

    def masked(x: Any, v: Any, weight: Any, bias: Any, a: Any, b: Any) -> Any:
        text, image = x * text_mask.to(x.dtype), v * image_mask
        base = F.linear(x, weight, bias)
        same = options(case.routing, case.relu, case.layout, n=n)
        return reference_lora(text, image.to(x.dtype), a, b, base=base, **same)

    return dropped, masked


def philox_mask(seed: int, rows: int, width: int, dropout: float) -> Any:
    """What the kernels keep [rows, width], by seven rounds of Philox 4x32 (Salmon et al., SC 2011).

    The counter is the group of four columns and the row; the four words are the columns' numbers.
    """
    import numpy as np

    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    shape = rows, -(-width // 4)
    zeros = np.zeros(shape, np.uint64)
    c0, c1 = zeros + np.arange(shape[1], dtype=np.uint64), zeros + np.arange(rows, dtype=np.uint64)[:, None]
    c2, c3 = zeros, zeros
    for turn in range(7):
        k0 = np.uint64((seed + turn * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint64(((seed >> 32) + turn * 0xBB67AE85) & 0xFFFFFFFF)
        one, two = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = two >> half ^ c1 ^ k0, two & low, one >> half ^ c3 ^ k1, one & low
    words = np.stack([c0, c1, c2, c3], 2).reshape(rows, -1)[:, :width]
    return words >> np.uint64(1) >= round(dropout * 2**31)


def run_case(arch: int, case: Case, schedule: Any = None) -> Found:
    """Run a case's kernels in the emulator of sm_``arch`` and compare with the definition in float64."""
    import torch

    from .driver import emulated

    torch.utils.deterministic.fill_uninitialized_memory = True  # fresh tensors hold NaN
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    dtype = torch.float32 if case.dtype == "tf32" else getattr(torch, case.dtype)
    rounded = {name: tensor.to(dtype) for name, tensor in drawn(case).items()}
    exact = {name: tensor.double() for name, tensor in rounded.items()}
    ours, plain = ops(case)
    if case.dropout:
        ours, plain = _with_masks(case, ours, plain, rounded["x"], rounded["v"])
    with emulated(arch) as launches:
        if schedule is not None:
            launches.schedule = schedule
        return compared(case, ours, plain, rounded, exact, launches)


def run_in_every_order(arch: int, case: Case) -> dict[str, Found]:
    """:func:`run_case` with the warps and the asynchronous work in several orders that the hardware may take."""
    from .block import Schedule

    schedules = [
        Schedule(),
        Schedule("together", True),
        Schedule("warps"),
        Schedule("reversed"),
        Schedule("reversed", True),
    ]
    return {str(schedule): run_case(arch, case, schedule) for schedule in schedules}


def compared(case: Case, ours: Any, plain: Any, rounded: dict, exact: dict, launches: Any) -> Found:
    import torch
    from tolerances import relative_rms, run

    from routingvl.benchmarks.gate import TF32_CAP, failures

    y = plain(**exact)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(rounded["x"].dtype)
    got, oracle = run(ours, rounded, dy), run(plain, exact, dy.double())
    if case.dtype == "tf32":
        errors = {name: relative_rms(got[name], oracle[name]) for name in oracle}
        wrong = {name: f"relative RMS error {error:.2e}" for name, error in errors.items() if not error <= TF32_CAP}
    else:
        wrong = failures(got, run(plain, rounded, dy), oracle, dy.dtype)
    launched, instructions = [name for name, *_ in launches.made], sum(steps for *_, steps in launches.made)
    digests = {name: digest(tensor) for name, tensor in got.items()}
    return Found(wrong, launched, instructions, launches.same, digests)


def digest(tensor: Any) -> str:
    """A short name of a tensor's bits."""
    import hashlib

    import torch

    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
