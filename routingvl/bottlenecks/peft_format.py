"""Plain LoRA exchanged with PEFT: its adapter folders, written and read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from routingvl.atomic_files import write_json
from routingvl.bottlenecks import checkpoint
from routingvl.bottlenecks.checkpoint import CONFIG, WEIGHTS, CheckpointError, write_tensors
from routingvl.bottlenecks.layers import RoutedLoRA
from routingvl.bottlenecks.peft_config import (
    PeftLora,
    check_adapted,
    read_config,
    saved_modules,
)
from routingvl.digests import file_digest
from routingvl.tensor_files import check_floats, listed, read_metadata, read_tensors

EXTRA = "extra_parameters.safetensors"
EXTRA_DIGEST = "extra_parameters"  # in the metadata of the matrices' file, which PEFT does not look at
PREFIX = "base_model.model."  # of PEFT's names


def export_peft(model: nn.Module, directory: str | Path, base_model: str | None = None) -> None:
    """Write the LoRA of an unrouted model as a PEFT adapter (``LoraConfig``) that gives the same outputs.

    A projection with joined slices (GPT-2's c_attn) becomes one LoRA of rank 2 r with a block-diagonal B and alpha
    doubled, which is the same function. Layers of other ranks or scales stand in ``rank_pattern`` and
    ``alpha_pattern``, trained biases of the adapted projections under ``bias="lora_only"``, and every other module
    with trained parameters, a norm or a head, in ``modules_to_save``. In one of our own models PEFT wraps the language
    model alone: what trained outside of it goes into ``extra_parameters.safetensors``, which :func:`import_peft` reads.

    Args:
        model: a language model (or a model that contains it) after :func:`routingvl.inject`.
        directory: the folder to write.
        base_model: hub name or folder of the backbone, for PEFT's own loading.

    Raises:
        CheckpointError: a bottleneck routes (PEFT would silently drop the image) or is an adapter, or a trained
            parameter has no place in PEFT's files; nothing is written then.
    """
    layers, root = _lora_layers(model), _language_model_root(model)
    if not layers:
        raise CheckpointError("the model has no LoRA to export: adapters have no PEFT form")
    for name, layer in layers.items():
        if layer.routing.name != "none":
            raise CheckpointError(
                f"{name} routes with {layer.routing.name!r}: PEFT would drop the image; only routing 'none' exports"
            )
    text = model.get_submodule(root.removesuffix("."))
    layers = {name.removeprefix(root): layer for name, layer in layers.items()}
    trained = checkpoint.trained_parameters(model)
    extra = {name: parameter for name, parameter in trained.items() if not name.startswith(root)}
    biases, saved = _beside_lora(text, layers)
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{name}.lora_B.weight"] = _spread(layer, layer.lora_B)
        if biases and isinstance(layer.bias, torch.Tensor):
            tensors[f"{name}.base_layer.bias"] = layer.bias
    for name, module in saved_modules(text, saved).items():
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    tensors = {f"{PREFIX}{name}": _on_cpu(tensor) for name, tensor in tensors.items()}
    extra = {name: _on_cpu(tensor) for name, tensor in extra.items()}
    check_floats(tensors | extra, "the trained parameters", CheckpointError)
    directory, metadata = Path(directory), {}
    directory.mkdir(parents=True, exist_ok=True)
    if extra:
        write_tensors(directory / EXTRA, extra)
        metadata[EXTRA_DIGEST] = file_digest(directory / EXTRA)
    else:
        (directory / EXTRA).unlink(missing_ok=True)  # of an earlier export
    write_tensors(directory / WEIGHTS, tensors, metadata)
    write_json(directory / CONFIG, _config(layers, base_model, biases, saved))


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, so that no two tensors of a file share their memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _config(layers: Mapping[str, RoutedLoRA], base_model: str | None, biases: bool, saved: list[str]) -> dict:
    """PEFT's adapter_config.json."""
    ranks = {name: layer.lora_A.shape[0] for name, layer in layers.items()}
    alphas = {name: _whole(layer.scaling * ranks[name]) for name, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "lora_dropout": first.dropout,
        "target_modules": sorted(layers),
        "modules_to_save": saved or None,
        "fan_in_fan_out": getattr(first, "weight_layout", "nk") == "kn",
        "bias": "lora_only" if biases else "none",
        "inference_mode": True,
    }


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Of the layers whose value is not the default: last part of the name -> value where that says it, else names."""
    pattern = {}
    for name, value in values.items():
        last = name.rpartition(".")[2]
        alike = {other for key, other in values.items() if key.rpartition(".")[2] == last} == {value}
        if value != default:
            pattern[last if alike else f"^{name.replace('.', '[.]')}"] = value
    return pattern


def _beside_lora(text: nn.Module, layers: Mapping[str, RoutedLoRA]) -> tuple[bool, list[str]]:
    """Whether biases of adapted projections are trained, and the other modules that hold trained parameters.

    Raises CheckpointError for a parameter for which PEFT has neither.
    """
    trained = {id(parameter) for parameter in text.parameters() if parameter.requires_grad}
    biases, owners = False, {}
    for name, parameter in text.named_parameters(remove_duplicate=False):  # tied weights under each of their names
        owner, part = _owner(name, layers)
        if id(parameter) not in trained or (owner in layers and part in ("lora_A", "lora_B")):
            continue
        if owner in layers and part == "bias":
            biases = True
        elif owner in layers or not owner or isinstance(text.get_submodule(owner), nn.ParameterList | nn.ParameterDict):
            raise CheckpointError(f"{name} was trained, for which PEFT has no place: freeze it before the training")
        else:
            owners[owner] = name
    saved = [owner for owner in owners if not any(owner.startswith(f"{other}.") for other in owners)]
    wrapped = saved_modules(text, saved)
    inside = [*layers, *(name for name in wrapped if name not in layers)]
    for name in wrapped:
        if clash := [other for other in inside if other.startswith(f"{name}.") or (other == name and name in layers)]:
            raise CheckpointError(
                f"{', '.join(owners.values())[:200]} was trained: PEFT would save {name} whole, and cannot with "
                f"{clash[0]} adapted too"
            )
    return biases, saved


def import_peft(model: nn.Module, directory: str | Path) -> None:
    """Load a PEFT LoRA adapter into a model injected with routing "none" and the same ranks and targets.

    The scale of PEFT (alpha / r, or alpha / sqrt(r) with ``use_rslora``) is kept by scaling B; ``lora_dropout``, which
    changes no output, stays the model's. Saved biases (``bias``) and modules (``modules_to_save``) are loaded and train
    from then on. ``extra_parameters.safetensors`` of :func:`export_peft` is read too.

    Raises:
        CheckpointError: the files are damaged or gone, are not a plain PEFT LoRA (a key of the config asks for more, or
            for an initialisation that changes the frozen weights), the config names other modules than there are
            tensors of, or they do not fit; nothing is loaded then.
    """
    directory = Path(directory)
    config = read_config(directory / CONFIG)
    source = str(directory / WEIGHTS)
    tensors = read_tensors(source, CheckpointError)
    layers, root = _lora_layers(model), _language_model_root(model)
    if not layers:
        raise CheckpointError("the model has no LoRA: call inject with method='lora' and routing='none' first")
    if routed := [name for name, layer in layers.items() if layer.routing.name != "none"]:
        raise CheckpointError(f"{routed[0]} routes with {layers[routed[0]].routing.name!r}; PEFT's LoRA does not route")
    values: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        place = name.removeprefix(root)
        a, b = (tensors.pop(f"{PREFIX}{place}.{part}.weight", None) for part in ("lora_A", "lora_B"))
        if a is None or b is None:
            raise CheckpointError(f"{source} has no LoRA for {name}")
        if a.shape[:1] != (config.rank(place),):
            key = "r" if config.rank(place) == config.r else "rank_pattern"
            raise CheckpointError(
                f"{source}: {place}.lora_A {list(a.shape)} is not of the rank {key} {config.rank(place)} of {CONFIG}"
            )
        values[f"{name}.lora_A"] = a
        values[f"{name}.lora_B"] = _gather(layer, b, f"{source}: {name}") * (config.scaling(place) / layer.scaling)
    text = model.get_submodule(root.removesuffix("."))
    adapted = {name.removeprefix(root) for name in layers}
    beside = _read_beside(text, adapted, config, tensors, source)
    if tensors:
        raise CheckpointError(f"{source} holds tensors for which the model has no place: {listed(sorted(tensors))}")
    check_adapted(text, adapted, config, directory / CONFIG)
    values |= {f"{root}{name}": value for name, value in beside.items()}
    _check_extra(directory)
    places = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    wanted = {name: places[name] for name in values}
    if (directory / EXTRA).exists():
        extra = read_tensors(directory / EXTRA, CheckpointError)
        trained = checkpoint.trained_parameters(model)
        inside = any(name.startswith(root) for name in extra) if root else True  # exports of before held norms there
        wanted |= {name: p for name, p in trained.items() if inside or not name.startswith(root)}
        values |= extra
    checkpoint.copy_strictly(wanted, values, str(directory))
    for parameter in wanted.values():
        if isinstance(parameter, nn.Parameter):
            parameter.requires_grad_(True)


def _read_beside(
    text: nn.Module, adapted: set[str], config: PeftLora, tensors: dict[str, torch.Tensor], source: str
) -> dict[str, torch.Tensor]:
    """Take the biases and modules that ``config`` says were saved out of ``tensors``, by their names in ``text``.

    Raises CheckpointError: one of a saved module is missing, or shares its memory with one that is not saved alike
    (PEFT gives a saved module weights of its own).
    """
    values: dict[str, torch.Tensor] = {}

    def take(place: str, name: str, key: str) -> None:
        if (value := tensors.pop(f"{PREFIX}{place}", None)) is None:
            raise CheckpointError(f"{source} has no {place}, which {key} of {CONFIG} asks for")
        values[name] = value

    for name, module in saved_modules(text, config.modules_to_save).items():
        for key in module.state_dict():
            take(f"{name}.{key}", f"{name}.{key}", "modules_to_save")
            # With bias "all" PEFT writes the biases of saved modules three times.
            for copy in ("original_module", "modules_to_save") if config.bias == "all" else ():
                tensors.pop(f"{PREFIX}{name}.{copy}.{key}", None)
    names: dict[int, list[str]] = {}
    for name, parameter in text.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        owner, part = _owner(name, adapted)
        asked = config.bias == "all" or (config.bias == "lora_only" and owner in adapted)
        if asked and part == "bias" and name not in values:
            take(f"{owner}.base_layer.bias" if owner in adapted else name, name, "bias")
    for alike in names.values():
        found = [values[name] for name in alike if name in values]
        if found and not (len(found) == len(alike) and all(torch.equal(found[0], other) for other in found)):
            raise CheckpointError(
                f"{source}: {' and '.join(alike)} are one parameter of the model, which the adapter "
                "changes in one place only"
            )
    return values


def _check_extra(directory: Path) -> None:
    """Refuse an export whose extra parameters are gone, or are those of another."""
    digest = read_metadata(directory / WEIGHTS).get(EXTRA_DIGEST)
    if digest is not None and not (directory / EXTRA).exists():
        raise CheckpointError(f"{directory / EXTRA} is gone, without which {WEIGHTS} is half of the adapter")
    if digest is not None and file_digest(directory / EXTRA) != digest:
        raise CheckpointError(f"{directory / EXTRA} was not written together with {WEIGHTS}: export the adapter again")


def _owner(name: str, adapted: Collection[str]) -> tuple[str, str]:
    """A parameter's module and its name there; that of a layer that is called within ours belongs to ours."""
    owner, _, part = name.rpartition(".")
    within = owner.removesuffix(".base_layer")
    return (within if within in adapted else owner), part


def _lora_layers(model: nn.Module) -> dict[str, RoutedLoRA]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedLoRA)}


def _blocks(layer: RoutedLoRA) -> Iterator[tuple[slice, list[int], slice]]:
    """For each slice or part of a layer: its rows in the grouped B, its outputs, and its part of the joined rank."""
    if layer.parts is not None:
        columns = layer.parts.columns
    else:
        columns = [range(start, start + layer.width) for start in layer.columns]
    row = 0
    for group, outputs in enumerate(columns):
        yield slice(row, row + len(outputs)), list(outputs), slice(group * layer.rank, (group + 1) * layer.rank)
        row += len(outputs)


def _adapts_all(layer: RoutedLoRA) -> bool:
    return layer.columns is None and layer.parts is None


def _spread(layer: RoutedLoRA, grouped: torch.Tensor) -> torch.Tensor:
    """The up-projection [N, G * R] over the whole output that acts like the grouped one on its slices."""
    if _adapts_all(layer):
        return grouped
    full = grouped.new_zeros(layer.out_features, layer.groups * layer.rank)
    for rows, outputs, ranks in _blocks(layer):
        full[outputs, ranks] = grouped[rows]
    return full


def _gather(layer: RoutedLoRA, full: torch.Tensor, source: str) -> torch.Tensor:
    """The inverse of :func:`_spread`; an error where ``full`` has entries that the groups cannot hold."""
    if _adapts_all(layer):
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
