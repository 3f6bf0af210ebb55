"""Run settings from YAML files and command lines, and back: unknown keys and flags are errors that name the nearest."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from routingvl.config import ConfigError, nearest
from routingvl.config.schema import RunConfig, config_to_dict, known_keys, override, run_config_from_dict


class _Parser(ArgumentParser):
    """Reports every parse failure as :class:`ConfigError`, with the nearest known key or flag for an unknown one."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        own = [flag.removeprefix("--") for flag in self._option_string_actions]
        raise ConfigError(explain(message, [*known_keys(), *own]))

    def parse_args(self, args: Sequence[str], **kwargs: Any) -> Any:
        """Parse ``args``, where --config takes the name of a shipped recipe as well as a path."""
        return super().parse_args(with_recipe_paths(args), **kwargs)


def recipes() -> dict[str, Path]:
    """The published recipes that ship with the library (configs/), by name."""
    folder = resources.files("routingvl.configs")
    return {Path(entry.name).stem: Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".yaml")}


def with_recipe_paths(args: Sequence[str]) -> list[str]:
    """``args`` with each recipe name given to --config replaced by that recipe's file.

    Raises:
        ConfigError: a bare name is neither a file nor a recipe.
    """
    resolved, previous = [], ""
    for arg in args:
        flag, equals, value = arg.partition("=") if arg.startswith("--config=") else ("", "", arg)
        if (equals or previous == "--config") and re.fullmatch(r"[\w-]+", value) and not Path(value).exists():
            known = recipes()
            if value not in known:
                raise ConfigError(
                    f"--config {value}: no such file, and no recipe of that name"
                    f"{nearest(value, list(known))} (recipes: {', '.join(sorted(known))})"
                )
            value = str(known[value])
        resolved.append(f"{flag}{equals}{value}")
        previous = arg
    return resolved


def explain(message: str, known: Sequence[str]) -> str:
    """Shorten a message of jsonargparse to one line and add the nearest key or flag to what it does not know."""
    message = " ".join(message.split())
    if found := re.search(r"(?:Unrecognized|unrecognized) arguments: --([\w.\-]+)", message):
        name = found[1]
        return f"unknown flag --{name}{nearest_key(name, known, prefix='--')}"
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        name = f"{found[1]}.{found[2]}"
        return f"unknown key {name!r}{nearest_key(name, known)}"
    if found := re.search(r"Option '([\w.]+)' is not accepted", message):
        return f"unknown key {found[1]!r}{nearest_key(found[1], known)}"
    return re.sub(r'Parser key "([\w.]+)": ', r"\1: ", message)


def nearest_key(name: str, known: Sequence[str], prefix: str = "") -> str:
    """The hint of :func:`~routingvl.config.nearest` for a dotted name; a key given without its part is found too."""
    name = name.replace("-", "_")
    same_leaf = [key for key in dict.fromkeys(known) if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    if same_leaf:
        return f"; did you mean {' or '.join(repr(prefix + key) for key in same_leaf)}?"
    return nearest(prefix + name, [prefix + key for key in known])


def config_parser(prog: str = "routingvl", description: str = "", **kwargs: Any) -> ArgumentParser:
    """A parser of ``--config FILE`` and one dotted flag for each setting; failures raise :class:`ConfigError`."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, **kwargs)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it override it.")
    parser.add_class_arguments(RunConfig, None)
    return parser


def command_parser(command: str, description: str, example: str) -> ArgumentParser:
    """:func:`config_parser` of a sub-command, with the flags that those which read images for training share."""
    parser = config_parser(
        prog=f"routingvl {command}",
        description=description,
        epilog=f"example: {example}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--feature-cache", metavar="FOLDER", help="Short for --data.feature_cache FOLDER.")
    parser.add_argument("--quiet", action="store_true", help="Print nothing but errors and the result.")
    return parser


def config_from_namespace(namespace: Any) -> RunConfig:
    """The :class:`RunConfig` in what :func:`config_parser` parsed; --feature-cache counts, the rest is left alone."""
    names = {f.name for f in dataclasses.fields(RunConfig)}
    values = {key: value for key, value in namespace.as_dict().items() if key in names}
    config = run_config_from_dict(values)
    folder = namespace.get("feature_cache")
    return config if folder is None else override(config, feature_cache=folder)


def parse_config(args: Sequence[str]) -> RunConfig:
    """The configuration that command-line arguments such as ``["--config", FILE, "--train.lr", "3e-4"]`` describe."""
    try:
        return config_from_namespace(config_parser().parse_args(list(args)))
    except ArgumentError as error:
        raise ConfigError(explain(str(error), known_keys())) from error


def load_config(path: str | Path) -> RunConfig:
    """Read a YAML file; raises :class:`ConfigError` naming the file for anything missing, unknown or impossible."""
    if not Path(path).is_file():
        raise ConfigError(f"{path} does not exist; give the path of a YAML file such as configs/vqa-lora.yaml")
    try:
        return parse_config(["--config", str(path)])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def config_to_yaml(config: RunConfig) -> str:
    """YAML text that :func:`load_config` reads back to an equal config."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)
