"""The generated data set: true, balanced, a function of its seed, and readable by the ordinary loaders."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import permutations

import numpy as np
import pytest
from PIL import Image

from routingvl.data.coco import load_captions
from routingvl.data.prepare import prepare_coco, prepare_vqa
from routingvl.data.vocabulary import AnswerVocabulary
from routingvl.data.vqa import load_vqa
from routingvl.demo import shapes
from routingvl.demo.shapes import ShapeObject, ShapesConfig

SMALL = ShapesConfig(
    train_images=60, val_images=20, test_images=20, train_questions=140, val_questions=28, test_questions=28
)
SCENE = (ShapeObject("red", "circle", "top", "left"), ShapeObject("blue", "square", "bottom", "left"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small set and the files derived from it, as (data folder, derived folder)."""
    root = tmp_path_factory.mktemp("shapes")
    data = shapes.write_shapes(root / "data", SMALL)
    prepare_coco(data / "dataset_coco.json", root / "derived")
    subsets = ("train2014", "val2014")
    prepare_vqa(
        [data / f"v2_OpenEnded_mscoco_{subset}_questions.json" for subset in subsets],
        [data / f"v2_mscoco_{subset}_annotations.json" for subset in subsets],
        data / "dataset_coco.json",
        root / "derived",
        min_questions=1,
    )
    return data, root / "derived"


def test_captions_of_a_known_scene():
    assert shapes.captions(SCENE) == [
        "a red circle in the top left and a blue square in the bottom left",
        "a blue square in the bottom left and a red circle in the top left",
    ]


def test_questions_of_a_known_scene():
    asked = {question.text: question.answer for question in shapes.questions(SCENE)}
    assert asked["what shape is the red object?"] == "circle"
    assert asked["which row is the blue object in?"] == "bottom"
    assert asked["which column is the red object in?"] == "left"
    assert asked["is there a red circle?"] == "yes"
    assert asked["is there a red square?"] == "no"
    assert asked["is there a green circle?"] == "no"
    assert asked["how many squares are there?"] == "1"
    assert asked["how many triangles are there?"] == "0"
    assert asked["is the red object above the blue object?"] == "yes"
    assert asked["is the blue object above the red object?"] == "no"
    # Both stand in the left column, so which is further left has no answer and is not asked.
    assert not any("left of" in text for text in asked)


def test_scenes_have_distinct_colours_and_cells():
    for scene in shapes.draw_scenes(200, np.random.default_rng(0)):
        assert len({item.colour for item in scene}) == len({(item.row, item.column) for item in scene}) == 2


def test_rendered_objects_are_where_and_what_the_scene_says():
    image = shapes.render([SCENE], np.random.default_rng(0))[0].astype(int)
    assert image.shape == (36, 36, 3)
    red, blue, empty = image[6, 6], image[30, 6], image[18, 30]
    assert red.argmax() == 0
    assert blue.argmax() == 2
    assert empty.max() - empty.min() < 60
    # A square reaches into its cell's corners further than a circle: compare the colour along a diagonal.
    assert image[30 - 3, 6 - 3].argmax() == 2


def test_a_split_is_a_function_of_the_seed():
    one, again = shapes.make_split("val", SMALL), shapes.make_split("val", SMALL)
    other = shapes.make_split("val", ShapesConfig(seed=1, val_images=20, val_questions=28))
    assert one.scenes == again.scenes
    assert one.questions == again.questions
    assert np.array_equal(one.images, again.images)
    assert one.scenes != other.scenes


def test_splits_are_drawn_apart():
    config = ShapesConfig(train_images=20, val_images=20, test_images=20)
    splits = [shapes.make_split(name, config) for name in shapes.SPLITS]
    for one, other in permutations(splits, 2):
        assert one.scenes != other.scenes
        assert not set(one.image_ids) & set(other.image_ids)


def test_answers_are_balanced_within_each_type():
    split = shapes.make_split("train", ShapesConfig(train_images=600, train_questions=2100))
    answers = defaultdict(Counter)
    for _, question in split.questions:
        answers[question.question_type][question.answer] += 1
    assert len(answers) == 7
    for counts in answers.values():
        assert len(set(counts.values())) == 1
    sizes = [sum(counts.values()) for counts in answers.values()]
    assert max(sizes) - min(sizes) <= 2


def test_the_words_of_an_existence_question_do_not_tell_its_answer():
    split = shapes.make_split("train", ShapesConfig(train_images=3000, train_questions=7000))
    yes = defaultdict(list)
    for _, question in split.questions:
        if question.question_type == "is there a":
            yes[question.text].append(question.answer == "yes")
    assert len(yes) == 12
    # About 83 questions each: .5 +- .055, so .3 to .7 is more than 3.5 standard deviations away.
    assert all(0.3 < np.mean(answers) < 0.7 for answers in yes.values())


def test_captions_load_through_the_ordinary_loader(written):
    data, derived = written
    for source in (data, derived):
        train, test = load_captions(source, "train", data / "Images"), load_captions(source, "test", data / "Images")
        assert (len(train.images), len(train.captions), len(test.images)) == (60, 120, 20)
        assert {image.path.parent.name for image in train.images} == {"train2014"}
        assert {image.path.parent.name for image in test.images} == {"val2014"}
    scene = shapes.make_split("test", SMALL).scenes[0]
    first = test.images[0].image_id
    assert sorted(test.references[first]) == sorted(shapes.captions(scene))


def test_questions_load_through_the_ordinary_loader(written):
    data, derived = written
    split = load_vqa(derived, "test", data / "Images")
    generated = shapes.make_split("test", SMALL).questions
    assert [question.text for question in split.questions] == [question.text for _, question in generated]
    assert all(len(question.answers) == 10 for question in split.questions)
    assert {entry["answer_type"] for entry in split.annotations()} <= {"yes/no", "number", "other"}
    vocabulary = AnswerVocabulary.load(derived)
    assert {question.answer for _, question in generated} <= set(vocabulary.answers)
    official = load_vqa(data, "test", data / "Images")
    assert [question.question_id for question in official.questions] == [q.question_id for q in split.questions]


def test_jpeg_loses_next_to_nothing(written):
    data, _ = written
    split = shapes.make_split("val", SMALL)
    stored = np.asarray(Image.open(data / "Images" / "val2014" / split.file_names[0])).astype(int)
    assert stored.shape == (36, 36, 3)
    assert np.abs(stored - split.images[0]).mean() < 6  # of 255; the noise alone has a standard deviation of 8


def test_a_set_with_the_same_settings_is_kept_and_another_replaced(tmp_path):
    tiny = ShapesConfig(train_images=2, val_images=1, test_images=1, train_questions=14)
    root = shapes.write_shapes(tmp_path / "set", tiny)
    mark = root / "Images" / "mark"
    mark.touch()
    assert shapes.write_shapes(root, tiny) == root
    assert mark.exists()
    shapes.write_shapes(root, ShapesConfig(seed=5, train_images=2, val_images=1, test_images=1, train_questions=14))
    assert not mark.exists()
    assert json.loads((root / "shapes.json").read_text())["seed"] == 5


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="no generated shapes set"):
        shapes.write_shapes(tmp_path, SMALL)
    assert (tmp_path / "mine.txt").exists()


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="val_images=0"):
        ShapesConfig(val_images=0)
