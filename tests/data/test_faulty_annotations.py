"""Annotations with every kind of fault: refused at load, in one sentence that names the file and the entry."""

import json

import pytest

from routingvl.data import DataError, load_captions, load_labelled, load_vqa
from routingvl.data.examples import check_separate

CAPTIONS = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
    "annotations": [{"id": 10, "image_id": 1, "caption": "one"}, {"id": 11, "image_id": 2, "caption": "two"}],
}
QUESTIONS = [
    {"question_id": 1, "img_id": "cat_1", "sent": "What?", "label": {"red": 1.0}, "answers": [{"answer": "red"}] * 10},
    {"question_id": 2, "img_id": "dog_1", "sent": "Who?", "label": {"red": 0.3, "blue": 1}, "answer_type": "other"},
]


def copy(content):
    return json.loads(json.dumps(content))


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


IDS = [None, True, 1.5, float("nan"), {}, [1], "", 2**63]


@pytest.mark.parametrize("identity", IDS, ids=repr)
@pytest.mark.parametrize("place", ["images", "annotations", "references", "question_id", "cocoid", "sentid"])
def test_ids(tmp_path, identity, place):
    content = copy(QUESTIONS if place == "question_id" else CAPTIONS)
    if place in ("cocoid", "sentid"):
        sentence = {"raw": "one", "sentid": 3}
        content = {"images": [{"cocoid": 1, "filename": "a.jpg", "split": "val", "sentences": [sentence]}]}
        (sentence if place == "sentid" else content["images"][0])[place] = identity
    elif place == "question_id":
        content[1]["question_id"] = identity
    else:
        key = "image_id" if place == "references" else "id"
        content["annotations" if place == "references" else place][1][key] = identity
    path = write(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=r"must be an integer or a string|more than 64 bits|holds NaN") as caught:
        (load_vqa if place == "question_id" else load_captions)(path, "val")
    assert str(path) in str(caught.value)


def test_ids_may_be_strings_all_through(tmp_path):
    content = copy(CAPTIONS)
    for entry in (*content["images"], *content["annotations"]):
        entry["id"] = f"n{entry['id']}"
    for entry in content["annotations"]:
        entry["image_id"] = f"n{entry['image_id']}"
    assert load_captions(write(tmp_path / "a.json", content), "val").references == {"n1": ["one"], "n2": ["two"]}
    asked = [{**entry, "question_id": f"q{entry['question_id']}"} for entry in copy(QUESTIONS)]
    assert [q.question_id for q in load_vqa(write(tmp_path / "b.json", asked), "val").questions] == ["q1", "q2"]
    asked[0]["question_id"] = 1
    with pytest.raises(DataError, match="question ids are partly integers, partly strings: 1, 'q2'"):
        load_vqa(write(tmp_path / "b.json", asked), "val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(images=None), r'no "images" that is a list'),
        (lambda c: c.update(annotations=None), r'no "annotations" that is a list'),
        (lambda c: c["images"].append(5), "image number 2 does not have the expected form"),
        (lambda c: c["images"].append([]), "image number 2 does not have the expected form"),
        (lambda c: c["images"][1].pop("file_name"), "image number 1 has no key 'file_name'"),
        (lambda c: c["images"][1].update(id=1), "image 1 is listed twice"),
        (lambda c: c["images"][1].update(id="2"), "belongs to image 2|partly strings"),
        (lambda c: c["annotations"][1].update(id=10), "caption 10 is listed twice"),
        (lambda c: c["annotations"][1].update(image_id=1), "image 2 .and 0 more. has no caption while others have"),
        (lambda c: c["annotations"][1].update(caption=None), "annotation number 1 does not have the expected form"),
        (lambda c: c["annotations"][1].update(caption=["a"]), "annotation number 1 does not have the expected form"),
        (lambda c: c["annotations"][1].update(caption=" \n\t"), "caption 11 of image 2 is empty"),
        (lambda c: c["annotations"][1].update(caption="\ud800"), "half a surrogate pair"),
    ],
)
def test_captions(tmp_path, change, message):
    content = copy(CAPTIONS)
    change(content)
    path = write(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=message) as caught:
        load_captions(path, "val")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../a.jpg",
        "x/../../a.jpg",
        "..",
        "a\0b.jpg",
        "a" * 5000,
        "x/" + "é" * 128,
        "x/",
        ".",
        None,
        5,
        [],
    ],
    ids=lambda name: repr(name)[:20],
)
@pytest.mark.parametrize("root", [True, False])
def test_image_names_stay_inside_the_folder(tmp_path, name, root):
    content = copy(CAPTIONS)
    content["images"][1]["file_name"] = name
    path = write(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=r"the image name .* (leaves|names no|cannot be|is no text)") as caught:
        load_captions(path, "val", tmp_path if root else None)
    assert str(path) in str(caught.value)
    if isinstance(name, str) and not name.endswith(".jpg"):
        lines = "\n".join(json.dumps({"image": image, "text": "a"}) for image in ("a.jpg", name))
        write(tmp_path / "val.jsonl", lines)
        with pytest.raises(DataError, match=r"val.jsonl.*image"):
            load_labelled(tmp_path, "val", tmp_path if root else None)


def test_symbolic_links_lead_out_only_by_option(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    for folder in (outside, root / "val2014"):
        folder.mkdir(parents=True)
    for folder in (outside, root):
        (folder / "real.jpg").write_bytes(b"x")
    name = "COCO_val2014_000000000001.jpg"
    (root / "val2014" / name).symlink_to(outside / "real.jpg")
    (root / "folder").symlink_to(outside)
    (root / "inside.jpg").symlink_to("real.jpg")
    (tmp_path / "link").symlink_to(root)
    for image, target in ((name, outside), ("folder/real.jpg", outside), ("inside.jpg", root)):
        content = {"images": [{"id": 1, "file_name": image}], "annotations": []}
        path = write(tmp_path / "a.json", content)
        for given in (root, tmp_path / "link"):
            if target is outside:
                with pytest.raises(DataError, match=r"a.json: .* leads out of data.images .* data.allow_symlinks=true"):
                    load_captions(path, "val", given)
            (found,) = load_captions(path, "val", given, allow_symlinks=True).images
            assert found.path == target / "real.jpg", "the resolved file is what tells images apart"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[1].update(question_id=1), "question 1 is listed twice"),
        (lambda c: c[1].update(img_id=1), "img_id 1 of question 2 must be a name"),
        (lambda c: c[1].update(img_id=["a1"]), "img_id .* of question 2 must be a name"),
        (lambda c: c[1].update(img_id="../a1"), "image name '../a1.jpg' leaves"),
        (lambda c: c[1].update(img_id="9" * 5000), "cannot be the name of a file"),
        (lambda c: c[1].update(sent=5), "entry number 1 does not have the expected form"),
        (lambda c: c[1].update(sent="\udfff"), "half a surrogate pair"),
        (lambda c: c[1].update(sent="\u2028"), "question 2 is empty"),
        (lambda c: c[1].update(label=None), "entry number 1 does not have the expected form"),
        (
            lambda c: c[1].update(label={"red": 5}),
            "score of answer 'red' to question 2 is 5; it must be a number from 0",
        ),
        (lambda c: c[1].update(label={"red": -0.1}), "score of answer 'red' to question 2 is -0.1"),
        (lambda c: c[1].update(label={"red": True}), "score of answer 'red' to question 2 is True"),
        (lambda c: c[1].update(label={"red": "1"}), "score of answer 'red' to question 2 is '1'"),
        (lambda c: c[1].update(label={"red": None}), "score of answer 'red' to question 2 is None"),
        (lambda c: c[1].update(label={"red": float("nan")}), "holds NaN"),
        (lambda c: c[0].update(answers="red"), "answers of question 1 must be a list of strings"),
        (lambda c: c[0].update(answers={"answer": "red"}), "answers of question 1 must be a list of strings"),
        (lambda c: c[0].update(answers=[]), "answers of question 1 must be a list of strings"),
        (lambda c: c[0].update(answers=[["red"]]), "answers of question 1 must be a list of strings"),
        (lambda c: c[0].update(answers=[{"answer": 3}]), "answers of question 1 must be a list of strings"),
        (lambda c: c[0].update(answers=None), "does not have the expected form"),
        (lambda c: c[1].update(answer_type=["other"]), "answer_type of question 2 must be a string"),
        (lambda c: c[1].update(question_type={}), "question_type of question 2 must be a string"),
        (lambda c: c[1].pop("label"), "question 2 has neither label nor answers while others have"),
        (lambda c: (c[0].pop("label"), c[0].pop("answers")), "question 1 has neither label nor answers"),
        (lambda c: c.append(None), "entry number 2 does not have the expected form"),
    ],
)
def test_questions(tmp_path, change, message):
    content = copy(QUESTIONS)
    change(content)
    path = write(tmp_path / "karpathy_val.json", content)
    with pytest.raises(DataError, match=message) as caught:
        load_vqa(tmp_path, "val")
    assert str(path) in str(caught.value)


def test_keys_that_stand_twice(tmp_path):
    text = json.dumps(QUESTIONS).replace('"red": 0.3', '"red": 0.3, "red": 1.0')
    with pytest.raises(DataError, match="key 'red' twice"):
        load_vqa(write(tmp_path / "a.json", text), "val")


def test_line_breaks_become_spaces(tmp_path):
    content = copy(CAPTIONS)
    content["annotations"][0]["caption"] = "\rA man\nriding  a\t\r\n wave.\u2028\n"
    loaded = load_captions(write(tmp_path / "a.json", content), "val")
    assert loaded.captions[0].text == "A man riding  a wave."
    asked = copy(QUESTIONS)
    asked[0]["sent"] = "What\n is it?\n"
    assert load_vqa(write(tmp_path / "b.json", asked), "val").questions[0].text == "What is it?"
    write(tmp_path / "val.jsonl", json.dumps({"image": "a.jpg", "text": ["one\ntwo", "three"], "label": "x"}))
    assert load_labelled(tmp_path, "val").examples[0].text == ("one two", "three")


def test_captions_without_a_word_are_said(tmp_path, caplog):
    content = copy(CAPTIONS)
    content["annotations"][1]["caption"] = "..."
    loaded = load_captions(write(tmp_path / "a.json", content), "val")
    assert loaded.captions[1].text == "..."
    assert "1 captions have no word, first '...' of image 2" in caplog.text


def test_splits_that_share_examples(tmp_path):
    path = write(tmp_path / "own.json", CAPTIONS)
    train, val = (load_captions(path, split) for split in ("train", "val"))
    assert not train.split_in_file
    with pytest.raises(DataError, match=r"'train' and 'val' share examples, such as a.jpg.*data.allow_shared_splits"):
        check_separate(train, val)
    path = write(tmp_path / "list.json", QUESTIONS)
    questions = load_vqa(path, "train"), load_vqa(path, "val")
    assert not questions[0].split_in_file
    with pytest.raises(DataError, match=r"share examples, such as cat_1\.jpg"):
        check_separate(*questions)
    other = [{**entry, "sent": f"Really, {entry['sent']}"} for entry in QUESTIONS]
    check_separate(questions[0], load_vqa(write(tmp_path / "other.json", other), "val"))
    lines = [json.dumps({"image": "a.jpg", "text": text, "label": "x"}) for text in ("one", "two", "three")]
    for split, part in (("train", lines[:2]), ("val", lines[1:]), ("test", lines[2:])):
        write(tmp_path / f"{split}.jsonl", "\n".join(part))
    first, second, third = (load_labelled(tmp_path, split) for split in ("train", "val", "test"))
    check_separate(first, third)
    with pytest.raises(DataError, match=r"share examples, such as a\.jpg"):
        check_separate(first, second)
