"""Which states meet which rows when log-probs are scored: in chunks, with pads on GPT-2, under the reference's adapter; and
where the passes before the training forward start and what they keep."""

import pytest
import torch

from tests import tiny
from unsloth_ext import FastThinkingModel, backbone_of
from unsloth_ext.hrpo.decoding import ThinkingTrace
from unsloth_ext.hrpo.recompute import previous_hidden, thinking_keywords
from unsloth_ext.hrpo.states import Warper

from . import setups
from .test_trainer import loud, one_batch


def whole(inputs):
    """Ids, mask and completion length of a batch."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return ids, attention, inputs["completion_ids"].shape[1]


def test_scoring_in_chunks_is_scoring_at_once(tmp_path):
    """1e-5: every chunk takes the states of its own rows."""
    trainer = setups.hrpo(tmp_path, recompute="rollout")
    loud(trainer)
    inputs = one_batch(trainer)
    ids, attention, length = whole(inputs)
    trainer._saved = ThinkingTrace(inputs["thinking_mask"], None, inputs["hidden_states"])
    with torch.no_grad():
        once, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, length)
        for size in (3, 1):
            chunks, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, length, size)
            torch.testing.assert_close(chunks, once, rtol=1e-5, atol=1e-5)
    assert (once - once.roll(1, 0)).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["rollout", "jacobi"])
def test_learned_positions_do_not_count_pads(tmp_path, mode):
    """GPT-2: the ratio at the first inner step is 1 to 1e-4 on left-padded rows, and is not where pads count."""
    folder = setups.base_folder(tmp_path, "gpt2", std=0.3)
    trainer = setups.hrpo(tmp_path, model=folder, peft=False, recompute=mode, jacobi_iterations=12)
    loud(trainer)
    for module in trainer.model.modules():  # GPT-2 has some by default, as in stock GRPO
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = one_batch(trainer)
    assert (inputs["prompt_mask"] == 0).any()
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, inputs)
    right = trainer._metrics["train"].pop("thinking/ratio_deviation")[0]
    trainer._takes_position_ids = False
    trainer._compute_loss(trainer.model, inputs)
    wrong = trainer._metrics["train"]["thinking/ratio_deviation"][0]
    assert right <= 1e-4 < 1e-2 < wrong


def test_the_reference_of_a_given_adapter_does_not_think(tmp_path):
    """beta > 0 with a `PeftModel`: TRL's copy named "ref" has thinking modules too, and is given no states."""
    model, _ = FastThinkingModel.from_pretrained(setups.base_folder(tmp_path), 128, load_in_4bit=False)
    model = FastThinkingModel.get_peft_model(model.float(), r=4, target_modules=["q_proj", "v_proj"])
    trainer = setups.hrpo(tmp_path, model=model, peft=False, beta=0.1)
    assert "ref" in trainer.model.peft_config
    loud(trainer)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B.ref" in name:
                parameter.normal_(std=0.3)
    inputs = one_batch(trainer)
    ids, attention, length = whole(inputs)
    trainer.model.eval()
    trainer.model.set_adapter("ref")
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1]
    wanted = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)
    live = inputs["completion_mask"].bool()
    torch.testing.assert_close(inputs["ref_per_token_logps"][live], wanted[live], rtol=1e-4, atol=1e-4)


def thinking_model():
    from unsloth_ext import attach_thinking

    net = attach_thinking(tiny.model("qwen3"))
    tiny.loud_gates(backbone_of(net))
    torch.manual_seed(0)
    ids, mask = torch.randint(3, 40, (2, 9)), torch.ones(2, 5, dtype=torch.bool)
    saved = ThinkingTrace(mask, torch.randn(2, 5, 32), torch.randn(2, 5, 32))
    return net, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, saved


def test_passes_before_the_training_forward_keep_no_graph():
    """Only `soft_bptt`'s does, by design: the others' would double the memory and change the gradient."""
    net, inputs, saved = thinking_model()
    for mode, kept in (("two_pass", False), ("jacobi", False), ("soft_bptt", True)):
        found = thinking_keywords(net, mode, saved, Warper(1.0, 0, 1.0, None), 2, **inputs)
        assert found["thinking_hidden_states_cache"].requires_grad == kept, mode


def test_jacobi_starts_from_what_the_rollout_saved():
    """One iteration is one pass with the rollout's states, exactly; without them it is another."""
    net, inputs, saved = thinking_model()
    found = thinking_keywords(net, "jacobi", saved, Warper(1.0, 0, 1.0, None), 1, **inputs)
    with torch.no_grad():
        given = {
            "thinking_mask": saved.thinking_mask,
            "recompute_thinking_projection": True,
            "thinking_hidden_states_cache": saved.hidden_states,
        }
        assert torch.equal(found["thinking_hidden_states_cache"], previous_hidden(net, 5, **inputs, **given))
        blind = previous_hidden(net, 5, **inputs)
    assert (found["thinking_hidden_states_cache"] - blind).abs().max() > 0.1
