"""A routed adapter where users run it: Trainer with resume, checkpointing in all modes, and the hub."""

import functools
import json
import os
import shutil

import huggingface_hub
import huggingface_hub.repocard
import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft_cases import IDS, IMAGES, ROWS, adapted, config, context_of, llama, logits
from transformers import Trainer, TrainerCallback, TrainingArguments

import routingvl


def gradients(model, **checkpointing) -> dict[str, torch.Tensor]:
    """Of the adapter, with the backward pass outside of the binding, inside another image's."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()
    with routingvl.bind_image(model, IMAGES):
        loss = model(input_ids=IDS, labels=IDS).loss
    with routingvl.bind_image(model, IMAGES.flip(0)):
        loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_sees_its_own_image(reentrant):
    want = gradients(adapted())
    torch.testing.assert_close(gradients(adapted(), use_reentrant=reentrant), want, rtol=0, atol=1e-6)
    assert max(grad.abs().max() for grad in want.values()) > 1e-3


class Bound(Trainer):
    """Binds what the batch brings."""

    def compute_loss(self, model, inputs, **options):
        with routingvl.bind_image(model, inputs.pop("images")):
            return super().compute_loss(model, inputs, **options)


class Stop(TrainerCallback):
    """Ends the training after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **options):
        control.should_training_stop = state.global_step >= self.step


def run(folder, *, resume=False, stop=None, checkpointing=False) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(llama(), config(lora_dropout=0.1))
    data = [{"input_ids": IDS[row], "labels": IDS[row], "images": IMAGES[row]} for row in range(ROWS)]
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=2, save_steps=2, report_to=[], disable_tqdm=True,
        learning_rate=1e-2, use_cpu=True, remove_unused_columns=False, logging_strategy="no",
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    trainer = Bound(model, arguments, train_dataset=data, callbacks=[] if stop is None else [Stop(stop)])
    trainer.train(resume_from_checkpoint=resume)
    return model.eval()


@pytest.mark.filterwarnings("ignore")
def test_trainer_saves_resumes_and_checkpoints(tmp_path):
    whole = run(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "whole").iterdir()} >= {"checkpoint-2", "checkpoint-4"}
    assert not torch.equal(logits(whole), logits(get_peft_model(llama(), config()).eval()))
    run(tmp_path / "half", stop=2)
    resumed = run(tmp_path / "half", resume=True)
    torch.testing.assert_close(logits(resumed), logits(whole), rtol=0, atol=1e-6)
    opened = PeftModel.from_pretrained(llama(), tmp_path / "whole" / "checkpoint-4").eval()
    torch.testing.assert_close(logits(opened), logits(whole), rtol=0, atol=1e-6)
    recomputed = run(tmp_path / "recomputed", checkpointing=True)
    torch.testing.assert_close(logits(recomputed), logits(whole), rtol=0, atol=1e-5)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in place of the hub: what would be sent and fetched over HTTP is copied to and from it."""
    root = tmp_path / "hub"

    class Api:
        def create_repo(self, repo_id, **options):
            (root / repo_id).mkdir(parents=True, exist_ok=True)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def create_commit(self, repo_id, operations, **options):
            for operation in operations:
                shutil.copy(operation.path_or_fileobj, root / repo_id / operation.path_in_repo)

    @functools.wraps(huggingface_hub.hf_hub_download)  # PEFT asks for its signature
    def download(repo_id, filename, **options):
        path = root / repo_id / filename
        if not path.exists():
            raise huggingface_hub.errors.EntryNotFoundError(f"{filename} is not in {repo_id}")
        return str(path)

    monkeypatch.setattr(transformers.utils.hub, "hf_api", Api)
    for module in (peft.config, peft.utils.save_and_load, huggingface_hub.repocard):
        monkeypatch.setattr(module, "hf_hub_download", download)
    return root


def test_push_to_the_hub_and_load_from_it(hub):
    model = adapted()
    model.push_to_hub("somebody/routed")
    files = set(os.listdir(hub / "somebody" / "routed"))
    assert files >= {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    # transformers writes a card of its own over PEFT's, so the import stands in the config too.
    settings = json.loads((hub / "somebody/routed/adapter_config.json").read_text())
    assert (settings["routing"], settings["registered_by"]) == ("mul", "import routingvl.peft")
    loaded = PeftModel.from_pretrained(llama(), "somebody/routed").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert context_of(loaded) is not context_of(model)
