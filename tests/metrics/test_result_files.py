"""Result files: exact form, completeness, atomic writing, and clear errors."""

import json
import os
import stat
from pathlib import Path

import pytest

from routingvl.metrics import results

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_coco_form_and_round_trip(tmp_path):
    path = results.write_coco_results(tmp_path / "new" / "captions.json", {74: "a dog on a rug", 9: "due caffè"})
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"image_id": 9, "caption": "due caffè"},
        {"image_id": 74, "caption": "a dog on a rug"},
    ]
    assert results.read_coco_results(path) == {9: "due caffè", 74: "a dog on a rug"}
    assert [file.name for file in path.parent.iterdir()] == ["captions.json"]


def test_vqa_form_and_round_trip(tmp_path):
    path = results.write_vqa_results(tmp_path / "vqa.json", {458752000: "net"}, expected=[458752000])
    assert json.loads(path.read_text()) == [{"question_id": 458752000, "answer": "net"}]
    assert results.read_vqa_results(path) == {458752000: "net"}


def test_string_ids_stay_as_they_are(tmp_path):
    answers = {"201307251": "yes", "02930152": "no", 7: "two"}
    path = results.write_vqa_results(tmp_path / "vqa.json", answers, expected=["02930152", 7, "201307251"])
    assert [row["question_id"] for row in json.loads(path.read_text())] == [7, "02930152", "201307251"]
    assert results.read_vqa_results(path) == answers


def test_fixture_files_are_read():
    assert results.read_coco_results(FIXTURES / "captions_test_toy_results.json") == {74: "a dog on a rug"}
    vqa = results.read_vqa_results(FIXTURES / "v2_OpenEnded_mscoco_train2014_toy_results.json")
    assert vqa == {9000: "red", 9001: "1"}


def test_form_of_the_published_code_is_read(tmp_path):
    path = tmp_path / "pred.json"
    path.write_text('{"pred_sent": [{"image_id": 3, "id": 0, "caption": "two cats"}]}')
    assert results.read_coco_results(path) == {3: "two cats"}


def test_names():
    assert results.coco_results_name("val2014", "mul") == "captions_val2014_mul_results.json"
    assert results.vqa_results_name("test2015", "mul") == "v2_OpenEnded_mscoco_test2015_mul_results.json"


@pytest.mark.parametrize("write", [results.write_coco_results, results.write_vqa_results])
def test_incomplete_results_are_refused_and_the_old_file_stays(tmp_path, write):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(results.ResultFileError, match=r"1 \w+s have no result \[2\], 1 do not belong to it \[5\]"):
        write(path, {1: "a", 5: "b"}, expected=[1, 2])
    with pytest.raises(results.ResultFileError, match=r"do not cover the split: .*\['1'\]"):
        write(path, {"1": "a"}, expected=[1])
    for wrong in (True, 1.0, None, "", ("a",)):
        with pytest.raises(results.ResultFileError, match="must be an integer or a string, not"):
            write(path, {wrong: "a"})
    assert path.read_text() == "old"


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(TypeError):
        results.write_coco_results(path, {1: b"not text"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_the_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").touch()
    path = results.write_coco_results(tmp_path / "results.json", {1: "a"})
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]', "entry 1: image_id 1 comes twice"),
        ('[{"image_id": 1}]', "entry 0: needs 'image_id' and a string 'caption'"),
        ('[{"image_id": 1.5, "caption": "a"}]', "image_id 1.5 is neither an integer nor a string"),
        ('[{"image_id": null, "caption": "a"}]', "image_id None is neither"),
        ('[{"image_id": 1, "caption": NaN}]', "holds NaN"),
        ("[" * 100_000, "nested too deeply"),
        ('{"images": []}', "must hold a JSON list"),
        ("5", "must hold"),
        ("[{", "is not valid JSON"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(results.ResultFileError, match=message) as error:
        results.read_coco_results(path)
    assert "bad.json" in str(error.value)
