"""``routingvl cache-features``: the images of a run's splits in, their features in a folder out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from routingvl.commands import say
from routingvl.config import ConfigError
from routingvl.config_file import config_from_namespace, config_parser
from routingvl.run_config import override

EXAMPLE = "routingvl cache-features --config caption-lora --data.images data/coco --feature-cache data/features"


def run(args: Sequence[str]) -> int:
    """Compute what the cache lacks, split by split, and say how much that was."""
    parser = config_parser(
        prog="routingvl cache-features",
        description="Run the frozen ViT once over the images of a run's splits. Settings as in routingvl train.",
        epilog=f"example: {EXAMPLE}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--feature-cache", metavar="FOLDER", help="Short for --data.feature_cache FOLDER.")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="Splits (default: those the run trains with).")
    parser.add_argument("--quiet", action="store_true", help="Print nothing but errors and the result.")
    namespace = parser.parse_args(list(args))
    config = config_from_namespace(namespace)
    if namespace.feature_cache is not None:
        config = override(config, feature_cache=namespace.feature_cache)
    if config.data.feature_cache is None:
        raise ConfigError("cache-features: no folder given; add --feature-cache FOLDER or set data.feature_cache")
    config.check_files()

    from routingvl.features import cache_features

    progress = not namespace.quiet and sys.stderr.isatty()
    for split, found, computed in cache_features(config, namespace.splits, progress=progress):
        say(f"{split}: {found + computed} images, {found} found, {computed} computed")
    say(f"features are in {config.data.feature_cache}")
    return 0
