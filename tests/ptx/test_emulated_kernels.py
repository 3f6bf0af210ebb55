"""Every kernel in each of its forms, as compiled for sm_90 and sm_80, in the emulator, against the definition.

What a launch really compiles is run: arguments specialised, loops pipelined, shared memory swizzled, matrices
multiplied by mma and wgmma; and every access to memory is checked (memory.py).
"""

import itertools

import pytest

pytest.importorskip("triton")

from ptx.cases import Case, kernels_of, run_case, run_in_every_order
from routed_cases import FORMS

from routingvl.kernels import ACTIVATIONS, ROUTINGS

ODD = (3, 7, 67, 70, 33)  # B, T, K, n, R: nothing is aligned
WIDE = (4, 20, 200, 136, 100)
ONES = (1, 1, 1, 1, 1)
LONG = (2, 70, 64, 64, 16)  # parts of an image; as many blocks of rows as processors
DECODE = (40, 1, 136, 200, 64)
APART = (2, 20, 72, 72, 72)  # groups too wide for one program
MANY = (10, 20, 72, 40, 64)  # rows enough for the tiles of many rows
# Routing, ReLU, visual tokens, with sizes: 9 tokens are taken one by one, 40 of many rows as a matrix.
DENSE = [(name, relu, 1, (3, 20, 72, 40, 24)) for name, relu in FORMS]
SEVERAL = [
    (name, relu, tokens, sizes)
    for name, relu in FORMS
    if ROUTINGS[name].inner_product
    for tokens, sizes in ((9, (3, 5, 72, 40, 24)), (40, (2, 37, 72, 40, 24)))
]
EVERY = [*DENSE, *SEVERAL]
FAST = [
    (90, Case("mul", "c_attn", sizes=APART)),
    (90, Case("none", dtype="float16", sizes=ODD)),
    (90, Case("vllora")),
    (90, Case("vllora", "c_attn", tokens=40, sizes=(2, 37, 72, 40, 24), relu=True)),
    (90, Case("add", dropout=0.5)),
    (90, Case("mul", "adapter")),
    (90, Case("vllora", "adapter", "float32", activation="gelu_new", residual=False)),
    (80, Case("vllora", "plain", "tf32", relu=True)),
    (80, Case("mul", "adapter", "float16", activation="silu")),
]


def _more() -> list[tuple[int, Case]]:
    """Each function, layout, activation, dtype and size again, in turns."""
    dtypes = itertools.cycle(("bfloat16", "float16", "tf32", "float32"))
    activations = itertools.cycle(ACTIVATIONS)
    arches = itertools.cycle((90, 80, 90, 90, 80))
    found = []
    for name, relu, tokens, sizes in EVERY:
        for layout in ("plain", "c_attn", "adapter"):
            activation = next(activations) if layout == "adapter" else "gelu"
            case = Case(name, layout, next(dtypes), sizes, tokens, relu, activation=activation)
            found.append((next(arches), case))
    for sizes in (ODD, WIDE, LONG, DECODE, ONES):
        for name, layout in (("mul", "plain"), ("vllora", "c_attn"), ("add", "adapter")):
            # One number in half precision is as exact as chance has it.
            found.append((next(arches), Case(name, layout, "float32" if sizes == ONES else "bfloat16", sizes)))
    for name, relu in FORMS:
        found.append((next(arches), Case(name, "c_attn", next(dtypes), relu=relu, dropout=0.25)))
    for arch, name, dropout in ((90, "none", 0.0), (80, "add", 0.25), (80, "mul", 0.0), (90, "mul", 0.25)):
        found.append((arch, Case(name, "c_attn", sizes=APART, dropout=dropout)))
    found.append((90, Case("mul", "c_attn", sizes=(40, 1, 136, 200, 72))))
    found += [(arch, Case("mul", sizes=MANY)) for arch in (90, 80)]
    found.append((90, Case("mul", sizes=MANY, dropout=0.25)))
    found += [(90, Case("mul", "adapter", sizes=sizes)) for sizes in (MANY, (2, 20, 72, 72, 100))]
    return [one for one in dict.fromkeys(found) if one not in FAST]


def _everything() -> list[tuple[int, Case]]:
    """The product of all of these."""
    dtypes = ("bfloat16", "float16", "tf32", "float32")
    found = [
        (arch, Case(name, layout, dtype, shape or sizes, tokens, relu))
        for arch, layout, dtype, shape in itertools.product(
            (90, 80), ("plain", "c_attn", "adapter"), dtypes, (None, ODD, WIDE, LONG, DECODE)
        )
        for name, relu, tokens, sizes in EVERY
    ]
    for arch, activation, dtype in itertools.product((90, 80), ACTIVATIONS, dtypes):
        found += [(arch, Case(name, "adapter", dtype, activation=activation)) for name in ("mul", "vllora")]
    for arch, (name, relu), dtype in itertools.product((90, 80), FORMS, dtypes):
        found += [(arch, Case(name, layout, dtype, relu=relu, dropout=0.5)) for layout in ("plain", "c_attn")]
    return [one for one in dict.fromkeys(found) if one not in FAST and one not in MORE]


MORE = _more()
CASES = [
    *FAST,
    *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE),
    *(pytest.param(*one, marks=pytest.mark.exhaustive) for one in _everything()),
]


@pytest.mark.parametrize(("arch", "case"), CASES, ids=str)
def test_kernels_are_the_definition(arch: int, case: Case, emulated) -> None:
    found = emulated(arch, run_case, case)
    assert not found.wrong
    assert sorted(set(found.launched)) == kernels_of(case)


ORDERS = [
    (90, Case("mul", sizes=(2, 20, 136, 136, 64))),
    *(
        pytest.param(arch, case, marks=pytest.mark.slow)
        for arch, case in (
            (80, Case("mul", sizes=WIDE)),
            (90, Case("vllora", "c_attn", tokens=40, sizes=(2, 37, 72, 40, 24))),
            (90, Case("vllora")),
            (90, Case("none", "c_attn", dropout=0.25)),
            (90, Case("mul", "adapter", sizes=WIDE)),
            (80, Case("vllora", "adapter", tokens=9)),
            (90, Case("vllora", "adapter", "float32")),
        )
    ),
]


@pytest.mark.parametrize(("arch", "case"), ORDERS, ids=str)
def test_no_order_of_warps_and_copies_changes_a_bit(arch: int, case: Case, emulated) -> None:
    found = emulated(arch, run_in_every_order, case)
    first, *others = found.values()
    assert not first.wrong
    assert {order for order, other in found.items() if other.digests != first.digests} == set()
    assert len(others) == 4
