"""Adapters on the Hugging Face hub, and in its local cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from routingvl.atomic_files import replacing
from routingvl.backbones.loading import BackboneError, find_source
from routingvl.bottlenecks.checkpoint import CONFIG, WEIGHTS, CheckpointError
from routingvl.config import ConfigError, nearest

# Keywords of transformers' push_to_hub, beside repo_id and token.
PUSH_OPTIONS = ("commit_message", "commit_description", "private", "revision", "create_pr", "tags")
CARD = "README.md"
DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
LOAD_OPTIONS = ("vision", "text", "backend", "dtype", "device_map", *DOWNLOAD_OPTIONS)
# Of transformers' from_pretrained: what cannot be honoured, with the values that ask for nothing.
LOAD_WITHOUT_USE: dict[str, tuple[Any, ...]] = {
    "use_safetensors": (True, None),
    "low_cpu_mem_usage": (True, False, None),
    "weights_only": (True,),
    "trust_remote_code": (False, None),
    "ignore_mismatched_sizes": (False,),
    "variant": (None,),
    "subfolder": ("", None),
    "state_dict": (None,),
    "config": (None,),
    "quantization_config": (None,),
    "attn_implementation": (None,),
    "output_loading_info": (False,),
}
_BACKBONES = "load the backbone with it through transformers, and give the module as vision= or text="
_WHY = {
    "use_safetensors": "an adapter is a safetensors file",
    "trust_remote_code": "no code of a repository is run",
    "ignore_mismatched_sizes": "a tensor of another shape is an error",
    "variant": "an adapter has none",
    "subfolder": "give the folder itself",
    "state_dict": "the weights are those of the folder",
    "config": "the settings are those of the folder",
    "output_loading_info": "whatever does not fit is an error",
}


def adapter_folder(name: str | Path, **download: Any) -> Path:
    """The folder of an adapter that is given as a folder or as a name of the hub.

    Args:
        name: what begins with ``.``, ``/`` or ``~``, has several separators or exists is a folder, all else a name.
        **download: of huggingface_hub's ``snapshot_download`` (revision, token, cache_dir, local_files_only,
            force_download), for names of the hub.

    Raises:
        CheckpointError: it is neither a folder here nor a repository that can be reached, or that holds no adapter.
    """
    if isinstance(name, Path):
        return name
    try:
        source, local = find_source(name)
    except BackboneError:
        return Path(name)  # what is wrong with a folder is said by who reads it
    if local:
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = {key: value for key, value in download.items() if value not in (None, False) or key == "token"}
    revision = f" at revision {wanted['revision']}" if "revision" in wanted else ""
    try:
        folder = Path(snapshot_download(source, allow_patterns=[CONFIG, WEIGHTS], **wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source} is neither a folder here nor a repository of the hub{revision} that can be reached: give the "
            f"folder that save_pretrained wrote, or the name of one on the hub ({type(error).__name__})"
        ) from error
    if lacking := [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]:
        raise CheckpointError(f"{source} on the hub{revision} holds no {' and no '.join(lacking)}: it is no adapter")
    return folder


def check_load_options(options: Mapping[str, Any], source: str, dtype: Any) -> Any:
    """``dtype``, or what ``options`` calls so by its former name; ConfigError for what cannot be honoured."""
    options = dict(options)
    former = options.pop("torch_dtype", None)
    for name, value in options.items():
        if name not in LOAD_WITHOUT_USE:
            raise ConfigError(f"{source}: unknown keyword {name!r}{nearest(name, LOAD_OPTIONS)}")
        if value not in LOAD_WITHOUT_USE[name]:
            raise ConfigError(f"{source}: {name}={value!r} cannot be: {_WHY.get(name, _BACKBONES)}")
    return former if dtype is None else dtype


def push_options(options: dict[str, Any], source: str) -> dict[str, Any]:
    """Take the keywords of pushing out of ``options``; ConfigError, opening with ``source``, for none but these."""
    taken = {name: options.pop(name) for name in ("repo_id", *PUSH_OPTIONS) if name in options}
    tags = taken.get("tags")
    if tags is not None and (isinstance(tags, str) or not all(isinstance(tag, str) for tag in tags)):
        raise ConfigError(f"{source}: tags={tags!r} must be a list of strings")
    return taken


def push_folder(
    model: Any,
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> str:
    """Send the adapter in ``folder`` to the hub, with a card where the repository has none; returns the address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if not (folder / CARD).exists() and not api.file_exists(repo_id, CARD, revision=revision):
        (folder / CARD).write_text(model_card(model, repo_id, tags or []), encoding="utf-8")
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=[CONFIG, WEIGHTS, CARD],
        commit_message=commit_message or f"Upload {type(model).__name__}",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )
    return str(commit)


def model_card(model: Any, repo_id: str, tags: list[str]) -> str:
    """What the hub shows: what the adapter is, what it stands on, and the lines that load it."""
    from huggingface_hub import ModelCardData

    named = {role: name for role, name in model.backbones.items() if name is not None and not Path(name).is_dir()}
    unnamed = [
        role for role in ("vision", "text") if role not in named and not (role == "vision" and model.vit is None)
    ]
    routing = model.routing
    data = ModelCardData(
        library_name="routingvl",
        base_model=sorted(set(named.values())) or None,
        pipeline_tag="image-to-text" if model.can_generate() else "visual-question-answering",
        tags=["routingvl", routing.method, f"routing:{routing.routing}", *tags],
    )
    given = "".join(f", {role}=..." for role in unnamed)
    lines = [f"{name.capitalize()} backbone: `{named[name]}`." for name in named]
    if unnamed:
        lines.append(f"Not on the hub, so give it when loading: the {' and the '.join(unnamed)} backbone.")
    return f"""---
{data.to_yaml()}
---

# {repo_id.rsplit("/", 1)[-1]}

A `{type(model).__name__}` of [routingvl](https://arxiv.org/abs/2403.09377): routed {routing.method}
(routing `{routing.routing}`, rank {routing.rank}) on a frozen vision tower and language model, which it does not hold.

{chr(10).join(f"- {line}" for line in lines)}

```python
from routingvl.models import load_pretrained

model = load_pretrained("{repo_id}"{given})
```
"""


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
