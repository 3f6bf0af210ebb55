"""Routed bottlenecks in a training loop of your own, on a language model of your own choice.

    python examples/own_training_loop.py

A GPT-2 with random weights learns to name the class of a random "image" vector that only its bottlenecks see: there is
no visual prefix and every text is the same, so without routing the loss cannot fall below log(classes).
"""

import math

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from routingvl import RoutingConfig, VisualContext, inject
from routingvl.kernels import ROUTINGS

CLASSES, WIDTH, STEPS = 8, 64, 200


def final_loss(routing: str) -> float:
    """Train with one routing function and return the mean loss of the last 20 steps, in nats."""
    torch.manual_seed(0)
    # Token CLASSES is the prompt; the spread of the random weights is wide enough for confident predictions.
    size = {"vocab_size": CLASSES + 1, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=CLASSES, eos_token_id=CLASSES, initializer_range=0.2))
    context = VisualContext()
    report = inject(model, RoutingConfig(routing=routing, rank=8, alpha=16), context)
    images = torch.randn(CLASSES, 1, WIDTH)  # one visual token per class
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (32,))
        prompt = torch.full((32, 2), CLASSES)  # the same text for every image
        with context.bind(images[labels]):
            logits = model(input_ids=prompt).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    final = sum(losses[-20:]) / 20
    print(f"{routing:>7}: loss {final:.3f}, {report.trainable:,} of {report.total:,} parameters trained")
    return final


def main() -> None:
    """Compare plain LoRA with every routing function."""
    print(f"a guess costs log({CLASSES}) = {math.log(CLASSES):.3f}")
    for routing in ROUTINGS:
        final_loss(routing)


if __name__ == "__main__":
    main()
