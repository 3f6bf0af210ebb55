"""The trials of docs/models.md, on tiny random models: adapt one, train it, save it, load it, and use it.

``python tests/model_trials.py`` prints the page (``make models`` writes it).
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from text_zoo import TARGETS, generates, text_batch, text_model
from tiny import WIDTH, small_roberta
from torch import nn
from tower_zoo import CASES as TOWERS
from tower_zoo import tower_images, vision_tower
from vlms import VLMS, batch_for, make

import routingvl
from routingvl import RoutingConfig
from routingvl.kernels import ROUTINGS
from routingvl.peft import RoutedLoraConfig

ONE_IMAGE = ("blip2_opt", "blip2_t5", "vision_encoder_decoder")  # a row; the others have rows of two
WRITES = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
Trial = Callable[[Path], None]  # in an empty folder; AssertionError: it fails, ValueError: it cannot be, and why
PAGE = """# Which models work

What was tried on tiny random models of transformers, in {count} trials. In each the bottlenecks are put in with a
routing function, three steps train them, the adapter is saved and loaded around a fresh copy of the base, and both give
the same numbers: logits, and the text of a beam search where the model writes. Another image has to change them.
`make models` prints this page anew and `tests/test_model_trials.py` checks it. A number stands for a reason below its
table. A model that is not here can work all the same.

## Language models

By `inject` with routing mul: LoRA at the places that routingvl knows of the family, LoRA at named projections, adapters
behind the sublayers; and by PEFT's `get_peft_model` at named projections. Sequence classifiers classify, the others
write.

{families}
## Vision towers

In front of a tiny RoBERTa that classifies, by what `model.vision_features` takes of the tower: one token an image
(routing mul), or all of them (routing vllora).

{towers}
## Encoder-decoders that read images and a text

By `VisionTextForGeneration` with one image or two in a row, by what the decoder's bottlenecks are routed by
(`routing.routed_by`; those of the encoder by the image): LoRA on query and value of the encoder's self-attention and
the decoder's cross-attention, and adapters behind these and the feed-forward sublayers.

{writers}
## Whole vision-language models

The image is the model's own (`attach`, or `image_from` in PEFT); LLaVA, PaliGemma and Qwen2-VL have a row of two images
beside a row of one. Each is tried with every routing function, by `inject` and by PEFT.

{vlms}"""


class Differs(AssertionError):
    """A trial ran, and its numbers are not what they have to be."""


# ---------------------------------------------------------------------------------------------------------- one trial


def trained(model: nn.Module, run: Callable[[nn.Module], torch.Tensor]) -> nn.Module:
    """The model after three steps; ``run`` gives its loss."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    for _ in range(3):
        loss = run(model.train())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not loss.isfinite():
        raise Differs(f"the loss is {loss.item()}")
    if still := [name for name, parameter in weights.items() if torch.equal(parameter, before[name])]:
        raise Differs(f"{still[0]} did not train")
    return model.eval()


@torch.no_grad()
def compare(model: nn.Module, again: nn.Module, use: Callable[[nn.Module, int], Any], sees: bool = True) -> None:
    """Both models give the same, and something else for another image; ``use(model, image)`` gives tensors."""
    here, there, other = use(model, 0), use(again.eval(), 0), use(model, 1)
    if not all(map(torch.equal, here, there)):
        raise Differs("the loaded adapter gives other numbers")
    if sees == torch.equal(here[0], other[0]):
        raise Differs("another image changes nothing" if sees else "the image changes an unrouted model")


def said(trial: Trial) -> str:
    """What a trial comes to: "yes", or the reason why it cannot be, which a ValueError gives."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial(Path(folder))
        except ValueError as error:
            return str(error).replace(folder, "DIR").split("; ")[0].split("\n")[0]
        return "yes"


# ---------------------------------------------------------------------------------------------------- language models


def images(seed: int, rows: int = 3) -> torch.Tensor:
    """Features [B, 1, d]."""
    return torch.randn(rows, 1, WIDTH, generator=torch.Generator().manual_seed(seed))


def try_family(kind: str, way: str, folder: Path) -> None:
    """``way``: "places" or "targets" (LoRA by inject), "adapter", "peft"."""
    batch = text_batch(kind)
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def adapted(place: Path | None) -> nn.Module:
        torch.manual_seed(7)
        if way == "peft":
            settings = RoutedLoraConfig(r=4, lora_alpha=8, routing="mul", target_modules=list(TARGETS[kind]))
            return peft.get_peft_model(text_model(kind), settings)
        targets = {"targets": TARGETS[kind]} if way == "targets" else {"method": "adapter"} if way == "adapter" else {}
        model = text_model(kind)
        routingvl.inject(model, RoutingConfig(routing="mul", rank=4, alpha=8, **targets))
        return model

    def loss(model: nn.Module) -> torch.Tensor:
        with routingvl.bind_image(model, images(1)):
            return model(**batch).loss

    def use(model: nn.Module, seed: int) -> list[torch.Tensor]:
        with routingvl.bind_image(model, images(seed + 1)):
            found = [model(**batch).logits]
        if generates(kind):
            with routingvl.bind_image(model, images(seed + 1), decoding=True):
                found.append(model.generate(**prompt, **WRITES))
        return found

    model = trained(adapted(None), loss)
    if way == "peft":
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(text_model(kind), folder)
    else:
        routingvl.save_adapter(model, folder)
        again = text_model(kind)
        routingvl.load_adapter(again, folder)
    compare(model, again, use)


# ------------------------------------------------------------------------------------------------------ vision towers


def try_tower(name: str, kind: str, folder: Path) -> None:
    """A tower's ``kind`` of features in front of RoBERTa, by the class of the task."""
    from routingvl import ViTRobertaForClassification as Classifier

    routing = RoutingConfig(routing="vllora" if kind == "tokens" else "mul", rank=4, alpha=8)
    parts = {"vision": vision_tower(name), "text": small_roberta()}
    torch.manual_seed(7)
    model = Classifier.from_backbones(**parts, config=routing, num_labels=3, vision_features=kind)
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 2])
    trained(model, lambda model: model(pixel_values=tower_images(name, 0), input_ids=ids, labels=labels)[0])
    model.save_pretrained(folder)
    again = Classifier.from_pretrained(folder, vision=vision_tower(name), text=small_roberta())
    compare(model, again, lambda model, seed: [model(pixel_values=tower_images(name, seed), input_ids=ids)[1]])


# --------------------------------------------------------------------------------------------------- encoder-decoders


def try_writer(kind: str, method: str, routed_by: str, folder: Path) -> None:
    """An encoder-decoder over texts with one image or two, by the class of the task."""
    from routingvl import VisionTextForGeneration as Writer

    several = routed_by.endswith("_tokens")
    config = RoutingConfig(
        method=method,
        routing="vllora" if several else "mul",
        rank=4,
        alpha=8,
        routed_by=routed_by,
        decoder_attention="cross",
    )
    torch.manual_seed(7)
    model = Writer.from_backbones(None, text_model(kind), config, image_pooling="mean", project_features=True)
    batch = text_batch(kind)
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
    there = torch.tensor([[True, True], [True, False], [True, True]])

    def sees(seed: int) -> dict[str, torch.Tensor]:
        pair = torch.stack([images(2 * seed + 1), images(2 * seed + 2)], dim=1)
        return {"vision_features": pair, "image_mask": there}

    def use(model: nn.Module, seed: int) -> list[torch.Tensor]:
        written = model.generate(**sees(seed), **prompt, num_beams=2, max_new_tokens=4, eos_token_id=None)
        return [model(**sees(seed), **batch).logits, written]

    trained(model, lambda model: model(**sees(0), **batch).loss)
    model.save_pretrained(folder)
    compare(model, Writer.from_pretrained(folder, text=text_model(kind)), use)


# -------------------------------------------------------------------------------------- whole vision-language models


def try_vlm(name: str, routing: str, way: str, folder: Path) -> None:
    """``way``: "inject" (and attach) or "peft"; the image tokens of a batch are drawn anew for another image."""
    vlm = VLMS[name]
    pooling = "tokens" if ROUTINGS[routing].max_visual_tokens is None else "mean"

    def base() -> nn.Module:
        return make(name)

    def adapted() -> nn.Module:
        torch.manual_seed(7)
        if way == "peft":
            settings = RoutedLoraConfig(
                r=4, lora_alpha=8, routing=routing, target_modules=list(vlm.targets), image_from=vlm.image_from,
                image_pooling=pooling,
            )  # fmt: skip
            return peft.get_peft_model(base(), settings)
        model = base()
        routingvl.inject(model, RoutingConfig(routing=routing, rank=4, alpha=8, targets=vlm.targets))
        routingvl.attach(model, vlm.image_from, image_pooling=pooling)
        return model

    batch = batch_for(name, (1, 1) if name in ONE_IMAGE else (2, 1))
    prompt = {key: value for key, value in batch.items() if key != "labels"}

    def use(model: nn.Module, seed: int) -> list[torch.Tensor]:
        # Another image for the bottlenecks alone: the model itself sees the same.
        other = routingvl.bind_image(model, images(9, rows=2)) if seed else contextlib.nullcontext()
        with other:
            return [model(**batch).logits, *([] if seed else [model.generate(**prompt, **WRITES)])]

    model = trained(adapted(), lambda model: model(**batch).loss)
    if way == "peft":
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(base(), folder)
    else:
        routingvl.save_adapter(model, folder)
        again = base()
        routingvl.load_adapter(again, folder)
        routingvl.attach(again, vlm.image_from, image_pooling=pooling)
    compare(model, again, use, sees=routing != "none")


# ------------------------------------------------------------------------------------------------------------ the page

KINDS = ("pooler", "cls", "mean", "tokens")
FAMILY_WAYS = {
    "places": "LoRA, its own places", "targets": "LoRA, named", "adapter": "adapters", "peft": "LoRA by PEFT",
}  # fmt: skip
WRITER_WAYS = {
    f"{words}, {routed_by}": (method, routed_by)
    for method, words in (("lora", "LoRA"), ("adapter", "adapters"))
    for routed_by in ("image", "encoder", "encoder_tokens")
}
VLM_WAYS = {"inject": "inject", "peft": "PEFT"}


def families() -> dict[str, dict[str, Trial]]:
    """The trials of language models: row -> column -> trial."""
    return {
        kind: {column: partial(try_family, kind, way) for way, column in FAMILY_WAYS.items()}
        for kind in sorted(TARGETS)
    }


def towers() -> dict[str, dict[str, Trial]]:
    """The trials of vision towers."""
    return {name: {kind: partial(try_tower, name, kind) for kind in KINDS} for name in TOWERS}


def writers() -> dict[str, dict[str, Trial]]:
    """The trials of encoder-decoders."""
    return {
        kind: {column: partial(try_writer, kind, *way) for column, way in WRITER_WAYS.items()}
        for kind in ("bart", "mbart", "t5", "mt5")
    }


def vlms() -> dict[str, dict[str, Trial]]:
    """The trials of whole vision-language models."""
    return {
        f"{name}, {words}": {routing: partial(try_vlm, name, routing, way) for routing in ROUTINGS}
        for name in VLMS
        for way, words in VLM_WAYS.items()
    }


def table(what: str, trials: dict[str, dict[str, Trial]]) -> str:
    """A Markdown table of what the trials come to, and the reasons below it."""
    columns, reasons = list(next(iter(trials.values()))), {}
    lines = [f"| {what} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for row, cells in trials.items():
        results = [said(cells[column]) for column in columns]
        marks = [result if result == "yes" else str(reasons.setdefault(result, len(reasons) + 1)) for result in results]
        lines.append(f"| {row} | {' | '.join(marks)} |")
    notes = "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
    return "\n".join(lines) + "\n" + (f"\n{notes}" if notes else "")


def page() -> str:
    """docs/models.md."""
    parts = {"families": families(), "towers": towers(), "writers": writers(), "vlms": vlms()}
    names = dict.fromkeys(("families", "towers", "writers"), "model type") | {"vlms": "model"}
    count = sum(len(cells) for trials in parts.values() for cells in trials.values())
    return PAGE.format(count=count, **{part: table(names[part], trials) for part, trials in parts.items()})


if __name__ == "__main__":
    print(page(), end="")
