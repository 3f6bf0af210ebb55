"""What a saved adapter's model card says of how to open it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

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
    """Put the note at the head of the README.md of ``folder``, which is made where PEFT wrote none.

    PEFT writes one card for all adapters, above the folders of named ones: that has the note too.
    """
    card = Path(folder) / "README.md"
    above = card.parent.parent / "README.md"
    if not card.exists():
        card.write_text("---\nlibrary_name: peft\n---\n", encoding="utf-8")
    for path in (card, above):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if "library_name: peft" in text and HEADING not in text:
            loaded = ModelCard(text, ignore_metadata_errors=True)
            loaded.text = f"{NOTE}{loaded.text}"
            loaded.save(path)
