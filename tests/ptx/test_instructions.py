"""What instructions do, on kernels of a few lines: results, and what is refused."""

import numpy as np
import pytest
from ptx.block import Schedule, launch
from ptx.memory import GlobalMemory
from ptx.parser import Fault, parse
from ptx.values import from_bfloat16, to_bfloat16

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry tried(
    .param .u64 .ptr .global .align 1 tried_param_0,
    .param .u64 .ptr .global .align 1 tried_param_1
)
.reqntid %d
{
    .reg .pred %%p<9>; .reg .b16 %%h<9>; .reg .b32 %%r<20>; .reg .b64 %%d<9>;
    mov.u32 %%r0, %%tid.x;
    ld.param.b64 %%d0, [tried_param_0];
    ld.param.b64 %%d1, [tried_param_1];
    mul.wide.u32 %%d2, %%r0, 4;
    add.s64 %%d3, %%d0, %%d2;
    add.s64 %%d4, %%d1, %%d2;
    ld.global.b32 %%r1, [%%d3];
"""
LANES = np.arange(32, dtype=np.uint32)


def run(body: str, values: np.ndarray, *, blocks: int = 1, order: str = "together", shared: int = 4096) -> np.ndarray:
    """Each thread loads its value into %r1, and what it leaves in %r2 is returned; %r0 is its number."""
    values = np.ascontiguousarray(values)
    result = np.zeros(len(values), np.uint32)
    source = HEAD % len(values) + body + "\n    st.global.b32 [%d4], %r2;\n    ret;\n}\n"
    memory = GlobalMemory([(values.ctypes.data, values.nbytes), (result.ctypes.data, result.nbytes)])
    arguments = [values.ctypes.data, result.ctypes.data]
    launch(parse(source), (blocks, 1, 1), arguments, memory, shared, Schedule(order))
    memory.write_back()
    return result


RESULTS = {
    "add.s32 %r2, %r1, -3;": lambda v: v - 3,
    "mul.hi.u32 %r2, %r1, 0xD2511F53;": lambda v: v.astype(np.uint64) * 0xD2511F53 >> 32,
    "mul.lo.s32 %r2, %r1, -7;": lambda v: v.view(np.int32) * -7,
    "div.s32 %r2, %r1, -3;": lambda v: np.trunc(v.view(np.int32) / -3).astype(np.int32),
    "rem.s32 %r2, %r1, 5;": lambda v: np.fmod(v.view(np.int32), 5),
    "shr.s32 %r2, %r1, 40;": lambda v: v.view(np.int32) >> 31,
    "shl.b32 %r2, %r1, 32;": lambda v: v * 0,
    "bfe.u32 %r2, %r1, 3, 5;": lambda v: v >> 3 & 31,
    "bfe.s32 %r2, %r1, 3, 5;": lambda v: (v.view(np.int32) << 24) >> 27,
    "bfi.b32 %r2, %r1, 0, 4, 8;": lambda v: (v & 255) << 4,
    "prmt.b32 %r2, %r1, 0, 0x0123U;": lambda v: v.byteswap(),
    "lop3.b32 %r2, %r1, 12, 10, 0x96U;": lambda v: v ^ 12 ^ 10,
    "shf.l.wrap.b32 %r2, %r1, %r1, 8;": lambda v: v << 8 | v >> 24,
    "min.s32 %r2, %r1, 5;": lambda v: np.minimum(v.view(np.int32), 5),
    "setp.lt.s32 %p1, %r1, 4;\n selp.b32 %r2, 7, 9, %p1;": lambda v: np.where(v.view(np.int32) < 4, 7, 9),
    "mov.b32 {%h1, %h2}, %r1;\n mov.b32 %r2, {%h2, %h1};": lambda v: v << 16 | v >> 16,
    "mov.b32 {%h1, _}, %r1;\n cvt.s32.s16 %r2, %h1;": lambda v: v.astype(np.int16),
    "cvt.u64.u32 %d5, %r1;\n shl.b64 %d5, %d5, 8;\n shr.u64 %d5, %d5, 16;\n cvt.u32.u64 %r2, %d5;": lambda v: v >> 8,
    "shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;": lambda v: v[LANES ^ 5],
    "shfl.sync.idx.b32 %r2, %r1, 3, 31, -1;": lambda v: np.full(32, v[3]),
    "setp.gt.u32 %p1, %r0, 9;\n mov.b32 %r2, 1;\n @%p1 bra $L1;\n mov.b32 %r2, 2;\n$L1:": lambda v: 1 + (LANES <= 9),
}
FLOATS = {
    "fma.rn.f32 %r2, %r1, %r1, 0f3F800000;": lambda v: (v.astype(np.float64) * v + 1).astype(np.float32),
    "neg.f32 %r2, %r1;": lambda v: -v,
    "ex2.approx.ftz.f32 %r2, %r1;": np.exp2,
    "max.f32 %r2, %r1, 0f00000000;": lambda v: np.fmax(v, 0),
    "max.NaN.f32 %r2, %r1, 0f00000000;": lambda v: np.maximum(v, 0),
    "cvt.rna.tf32.f32 %r2, %r1;": lambda v: (v.view(np.uint32) + 0x1000 & 0xFFFFE000).view(np.float32),
    "cvt.rn.bf16.f32 %h1, %r1;\n cvt.f32.bf16 %r2, %h1;": lambda v: from_bfloat16(to_bfloat16(v)),
    "cvt.rn.f16.f32 %h1, %r1;\n cvt.f32.f16 %r2, %h1;": lambda v: v.astype(np.float16).astype(np.float32),
    "setp.num.f32 %p1, %r1, %r1;\n selp.f32 %r2, %r1, 0f3F800000, %p1;": lambda v: np.where(np.isnan(v), 1, v),
}


@pytest.mark.parametrize("body", RESULTS)
def test_integers(body: str) -> None:
    values = np.random.default_rng(0).integers(0, 2**32, 32, np.uint32)
    with np.errstate(over="ignore"):
        want = np.asarray(RESULTS[body](values)).astype(np.int64) & 0xFFFFFFFF
    assert run(body, values).tolist() == want.tolist()


@pytest.mark.parametrize("body", FLOATS)
def test_floats(body: str) -> None:
    values = np.random.default_rng(0).standard_normal(32, np.float32)
    values[:3] = 0.0, np.nan, -65504.0
    want = np.asarray(FLOATS[body](values)).astype(np.float32)
    np.testing.assert_array_equal(run(body, values).view(np.float32), want)


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    torch = pytest.importorskip("torch")
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100
    bits = to_bfloat16(values.numpy())
    assert torch.equal(torch.from_numpy(from_bfloat16(bits)), values.bfloat16().float())


ADDRESS = "shl.b32 %r3, %r0, 2;\n"
FAULTS = {
    "frobnicate.b32 %r2, %r1;": "unknown instruction frobnicate.b32 %r2, %r1",
    "add.cc.s32 %r2, %r1, 1;": r"unknown modifier .cc in add.cc.s32",
    "add.s8 %r2, %r1, 1;": "unknown type in add.s8",
    "ld.global.L1::evict_last.b32 %r2, [%d3];": "unknown modifier .L1::evict_last",
    "atom.global.add.u32 %r2, [%d3], 1;": "unknown instruction atom",
    "mov.b32 %r2, %nosuch;": "neither a register nor a constant: %nosuch",
    "ld.global.b32 %r2, [%d3+4];": "outside of every tensor, 1 of 32 lanes",
    "ld.global.v2.b32 {%r2, %r4}, [%d3];": "misaligned access to global memory",
    ADDRESS + "ld.shared.b32 %r2, [%r3];": "uninitialised shared memory is read",
    ADDRESS + "st.shared.b32 [%r3+4000], %r1;": "shared memory has 4096 bytes, 4000 to 4128 are accessed",
    ADDRESS + "st.shared.b32 [%r3+2], %r1;": "misaligned access to shared memory",
    "mov.b32 %r3, 0;\n st.shared.b32 [%r3], %r1;": "conflicting store, two lanes write different values",
    "st.global.b32 [%d1], %r1;": "conflicting store",
    "setp.gt.u32 %p1, %r0, 9;\n @%p1 bra $L1;\n bar.sync 0;\n$L1:": "a barrier that not all lanes reach",
}


@pytest.mark.parametrize("body", FAULTS)
def test_what_is_refused(body: str) -> None:
    with pytest.raises(Fault, match=FAULTS[body]):
        run(body, LANES)


TURNED = ADDRESS + "st.shared.b32 [%r3], %r1;\n BARRIER xor.b32 %r4, %r3, 256;\n ld.shared.b32 %r2, [%r4];"


@pytest.mark.parametrize("order", ["together", "warps", "reversed"])
def test_warps_that_exchange_values_need_a_barrier(order: str) -> None:
    values = np.arange(128, dtype=np.uint32) * 3
    with_barrier = run(TURNED.replace("BARRIER", "bar.sync 0;"), values, order=order)
    assert with_barrier.tolist() == np.roll(values.reshape(2, -1), 1, 0).reshape(-1).tolist()
    with pytest.raises(Fault, match=r"race in shared memory|uninitialised"):
        run(TURNED.replace("BARRIER", ""), values, order=order)


def test_blocks_may_not_write_what_others_read() -> None:
    body = "ld.global.b32 %r2, [%d4];\n mov.u32 %r3, %ctaid.x;\n add.s32 %r2, %r2, %r3;"
    with pytest.raises(Fault, match="race in global memory"):
        run(body, LANES, blocks=2)


def test_two_warps_that_write_the_same_value_are_counted() -> None:
    body = "and.b32 %r3, %r0, 31;\n shl.b32 %r3, %r3, 2;\n mov.b32 %r2, 5;\n st.shared.b32 [%r3], %r2;"
    source = HEAD % 64 + body + "\n ret;\n}\n"
    values = np.zeros(64, np.uint32)
    memory = GlobalMemory([(values.ctypes.data, values.nbytes)])
    _, same = launch(parse(source), (1, 1, 1), [values.ctypes.data] * 2, memory, 4096, Schedule())
    assert same.total() == 32 * 4  # bytes
