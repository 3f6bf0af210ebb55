"""Plain LoRA exchanged with PEFT: its adapter folders, written and read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from routingvl.atomic_files import write_json
from routingvl.bottlenecks import checkpoint
from routingvl.bottlenecks.checkpoint import CONFIG, WEIGHTS, CheckpointError, write_tensors
from routingvl.bottlenecks.layers import RoutedLoRALinear


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
    extra = {
        n: p.detach().cpu().contiguous() for n, p in checkpoint.trained_parameters(model).items() if n not in bottleneck
    }
    if extra:
        write_tensors(directory / "extra_parameters.safetensors", extra)
    write_tensors(directory / WEIGHTS, tensors)
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
    root = _language_model_root(model)
    tensors = load_file(directory / WEIGHTS)
    values: dict[str, torch.Tensor] = {}
    for name, layer in _lora_layers(model).items():
        key = f"base_model.model.{name.removeprefix(root)}"
        a, b = tensors.pop(f"{key}.lora_A.weight", None), tensors.pop(f"{key}.lora_B.weight", None)
        if a is None or b is None:
            raise CheckpointError(f"{directory / WEIGHTS} has no LoRA for {name}")
        factor = config["lora_alpha"] / config["r"] / layer.scaling
        values[f"{name}.lora_A"] = a
        values[f"{name}.lora_B"] = _gather(layer, b, f"{directory / WEIGHTS}: {name}") * factor
    if tensors:
        raise CheckpointError(
            f"{directory / WEIGHTS} holds LoRA for other modules: {checkpoint.listed(sorted(tensors))}"
        )
    parameters = {n: p for n, p in model.named_parameters() if n in values}
    checkpoint.copy_strictly(parameters, values, str(directory / WEIGHTS))


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
