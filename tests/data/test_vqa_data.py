"""Loading VQAv2 in its public forms, the answer vocabulary, and soft scores."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from routingvl.data.files import DataError
from routingvl.data.images import ImagePreprocessor
from routingvl.data.vocabulary import AnswerVocabulary, soft_scores
from routingvl.data.vqa import Question, load_official_vqa, load_vqa
from routingvl.data.vqa_dataset import VQADataset

FIXTURES = Path(__file__).parents[1] / "fixtures"
QUESTIONS = FIXTURES / "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = FIXTURES / "v2_mscoco_train2014_annotations.json"
KARPATHY = FIXTURES / "dataset_coco.json"


def write_official(folder: Path, subset: str, image_ids: list[int]) -> None:
    """One question an image, in the official form."""
    questions = [{"image_id": i, "question": f"What is in {i}?", "question_id": i * 1000} for i in image_ids]
    annotations = [
        {
            "question_id": i * 1000,
            "image_id": i,
            "question_type": "what is in",
            "answer_type": "other",
            "multiple_choice_answer": "cat",
            "answers": [{"answer": "cat", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)],
        }
        for i in image_ids
    ]
    for name, key, entries in (
        (f"v2_OpenEnded_mscoco_{subset}_questions.json", "questions", questions),
        (f"v2_mscoco_{subset}_annotations.json", "annotations", annotations),
    ):
        (folder / name).write_text(json.dumps({"data_subtype": subset, key: entries}))


@pytest.fixture
def official(tmp_path):
    """A folder with official files of both sets and the Karpathy split; 42 (restval), 73 and 74 are of val2014."""
    write_official(tmp_path, "train2014", [9])
    write_official(tmp_path, "val2014", [42, 73, 74])
    (tmp_path / "dataset_coco.json").write_bytes(KARPATHY.read_bytes())
    return tmp_path


def changed(source: Path, folder: Path, change) -> Path:
    """A copy of a JSON file in ``folder`` after ``change(content)``."""
    content = json.loads(source.read_text())
    change(content)
    path = folder / source.name
    path.write_text(json.dumps(content))
    return path


class TestOfficialFiles:
    def test_join(self):
        split = load_official_vqa([QUESTIONS], [ANNOTATIONS])
        assert [question.question_id for question in split.questions] == [9000, 9001]
        first = split.questions[0]
        assert first.text == "What color is the ball?"
        assert first.answers == ("red",) * 8 + ("dark red",) * 2
        assert (first.top_answer, first.question_type, first.answer_type) == ("red", "what color is the", "other")
        assert [image.file_name for image in split.images] == ["COCO_train2014_000000000009.jpg"]

    @pytest.mark.parametrize(("split", "images"), [("train", [9, 42]), ("val", [73]), ("test", [74])])
    def test_karpathy_split_joins_on_cocoid(self, official, split, images):
        for name in (split, f"karpathy_{split}"):
            loaded = load_vqa(official, name)
            assert [question.image_id for question in loaded.questions] == images

    def test_restval_images_are_looked_up_in_val2014(self, official):
        for folder in ("train2014", "val2014"):
            (official / folder).mkdir()
        paths = [image.path for image in load_vqa(official, "train", official).images]
        assert [path.parent.name for path in paths] == ["train2014", "val2014"]

    def test_official_split_by_name(self, official):
        assert [question.image_id for question in load_vqa(official, "val2014").questions] == [42, 73, 74]

    def test_test_set_has_no_answers_and_dev_shares_its_images(self, tmp_path):
        for subset in ("test2015", "test-dev2015"):
            write_official(tmp_path, subset, [1])
            (tmp_path / f"v2_mscoco_{subset}_annotations.json").unlink()
            loaded = load_vqa(tmp_path, subset)
            assert loaded.questions[0].answers is None
            assert loaded.images[0].file_name == "COCO_test2015_000000000001.jpg"
            assert loaded.annotations() == []

    def test_annotations_feed_the_official_accuracy(self):
        entries = load_official_vqa([QUESTIONS], [ANNOTATIONS]).annotations()
        original = json.loads(ANNOTATIONS.read_text())["annotations"]
        for ours, theirs in zip(entries, original, strict=True):
            for key in ("question_id", "image_id", "question_type", "answer_type"):
                assert ours[key] == theirs[key]
            assert [a["answer"] for a in ours["answers"]] == [a["answer"] for a in theirs["answers"]]
            assert len({a["answer_id"] for a in ours["answers"]}) == 10


class TestPerSplitLists:
    def test_lxmert_lists(self, caplog):
        split = load_vqa(FIXTURES, "train")
        assert split.questions[1].label == {"1": 1.0, "2": 0.3}
        assert split.images[0].file_name == "COCO_train2014_000000000009.jpg"
        assert "not the Karpathy split" in caplog.text

    def test_test_list_without_labels(self):
        question = load_vqa(FIXTURES / "test.json", "test").questions[0]
        assert (question.label, question.answers, question.text) == (None, None, "Is it red?")

    def test_karpathy_list_goes_first(self, official):
        content = [{"img_id": "COCO_val2014_000000000073", "question_id": 1, "question": "Own?", "label": {}}]
        (official / "karpathy_val.json").write_text(json.dumps(content))
        assert [question.text for question in load_vqa(official, "val").questions] == ["Own?"]

    @pytest.mark.parametrize("split", ["nominival", "minival"])
    def test_lxmert_names(self, tmp_path, split):
        (tmp_path / f"{split}.json").write_bytes((FIXTURES / "train.json").read_bytes())
        assert len(load_vqa(tmp_path, split).questions) == 2

    def test_raw_answers_are_kept(self, tmp_path):
        answers = [{"answer": "red", "answer_id": n} for n in range(1, 11)]
        path = changed(FIXTURES / "train.json", tmp_path, lambda entries: entries[0].update(answers=answers))
        split = load_vqa(path, "train")
        assert split.annotations()[0]["answers"] == answers
        assert len(split.annotations()) == 1


class TestBadInput:
    def test_question_without_annotation_names_question_and_file(self, tmp_path):
        annotations = changed(ANNOTATIONS, tmp_path, lambda content: content["annotations"].pop())
        with pytest.raises(DataError, match=r"question 9001 .*has no annotation in .*annotations\.json"):
            load_official_vqa([QUESTIONS], [annotations])

    def test_annotation_without_question(self, tmp_path):
        questions = changed(QUESTIONS, tmp_path, lambda content: content["questions"].pop())
        with pytest.raises(DataError, match=r"annotations\.json: annotation of question 9001"):
            load_official_vqa([questions], [ANNOTATIONS])

    def test_question_listed_twice(self):
        with pytest.raises(DataError, match="question 9000 is listed twice"):
            load_official_vqa([QUESTIONS, QUESTIONS], [ANNOTATIONS])

    def test_image_that_karpathy_does_not_know(self, official):
        write_official(official, "train2014", [9, 10])
        with pytest.raises(DataError, match=r"dataset_coco\.json has no image 10 of question 10000"):
            load_vqa(official, "train")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda entries: entries[0].pop("sent"), "entry number 0 has no key 'question'"),
            (lambda entries: entries[1].pop("img_id"), "entry number 1 has no key 'img_id'"),
            (lambda entries: entries[1].update(sent=" "), "question 9001 is empty"),
            (lambda entries: entries[1].update(question_id=9000), "question 9000 is listed twice"),
            (lambda entries: entries[1].update(img_id="none"), "'none' of question 9001"),
            (lambda entries: entries[0].update(label=["red"]), "expected form"),
            (lambda entries: entries.clear(), "no questions of split 'train'"),
        ],
    )
    def test_broken_list(self, tmp_path, change, message):
        with pytest.raises(DataError, match=message) as error:
            load_vqa(changed(FIXTURES / "train.json", tmp_path, change), "train")
        assert "train.json" in str(error.value)

    def test_missing_files_say_what_was_looked_for(self, tmp_path):
        with pytest.raises(DataError) as error:
            load_vqa(tmp_path, "val")
        for text in ("karpathy_val.json", "v2_mscoco_val2014_annotations.json", "dataset_coco.json", "prepare-data"):
            assert text in str(error.value)
        with pytest.raises(DataError, match=r"v2_OpenEnded_mscoco_test2015_questions\.json"):
            load_vqa(tmp_path, "test2015")

    def test_unknown_split(self, tmp_path):
        with pytest.raises(DataError, match="unknown VQA split 'dev'"):
            load_vqa(tmp_path, "dev")
        with pytest.raises(DataError, match="unknown Karpathy split 'minival'"):
            load_official_vqa([QUESTIONS], [ANNOTATIONS], dataset_coco=KARPATHY, split="minival")

    def test_question_file_given_as_annotation_file(self):
        with pytest.raises(DataError, match=r'questions\.json has no "annotations"'):
            load_official_vqa([QUESTIONS], [QUESTIONS])


class TestVocabulary:
    def test_both_files_and_their_folder(self):
        loaded = [
            AnswerVocabulary.load(FIXTURES / name)
            for name in ("trainval_label2ans.json", "trainval_ans2label.json", ".")
        ]
        assert loaded[0] == loaded[1] == loaded[2]
        assert loaded[0].answers == ("", "red", "1", "2", "yes", "no")
        assert loaded[0].index["yes"] == 4
        assert len(loaded[0]) == 6

    def test_derive_counts_distinct_questions_of_normalised_answers(self):
        def question(number: int, answer: str) -> Question:
            return Question(number, 1, "?", top_answer=answer)

        asked = [question(n, "Two") for n in range(5)] + [question(n, "2") for n in range(5, 9)]
        asked += [question(n, "a dog") for n in range(100, 110)]
        asked += [question(n, "1,000") for n in range(200, 209)]
        asked += [question(300, "rare")] * 9 + [question(n, "eight") for n in range(400, 408)]
        vocabulary = AnswerVocabulary.derive(asked)
        assert vocabulary.answers == ("dog", "1000", "2")  # ten questions, then nine each in alphabetical order
        assert AnswerVocabulary.derive(reversed(asked)) == vocabulary
        assert "8" in AnswerVocabulary.derive(asked, min_questions=8)

    def test_nothing_frequent_enough(self):
        with pytest.raises(DataError, match="at least 9 questions"):
            AnswerVocabulary.derive(load_official_vqa([QUESTIONS], [ANNOTATIONS]).questions)

    def test_save_and_load(self, tmp_path):
        vocabulary = AnswerVocabulary(("", "café", "no"))
        vocabulary.save(tmp_path)
        assert AnswerVocabulary.load(tmp_path) == vocabulary
        assert AnswerVocabulary.load(tmp_path / "trainval_ans2label.json").sha256 == vocabulary.sha256
        assert AnswerVocabulary(("café", "", "no")).sha256 != vocabulary.sha256

    @pytest.mark.parametrize("content", ['["a", "a"]', '{"a": 0, "b": 2}', "[]", "[1]", '"a"'])
    def test_bad_files(self, tmp_path, content):
        path = tmp_path / "trainval_label2ans.json"
        path.write_text(content)
        with pytest.raises(DataError, match=r"trainval_label2ans\.json"):
            AnswerVocabulary.load(path)

    def test_missing_file(self, tmp_path):
        with pytest.raises(DataError, match=r"trainval_label2ans\.json.*prepare-data"):
            AnswerVocabulary.load(tmp_path)


class TestSoftScores:
    @pytest.mark.parametrize(("count", "score"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
    def test_rule(self, count, score):
        assert soft_scores(["red"] * count + ["other"] * (10 - count), {"red"}) == {"red": score}

    def test_raw_strings_are_counted(self):
        assert soft_scores(["a dog", "dog", "Dog", "dog"], {"dog"}) == {"dog": 0.6}

    def test_nothing_known(self):
        assert soft_scores(["x"] * 10, {"red"}) == {}


class TestVQADataset:
    def test_official_and_listed_targets_agree(self, tmp_path):
        vocabulary = AnswerVocabulary.load(FIXTURES)
        features = {9: torch.zeros(1, 4)}
        from_answers = VQADataset(load_official_vqa([QUESTIONS], [ANNOTATIONS]), vocabulary, features=features)
        from_labels = VQADataset(load_vqa(FIXTURES / "train.json", "train"), vocabulary, features=features)
        for one, other in zip(from_answers, from_labels, strict=True):
            assert one["target"] == other["target"]
        assert from_answers[1]["target"] == {2: 1.0, 3: 0.3}

    def test_item(self, tmp_path):
        (tmp_path / "train2014").mkdir()
        Image.new("L", (9, 9)).save(tmp_path / "train2014" / "COCO_train2014_000000000009.jpg")
        split = load_official_vqa([QUESTIONS], [ANNOTATIONS], image_root=tmp_path)
        item = VQADataset(split, AnswerVocabulary.load(FIXTURES), ImagePreprocessor(8))[0]
        assert item.pop("pixel_values").shape == (3, 8, 8)
        assert item == {
            "question_id": 9000,
            "image_id": 9,
            "question": "What color is the ball?",
            "target": {1: 1.0},
            "question_type": "what color is the",
            "answer_type": "other",
            "answers": ("red",) * 8 + ("dark red",) * 2,
        }

    def test_no_target_without_answers(self):
        split = load_vqa(FIXTURES / "test.json", "test")
        assert VQADataset(split, AnswerVocabulary(("a",)), features={1: torch.zeros(1, 4)})[0]["target"] is None

    def test_vocabulary_of_another_data_set(self):
        with pytest.raises(DataError, match="no answer of split 'train' is in the vocabulary of 1"):
            VQADataset(load_vqa(FIXTURES / "train.json", "train"), AnswerVocabulary(("nonsense",)), features={})

    def test_bad_image_is_skipped_and_counted(self, tmp_path):
        (tmp_path / "train2014").mkdir()
        (tmp_path / "train2014" / "COCO_train2014_000000000009.jpg").write_bytes(b"\xff\xd8 cut")
        split = load_official_vqa([QUESTIONS], [ANNOTATIONS], image_root=tmp_path)
        dataset = VQADataset(split, AnswerVocabulary.load(FIXTURES), ImagePreprocessor(8), on_bad_image="skip")
        assert [dataset[0], dataset[1]] == [None, None]
        assert dataset.skipped == 2


def test_an_image_that_karpathy_knows_as_another_file(official):
    write_official(official, "train2014", [9, 73])  # 73 is of val2014
    questions = json.loads((official / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    annotations = json.loads((official / "v2_mscoco_val2014_annotations.json").read_text())
    for content, key in ((questions, "questions"), (annotations, "annotations")):
        content[key] = [entry for entry in content[key] if entry["image_id"] != 73]
    (official / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps(questions))
    (official / "v2_mscoco_val2014_annotations.json").write_text(json.dumps(annotations))
    with pytest.raises(
        DataError, match=r"image 73 is COCO_val2014_0*73\.jpg, but question 73000 asks about COCO_train"
    ):
        load_vqa(official, "val")
