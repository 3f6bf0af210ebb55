"""What is measured, as data: one case is a layer of a published recipe at its real size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from routingvl.kernels import ROUTINGS
from routingvl.kernels.reference import reference_adapter, reference_lora


@dataclass(frozen=True)
class Case:
    """A layer and its sizes.

    Attributes:
        name: unique name, the key in result files.
        op: "lora" (nn.Linear), "merged_lora" (GPT-2's Conv1D, bottleneck on query and value), "adapter".
        B, T, L, K, N, R: batch, text tokens, visual tokens, width in, width out, rank of one projection.
        routings: the routing functions measured.
        activation, residual: of an adapter.
        quick: part of the suite "quick".
        level: "layer" with the frozen projection around it, or "op": the bottleneck alone.
        devices: the types of device whose suites have the case; ``--case`` runs it anywhere.
    """

    name: str
    op: str
    B: int
    T: int
    L: int
    K: int
    N: int
    R: int
    routings: tuple[str, ...] = tuple(ROUTINGS)
    activation: str = "gelu"
    residual: bool = True
    quick: bool = False
    level: str = "layer"
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def groups(self) -> int:
        """How many projections share the bottleneck."""
        return 2 if self.op == "merged_lora" else 1

    @property
    def takes_dropout(self) -> bool:
        """Whether the bottleneck's inputs can be dropped: LoRA's in a layer."""
        return self.op != "adapter" and self.level == "layer"

    @property
    def columns(self) -> tuple[int, ...] | None:
        """Columns of query and value in GPT-2's joined projection."""
        return (0, 2 * self.N // 3) if self.op == "merged_lora" else None

    def labels(self) -> dict[str, str]:
        """What the case is called."""
        return {"case": self.name, "op": self.op, "level": self.level}

    def sizes(self) -> dict[str, int]:
        """The sizes by their letters."""
        return {letter: getattr(self, letter) for letter in "BTLKNR"}

    def work(self, mode: str, itemsize: int, *, bottleneck: bool = True) -> tuple[int, int]:
        """Floating point operations and bytes of the definition in "fwd", "bwd" or "fwdbwd", for every provider.

        Counted are the products of matrices as the formula is written (so a provider that finds a cheaper form shows a
        higher rate), and each operand and result moved once. ``bottleneck`` off counts the frozen projection alone.
        """
        if mode == "fwdbwd":
            pairs = [self.work(part, itemsize, bottleneck=bottleneck) for part in ("fwd", "bwd")]
            return pairs[0][0] + pairs[1][0], pairs[0][1] + pairs[1][1]
        rows, code = self.B * self.T, self.groups * self.R
        outputs = 2 * self.N // 3 if self.op == "merged_lora" else self.N
        frozen = 0 if self.op == "adapter" or self.level == "op" else self.K * self.N
        trained = code * self.K + outputs * self.R if bottleneck else 0
        image = self.B * self.L * self.K if bottleneck else 0
        # Products with the frozen weight happen once per pass; the bottleneck's have two gradients each.
        products = rows * (frozen + (1 if mode == "fwd" else 2) * trained)
        products += (self.B * self.L * code * self.K) if bottleneck else 0
        text = rows * (self.K + self.N)
        moved = text + frozen + trained + image
        if mode == "bwd":
            moved += rows * self.K + trained  # dx and the weights' gradients are written, x is read again
        return 2 * products, moved * itemsize


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GPU = ("cuda",)
MANY_TOKENS = tuple(name for name, row in ROUTINGS.items() if row.max_visual_tokens is None)
BASE = Case("roberta_lora_m1280", "lora", B=64, T=20, L=1, K=768, N=768, R=128, quick=True)
FEW = replace(BASE, quick=False, B=16)  # M = 320
DECODE = Case("gpt2_lora_decode_m40", "merged_lora", B=40, T=1, L=1, K=768, N=2304, R=128)
BOTH_KINDS = ("mul", "vllora")  # of dense products, and rank one
CASES = (
    BASE,
    Case("linear_lora_m2040", "lora", B=40, T=51, L=1, K=768, N=768, R=128),
    Case("gpt2_lora_m2040", "merged_lora", B=40, T=51, L=1, K=768, N=2304, R=128),
    Case("roberta_large_lora_m1280", "lora", B=64, T=20, L=1, K=1024, N=1024, R=128),
    Case("gpt2_adapter_m2040", "adapter", B=40, T=51, L=1, K=768, N=768, R=128, activation="gelu_new"),
    Case("roberta_adapter_m1280", "adapter", B=64, T=20, L=1, K=768, N=768, R=64, residual=False, quick=True),
    DECODE,
    *(replace(DECODE, name=f"gpt2_lora_decode_m{b}", B=b, routings=BOTH_KINDS) for b in (1, 4, 16, 64)),
    Case("lora_op_m1280", "lora", B=64, T=20, L=1, K=768, N=768, R=128, quick=True, level="op"),
    Case("adapter_op_m1280", "adapter", B=64, T=20, L=1, K=768, N=768, R=64, residual=False, level="op"),
    # The same layer with more and fewer ranks, visual tokens and text tokens, as series through the first case.
    *(replace(BASE, name=f"{BASE.name}_r{r}", R=r, routings=("add", "mul"), quick=False) for r in (8, 16, 32, 64, 256)),
    *(replace(FEW, name=f"roberta_lora_m320_l{tokens}", L=tokens, routings=MANY_TOKENS) for tokens in (16, 64, 197)),
    *(replace(FEW, name=f"roberta_lora_m{16 * b}", B=b, T=16, routings=BOTH_KINDS) for b in (4, 8)),
    replace(FEW, name="roberta_lora_m320", routings=BOTH_KINDS),
    replace(FEW, name="roberta_lora_m640", B=32, routings=BOTH_KINDS),
    replace(BASE, name="roberta_lora_m5120", B=256, routings=("mul",), quick=False),
    # The sizes of the targets on a GPU; a training step there has no trouble with 512 questions.
    Case("roberta_lora_m10240", "lora", B=512, T=20, L=1, K=768, N=768, R=128, devices=GPU),
    Case("adapter_m10240", "adapter", B=512, T=20, L=1, K=768, N=768, R=128, devices=GPU),
    Case("lora_op_m10240", "lora", B=512, T=20, L=1, K=768, N=768, R=128, level="op", devices=GPU),
    Case(
        "roberta_lora_m10240_l197", "lora", B=512, T=20, L=197, K=768, N=768, R=128, routings=MANY_TOKENS, devices=GPU
    ),
)
# The first is of benchmarks/launch_level.py, the last three are of benchmarks/model_cases.py.
LEVELS = ("launch", "op", "layer", "step", "train", "generate")

Layer = Callable[..., Tensor]


def make_tensors(
    case: Case, *, seed: int, dtype: torch.dtype, device: str, rounded_to: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Random tensors of a layer in training: only the image and the frozen weight need no gradient.

    Values are those of a trained layer in size: unit text, weights of about 1/sqrt(fan in), an up-projection that is
    not 0, and an image whose code has about unit length. ``rounded_to`` makes them exact in that dtype too.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator) * scale
        values = values if rounded_to is None else values.to(rounded_to)
        return values.to(device=device, dtype=dtype)

    width = case.groups * case.R
    tensors = {
        "x": draw(case.B, case.T, case.K),
        "v": draw(case.B, case.L, case.K, scale=(width * case.L) ** -0.5),
    }
    if case.op == "adapter":
        tensors |= {
            "down_weight": draw(case.R, case.K, scale=case.K**-0.5),
            "down_bias": draw(case.R, scale=0.01),
            "up_weight": draw(case.K, case.R, scale=case.R**-0.5),
            "up_bias": draw(case.K, scale=0.1),
        }
    else:
        outputs = case.N if case.op == "lora" else 2 * case.N // 3
        if case.level == "layer":
            shape = (case.N, case.K) if case.op == "lora" else (case.K, case.N)
            tensors |= {"weight": draw(*shape, scale=case.K**-0.5), "bias": draw(case.N, scale=0.1)}
        tensors |= {
            "a": draw(width, case.K, scale=case.K**-0.5),
            "b": draw(outputs, case.R, scale=case.R**-0.5),
        }
    for name, tensor in tensors.items():
        tensor.requires_grad_(name not in ("v", "weight"))
    return tensors


def definition(case: Case, routing: str, relu: bool = False) -> Layer:
    """The case's layer as kernels/reference.py defines it, the oracle of the gate."""
    options = {"routing": routing, "relu": relu}
    if case.op == "adapter":
        return partial(reference_adapter, **options, activation=case.activation, residual=case.residual)
    if case.level == "op":
        return partial(reference_lora, **options)
    frozen = frozen_linear if case.op == "lora" else frozen_conv1d

    def layer(x: Tensor, v: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        base = frozen(x, v, weight, bias, a, b)
        return reference_lora(x, v, a, b, **options, base=base, groups=case.groups, columns=case.columns)

    return layer


def frozen_linear(x: Tensor, v: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """nn.Linear without its bottleneck: weight [N, K]."""
    return F.linear(x, weight, bias)


def frozen_conv1d(x: Tensor, v: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """GPT-2's Conv1D without its bottleneck: weight [K, N]."""
    return torch.addmm(bias, x.flatten(0, 1), weight).view(*x.shape[:2], -1)
