"""The published code's exact numbers (tests/golden), and how each case is built with this library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from routingvl import RoutingConfig, ViTGPT2ForCaptioning, ViTRobertaForVQA
from routingvl.bottlenecks.layers import RoutedAdapter, RoutedLoRALinear

FOLDER = Path(__file__).parent / "golden"
CASES: list[dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())["cases"]
# Group E: what the paper compares with and ablates, each built by the test of the option that it belongs to.
LAYER_CASES = [case for case in CASES if case["level"] == "layer" and case["group"] != "E"]
VARIANT_CASES: dict[str, dict[str, Any]] = {case["id"]: case for case in CASES if case["group"] == "E"}
MODEL_CASES = [case for case in CASES if case["level"] == "model"]


class Tensors(dict):
    """The tensors of one case; floats come in float64, parameters and inputs are exact in the file's float16."""

    def __init__(self, case: dict[str, Any]) -> None:
        loaded = load_file(FOLDER / case["file"])
        super().__init__({k: v.double() if v.is_floating_point() else v for k, v in loaded.items()})

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """Entries below ``prefix/``, without it."""
        return {key.removeprefix(f"{prefix}/"): value for key, value in self.items() if key.startswith(f"{prefix}/")}


def routing_of(case: dict[str, Any]) -> tuple[str, bool]:
    """Our routing name and relu flag."""
    name = case["routing"]
    relu = name == "vllora_relu"
    # The published RoBERTa LoRA never hands its relu flag to the layer (see the case's note).
    ignored = relu and case["class"].startswith("models.vit_roberta.Roberta") and not case["init"]["use_adapter"]
    return ("vllora" if relu else name), relu and not ignored


def build_layer(case: dict[str, Any], parameters: dict[str, torch.Tensor]) -> nn.Module:
    """Our layer with the published weights."""
    routing, relu = routing_of(case)
    if case["class"].endswith("Adapter"):
        config = case["config"]
        layer: nn.Module = RoutedAdapter(
            config["hidden_size"],
            case["lora_config"]["r_lora"],
            routing=routing,
            relu=relu,
            activation=config.get("hidden_act") or config["activation_function"],
            residual=case["lora_config"].get("add_res", True),
        )
        layer.double().load_state_dict(parameters)
        return layer
    init = case["init"]
    grouped = "Merged" in case["class"]
    third = init["out_features"] // 3
    if grouped:
        from transformers.pytorch_utils import Conv1D

        base: nn.Module = Conv1D(init["out_features"], init["in_features"])
    else:
        base = nn.Linear(init["in_features"], init["out_features"])
    layer = RoutedLoRALinear(
        base,
        init["r"],
        routing=routing,
        alpha=init["lora_alpha"],
        relu=relu,
        placement="output" if case["class"].endswith("MergedLinearOnlyVL") else "bottleneck",
        slices=[(0, third), (2 * third, 3 * third)] if grouped else None,
    )
    layer.double().load_state_dict(parameters)
    layer.weight.requires_grad_(False)
    return layer


def build_model(case: dict[str, Any]) -> nn.Module:
    """Our model of the case's configuration in float64, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

    init, lora = case["init"], case["lora_config"]
    routing, relu = routing_of(case)
    adapter = init["use_adapter"]
    gpt = "gpt" in case["loss"]
    layers = tuple(init["fusion_layer"]) if gpt and not adapter and not init["all_lora"] else None
    config = RoutingConfig(
        method="adapter" if adapter else "lora",
        routing=routing,
        relu=relu,
        rank=lora["r_lora"],
        alpha=lora["lora_alpha"],
        layers=layers,
        position=init.get("adapt_pos", "post_module") if adapter else "post_module",
        adapter_residual=None if gpt or not adapter else lora["add_res"],
        train_layer_norm=not init["freeze_ln"],
    )
    prefix = case["class"].rsplit(".", 1)[1] not in ("GPT2LMHeadModel", "RobertaVQAVLRouting")
    if gpt:
        text = GPT2LMHeadModel(GPT2Config(**case["config"]))
        model = ViTGPT2ForCaptioning.from_backbones(None, text, config, visual_prefix=prefix, caption_loss="reference")
    else:
        text = RobertaModel(RobertaConfig(**case["config"]))
        model = ViTRobertaForVQA.from_backbones(
            None,
            text,
            config,
            visual_prefix=prefix,
            num_labels=lora["num_labels"],
            classifier_layers=2 if init["classifier_2layer"] else 1,
        )
    return model.double().train()
