"""The files of the feature cache: round trips, writers side by side, breaks at any byte, damage."""

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from routingvl.data.feature_cache import FeatureCache, FeatureCacheError, FileDigests, StoredFeatures, file_stat

KEY = {"weights": "w", "kind": "pooler"}
RECORD = 48
ROOT = Path(__file__).parents[2]


def digest(number):
    return hashlib.sha256(str(number).encode()).digest()


def rows(*numbers, shape=(2, 4)):
    """Features that tell which image they are of."""
    return torch.stack([torch.full(shape, float(n)) + torch.arange(shape[1]) / 8 for n in numbers])


def opened(root, shape=(2, 4), dtype=torch.float32, **key):
    return FeatureCache(root, KEY | key, shape, dtype)


def filled(root, count=5, **options):
    cache = opened(root, **options)
    cache.add([digest(n) for n in range(count)], rows(*range(count)))
    return cache


def only(cache, ending):
    (path,) = cache.directory.glob(f"*{ending}")
    return path


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    values = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
    cache = opened(tmp_path, dtype=dtype)
    cache.add([digest(0), digest(1)], values[:2])
    cache.add([digest(n) for n in (2, 3, 4)], values[2:])
    assert cache.find(digest(0)) is None, "found before it was read back"
    cache.refresh()
    again = opened(tmp_path, dtype=dtype)
    for reader in (cache, again):
        found = torch.stack([reader.find(digest(n)) for n in range(5)])
        assert found.dtype == dtype
        assert torch.equal(found, values.to(dtype))
    assert again.find(digest(9)) is None
    assert len(again.digests()) == 5


def test_bad_features_and_folders_are_refused(tmp_path):
    cache = opened(tmp_path / "half", dtype=torch.float16)
    with pytest.raises(FeatureCacheError, match=r"not finite as float16; use data.feature_dtype=float32"):
        cache.add([digest(0)], torch.full((1, 2, 4), 1e5))
    with pytest.raises(FeatureCacheError, match=r"need features \[1, 2, 4\], not \[1, 2, 5\]"):
        cache.add([digest(0)], torch.zeros(1, 2, 5))
    with pytest.raises(FeatureCacheError, match="float64"):
        opened(tmp_path, dtype=torch.float64)
    (tmp_path / "file").write_text("")
    with pytest.raises(FeatureCacheError, match="file is a file; name a folder"):
        opened(tmp_path / "file")
    (cache.directory / "features.json").write_text("{}")
    with pytest.raises(FeatureCacheError, match=r"features.json describes other features.*delete the folder"):
        opened(tmp_path / "half", dtype=torch.float16)


@pytest.mark.parametrize("damaged", [b"", b'{"layout', b"\xff\xfe", b"[]", b"[" * 10_000])
def test_a_damaged_description_costs_no_features(tmp_path, caplog, damaged):
    path = filled(tmp_path).directory / "features.json"
    whole = path.read_bytes()
    path.write_bytes(damaged)
    assert len(opened(tmp_path).digests()) == 5
    assert f"{path} is damaged" in caplog.text
    assert path.read_bytes() == whole


def test_another_key_is_a_miss(tmp_path):
    filled(tmp_path)
    others = [{"weights": "x"}, {"kind": "tokens"}, {"dtype": torch.float16}, {"shape": (4, 2)}, {"extra": 1}]
    for other in others:
        assert len(opened(tmp_path, **other).digests()) == 0
    assert len(opened(tmp_path).digests()) == 5


def test_index_cut_at_every_byte(tmp_path):
    cache = filled(tmp_path / "whole")
    whole = only(cache, ".index").stat().st_size
    assert whole == 5 * RECORD
    for size in range(whole + 1):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        cut = tmp_path / "cut" / cache.directory.name
        os.truncate(next(cut.glob("*.index")), size)
        reader = opened(tmp_path / "cut")
        found = [reader.find(digest(n)) for n in range(5)]
        for n, row in enumerate(found):
            assert (row is not None) == (n < size // RECORD)
            assert row is None or torch.equal(row, rows(n)[0])
        # Continuing fills the gap, and the torn end stays out of the way.
        reader.add([digest(n) for n in range(5) if found[n] is None], rows(*range(5))[size // RECORD :])
        again = opened(tmp_path / "cut")
        assert all(torch.equal(again.find(digest(n)), rows(n)[0]) for n in range(5))


def test_rows_cut_at_every_byte(tmp_path, caplog):
    cache = filled(tmp_path / "whole")
    row_bytes = cache.row_bytes
    for size in range(5 * row_bytes):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        cut = next((tmp_path / "cut" / cache.directory.name).glob("*.rows"))
        os.truncate(cut, size)
        caplog.clear()
        reader = opened(tmp_path / "cut")
        assert [reader.find(digest(n)) is not None for n in range(5)] == [n < size // row_bytes for n in range(5)]
        assert f"{cut} is shorter than its index says" in caplog.text
    cut.unlink()
    assert len(opened(tmp_path / "cut").digests()) == 0


def test_damage_is_found_named_and_repaired(tmp_path, caplog):
    cache = filled(tmp_path)
    for ending, position, lost in ((".rows", 2 * cache.row_bytes + 7, 2), (".index", 3 * RECORD + 5, 3)):
        path = only(cache, ending)
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)
        caplog.clear()
        reader = opened(tmp_path)
        assert reader.find(digest(lost)) is None
        assert reader.find(digest(4)) is not None
        assert str(path) in caplog.text
    reader.find(digest(2))
    reader.add([digest(2), digest(3)], rows(2, 3))
    again = opened(tmp_path)
    assert all(torch.equal(again.find(digest(n)), rows(n)[0]) for n in range(5))


def test_after_a_failed_write_the_next_rows_go_elsewhere(tmp_path, monkeypatch):
    cache = filled(tmp_path)
    cache.add([digest(5)], rows(5))

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("routingvl.data.feature_cache.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            cache.add([digest(6)], rows(6))
    cache.add([digest(7)], rows(7))
    again = opened(tmp_path)
    assert [again.find(digest(n)) is not None for n in range(8)] == [True] * 6 + [False, True]
    assert torch.equal(again.find(digest(7)), rows(7)[0])


WRITER = """
import sys
sys.path[:0] = [{tests!r}]
from test_feature_cache import digest, opened, rows
cache = opened({root!r})
for n in range(int(sys.argv[1]), int(sys.argv[2])):
    cache.add([digest(n)], rows(n))
"""


def write(root, start):
    cache = opened(root)
    for n in range(start, start + 25):
        cache.add([digest(n)], rows(n))


def test_four_processes_write_at_once(tmp_path):
    starts = range(0, 60, 15)  # ten images of each by two
    writers = [multiprocessing.get_context("fork").Process(target=write, args=(tmp_path, start)) for start in starts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    cache = opened(tmp_path)
    assert len(cache.digests()) == 70
    assert len(list(cache.directory.glob("*.rows"))) == 4
    assert all(torch.equal(cache.find(digest(n)), rows(n)[0]) for n in range(70))


def test_killed_writers_lose_nothing_that_was_added(tmp_path):
    code = WRITER.format(tests=str(Path(__file__).parent), root=str(tmp_path)) + "    print(n, flush=True)\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    added = []
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, start, "1000000000"], env=environment, stdout=subprocess.PIPE, text=True
        )
        for start in ("0", "500000000")
    ]
    for writer in writers:
        for _ in range(20):
            writer.stdout.readline()
        writer.kill()
        last = writer.communicate(timeout=60)[0].splitlines()
        added.append(int(last[-1]) if last else None)
    cache = opened(tmp_path)
    for start, last in zip((0, 500000000), added, strict=True):
        numbers = range(start, (start + 19 if last is None else last) + 1)
        assert all(torch.equal(cache.find(digest(n)), rows(n)[0]) for n in numbers)


def test_digests_of_files_are_remembered_until_the_file_changes(tmp_path, monkeypatch, caplog):
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    memory = FileDigests(tmp_path / "cache" / "files")
    memory.remember({path: (file_stat(path), digest(1))})
    assert memory.known(path) is None, "a file changed just now may change again unseen"
    memory.remember({path: ((0, 10**18, 10**18), digest(1))})
    assert FileDigests(tmp_path / "cache" / "files").known(path) is None, "size and times differ"
    stat = file_stat(path)
    monkeypatch.setattr("routingvl.data.feature_cache._SETTLED_NS", -(10**12))
    memory.remember({path: (stat, digest(1))})
    listed = sorted(memory.directory.glob("*.jsonl"), key=lambda file: file.stat().st_mtime_ns)[-1]
    other = json.dumps([str(tmp_path / "b"), list(stat), digest(2).hex()])
    odd = ['["torn', "{}", "5", '[{"a": 1}, [1, 2, 3], "00", 7]', "[" * 10_000, other]
    listed.write_text(listed.read_text() + "\n".join(odd))
    again = FileDigests(tmp_path / "cache" / "files")
    assert again.known(path) == digest(1)
    assert f"{listed}: 6 lines are damaged or old" in caplog.text
    path.write_bytes(b"two")
    os.utime(path, ns=(stat[1], stat[1]))  # same size, old time of change put back
    assert again.known(path) is None
    path.unlink()
    assert again.known(path) is None


def test_digests_of_other_files_are_noticed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("routingvl.data.feature_cache._SETTLED_NS", -(10**12))
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(b"one")
    memory = FileDigests(tmp_path / "files")
    memory.remember({path: (file_stat(path), digest(n)) for n, path in enumerate(paths)})
    (listed,) = memory.directory.glob("*.jsonl")
    listed.write_text(listed.read_text().replace(digest(0).hex(), digest(1).hex()))
    again = FileDigests(tmp_path / "files")
    assert [again.known(path) for path in paths] == [None, digest(1)]
    assert "1 lines are damaged" in caplog.text


@pytest.mark.parametrize("change", ["cut", "overwritten", "deleted"])
def test_files_that_change_while_they_are_read(tmp_path, caplog, change):
    reader = opened(filled(tmp_path).directory.parent)
    path = only(reader, ".rows")
    if change == "cut":
        os.truncate(path, reader.row_bytes + 3)
    elif change == "overwritten":
        path.write_bytes(bytes(path.stat().st_size))
    else:
        shutil.rmtree(reader.directory)
    features = StoredFeatures(reader, {Path(str(n)): digest(n) for n in range(5)})
    for n in range(5):
        if change == "deleted" or (change == "cut" and n == 0):
            assert torch.equal(features[Path(str(n))], rows(n)[0])
        else:
            with pytest.raises(FeatureCacheError, match=f"features of image {n} were damaged or deleted"):
                features[Path(str(n))]
            assert str(path) in caplog.text


def test_files_that_are_none(tmp_path):
    cache = filled(tmp_path)
    for name in ("a.index", "a.jsonl"):
        folder = cache.directory if name == "a.index" else tmp_path / "files"
        folder.mkdir(exist_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(FeatureCacheError, match=f"{name} is not a regular file; remove it"):
            opened(tmp_path) if name == "a.index" else FileDigests(folder)
        (folder / name).unlink()
    (cache.directory / "a.index").symlink_to("nowhere")
    with pytest.raises(FeatureCacheError, match=r"a.index is not a regular file"):
        opened(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FeatureCacheError, match="file is not a folder; remove it"):
        FileDigests(tmp_path / "file")
    with pytest.raises(FeatureCacheError, match="/proc/cache cannot be made"):
        opened("/proc/cache")
    (cache.directory / "a.index").unlink()
    path = cache.directory / "features.json"
    path.unlink()
    path.mkdir()
    with pytest.raises(FeatureCacheError, match=r"features.json is not a regular file"):
        opened(tmp_path)
    shutil.rmtree(cache.directory)
    with pytest.raises(FeatureCacheError, match="cannot be made, or was deleted while it was used"):
        cache.add([digest(9)], rows(9))


def test_leftovers_of_killed_writers_go_once_nobody_is_at_work(tmp_path):
    held = filled(tmp_path)
    folder = held.directory
    (tmp_path / "files").mkdir()
    leftovers = [folder / ".features.json.0a1b2c3d4e5f.tmp", tmp_path / "files" / ".x.jsonl.0a1b2c3d4e5f.tmp"]
    leftovers += [folder / "killed.rows", folder / "killed.index"]
    for path in leftovers:
        path.write_bytes(b"")
    (tmp_path / "run").mkdir()
    foreign = [tmp_path / "run" / name for name in (".best.0a1b2c3d4e5f.tmp", "own.rows")]
    for path in foreign:
        path.write_bytes(b"")
    opened(tmp_path)
    assert all(path.exists() for path in leftovers), "another process may be writing them"
    del held
    again = opened(tmp_path)
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in foreign), "not of the cache"
    assert len(again.digests()) == 5
