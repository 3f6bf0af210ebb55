"""Files on disk: strict save and load of adapters, import of published state dicts, exchange with PEFT.

A saved adapter is a folder with ``adapter_model.safetensors`` (the trained parameters under their names in the model)
and ``adapter_config.json`` (what to build around them). Backbones are referred to, never copied.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from routingvl import __version__
from routingvl.atomic_files import replacing, write_json
from routingvl.bottlenecks.layers import RoutedLoRALinear
from routingvl.bottlenecks.sharding import is_sharded, is_writer, own_class, whole
from routingvl.config import nearest

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PEFT_TYPE = "ROUTINGVL"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or belongs to another model; the message names file and key."""


def keyword_names(function: Callable) -> list[str]:
    """Names of the keyword-only parameters of ``function``."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def unknown_key(where: str, name: str, known: Iterable[str]) -> str:
    """The message for a key nobody knows, with the nearest known one."""
    known = list(known)
    return f"{where}: unknown key {name!r}{nearest(name, known)} (known: {', '.join(known)})"


# --- our own format -------------------------------------------------------------------------------------------------


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a saved adapter consists of, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(model: Any, directory: str | Path) -> None:
    """Write ``model``'s trained parameters and configuration into ``directory`` (made when missing).

    Where FSDP2 shards the model, every process calls this and the first one writes.

    Raises:
        CheckpointError: ``directory`` is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; give a folder to save into")
    tensors = {name: whole(p).cpu().contiguous() for name, p in trained_parameters(model).items()}
    config = {
        "peft_type": PEFT_TYPE,  # PEFT stops at a type it does not know, instead of running a routed adapter unrouted
        "format_version": FORMAT_VERSION,
        "routingvl_version": __version__,
        "model_class": own_class(model).__name__,
        "routing": asdict(model.routing),
        "model": model.options(),
        "backbones": {
            "vision": _describe(model.vit, model.backbones["vision"], directory),
            "text": _describe(model.language_model, model.backbones["text"], directory),
        },
    }
    if is_writer(any(map(is_sharded, model.parameters()))):
        directory.mkdir(parents=True, exist_ok=True)
        _write_tensors(directory / WEIGHTS, tensors)
        write_json(directory / CONFIG, config)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def read_adapter_config(directory: str | Path, model_class: str | None = None) -> dict[str, Any]:
    """The configuration of a saved adapter.

    Raises:
        CheckpointError: no such folder or file, not ours, written by a newer format, or of another class.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: give the folder that save_pretrained wrote")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})") from error
    if config.get("peft_type") != PEFT_TYPE:
        raise CheckpointError(
            f"{path}: peft_type is {config.get('peft_type')!r}; a routingvl adapter has {PEFT_TYPE!r}"
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {config.get('format_version')!r} is not {FORMAT_VERSION}: "
            "it was written by another version of routingvl"
        )
    absent = [key for key in ("model_class", "routing", "model", "backbones") if key not in config]
    if absent:
        raise CheckpointError(f"{path}: {', '.join(absent)} missing")
    if model_class is not None and config["model_class"] != model_class:
        raise CheckpointError(f"{path} holds a {config['model_class']}, not a {model_class}")
    return config


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
    for role, module in (("vision", model.vit), ("text", model.language_model)):
        _check_backbone(directory, role, module, config["backbones"][role])
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    _copy_strictly(trained_parameters(model), tensors, str(path))


def _copy_strictly(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy every tensor into the parameter of its name; all are checked before the first is written."""
    problems = []
    missing, unexpected = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing:
        problems.append(f"missing {_some(missing)}")
    if unexpected:
        problems.append(f"unexpected {_some(unexpected)}")
    for name in sorted(parameters.keys() & tensors.keys()):
        have, want = list(tensors[name].shape), list(parameters[name].shape)
        if have != want:
            problems.append(f"{name} has shape {have}, the model needs {want}")
    if problems:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems[:6])}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _some(names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _describe(backbone: nn.Module | None, name: str | None, directory: Path) -> dict[str, Any] | None:
    """The reference to a backbone: where it comes from, and enough to notice another one."""
    if backbone is None:
        return None
    local = name is not None and Path(name).is_dir()
    return {
        "name": name,
        "relative": os.path.relpath(name, directory.resolve()) if local else None,
        "model_type": backbone.config.model_type,
        "hidden_size": backbone.config.hidden_size,
        "num_hidden_layers": backbone.config.num_hidden_layers,
        "fingerprint": fingerprint(backbone),
    }


def _check_backbone(directory: str | Path, role: str, backbone: nn.Module | None, saved: Mapping | None) -> None:
    if backbone is None or saved is None:
        return
    here = _describe(backbone, None, Path(directory))
    for key in ("model_type", "hidden_size", "num_hidden_layers", "fingerprint"):
        if saved.get(key) != here[key]:
            raise CheckpointError(
                f"{Path(directory) / CONFIG}: the adapter was trained with another {role} backbone "
                f"({key} {saved.get(key)}, loaded {here[key]})"
            )


def fingerprint(backbone: nn.Module) -> str:
    """A short hash of a backbone's frozen weights: names, shapes and a few values of each, rounded to bfloat16.

    The rounding makes a float32 backbone and its bfloat16 copy the same one; trained norms and biases do not count.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(backbone.named_parameters()):
        if parameter.requires_grad or ".adapter." in name:
            continue
        values = whole(parameter).flatten()
        sample = values[:: max(1, values.numel() // 8)][:8].to("cpu", torch.float32).to(torch.bfloat16)
        digest.update(f"{name}{list(parameter.shape)}{sample.tolist()}".encode())
    return digest.hexdigest()[:16]


# --- published state dicts ------------------------------------------------------------------------------------------


def load_reference_state_dict(model: Any, state_dict: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Load a state dict of the published code (github.com/tingyu215/Routing_VLPEFT) into a model of ours.

    Our models keep the published parameter names. What differs is taken care of: a ``module.`` prefix of
    DistributedDataParallel, the ``gpt.`` prefix that published models without visual prefix lack, the tied output
    embedding, and buffers that older transformers saved. Frozen and trained weights are both loaded, the language
    model's and the head's. The published code keeps its frozen ViT outside the model that it saves, so ours stays.

    Args:
        model: :class:`ViTRobertaForVQA` or :class:`ViTGPT2ForCaptioning`, built with the matching configuration.
        state_dict: published name -> tensor, of any floating-point type.

    Returns:
        Published name -> name of our parameter, for every tensor loaded.

    Raises:
        CheckpointError: a key is missing or unexpected, or a shape differs; nothing is loaded then.
    """
    ours = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith(("vit.", "visual_projection."))
    }
    # The tied output embedding appears once in named_parameters, under the name the state dict uses (wte).
    names = {}
    for key in state_dict:
        name = key.removeprefix("module.")
        if name.startswith(("transformer.", "lm_head.")):
            name = f"gpt.{name}"
        if not _is_derived(name):
            names[key] = name
    _copy_strictly(ours, {name: state_dict[key] for key, name in names.items()}, "the published state dict")
    return names


def _is_derived(name: str) -> bool:
    """Buffers of older transformers, and the output embedding tied to the input's."""
    return name.endswith((".attn.bias", ".attn.masked_bias", "position_ids", "token_type_ids", "lm_head.weight"))


# --- PEFT -----------------------------------------------------------------------------------------------------------


def export_peft(model: nn.Module, directory: str | Path, base_model: str | None = None) -> None:
    """Write the LoRA of an unrouted model as a PEFT adapter (``LoraConfig``) that gives the same outputs.

    A projection with joined slices (GPT-2's c_attn) becomes one LoRA of rank 2 r with a block-diagonal B and alpha
    doubled, which is the same function. PEFT's file holds the LoRA matrices only; norms, biases and a head that were
    trained too go into ``extra_parameters.safetensors`` beside it, under our names.

    Args:
        model: a language model (or a model that contains it) after :func:`routingvl.inject`.
        directory: the folder to write.
        base_model: hub name or folder of the backbone, for PEFT's own loading.

    Raises:
        CheckpointError: a bottleneck routes (PEFT would silently drop the image), routes at the output, or is an
            adapter; PEFT has no place for them.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, RoutedLoRALinear)}
    if not layers:
        raise CheckpointError("the model has no LoRA to export: adapters have no PEFT form")
    routed = [name for name, layer in layers.items() if layer.routing != "none"]
    if routed:
        raise CheckpointError(
            f"{routed[0]} routes with {layers[routed[0]].routing!r}: PEFT would drop the image; "
            "only routing 'none' exports"
        )
    tensors: dict[str, torch.Tensor] = {}
    root = _language_model_root(model)
    for name, layer in layers.items():
        key = f"base_model.model.{name.removeprefix(root)}"
        tensors[f"{key}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{key}.lora_B.weight"] = _spread(layer, layer.lora_B).detach().cpu().contiguous()
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": first.lora_A.shape[0],
        "lora_alpha": first.scaling * first.lora_A.shape[0],
        "lora_dropout": first.dropout,
        "target_modules": sorted({name.removeprefix(root) for name in layers}),
        "fan_in_fan_out": first.weight_layout == "kn",
        "bias": "none",
        "inference_mode": True,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    bottleneck = {f"{name}.{part}" for name in layers for part in ("lora_A", "lora_B")}
    extra = {n: p.detach().cpu().contiguous() for n, p in trained_parameters(model).items() if n not in bottleneck}
    if extra:
        _write_tensors(directory / "extra_parameters.safetensors", extra)
    _write_tensors(directory / WEIGHTS, tensors)
    write_json(directory / CONFIG, config)


def import_peft(model: nn.Module, directory: str | Path) -> None:
    """Load a PEFT LoRA adapter into a model injected with routing "none" and the same rank and targets.

    Raises:
        CheckpointError: the files are not a PEFT LoRA, or do not fit; nothing is loaded then.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name} does not exist")
    config = json.loads((directory / CONFIG).read_text())
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{directory / CONFIG}: peft_type {config.get('peft_type')!r} is not LORA")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, RoutedLoRALinear)}
    root = _language_model_root(model)
    tensors = load_file(directory / WEIGHTS)
    values: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        key = f"base_model.model.{name.removeprefix(root)}"
        a, b = tensors.pop(f"{key}.lora_A.weight", None), tensors.pop(f"{key}.lora_B.weight", None)
        if a is None or b is None:
            raise CheckpointError(f"{directory / WEIGHTS} has no LoRA for {name}")
        factor = config["lora_alpha"] / config["r"] / layer.scaling
        values[f"{name}.lora_A"] = a
        values[f"{name}.lora_B"] = _gather(layer, b, f"{directory / WEIGHTS}: {name}") * factor
    if tensors:
        raise CheckpointError(f"{directory / WEIGHTS} holds LoRA for other modules: {_some(sorted(tensors))}")
    parameters = {n: p for n, p in model.named_parameters() if n in values}
    _copy_strictly(parameters, values, str(directory / WEIGHTS))


def _spread(layer: RoutedLoRALinear, grouped: torch.Tensor) -> torch.Tensor:
    """The up-projection [N, G * R] over the whole output that acts like the grouped one [G * n, R] on its slices."""
    if layer.columns is None:
        return grouped
    width = grouped.shape[0] // layer.groups
    full = grouped.new_zeros(layer.out_features, layer.groups * layer.rank)
    for group, start in enumerate(layer.columns):
        rows = grouped[group * width : (group + 1) * width]
        full[start : start + width, group * layer.rank : (group + 1) * layer.rank] = rows
    return full


def _gather(layer: RoutedLoRALinear, full: torch.Tensor, source: str) -> torch.Tensor:
    """The inverse of :func:`_spread`; an error where ``full`` has entries that the groups cannot hold."""
    if layer.columns is None:
        return full
    if list(full.shape) != [layer.out_features, layer.groups * layer.rank]:
        raise CheckpointError(
            f"{source}: lora_B {list(full.shape)} does not fit {layer.groups} slices of rank {layer.rank}"
        )
    width = layer.lora_B.shape[0] // layer.groups
    grouped = torch.cat(
        [
            full[start : start + width, group * layer.rank : (group + 1) * layer.rank]
            for group, start in enumerate(layer.columns)
        ]
    )
    if not torch.equal(_spread(layer, grouped), full):
        raise CheckpointError(f"{source}: this LoRA also changes outputs outside the adapted slices")
    return grouped


def _language_model_root(model: nn.Module) -> str:
    """The prefix of the language model's names when ``model`` is one of ours: PEFT wraps the language model alone."""
    name = getattr(model, "language_model_name", None)
    return f"{name}." if name else ""
