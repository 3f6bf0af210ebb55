"""A real language model learns to name real pictures that it sees in its bottlenecks only, by PEFT and Trainer.

    python examples/real_weights/with_peft.py WORK [--routing mul] [--steps 300]

WORK is what prepare.py made. SmolLM2-135M gets a routed LoRA on query and value; the pictures' features, 384 wide, are
brought to its 576 by a projection that trains with the adapter, and nothing of them stands in front of the text. The
adapter is saved, opened again, and writes a name for each test picture; the same with each picture's features given to
another tells how much of the score is the picture's doing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, ViTModel

import routingvl
from routingvl.metrics import caption_scores
from routingvl.peft import RoutedLoraConfig

LONGEST = 16  # tokens of a name


def main() -> None:
    """Train, save, open, write, score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--routing", default="mul")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/emoji-peft"))
    options = parser.parse_args()
    torch.manual_seed(0)
    train, test = (examples(options.work, split) for split in ("train", "test"))
    tokenizer = AutoTokenizer.from_pretrained(options.work / "smollm2")

    config = RoutedLoraConfig(
        r=64, lora_alpha=64, routing=options.routing, target_modules=["q_proj", "v_proj"],
        image_projection="linear", image_width=384,
    )  # fmt: skip
    model = get_peft_model(base_model(options.work), config)
    see(model)
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        str(options.output / "trainer"), per_device_train_batch_size=16, max_steps=options.steps, learning_rate=1e-3,
        lr_scheduler_type="cosine", warmup_steps=0.05, logging_steps=50, save_strategy="no", report_to=[], use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=train, data_collator=lambda rows: batch_of(rows, tokenizer)).train()
    model.save_pretrained(options.output / "adapter")

    model = PeftModel.from_pretrained(base_model(options.work), options.output / "adapter").eval()
    see(model)
    names = [row["name"] for row in test]
    scores = {}
    for control, shift in (("its own picture", 0), ("another's picture", 2 * 17)):  # two drawings of each thing
        features = torch.stack([row["vision_features"] for row in test]).roll(shift, 0)
        written = write(model, tokenizer, features)
        references = {i: [name] for i, name in enumerate(names)}
        scores[control] = caption_scores(dict(enumerate(written)), references, ["CIDEr", "BLEU-1"])
        print(control, {name: value for name, value in scores[control].items() if isinstance(value, float)})
        print("  ", ", ".join(f"{said!r} for {name!r}" for said, name in list(zip(written, names, strict=True))[:8:2]))
    (options.output / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")


def base_model(work: Path) -> nn.Module:
    """SmolLM2."""
    return AutoModelForCausalLM.from_pretrained(work / "smollm2", dtype=torch.float32)


def see(model: PeftModel) -> None:
    """Bind, in every call, the features that come with the batch."""
    routingvl.attach(model, lambda batch: batch.pop("vision_features"))


@torch.no_grad()
def examples(work: Path, split: str) -> list[dict]:
    """Name and features [1, 384] of each picture: the class token of the frozen ViT."""
    kept = work / f"features-{split}.pt"
    content = json.loads((work / f"annotations/captions_{split}_karpathy.json").read_text(encoding="utf-8"))
    if not kept.exists():
        from PIL import Image

        vit = ViTModel.from_pretrained(work / "vit", add_pooling_layer=False).eval()
        processor = AutoImageProcessor.from_pretrained(work / "vit", backend="pil")
        pictures = [Image.open(work / "images" / image["file_name"]) for image in content["images"]]
        parts = [processor(pictures[i : i + 32], return_tensors="pt") for i in range(0, len(pictures), 32)]
        torch.save(torch.cat([vit(**part).last_hidden_state[:, :1] for part in parts]), kept)
    features = torch.load(kept)
    captions = [annotation["caption"] for annotation in content["annotations"]]
    return [{"name": name, "vision_features": v} for name, v in zip(captions, features, strict=True)]


def batch_of(rows: list[dict], tokenizer) -> dict[str, torch.Tensor]:
    """Begin token, name, end token; what fills up the rows is not learned."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = [[begin, *tokenizer(row["name"], add_special_tokens=False).input_ids[:LONGEST], end] for row in rows]
    width = max(map(len, ids))
    pad = [[0] * (width - len(row)) for row in ids]
    return {
        "input_ids": torch.tensor([row + [end] * len(rest) for row, rest in zip(ids, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(row) + rest for row, rest in zip(ids, pad, strict=True)]),
        "labels": torch.tensor([row + [-100] * len(rest) for row, rest in zip(ids, pad, strict=True)]),
        "vision_features": torch.stack([row["vision_features"] for row in rows]),
    }


def write(model: PeftModel, tokenizer, features: torch.Tensor) -> list[str]:
    """The model's names of pictures [B, 1, 384], by beam search."""
    written = []
    for part in features.split(32):
        start = torch.full((len(part), 1), tokenizer.bos_token_id)
        tokens = model.generate(
            input_ids=start, attention_mask=torch.ones_like(start), vision_features=part, num_beams=3,
            max_new_tokens=LONGEST, do_sample=False, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        written += tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
    return [text.strip() for text in written]


if __name__ == "__main__":
    main()
