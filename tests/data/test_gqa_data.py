"""GQA's official files: what is read, the vocabulary, and errors that name file and question."""

import json
import shutil

import pytest
import torch
from pair_and_gqa_data import FIXTURES, write_gqa

from routingvl.cli import main
from routingvl.data.files import DataError
from routingvl.data.gqa import load_gqa, question_files, read_choices
from routingvl.data.vocabulary import AnswerVocabulary
from routingvl.data.vqa_dataset import VQADataset
from routingvl.metrics.gqa import GQAItem

GQA = FIXTURES / "gqa"
TRAIN = "train_balanced_questions.json"


@pytest.fixture
def spoil(tmp_path):
    """Change the content of a question file; returns the folder."""
    shutil.copytree(GQA, tmp_path / "gqa")

    def change(edit, name=TRAIN):
        path = tmp_path / "gqa" / name
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
        return tmp_path / "gqa"

    return change


def test_split(tmp_path):
    split = load_gqa(write_gqa(tmp_path / "gqa"), "train", tmp_path / "gqa" / "images")
    assert len(split.questions) == 16
    assert [image.path.name for image in split.images] == [f"23{number:05d}.jpg" for number in range(1, 9)]
    assert split.answers == ("no", "yes", "blue", "green", "red", "white")  # four times, then twice: by the alphabet
    question = split.questions[0]
    assert (question.question_id, question.image_id, question.label) == ("00000100", "2300001", {"green": 1.0})
    words = len("What color is the square?".split())
    followers = ("00000100", "00000101", "00000102")
    item = GQAItem("green", True, "query", "attr", "colorQuery", words, 2, "color", followers)
    assert question.item == item
    assert load_gqa(GQA, "train_balanced").questions == split.questions


def test_parts_and_test_sets():
    whole = load_gqa(GQA, "val_all")
    assert len(whole.questions) == 13
    assert {q.question_id: q.item for q in load_gqa(GQA, "val").questions}.items() <= {
        q.question_id: q.item for q in whole.questions
    }.items()
    test = load_gqa(GQA, "test")
    assert test.answers == ()
    assert {question.item for question in test.questions} == {None}
    assert read_choices(test.choices) is None
    assert len(read_choices(whole.choices)) == 13


def test_dataset():
    split = load_gqa(GQA, "train")
    features = {image.image_id: torch.full((1, 2), float(n)) for n, image in enumerate(split.images)}
    data = VQADataset(split, AnswerVocabulary(("yes", "green")), features=features)
    assert [data[i]["target"] for i in range(3)] == [{1: 1.0}, {0: 1.0}, {}]  # blue is no answer to choose
    assert torch.equal(data[2]["vision_features"], torch.ones(1, 2))


def test_vocabulary(tmp_path, capsys):
    files = [str(GQA / f"{split}_balanced_questions.json") for split in ("train", "val")]
    assert main(["prepare-data", "gqa", "--questions", *files, "--output", str(tmp_path)]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["vocabulary"]["answers"] == 7
    assert manifest["files"]["val_balanced_questions.json"] == {"questions": 9}
    assert AnswerVocabulary.load(tmp_path).answers[-1] == "shape"
    arguments = ["prepare-data", "gqa", "--questions", files[1], "--output", str(tmp_path), "--min_questions", "2"]
    assert main(arguments) == 0
    assert AnswerVocabulary.load(tmp_path).answers == ("no", "yes")
    for changed, message in (
        (["--questions", str(GQA / "test_balanced_questions.json")], "test_balanced_questions.json has no answers"),
        (["--min_questions", "9"], "no answer belongs to at least 9 questions"),
        (["--min_questions", "0"], "min_questions=0 must be at least 1"),
        (["--dataset_coco", "x"], "--dataset_coco belongs to prepare-data coco and vqa"),
    ):
        assert main([*arguments, *changed]) == 2
        assert message in capsys.readouterr().err
    assert main(["prepare-data", "gqa", "--output", str(tmp_path)]) == 2
    assert "prepare-data gqa needs --questions FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("imageId", None, r"train_balanced_questions.json: imageId None of question 00000100 must be the name"),
        ("imageId", "../x", "imageId '../x' of question 00000100"),
        ("question", " ", "question 00000100 must be a text that is not empty"),
        ("answer", 3, "question 00000100 does not have the expected form: answer, question and types must be strings"),
        ("answer", "", "the answer of question 00000100 is empty"),
        ("answer", " ", "the answer of question 00000100 is empty"),
        ("types", None, "question 00000100 does not have the expected form"),
        ("types", {"structural": "query"}, "question 00000100 has no key 'semantic'"),
        ("isBalanced", "yes", "isBalanced must be true or false, not 'yes'"),
        ("entailed", "0001", "entailed a list of question ids"),
        ("semantic", [{"operation": "select"}], "question 00000100 has no key 'argument'"),
    ],
)
def test_faulty_questions(spoil, key, value, message):
    with pytest.raises(DataError, match=message):
        load_gqa(spoil(lambda content: content["00000100"].update({key: value})), "train")


def test_faulty_files(spoil):
    with pytest.raises(DataError, match=r"question 00000101 has no answer while others have; add it"):
        load_gqa(spoil(lambda content: content["00000101"].pop("answer")), "train")
    folder = spoil(lambda content: content.clear())
    with pytest.raises(DataError, match=r"train_balanced_questions\.json has no questions"):
        load_gqa(folder, "train")
    (folder / TRAIN).write_text("[]")
    with pytest.raises(DataError, match="must hold an object, not a list"):
        load_gqa(folder, "train")
    (folder / TRAIN).write_text('{"1": {"imageId": "a", "question": "b"}, "1": {}}')
    with pytest.raises(DataError, match="has the key '1' twice"):
        load_gqa(folder, "train")
    (folder / TRAIN).write_text('{"1": {"imageId": ')
    with pytest.raises(DataError, match=r"train_balanced_questions\.json is not valid JSON"):
        load_gqa(folder, "train")
    with pytest.raises(DataError, match=r"no questions of split 'challenge'; looked for .*challenge_questions\.json"):
        load_gqa(folder, "challenge")
    (folder / "val_choices.json").write_text('{"1": {"valid": []}}')
    with pytest.raises(DataError, match=r"val_choices\.json: question 1 has no key 'plausible'"):
        read_choices(folder / "val_choices.json")


def test_faulty_parts(spoil, tmp_path):
    folder = spoil(
        lambda content: content.update({"00000900": content["00001100"]}), "val_all_questions/val_all_questions_1.json"
    )
    with pytest.raises(
        DataError, match=r"val_all_questions_1\.json: question 00000900 is listed twice, in another part"
    ):
        load_gqa(folder, "val_all")
    parts = folder / "val_all_questions"
    (parts / "val_all_questions_1.json").rename(parts / "val_all_questions_2.json")
    with pytest.raises(
        DataError, match=r"must hold the parts .* without a gap; it has .*_0\.json, val_all_questions_2"
    ):
        question_files(folder, "val_all")
    (tmp_path / "val_all_questions").mkdir()
    with pytest.raises(DataError, match="without a gap; it has none"):
        load_gqa(tmp_path, "val_all")


def test_a_part_without_an_answer(spoil):
    folder = spoil(lambda content: content["00001100"].pop("answer"), "val_all_questions/val_all_questions_1.json")
    with pytest.raises(
        DataError, match=r"val_all_questions_1\.json: question 00001100 has no answer while others have"
    ):
        load_gqa(folder, "val_all")
