"""torch's library against oneDNN, product by product."""

import json
from pathlib import Path

import pytest
import torch

from routingvl.benchmarks import cpu_products
from routingvl.kernels.cpu_library import MEASURED

RESULTS = Path(cpu_products.__file__).with_name("results") / "cpu_products.jsonl"


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN operation")
def test_a_row_for_each_product_and_for_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.jsonl"
    assert cpu_products.main(["--rows", "8", "--repeats", "3", "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["product"] for row in rows] == [*cpu_products.PRODUCTS, "layer"]
    assert all(row["ratio_p20"] <= row["ratio_p50"] <= row["ratio_p80"] and row["isa"] for row in rows)
    assert capsys.readouterr().out.count("ratio") == len(rows)


def test_products_have_the_sizes_of_the_layer() -> None:
    for name in cpu_products.PRODUCTS:
        left, right = cpu_products.operands(name, 5)
        assert left.shape[1] == right.shape[0], name


def test_the_table_follows_the_committed_rows() -> None:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    found: dict[str, set[bool]] = {}
    for row in rows:
        if row["product"] == "layer" and "Intel" in row["device"]:
            found.setdefault(row["isa"], set()).add(row["ratio_p50"] > 1)
    assert found == {isa: {faster} for (maker, isa), faster in MEASURED.items() if maker == "GenuineIntel"}
