"""Plain LoRA exchanged with PEFT: its adapter folders, written and read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from routingvl.atomic_files import write_json
from routingvl.bottlenecks import checkpoint
from routingvl.bottlenecks.checkpoint import CONFIG, WEIGHTS, CheckpointError, write_tensors
from routingvl.bottlenecks.layers import RoutedLoRALinear, is_projection
from routingvl.config import ConfigError, from_dict
from routingvl.config.checks import check_settings, setting, shown
from routingvl.digests import file_digest
from routingvl.json_files import read_json
from routingvl.tensor_files import check_floats, listed, read_metadata, read_tensors

EXTRA = "extra_parameters.safetensors"
EXTRA_DIGEST = "extra_parameters"  # in the metadata of the matrices' file, which PEFT does not look at


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
    metadata = {}
    if extra:
        write_tensors(directory / EXTRA, extra)
        metadata[EXTRA_DIGEST] = file_digest(directory / EXTRA)
    else:
        (directory / EXTRA).unlink(missing_ok=True)  # of an earlier export
    write_tensors(directory / WEIGHTS, tensors, metadata)
    write_json(directory / CONFIG, config)


def import_peft(model: nn.Module, directory: str | Path) -> None:
    """Load a PEFT LoRA adapter into a model injected with routing "none" and the same rank and targets.

    The scale of PEFT (alpha / r, or alpha / sqrt(r) with ``use_rslora``) is kept by scaling B; ``lora_dropout``, which
    changes no output, stays the model's. ``extra_parameters.safetensors`` of :func:`export_peft` is read too.

    Raises:
        CheckpointError: the files are damaged or gone, are not a plain PEFT LoRA (DoRA, ranks or alphas by pattern,
            trained biases or modules, an initialisation that changes the frozen weights), the config names other
            modules than there are tensors of, or they do not fit; nothing is loaded then.
    """
    directory = Path(directory)
    config = _read_config(directory / CONFIG)
    source = str(directory / WEIGHTS)
    tensors = read_tensors(source, CheckpointError)
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
        if a.shape[:1] != (config.r,):
            raise CheckpointError(f"{source}: {key}.lora_A {list(a.shape)} is not of the rank r {config.r}")
        values[f"{name}.lora_A"] = a
        values[f"{name}.lora_B"] = _gather(layer, b, f"{source}: {name}") * (config.scaling / layer.scaling)
    if tensors:
        raise CheckpointError(f"{source} holds tensors for which the model has no place: {listed(sorted(tensors))}")
    _check_targets(model, config, str(directory / CONFIG))
    trained = checkpoint.trained_parameters(model)
    _check_extra(directory)
    if (directory / EXTRA).exists():
        values |= read_tensors(directory / EXTRA, CheckpointError)
    else:
        trained = {name: trained[name] for name in values if name in trained}
    checkpoint.copy_strictly(trained, values, str(directory))


@dataclasses.dataclass(frozen=True)
class _PeftConfig:
    """The keys of PEFT's LoraConfig that decide what a plain LoRA computes, and where; null and [] are left out."""

    r: int = setting(dataclasses.MISSING, least=1)
    lora_alpha: float = setting(dataclasses.MISSING, above=0, most=1e6)
    target_modules: str | tuple[str, ...]
    lora_dropout: float = setting(0.0, least=0, below=1)
    use_rslora: bool = False
    fan_in_fan_out: bool = False  # PEFT corrects it to what the layer is
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = setting(None, least=0)
    layers_pattern: str | tuple[str, ...] | None = None
    __post_init__ = check_settings

    @property
    def scaling(self) -> float:
        """The factor on the update."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def adapts(self, name: str) -> bool:
        """Whether PEFT puts a LoRA on the projection of this name: its check_target_module_exists."""
        if self.exclude_modules is not None and _names(self.exclude_modules, name):
            return False
        if not _names(self.target_modules, name):
            return False
        if self.layers_to_transform is None:
            return True
        layers = (self.layers_to_transform,) if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        patterns = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        starts = [r".*?\.[^.]*"] if patterns is None else [rf"(?:^|.*?\.){pattern}" for pattern in patterns]
        found = next(filter(None, (re.match(rf"{start}\.(\d+)\.", name) for start in starts)), None)
        return found is not None and int(found.groups()[-1]) in layers


# Keys that change nothing in what the adapter computes.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "inference_mode", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# What others may hold beside nothing (null, false, an empty list or object). The initialisations of other names change
# the frozen weights.
PLAIN = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal")}


def _read_config(path: Path) -> _PeftConfig:
    """The config of a plain LoRA; CheckpointError for a key that asks for more than we compute, or PEFT refuses."""
    config = read_json(path, CheckpointError, dict)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type {shown(config.get('peft_type'))} is not LORA")
    known = {field.name for field in dataclasses.fields(_PeftConfig)}
    for key in sorted(config.keys() - HARMLESS - known):
        if config[key] and config[key] not in PLAIN.get(key, ()):
            raise CheckpointError(f"{path}: {key} {shown(config[key])} is more than the plain LoRA that loads here")
    try:
        given = {key: config[key] for key in known & config.keys() if config[key] not in (None, [])}
        found = from_dict(_PeftConfig, given, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if found.layers_to_transform is not None and isinstance(found.target_modules, str):
        raise CheckpointError(f"{path}: layers_to_transform needs target_modules that is a list of names")
    if found.layers_pattern is not None and found.layers_to_transform is None:
        raise CheckpointError(f"{path}: layers_pattern needs layers_to_transform")
    return found


def _names(modules: str | tuple[str, ...], name: str) -> bool:
    """Whether a pattern, or a list of names or of their last parts, is of the module ``name``."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def _check_targets(model: nn.Module, config: _PeftConfig, source: str) -> None:
    """Refuse a config that puts LoRA on other projections than those that have one in ``model``."""
    root, layers = _language_model_root(model), _lora_layers(model)
    modules = [
        n for n, module in model.named_modules() if n.startswith(root) and (n in layers or is_projection(module))
    ]
    try:
        wanted = {name for name in modules if config.adapts(name.removeprefix(root))}
    except re.error as error:
        raise CheckpointError(f"{source}: a pattern of modules or layers cannot be read: {error}") from error
    keys = ("target_modules", "exclude_modules", "layers_to_transform")
    said = " with ".join(key for key in keys if getattr(config, key) is not None)
    if others := sorted(layers.keys() - wanted):
        raise CheckpointError(f"{source}: {said} leaves out {listed(others)}, of which {WEIGHTS} holds a LoRA")
    if others := sorted(wanted - layers.keys()):
        raise CheckpointError(f"{source}: {said} takes in {listed(others)}, of which {WEIGHTS} holds no LoRA")


def _check_extra(directory: Path) -> None:
    """Refuse an export whose extra parameters are gone, or are those of another."""
    digest = read_metadata(directory / WEIGHTS).get(EXTRA_DIGEST)
    if digest is not None and not (directory / EXTRA).exists():
        raise CheckpointError(f"{directory / EXTRA} is gone, without which {WEIGHTS} is half of the adapter")
    if digest is not None and file_digest(directory / EXTRA) != digest:
        raise CheckpointError(f"{directory / EXTRA} was not written together with {WEIGHTS}: export the adapter again")


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
