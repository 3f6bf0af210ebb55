"""Ready-made models and runs whose bottlenecks are routed by their own text: what still reaches them of the image."""

import pytest
import torch
from tiny import answerer, batch, captioner, randomise, small_roberta, small_vit
from training_runs import run

from routingvl import RoutingConfig, ViTRobertaForVQA
from routingvl.bottlenecks.places import SurgeryError
from routingvl.evaluate import evaluate

BY_TEXT = RoutingConfig(routing="add", routed_by="text", rank=4, alpha=8)


@torch.no_grad()
def logits(model, pixels: torch.Tensor) -> torch.Tensor:
    inputs = batch(2)
    return model(pixel_values=pixels, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


@pytest.mark.parametrize("prefix", [True, False])
def test_the_image_reaches_the_answer_by_the_prefix_alone(prefix, tmp_path):
    """All visual tokens may stand in the prefix, since no bottleneck reads them."""
    kind = "tokens" if prefix else "pooler"
    model = randomise(answerer(BY_TEXT, visual_prefix=prefix, vision_features=kind)).eval()
    pixels = batch(2)["pixel_values"]
    assert torch.equal(logits(model, pixels), logits(model, pixels.flip(0))) is not prefix
    model.save_pretrained(tmp_path)
    again = ViTRobertaForVQA.from_pretrained(tmp_path, vision=small_vit(), text=small_roberta())
    assert torch.equal(logits(again, pixels), logits(model, pixels))
    assert again.routing == BY_TEXT


def test_a_captioner_is_refused():
    with pytest.raises(SurgeryError, match="is in a causal model"):
        captioner(BY_TEXT)


def test_a_run_that_no_image_reaches_keeps_its_score_without_it(tiny, tmp_path):
    routing = {"routing.routing": "vllora", "routing.routed_by": "text_tokens"}
    run(tiny, tmp_path / "run", "vqa", **routing, **{"model.visual_prefix": False})
    own = evaluate(tmp_path / "run", split="val", log="quiet")
    control = evaluate(tmp_path / "run", split="val", log="quiet", image_control="shuffled")
    assert own["accuracy"] == control["accuracy"]
