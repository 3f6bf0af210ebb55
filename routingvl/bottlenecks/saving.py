"""Adapters of any injected model as files, in the format of ``checkpoint.py``: the trained parameters and a config.

The config holds, in place of the backbones of a routingvl model, what each ``inject`` was called with and enough of the
model to notice another one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from routingvl.backbones.loading import model_type
from routingvl.bottlenecks import checkpoint
from routingvl.bottlenecks.checkpoint import CONFIG, WEIGHTS, CheckpointError, trained_parameters
from routingvl.bottlenecks.inject import Injection, inject, remove
from routingvl.bottlenecks.places import SurgeryError
from routingvl.bottlenecks.report import TrainableReport, trainable_report
from routingvl.config import ConfigError, RoutingConfig, from_dict
from routingvl.config.checks import check_settings
from routingvl.config.routing import saved_settings
from routingvl.tensor_files import listed, read_tensors

# Settings of an injection that may differ between the model that was saved and the one that is loaded into.
FREE = ("dropout", "bottleneck_dtype")


@dataclass(frozen=True)
class InjectedConfig:
    """What adapter_config.json holds of an injected model; ``injections``: {module's name: list of SavedInjection}."""

    peft_type: str
    format_version: int
    model_class: str
    injections: dict
    base: dict
    routingvl_version: str = ""
    __post_init__ = check_settings


@dataclass(frozen=True)
class SavedInjection:
    """One call of ``inject``."""

    routing: dict
    image_width: int
    __post_init__ = check_settings


@dataclass(frozen=True)
class BaseReference:
    """What the config holds of the model: where it comes from, and digests of its frozen weights."""

    name: str | None
    model_type: str | None
    fingerprint: str
    content: str
    __post_init__ = check_settings


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    is_main_process: bool = True,
) -> None:
    """Write everything that trains in ``model``, and what to build for it, into ``directory`` (made when missing).

    Bottlenecks, norms, biases, heads and projections of the image travel; the frozen weights are referred to. Where
    FSDP2 shards the model, every process calls this and the first one writes.

    Args:
        model: any model with bottlenecks of :func:`routingvl.inject`, or a routingvl model.
        directory: the folder.
        state_dict, is_main_process: see :func:`routingvl.bottlenecks.checkpoint.write_adapter`.

    Raises:
        CheckpointError: the model has no bottlenecks, ``directory`` is a file, or a trained parameter holds NaN or
            infinity.
    """
    options = {"state_dict": state_dict, "is_main_process": is_main_process}
    if _is_ready_made(model):
        return checkpoint.save_adapter(model, directory, **options)
    if not (injections := _injections(model)):
        raise CheckpointError(f"{type(model).__name__} has no bottlenecks to save: call inject(model, config) first")

    def config() -> dict[str, Any]:
        saved = {
            name: [{"routing": saved_settings(i.config), "image_width": i.image_width} for i in of_module]
            for name, of_module in injections.items()
        }
        return {**checkpoint.header(model), "injections": saved, "base": _describe(model)}

    return checkpoint.write_adapter(model, directory, config, **options)


def load_adapter(
    model: nn.Module, directory: str | Path, *, check_base: bool = True, backend: str | None = None
) -> TrainableReport:
    """Load what :func:`save_adapter` wrote into ``model``, in place.

    A model without bottlenecks is injected first, as the saved one was. All is checked before anything is written: an
    error leaves the model as it was.

    Args:
        model: the model that was adapted, fresh or injected in the same way; or a routingvl model of the saved class.
        directory: the folder.
        check_base: refuse a model whose frozen weights are not those of the training. False loads into another one of
            the same shapes (quantised, say).
        backend: for new bottlenecks, see :func:`routingvl.inject`.

    Returns:
        What trains, and which backend runs each bottleneck.

    Raises:
        CheckpointError: the folder holds no adapter, one of another kind or of other injections, its names or shapes
            do not fit, or the model is another one; the message names the file.
    """
    source = Path(directory) / CONFIG
    if _is_ready_made(model):
        saved = checkpoint.read_adapter_config(
            directory, checkpoint.header(model)["model_class"], *type(model).former_names
        )
        checkpoint.load_adapter(model, directory, saved)
        return trainable_report(model)
    config = read_injected_config(directory)
    wanted = {
        name: [Injection(from_dict(RoutingConfig, i["routing"]), i["image_width"]) for i in of_module]
        for name, of_module in config["injections"].items()
    }
    training = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    fresh = not _injections(model)
    try:
        if fresh:
            _inject_again(model, wanted, source, backend)
        _check_injections(model, wanted, source)
        tensors, parameters = read_tensors(Path(directory) / WEIGHTS, CheckpointError), dict(model.named_parameters())
        for name in tensors.keys() & parameters.keys():  # also what someone trained beside the bottlenecks
            parameters[name].requires_grad_(True)
        if check_base:
            _check_base(model, config["base"], source)
        checkpoint.copy_strictly(trained_parameters(model), tensors, str(Path(directory) / WEIGHTS))
    except CheckpointError:
        if fresh and _injections(model):
            remove(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(training.get(name, parameter.requires_grad))
        raise
    return trainable_report(model)


def read_injected_config(directory: str | Path) -> dict[str, Any]:
    """The configuration of an injected model's adapter, every value of the type that it has to have.

    Raises:
        CheckpointError: no such folder or file, not ours, of a routingvl model, written by a newer format, or damaged.
    """
    config, path = checkpoint.read_header(directory), Path(directory) / CONFIG
    if "injections" not in config:
        name = config.get("model_class")
        raise CheckpointError(f"{path} holds a {name}: load it with routingvl.models.load_pretrained")
    try:
        from_dict(InjectedConfig, config, str(path))
        from_dict(BaseReference, config["base"], f"{path}: base")
        for name, of_module in config["injections"].items():
            if not isinstance(of_module, list) or not of_module:
                raise ConfigError(f"{path}: injections[{name!r}] must be a list of injections")
            for saved in of_module:
                from_dict(SavedInjection, saved, f"{path}: injections[{name!r}]")
                checkpoint.check_routing(saved["routing"], str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    return config


def _is_ready_made(model: nn.Module) -> bool:
    """Whether ``model`` is one of ``routingvl.models``, which this row does not know by name."""
    return hasattr(model, "backbones") and hasattr(model, "options")


def _injections(model: nn.Module) -> dict[str, list[Injection]]:
    """What was injected, by the name of the module that ``inject`` was called with."""
    found = ((name, getattr(module, "routed_injections", None)) for name, module in model.named_modules())
    return {name: injections for name, injections in found if injections}


def _inject_again(model: nn.Module, wanted: Mapping[str, list[Injection]], source: Path, backend: str | None) -> None:
    try:
        for name, injections in wanted.items():
            part = model.get_submodule(name)
            for injection in injections:
                inject(part, injection.config, backend=backend, image_width=injection.image_width)
    except (SurgeryError, AttributeError) as error:
        raise CheckpointError(f"{source} does not fit the model: {error}") from error


def _check_injections(model: nn.Module, wanted: Mapping[str, list[Injection]], source: Path) -> None:
    here = _injections(model)
    if here.keys() != wanted.keys():
        have, want = (listed([repr(name) for name in found]) for found in (here, wanted))
        raise CheckpointError(f"{source}: the adapter was injected into module {want}, this model into {have}")
    for name, saved in wanted.items():
        if len(saved) != len(here[name]):
            raise CheckpointError(f"{source}: the adapter has {len(saved)} injections, this model {len(here[name])}")
        for mine, theirs in zip(here[name], saved, strict=True):
            for field in dataclasses.fields(RoutingConfig):
                have, want = getattr(mine.config, field.name), getattr(theirs.config, field.name)
                if have != want and field.name not in FREE:
                    raise CheckpointError(f"{source}: {field.name} is {want!r}, this model was injected with {have!r}")
            if mine.image_width != theirs.image_width:
                raise CheckpointError(
                    f"{source}: the image is {theirs.image_width} wide, this model was injected for {mine.image_width}"
                )


def _describe(model: nn.Module) -> dict[str, Any]:
    return {
        "name": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "model_type": model_type(model),
        "fingerprint": checkpoint.fingerprint(model),
        "content": checkpoint.content_digest(model),
    }


def _check_base(model: nn.Module, saved: Mapping[str, Any], source: Path) -> None:
    here = _describe(model)
    for key in ("model_type", "fingerprint", "content"):
        if saved[key] != here[key]:
            raise CheckpointError(
                f"{source}: the adapter was trained with another model ({key} {saved[key]}, loaded {here[key]}); "
                "check_base=False loads it all the same"
            )
