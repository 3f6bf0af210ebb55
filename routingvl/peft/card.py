"""What a saved adapter's model card says of how to open it."""

from __future__ import annotations

from pathlib import Path

HEADING = "## Opening this adapter"
NOTE = f"""{HEADING}

Its method, `ROUTED_LORA`, comes with routingvl (`pip install 'routingvl[peft]'`). PEFT alone stops at
`KeyError: 'ROUTED_LORA'`; one import mends that:

```python
import routingvl.peft  # registers the method with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or repository")
```

"""


def write_note(folder: str | Path) -> None:
    """Put the note at the head of the README.md of ``folder``, or of the folder above where PEFT wrote it there.

    PEFT writes one card above the folders of named adapters. Without a card, one is made that holds the note alone.
    """
    from huggingface_hub import ModelCard

    card = Path(folder) / "README.md"
    above = card.parent.parent / "README.md"
    if not card.exists() and above.exists() and "library_name: peft" in above.read_text(encoding="utf-8"):
        card = above
    text = card.read_text(encoding="utf-8") if card.exists() else "---\nlibrary_name: peft\n---\n"
    if HEADING in text:
        return
    loaded = ModelCard(text, ignore_metadata_errors=True)
    loaded.text = f"{NOTE}{loaded.text}"
    loaded.save(card)
