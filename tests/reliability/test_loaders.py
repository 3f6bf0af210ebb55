"""Every loader on files that were changed at random: it reads them, or raises the error of its room, nothing else."""

import copy
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from children import config_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import answerer, captioner, small_roberta, small_vit

from routingvl import ViTRobertaForVQA
from routingvl.backbones.loading import BackboneError
from routingvl.bottlenecks.checkpoint import CheckpointError
from routingvl.bottlenecks.peft_format import export_peft, import_peft
from routingvl.config import ConfigError, RoutingConfig
from routingvl.config.files import load_config
from routingvl.data import (
    AnswerVocabulary,
    DataError,
    ImageError,
    ImagePreprocessor,
    load_captions,
    load_image,
    load_labelled,
    load_vqa,
)
from routingvl.data.feature_cache import FeatureCache, FeatureCacheError
from routingvl.metrics.results import ResultFileError, read_coco_results, read_vqa_results

many = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.integers(-2, 3), st.just(10**30),
        st.sampled_from(["", "../x", "/etc/passwd", "a\0b", "\ud800", "train", "nan", "-1", "x" * 5000]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The way to every part of a JSON value."""
    yield at
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*at, key))


@st.composite
def changed(draw: Callable, content: Any) -> Any:
    """``content`` with up to three of its parts replaced, dropped or listed twice."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        way = draw(st.sampled_from(list(places(content))))
        if not way:
            return draw(VALUES)
        parent = content
        for key in way[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "drop", "double"]))
        if action == "drop":
            del parent[way[-1]]
        elif action == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[way[-1]]))
        else:
            parent[way[-1]] = draw(VALUES)
    return content


@st.composite
def damaged(draw: Callable, data: bytes) -> bytes:
    """``data`` cut, with some bytes changed, or with some put in."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        action = draw(st.sampled_from(["cut", "change", "insert", "zero"]))
        if action == "cut":
            del data[at:]
        elif action == "change" and data:
            data[at] = draw(st.integers(0, 255))
        elif action == "zero":
            data[at : at + 8] = bytes(len(data[at : at + 8]))
        else:
            data[at:at] = draw(st.binary(max_size=8))
    return bytes(data)


def dumped(content: Any) -> bytes:
    return json.dumps(content).encode()


def lines(rows: Any) -> bytes:
    return b"\n".join(dumped(row) for row in (rows if isinstance(rows, list) else [rows]))


def written(value: Any) -> bytes:
    return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "replace")


def either(content: Any, write: Callable[[Any], bytes] = dumped) -> st.SearchStrategy[bytes]:
    """Files of other values, and files with other bytes."""
    return st.one_of(changed(content).map(write), damaged(write(content)))


def reads_or_raises(load: Callable[[], object], *errors: type[ValueError]) -> None:
    """The message is not empty, and short enough to be read."""
    message = "read"
    try:
        load()
    except errors as error:
        message = str(error)
    assert 0 < len(message) < 6000


QUESTIONS = [
    {
        "img_id": f"COCO_val2014_{number:012d}", "question_id": number, "sent": "what color is it?",
        "label": {"red": 1.0}, "answers": [{"answer": "red", "answer_confidence": "yes", "answer_id": 1}],
        "question_type": "what color", "answer_type": "other",
    }
    for number in (101, 102)
]  # fmt: skip
CAPTIONS = {
    "images": [
        {
            "filepath": "val2014", "filename": f"COCO_val2014_{number:012d}.jpg", "imgid": number, "cocoid": number,
            "split": "train", "sentids": [number],
            "sentences": [{"raw": "a red square", "tokens": [], "sentid": number}],
        }
        for number in (101, 102)
    ],
    "dataset": "coco",
}  # fmt: skip
COCO = {
    "images": [{"id": 101, "file_name": "COCO_val2014_000000000101.jpg"}],
    "annotations": [{"id": 1, "image_id": 101, "caption": "a red square"}],
}
STATEMENTS = [
    {"id": f"{number}#1", "image": f"COCO_val2014_{number:012d}.jpg", "text": "it is red", "label": "true"}
    for number in (101, 102)
]
RESULTS = [{"image_id": 1, "caption": "a red square"}, {"image_id": 2, "caption": "a blue square"}]


@many
@given(data=either(QUESTIONS))
def test_questions(data: bytes, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "karpathy_train.json").write_bytes(data)
    reads_or_raises(lambda: load_vqa(tmp_path, "train", tiny / "data"), DataError)


@many
@given(data=st.one_of(either(CAPTIONS), either(COCO)))
def test_captions(data: bytes, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "captions.json").write_bytes(data)
    reads_or_raises(lambda: load_captions(tmp_path / "captions.json", "train", tiny / "data"), DataError)


@many
@given(data=either(STATEMENTS, lines))
def test_labelled_texts(data: bytes, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(data)
    reads_or_raises(lambda: load_labelled(tmp_path, "train", tiny / "data"), DataError)


@many
@given(data=st.one_of(either(["red", "green", "blue"]), either({"red": 0, "green": 1})))
def test_answer_vocabularies(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "trainval_label2ans.json").write_bytes(data)
    reads_or_raises(lambda: AnswerVocabulary.load(tmp_path / "trainval_label2ans.json"), DataError)


@many
@given(data=either(RESULTS))
def test_result_files(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(data)
    reads_or_raises(lambda: read_coco_results(tmp_path / "results.json"), ResultFileError)
    (tmp_path / "results.json").write_bytes(data.replace(b"image_id", b"question_id").replace(b"caption", b"answer"))
    reads_or_raises(lambda: read_vqa_results(tmp_path / "results.json"), ResultFileError)


@many
@given(content=st.data())
def test_settings(content: st.DataObject, tmp_path: Path, tiny: Path) -> None:
    path = config_file(tiny, tmp_path / "run")
    whole = yaml.safe_load(path.read_text())
    path.write_bytes(content.draw(either(whole, written)))
    reads_or_raises(lambda: load_config(path), ConfigError)


@many
@given(data=either(ImagePreprocessor(size=16).to_dict()))
def test_preprocessing(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_bytes(data)
    reads_or_raises(lambda: ImagePreprocessor.from_pretrained(tmp_path), DataError)


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(buffer, format=kind)
    return buffer.getvalue()


PICTURES = [picture(kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]


@settings(many, max_examples=300)
@given(data=st.sampled_from(PICTURES).flatmap(damaged))
def test_images(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "image.jpg").write_bytes(data)
    reads_or_raises(lambda: load_image(tmp_path / "image.jpg"), ImageError)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    answerer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def backbones() -> dict[str, Any]:
    return {"vision": small_vit(), "text": small_roberta()}


@settings(many, max_examples=60)
@given(content=st.data())
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters(content: st.DataObject, name: str, adapter: Path, backbones: dict[str, Any], tmp_path: Path) -> None:
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = (adapter / name).read_bytes()
    wanted = either(json.loads(data)) if name.endswith("json") else damaged(data)
    (tmp_path / name).write_bytes(content.draw(wanted))
    given = copy.deepcopy(backbones)
    reads_or_raises(lambda: ViTRobertaForVQA.from_pretrained(tmp_path, **given), CheckpointError, BackboneError)


@settings(many, max_examples=60)
@given(content=st.data())
def test_peft_adapters(content: st.DataObject, tmp_path: Path) -> None:
    model = captioner(RoutingConfig(rank=4, alpha=8, routing="none"))
    export_peft(model, tmp_path)
    name = content.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    data = (tmp_path / name).read_bytes()
    wanted = either(json.loads(data)) if name.endswith("json") else damaged(data)
    (tmp_path / name).write_bytes(content.draw(wanted))
    reads_or_raises(lambda: import_peft(model, tmp_path), CheckpointError)


@many
@given(content=st.data())
def test_feature_caches(content: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    key = {"model": "tiny"}
    FeatureCache(folder, key, (1, 4), torch.float32).add([bytes(32), bytes([1] * 32)], torch.ones(2, 1, 4))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = content.draw(st.sampled_from(files))
    path.write_bytes(content.draw(damaged(path.read_bytes())))

    def read() -> None:
        cache = FeatureCache(folder, key, (1, 4), torch.float32)
        cache.refresh()
        for digest in cache.digests():
            cache.find(digest)

    reads_or_raises(read, FeatureCacheError)
