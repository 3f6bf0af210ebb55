"""JSON of any origin: read, or refused in one sentence that names the file."""

import json
import os

import pytest

from routingvl.json_files import parse_json, read_json


class FileError(ValueError):
    """What a room raises."""


def read(tmp_path, content, *args, **options):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_json(path, FileError, *args, **options)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\ufeff{}", {}),
        ('["\\ud83d\\ude00", "\\\\ud800", "é"]', ["\U0001f600", "\\ud800", "é"]),
        ('{"a": 1e300, "b": [12345678901234567890]}', {"a": 1e300, "b": [12345678901234567890]}),
        ("[" * 50 + "]" * 50, json.loads("[" * 50 + "]" * 50)),
    ],
)
def test_read(tmp_path, text, value):
    assert read(tmp_path, text) == value


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b'{"a": 1', dict, r"not valid JSON .cut off"),
        (b"", dict, "not valid JSON"),
        (b'{"a": "\xff"}', dict, "not UTF-8 text"),
        (b'["\xed\xa0\x80"]', list, "not UTF-8 text"),
        (b'["\\ud800"]', list, "half a surrogate pair"),
        (b'{"\\uDFFF": 1}', dict, "half a surrogate pair"),
        (b"[" * 200_000, list, "nested too deeply"),
        (b'{"a":' * 100_000, dict, "nested too deeply"),
        (b'{"a": 1, "b": 2, "a": 3}', dict, "key 'a' twice"),
        (b'[{"x": {"a": 1, "a": 1}}]', list, "key 'a' twice"),
        (b"[" + b"9" * 5000 + b"]", list, "integer of thousands of digits"),
        (b"[NaN]", list, "holds NaN"),
        (b"[-Infinity]", list, "holds -Infinity"),
        (b"[1e999]", list, "holds 1e999, which is too large"),
        (b"[]", dict, "must hold an object, not a list"),
        (b"{}", list, "must hold a list, not an object"),
        (b"5", (dict, list), "must hold an object or a list, not 5"),
        (b"null", dict, "must hold an object, not None"),
    ],
)
def test_refused(tmp_path, content, kind, message):
    with pytest.raises(FileError, match=message) as caught:
        read(tmp_path, content, kind)
    assert str(tmp_path / "a.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nan_may_be_allowed(tmp_path):
    assert read(tmp_path, "[Infinity]", nan=True) == [float("inf")]


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, message in (
        (tmp_path / "fifo", "fifo is not a regular file; make it"),
        (tmp_path, "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path / "absent", "cannot read .*absent: No such file or directory; make it"),
        ("a\0b", "cannot be the name of a file"),
        ("\ud800", "cannot read|cannot be the name"),
        ("a" * 5000, "File name too long"),
    ):
        with pytest.raises(FileError, match=message):
            read_json(path, FileError, fix="make it")


def test_a_text_has_its_source_in_front():
    with pytest.raises(FileError, match=r"^a\.jsonl, line 3 must hold an object, not a list"):
        parse_json("[]", "a.jsonl, line 3", FileError, dict)
