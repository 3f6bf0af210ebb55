"""``routingvl export``: a run's adapter as a folder of its own, in our format or PEFT's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from routingvl.commands import RunParser, say
from routingvl.config import ConfigError

EXAMPLE = "routingvl export runs/caption-none adapters/caption --format peft"


def run(args: Sequence[str]) -> int:
    """Load the adapter with its backbones, and write it anew."""
    parser = RunParser(
        "export",
        "Write a run's adapter into a folder: for routingvl (load_pretrained), or for PEFT, which has no routing\n"
        "and so takes plain LoRA (routing none) only.",
        EXAMPLE,
        keys=("model.vision", "model.text"),
    )
    parser.add_argument("output", metavar="FOLDER", help="folder to write; must be empty or new")
    parser.add_argument("--format", choices=("routingvl", "peft"), default="routingvl", help="default: routingvl")
    options = parser.parse_args(args)

    from routingvl.atomic_files import replacing
    from routingvl.backbones.loading import hide_loading_bars
    from routingvl.models import load_pretrained
    from routingvl.training.run_folder import RunFolder

    # Of a link, the folder that it leads to.
    folder, output = RunFolder(Path(options.run)), Path(options.output).resolve()
    folder.load_config()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is not an empty folder; choose another one")
    hide_loading_bars(quiet=False)
    moved = {key.removeprefix("model."): place for key, place in options.settings.items()}
    model = load_pretrained(folder.adapter(options.checkpoint), **moved)
    with replacing(output) as target:
        if options.format == "peft":
            from routingvl.bottlenecks.peft_format import EXTRA, export_peft

            export_peft(model, target, base_model=model.backbones["text"])
        else:
            model.save_pretrained(target)
    if options.format == "peft" and (output / EXTRA).exists():
        say(f"what trained outside of the language model is in {output / EXTRA}, which PEFT does not read")
    say(f"{options.format} adapter of {folder.path} written to {output}")
    return 0
