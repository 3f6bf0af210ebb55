"""Plain LoRA exchanged with PEFT: its adapter folders, written and read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from routingvl.atomic_files import write_json
from routingvl.bottlenecks import checkpoint
from routingvl.bottlenecks.checkpoint import CONFIG, WEIGHTS, CheckpointError, write_tensors
from routingvl.bottlenecks.layers import RoutedLoRALinear
from routingvl.config.checks import shown
from routingvl.json_files import read_json
from routingvl.tensor_files import check_floats, listed, read_tensors

EXTRA = "extra_parameters.safetensors"


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
    layers = _lora_layers(model)
    if not layers:
        raise CheckpointError("the model has no LoRA to export: adapters have no PEFT form")
    for name, layer in layers.items():
        if layer.routing.name != "none":
            raise CheckpointError(
                f"{name} routes with {layer.routing.name!r}: PEFT would drop the image; only routing 'none' exports"
            )
    tensors: dict[str, torch.Tensor] = {}
    root = _language_model_root(model)
    for name, layer in layers.items():
        key = f"base_model.model.{name.removeprefix(root)}"
        tensors[f"{key}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{key}.lora_B.weight"] = _spread(layer, layer.lora_B).detach().cpu().contiguous()
    first, *others = layers.values()
    if any((layer.lora_A.shape[0], layer.scaling) != (first.lora_A.shape[0], first.scaling) for layer in others):
        raise CheckpointError("the LoRA layers differ in rank or scale, for which one PEFT config has no place")
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
    bottleneck = {f"{name}.{part}" for name in layers for part in ("lora_A", "lora_B")}
    extra = {
        n: p.detach().cpu().contiguous() for n, p in checkpoint.trained_parameters(model).items() if n not in bottleneck
    }
    check_floats(tensors | extra, "the trained parameters", CheckpointError)
    directory.mkdir(parents=True, exist_ok=True)
    if extra:
        write_tensors(directory / EXTRA, extra)
    write_tensors(directory / WEIGHTS, tensors)
    write_json(directory / CONFIG, config)


def import_peft(model: nn.Module, directory: str | Path) -> None:
    """Load a PEFT LoRA adapter into a model injected with routing "none" and the same rank and targets.

    The scale of PEFT (alpha / r, or alpha / sqrt(r) with ``use_rslora``) is kept by scaling B; ``lora_dropout``, which
    changes no output, stays the model's. ``extra_parameters.safetensors`` of :func:`export_peft` is read too.

    Raises:
        CheckpointError: the files are damaged, are not a plain PEFT LoRA (DoRA, ranks or alphas by pattern, trained
            biases or modules, an initialisation that changes the frozen weights), or do not fit; nothing is loaded
            then.
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG, CheckpointError, dict)
    source = str(directory / WEIGHTS)
    tensors = read_tensors(source, CheckpointError)
    scaling = _peft_scaling(config, str(directory / CONFIG))
    layers, root = _lora_layers(model), _language_model_root(model)
    if not layers:
        raise CheckpointError("the model has no LoRA: call inject with method='lora' and routing='none' first")
    if routed := [name for name, layer in layers.items() if layer.routing.name != "none"]:
        raise CheckpointError(f"{routed[0]} routes with {layers[routed[0]].routing.name!r}; PEFT's LoRA does not route")
    values: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        key = f"base_model.model.{name.removeprefix(root)}"
        a, b = tensors.pop(f"{key}.lora_A.weight", None), tensors.pop(f"{key}.lora_B.weight", None)
        if a is None or b is None:
            raise CheckpointError(f"{source} has no LoRA for {name}")
        if a.shape[:1] != (config["r"],):
            raise CheckpointError(f"{source}: {key}.lora_A {list(a.shape)} is not of the rank r {config['r']}")
        values[f"{name}.lora_A"] = a
        values[f"{name}.lora_B"] = _gather(layer, b, f"{source}: {name}") * (scaling / layer.scaling)
    if tensors:
        raise CheckpointError(f"{source} holds tensors for which the model has no place: {listed(sorted(tensors))}")
    trained = checkpoint.trained_parameters(model)
    if (directory / EXTRA).exists():
        values |= read_tensors(directory / EXTRA, CheckpointError)
    else:
        trained = {name: trained[name] for name in values if name in trained}
    checkpoint.copy_strictly(trained, values, str(directory))


# Keys of PEFT's LoraConfig that change nothing in what the adapter computes, or that its tensors show.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "revision", "runtime_config", "target_modules", "task_type",
    "use_rslora",
}  # fmt: skip
# What others may hold beside nothing (null, false, an empty list or object). The initialisations of other names change
# the frozen weights.
PLAIN = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal")}


def _peft_scaling(config: Mapping[str, Any], source: str) -> float:
    """The factor on the update of a plain LoRA; CheckpointError for a key that asks for more than we compute."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{source}: peft_type {config.get('peft_type')!r} is not LORA")
    for key in sorted(config.keys() - HARMLESS):
        if config[key] and config[key] not in PLAIN.get(key, ()):
            raise CheckpointError(f"{source}: {key} {shown(config[key])} is more than the plain LoRA that loads here")
    rank, alpha, rslora = config.get("r"), config.get("lora_alpha"), config.get("use_rslora") or False
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{source}: r {shown(rank)} must be an integer of at least 1")
    if type(alpha) not in (int, float) or not 0 < alpha <= 1e6:
        raise CheckpointError(f"{source}: lora_alpha {shown(alpha)} must be a number above 0")
    if type(rslora) is not bool:
        raise CheckpointError(f"{source}: use_rslora {shown(rslora)} must be true or false")
    return alpha / (rank**0.5 if rslora else rank)


def _lora_layers(model: nn.Module) -> dict[str, RoutedLoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedLoRALinear)}


def _blocks(layer: RoutedLoRALinear) -> Iterator[tuple[slice, slice, slice]]:
    """For each slice of a layer: its rows in the grouped B [G * n, R], its outputs, and its part of the joined rank."""
    width, rank = layer.lora_B.shape[0] // layer.groups, layer.rank
    for group, start in enumerate(layer.columns):
        yield (
            slice(group * width, (group + 1) * width),
            slice(start, start + width),
            slice(group * rank, (group + 1) * rank),
        )


def _spread(layer: RoutedLoRALinear, grouped: torch.Tensor) -> torch.Tensor:
    """The up-projection [N, G * R] over the whole output that acts like the grouped one [G * n, R] on its slices."""
    if layer.columns is None:
        return grouped
    full = grouped.new_zeros(layer.out_features, layer.groups * layer.rank)
    for rows, outputs, ranks in _blocks(layer):
        full[outputs, ranks] = grouped[rows]
    return full


def _gather(layer: RoutedLoRALinear, full: torch.Tensor, source: str) -> torch.Tensor:
    """The inverse of :func:`_spread`; an error where ``full`` has entries that the groups cannot hold."""
    if layer.columns is None:
        return full
    if list(full.shape) != [layer.out_features, layer.groups * layer.rank]:
        raise CheckpointError(
            f"{source}: lora_B {list(full.shape)} does not fit {layer.groups} slices of rank {layer.rank}"
        )
    grouped = torch.cat([full[outputs, ranks] for _, outputs, ranks in _blocks(layer)])
    if not torch.equal(_spread(layer, grouped), full):
        raise CheckpointError(f"{source}: this LoRA also changes outputs outside the adapted slices")
    return grouped


def _language_model_root(model: nn.Module) -> str:
    """The prefix of the language model's names when ``model`` is one of ours: PEFT wraps the language model alone."""
    name = getattr(model, "language_model_name", None)
    return f"{name}." if name else ""
