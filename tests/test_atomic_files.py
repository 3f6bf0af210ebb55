"""Files that appear whole or not at all."""

import io
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from routingvl.atomic_files import append_text, recover, replacing, write_json


def test_two_writers_of_one_process_do_not_meet(tmp_path):
    path = tmp_path / "folder" / "file"
    with replacing(path) as one:
        one.write_text("one")
        with replacing(path) as other:
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, [object()])
    with pytest.raises(RuntimeError), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "[\n  1\n]\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_another(tmp_path):
    path = tmp_path / "folder"
    for name in ("old", "new"):
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [entry.name for entry in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_are_removed_and_a_folder_moved_aside_comes_back(tmp_path):
    (tmp_path / ".best.0123456789ab.old").mkdir()
    (tmp_path / ".best.0123456789ab.old" / "weights").touch()
    (tmp_path / ".best.0123456789ab.tmp").mkdir()
    (tmp_path / ".config.yaml.ba9876543210.tmp").touch()
    (tmp_path / ".mine.tmp").touch()
    recover(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".mine.tmp", "best", "weights"]


def test_an_old_folder_beside_its_successor_is_removed(tmp_path):
    for name in ("best", ".best.0123456789ab.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    recover(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["best", "best"]


def test_files_have_the_mode_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)  # which makes it 0600
        with replacing(tmp_path / "folder") as temporary:
            temporary.mkdir()
            save_file({"a": torch.zeros(1)}, temporary / "file")
    finally:
        os.umask(old)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder/file")] == [0o640, 0o640]


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.readlink(f"/proc/self/fd/{fd}")) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("rename") or rename(*paths))
    with replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "file").touch()
    assert calls == [f"{temporary}/file", str(temporary), "rename", str(tmp_path)]


@pytest.mark.parametrize("kind", ["system", "rust"])
def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, kind):
    error = OSError(28, "No space left on device")
    if kind == "rust":
        error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def fail():
        with replacing(tmp_path / "file") as temporary:
            temporary.touch()
            raise error

    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/file'$"):
        fail()
    assert not list(tmp_path.iterdir())


def test_errors_of_other_files_keep_their_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="'/nowhere'"), replacing(tmp_path / "file"):
        os.stat("/nowhere")


def test_what_cannot_be_appended_whole_is_not_appended(tmp_path, monkeypatch):
    path = tmp_path / "log"
    append_text(path, "one\n")

    class Full(io.BufferedWriter):
        def flush(self):
            super().flush()
            if self.tell() > 4:
                raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode: Full(io.FileIO(self, mode)))
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            append_text(path, "two\n")
    assert path.read_text() == "one\n"
