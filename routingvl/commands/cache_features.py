"""``routingvl cache-features``: the images of a run's splits in, their features in a folder out."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from routingvl.commands import say
from routingvl.config.files import command_parser, config_from_namespace

EXAMPLE = "routingvl cache-features --config caption-lora --data.images data/coco --feature-cache data/features"


def run(args: Sequence[str]) -> int:
    """Compute what the cache lacks, split by split, and say how much that was."""
    parser = command_parser(
        "cache-features",
        "Run the frozen ViT once over the images of a run's splits. Settings as in routingvl train.",
        EXAMPLE,
    )
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="Splits (default: those the run trains with).")
    namespace = parser.parse_args(list(args))
    config = config_from_namespace(namespace)

    from routingvl.cache_features import cache_features

    progress = not namespace.quiet and sys.stderr.isatty()
    for split, found, computed in cache_features(config, namespace.splits, progress=progress):
        say(f"{split}: {found + computed} images, {found} found, {computed} computed")
    say(f"features are in {config.data.feature_cache}")
    return 0
