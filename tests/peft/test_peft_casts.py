"""Kept casts of frozen weights in models of PEFT."""

import torch
from peft_cases import IDS, IMAGES, adapted, config, gpt2, llama

import routingvl
from routingvl import keep_frozen_casts


def step(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16), routingvl.bind_image(model, IMAGES):
        y = model(input_ids=IDS).logits
    y.float().square().mean().backward()
    return {"y": y.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def test_the_same_bits_and_the_same_files(tmp_path):
    for build, changes in ((llama, {}), (gpt2, {"target_modules": ["c_attn"], "slices": "family"})):
        model = adapted(config("mul", **changes), build()).train()
        want, before = step(model), {name: value.clone() for name, value in model.state_dict().items()}
        model.save_pretrained(tmp_path / "plain")
        keep_frozen_casts(model)
        for _ in range(2):
            found = step(model)
            assert found.keys() == want.keys()
            assert all(torch.equal(found[name], value) for name, value in want.items())
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        model.save_pretrained(tmp_path / "kept")
        name = "adapter_model.safetensors"
        assert (tmp_path / "kept" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_merging_is_seen():
    model = adapted(config("none"), llama()).eval()
    keep_frozen_casts(model)

    def logits():
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), model.disable_adapter():
            return model(input_ids=IDS).logits

    def merged():
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return model(input_ids=IDS).logits

    base = logits()
    apart = merged()
    model.merge_adapter()
    torch.testing.assert_close(merged(), apart, rtol=0.05, atol=0.05)
    assert not torch.allclose(merged(), base, rtol=0.05, atol=0.05)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(), base, rtol=0.02, atol=0.02)
