"""transformers' Trainer and Seq2SeqTrainer, accelerate: what users train with, on the models as they are."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from text_zoo import text_model
from tiny import answerer, captioner, small_gpt2, small_roberta, small_vit
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset
from transformers import GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from routingvl import RoutingConfig
from routingvl.models import ModelOutput, VisionTextForCaptioning, ViTRobertaForClassification, load_pretrained

ROUTING = RoutingConfig(rank=4, alpha=8, routing="mul")
BACKBONES = {"caption": small_gpt2, "vqa": small_roberta, "classify": small_roberta}


def build(task: str, **options):
    if task == "classify":
        return ViTRobertaForClassification.from_backbones(small_vit(), small_roberta(), ROUTING, num_labels=7)
    return {"caption": captioner, "vqa": answerer}[task](ROUTING, **options)


class Examples(Dataset):
    """Random images, texts of six tokens and labels of a task."""

    def __init__(self, task: str, rows: int = 12) -> None:
        g = torch.Generator().manual_seed(0)
        self.rows = []
        for _ in range(rows):
            row = {"pixel_values": torch.randn(3, 16, 16, generator=g)}
            row["input_ids"] = torch.randint(3, 48, (6,), generator=g)
            row["attention_mask"] = torch.ones(6, dtype=torch.long)
            row["labels"] = {
                "caption": row["input_ids"].clone(),
                "vqa": torch.rand(7, generator=g),
                "classify": torch.randint(0, 7, (), generator=g),
            }[task]
            self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]

    def batch(self) -> dict[str, torch.Tensor]:
        return {key: torch.stack([row[key] for row in self.rows]) for key in self.rows[0]}


def settings(kind: type, folder: Path, **changes):
    common = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 5, "max_steps": 3, "logging_steps": 1}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return kind(str(folder), learning_rate=1e-2, **{**common, **quiet, **changes})


def trainer(task: str, folder: Path, model=None, **changes) -> Trainer:
    data = Examples(task)
    arguments = settings(TrainingArguments, folder, **changes)
    return Trainer(build(task) if model is None else model, arguments, train_dataset=data, eval_dataset=data)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("task", BACKBONES)
def test_trains_evaluates_and_predicts(task: str, tmp_path: Path) -> None:
    run = trainer(task, tmp_path)
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    start = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < start
    for name, parameter in run.model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name
    predicted = run.predict(Examples(task))
    batch = Examples(task).batch()
    labels = batch.pop("labels")
    with torch.no_grad():
        want = run.model.eval()(**batch).logits
    torch.testing.assert_close(torch.as_tensor(predicted.predictions), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.as_tensor(predicted.label_ids), labels)


@pytest.mark.parametrize("task", BACKBONES)
def test_a_checkpoint_is_an_adapter_and_resumes(task: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = trainer(task, tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=4)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert {"adapter_model.safetensors", "adapter_config.json", "model.safetensors"} <= set(os.listdir(checkpoint))
    size = sum(p.numel() * p.element_size() for p in whole.model.parameters() if p.requires_grad)
    assert (checkpoint / "model.safetensors").stat().st_size < size + 10_000

    rest = trainer(task, tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=4)
    with caplog.at_level("WARNING", logger="transformers"):
        rest.train(resume_from_checkpoint=str(checkpoint))
    assert "missing keys" not in caplog.text
    for (name, want), found in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
        torch.testing.assert_close(found, want, msg=name)
    assert losses(rest)[-2:] == pytest.approx(losses(whole)[-2:])

    loaded = load_pretrained(tmp_path / "run" / "checkpoint-4", vision=small_vit(), text=BACKBONES[task]())
    batch = Examples(task).batch()
    torch.testing.assert_close(loaded(**batch).logits, whole.model.eval()(**batch).logits)


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_goes_back_to_the_best_checkpoint(task: str, tmp_path: Path) -> None:
    steps = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(task, tmp_path, load_best_model_at_end=True, **steps)
    run.train()
    best = min(entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry)
    assert run.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_checkpointing_changes_memory_only(task: str, tmp_path: Path) -> None:
    plain, recomputing = trainer(task, tmp_path), trainer(task, tmp_path, gradient_checkpointing=True)
    assert not recomputing.model.is_gradient_checkpointing
    plain.train()
    recomputing.train()
    assert recomputing.model.is_gradient_checkpointing
    assert losses(recomputing) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize("task", ["caption", "vqa"])
@pytest.mark.parametrize("changes", [{"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_trains_with(task: str, changes: dict, tmp_path: Path) -> None:
    run = trainer(task, tmp_path, **changes)
    run.train()
    run.save_model(tmp_path / "model")
    assert all(loss == loss for loss in losses(run))
    load_pretrained(tmp_path / "model", vision=small_vit(), text=BACKBONES[task]())


def test_label_smoothing_of_labels(tmp_path: Path) -> None:
    epsilon = 0.1
    run = trainer("classify", tmp_path, label_smoothing_factor=epsilon)
    batch = Examples("classify").batch()
    with torch.no_grad():
        logs = run.model(**batch).logits.log_softmax(-1)
        found = run.compute_loss(run.model, dict(batch))
    right = logs.gather(-1, batch["labels"][:, None]).mean()
    torch.testing.assert_close(found, -(1 - epsilon) * right - epsilon * logs.mean())
    run.train()
    assert losses(run)


CAPTIONS = [{}, {"visual_prefix": False}, {"vision_features": "tokens"}, {"caption_loss": "reference"}]
KINDS = ["prefix", "none", "tokens", "reference"]


@pytest.mark.parametrize("options", CAPTIONS, ids=KINDS)
def test_label_smoothing_of_captions_is_refused(options: dict, tmp_path: Path) -> None:
    model = captioner(RoutingConfig(rank=4, routing="vllora"), **options)
    run = trainer("caption", tmp_path, model, label_smoothing_factor=0.1)
    for use in (run.train, run.evaluate, lambda: run.predict(Examples("caption"))):
        with pytest.raises(ValueError, match="label_smoothing_factor=0, and smooth in Trainer's compute_loss_func"):
            use()
    without = [{key: value for key, value in row.items() if key != "labels"} for row in Examples("caption").rows]
    for found in (run.predict(without), trainer("caption", tmp_path, model).predict(Examples("caption"))):
        assert found.predictions.shape[0] == 12


@pytest.mark.parametrize("options", CAPTIONS, ids=KINDS)
def test_captions_are_smoothed_by_a_function_of_the_loss(options: dict, tmp_path: Path) -> None:
    """As docs/howto-trainer.md does it."""
    model, epsilon = captioner(RoutingConfig(rank=4, routing="vllora"), **options), 0.1

    def smoothed(output, labels, num_items_in_batch):
        targets = model.next_tokens(labels)
        logits = output.logits[:, -targets.shape[1] :].flatten(0, 1)
        loss = cross_entropy(logits, targets.flatten(), label_smoothing=epsilon, reduction="sum")
        return loss / num_items_in_batch

    data = Examples("caption")
    arguments = settings(TrainingArguments, tmp_path, per_device_eval_batch_size=12)
    run = Trainer(model, arguments, train_dataset=data, eval_dataset=data, compute_loss_func=smoothed)
    batch, first = data.batch(), 0 if model.visual_prefix and model.caption_loss == "sound" else 1
    with torch.no_grad():
        logs = model.eval()(**batch).logits.log_softmax(-1)[:, first - 7 if model.visual_prefix else 0 : -1]
    right = logs.gather(-1, batch["labels"][:, first:, None])[..., 0]
    want = -((1 - epsilon) * right + epsilon * logs.mean(-1)).sum() / batch["labels"].numel()
    assert run.evaluate()["eval_loss"] == pytest.approx(want.item(), rel=1e-5)
    run.train()
    assert run.evaluate()["eval_loss"] < want


def test_label_smoothing_of_captions_of_an_encoder_decoder(tmp_path: Path) -> None:
    """Its positions predict the labels as they stand."""
    model = VisionTextForCaptioning.from_backbones(small_vit(), text_model("t5"), ROUTING)
    run = trainer("caption", tmp_path, model, label_smoothing_factor=0.1, per_device_eval_batch_size=12)
    batch = Examples("caption").batch()
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    want = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1)
    assert run.evaluate()["eval_loss"] == pytest.approx(want.item(), rel=1e-5)
    run.train()
    assert run.evaluate()["eval_loss"] < want


def test_label_smoothing_of_soft_labels_is_left_out_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not compatible with multi-label classification"):
        run = trainer("vqa", tmp_path / "smooth", label_smoothing_factor=0.1)
    plain = trainer("vqa", tmp_path / "plain")
    run.train()
    plain.train()
    assert losses(run) == losses(plain)
    assert run.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def generation(folder: Path, model, **changes) -> Seq2SeqTrainer:
    arguments = settings(Seq2SeqTrainingArguments, folder, predict_with_generate=True, **changes)
    return Seq2SeqTrainer(model, arguments, train_dataset=Examples("caption"), eval_dataset=Examples("caption"))


def test_seq2seq_trainer_generates(tmp_path: Path) -> None:
    model = build("caption")
    run = generation(tmp_path, model)
    run.train()
    predicted = run.predict(Examples("caption"), max_length=8, num_beams=3)
    want = model.eval().generate(Examples("caption").batch()["pixel_values"], num_beams=3, max_new_tokens=8)
    assert torch.equal(torch.as_tensor(predicted.predictions)[:, : want.shape[1]], want)
    assert predicted.metrics["test_loss"] > 0
    assert predicted.label_ids.shape[0] == 12


def test_seq2seq_trainer_takes_its_generation_config(tmp_path: Path) -> None:
    model = build("caption")
    wanted = GenerationConfig(num_beams=3, max_new_tokens=5, bos_token_id=49, eos_token_id=49, pad_token_id=49)
    predicted = generation(tmp_path, model, generation_config=wanted).predict(Examples("caption"))
    want = model.eval().generate(Examples("caption").batch()["pixel_values"], num_beams=3, max_new_tokens=5)
    assert torch.equal(torch.as_tensor(predicted.predictions)[:, : want.shape[1]], want)


def test_labels_show_where_the_beginning_ends() -> None:
    model = build("caption").eval()
    batch = Examples("caption", rows=3).batch()
    batch["labels"][:, :2] = -100
    start = batch["input_ids"][:, :2]
    want = model.generate(batch["pixel_values"], input_ids=start, max_new_tokens=6)
    assert torch.equal(model.generate(**batch, max_new_tokens=6), want)
    batch["labels"][0, 2] = -100
    with pytest.raises(ValueError, match="of one length"):
        model.generate(**batch)
    with pytest.raises(ValueError, match="no padding"):
        model.generate(batch["pixel_values"], input_ids=start, attention_mask=torch.tensor([[0, 1]] * 3))


def test_generation_returns_a_dictionary() -> None:
    model = build("caption").eval()
    images = Examples("caption", rows=3).batch()["pixel_values"]
    found = model.generate(images, num_beams=2, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(found.sequences, model.generate(images, num_beams=2))
    assert len(found.scores) >= found.sequences.shape[1]


def test_accelerate(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), build("caption")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Examples("caption"), batch_size=4))
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(tmp_path / "state")
    kept = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path / "state")
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path / "adapter",
        is_main_process=accelerator.is_main_process,
        save_function=None,
        state_dict=accelerator.get_state_dict(model),
    )
    loaded = load_pretrained(tmp_path / "adapter", vision=small_vit(), text=small_gpt2())
    assert all(torch.equal(parameter, kept[name]) for name, parameter in loaded.named_parameters())


# ------------------------------------------------------------------------------------------ the output, the attributes


def test_output_is_read_in_every_way() -> None:
    loss, logits = torch.tensor(1.0), torch.zeros(2, 3)
    for output in (ModelOutput(loss, logits), ModelOutput(loss=None, logits=logits), ModelOutput(loss, None)):
        pair = (output.loss, output.logits)
        first, second = output
        assert (first, second) == pair
        assert (output[0], output[1]) == pair
        assert output[:2] == pair
        kept = {name: value for name, value in zip(("loss", "logits"), pair, strict=True) if value is not None}
        assert dict(output) == kept == dict(**output) == dict(output.items())
        assert (list(output.keys()) == list(kept) and "logits" in output) or output.logits is None
        assert output.to_tuple() == tuple(kept.values())
        for again in (copy.copy(output), copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
            assert type(again) is ModelOutput
            assert again.keys() == output.keys()
            assert all(torch.equal(again[key], output[key]) for key in kept)
        doubled = tree_map(lambda tensor: tensor + 1, output)
        assert type(doubled) is ModelOutput
        assert all(torch.equal(doubled[key], output[key] + 1) for key in kept)


def test_what_programs_read_of_a_model() -> None:
    for task, text in BACKBONES.items():
        model = build(task)
        config = model.config
        assert config.hidden_size == config.text_config.hidden_size == model.language_model.config.hidden_size
        assert config.vision_config is model.vit.config
        assert config.get_text_config() is model.language_model.config
        assert config.pad_token_id == (49 if task == "caption" else 1)
        assert config.num_labels == (2 if task == "caption" else 7)
        assert type(config).from_dict(config.to_dict()).hidden_size == config.hidden_size
        assert '"hidden_size"' in config.to_json_string()
        assert "hidden_size" in repr(config)
        assert model.main_input_name == "pixel_values"
        assert model.get_input_embeddings() is model.language_model.get_input_embeddings()
        assert model.can_generate() == (task == "caption") == hasattr(model, "generation_config")
        assert model.num_parameters() == sum(p.numel() for p in model.parameters())
        # The parts are as they were: the config of a whole sets nothing in them.
        assert model.language_model.config._attn_implementation == text().config._attn_implementation
        with pytest.raises(ValueError, match="resize them in the language model"):
            model.resize_token_embeddings(60)


def test_a_model_is_copied_whole() -> None:
    model = build("caption").eval()
    batch = Examples("caption", rows=2).batch()
    torch.testing.assert_close(copy.deepcopy(model)(**batch).logits, model(**batch).logits)
