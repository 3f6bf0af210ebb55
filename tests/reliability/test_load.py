"""Under load: nothing grows in 2,000 steps or predictions, threads and builders share a feature cache."""

import ctypes
import gc
import os
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import Child, command, config_file
from PIL import Image
from tiny import tiny_config

from routingvl.cache_features import cache_features
from routingvl.data.feature_cache import FeatureCache
from routingvl.predict import Predictor
from routingvl.train import train

STEPS, THREADS, BUILDERS = 2000, 8, 4


class AllocatorTotals(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)


def census() -> dict[str, float]:
    """What may not grow: memory handed out by C's allocator (tensors, torch's nodes) and by Python's, open files,
    threads, tensors and all other objects. Resident pages would also count what a fork has not touched yet.
    """
    gc.collect()
    mallinfo2.restype = AllocatorTotals
    totals = mallinfo2()
    objects = gc.get_objects()
    return {
        "MiB": (totals.uordblks + totals.hblkhd) / 2**20,
        "blocks": sys.getallocatedblocks(),
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "tensors": sum(issubclass(type(found), torch.Tensor) for found in objects),
        "objects": len(objects),
    }


def assert_level(before: dict[str, float], after: dict[str, float], repeats: int) -> None:
    """No file, thread or tensor more, and less than one object in ten repeats (a log may keep some)."""
    grown = {name: after[name] - before[name] for name in before}
    text = f"{grown} in {repeats}"
    assert grown["open files"] <= 1, text
    assert grown["threads"] <= 0, text
    assert grown["tensors"] <= 2, text
    assert grown["objects"] <= repeats / 10, text
    assert grown["blocks"] <= repeats, text
    assert grown["MiB"] <= 1, text  # the faulty hook took 10 in 1,000 of these steps


needs_glibc = pytest.mark.skipif(mallinfo2 is None, reason="needs glibc 2.33")


@pytest.mark.slow
@needs_glibc
@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("vqa", {"routing.routing": "add"}),
        ("vqa", {"routing.routing": "vllora", "routing.dropout": 0.1, "data.workers": 2}),
        ("caption", {"routing.routing": "expand"}),
        ("classify", {"routing.routing": "mul", "routing.method": "adapter"}),
    ],
    ids=str,
)
def test_training_does_not_grow(task: str, settings: dict, tiny: Path, tmp_path: Path) -> None:
    """The leak of issue 13 was one binding of tensors a step."""
    counts: list[dict[str, float]] = []

    def count(record: dict) -> None:
        if record["kind"] == "train" and record["step"] in (STEPS // 2, STEPS):
            counts.append(census())

    settings = {"max_steps": STEPS, "log_every": STEPS // 2, "save_every": STEPS, "eval_every": 0, **settings}

    def soak() -> None:
        train(tiny_config(tiny, tmp_path / "run", task, **settings), log=count)
        assert len(counts) == 2
        assert_level(*counts, STEPS // 2)

    Child(task=soak).wait(280).assert_fine()


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioning run with a feature cache beside it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    cache = str(run.parent / "features")
    settings = {"max_steps": 2, "data.feature_cache": cache, "num_beams": 1}
    command("train", "--config", config_file(tiny, run, "caption", **settings)).assert_fine()
    return run


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(60)]
    for number, path in enumerate(paths):
        Image.new("RGB", (9, 9), (number * 4, 255 - number * 4, number)).save(path)
    return paths


@pytest.mark.slow
@needs_glibc
def test_predictions_do_not_grow(run: Path, pictures: list[Path]) -> None:
    predictor = Predictor(run)

    def some(count: int) -> None:
        for number in range(count):
            predictor.caption([pictures[number % len(pictures)]])

    some(STEPS // 2)
    before = census()
    some(STEPS // 2)
    assert_level(before, census(), STEPS // 2)


@pytest.mark.parametrize("cached", [False, True], ids=["without a cache", "with a cache"])
def test_a_predictor_serves_many_threads(cached: bool, run: Path, pictures: list[Path], tmp_path: Path) -> None:
    expected = Predictor(run, **{"data.feature_cache": None}).caption(pictures)
    predictor = Predictor(run, **{"data.feature_cache": str(tmp_path / "features") if cached else None})
    with ThreadPoolExecutor(THREADS) as threads:
        parts = [pictures[number % 5 :: 5] for number in range(5 * THREADS)]
        found = list(threads.map(predictor.caption, parts))
    for part, captions in zip(parts, found, strict=True):
        assert captions == [expected[pictures.index(path)] for path in part]


def test_many_builders_of_one_cache(tiny: Path, tmp_path: Path) -> None:
    """Each finishes, and what they leave is complete and read as computed."""
    config = tiny_config(tiny, tmp_path / "run", "vqa")
    config = replace(config, data=replace(config.data, feature_cache=str(tmp_path / "features")))
    children = [Child(task=lambda: cache_features(config, ("train", "val"))) for _ in range(BUILDERS)]
    for child in children:
        child.wait().assert_fine()
    again = cache_features(config, ("train", "val"))
    assert [(found, computed) for _, found, computed in again] == [(12, 0), (4, 0)]


@pytest.mark.parametrize("what", ["cut", "deleted", "overwritten"])
def test_cache_files_that_change_while_they_are_read(what: str, tmp_path: Path) -> None:
    """An error or the right features, not the end of the process (SIGBUS)."""
    images, width = 500, 64

    def read() -> None:
        digests = [number.to_bytes(32, "little") for number in range(images)]
        features = torch.arange(images * width, dtype=torch.float32).view(images, 1, width)
        FeatureCache(tmp_path, {"model": "tiny"}, (1, width), torch.float32).add(digests, features)
        cache = FeatureCache(tmp_path, {"model": "tiny"}, (1, width), torch.float32)
        outcomes = Counter()
        for number in range(images):
            if number == images // 2:
                for path in tmp_path.rglob("*"):
                    if path.is_file() and path.stat().st_size > images * width:
                        damage(path)
            try:
                found = cache.find(digests[number])
            except ValueError:
                outcomes["error"] += 1
            else:
                outcomes["missing" if found is None else "right"] += 1
                assert found is None or torch.equal(found.float().view(1, width), features[number])
        assert outcomes["right"] >= images // 2

    def damage(path: Path) -> None:
        if what == "cut":
            os.truncate(path, 100)
        elif what == "deleted":
            path.unlink()
        else:
            path.write_bytes(b"\x07" * path.stat().st_size)

    Child(task=read).wait().assert_fine()
