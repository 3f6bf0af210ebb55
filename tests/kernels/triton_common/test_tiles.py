"""The table of tiles: it fits every device, has an answer for unknown ones, and never looks at the exact row count."""

import itertools
from dataclasses import replace

import pytest
import torch

from routingvl.kernels.triton_common import launch, tiles
from routingvl.kernels.triton_common.tiles import (
    DECODE_ROWS,
    KINDS,
    SHARED_MEMORY,
    UNKNOWN_SHARED_MEMORY,
    Tile,
    arch_of,
    column_splits,
    family_of,
    padded_rank,
    precision_of,
    shared_memory,
    shrunken,
    tiles_for,
    tiles_for_call,
)

EVERY = list(itertools.product(KINDS, (1, 13, 16, 64, 100, 128, 256), ("half", "tf32", "ieee"), (False, True)))
SMALLEST = {warps: Tile(16, 16, 16, warps, 1) for warps in (4, 8)}


@pytest.mark.parametrize("arch", [*SHARED_MEMORY, "sm_70", "gfx1100", "default"])
def test_every_tile_fits(arch: str) -> None:
    limit = SHARED_MEMORY.get(arch, UNKNOWN_SHARED_MEMORY)
    for kind, rank, precision, decode in EVERY:
        tiles = tiles_for(kind, rank, precision, decode, arch)
        assert tiles
        for tile in tiles:
            need = shared_memory(kind, tile, rank, 2 if precision == "half" else 4, arch)
            assert need <= limit or tile == SMALLEST[tile.num_warps]
            sizes = (tile.block_m, tile.block_n, tile.block_k, tile.num_warps)
            assert all(size & (size - 1) == 0 for size in sizes)
            assert min(sizes[:3]) >= 16
            assert tile.num_stages >= 1


def test_each_alternative_is_smaller() -> None:
    for kind, rank, precision, decode in EVERY:
        if not kind.startswith("rank_one"):
            tiles = tiles_for(kind, rank, precision, decode, "sm_90")
            needs = [shared_memory(kind, tile, rank, 2, "sm_90") for tile in tiles]
            assert needs == sorted(needs, reverse=True)
            assert len(needs) > 1


def test_shrunken_ends_with_the_smallest_tile() -> None:
    tiles = list(shrunken(Tile(64, 64, 32, 8, 3)))
    assert tiles[0] == Tile(64, 64, 32, 8, 2)
    assert tiles[-1] == Tile(16, 16, 16, 8, 1)
    assert len(set(tiles)) == len(tiles)


def test_less_shared_memory_gives_smaller_tiles() -> None:
    def need(arch: str) -> int:
        tile = tiles_for("adapter_forward", 256, "half", False, arch)[0]
        return shared_memory("adapter_forward", tile, 256, 2, arch)

    assert need("sm_90") > SHARED_MEMORY["sm_75"]
    assert all(need(arch) < need("sm_90") for arch in ("sm_75", "sm_86", "sm_120", "gfx942"))


def test_few_rows_take_the_decode_tile_and_no_other_count_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "arch_of", lambda device: "sm_90")

    def tile(kind: str, rows: int) -> Tile:
        return launch.fitting_tiles(kind, 128, torch.empty(rows, 1, dtype=torch.bfloat16))[0]

    for kind in ("lora_forward", "adapter_forward"):
        assert tile(kind, 40).block_m == 16
        assert tile(kind, DECODE_ROWS + 1).block_m == 64
        assert len({tile(kind, rows) for rows in range(DECODE_ROWS + 1, 5000, 7)}) == 1


@pytest.mark.parametrize(
    ("arch", "family"),
    [
        ("sm_75", "sm_80"),
        ("sm_86", "sm_80"),
        ("sm_90", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_120", "sm_80"),
        ("gfx942", "gfx942"),
        ("gfx90a", "gfx942"),
        ("gfx1100", "default"),
        ("default", "default"),
    ],
)
def test_family(arch: str, family: str) -> None:
    assert family_of(arch) == family


def test_an_architecture_may_differ_from_its_family() -> None:
    tiles = {arch: tiles_for("adapter_backward", 128, "ieee", False, arch)[0] for arch in ("sm_80", "sm_86", "sm_120")}
    assert tiles["sm_120"].block_m < tiles["sm_86"].block_m == tiles["sm_80"].block_m


def test_a_cpu_is_no_known_architecture() -> None:
    assert arch_of(torch.device("cpu")) == "default"


def test_precision_obeys_torch() -> None:
    assert precision_of(torch.float16, "sm_90") == "half"
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        assert precision_of(torch.float32, "sm_90") == "ieee"
        torch.backends.cuda.matmul.allow_tf32 = True
        assert precision_of(torch.float32, "sm_90") == "tf32"
        assert precision_of(torch.float32, "sm_75") == precision_of(torch.float32, "gfx942") == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_padded_rank() -> None:
    assert [padded_rank(rank) for rank in (1, 16, 17, 96, 128, 129, 256)] == [16, 16, 32, 128, 128, 256, 256]
    for rank in (0, 257):
        with pytest.raises(ValueError, match=f"ranks 1 to 256, got {rank}"):
            padded_rank(rank)


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(KeyError, match="lora_sideways"):
        tiles_for("lora_sideways", 16, "half", False, "sm_90")


def test_tiles_of_a_call_on_hopper() -> None:
    def first(kind: str, arch: str = "sm_90", rank: int = 128, precision: str = "half", **call: bool) -> Tile:
        return tiles_for_call(kind, rank, precision, False, arch, **call)[0]

    for kind in ("lora_backward", "adapter_backward"):
        assert first(kind).num_warps == 4
        assert {first(kind, **{why: True}).num_warps for why in ("few", "dropout", "relu")} == {8}
    assert first("lora_backward", dropout=True).maxnreg == 128
    assert (
        first("lora_backward", dropout=True, few=True).maxnreg == first("adapter_backward", dropout=True).maxnreg == 0
    )
    assert first("adapter_forward", few=True) == first("adapter_forward")
    assert first("adapter_forward", few=True, one_wave=True) == Tile(16, 128, 128, 4, 3)
    forward = first("lora_forward")
    assert first("lora_forward", few=True) == forward
    assert first("lora_forward", few=True, dropout=True) == replace(forward, block_m=16)
    assert first("lora_forward", dropout=True) == replace(forward, num_warps=8)
    assert first("rank_one_backward") == Tile(16, 128, 128, 1, 2)
    assert first("rank_one_backward", two_parts=True) == Tile(32, 128, 128, 2, 2)
    assert first("rank_one_backward", few=True) == Tile(16, 512, 512, 4, 2)
    call = {"few": True, "one_wave": True, "dropout": True}
    for kind in KINDS:
        assert first(kind, "sm_80", **call) == tiles_for(kind, 128, "half", False, "sm_80")[0]
        assert first(kind, precision="ieee", **call) == tiles_for(kind, 128, "ieee", False, "sm_90")[0]


def test_an_image_of_two_parts_is_one_program_of_a_rank_one_kernel() -> None:
    for arch, precision in (("sm_80", "half"), ("sm_120", "ieee"), ("sm_90", "half")):
        single = tiles_for("rank_one_backward", 1, precision, False, arch)[0]
        both = tiles_for_call("rank_one_backward", 1, precision, False, arch, two_parts=True)[0]
        assert both == replace(single, block_m=32, num_warps=2 * single.num_warps)
    for arch in ("gfx942", "default"):
        both = tiles_for_call("rank_one_backward", 1, "half", False, arch, two_parts=True)
        assert both == tiles_for("rank_one_backward", 1, "half", False, arch)


def test_column_splits_fill_the_device_when_rows_are_few() -> None:
    tile = Tile(64, 64, 64, 4, 3)
    assert column_splits(tile, 10240, 768, 132) == 1
    assert column_splits(tile, 2040, 768, 132) == 4  # 32 blocks of rows: no program waits
    assert column_splits(tile, 100, 100, 132) == 2  # no program without columns
    assert column_splits(Tile(16, 64, 64, 4, 3), 40, 4096, 132) == 32


@pytest.mark.parametrize(
    ("arch", "half", "float32"),
    [("sm_90", "tf32", "tf32"), ("sm_75", "ieee", "ieee"), ("gfx942", "tf32", "ieee")]
    + [(arch, "ieee", "ieee") for arch in ("gfx90a", "gfx950", "gfx1100", "gfx1201")],
)
def test_products_ask_for_tf32_only_where_there_is_such_a_thing(
    monkeypatch: pytest.MonkeyPatch, arch: str, half: str, float32: str
) -> None:
    """Of what tl.dot is asked for; operands in half precision compile with either on what has both."""
    monkeypatch.setattr(launch, "arch_of", lambda device: arch)
    monkeypatch.setattr(tiles, "tf32_allowed", lambda: True)
    asked = [launch.product_precision(torch.empty(1, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    assert asked == [half, float32]
