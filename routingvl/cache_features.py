"""Filling a feature cache before any training, from Python: what ``routingvl cache-features`` calls."""

from __future__ import annotations

from collections.abc import Sequence

from routingvl.backbones.loading import hide_loading_bars
from routingvl.backbones.vision import load_tower
from routingvl.config import ConfigError
from routingvl.config.schema import RunConfig
from routingvl.data.feature_store import FeatureStore
from routingvl.data.images import ImagePreprocessor
from routingvl.tasks.base import find_task
from routingvl.training.accelerator import make_accelerator


def cache_features(
    config: RunConfig, splits: Sequence[str] | None = None, *, progress: bool = False
) -> list[tuple[str, int, int]]:
    """Add to ``data.feature_cache`` the features of every image of ``splits`` that it lacks.

    Args:
        config: of the run; its vision tower, its features, preprocessing, data and device matter. No language model
            is loaded.
        splits: by default data.train_split and data.val_split, with their limits; named ones are taken whole.
        progress: draw a bar.

    Returns:
        For each split its name, the number of images found in the cache and the number computed.

    Raises:
        ConfigError: no feature_cache is set, or a path is missing.
        DataError, ImageError, FeatureCacheError, OSError: data or cache cannot be read or written.
    """
    data = config.data
    if data.feature_cache is None:
        raise ConfigError("data.feature_cache is not set; add --feature-cache FOLDER")
    task_class = find_task(config.task)
    config.check_files()
    hide_loading_bars(not progress)
    device = make_accelerator(config).device
    preprocessor = ImagePreprocessor.from_pretrained(config.model.vision)
    task = task_class(config, None, preprocessor)
    loaded = task.read_training_splits() if splits is None else [task.load_split(split) for split in splits]
    vision = load_tower(config.model.vision).to(device)
    store = FeatureStore(vision, config.model.vision_features, preprocessor, data, config.model.vision_layer)
    counts = []
    for split in filter(None, loaded):
        found, computed = store.found, store.computed
        store.load(split.images, progress=progress)
        counts.append((split.name, store.found - found, store.computed - computed))
    return counts
