"""Settings that cannot be meant: one sentence that names file and key, exit status 2, nothing written."""

from pathlib import Path

import pytest
import yaml
from children import command, config_file

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)

TEXTS = {
    "empty": "",
    "null": "null\n",
    "a list": "- 1\n",
    "a number": "7\n",
    "aliases of aliases": LAUGHS,
    "deep": "[" * 20_000,
    "not UTF-8": b"\xff\xfe\x00",
    "a tag that is code": "task: !!python/object/apply:os.system ['true']\n",
    "a key twice": "task: vqa\ntrain:\n  lr: 1.0\n  lr: 2.0\n",
    "an unknown key": "task: vqa\ntrian: {}\n",
    "half a mapping": "task: [vqa\n",
}


@pytest.mark.parametrize("what", TEXTS)
def test_files_that_are_no_settings(what: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    text = TEXTS[what]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    run = tmp_path / "place" / "run"
    command("train", "--config", path, "--output_dir", run, seconds=20).assert_refused()
    assert not run.exists()


VALUES = [
    ("train.lr", None), ("train.lr", float("nan")), ("train.lr", float("inf")), ("train.lr", -1.0),
    ("train.lr", "0.001"),
    ("train.weight_decay", float("nan")), ("train.max_grad_norm", float("inf")), ("train.max_grad_norm", -1),
    ("train.warmup", float("nan")), ("train.betas", [-1, 0.5]), ("train.betas", None), ("train.betas", [0.9]),
    ("train.seed", 2**32), ("train.seed", -1), ("train.log_every", None), ("train.log_every", 0),
    ("train.trackers", None), ("train.epochs", 1e300), ("train.max_steps", 0), ("train.batch_size", 2.5),
    ("train.batch_size", True), ("train.mixed_precision", "fp8"), ("train.save_every", -3),
    ("routing.rank", 10**9), ("routing.rank", 0), ("routing.rank", "4"), ("routing.alpha", 1e308),
    ("routing.alpha", None), ("routing.alpha", float("nan")), ("routing.layers", [0, 0]), ("routing.layers", [99]),
    ("routing.dropout", 1.5), ("routing.routing", "muul"), ("data.workers", 100_000), ("data.max_text_length", 2),
    ("model.vision", None), ("model.vision", ""), ("model.text", ""), ("model.tokenizer", ""),
    ("eval.metrics", []), ("eval.metrics", ["CIDER"]), ("eval.num_beams", 0), ("eval.max_new_tokens", 10**9),
    ("output_dir", None), ("task", "vqaa"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), VALUES, ids=lambda part: str(part).replace("/", "-"))
def test_values_that_cannot_be_meant(key: str, value: object, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "place" / "run"
    task = "caption" if key.startswith("eval.") else "vqa"
    path = config_file(tiny, run, task, epochs=1.0) if key == "train.epochs" else config_file(tiny, run, task)
    settings = yaml.safe_load(path.read_text())
    if key == "train.epochs":
        settings["train"].pop("max_steps", None)
    section, _, name = key.rpartition(".")
    (settings[section] if section else settings)[name] = value
    path.write_text(yaml.safe_dump(settings))
    command("train", "--config", path, seconds=20).assert_refused(name)
    assert not run.exists()


def test_no_unquoted_means_no(tiny: Path, tmp_path: Path) -> None:
    """YAML makes False of it."""
    run = tmp_path / "place" / "run"
    path = config_file(tiny, run, max_steps=1)
    lines = [line for line in path.read_text().splitlines() if "mixed_precision" not in line]
    path.write_text("\n".join(lines).replace("train:\n", "train:\n  mixed_precision: no\n") + "\n")
    command("train", "--config", path).assert_fine()
    path.write_text(path.read_text().replace("mixed_precision: no", "mixed_precision: yes"))
    command("train", "--config", path, "--overwrite").assert_refused("mixed_precision")


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    command("train", "--config", config_file(tiny, run, max_steps=2)).assert_fine()
    return run


@pytest.mark.parametrize(
    "args",
    [("--limit", "0"), ("--limit", "-1"), ("--limit", "x"), ("--eval.num_beams",), ("--eval.num_beams", "-1"),
     ("--split", "nothing"), ("--split", "../x"), ("--checkpoint", "middle"), ("--routing.rank", "8")],
    ids=" ".join,
)  # fmt: skip
def test_flags_of_evaluate(args: tuple[str, ...], run: Path) -> None:
    command("evaluate", run, *args).assert_refused(args[0].lstrip("-"))


@pytest.mark.parametrize("text", ['{"task": "vqa"}', "", "/nowhere.yaml", "/proc/self/mem"])
def test_configs_that_are_no_files(text: str) -> None:
    command("train", "--config", text).assert_refused()


def test_paths_and_hub_names_without_a_network(tiny: Path, tmp_path: Path) -> None:
    """A misspelt path is called that; a hub name says that the hub could not be reached."""
    run = tmp_path / "place" / "run"
    config = config_file(tiny, run)
    for name in ("./vitt", "/nowhere/vit", "~/no such folder", "a/b/c"):
        command("train", "--config", config, "--model.vision", name).assert_refused(name.lstrip("~"))
    command("train", "--config", config, "--model.text", "nobody/nothing").assert_refused("nobody/nothing")
    assert not run.exists()


def test_export_through_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    command("export", run, tmp_path / "link" / "adapter").assert_fine()
    assert (tmp_path / "real" / "adapter" / "adapter_model.safetensors").is_file()


def test_files_have_the_users_mode(run: Path) -> None:
    """Colleagues can read an adapter."""
    import os

    umask = os.umask(0o077)
    os.umask(umask)
    for file in (run / "last").iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file
