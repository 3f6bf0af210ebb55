"""What the models share: a frozen vision tower, a routed language model, the context between them, saving, loading."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from routingvl.backbones.dropout import lighten_dropout
from routingvl.backbones.loading import BackboneError
from routingvl.backbones.text import (
    DECODER,
    check_embeddings,
    drawn_weights,
    load_text,
    position_limit,
    text_body,
    text_kind,
    text_model,
)
from routingvl.backbones.vision import FEATURES, check_features, load_tower, tower_width
from routingvl.bottlenecks import checkpoint
from routingvl.bottlenecks.context import VisualContext
from routingvl.bottlenecks.inject import inject, train_in_float32
from routingvl.bottlenecks.report import TrainableReport, trainable_report
from routingvl.config import ConfigError, RoutingConfig, check_choice, from_dict, nearest
from routingvl.config.checks import check_value, types_of
from routingvl.config.schema import IMAGE_POOLINGS
from routingvl.models import hub
from routingvl.models.checks import check_padding, check_tensor, check_values, check_zeros_and_ones
from routingvl.models.images import ReadsImages
from routingvl.models.output import ModelOutput
from routingvl.models.placement import backbone_dtypes, place
from routingvl.models.pretrained import PretrainedParts

__all__ = ["ModelOutput", "RoutedVLModel"]
# Options that adapters of earlier versions do not name, with what these did.
LATER: dict[str, Any] = {"vision_layer": None, "image_pooling": None, "project_features": False}


class RoutedVLModel(ReadsImages, PretrainedParts):
    """A frozen vision tower whose features reach a language model as a visual prefix and through routed bottlenecks.

    Use a subclass, and build it with :meth:`from_backbones`.

    Args:
        vision, text, routing: backbones (modules) and bottlenecks.
        vision_features: "pooler", "cls", "mean" or "tokens", see :func:`routingvl.backbones.vision.image_features`.
        vision_layer: of the vision tower, from the end; None is its own output, see there.
        visual_prefix: put the visual tokens in front of the text.
        vision_width: d of ``vision_features=`` inputs when vision is None.
        image_pooling: what the bottlenecks read of several visual tokens: "mean", their mean, while the prefix has them
            all; None, the tokens, which a routing function of one token refuses.
        project_features: put a trained linear layer in front of the text model even where the features have its width.
        backend: see :func:`routingvl.kernels.lora.api`.
    """

    text_use: ClassVar[str]  # of routingvl.backbones.text: READ or WRITE
    former_names: ClassVar[tuple[str, ...]] = ()  # of the class, in adapters that older versions saved

    def __init__(
        self,
        vision: nn.Module | None,
        text: nn.Module,
        routing: RoutingConfig,
        *,
        vision_features: str = "pooler",
        vision_layer: int | None = None,
        visual_prefix: bool = True,
        vision_width: int | None = None,
        image_pooling: str | None = None,
        project_features: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        text = text_body(self.text_use, text)
        if visual_prefix:
            check_embeddings(text)
        check_choice("vision_features", vision_features, FEATURES)
        if vision is not None:
            check_features(vision, vision_features, vision_layer)
        if vision is None and vision_width is None:
            vision_width = text.config.hidden_size
        if image_pooling is not None:
            check_choice("image_pooling", image_pooling, IMAGE_POOLINGS)
        self.routing = routing
        self.image_pooling = image_pooling
        self.project_features = project_features
        # Checked here for the kind of feature, and again for the tensor of each call.
        self.check_visual_tokens(2 if vision_features == "tokens" else 1)
        self.vision_features = vision_features
        self.vision_layer = vision_layer
        self.visual_prefix = visual_prefix
        self.vision_width = vision_width if vision is None else tower_width(vision)
        self.context = VisualContext()
        self.vit = vision
        self.text_kind = text_kind(text)
        self.language_model_name = text_model(text).attribute
        setattr(self, self.language_model_name, text)
        own = routing.has_own_projection
        inject(text, routing, self.context, backend, image_width=self.vision_width if own else None)
        lighten_dropout(text)
        for weight in drawn_weights(text):
            weight.requires_grad_(True)
        if vision is not None:
            vision.requires_grad_(False)
        self.visual_projection: nn.Linear | None = None
        projected = self.vision_width != (width := text.config.hidden_size) or project_features
        reads = routing.reads_image
        if projected and (visual_prefix or (reads and not own)):
            self.visual_projection = nn.Linear(self.vision_width, width, device=self.device, dtype=self.dtype)
        elif project_features:
            why = "image_projection='own'" if reads else "a routing that reads no image"
            raise ConfigError(f"project_features: {why} without a visual prefix has no use for it")
        self._hold_what_trains()
        # How many positions (prefix and text together) the text model has embeddings for.
        self.max_positions = position_limit(text)
        self._padding_seen = False
        self.backbones: dict[str, str | None] = {"vision": None, "text": None}
        self.config.describe(text, vision)
        self.train(text.training)

    @classmethod
    def from_backbones(
        cls,
        vision: str | Path | nn.Module | None,
        text: str | Path | nn.Module,
        config: RoutingConfig,
        *,
        dtype: str | torch.dtype | Mapping[str, str | torch.dtype] | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> RoutedVLModel:
        """Build the model from its two backbones.

        Args:
            vision: hub name, local folder or ViTModel; None when only ``vision_features=`` will be passed (then
                ``vision_width`` gives their width, by default the text model's).
            text: hub name, local folder or model object.
            config: the routed bottlenecks.
            dtype: floating-point type of the backbones: one ("bfloat16", torch.bfloat16), or one each for "vision" and
                "text"; None for float32, and for a module as it is.
            device_map: where the model goes: a device, "auto" for the accelerator where there is one, or a device each
                for "vision" and "text"; None for where the backbones are.
            **options: keyword arguments of the class and of :class:`RoutedVLModel`.

        Raises:
            ConfigError: an option is unknown, or the parts do not fit each other.
            OSError: a name or folder holds no model (transformers' message names it).
        """
        cls.check_options(options, f"{cls.__name__}.from_backbones")
        dtypes = backbone_dtypes(dtype)
        try:
            vision_model, vision_name = _resolve(vision, load_tower)
            text_model, text_name = _resolve(text, partial(load_text, cls.text_use))
            for module, kind in ((vision_model, dtypes["vision"]), (text_model, dtypes["text"])):
                if module is not None and kind is not None:
                    module.to(kind)
            model = cls(vision_model, text_model, config, **options)
        except BackboneError as error:
            raise ConfigError(str(error)) from error
        model.backbones = {"vision": vision_name, "text": text_name}
        return place(model, device_map)

    def _hold_what_trains(self) -> None:
        """Also what trains beside the bottlenecks, which ``inject`` holds in float32 by itself."""
        if self.routing.bottleneck_dtype == "float32":
            train_in_float32(self)

    @property
    def language_model(self) -> nn.Module:
        """The text backbone with its bottlenecks."""
        return getattr(self, self.language_model_name)

    @property
    def device(self) -> torch.device:
        """Where the language model lives."""
        return self.language_model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the language model."""
        return self.language_model.get_input_embeddings().weight.dtype

    @property
    def vocabulary_size(self) -> int:
        """How many tokens the language model has embeddings for."""
        return self.language_model.get_input_embeddings().num_embeddings

    @property
    def token_types(self) -> int:
        """How many types of token (BERT's first and second sentence) texts can have; 0 where there is but one."""
        # RoBERTa's embedding, where the published code has it twice, has one type.
        known = "token_type_ids" in inspect.signature(self.language_model.forward).parameters
        count = getattr(self.language_model.config, "type_vocab_size", 0) if known else 0
        return count if count > 1 and self.language_model_name != "roberta" else 0

    @property
    def report(self) -> TrainableReport:
        """What trains; the total counts the language model and head, not the ViT."""
        return trainable_report(self, exclude="vit.")

    def train(self, mode: bool = True) -> RoutedVLModel:
        """Training mode for everything but the frozen ViT."""
        super().train(mode)
        if self.vit is not None:
            self.vit.eval()
        return self

    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [B, T] -> what stands behind a visual prefix: [B, T, d]."""
        return self.language_model.get_input_embeddings()(input_ids)

    def text_inputs(
        self,
        features: torch.Tensor,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The language model's arguments for texts [B, T] and their images' features [B, L, d], the prefix in front.

        A mask of None reads every token. Raises ValueError unless text and image belong together, fit the position
        embeddings, and the token ids (looked at on the CPU only) are of the vocabulary.
        """
        attention_mask = self.check_text(features, input_ids, attention_mask)
        inputs = {"attention_mask": attention_mask}
        if token_type_ids is not None:
            if token_type_ids.shape != input_ids.shape or not self.token_types:
                have, kinds = list(token_type_ids.shape), self.token_types
                raise ValueError(f"token_type_ids {have} must be as input_ids, and the text model knows {kinds} types")
            check_values("token_type_ids", token_type_ids, 0, self.token_types - 1)
            inputs["token_type_ids"] = token_type_ids
        if not self.visual_prefix:
            return {"input_ids": input_ids, **inputs}
        embedded = self.embed_text(input_ids)
        values = {"attention_mask": 1, "token_type_ids": 0}  # of the image's positions
        return {
            "inputs_embeds": torch.cat([self.prefix(features).to(embedded.dtype), embedded], dim=1),
            **{
                name: torch.cat([tensor.new_full(features.shape[:2], values[name]), tensor], dim=1)
                for name, tensor in inputs.items()
            },
        }

    def check_text(
        self, features: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The mask of texts [B, T], ones where it is None; ValueError as of :meth:`text_inputs`.

        On an accelerator, where looking waits for it, padding in front is looked for in the first batch only.
        """
        if input_ids is not None:
            check_tensor("input_ids", input_ids, integers=True)
        if attention_mask is not None:
            check_tensor("attention_mask", attention_mask)
        if input_ids is None or input_ids.dim() != 2 or not (input_ids.shape[1] or self.visual_prefix):
            raise ValueError("input_ids must be [batch, tokens], with a token at least where there is no visual prefix")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            have, want = list(attention_mask.shape), list(input_ids.shape)
            raise ValueError(
                f"attention_mask {have} must have the shape of input_ids {want}; the model adds the visual prefix's "
                "columns itself"
            )
        if features.shape[0] != input_ids.shape[0]:
            raise ValueError(f"features have batch {features.shape[0]}, text has batch {input_ids.shape[0]}")
        length = input_ids.shape[1] + (features.shape[1] if self.visual_prefix else 0)
        if length > self.max_positions:
            raise ValueError(f"{length} positions (prefix and text) exceed the text model's {self.max_positions}")
        check_values("input_ids", input_ids, 0, self.vocabulary_size - 1, ", which are the ids the model knows")
        if attention_mask is None:
            return torch.ones_like(input_ids)
        check_zeros_and_ones("attention_mask", attention_mask)
        # A decoder that reads the text alone is as in transformers.
        if (self.visual_prefix or self.text_kind != DECODER) and not torch.compiler.is_compiling():
            check_padding(attention_mask, look=not self._padding_seen)
            self._padding_seen = True
        return attention_mask

    def image_inputs(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """The language model's arguments for images' features [B, L, d] alone, as a prefix of nothing."""
        return {
            "inputs_embeds": self.prefix(features),
            "attention_mask": features.new_ones(features.shape[:2], dtype=torch.long),
        }

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute each transformer layer in backward instead of keeping its activations.

        Args:
            activation_checkpointing_kwargs: of ``torch.utils.checkpoint.checkpoint``; non-reentrant by default.
            **options: of transformers' method (every_n_layers, offload).
        """
        # Under torch.compile the recomputation is part of the traced graph, where a context function is not allowed.
        kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if not kwargs["use_reentrant"]:
            kwargs.setdefault("context_fn", self.context.checkpoint_context_fn)
        enable = getattr(self.language_model, "activation_checkpointing_enable", None)
        (enable or self.language_model.gradient_checkpointing_enable)(kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        disable = getattr(self.language_model, "activation_checkpointing_disable", None)
        (disable or self.language_model.gradient_checkpointing_disable)()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """:meth:`activation_checkpointing_enable` by its former name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """:meth:`activation_checkpointing_disable` by its former name."""
        self.activation_checkpointing_disable()

    @classmethod
    def option_names(cls) -> list[str]:
        """The keyword arguments of the class and of :class:`RoutedVLModel`."""
        constructors = (cls.__init__, RoutedVLModel.__init__)
        parameters = [p for make in constructors for p in inspect.signature(make).parameters.values()]
        return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]

    @classmethod
    def check_options(cls, options: Mapping[str, Any], source: str) -> None:
        """Raise ConfigError, opening with ``source``, for an option that is unknown or of another type."""
        known, types = cls.option_names(), {**types_of(RoutedVLModel.__init__), **types_of(cls.__init__)}
        for name, value in options.items():
            if name not in known:
                raise ConfigError(f"{source}: unknown key {name!r}{nearest(name, known)} (known: {', '.join(known)})")
            try:
                check_value(name, value, types[name], {"limits": {"most": 10**6}} if type(value) is int else {})
            except ConfigError as error:
                raise ConfigError(f"{source}: {error}") from error

    def options(self) -> dict[str, Any]:
        """The keyword arguments, beside backbones and routing, that make this model again."""
        options = {name: getattr(self, name) for name in self.option_names() if name != "backend"}
        # As earlier versions, which do not know them, write and read a model.
        return {name: value for name, value in options.items() if name not in LATER or value != LATER[name]}

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        vision: str | Path | nn.Module | None = None,
        text: str | Path | nn.Module | None = None,
        backend: str | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        dtype: str | torch.dtype | Mapping[str, str | torch.dtype] | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> RoutedVLModel:
        """Load what :meth:`save_pretrained` wrote.

        Args:
            directory: the folder, or the name of an adapter on the hub.
            vision, text: backbones to use instead of the ones the folder refers to (needed when they were given as
                objects, or have moved).
            backend: see :func:`routingvl.kernels.lora.api`.
            revision, token, cache_dir, local_files_only, force_download: of huggingface_hub, for an adapter on the hub.
            dtype, device_map: see :meth:`from_backbones`.
            **options: other keywords of transformers are an error, unless they ask for nothing.

        Raises:
            CheckpointError: the folder is not a saved model of this class, a backbone is missing or another one than
                was trained with, or the parameters do not fit.
            ConfigError: a keyword is unknown or cannot be honoured.
        """
        dtype = hub.check_load_options(options, f"{cls.__name__}.from_pretrained", dtype)
        directory = hub.adapter_folder(
            directory,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        saved = checkpoint.read_adapter_config(directory, cls.__name__, *cls.former_names)
        source = Path(directory) / checkpoint.CONFIG
        saved["model"] = LATER | saved["model"]  # see options
        if saved["model"].keys() != (known := set(cls.option_names()) - {"backend"}):
            keys = ", ".join(sorted(known ^ saved["model"].keys()))
            raise checkpoint.CheckpointError(f"{source}: model lacks, or has in excess, {keys}")
        try:
            routing = from_dict(RoutingConfig, saved["routing"], "routing")
            cls.check_options(saved["model"], "model")
            backbones = checkpoint.resolve_backbones(directory, saved, vision=vision, text=text)
            kept = {"backend": backend, **saved["model"]}
            model = cls.from_backbones(backbones["vision"], backbones["text"], routing, dtype=dtype, **kept)
        except ConfigError as error:
            raise checkpoint.CheckpointError(f"{source}: {error}") from error
        checkpoint.load_adapter(model, directory, saved)
        return place(model.eval(), device_map)


def _resolve(backbone: str | Path | nn.Module | None, load: Any) -> tuple[nn.Module | None, str | None]:
    """The module, and the name or absolute folder it can be loaded from again (None for a bare object)."""
    if backbone is None or isinstance(backbone, nn.Module):
        name = getattr(getattr(backbone, "config", None), "_name_or_path", None) or None
    else:
        name = str(backbone)
        backbone = load(name)
    if name is not None and Path(name).is_dir():
        name = str(Path(name).resolve())
    return backbone, name
