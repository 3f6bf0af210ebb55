"""Plain LoRA written for PEFT and read from it; what PEFT cannot run is refused."""

import peft
import pytest
import torch
from tiny import captioner, randomise, small_gpt2, small_roberta

from routingvl import RoutingConfig, inject
from routingvl.bottlenecks.checkpoint import CheckpointError
from routingvl.bottlenecks.peft_format import export_peft, import_peft


def test_peft_refuses_a_routed_adapter(tmp_path):
    captioner().save_pretrained(tmp_path)
    with pytest.raises(Exception, match="ROUTINGVL"):
        peft.PeftModel.from_pretrained(small_gpt2(), tmp_path)


@pytest.mark.parametrize(("factory", "targets"), [(small_gpt2, ["c_attn"]), (small_roberta, ["query", "value"])])
def test_peft_export_runs_the_same_function(factory, targets, tmp_path):
    config = RoutingConfig(rank=4, alpha=6, routing="none", train_layer_norm=False, train_bias=False)
    model = factory().eval()
    inject(model, config)
    randomise(model)
    export_peft(model, tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    theirs = peft.PeftModel.from_pretrained(factory().eval(), tmp_path)
    torch.testing.assert_close(theirs(input_ids=ids)[0], model(input_ids=ids)[0], rtol=1e-5, atol=1e-5)
    again = factory().eval()
    inject(again, config)
    import_peft(again, tmp_path)
    assert torch.equal(again(input_ids=ids)[0], model(input_ids=ids)[0])


def test_peft_export_refuses_what_peft_cannot_run(tmp_path):
    with pytest.raises(CheckpointError, match="'mul': PEFT would drop the image"):
        export_peft(captioner(), tmp_path / "out")
    with pytest.raises(CheckpointError, match="adapters have no PEFT form"):
        export_peft(captioner(RoutingConfig(method="adapter", rank=4, routing="none")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peft_import_of_a_foreign_lora(tmp_path):
    """PEFT's own LoRA on c_attn may change k too, which ours cannot hold: an error, not a silent loss."""
    theirs = peft.get_peft_model(
        small_gpt2(), peft.LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path)
    model = small_gpt2()
    inject(model, RoutingConfig(rank=4, routing="none"))
    with pytest.raises(CheckpointError, match="outside the adapted slices"):
        import_peft(model, tmp_path)
