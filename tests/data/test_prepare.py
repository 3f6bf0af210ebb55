"""Deriving the training files from the official ones."""

import gc
import hashlib
import json
from pathlib import Path

import pytest

from routingvl.data.coco import load_captions
from routingvl.data.files import DataError, write_json_files
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
