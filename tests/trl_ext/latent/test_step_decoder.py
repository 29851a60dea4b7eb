"""SIM-CoT's decoder: what it writes, where it is saved, its share of clipping, and refusals. Its loss is tested with the
others in test_trainer.py and test_stages.py."""

import json

import pytest
import torch
from peft import get_peft_model_state_dict

from tests import tiny
from trl_ext.latent.step_decoder import step_decoder_of, step_losses, steps_of
from unsloth_ext import LatentModel, backbone_of

from . import setups


CASE = setups.CASES["sequential, written"]


def test_each_group_writes_its_step_and_the_last_one_the_rest():
    trace = torch.tensor([[11, 12, 13, 14, 15, 16], [21, 22, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    ends = torch.tensor([[2, 3, 6], [2, 2, 2], [0, 0, 0]])  # steps of 2, 1 and 3 tokens; one of 2; none
    no = -100
    found = steps_of(trace, ends, 2, 9, merge=True)
    assert found.tolist() == [
        [[11, 12, 9, no, no], [13, 14, 15, 16, 9]],
        [[21, 22, 9, no, no], [no] * 5],
        [[no] * 5, [no] * 5],
    ]
    alone = steps_of(trace, ends, 2, 9, merge=False)
    assert alone[0].tolist() == [[11, 12, 9], [13, 9, no]]
    more = steps_of(trace, ends, 5, 9, merge=True)
    assert more[0, 2].tolist() == [14, 15, 16, 9] and (more[:, 3:] == no).all()


def test_rows_without_steps_cost_nothing():
    model = tiny.model()
    steps = torch.full((2, 3, 4), -100)
    latents = torch.randn(2, 3, 1, model.config.hidden_size)
    assert step_losses(step_decoder_of(model), model.get_input_embeddings(), latents, steps).tolist() == [0.0] * 3


@pytest.mark.parametrize("peft", [True, False])
def test_checkpoints_have_the_decoder_and_the_saved_model_has_not(tmp_path, peft):
    trainer = setups.trainer(tmp_path, peft, save_strategy="steps", save_steps=2, **CASE)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "checkpoint-2" / "step_decoder" / "model.safetensors").is_file()
    assert not (tmp_path / "final" / "step_decoder").exists()
    saved = json.loads((tmp_path / "checkpoint-2" / "step_decoder" / "config.json").read_text())
    assert "latent" not in saved  # it is a plain model
    weights = get_peft_model_state_dict(trainer.model) if peft else trainer.model.state_dict()
    assert not any("step_decoder" in name for name in weights)
    if not peft:  # the adapter's base is no folder
        texts = [
            LatentModel(model, trainer.processing_class).generate(["1+2="], max_new_tokens=4)
            for model in (trainer.model, LatentModel.from_pretrained(str(tmp_path / "final")).model)
        ]
        assert texts[0] == texts[1]
    # A second run begins with the model's weights, and with a copy of its own
    again = setups.trainer(tmp_path / "again", peft, **CASE)
    before = {name: p.clone() for name, p in again._step_decoder.named_parameters()}
    again.begin_with(tmp_path / "final")
    assert all(torch.equal(p, before[name]) for name, p in again._step_decoder.named_parameters())
    again.begin_with(tmp_path / "checkpoint-2")
    assert any(not torch.equal(p, before[name]) for name, p in again._step_decoder.named_parameters())


def test_a_checkpoint_without_its_decoder_is_refused(tmp_path):
    setups.trainer(
        tmp_path, save_strategy="steps", save_steps=2, w_codi=1.0, num_latents=2, **{"iterations": 1}
    ).train()
    again = setups.trainer(tmp_path, **{**CASE, "iterations": 1, "projection_dim": None})
    with pytest.raises(ValueError, match="step_decoder"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_gradients_are_clipped_to_one_norm_over_both(tmp_path):
    """1e-5 of the bound (fp32)."""
    trainer = setups.trainer(tmp_path, max_steps=1, max_grad_norm=1e-3, **CASE)
    norms = {}
    step = trainer._clip_grad_norm

    def clip(model):
        def norm(parameters):
            return torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()

        found = step(model)
        norms["model"], norms["decoder"] = norm(model.parameters()), norm(trainer._step_decoder.parameters())
        return found

    trainer._clip_grad_norm = clip
    trainer.train()
    assert min(norms.values()) > 1e-5
    assert (norms["model"] ** 2 + norms["decoder"] ** 2).sqrt().item() == pytest.approx(1e-3, rel=1e-5)


def test_the_decoder_is_a_plain_copy_in_float32():
    """Of a model in bfloat16 with LoRA and latent modules: what it writes is what the merged model writes (1e-6)."""
    trainer = setups.trainer("unused", **setups.CASES["sequential"])
    model = trainer.model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    decoder = step_decoder_of(model)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in decoder.parameters())
    assert not hasattr(backbone_of(decoder), "latent_projection") and not hasattr(decoder.config, "latent")
    assert hasattr(backbone_of(model), "latent_projection") and hasattr(model.config, "latent")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert (decoder(ids).logits - model(ids).logits).abs().max() <= 1e-5
    half = step_decoder_of(tiny.model(dtype=torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_no_weight_makes_no_decoder(tmp_path):
    trainer = setups.trainer(tmp_path, **setups.CASES["sequential"])
    assert trainer._step_decoder is None and not trainer._modules_beside()


def test_what_it_cannot_copy_or_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="iterations=0: pause tokens are the same for all questions"):
        setups.trainer(tmp_path, num_latents=3, iterations=0, w_step_decoder=1.0)
    model = tiny.model()
    model.quantization_method = "bitsandbytes"
    with pytest.raises(ValueError, match="the model is quantized; load it without quantization"):
        step_decoder_of(model)
