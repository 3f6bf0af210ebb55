"""Every kernel compiles with the arguments that the ops launch it with, sizes of 1 and unaligned ones among them.

Triton makes a constant of an integer that is 1, and code of its own for multiples of 16. Neither its interpreter nor
compiling ahead of time (tests/benchmarks/test_codegen.py) does.
"""

import pytest
from compiling import output_of

from routingvl.kernels.optional_triton import triton

PROGRAM = """
import itertools, json, sys
import torch
import stub_gpu

launches = stub_gpu.install()
from routingvl.kernels import ROUTINGS, dispatch, routed_adapter, routed_lora_linear

dispatch.triton_obstacle = lambda device_type: None  # tensors on the CPU stand for those on the GPU
kind, dtype = sys.argv[1], getattr(torch, sys.argv[2])
new = lambda *shape: torch.zeros(*shape, dtype=dtype, requires_grad=True)
CASES = [
    (name, tokens, relu)
    for name, row in ROUTINGS.items()
    for tokens in ((1, 2, 70) if row.inner_product else (1,))
    for relu in (False, True)[: 1 + row.supports_relu]
    if row.kernel_obstacle(tokens, relu, "bottleneck") is None
]

def lora(name, tokens, relu, sizes, dropout):
    batch, text, inputs, n, rank = sizes
    weights = torch.zeros(3 * n, inputs, dtype=dtype), torch.zeros(3 * n, dtype=dtype)
    operands = new(batch, text, inputs), new(batch, tokens, inputs), *weights, new(2 * rank, inputs), new(2 * n, rank)
    return routed_lora_linear(
        *operands, routing=name, relu=relu, groups=2, columns=(0, 2 * n), scaling=1.7, dropout=dropout, backend="triton"
    )

def adapter(name, tokens, relu, sizes, residual):
    batch, text, width, rank = sizes
    down, up = (new(rank, width), new(rank)), (new(width, rank), new(width))
    x, v = new(batch, text, width), new(batch, tokens, width)
    return routed_adapter(x, v, *down, *up, routing=name, relu=relu, residual=residual, backend="triton")

CALLS = {
    "lora": (lora, [(1, 1, 1, 1, 1), (9, 7, 130, 70, 3), (8, 1, 64, 48, 16)], (0.0, 0.1)),
    "adapter": (adapter, [(1, 1, 1, 1), (5, 1, 7, 6), (8, 16, 64, 32)], (True, False)),
}
call, sizes, options = CALLS[kind]
made, todo, ways = [], [], set()
for routing in CASES:  # all sizes once for each way through the kernels, and one for a further function on that way
    row, tokens, relu = ROUTINGS[routing[0]], *routing[1:]
    way = row.uses_image, tokens, relu, not relu and row.is_rank_one(tokens)
    todo += itertools.product([routing], sizes[1:2] if way in ways else sizes, options)
    ways.add(way)
for routing, size, option in todo:
    before = len(launches)
    y = call(*routing, size, option)
    forward = len(launches) - before
    y.backward(torch.zeros_like(y))
    made.append([forward, len(launches) - before - forward])
print(json.dumps([made, sorted({name for name, *_ in launches}), len({code for _, code, *_ in launches})]))
"""


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="no triton")
@pytest.mark.parametrize(("kind", "dtype"), [("lora", "float32"), ("adapter", "bfloat16")])
def test_kernels_compile_with_the_arguments_of_real_launches(kind: str, dtype: str) -> None:
    made, kernels, codes = output_of(PROGRAM, kind, dtype)
    assert all(forward >= 1 and backward >= 1 for forward, backward in made)
    assert {f"{kind}_forward_kernel", f"{kind}_backward_kernel"} <= set(kernels)
    assert codes > len(kernels)
