"""Tuned tiles: the file of ROUTINGVL_TILES and its errors, and the sweep that writes it."""

import json
from dataclasses import replace

import pytest
import torch

from routingvl.benchmarks import tune
from routingvl.kernels.optional_triton import interpreted
from routingvl.kernels.triton_common.tile_file import TilesFileError, tile_key
from routingvl.kernels.triton_common.tiles import SHARED_MEMORY, Tile, column_splits, shared_memory, tiles_for

KEY = "sm_90/lora_forward/128/half/many"
TILE = {"block_m": 128, "block_n": 32, "block_k": 64, "num_warps": 8, "num_stages": 2}


@pytest.fixture(autouse=True)
def _fresh():
    tiles_for.cache_clear()
    yield
    tiles_for.cache_clear()


@pytest.fixture
def tiles_file(tmp_path, monkeypatch):
    def write(text):
        path = tmp_path / "tiles.json"
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        monkeypatch.setenv("ROUTINGVL_TILES", str(path))

    return write


def test_the_file_goes_before_the_table(tiles_file):
    table = tiles_for("lora_forward", 128, "half", False, "sm_90")
    others = [("lora_forward", 64, "half", False, "sm_90"), ("lora_forward", 128, "half", True, "sm_90")]
    untouched = [tiles_for(*other) for other in others]
    tiles_file({"tiles": {KEY: TILE}})
    tiles_for.cache_clear()
    found = tiles_for("lora_forward", 100, "half", False, "sm_90")
    assert found[0] == Tile(**TILE) != table[0]
    assert (found[0].maxnreg, found[0].splits) == (0, 0)  # what a file need not say
    assert len(found) > 1  # what does not fit after all can still shrink
    assert [tiles_for(*other) for other in others] == untouched


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "tiles.json cannot be read"),
        ([], "no mapping 'tiles'"),
        ({"tiles": {"sm_90/lora": TILE}}, "'sm_90/lora': a key is architecture/kernel"),
        ({"tiles": {KEY.replace("lora", "loar"): TILE}}, "kernel 'loar_forward' is not one of lora_forward"),
        ({"tiles": {KEY.replace("128", "100"): TILE}}, "padded rank '100' is not one of"),
        ({"tiles": {KEY: {"block_m": 16}}}, f"{KEY}': a tile has the keys block_m"),
        ({"tiles": {KEY: TILE | {"block_m": 48}}}, f"{KEY}': block_m=48 must be a power of two from 16"),
        ({"tiles": {KEY: TILE | {"num_stages": 0}}}, "num_stages=0 must be from 1 to 8"),
        ({"tiles": {KEY: TILE | {"maxnreg": 8}}}, "maxnreg=8 must be 0, or from 24 to 255"),
        ({"tiles": {KEY: TILE | {"splits": True}}}, "splits=True must be 0, or from 1 to 64"),
        ({"tiles": {KEY: TILE | {"step": 1}}}, "may have maxnreg and splits, and no others"),
        ({"tiles": {KEY.replace("sm_90", "gfx942"): TILE | {"maxnreg": 128}}}, "maxnreg=128 is for NVIDIA's GPUs"),
    ],
)
def test_errors_name_file_and_key(tiles_file, content, message):
    tiles_file(content)
    with pytest.raises(TilesFileError, match="ROUTINGVL_TILES=") as raised:
        tiles_for("lora_forward", 128, "half", False, "sm_90")
    assert message in str(raised.value)


def test_a_file_may_limit_registers_and_set_the_shares(tiles_file):
    tiles_file({"tiles": {KEY: TILE | {"maxnreg": 128, "splits": 3}}})
    tiles_for.cache_clear()
    found = tiles_for("lora_forward", 128, "half", False, "sm_90")
    assert {(tile.maxnreg, column_splits(tile, 64, 768, 132)) for tile in found} == {(128, 3)}
    assert tune.tile_name(found[0]) == "128x32x64x8x2x128x3"


def test_a_missing_file(monkeypatch, tmp_path):
    monkeypatch.setenv("ROUTINGVL_TILES", str(tmp_path / "none.json"))
    with pytest.raises(TilesFileError, match=r"none\.json cannot be read"):
        tiles_for("lora_forward", 128, "half", False, "sm_90")


def test_dry_run_lists_what_fits(capsys):
    assert tune.main(["--dry-run", "--arch", "sm_86", "--rank", "256"]) == 0
    if not torch.cuda.is_available():
        assert tune.main([]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert {line.partition(":")[0] for line in lines} == {
        tile_key("sm_86", *cell) for cell in tune.cells([256], ["half"])
    }
    for line in lines:
        key, _, names = line.split(": ")
        kind = key.split("/")[1]
        tiles = [Tile(*map(int, name.split("x"))) for name in names.split()]
        assert all(shared_memory(kind, tile, 256, 2, "sm_86") <= SHARED_MEMORY["sm_86"] for tile in tiles)
        assert len(tiles) < 72 or kind.startswith("rank_one")


def test_a_sweep_keeps_the_fastest_right_tile_and_resumes(tmp_path):
    path, seen = tmp_path / "tiles.json", []
    tiles = [Tile(16, 32, 32, 4, 2), Tile(32, 32, 32, 4, 2), Tile(64, 32, 32, 4, 2)]

    def measure(tile):
        seen.append(tile)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return {16: 2.0, 32: "y is wrong", 64: 1.0}[tile.block_m]

    with pytest.raises(KeyboardInterrupt):
        tune.tune_cell(path, KEY, tiles, measure)
    assert tune.tune_cell(path, KEY, tiles, measure) == tiles[2]
    assert seen == [*tiles, tiles[2]]
    assert json.loads(path.read_text())["measured"][KEY]["32x32x32x4x2"] == "y is wrong"
    assert json.loads(path.read_text())["tiles"][KEY] == {**TILE, "block_m": 64, "block_k": 32, "num_warps": 4}
    finer = tune.refinements("lora_forward", tiles[2], "sm_90")
    wanted = replace(tiles[2], maxnreg=128, splits=4)
    assert tune.tune_cell(path, KEY, finer, lambda tile: 0.5 if tile == wanted else 2.0) == wanted
    assert {tile.splits for tile in tune.refinements("rank_one_backward", tiles[2], "sm_90")} == {0}
    assert {tile.maxnreg for tile in tune.refinements("lora_forward", tiles[2], "gfx942")} == {0}


@pytest.mark.skipif(not interpreted(), reason="on a CPU the kernels run only when interpreted")
@pytest.mark.parametrize(("kind", "decode"), [("lora_forward", True), ("adapter_backward", False)])
def test_measuring_checks_the_results(kind, decode, monkeypatch):
    sizes = {"B": 2, "T": 4, "K": 24, "N": 24, "R": 8}
    tile = Tile(16, 16, 16, 4, 2)
    assert tune.measure(kind, tile, "ieee", decode, (sizes, sizes), "cpu", repeats=1) > 0
    monkeypatch.setattr(tune, "missed_by", lambda *rest: ["y is wrong"])
    assert tune.measure(kind, tile, "ieee", decode, (sizes, sizes), "cpu", repeats=1) == "y is wrong"
