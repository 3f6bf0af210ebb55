"""Run settings from YAML files and command lines, and back: unknown keys and flags are errors that name the nearest."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml

from routingvl.config.checks import ConfigError, nearest, shown
from routingvl.config.schema import (
    PARTS,
    RunConfig,
    check_one,
    config_to_dict,
    explanations,
    flatten,
    known_keys,
    override,
    run_config_from_dict,
    type_of,
)

LARGEST_FILE = 2**20  # bytes
MOST_VALUES = 10_000  # keys and values in a file, those behind aliases counted as often as they stand


class _Loader(yaml.SafeLoader):
    """PyYAML's loader, but 3e-4 is a number, and 010, 1:30 and 2026-01-01 are texts and not 8, 90 and a date."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (filled below)


for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"(?i:true|false|yes|no|on|off)",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(?i:inf)|\.(?i:nan)",
    "merge": r"<<",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), None)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that :class:`_Loader` would not read as texts."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def read_yaml(text: str) -> Any:
    """What a YAML text holds.

    Raises:
        ConfigError: it is not YAML, a key stands twice, or it is too large or too deep.
    """
    try:
        node = yaml.compose(text, _Loader)
        _check_node(node, [MOST_VALUES])
        return None if node is None else _Loader("").construct_document(node)
    except RecursionError as error:
        raise ConfigError("it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"it cannot be read as YAML: {' '.join(str(error).split())}") from error


def _check_node(node: yaml.Node, left: list[int]) -> None:
    """Refuse a key that stands twice, and more than ``left`` nodes below ``node``."""
    left[0] -= 1
    if left[0] < 0:
        raise ConfigError(f"it holds more than {MOST_VALUES:,} values")
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in children if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ConfigError(f"key {twice[0]!r} stands twice")
        children = [node for pair in children for node in pair]
    for child in children:
        _check_node(child, left)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, each under its dotted name.

    Raises:
        ConfigError: there is no such file, or it holds anything but settings; the message names file and key.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise ConfigError(f"{path} {problem}; give the path of a YAML file such as configs/vqa-lora.yaml")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"it is larger than {LARGEST_FILE:,} bytes")
        data = read_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ConfigError(f"it must hold settings such as 'train:' with 'lr: 3e-4' below it, not {shown(data)}")
        settings, known = {}, known_keys()
        for key, value in data.items():
            if key in PARTS and not isinstance(value, dict):
                run_config_from_dict({key: value})  # raises
            parts = {f"{key}.{name}": item for name, item in value.items()} if key in PARTS else {key: value}
            if twice := settings.keys() & parts.keys():
                raise ConfigError(f"key {min(twice)!r} stands twice")
            settings |= parts
        for key, value in settings.items():
            if key not in known:
                raise ConfigError(f"unknown key {shown(key)}{nearest_key(str(key), known)}")
            check_one(key, value)
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return settings


def recipes() -> dict[str, Path]:
    """The published recipes that ship with the library (configs/), by name."""
    folder = resources.files("routingvl.configs")
    return {Path(entry.name).stem: Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".yaml")}


def nearest_key(name: str, known: Sequence[str], prefix: str = "") -> str:
    """The hint of :func:`~routingvl.config.nearest` for a dotted name; a key given without its part is found too."""
    name = name.replace("-", "_")
    same_leaf = [key for key in dict.fromkeys(known) if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    if same_leaf:
        return f"; did you mean {' or '.join(repr(prefix + key) for key in same_leaf)}?"
    return nearest(prefix + name, [prefix + key for key in known])


class CommandParser(argparse.ArgumentParser):
    """An argument parser without abbreviations that raises :class:`ConfigError`, with the nearest flag, not exit.

    ``example`` is a complete command line, shown under --help.
    """

    def __init__(self, command: str, description: str, example: str) -> None:
        super().__init__(
            prog=f"routingvl {command}",
            description=description,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Turn argparse's complaint into an exception."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            words = [word for word in message.removeprefix(prefix).split() if word != "--"]
            name, _, _ = (words or ["--"])[0].partition("=")
            flags = [flag.removeprefix("--") for action in self._actions for flag in action.option_strings]
            message = f"unknown argument {name}"
            if name.startswith("-"):
                message = f"unknown flag {name}{nearest_key(name.removeprefix('--'), flags, prefix='--')}"
        raise ConfigError(f"{self.prog}: {message} (--help lists the options)")


class _Config(argparse.Action):
    """--config FILE: the settings of a file, or of a recipe by its name, in the place where the flag stands."""

    def __call__(self, parser, namespace, value, option_string=None) -> None:
        known = recipes()
        if re.fullmatch(r"[\w-]+", value) and not Path(value).exists():
            if value not in known:
                raise ConfigError(
                    f"--config {value}: no such file, and no recipe of that name"
                    f"{nearest(value, known)} (recipes: {', '.join(sorted(known))})"
                )
            value = known[value]
        namespace.settings = namespace.settings | read_settings(value)


class _Setting(argparse.Action):
    """--part.key VALUE."""

    def __call__(self, parser, namespace, value, option_string=None) -> None:
        try:
            if value == "null" or str not in type_of(self.dest):
                value = read_yaml(value)
        except ConfigError as error:
            raise ConfigError(f"{option_string}: {error}") from error
        try:
            check_one(self.dest, value)
        except ConfigError as error:  # which names the setting
            raise ConfigError(f"--{error}") from error
        namespace.settings = {**namespace.settings, self.dest: value}


def command_parser(command: str, description: str, example: str) -> CommandParser:
    """The parser of a command that takes --config, a dotted flag for each setting, and what such commands share."""
    parser = CommandParser(command, description, example)
    parser.add_argument("--config", metavar="FILE", action=_Config, help="YAML file of settings; later flags win")
    parser.add_argument("--print_config", action="store_true", help="print the settings as YAML and stop")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors and the result")
    add_settings(parser)
    return parser


def add_settings(parser: argparse.ArgumentParser, keys: Collection[str] | None = None, *, show: bool = True) -> None:
    """A dotted flag for each setting, or for those in ``keys``, explained under --help if ``show``.

    What is given goes into ``settings``.
    """
    parser.set_defaults(settings={})
    names = {"data.feature_cache": ["--feature-cache"]}
    texts = explanations()
    for key, default in flatten(RunConfig()).items():
        if keys is not None and key not in keys:
            continue
        text = f"{texts.get(key, '')} (default: {default})".replace("%", "%%") if show else argparse.SUPPRESS
        flags = [f"--{key}", *names.get(key, [])]
        parser.add_argument(*flags, dest=key, metavar="VALUE", action=_Setting, default=argparse.SUPPRESS, help=text)


def config_from_namespace(namespace: argparse.Namespace) -> RunConfig:
    """The :class:`RunConfig` in what :func:`command_parser` parsed; --print_config prints it and ends the program."""
    config = override(RunConfig(), **namespace.settings)
    if namespace.print_config:
        print(config_to_yaml(config), end="")
        raise SystemExit
    return config


def parse_config(args: Sequence[str]) -> RunConfig:
    """The configuration that command-line arguments such as ``["--config", FILE, "--train.lr", "3e-4"]`` describe."""
    return config_from_namespace(command_parser("train", "", "").parse_args(list(args)))


def load_config(path: str | Path) -> RunConfig:
    """Read a YAML file; raises :class:`ConfigError` naming the file for anything missing, unknown or impossible."""
    return config_of(read_settings(path), path)


def config_of(settings: Mapping[str, Any], path: str | Path) -> RunConfig:
    """The config that the settings read from a file make; raises :class:`ConfigError` naming the file."""
    try:
        return override(RunConfig(), **settings)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def config_to_yaml(config: RunConfig) -> str:
    """YAML text that :func:`load_config` reads back to an equal config."""
    return yaml.dump(config_to_dict(config), Dumper=_Dumper, sort_keys=False)
