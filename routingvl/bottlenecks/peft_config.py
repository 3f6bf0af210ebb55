"""The configuration of PEFT's LoRA: what each of its keys asks for, honoured as PEFT does or refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from routingvl.bottlenecks.checkpoint import WEIGHTS, CheckpointError
from routingvl.bottlenecks.projections import is_projection
from routingvl.config import ConfigError, from_dict
from routingvl.config.checks import check_settings, setting, shown
from routingvl.json_files import read_json
from routingvl.tensor_files import listed

# Keys that change nothing in what a saved adapter computes. The configs of initialisations are of use to them alone.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
# Keys that may hold nothing (null, false, an empty list or object), and what they ask for otherwise.
REFUSED = {
    "alora_invocation_tokens": "a LoRA that acts only behind some tokens",
    "arrow_config": "a mixture of several LoRAs",
    "kasa_config": "a frozen weight without its smallest singular values",
    "layer_replication": "a model of repeated layers",
    "lora_bias": "a bias of B's own",
    "megatron_config": "layers of Megatron",
    "monteclora_config": "weights drawn at random",
    "target_parameters": "a LoRA on parameters that are no projection",
    "trainable_token_indices": "trained rows of an embedding",
    "use_bdlora": "a LoRA of blocks",
    "use_dora": "a trained norm of each column (DoRA)",
    "use_qalora": "a LoRA on averaged inputs",
    "velora_config": "a backward pass of another kind",
}
# After these the tensors are all; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change the frozen weights as well.
INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva", "mica")
ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class PeftLora:
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
    rank_pattern: dict = dataclasses.field(default_factory=dict)
    alpha_pattern: dict = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    bias: str = setting("none", choices=("none", "all", "lora_only"))
    init_lora_weights: bool | str = setting(True, choices=INITIALISATIONS)

    def __post_init__(self) -> None:
        check_settings(self)
        ranks = {f"rank_pattern {key}": rank for key, rank in self.rank_pattern.items()}
        alphas = {f"alpha_pattern {key}": alpha for key, alpha in self.alpha_pattern.items()}
        for key, value in (ranks | alphas).items():
            if type(value) not in ((int,) if key in ranks else (int, float)) or not 0 < value <= 1e6:
                raise ConfigError(
                    f"{key}: {shown(value)} must be {'an integer' if key in ranks else 'a number'} above 0"
                )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError("layers_to_transform needs target_modules that is a list of names")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("layers_pattern needs layers_to_transform")
        patterns = [*self.rank_pattern, *self.alpha_pattern, *self.modules_to_save]
        for modules in (self.target_modules, self.exclude_modules):
            patterns += [modules] if isinstance(modules, str) else []
        patterns += [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or ()
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ConfigError(
                    f"a pattern of modules or layers, {shown(pattern)}, cannot be read: {error}"
                ) from error

    def rank(self, name: str) -> int:
        """The rank of the LoRA on the projection of this name."""
        return _of_pattern(self.rank_pattern, name, self.r)

    def scaling(self, name: str) -> float:
        """The factor on its update."""
        rank = self.rank(name)
        return _of_pattern(self.alpha_pattern, name, self.lora_alpha) / (rank**0.5 if self.use_rslora else rank)

    def adapted(self, model: nn.Module, projections: Iterable[str]) -> set[str]:
        """Which of these projections of ``model`` PEFT puts a LoRA on: its check_target_module_exists."""
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            projections = {name for name in projections if model.get_submodule(name) is not head}
            return {name for name in projections if not self._excludes(name)}
        return {name for name in projections if not self._excludes(name) and self._targets(name)}

    def _excludes(self, name: str) -> bool:
        if self.exclude_modules is not None and _names(self.exclude_modules, name):
            return True
        return any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in self.modules_to_save)

    def _targets(self, name: str) -> bool:
        if not _names(self.target_modules, name):
            return False
        if self.layers_to_transform is None:
            return True
        layers = (self.layers_to_transform,) if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        patterns = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        starts = [r".*?\.[^.]*"] if patterns is None else [rf"(?:^|.*?\.){pattern}" for pattern in patterns]
        found = next(filter(None, (re.match(rf"{start}\.(?P<layer>\d+)\.", name) for start in starts)), None)
        return found is not None and int(found["layer"]) in layers


def read_config(path: Path) -> PeftLora:
    """The config of a LoRA that loads here.

    Raises:
        CheckpointError: it is no JSON, a key asks for more than a plain LoRA with saved biases and modules, or PEFT
            would refuse it; the message names the key.
    """
    config = read_json(path, CheckpointError, dict)
    if config.get("peft_type") != "LORA":
        hint = ": open it with peft, after importing routingvl.peft" if config.get("peft_type") == "ROUTED_LORA" else ""
        raise CheckpointError(f"{path}: peft_type {shown(config.get('peft_type'))} is not LORA{hint}")
    known = {field.name for field in dataclasses.fields(PeftLora)}
    for key in sorted(config.keys() - HARMLESS - known):
        if config[key]:
            asks = REFUSED.get(key, "something that this version of routingvl does not know")
            raise CheckpointError(f"{path}: {key} {shown(config[key])} asks for {asks}; a plain LoRA loads here")
    if (start := config.get("init_lora_weights")) not in (None, *INITIALISATIONS):
        raise CheckpointError(
            f"{path}: init_lora_weights {shown(start)} changes the frozen weights as well; let PEFT save it as a plain "
            "LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    try:
        given = {key: config[key] for key in known & config.keys() if config[key] not in (None, [])}
        saved = given.get("modules_to_save")
        if isinstance(saved, list) and all(isinstance(name, str) for name in saved):
            given["modules_to_save"] = list(dict.fromkeys(saved))  # PEFT adds the usual names of heads once more
        return from_dict(PeftLora, given, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def check_adapted(model: nn.Module, adapted: set[str], config: PeftLora, path: Path) -> None:
    """Refuse a config that puts a LoRA on other projections of ``model`` than the ``adapted`` ones."""
    named = {name: module for name, module in model.named_modules() if name.removesuffix(".base_layer") not in adapted}
    modules = adapted | {name for name, module in named.items() if is_projection(module)}
    wanted = config.adapted(model, modules)
    keys = ("target_modules", "exclude_modules", "layers_to_transform")
    said = " with ".join(key for key in keys if getattr(config, key) is not None)
    if others := sorted(adapted - wanted):
        raise CheckpointError(f"{path}: {said} leaves out {listed(others)}, of which {WEIGHTS} holds a LoRA")
    if others := sorted(wanted - adapted):
        raise CheckpointError(f"{path}: {said} takes in {listed(others)}, of which {WEIGHTS} holds no LoRA")


def saved_modules(model: nn.Module, modules_to_save: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of ``model`` that PEFT trains and saves whole: those whose name ends with an entry."""
    endings = tuple(modules_to_save)
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if endings and name.endswith(endings)}


def _of_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that matches ``name`` or its last parts, as PEFT's get_pattern_key finds it."""
    found = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
    return default if found is None else patterns[found]


def _names(modules: str | tuple[str, ...], name: str) -> bool:
    """Whether a pattern, or a list of names or of their last parts, is of the module ``name``."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)
