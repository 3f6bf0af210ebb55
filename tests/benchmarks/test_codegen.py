"""Machine code of the kernels, compiled here for GPUs that are not here: registers, shared memory, instructions."""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from routingvl.benchmarks import codegen
from routingvl.benchmarks.codegen import (
    ARCHITECTURES,
    VARIANTS,
    Configuration,
    Usage,
    configurations,
    examine,
    problems,
)
from routingvl.benchmarks.machine_code import code_of, spilled_bytes_in
from routingvl.kernels.triton_common.tiles import shared_memory

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).parents[2]
MUL = Configuration("lora_forward", "mul", 128, "half", False, "sm_90")
# One of each kernel and of each architecture; the exhaustive test below takes all.
REPRESENTATIVE = (
    MUL,
    replace(MUL, kernel="lora_backward", arch="sm_80"),
    replace(MUL, kernel="lora_forward", rank=256, decode=True, arch="gfx942"),
    replace(MUL, kernel="adapter_forward", variant="mul gelu"),
    replace(MUL, kernel="adapter_backward", variant="mul gelu"),
    replace(MUL, kernel="adapter_forward", variant="mul gelu", arch="gfx942"),
    replace(MUL, kernel="adapter_forward", variant="rank one gelu", arch="sm_100"),
    replace(MUL, kernel="rank_one_forward", variant="plain", rank=16),
    replace(MUL, kernel="rank_one_backward", variant="dropout", rank=16, arch="sm_100"),
)


def check(chosen: list[Configuration] | tuple[Configuration, ...]) -> None:
    bad = []
    for configuration, usage in examine(chosen):
        where = f"{configuration} on {configuration.arch}"
        bad += [f"{where}: {fault}" for fault in problems(configuration, usage)]
        size = 2 if configuration.precision == "half" else 4
        kind = configuration.tile_kind
        estimate = shared_memory(kind, configuration.tile, configuration.rank, size, configuration.arch)
        if usage.shared_memory > estimate:
            bad.append(f"{where}: {usage.shared_memory} bytes of shared memory, {estimate} estimated")
    assert not bad, "\n".join(bad)


def test_representative_configurations_compile_well() -> None:
    check(REPRESENTATIVE)


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_shipped_configuration_compiles_well(arch: str) -> None:
    check(list(configurations([arch])))


def test_every_kernel_is_among_the_configurations() -> None:
    from routingvl.kernels.adapter import triton as triton_adapter
    from routingvl.kernels.lora import rank_one as triton_rank_one
    from routingvl.kernels.lora import triton as triton_lora

    modules = (triton_adapter, triton_lora, triton_rank_one)
    kernels = {name.removesuffix("_kernel") for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert kernels == set(VARIANTS)
    assert {configuration.kernel for configuration in configurations()} == kernels


def test_problems_are_named() -> None:
    good = Usage(150, 0, 96 * 1024, {"wgmma.mma_async": 12})
    assert problems(MUL, good) == []
    few = replace(good, spills=12, spilled_bytes=48)
    assert problems(MUL, few) == []
    many = replace(good, spills=400, spilled_bytes=1600)  # 64 rows of 768 halves, read and written by 128 threads: 1536
    assert problems(MUL, many) == ["400 spills move 1600 bytes a thread, more than 1536"]
    assert problems(replace(MUL, few=True), many) == problems(MUL, many)
    assert problems(replace(MUL, kernel="lora_backward", few=True), replace(many, spilled_bytes=1000)) == [
        "400 spills move 1000 bytes a thread, more than 768"  # of 256
    ]
    assert problems(replace(MUL, rank=256, arch="gfx942"), replace(few, spilled_bytes=769))[0].startswith("12 spills")
    assert problems(MUL, replace(good, shared_memory=240_000)) == ["240000 bytes of shared memory exceed 232448"]
    assert problems(MUL, replace(good, matrix={"mma.sync": 64})) == ["no wgmma"]
    assert "no matrix instructions" in problems(replace(MUL, arch="sm_80"), replace(good, matrix={}))
    assert problems(replace(MUL, precision="ieee"), replace(good, matrix={})) == []


def test_spills_in_a_loop_count_once_a_step() -> None:
    listing = """
        /*0010*/                   STL.64 [R1+0x8], R98 ;     /* 0x0000086301007387 */
        /*0020*/              @!P5 BRA 0x60 ;                 /* 0x000000080030d947 */
        /*0030*/               @P1 LDL.LU R82, [R1+0x4] ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/              @!P5 BRA 0x30 ;
        /*0060*/                   LDL.LU.128 R8, [R1+0x10] ;
        /*0070*/                   BRA 0x70;
        /*0080*/                   STL.U16 [R1], R3 ;
    """
    assert spilled_bytes_in(listing) == 8 + 12 * 4 + 16 + 2


def test_tiles_are_those_of_launches() -> None:
    backward = replace(MUL, kernel="lora_backward")
    assert (backward.tile.num_warps, replace(backward, few=True).tile.num_warps) == (4, 8)
    assert replace(backward, variant="mul dropout").tile.maxnreg == 128
    rank_one = Configuration("rank_one_backward", "plain", 16, "half", False, "sm_80")
    assert rank_one.tile.block_m == 32  # an image has 20 rows, which one program takes
    few = {one for one in configurations(["sm_90"]) if one.few}
    assert replace(backward, few=True) in few
    assert all(one.tile != replace(one, few=False).tile for one in few)


def test_rows_that_are_kept_have_no_problems() -> None:
    lines = (ROOT / "benchmarks" / "results" / "codegen.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = [(Configuration(**row["configuration"]), Usage(**row["usage"])) for row in rows]
    assert len({configuration for configuration, _ in found}) == len(found) > 0
    assert [(str(one), fault) for one, usage in found for fault in problems(one, usage)] == []


def test_code_is_told_apart_by_what_it_does_alone(tmp_path: Path) -> None:
    from triton import JITFunction
    from triton.language import constexpr

    inner = "def inner(x):\n    return x + SIDE\n"
    outer = 'def outer(x):\n    """What it does."""\n    return inner(x)  # why\n'

    def code(name: str, text: str, side: int = 16) -> list[str]:
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("one_name", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.SIDE, module.inner = constexpr(side), JITFunction(module.inner)
        return code_of(JITFunction(module.outer))

    first = code("first", inner + outer)
    assert len(first) == 3
    assert code("moved", "# comment\n\n\n" + outer.replace("What", "All that") + "\n\n" + inner) == first
    assert code("inner", inner.replace("+", "-") + outer) != first
    assert code("constant", inner + outer, side=32) != first


def test_the_table_has_a_line_a_configuration_and_a_column_an_architecture() -> None:
    usage = Usage(150, 0, 96 * 1024, {"wgmma.mma_async": 12})
    text = codegen.table([(MUL, usage), (replace(MUL, arch="gfx942"), replace(usage, matrix={}))])
    assert text.splitlines()[0] == "| configuration | sm_90 | gfx942 |"
    assert text.splitlines()[2].startswith("| lora_forward mul r128 half | 64x64x64 4w 3s: 150, 0, 96, 12 wgmma |")


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, compiled = Usage(150, 0, 96 * 1024, {"wgmma.mma_async": 12}), []
    monkeypatch.setattr(codegen, "fingerprint", lambda configuration: "source 1")
    monkeypatch.setattr(codegen, "usage_of", lambda configuration: compiled.append(configuration) or usage)
    path, other = tmp_path / "rows.jsonl", replace(MUL, rank=64)
    assert codegen.Results(path).usage(MUL) == usage
    with path.open("a") as file:
        file.write('{"configuration": {"ker')  # killed as it wrote
    results = codegen.Results(path)
    assert [results.usage(MUL), results.usage(other)] == [usage, usage]
    assert compiled == [MUL, other]
    codegen.Results(path).usage(other)
    monkeypatch.setattr(codegen, "fingerprint", lambda configuration: "source 2")
    codegen.Results(path).usage(MUL)
    assert compiled == [MUL, other, MUL]  # compiled anew because the source changed
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1 is no result of codegen"):
        codegen.Results(path)


def test_the_interpreter_cannot_compile() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("this process compiles")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set"):
        codegen.usage_of(MUL)
