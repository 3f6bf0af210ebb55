"""Saved adapters: written whole or not at all, loaded strictly.

A saved adapter is a folder with ``adapter_model.safetensors`` (the trained parameters under their names in the model)
and ``adapter_config.json`` (what to build around them). Backbones are referred to, never copied.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import save_file
from torch import nn

from routingvl import __version__
from routingvl.atomic_files import replacing, write_json
from routingvl.bottlenecks.sharding import assign, full_shape, is_sharded, is_writer, own_class, whole
from routingvl.config import ConfigError, RoutingConfig, from_dict
from routingvl.config.checks import check_settings
from routingvl.config.routing import NEWER, saved_settings
from routingvl.json_files import read_json
from routingvl.tensor_files import check_floats, is_finite, listed, read_tensors

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PEFT_TYPE = "ROUTINGVL"
FORMAT_VERSION = 1
# Settings of the bottlenecks that older adapters lack, all of them; their defaults are what those were trained with.
_LATER = ("exclude", "rank_pattern", "alpha_pattern", "image_projection", "train_modules", "bottleneck_dtype")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or belongs to another model; the message names file and key."""


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json holds."""

    peft_type: str
    format_version: int
    model_class: str
    routing: dict
    model: dict
    backbones: dict
    routingvl_version: str = ""
    __post_init__ = check_settings


@dataclass(frozen=True)
class BackboneReference:
    """What it holds of a backbone: where it comes from, and enough to notice another one."""

    name: str | None
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    fingerprint: str
    relative: str | None = None
    content: str | None = None  # of older adapters
    __post_init__ = check_settings


BOTTLENECK = re.compile(
    r"(?:^|\.)(?:lora_[AB]|lora_A_image|(?:two_step\.\w+|(?:down|up|image_down)_sampler)\.(?:weight|bias))$"
)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a saved adapter consists of, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(
    model: Any,
    directory: str | Path,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    is_main_process: bool = True,
) -> None:
    """:func:`write_adapter` for one of ``routingvl.models``, with its options and its backbones by reference."""

    def config() -> dict[str, Any]:
        parts = {"vision": model.vit, "text": model.language_model}
        references = {role: _describe(part, model.backbones[role], Path(directory)) for role, part in parts.items()}
        return {
            **header(model),
            "routing": saved_settings(model.routing),
            "model": model.options(),
            "backbones": references,
        }

    write_adapter(model, directory, config, state_dict=state_dict, is_main_process=is_main_process)


def write_adapter(
    model: nn.Module,
    directory: str | Path,
    config: Callable[[], dict[str, Any]],
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    is_main_process: bool = True,
) -> None:
    """Write ``model``'s trained parameters and ``config()`` into ``directory`` (made when missing).

    Where FSDP2 or ZeRO-3 shards the model, every process calls this and the first one writes.

    Args:
        model: with bottlenecks.
        directory: the folder.
        config: makes what adapter_config.json will hold; every process calls it.
        state_dict: where to take the trained parameters from, by their names in the model, gathered by another
            program; None for the model itself.
        is_main_process: False takes part in gathering, and writes nothing.

    Raises:
        CheckpointError: ``directory`` is a file, a bottleneck is frozen, a trained parameter holds NaN or infinity, or
            ``state_dict`` lacks one.
    """
    if frozen := next((n for n, p in model.named_parameters() if not p.requires_grad and BOTTLENECK.search(n)), None):
        raise CheckpointError(
            f"{frozen} is frozen (requires_grad=False), and what trains is saved, so it would be lost: save before "
            "freezing, or call requires_grad_(True) on what trained"
        )
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; give a folder to save into")
    sharded = any(map(is_sharded, model.parameters()))
    if not (sharded or is_main_process):
        return
    tensors = _gathered(trained_parameters(model), state_dict)
    check_floats(tensors, "the trained parameters", CheckpointError)
    described = config()
    if is_main_process and is_writer(sharded):
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory / WEIGHTS, tensors)
        write_json(directory / CONFIG, described)


def header(model: nn.Module) -> dict[str, Any]:
    """What every adapter_config.json begins with."""
    return {
        "peft_type": PEFT_TYPE,  # PEFT stops at a type it does not know, instead of running a routed adapter unrouted
        "format_version": FORMAT_VERSION,
        "routingvl_version": __version__,
        "model_class": own_class(model).__name__,
    }


def _gathered(
    parameters: Mapping[str, nn.Parameter], state_dict: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """The trained parameters whole and on the CPU, of ``state_dict`` where one is given."""
    if state_dict is None:
        return {name: whole(parameter).cpu().contiguous() for name, parameter in parameters.items()}
    if absent := sorted(parameters.keys() - state_dict.keys()):
        raise CheckpointError(f"state_dict= lacks the trained parameters {listed(absent)}")
    return {name: whole(state_dict[name]).cpu().contiguous() for name in parameters}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, put in its place when it is complete."""
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})


def read_header(directory: str | Path) -> dict[str, Any]:
    """What adapter_config.json of a saved adapter holds, when it is one of ours and of this format.

    Raises:
        CheckpointError: no such folder or file, not ours, or written by a newer format.
    """
    path = Path(directory) / CONFIG
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give the folder that save_pretrained wrote")
    config = read_json(path, CheckpointError, dict)
    if config.get("peft_type") != PEFT_TYPE:
        raise CheckpointError(
            f"{path}: peft_type is {config.get('peft_type')!r}; a routingvl adapter has {PEFT_TYPE!r}"
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {config.get('format_version')!r} is not {FORMAT_VERSION}: "
            "it was written by another version of routingvl"
        )
    return config


def read_adapter_config(directory: str | Path, *model_class: str) -> dict[str, Any]:
    """The configuration of a saved routingvl model, its keys and the type of each value as in :class:`AdapterConfig`.

    Args:
        directory: the folder.
        *model_class: the name that the model's class has to have, and names that it had before; none for any.

    Raises:
        CheckpointError: no such folder or file, not ours, written by a newer format, of another class, or damaged.
    """
    config, path = read_header(directory), Path(directory) / CONFIG
    if "injections" in config:
        raise CheckpointError(
            f"{path} holds an adapter of a {config.get('model_class')} after inject: load that model, then call "
            "routingvl.load_adapter(model, folder)"
        )
    try:
        from_dict(AdapterConfig, config, str(path))
        check_routing(config["routing"], str(path))
        if config["backbones"].keys() != {"vision", "text"}:
            raise ConfigError(f"{path}: backbones must be vision and text, not {listed(config['backbones']) or 'none'}")
        for role, saved in config["backbones"].items():
            if saved is not None or role == "text":
                from_dict(BackboneReference, saved, f"{path}: backbones.{role}")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if model_class and config["model_class"] not in model_class:
        raise CheckpointError(f"{path} holds a {config['model_class']}, not a {model_class[0]}")
    return config


def check_routing(routing: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError unless ``routing`` is a whole :class:`RoutingConfig`."""
    from_dict(RoutingConfig, routing, f"{source}: routing")
    may_lack = {*NEWER, *(_LATER if routing.keys().isdisjoint(_LATER) else ())}
    if absent := [f.name for f in fields(RoutingConfig) if f.name not in {*routing, *may_lack}]:
        raise ConfigError(f"{source}: routing: {listed(absent)} missing")


def resolve_backbones(directory: str | Path, config: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """What to load each backbone from: the one ``given``, else the saved reference.

    Raises:
        CheckpointError: a backbone was saved without a reference and none is given.
    """
    resolved = {}
    for role, saved in config["backbones"].items():
        if given.get(role) is not None or saved is None:
            resolved[role] = given.get(role)
            continue
        name, relative = saved["name"], saved.get("relative")
        if name is None:
            raise CheckpointError(
                f"{Path(directory) / CONFIG}: the {role} backbone was given as an object without a name: "
                f"pass {role}= when loading"
            )
        beside = (Path(directory) / relative).resolve() if relative else None
        if relative and not Path(name).is_dir():
            if not beside.is_dir():
                raise CheckpointError(
                    f"{Path(directory) / CONFIG}: the {role} backbone's folder {name} is gone: "
                    f"pass {role}= when loading"
                )
            name = str(beside)  # run folder and backbones were moved together
        resolved[role] = name
    return resolved


def load_adapter(model: Any, directory: str | Path, config: Mapping[str, Any]) -> None:
    """Load the trained parameters of ``directory`` into ``model``, which was built from its ``config``.

    Raises:
        CheckpointError: a key is missing, unexpected or of another shape, the file is damaged, or a backbone is not
            the one the adapter was trained with.
    """
    path = Path(directory) / WEIGHTS
    tensors, parameters = read_tensors(path, CheckpointError), dict(model.named_parameters())
    for name in tensors.keys() & parameters.keys():  # also what someone trained beside the bottlenecks
        parameters[name].requires_grad_(True)
    for role, module in (("vision", model.vit), ("text", model.language_model)):
        _check_backbone(directory, role, module, config["backbones"][role])
    copy_strictly(trained_parameters(model), tensors, str(path))


def copy_strictly(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy every tensor into the parameter of its name, in its type; all are checked before the first is written.

    Raises CheckpointError, which opens with ``source``: names or shapes differ, or a tensor is not a dense
    floating-point one, or holds NaN or infinity (or would, in the parameter's type).
    """
    check_floats(tensors, source, CheckpointError)
    differences = {"missing": parameters.keys() - tensors.keys(), "unexpected": tensors.keys() - parameters.keys()}
    problems = [f"{what} {listed(sorted(names))}" for what, names in differences.items() if names]
    for name in sorted(parameters.keys() & tensors.keys()):
        have, want = list(tensors[name].shape), full_shape(parameters[name])
        if have != want:
            problems.append(f"{name} has shape {have}, the model needs {want}")
    if problems:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems[:6])}")
    converted = {name: tensors[name].to(parameter.dtype) for name, parameter in parameters.items()}
    if bad := [name for name, tensor in converted.items() if not is_finite(tensor)]:
        raise CheckpointError(f"{source}: {listed(bad)} holds numbers too large for {converted[bad[0]].dtype}")
    for name, parameter in parameters.items():
        assign(parameter, converted[name])


def _describe(backbone: nn.Module | None, name: str | None, directory: Path) -> dict[str, Any] | None:
    """The reference to a backbone: where it comes from, and enough to notice another one."""
    if backbone is None:
        return None
    local = name is not None and Path(name).is_dir()
    config = backbone.config
    staged = not hasattr(config, "hidden_size")  # a convolutional tower: widths and depths of its stages
    return {
        "name": name,
        "relative": os.path.relpath(name, directory.resolve()) if local else None,
        "model_type": config.model_type,
        "hidden_size": config.hidden_sizes[-1] if staged else config.hidden_size,
        "num_hidden_layers": sum(config.depths) if staged else config.num_hidden_layers,
        "fingerprint": fingerprint(backbone),
        "content": content_digest(backbone),
    }


def _check_backbone(directory: str | Path, role: str, backbone: nn.Module | None, saved: Mapping | None) -> None:
    if backbone is None or saved is None:
        return
    here = _describe(backbone, None, Path(directory))
    for key in ("model_type", "hidden_size", "num_hidden_layers", "fingerprint", "content"):
        if saved.get(key) != here[key] and not (key == "content" and saved.get(key) is None):
            raise CheckpointError(
                f"{Path(directory) / CONFIG}: the adapter was trained with another {role} backbone "
                f"({key} {saved.get(key)}, loaded {here[key]})"
            )


# What the output of a backbone depends on beside its weights, by the names in the configs of transformers.
_SETTINGS = (
    "hidden_act activation_function layer_norm_eps layer_norm_epsilon num_attention_heads patch_size pad_token_id "
    "bos_token_id eos_token_id scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn"
).split()
# Likewise; these count only where a config has them, so that digests of before, of configs without, stay as they are.
_FURTHER_SETTINGS = (
    "attention_multiplier attn_logit_softcapping do_layer_norm_before embedding_multiplier feed_forward_proj "
    "final_logit_softcapping head_dim hidden_activation layer_types local_attention logits_scaling num_key_value_heads "
    "num_heads partial_rotary_factor pos_att_type position_buckets query_pre_attn_scalar relative_attention "
    "relative_attention_num_buckets residual_multiplier rms_norm_eps rope_parameters scale_decoder_outputs "
    "scale_embedding sliding_window"
).split()
_digests: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def content_digest(backbone: nn.Module) -> str:
    """A digest of all of a backbone's frozen weights, rounded to bfloat16, and of the settings its output depends on.

    As of :func:`fingerprint`, a float32 backbone and its bfloat16 copy have the same. It is computed once for many
    saves, and again when a weight was written to.
    """
    frozen = _frozen(backbone)
    frozen |= {n: b for n, b in sorted(backbone.named_buffers()) if n.endswith(("running_mean", "running_var"))}
    state = [(name, id(parameter), parameter._version) for name, parameter in frozen.items()]
    if backbone not in _digests or _digests[backbone][0] != state:
        known = getattr(backbone, "config", None)
        settings = {name: getattr(known, name, None) for name in _SETTINGS}
        further = {name: getattr(known, name, None) for name in _FURTHER_SETTINGS}
        settings |= {name: value for name, value in further.items() if value is not None}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, parameter in frozen.items():
            digest.update(f"{name}{full_shape(parameter)}".encode())
            values = whole(parameter).to(torch.bfloat16).cpu().contiguous()
            digest.update(values.view(-1).view(torch.uint8).numpy())
        _digests[backbone] = state, digest.hexdigest()
    return _digests[backbone][1]


def fingerprint(backbone: nn.Module) -> str:
    """A short hash of a backbone's frozen weights: names, shapes and a few values of each, rounded to bfloat16.

    The rounding makes a float32 backbone and its bfloat16 copy the same one; trained norms and biases do not count.
    """
    digest = hashlib.sha256()
    for name, parameter in _frozen(backbone).items():
        values = whole(parameter).flatten()
        sample = values[:: max(1, values.numel() // 8)][:8].to("cpu", torch.float32).to(torch.bfloat16)
        digest.update(f"{name}{full_shape(parameter)}{sample.tolist()}".encode())
    return digest.hexdigest()[:16]


def _frozen(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The frozen weights by the names that they have without bottlenecks, the parts of a quantised one each."""
    frozen = {}
    for name, parameter in backbone.named_parameters():
        if not (parameter.requires_grad or ".adapter." in name):
            frozen |= _parts(name.replace(".base_layer.", "."), parameter)
    return dict(sorted(frozen.items()))


def _parts(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """``tensor`` itself, or the plain tensors that it is made of (torchao's weights)."""
    if is_sharded(tensor) or not hasattr(tensor, "__tensor_flatten__"):
        return {name: tensor}
    inner = {f"{name}.{part}": getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]}
    return {key: plain for part, value in inner.items() for key, plain in _parts(part, value).items()}
