"""What decides the result of a run: recorded when it starts, and compared when it is resumed."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from routingvl.config.schema import NEWER_KEYS, RunConfig, flatten
from routingvl.digests import value_digest
from routingvl.environment import environment

# Settings that say where and how fast, not what: a resumed run may change them and stays the same run. What the paths
# lead to has to be the same, which the digests say.
FREE_ON_RESUME = (
    "output_dir device model.vision model.text model.tokenizer data.annotations data.images data.answers data.workers "
    "data.feature_batch_size data.feature_cache model.backend train.compile train.log_every train.save_every "
    "train.trackers"
).split()
FREE_OF_PARTS = ("annotations", "images")  # the same of each data set of ``data.mixture``
IMAGES = "the content of images (data.images)"


@dataclass(frozen=True)
class ImageFile:
    """An image and its content: the digest, and size and times of the file that had it; None where it is unreadable."""

    path: str | None
    stat: tuple[int, int, int] | None = None
    digest: str | None = None


@dataclass(frozen=True)
class Identity:
    """What a run was started with, in plain values.

    Attributes:
        config: every setting by its dotted name.
        processes: how many share a step.
        content: digests by the name of what they are of; that of all images is among them.
        images: of both splits, in order; empty where it is no longer known which file had which content.
        environment: versions and hardware; another one is warned of.
        id: of the run.
    """

    config: dict[str, Any]
    processes: int
    content: dict[str, str]
    images: list[ImageFile]
    environment: dict[str, Any] = field(default_factory=environment)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def changed_settings(self, config: RunConfig) -> list[str]:
        """What of ``config`` would make it another run."""
        return changed_settings(self.config, config)

    def changes(self, now: Identity) -> list[str]:
        """What of ``now`` makes it another run, each with its name."""
        found = _changed(_whole(self.config), now.config, lambda key: not _is_free(key))
        if self.processes != now.processes:
            found.append(f"the number of processes was {self.processes} and is now {now.processes}")
        for name in dict.fromkeys([*self.content, *now.content]):
            if self.content.get(name) != now.content.get(name):
                found.append(f"{name} changed" + (self._example(now) if name == IMAGES else ""))
        return found

    def _example(self, now: Identity) -> str:
        """The first image whose content changed; empty where that is not known."""
        pairs = zip(self.images, now.images, strict=False)
        return next((f", {after.path} for one" for before, after in pairs if before.digest != after.digest), "")

    def differences(self, now: Identity) -> list[str]:
        """What differs but may: it is told, because results can depend on it in their last bits."""
        found = _changed(_whole(self.config), now.config, _is_free)
        for part in ("packages", "hardware"):
            found += _changed(self.environment.get(part, {}), now.environment[part], lambda name: True)
        return found

    def check(self) -> None:
        """Raise ValueError when this was read from a file and holds something else than it says."""
        kinds = {"config": dict, "processes": int, "content": dict, "environment": dict, "id": str}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} is no {kind.__name__}")
        if not all(isinstance(self.environment.get(part, {}), dict) for part in ("packages", "hardware")):
            raise ValueError("environment is damaged")
        if all_images(self.images) != self.content.get(IMAGES):  # edited: all are read again
            self.images.clear()


def changed_settings(recorded: Mapping[str, Any], config: RunConfig) -> list[str]:
    """What of ``config`` would make it another run than one that began with the ``recorded`` settings."""
    return _changed(_whole(recorded), flatten(config), lambda key: not _is_free(key))


def _is_free(key: str) -> bool:
    part, _, name = key.rpartition(".")
    return key in FREE_ON_RESUME or (part.startswith("data.mixture.") and name in FREE_OF_PARTS)


def _whole(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that may be older than some of them: what it did then is what they are by default now."""
    defaults = flatten(RunConfig())
    return {**{key: defaults[key] for key in NEWER_KEYS}, **recorded}


def _by_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which those of each data set of ``data.mixture`` have names of their own."""
    mixture = config.get("data.mixture")
    if not isinstance(mixture, Mapping) or not all(isinstance(part, Mapping) for part in mixture.values()):
        return dict(config)
    rest = {key: value for key, value in config.items() if key != "data.mixture"}
    parts = {f"data.mixture.{name}.{key}": value for name, part in mixture.items() for key, value in part.items()}
    return rest | parts | {"data.mixture": list(mixture)}


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], chosen: Callable[[str], bool]) -> list[str]:
    before, after = _by_part(before), _by_part(after)
    return [
        f"{name} was {before.get(name)!r} and is now {after.get(name)!r}"
        for name in dict.fromkeys([*before, *after])
        if chosen(name) and before.get(name) != after.get(name)
    ]


def all_images(images: Sequence[ImageFile]) -> str:
    """The digest of all contents, in order."""
    return value_digest([image.digest for image in images])


def to_lines(images: Sequence[ImageFile]) -> str:
    """One JSON list per image: path, size and times, digest."""
    return "".join(json.dumps([image.path, image.stat, image.digest]) + "\n" for image in images)


def from_lines(text: str) -> list[ImageFile]:
    """What :func:`to_lines` wrote. Raises ValueError for anything else."""
    images = []
    for line in text.splitlines():
        path, found, digest = json.loads(line)
        images.append(ImageFile(path, None if found is None else tuple(found), digest))
    return images
