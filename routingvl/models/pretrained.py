"""What transformers, its Trainer, accelerate, DeepSpeed and the hub expect of a model.

The models are PreTrainedModels, because Trainer asks only these to save themselves; but what they save, load and send
to the hub is an adapter, so those methods are the ones here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from routingvl.bottlenecks import checkpoint
from routingvl.config import ConfigError, nearest
from routingvl.data.collate import IGNORED
from routingvl.models import hub

# The name under which Trainer looks for a model's weights when it resumes, or goes back to the best checkpoint.
TRAINER_WEIGHTS = "model.safetensors"
# Of transformers' save_pretrained: what a routed adapter has no use for, with the values that ask for nothing.
WITHOUT_USE: dict[str, tuple[Any, ...]] = {
    "safe_serialization": (True, None),  # safetensors is the only format
    "save_function": (None,),
    "variant": (None,),
    "save_peft_format": (True, False),
    "save_original_format": (True, False),
    "distributed_checkpoint": (False,),
    "selected_adapters": (None,),
}
# What a text model's config says that code reads of a model's own: DeepSpeed the width, Trainer the tokens.
OF_THE_TEXT = (
    "hidden_size num_hidden_layers num_attention_heads vocab_size max_position_embeddings "
    "bos_token_id eos_token_id pad_token_id is_encoder_decoder decoder_start_token_id"
).split()


class RoutedVLConfig(PreTrainedConfig):
    """The config of a model: those of its parts as text_config and vision_config, and the text's sizes and tokens.

    For code that reads ``model.config``. What an adapter is built from again is adapter_config.json.
    """

    model_type = "routingvl"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def describe(self, text: nn.Module, vision: nn.Module | None) -> None:
        """Take the entries from the parts of a model."""
        self.text_config = text.config
        self.vision_config = None if vision is None else vision.config
        self.dtype = getattr(text, "dtype", None)
        for name in OF_THE_TEXT:
            setattr(self, name, getattr(text.config, name, None))
        self.is_encoder_decoder = bool(self.is_encoder_decoder)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The language model's config."""
        return getattr(self, "text_config", self)


class PretrainedParts(PreTrainedModel):
    """The side of :class:`routingvl.models.base.RoutedVLModel` that transformers and the hub see."""

    config_class = RoutedVLConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self) -> None:
        super().__init__(RoutedVLConfig())

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the model writes."""
        return hasattr(cls, "generate")

    @property
    def generation_config(self) -> GenerationConfig:
        """The language model's, which ``generate`` takes as defaults."""
        if not self.can_generate():
            raise AttributeError(f"{type(self).__name__} does not generate")
        return self.language_model.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        if hasattr(self, getattr(self, "language_model_name", "no part yet")):
            self.language_model.generation_config = value

    def get_input_embeddings(self) -> nn.Module:
        """The language model's word embeddings."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model's head, None where it has none."""
        return self.language_model.get_output_embeddings()

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a backbone ties its own when it is loaded."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the embeddings are the backbone's, which an adapter only refers to."""
        raise ConfigError(
            "the embeddings belong to the frozen language model, which a saved adapter refers to: resize them in the "
            "language model, save that, and give its folder to from_backbones"
        )

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """What Trainer does not find in a checkpoint of trained parameters, and need not report."""
        trained = checkpoint.trained_parameters(self)
        names = dict(self.named_parameters(remove_duplicate=False)).keys() | self.state_dict(keep_vars=True).keys()
        return {name for name in names if name not in trained}

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool | None = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> None:
        """Write the trained parameters (safetensors) and the configuration (JSON); backbones by reference only.

        Args:
            save_directory: the folder, made when missing.
            is_main_process: False takes part in gathering what is sharded, but writes nothing. Where it is given at
                all, as transformers' Trainer does, the weights also get the name under which Trainer looks for them,
                model.safetensors: a second name of the same file where the file system knows hard links.
            state_dict: where to take the trained parameters from (gathered by DeepSpeed or FSDP), by their names in
                the model; None for the model itself. Further entries are not written.
            push_to_hub, token: also send it to the hub, with ``repo_id=`` (by default the folder's name) and the other
                keywords of :meth:`push_to_hub`.
            max_shard_size: an adapter is one file; a smaller limit is an error.
            **options: others of transformers' ``save_pretrained``: those that ask for what cannot be are an error.

        Raises:
            CheckpointError: ``save_directory`` is a file, a trained parameter holds NaN or infinity, or ``state_dict``
                lacks one.
            ConfigError: a keyword is unknown, or asks for another format.
        """
        pushing = hub.push_options(options, f"{type(self).__name__}.save_pretrained") if push_to_hub else {}
        _check_options(type(self), options)
        if state_dict is not None and not state_dict:
            return  # Trainer, where DeepSpeed may not gather: it writes DeepSpeed's own files in place of ours
        folder, writes = Path(save_directory), is_main_process is not False
        if max_shard_size is not None:
            self._check_one_file(max_shard_size)
        checkpoint.save_adapter(self, folder, state_dict=state_dict, is_main_process=writes)
        if not writes or not (folder / checkpoint.WEIGHTS).is_file():
            return
        if is_main_process is not None:
            hub.link_or_copy(folder / checkpoint.WEIGHTS, folder / TRAINER_WEIGHTS)
        if push_to_hub:
            repository = pushing.pop("repo_id", None) or folder.resolve().name
            hub.push_folder(self, folder, repository, token=token, **pushing)

    def push_to_hub(self, repo_id: str, *, token: str | bool | None = None, **options: Any) -> str:
        """Send the adapter to a repository of the hub, which is made where it does not exist, with a model card.

        Args:
            repo_id: ``name`` or ``organisation/name``.
            token: of the hub; None for the one that is stored here.
            **options: commit_message, commit_description, private, revision, create_pr, tags, max_shard_size.

        Returns:
            The commit's address.
        """
        pushing = hub.push_options(options, f"{type(self).__name__}.push_to_hub")
        size = options.pop("max_shard_size", None)
        _check_options(type(self), options)
        if size is not None:
            self._check_one_file(size)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save_adapter(self, folder)
            return hub.push_folder(self, Path(folder), repo_id, token=token, **pushing)

    @staticmethod
    def beginning(
        input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, labels: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What of input_ids [B, T] a caption begins with: all of it, or with ``labels`` what is not to be learned.

        Seq2SeqTrainer generates from the batches that it evaluates, whose input_ids are the captions to be written;
        what their labels leave out in front (-100, the same number of tokens in every row) is the beginning.

        Returns:
            [B, n], or None where there is none.

        Raises:
            ValueError: the beginnings are of different lengths, or padded.
        """
        if input_ids is None:
            return None
        if labels is not None:
            lengths = (labels != IGNORED).long().cummax(dim=1).values.eq(0).sum(dim=1)
            if len(lengths.unique()) > 1:
                raise ValueError("the beginnings that labels leave out (-100 in front) must all be of one length")
            count = int(lengths[0])
            input_ids = input_ids[:, :count] if count else None
            attention_mask = attention_mask[:, :count] if attention_mask is not None and count else None
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("the beginning of a caption takes no padding: attention_mask must hold nothing but 1")
        return input_ids

    def _check_one_file(self, limit: int | str) -> None:
        from transformers.utils.hub import convert_file_size_to_int

        size = sum(p.numel() * p.element_size() for p in checkpoint.trained_parameters(self).values())
        if size > convert_file_size_to_int(limit):
            raise ConfigError(f"max_shard_size={limit!r}: an adapter is one file, this one of {size:,} bytes")


def _check_options(cls: type, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for a keyword of save_pretrained that is unknown, or is not left at what asks for nothing."""
    for name, value in options.items():
        if name not in WITHOUT_USE:
            raise ConfigError(
                f"{cls.__name__}.save_pretrained: unknown keyword {name!r}{nearest(name, list(WITHOUT_USE))}"
            )
        if not any(value is allowed for allowed in WITHOUT_USE[name]):
            raise ConfigError(
                f"{cls.__name__}.save_pretrained: {name}={value!r} cannot be: an adapter is one safetensors file"
            )
