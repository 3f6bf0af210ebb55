"""Opening a run: trying out what it is made of, and beginning or resuming it in its folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from routingvl.atomic_files import write_json
from routingvl.config.schema import RunConfig, flatten
from routingvl.data.feature_cache import file_stat
from routingvl.data.files import DataError
from routingvl.data.images import ImageError, ImageRecord, check_image_file
from routingvl.digests import backbone_digest, file_digest, value_digest
from routingvl.tasks.base import Batch, Task
from routingvl.training.identity import IMAGES, Identity, ImageFile, all_images
from routingvl.training.run_folder import RunError, RunFolder

READERS = 8  # threads that read image files


def try_example(task: Task, accelerator: Accelerator) -> Batch:
    """A batch of the first training example with a readable image, of which the model has computed the loss.

    Raises:
        DataError, ImageError: there is none.
        ValueError: the model cannot take it.
        FloatingPointError: its loss is not finite.
    """
    data = task.train_set
    item = next((item for item in map(data.__getitem__, range(len(data))) if item is not None), None)
    if item is None:
        raise DataError(f"no image of split {task.config.data.train_split!r} can be read; correct data.images")
    batch = task.collator()([item])
    task.supervised_items(batch)
    task.model.eval()
    with torch.no_grad(), accelerator.autocast():
        loss = float(task.model(**task.training_inputs(batch, accelerator.device)).loss)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss of the first example is {loss} before any step; the backbones are damaged")
    return batch


def identify(config: RunConfig, task: Task, processes: int, known: Sequence[ImageFile] = ()) -> Identity:
    """The identity of a run whose task has its data and model; image files that are as in ``known`` are not read.

    Raises :class:`ImageError` for an image that is missing, unless such are skipped.
    """
    content = {name: value_digest(value) for name, value in task.decided_by().items()}
    for role, backbone in (("vision", task.model.vit), ("text", task.model.language_model)):
        if backbone is not None:
            content[f"the {role} backbone (model.{role})"] = backbone_digest(backbone)
    splits = [data.split for data in (task.train_set, task.val_set) if data is not None]
    records = {image.path or image.file_name: image for split in splits for image in split.images}
    cache = task.feature_store.files if config.data.feature_cache is not None else None
    images = digest_images(
        list(records.values()), known, cache and cache.known, must_exist=config.data.on_bad_image == "fail"
    )
    content[IMAGES] = all_images(images)
    return Identity(flatten(config), processes, content, images)


def digest_images(
    records: Sequence[ImageRecord],
    known: Sequence[ImageFile] = (),
    lookup: Callable[[Path], bytes | None] | None = None,
    must_exist: bool = True,
) -> list[ImageFile]:
    """The content of each image file.

    Args:
        records: the images.
        known: files of earlier; one whose size and times are the same is not read again.
        lookup: the digest of a file that is known from elsewhere.
        must_exist: raise :class:`ImageError` for a file that is missing or none.
    """
    before = {image.path: image for image in known}

    def unchanged(record: ImageRecord) -> ImageFile | None:
        found = before.get(str(record.path))
        with suppress(OSError):
            return found if found is not None and found.stat == file_stat(record.path) else None

    def read(record: ImageRecord) -> ImageFile:
        path = None if record.path is None else str(record.path)
        try:
            if path is not None:
                check_image_file(path)
                found = file_stat(path)
                digest = lookup and lookup(record.path)
                return ImageFile(path, found, digest.hex() if digest else file_digest(record.path))
        except ImageError:
            if must_exist:
                raise
        except OSError as error:
            if must_exist:
                raise ImageError(f"image {path} cannot be read: {error.strerror}") from error
        return ImageFile(path)

    files = [unchanged(record) for record in records]
    with ThreadPoolExecutor(READERS) as pool:
        new = pool.map(read, [record for record, file in zip(records, files, strict=True) if file is None])
        return [file or next(new) for file in files]


@dataclass
class Opening:
    """The first process's work on the folder of a run that begins or is resumed.

    Attributes:
        folder, config, task: of the run.
        resume: whether it is resumed.
        notes: what differs from how the run began, and may.
    """

    folder: RunFolder
    config: RunConfig
    task: Task
    resume: bool
    notes: list[str] = field(default_factory=list)
    began: Identity | None = None
    identity: Identity | None = None

    def identify(self, processes: int) -> str:
        """Know what the run is made of; the id of the run.

        Raises :class:`RunError` when that is not what a resumed run began with.
        """
        began = self.began = self.folder.identity() if self.resume else None
        self.identity = identify(self.config, self.task, processes, began.images if began else ())
        if began is None:
            return self.identity.id
        if changes := began.changes(self.identity):
            raise RunError(
                f"cannot resume {self.folder.path}, since it began: {'; '.join(changes)}; put back what it began with"
            )
        self.notes += [f"resumed although {difference}" for difference in began.differences(self.identity)]
        return began.id

    def begin(self) -> list[str]:
        """Put into the folder what a new run begins with, or what a resumed one lacks; :attr:`notes`."""
        if not self.resume:
            self.folder.start(self.config, self.identity, self.task.save_files)
        elif changed := self.folder.changed_files():
            self.task.save_files(self.folder.path)
            write_json(self.folder.environment_file, self.began.environment)
            self.notes.append(f"written again, because edited or deleted: {', '.join(changed)}")
        self.folder.write_images(self.identity.images)
        return self.notes
