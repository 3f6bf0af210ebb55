"""Deriving the training files from the official ones."""

import fcntl
import gc
import hashlib
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from routingvl.data.coco import load_captions
from routingvl.data.files import DataError, read_json, write_json_files
from routingvl.data.prepare import prepare_coco, prepare_vqa
from routingvl.data.vocabulary import AnswerVocabulary
from routingvl.data.vqa import load_official_vqa, load_vqa

FIXTURES = Path(__file__).parents[1] / "fixtures"
QUESTIONS = FIXTURES / "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = FIXTURES / "v2_mscoco_train2014_annotations.json"
KARPATHY = FIXTURES / "dataset_coco.json"
LABEL2ANS = FIXTURES / "trainval_label2ans.json"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestPrepareCoco:
    def test_files_equal_the_public_form(self, tmp_path):
        prepare_coco(KARPATHY, tmp_path / "new" / "folder")
        for split in ("train", "val", "test"):
            name = f"captions_{split}_karpathy.json"
            made = json.loads((tmp_path / "new" / "folder" / name).read_text())
            assert made == json.loads((FIXTURES / name).read_text())

    def test_loads_back_to_the_same_split(self, tmp_path):
        prepare_coco(KARPATHY, tmp_path)
        for split in ("train", "val", "test"):
            assert load_captions(tmp_path, split) == load_captions(KARPATHY, split)

    def test_manifest(self, tmp_path):
        manifest = prepare_coco(KARPATHY, tmp_path)
        assert manifest == json.loads((tmp_path / "captions_manifest.json").read_text())
        assert manifest["files"]["captions_train_karpathy.json"] == {"images": 2, "captions": 3}
        digest = hashlib.sha256(KARPATHY.read_bytes()).hexdigest()
        assert manifest["inputs"] == [{"file": "dataset_coco.json", "sha256": digest}]

    def test_again_gives_the_same_bytes(self, tmp_path):
        prepare_coco(KARPATHY, tmp_path)
        before = contents(tmp_path)
        prepare_coco(KARPATHY, tmp_path)
        assert contents(tmp_path) == before
        assert len(before) == 4

    def test_bad_input_writes_nothing_and_leaves_what_was_there(self, tmp_path):
        content = json.loads(KARPATHY.read_text())
        content["images"][-1]["sentences"][0]["raw"] = ""  # in the last split that is made
        bad = tmp_path / "dataset_coco.json"
        bad.write_text(json.dumps(content))
        out = tmp_path / "out"
        with pytest.raises(DataError, match="caption 6 of image 74 is empty"):
            prepare_coco(bad, out)
        assert not out.exists()
        prepare_coco(KARPATHY, out)
        before = contents(out)
        with pytest.raises(DataError):
            prepare_coco(bad, out)
        assert contents(out) == before

    def test_missing_input(self, tmp_path):
        with pytest.raises(DataError, match=r"absent\.json"):
            prepare_coco(tmp_path / "absent.json", tmp_path / "out")
        assert gc.isenabled()  # it is paused meanwhile
        assert not (tmp_path / "out").exists()


class TestPrepareVQA:
    def test_lists_hold_what_the_official_files_hold(self, tmp_path):
        prepare_vqa([QUESTIONS], [ANNOTATIONS], KARPATHY, tmp_path, vocabulary=LABEL2ANS)
        made = load_vqa(tmp_path, "train")
        official = load_official_vqa([QUESTIONS], [ANNOTATIONS], dataset_coco=KARPATHY, split="train")
        assert made.annotations() == official.annotations()
        assert made.images == official.images
        assert [question.label for question in made.questions] == [{"red": 1.0}, {"1": 1.0, "2": 0.3}]

    def test_lists_have_the_public_form(self, tmp_path):
        prepare_vqa([QUESTIONS], [ANNOTATIONS], KARPATHY, tmp_path, vocabulary=LABEL2ANS)
        made = json.loads((tmp_path / "karpathy_train.json").read_text())
        public = json.loads((FIXTURES / "train.json").read_text())
        assert [{key: entry[key] for key in public[0]} for entry in made] == public

    def test_published_vocabulary_is_accepted_as_it_is(self, tmp_path):
        manifest = prepare_vqa([QUESTIONS], [ANNOTATIONS], KARPATHY, tmp_path, vocabulary=LABEL2ANS)
        for name in ("trainval_label2ans.json", "trainval_ans2label.json"):
            assert json.loads((tmp_path / name).read_text()) == json.loads((FIXTURES / name).read_text())
        assert manifest["vocabulary"] == {
            "answers": 6,
            "sha256": AnswerVocabulary.load(LABEL2ANS).sha256,
            "origin": "trainval_label2ans.json",
        }

    def test_derived_vocabulary(self, tmp_path):
        manifest = prepare_vqa([QUESTIONS], [ANNOTATIONS], KARPATHY, tmp_path, min_questions=1)
        assert json.loads((tmp_path / "trainval_label2ans.json").read_text()) == ["1", "red"]
        assert json.loads((tmp_path / "trainval_ans2label.json").read_text()) == {"1": 0, "red": 1}
        assert "at least 1 questions" in manifest["vocabulary"]["origin"]
        assert manifest["files"]["karpathy_train.json"] == {"images": 1, "questions": 2, "without_known_answer": 0}

    def test_again_gives_the_same_bytes(self, tmp_path):
        prepare_vqa([QUESTIONS], [ANNOTATIONS], KARPATHY, tmp_path, vocabulary=LABEL2ANS)
        before = contents(tmp_path)
        prepare_vqa([QUESTIONS], [ANNOTATIONS], KARPATHY, tmp_path, vocabulary=LABEL2ANS)
        assert contents(tmp_path) == before

    def test_vocabulary_may_lie_in_the_output_folder(self, tmp_path):
        for vocabulary in (LABEL2ANS, tmp_path / "trainval_label2ans.json"):
            prepare_vqa([QUESTIONS], [ANNOTATIONS], KARPATHY, tmp_path, vocabulary=vocabulary)
        assert AnswerVocabulary.load(tmp_path) == AnswerVocabulary.load(LABEL2ANS)

    @pytest.mark.parametrize(
        ("annotations", "vocabulary", "message"),
        [
            ([], LABEL2ANS, "no annotation files"),
            ([QUESTIONS], LABEL2ANS, 'has no "annotations"'),
            ([ANNOTATIONS], "absent.json", r"absent\.json"),
            ([ANNOTATIONS], None, "at least 9 questions"),
        ],
    )
    def test_bad_input_writes_nothing(self, tmp_path, annotations, vocabulary, message):
        with pytest.raises(DataError, match=message):
            prepare_vqa([QUESTIONS], annotations, KARPATHY, tmp_path / "out", vocabulary=vocabulary)
        assert not (tmp_path / "out").exists()


class TestWriteJsonFiles:
    def test_a_failure_half_way_changes_nothing(self, tmp_path):
        write_json_files(tmp_path, {"a.json": 1, "b.json": 2})
        before = contents(tmp_path)
        with pytest.raises(TypeError):
            write_json_files(tmp_path, {"a.json": 3, "b.json": object()})
        assert contents(tmp_path) == before

    def test_text_is_kept(self, tmp_path):
        paths = write_json_files(tmp_path, {"a.json": {"é": ["\u2028"]}})
        assert json.loads(paths["a.json"].read_text(encoding="utf-8")) == {"é": ["\u2028"]}

    def test_a_kill_between_renames_is_noticed(self, tmp_path):
        first, second = {"a.json": 1, "b.json": 1, "c.json": 1}, {"a.json": 2, "b.json": 2, "c.json": 2}
        for renames in range(6):
            folder = tmp_path / str(renames)
            write_json_files(folder, first)
            process = multiprocessing.get_context("fork").Process(target=write_and_die, args=(folder, second, renames))
            process.start()
            process.join()
            died = process.exitcode == 9
            refused = died and renames > 0
            for name in first:
                if refused:
                    with pytest.raises(DataError, match=f"{folder / name} may not fit .* interrupted; run it again"):
                        read_json(folder / name, kind=int)
                else:
                    assert read_json(folder / name, kind=int) == (1 if died else 2)
            assert died is (renames < 4)
            write_json_files(folder, second)
            assert [read_json(folder / name, kind=int) for name in second] == [2] * 3
            assert sorted(path.name for path in folder.iterdir()) == list(second)

    def test_the_last_file_is_renamed_last(self, tmp_path, monkeypatch):
        renamed, original = [], os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: (renamed.append(Path(b).name), original(a, b)))
        prepare_coco(KARPATHY, tmp_path)
        assert renamed[-1] == "captions_manifest.json"

    def test_one_writer_at_a_time(self, tmp_path):
        handle = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=f"another process is writing into {tmp_path}"):
            write_json_files(tmp_path, {"a.json": 1})
        os.close(handle)
        assert not list(tmp_path.iterdir())


def write_and_die(folder, files, renames):
    """Write ``files``, killed before rename number ``renames`` (the first is the marker's)."""
    done, original = [], os.replace

    def replace(a, b):
        if len(done) == renames:
            os._exit(9)
        done.append(b)
        original(a, b)

    os.replace = replace
    write_json_files(folder, files)


OFFICIAL = [json.loads(path.read_text()) for path in (QUESTIONS, ANNOTATIONS, KARPATHY)]


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, lambda c: c.update(questions=None), r'questions.json has no "questions" that is a list'),
        (0, lambda c: c["questions"][0].update(question_id=[1]), r"question_id \[1\] must be an integer or a string"),
        (0, lambda c: c["questions"][0].update(question_id=None), "question_id None must be"),
        (0, lambda c: c["questions"][0].update(image_id="9"), "image_id '9' of question 9000 is not COCO's number"),
        (0, lambda c: c["questions"][0].update(image_id=True), "image_id True"),
        (0, lambda c: c.update(data_subtype="../../x"), r"data_subtype '../../x' is not the name of an image set"),
        (0, lambda c: c.update(data_subtype=5), "file .* does not have the expected form"),
        (1, lambda c: c.update(data_subtype="val2014"), "data_subtype 'val2014' is not that of .*questions.json"),
        (1, lambda c: c.update(annotations=None), r'annotations.json has no "annotations" that is a list'),
        (1, lambda c: c["annotations"][0].update(answers="red"), "answers of question 9000 must be a list of strings"),
        (1, lambda c: c["annotations"][0].update(answers=[]), "answers of question 9000 must be a list of strings"),
        (1, lambda c: c["annotations"][0]["answers"][0].update(answer=3), "answers of question 9000 must be a list"),
        (
            1,
            lambda c: c["annotations"][0].update(image_id=10),
            r"annotation of question 9000 is of image 10, .* image 9",
        ),
        (1, lambda c: c["annotations"][0].update(answer_type=["x"]), "answer_type of question 9000 must be a string"),
        (1, lambda c: c["annotations"][0]["answers"][0].update(answer="\ud800"), "half a surrogate pair"),
        (2, lambda c: c["images"][0].update(cocoid=[9]), r"cocoid \[9\] must be an integer or a string"),
        (2, lambda c: c["images"][-1].update(cocoid=9), "image 9 is listed twice"),
        (2, lambda c: c["images"][0].update(split=["train"]), r"unknown split \['train'\]"),
        (2, lambda c: c.update(images={}), r'has no "images" that is a list'),
    ],
)
def test_official_files_with_faults_write_nothing(tmp_path, which, change, message):
    contents = [json.loads(json.dumps(content)) for content in OFFICIAL]
    change(contents[which])
    paths = [tmp_path / path.name for path in (QUESTIONS, ANNOTATIONS, KARPATHY)]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        prepare_vqa(paths[:1], paths[1:2], paths[2], tmp_path / "out", min_questions=1)
    assert str(paths[which]) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images[0].update(filepath="../../.."), r"image name '../../..' leaves the image folder"),
        (lambda images: images[0].update(filename="/etc/passwd"), "image name '/etc/passwd' leaves"),
        (
            lambda images: images[-1].update(filename=images[0]["filename"], filepath=images[0]["filepath"]),
            "listed twice",
        ),
        (lambda images: images[-1].update(cocoid=images[0]["cocoid"]), "is listed twice"),
        (lambda images: images[0].update(sentences=[]), "image 9 .and 0 more. has no caption while others have"),
    ],
)
def test_dataset_coco_with_faults_writes_nothing(tmp_path, change, message):
    content = json.loads(KARPATHY.read_text())
    change(content["images"])
    (tmp_path / "dataset_coco.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        prepare_coco(tmp_path / "dataset_coco.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_of_every_answer_is_refused(tmp_path):
    with pytest.raises(DataError, match="min_questions=0 must be at least 1"):
        prepare_vqa([QUESTIONS], [ANNOTATIONS], KARPATHY, tmp_path / "out", min_questions=0)


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "captions_train_karpathy.json").mkdir()
    for output, message in (
        ("", "'' cannot be the name of a folder"),
        ("a\0b", "cannot be the name of a folder"),
        (tmp_path / "file", "file is a file, or lies in one; name a folder"),
        (tmp_path / "file" / "below", "is a file, or lies in one"),
        (tmp_path, r"captions_train_karpathy\.json is not a regular file; remove it"),
    ):
        with pytest.raises(DataError, match=message):
            prepare_coco(KARPATHY, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions_train_karpathy.json", "file"]


def test_captions_without_splits_are_no_input(tmp_path):
    own = tmp_path / "own.json"
    own.write_bytes((FIXTURES / "captions_val_karpathy.json").read_bytes())
    for path, message in (
        (own, r"own\.json names no splits; give dataset_coco\.json"),
        (FIXTURES / "captions_val_karpathy.json", "holds the split 'val'"),
        (tmp_path, r"is not a file; give dataset_coco\.json"),
    ):
        with pytest.raises(DataError, match=message):
            prepare_coco(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
