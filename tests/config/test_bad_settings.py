"""Settings that cannot be meant: each is refused by its key, in files and flags alike, within a moment."""

import os

import pytest

from routingvl.config import ConfigError, RoutingConfig
from routingvl.config.files import MOST_VALUES, config_to_yaml, load_config, parse_config
from routingvl.config.schema import RunConfig, TrainConfig, override, run_config_from_dict

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

VALUES = [
    # key, YAML, message
    ("train.lr", ".inf", "lr=inf must be a finite number"),
    ("train.lr", "-.inf", "lr=-inf must be a finite number"),
    ("train.lr", ".nan", "lr=nan must be a finite number"),
    ("train.lr", "null", "lr=None must be a finite number"),
    ("train.lr", "-1e-3", "lr=-0.001 must be above 0"),
    ("train.lr", "1e400", "lr=inf must be a finite number"),
    ("train.lr", "true", "lr=True must be a finite number"),
    ("train.lr", "[1e-3]", r"lr=\[0.001\] must be a finite number"),
    ("train.epochs", "1e300", "epochs=1e\\+300 must be at most 1000000"),
    ("train.max_grad_norm", ".inf", "max_grad_norm=inf must be a finite number or null"),
    ("train.weight_decay", ".nan", "weight_decay=nan must be a finite number"),
    ("train.warmup", ".nan", "warmup=nan must be an integer or a finite number"),
    ("train.eps", "1e-300", "eps=1e-300 must be at least 1e-30"),
    ("train.betas", "[-1, 0.5]", "betas=-1 must be at least 0"),
    ("train.betas", "[0.9]", r"betas=\[0.9\] must be a list of two"),
    ("train.betas", "null", "betas=None must be a list of two"),
    ("train.seed", "4294967296", "seed=4294967296 must be at most 4294967295"),
    ("train.max_steps", "1" * 5000, "max_steps=.* must be at most|digits"),
    ("train.max_steps", "0x" + "f" * 8000, "max_steps=.* must be an integer or null"),
    ("train.max_steps", "010", "max_steps='010' must be an integer"),
    ("train.max_steps", "1:30", "max_steps='1:30' must be an integer"),
    ("train.max_steps", "2.5", "max_steps=2.5 must be an integer"),
    ("train.log_every", "null", "log_every=None must be an integer"),
    ("train.trackers", "null", "trackers=None must be a list of texts"),
    ("train.trackers", "[wandb, wandb]", "trackers=.* names something twice"),
    ("train.mixed_precision", "true", "mixed_precision=True must be a text|'true' is not one of 'no'"),
    ("routing.rank", "1000000000", "rank=1000000000 must be at most 16384"),
    ("routing.rank", "true", "rank=True must be an integer"),
    ("routing.alpha", "null", "alpha=None must be a finite number"),
    ("routing.alpha", "1e308", r"alpha=1e\+308 must be"),
    ("routing.layers", "[0, 0]", r"layers=\[0, 0\] names something twice"),
    ("routing.layers", "[-1]", "layers=-1 must be at least 0"),
    ("routing.layers", "[]", "layers is empty"),
    ("routing.layers", "3", "layers=3 must be a list of integers or null"),
    ("routing.targets", "query", "targets='query' must be a list of texts or null"),
    ("train.batch_size", "1000000000", "batch_size=1000000000 must be at most 65536"),
    ("data.workers", "100000", "workers=100000 must be at most 256"),
    ("data.max_text_length", "2", "max_text_length=2 must be at least 3"),
    ("data.images", "''", "images is empty"),
    ("model.vision", "null", "vision=None must be a text"),
    ("model.vision", "''", "vision is empty"),
    ("model.text", "''", "text is empty"),
    ("model.tokenizer", "''", "tokenizer is empty"),
    ("model.text", "[gpt2]", "text=.* must be a text or null"),
    ("model.vision", '"a\\0b"', "vision='a.x00b' holds control characters"),
    ("eval.metrics", "[]", "metrics is empty"),
    ("eval.length_penalty", ".inf", "length_penalty=inf must be a finite number"),
]


def write(folder, key, text):
    path = folder / "run.yaml"
    part, _, name = key.rpartition(".")
    path.write_text(f"{part}:\n  {name}: {text}\n")
    return path


@pytest.mark.parametrize(("key", "text", "message"), VALUES)
def test_a_value_in_a_file(tmp_path, key, text, message):
    path = write(tmp_path, key, text)
    with pytest.raises(ConfigError, match=message) as error:
        parse_config(["--config", str(path)])
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(("key", "text", "message"), [row for row in VALUES if "'" not in row[1] and '"' not in row[1]])
def test_a_value_as_a_flag(key, text, message):
    if key == "model.text":
        pytest.skip("a flag's text is taken as it stands")
    with pytest.raises(ConfigError, match=message) as error:
        parse_config([f"--{key}={text}"])
    assert f"--{key}" in str(error.value)


@pytest.mark.parametrize("key", ["train.lr", "train.max_steps", "routing.rank", "routing.dropout", "data.workers"])
def test_a_quoted_number_is_no_number(tmp_path, key):
    with pytest.raises(ConfigError, match=f"{key.split('.')[1]}='1' must be"):
        load_config(write(tmp_path, key, "'1'"))


@pytest.mark.parametrize("word", ["no", "No", "off", "false", "'no'"])
def test_no_needs_no_quotes(tmp_path, word):
    path = write(tmp_path, "train.mixed_precision", word)
    assert load_config(path).train.mixed_precision == "no"
    assert parse_config(["--train.mixed_precision", "no"]).train.mixed_precision == "no"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold settings .* not None"),
        ("null", "must hold settings .* not None"),
        ("# nothing\n", "must hold settings .* not None"),
        ("- train\n", "must hold settings"),
        ("train", "must hold settings .* not 'train'"),
        ("train: {lr: 1e-3, lr: 2e-3}\n", "key 'lr' stands twice"),
        ("train: {lr: 1e-3}\ntask: vqa\ntrain: {lr: 2e-3}\n", "key 'train' stands twice"),
        ("epoch: 3\n", "unknown key 'epoch'"),
        ("comment: mine\n", "unknown key 'comment'"),
        ("3: 4\n", "unknown key 3"),
        ("? [a, b]\n: 3\n", "cannot be read as YAML|unknown key"),
        ("train: null\n", "train must hold keys such as lr, not None"),
        ("train: {1: 2}\n", "unknown key 'train.1'"),
        (BOMB, f"more than {MOST_VALUES:,} values"),
        (f"{BOMB}routing: {{layers: *i}}\n", f"more than {MOST_VALUES:,} values"),
        ("a: &a [*a]\n", "nested too deeply|more than"),
        ("[" * 50_000, "nested too deeply"),
        ("{a: " * 50_000, "nested too deeply"),
        ("train: !!python/object/apply:os.system ['true']\n", "cannot be read as YAML"),
        ("train: {lr: 1e-3", "cannot be read as YAML"),
        ("task: vqa\n---\ntask: caption\n", "cannot be read as YAML"),
        ("x" * (2**20 + 1), "larger than 1,048,576 bytes"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    for read in (load_config, lambda path: parse_config(["--config", str(path)])):
        with pytest.raises(ConfigError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_what_is_no_text_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"task: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: .*utf-8"):
        load_config(path)
    path.write_bytes(b"task: vqa\0\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: it cannot be read as YAML"):
        load_config(path)
    os.mkfifo(tmp_path / "fifo.yaml")
    for other in (tmp_path, tmp_path / "fifo.yaml"):
        with pytest.raises(ConfigError, match="is not a file; give the path of a YAML file"):
            load_config(other)
    with pytest.raises(ConfigError, match="does not exist; give the path of a YAML file"):
        parse_config(["--config", "{task: vqa}"])  # a file, not its content


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--train.lr"], "--train.lr: expected one argument"),
        (["--config"], "--config: expected one argument"),
        (["--train.lr", "1e-3", "1e-4"], "unknown argument 1e-4"),
        (["--train.lr="], "--train.lr=None must be a finite number"),
        (["--config="], "--config|does not exist|is not a file"),
        (["--routing.layers", "[" * 5000], "--routing.layers: .*too deeply"),
        (["--model.vision", ""], "--model.vision is empty"),
    ],
)
def test_flags_without_a_value_or_with_two(args, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(args)


def test_aliases_and_merges_within_bounds_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: &shared {lr: 1e-3}\nrouting: {layers: [0, 1]}\n")
    assert load_config(path).train.lr == 1e-3
    path.write_text("eval: {batch_size: &size 8}\ntrain: {batch_size: *size}\n")
    assert load_config(path).train.batch_size == 8


def test_a_setting_of_python_is_checked_too():
    for cls, values in (
        (TrainConfig, {"lr": float("nan")}),
        (TrainConfig, {"log_every": None}),
        (RoutingConfig, {"rank": "4"}),
    ):
        with pytest.raises(ConfigError, match="must be"):
            cls(**values)
    with pytest.raises(ConfigError, match="train: lr=nan"):
        override(RunConfig(), lr=float("nan"))
    with pytest.raises(ConfigError, match="train must hold keys such as lr, not 3"):
        run_config_from_dict({"train": 3})
    config = override(RunConfig(), layers=[1, 0], betas=[0.5, 0.9])
    assert (config.routing.layers, config.train.betas) == ((1, 0), (0.5, 0.9))


def test_what_is_written_is_read_again(tmp_path):
    config = override(RunConfig(), lr=1e-7, output_dir="no", vision="1e3", images="010", annotations="1:30")
    path = tmp_path / "run.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(path) == config


def test_a_setting_given_nested_and_dotted_stands_twice(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {lr: 1e-3}\ntrain.lr: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"c\.yaml: key 'train\.lr' stands twice"):
        load_config(path)


def test_a_setting_out_of_range_is_named_in_full(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("eval: {batch_size: 0}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"c\.yaml: eval\.batch_size=0 must be at least 1"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"--train\.batch_size=1000000 must be at most 65536"):
        parse_config(["--train.batch_size", "1000000"])


def test_two_dashes_alone_are_no_flag():
    with pytest.raises(ConfigError, match="unknown argument x"):
        parse_config(["--", "x"])
