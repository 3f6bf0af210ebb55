"""Annotations and images that cannot be meant: refused in one sentence before anything is written."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from children import command, config_file
from PIL import Image

Change = Callable[[list], object]
DEEP = "[" * 100_000


@pytest.fixture
def data(tiny: Path, tmp_path: Path) -> Path:
    """The tiny inputs with data of one's own."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    for name in ("vit", "roberta", "gpt2"):
        (folder / name).symlink_to(tiny / name)
    shutil.copytree(tiny / "data", folder / "data")
    return folder


def refused(data: Path, task: str, *words: str, **settings: object) -> None:
    run = data.parent / "place" / "run"
    command("train", "--config", config_file(data, run, task, **settings)).assert_refused(*words)
    assert not run.exists()


def change(path: Path, edit: Callable) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


TEXTS = {
    "nested": DEEP,
    "empty": "",
    "truncated": '[{"img_id": "COCO_val2',
    "a number": "7",
    "null": "null",
    "an object": "{}",
    "not UTF-8": b"\xff\xfe[]",
    "5000 digits": '[{"img_id": ' + "7" * 5000 + "}]",
    "duplicate keys": '[{"question_id": 1, "question_id": 2}]',
}


@pytest.mark.parametrize("what", TEXTS)
@pytest.mark.parametrize(
    ("task", "file"), [("vqa", "karpathy_train.json"), ("caption", "dataset_coco.json"), ("classify", "train.jsonl")]
)
def test_files_that_are_no_annotations(task: str, file: str, what: str, data: Path) -> None:
    text = TEXTS[what]
    (data / "data" / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(data, task, file)


QUESTIONS: dict[str, Change] = {
    "question_id null": lambda c: c[0].update(question_id=None),
    "question_id NaN": lambda c: c[0].update(question_id=float("nan")),
    "question_id a list": lambda c: c[0].update(question_id=[1]),
    "question_id twice": lambda c: c[1].update(question_id=c[0]["question_id"]),
    "no question_id": lambda c: c[0].pop("question_id"),
    "sent a number": lambda c: c[0].update(sent=5),
    "sent empty": lambda c: c[0].update(sent=" "),
    "sent a lone surrogate": lambda c: c[0].update(sent="what \ud800"),
    "label score 5": lambda c: c[0].update(label={"red": 5.0}),
    "label score below 0": lambda c: c[0].update(label={"red": -0.5}),
    "label score NaN": lambda c: c[0].update(label={"red": float("nan")}),
    "label score a word": lambda c: c[0].update(label={"red": "abc"}),
    "label a list": lambda c: c[0].update(label=["red"]),
    "one without an answer": lambda c: [c[4].pop("label"), c[4].pop("answers")],
    "an entry that is a list": lambda c: c.append([]),
    "image outside": lambda c: c[0].update(img_id="../../../../etc/passwd"),
    "image absolute": lambda c: c[0].update(img_id="/etc/passwd"),
    "image of 5000 letters": lambda c: c[0].update(img_id="a" * 5000),
    "image with NUL": lambda c: c[0].update(img_id="a\0b"),
}


@pytest.mark.parametrize("what", QUESTIONS)
def test_questions(what: str, data: Path) -> None:
    change(data / "data/karpathy_train.json", QUESTIONS[what])
    refused(data, "vqa")


VALIDATION: dict[str, Change] = {
    "answers one string": lambda c: c[0].update(answers="red"),
    "answer_type a list": lambda c: c[0].update(answer_type=["other"]),
    "question_type an object": lambda c: c[0].update(question_type={}),
    "answers numbers": lambda c: c[0].update(answers=[1, 2]),
}


@pytest.mark.parametrize("what", VALIDATION)
def test_questions_of_validation(what: str, data: Path) -> None:
    change(data / "data/karpathy_val.json", VALIDATION[what])
    refused(data, "vqa", "karpathy_val.json")


def images(edit: Callable[[dict], object]) -> Callable[[dict], object]:
    return lambda content: edit(content["images"][0])


CAPTIONS: dict[str, Callable[[dict], object]] = {
    "duplicate image": lambda c: c["images"].append(c["images"][0]),
    "duplicate caption": lambda c: c["images"][1]["sentences"][0].update(
        sentid=c["images"][0]["sentences"][0]["sentid"]
    ),
    "id a string that is no number": images(lambda i: i.update(cocoid={"a": 1})),
    "id NaN": images(lambda i: i.update(cocoid=float("nan"))),
    "caption a number": images(lambda i: i["sentences"][0].update(raw=3)),
    "caption empty": images(lambda i: i["sentences"][0].update(raw="  ")),
    "caption a lone surrogate": images(lambda i: i["sentences"][0].update(raw="a \ud800")),
    "image outside": images(lambda i: i.update(filename="../../../../../../../etc/passwd")),
    "folder outside": images(lambda i: i.update(filepath="../../..")),
    "image absolute": images(lambda i: i.update(filename="/etc/passwd")),
    "image with NUL": images(lambda i: i.update(filename="a\0b.jpg")),
    "image empty": images(lambda i: i.update(filename="")),
    "image of 5000 letters": images(lambda i: i.update(filename="a" * 5000 + ".jpg")),
    "images a list of numbers": lambda c: c.update(images=[1, 2]),
    "images null": lambda c: c.update(images=None),
    "unknown split": images(lambda i: i.update(split="holdout")),
}


@pytest.mark.parametrize("what", CAPTIONS)
def test_captions(what: str, data: Path) -> None:
    change(data / "data/dataset_coco.json", CAPTIONS[what])
    refused(data, "caption")


def test_a_split_may_not_serve_twice(data: Path) -> None:
    """train = val, or two splits with the same questions: a number measured on what was learned."""
    shutil.copy(data / "data/karpathy_train.json", data / "data/karpathy_val.json")
    refused(data, "vqa")
    refused(data, "classify", **{"data.val_split": "train"})


def test_a_reference_without_a_word_does_not_end_a_run(data: Path) -> None:
    """pycocoevalcap scores it; what was learned is saved first."""

    def edit(content: dict) -> None:
        for image in content["images"]:
            if image["split"] == "val":
                image["sentences"][0]["raw"] = "..."

    change(data / "data/dataset_coco.json", edit)
    run = data.parent / "place" / "run"
    command("train", "--config", config_file(data, run, "caption")).assert_fine()
    assert (run / "last").is_dir()


def test_images_that_end_in_the_same_number_stay_apart(data: Path) -> None:
    """Features in the cache or in memory are those of the question's own image."""
    folder, questions = data / "data", []
    other = {"red": "blue", "green": "white", "blue": "red", "white": "green"}
    for number, colour in enumerate(("red", "green", "blue", "white") * 2, start=1):
        for kind in ("cat", "dog"):
            shade = colour if kind == "cat" else other[colour]
            Image.new("RGB", (24, 20), shade).save(folder / f"val2014/{kind}_{number}.jpg")
            questions.append((f"{kind}_{number}", shade))
    for split in ("train", "val"):
        own = [
            {"id": f"{split}-{name}", "image": f"val2014/{name}.jpg", "text": f"{split} color?", "label": colour}
            for name, colour in questions
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    scores = []
    for cache in (None, str(data.parent / "features")):
        run = data.parent / f"place-{cache is None}" / "run"
        settings = {"data.feature_cache": cache, "max_steps": 40, "eval_every": 40}
        command("train", "--config", config_file(data, run, "classify", **settings)).assert_fine()
        last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        scores.append([row for row in last if row["kind"] == "validation"][-1]["accuracy"])
    assert scores[0] == scores[1]


# ------------------------------------------------------------------------------------------------------------- images


@pytest.fixture(scope="module")
def captioner(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("captioner") / "run"
    command("train", "--config", config_file(tiny, run, "caption", max_steps=2)).assert_fine()
    return run


def eps(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path, format="EPS")


def other_format(name: str) -> Callable[[Path], None]:
    return lambda path: Image.new("RGB", (8, 8)).save(path, format=name)


def cut_short(path: Path) -> None:
    Image.effect_noise((64, 64), 50).convert("RGB").save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:400])


BAD_IMAGES: dict[str, Callable[[Path], object]] = {
    "EPS": eps,
    "DDS": other_format("DDS"),
    "PPM": other_format("PPM"),
    "ICO": other_format("ICO"),
    "a text": lambda path: path.write_text("no image"),
    "empty": lambda path: path.touch(),
    "cut short": cut_short,
    "a folder": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a broken link": lambda path: path.symlink_to("nowhere"),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("what", BAD_IMAGES)
def test_images_that_are_none(what: str, captioner: Path, tmp_path: Path) -> None:
    """Named, at once: no external program, no waiting for a writer, no endless device."""
    place = tmp_path / "picture.jpg"
    BAD_IMAGES[what](place)
    command("caption", captioner, place, before=no_programs, seconds=20).assert_refused("picture.jpg")


def no_programs() -> None:
    """In a child: whoever starts another program is ended."""
    import subprocess

    def refuse(*args, **kwargs):
        os.abort()

    subprocess.Popen = subprocess.run = subprocess.call = subprocess.check_call = os.system = refuse


def test_one_bad_image_of_many_loses_none_of_the_others(captioner: Path, tmp_path: Path) -> None:
    good = []
    for number in range(5):
        good.append(tmp_path / f"good-{number}.jpg")
        Image.new("RGB", (9, 9), "red").save(good[-1])
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    outcome = command("caption", captioner, *good[:3], bad, *good[3:])
    outcome.assert_refused("bad.jpg")
    assert [line.split("\t")[0] for line in outcome.out.splitlines()] == [str(path) for path in good]


@pytest.mark.parametrize("name", ["--a.jpg", "a b.jpg", "tab\there.jpg", "new\nline.jpg", "ü.jpg", "文.jpg"], ids=ascii)
def test_odd_names_of_images(name: str, captioner: Path, tmp_path: Path) -> None:
    """One JSON line an image, and what starts with dashes goes behind --."""
    Image.new("RGB", (9, 9), "red").save(tmp_path / name)

    def there() -> None:
        os.chdir(tmp_path)

    outcome = command("caption", captioner, "--json", "--", name, before=there).assert_fine()
    lines = outcome.out.splitlines()
    assert [json.loads(line)["image"] for line in lines] == [name]


def test_an_ascii_terminal(captioner: Path, tmp_path: Path) -> None:
    """Other letters are written as well as can be, in results and in messages."""

    def ascii_only() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="ascii")

    Image.new("RGB", (9, 9), "red").save(tmp_path / "ü.jpg")
    for more in ((), ("--json",)):
        outcome = command("caption", captioner, tmp_path / "ü.jpg", *more, before=ascii_only).assert_fine()
        assert len(outcome.out.splitlines()) == 1
    command("caption", captioner, tmp_path / "missing-ü.jpg", before=ascii_only).assert_refused("missing-")


def test_a_missing_name_that_is_not_utf8(captioner: Path, tmp_path: Path) -> None:
    command("caption", captioner, os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).assert_refused(".jpg")
