"""Backbones from hub names and folders, through transformers, which is imported only when something is loaded.

No code of a model's repository is ever run, and nothing is left to chance in silence: a weight that the checkpoint
lacks, has in excess, or has in another shape or type than the model is an error, but for those that text.py, vision.py
and UNUSED name.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from routingvl.json_files import read_json
from routingvl.tensor_files import check_kinds, is_finite, listed, tensor_kinds

# Weights of checkpoints that no backbone here uses: other heads, and buffers that older versions of transformers saved.
UNUSED = re.compile(
    r"(?:lm_head|(?:\w+_)?classifier|qa_outputs|score|cls|multiple_choice_head|decoder)\..*"
    r"|(?:.*\.)?(?:embeddings\.mask_token|position_ids|token_type_ids|masked_bias|attn\.bias|num_batches_tracked"
    r"|relative_position_index|relative_coords_table)"
)

WeightFiles = dict[Path, dict[str, tuple[Any, list[int]]]]  # file -> name -> type and shape of a tensor


class BackboneError(ValueError):
    """A backbone cannot be loaded, is of a kind that has no row, or lacks what is asked of it; the message names it."""


def find_source(name: str | Path) -> tuple[str, bool]:
    """Where to load a backbone or tokenizer from, for transformers: (folder or hub name, whether it is a folder).

    What exists, begins with ``.``, ``/`` or ``~``, or has several separators is a path, which never contacts the
    network; all else is a hub name.

    Raises:
        BackboneError: the path is no folder.
    """
    path = Path(name).expanduser()
    text = str(name)
    if not (path.exists() or text.startswith((".", "/", "~")) or text.replace(os.sep, "/").count("/") > 1):
        return text, False
    if not path.is_dir():
        raise BackboneError(
            f"{text} {'is not a folder' if path.exists() else 'does not exist'}: give a hub name or a folder"
        )
    return str(path), True


@contextlib.contextmanager
def loading(name: str, local: bool) -> Iterator[dict[str, Any]]:
    """Options for transformers' ``from_pretrained``; an error inside becomes a BackboneError that names ``name``."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    # Tables of missing keys, retries without a network: what of that matters is in the error.
    levels = [(module, module.get_verbosity()) for module in (logging, hub_logging)]
    for module, _ in levels:
        module.set_verbosity_error()
    try:
        yield {"trust_remote_code": False, "local_files_only": local}
    except (BackboneError, KeyboardInterrupt):
        raise
    except Exception as error:  # of any class, from damaged configs and weights
        if not local and isinstance(error, OSError):
            raise BackboneError(
                f"{name} is neither a folder here nor a model of the hub that can be reached"
            ) from error
        reason = " ".join(str(error).split())
        raise BackboneError(f"{name} cannot be loaded ({type(error).__name__}: {reason[:300]})") from error
    finally:
        for module, level in levels:
            module.set_verbosity(level)


def model_type(backbone: nn.Module | str) -> str | None:
    """``model_type`` in the config of a module of transformers, or of a hub name or folder; None for other modules.

    Raises BackboneError when the name or folder holds no model.
    """
    if isinstance(backbone, nn.Module):
        return getattr(getattr(backbone, "config", None), "model_type", None)
    return _config_dict(backbone).get("model_type")


def inner_model_type(backbone: nn.Module | str, *names: str) -> str | None:
    """``model_type`` of the first config that the config holds by one of these names; None when it holds none."""
    if isinstance(backbone, nn.Module):
        config = getattr(backbone, "config", None)
        config = config.to_dict() if hasattr(config, "to_dict") else {}
    else:
        config = _config_dict(backbone)
    found = (config.get(name) for name in names)
    return next((inner.get("model_type") for inner in found if isinstance(inner, dict)), None)


def _config_dict(backbone: str) -> dict[str, Any]:
    from transformers import PretrainedConfig

    source, local = find_source(backbone)
    if local:
        read_json(Path(source) / "config.json", BackboneError, dict, fix="give the folder of a model of transformers")
        if (Path(source) / "adapter_config.json").exists():  # transformers would load it on top, without a word
            raise BackboneError(f"{backbone} holds an adapter_config.json: give the folder of a model without adapters")
    with loading(source, local) as options:
        return PretrainedConfig.get_config_dict(source, **options)[0]


def load_config(name: str) -> Any:
    """The config of a hub name or folder as transformers has it; raises BackboneError when there is none."""
    from transformers import AutoConfig

    source, local = find_source(name)
    with loading(source, local) as options:
        return AutoConfig.from_pretrained(source, **options)


def load_float32(
    class_name: str, name: str, optional: str | tuple[str, ...] = (), others: str = ""
) -> tuple[nn.Module, list[str]]:
    """The model of a hub name or folder as the named class of transformers, in float32 and evaluation mode.

    Args:
        class_name: of transformers.
        name: hub name or folder.
        optional: prefixes of the weights that the checkpoint may lack; transformers has drawn those at random.
        others: pattern of weights that it may hold beside the model's and those of :data:`UNUSED`.

    Returns:
        The model, and the names of the ``optional`` weights that the checkpoint lacks.

    Raises:
        BackboneError: the checkpoint cannot be read, its config is of a far larger model or of impossible heads, a
            weight is missing, in excess or of another shape, is no floating-point number, NaN or infinite, or a
            special token is not in the vocabulary.
    """
    import transformers

    source, local = find_source(name)
    unused = re.compile(f"{UNUSED.pattern}|{others}" if others else UNUSED.pattern)
    model_class = getattr(transformers, class_name)
    with loading(source, local) as options:
        config = model_class.config_class.from_pretrained(source, **options)
        _check_heads(name, config)
        # What a caller of transformers may choose; the models here read outputs by name, and whole texts.
        config.return_dict, config.chunk_size_feed_forward = True, 0
        files = _weight_files(Path(source)) if local else {}
        if files:
            _check_size(name, model_class, config, files)
        model, found = model_class.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
        missing = sorted(found["missing_keys"])
        lacking = [key for key in missing if optional and key.startswith(optional)]
        problems = {
            "missing": [key for key in missing if key not in lacking],
            "unexpected": sorted(key for key in found["unexpected_keys"] if not unused.fullmatch(key)),
            "of another shape": sorted(
                f"{key} {list(saved)} (the config says {list(wanted)})"
                for key, saved, wanted in found["mismatched_keys"]
            ),
        }
        if said := [f"{what}: {listed(keys)}" for what, keys in problems.items() if keys]:
            raise BackboneError(f"{name}: the weights are not those of its config.json; {'; '.join(said)}")
        _check_types(files if local else _weight_files(_snapshot(source)), unused)
        weights = chain(model.named_parameters(), model.named_buffers())
        if bad := [key for key, weight in weights if not is_finite(weight)]:
            raise BackboneError(f"{name}: {listed(bad)} holds NaN or infinity")
    return model, lacking


def _snapshot(name: str) -> Path:
    """The folder of the hub's cache that ``name`` was just loaded from."""
    from transformers.utils import cached_file

    return Path(cached_file(name, "config.json", local_files_only=True)).parent


def _check_heads(name: str, config: Any) -> None:
    """Refuse attention heads that do not divide the width; transformers fails at the first batch, or goes on."""
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    own = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)  # heads of a width of their own (T5)
    if type(heads) is type(width) is int and (heads < 1 or width < 1 or (width % heads and not own)):
        keys = [config.attribute_map.get(key, key) for key in ("num_attention_heads", "hidden_size")]
        raise BackboneError(
            f"{name}: config.json: {keys[0]} {heads} must be at least 1 and divide the width, {keys[1]} {width}"
        )


def _check_size(name: str, model_class: Any, config: Any, files: WeightFiles) -> None:
    """Refuse a config of a far larger model than the weights are, before transformers fills the memory with it."""
    tensors = [kind for kinds in files.values() for kind in kinds.values()]
    layers = getattr(config, "num_hidden_layers", 0)
    if layers > len(tensors):
        key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        raise BackboneError(f"{name}: config.json: {key} {layers} is more than the weights hold tensors")
    held = sum(math.prod(shape) for _, shape in tensors)
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in model_class(config).parameters())
    if wanted > 4 * held + 10**7:  # what is missing from less is found by name
        raise BackboneError(f"{name}: config.json is of a model of {wanted:,} weights, but the files hold {held:,}")


def _weight_files(folder: Path) -> WeightFiles:
    """Type and shape of each tensor, by the file of weights that holds it."""
    if files := sorted(folder.glob("model*.safetensors")):
        return {path: tensor_kinds(path) for path in files}
    return {
        path: {key: (v.dtype, list(v.shape)) for key, v in torch.load(path, "meta", weights_only=True).items()}
        for path in sorted(folder.glob("pytorch_model*.bin"))
    }


def _check_types(files: WeightFiles, unused: re.Pattern[str]) -> None:
    """Refuse weights that are not floating-point numbers, which transformers converts without a word."""
    for path, kinds in files.items():
        used = {key: kind for key, (kind, _) in kinds.items() if not unused.fullmatch(key)}
        check_kinds(used, str(path), BackboneError)


def hide_loading_bars(quiet: bool) -> None:
    """Hide the bars that transformers draws while it loads models, when output is not wanted or goes to a file."""
    from transformers.utils import logging

    if quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()
