"""The critic: where it comes from, what it says where, and what is refused."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForTokenClassification, GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM

from tests import tiny
from trl_ext.ppo.critic import critic_of, load_critic, ready, values_before

from . import setups


CPU = torch.device("cpu")


def loud(critic, seed=0):
    """A critic whose values differ."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in critic.named_parameters():
            if not name.startswith(critic.base_model_prefix):
                parameter.normal_()
    return critic


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gemma"])
def test_it_has_the_policys_backbone_and_a_head_of_zeros(family):
    policy = tiny.model(family)
    critic = critic_of(policy)
    ready(critic, 64, CPU)
    ids = torch.randint(3, 60, (2, 9))
    assert torch.equal(critic(input_ids=ids).logits, torch.zeros(2, 9, 1))
    assert torch.equal(critic.base_model(ids).last_hidden_state, policy.base_model(ids).last_hidden_state)
    assert critic.training and not any(m.p for m in critic.modules() if isinstance(m, torch.nn.Dropout))
    before = copy.deepcopy(policy.state_dict())
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], x) for name, x in policy.state_dict().items())  # nothing is shared


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["embed_tokens"]}], ids=str)
def test_adapters_are_merged_and_the_policy_stays_as_it_is(changes):
    """Hidden states to 1e-5."""
    policy = get_peft_model(tiny.model(std=0.1), setups.lora(init_lora_weights=False, **changes)).eval()
    before = copy.deepcopy(policy.state_dict())
    critic = critic_of(policy)
    ids = torch.randint(3, 60, (2, 9))
    hidden = critic.base_model(ids).last_hidden_state
    assert torch.allclose(hidden, policy.get_base_model().base_model(ids).last_hidden_state, atol=1e-5)
    with policy.disable_adapter():
        plain = policy.get_base_model().base_model(ids).last_hidden_state
    assert (hidden - plain).abs().max() > 1e-2
    assert policy.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], x) for name, x in policy.state_dict().items())


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_values_in_a_padded_batch_are_those_of_single_rows(family):
    """To 1e-5; the value at the batch's end, which the tutorial reads, is another one."""
    critic = loud(critic_of(tiny.model(family)))
    ready(critic, 64, CPU)
    rows = [([5, 6, 7, 8], [9, 10, 11, 12, 13]), ([14], [15, 16]), ([17, 18], [19])]
    ids = torch.tensor([[0] * (4 - len(p)) + p + c + [0] * (5 - len(c)) for p, c in rows])
    attention = (ids != 0).long()
    found = values_before(critic, ids, attention, 5)
    at_the_end = critic(input_ids=ids, attention_mask=attention).logits[:, -1, 0]
    for b, (prompt, completion) in enumerate(rows):
        single = critic(input_ids=torch.tensor([prompt + completion])).logits[0, :, 0]
        assert torch.allclose(found[b, : len(completion)], single[len(prompt) - 1 : -1], atol=1e-5)
        if len(completion) < 5:
            assert (at_the_end[b] - single[-2]).abs() > 1e-2


def test_a_value_knows_nothing_of_its_token():
    critic = loud(critic_of(tiny.model()))
    ids = torch.randint(3, 60, (1, 8))
    other = ids.clone()
    other[0, 5] = 61
    found, changed = (values_before(critic, x, torch.ones_like(x), 4)[0] for x in (ids, other))  # of tokens 4 to 7
    assert torch.equal(found[:2], changed[:2]) and (found[2:] - changed[2:]).abs().min() > 1e-3


def test_from_a_folder(tmp_path):
    """A saved critic as it was; a language model's backbone with a head of zeros."""
    critic = loud(critic_of(tiny.model()))
    critic.save_pretrained(tmp_path / "critic")
    ids = torch.randint(3, 60, (1, 8))
    again = load_critic(str(tmp_path / "critic"), torch.float32, False)
    assert torch.equal(again.eval()(input_ids=ids).logits, critic.eval()(input_ids=ids).logits)
    fresh = load_critic(setups.base_folder(tmp_path), torch.float32, False)
    assert not fresh(input_ids=ids).logits.any()
    critic.base_model.save_pretrained(tmp_path / "bare")
    assert not load_critic(str(tmp_path / "bare"), torch.float32, False)(input_ids=ids).logits.any()


def test_making_one_draws_no_random_number():
    policy = tiny.model()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    critic_of(policy)
    assert torch.equal(wanted, torch.rand(3))


def test_an_architecture_without_token_classifier_is_refused():
    config = GraniteMoeSharedConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        shared_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    with pytest.raises(ValueError, match=r"critic_model: .* 'granitemoeshared'.*pass a critic"):
        critic_of(GraniteMoeSharedForCausalLM(config))


def test_a_quantized_policy_is_refused(monkeypatch):
    policy = tiny.model()
    policy.is_quantized = True
    with pytest.raises(ValueError, match="critic_model: the policy is quantized"):
        critic_of(policy)


def test_what_is_no_critic_is_refused():
    with pytest.raises(ValueError, match="Qwen3ForCausalLM with 2 labels"):
        ready(tiny.model(), 64, CPU)
    with pytest.raises(ValueError, match="critic_model is a Linear with no labels"):
        ready(torch.nn.Linear(1, 1), 64, CPU)
    config = tiny.config("qwen3")
    config.num_labels = 3
    with pytest.raises(ValueError, match="Qwen3ForTokenClassification with 3 labels"):
        ready(AutoModelForTokenClassification.from_config(config), 64, CPU)
    with pytest.raises(ValueError, match="64 embeddings, but the policy's tokenizer has 70 tokens"):
        ready(critic_of(tiny.model()), 70, CPU)
