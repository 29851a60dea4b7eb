"""The call of the dynamic projection's note: tokens are `input_ids`, `inputs_embeds` beside them the thinking states."""

import pytest
import torch

from tests import tiny
from unsloth_ext import attach_thinking, backbone_of


def setup(family):
    net = attach_thinking(tiny.model(family))
    tiny.loud_gates(backbone_of(net))
    torch.manual_seed(0)
    ids, mask = torch.randint(3, 40, (2, 9)), torch.rand(2, 9) < 0.6
    return net, ids, mask, torch.randn(2, 9, 32), torch.randn(2, 9, 32)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equals_our_own_keywords(family):
    """Bit for bit; with the projection made anew from the cache, whose slot t holds what produced token t."""
    net, ids, mask, states, cache = setup(family)
    ours = net(input_ids=ids, thinking_mask=mask, thinking_embeds=states).logits
    assert torch.equal(net(input_ids=ids, inputs_embeds=states, thinking_mask=mask).logits, ours)
    assert (ours - net(input_ids=ids).logits).abs().max() > 0.1
    anew = {"thinking_mask": mask, "recompute_thinking_projection": True, "thinking_hidden_states_cache": cache}
    ours = net(input_ids=ids, **anew).logits
    assert torch.equal(net(input_ids=ids, inputs_embeds=states, **anew).logits, ours)
    last = {name: value[:, -4:] if torch.is_tensor(value) else value for name, value in anew.items()}
    found = net(input_ids=ids, inputs_embeds=states[:, -4:], **last).logits
    assert torch.equal(found, net(input_ids=ids, **last).logits)


def test_the_state_of_a_token_is_made_from_the_one_before_it():
    """The note masks and reads its cache at the same position; here slot t is the hidden state of position t - 1."""
    net, ids, _, _, _ = setup("llama")
    hidden = net.base_model(input_ids=ids).last_hidden_state
    cache, mask = torch.zeros_like(hidden), torch.zeros_like(ids, dtype=torch.bool)
    cache[:, 5], mask[:, 5] = hidden[:, 4], True
    found = net(
        input_ids=ids,
        inputs_embeds=torch.zeros_like(cache),
        thinking_mask=mask,
        recompute_thinking_projection=True,
        thinking_hidden_states_cache=cache,
    ).logits
    state = net.base_model.thinking_projection(hidden[:, 4])
    states = torch.zeros_like(cache)
    states[:, 5] = state / state.norm(dim=-1, keepdim=True)
    wanted = net(input_ids=ids, thinking_mask=mask, thinking_embeds=states).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_neither_reading_is_refused():
    net, ids, mask, states, _ = setup("llama")
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        net(input_ids=ids, inputs_embeds=states)
    with pytest.raises(ValueError, match="they are given twice"):
        net(input_ids=ids, inputs_embeds=states, thinking_mask=mask, thinking_embeds=states)
    for wrong in (states[:, 1:], states[..., :16], states.long()):
        with pytest.raises(ValueError, match=r"inputs_embeds \(2, .*with input_ids are the thinking states"):
            net(input_ids=ids, inputs_embeds=wrong, thinking_mask=mask)
    for lone in ({"thinking_embeds": states}, {"recompute_thinking_projection": True}):
        with pytest.raises(ValueError, match=f"{next(iter(lone))} without thinking_mask"):
            net(input_ids=ids, **lone)
    embeds = net.get_input_embeddings()(ids)
    ours = net(input_ids=ids, thinking_mask=mask, thinking_embeds=states).logits
    assert torch.equal(net(inputs_embeds=embeds, thinking_mask=mask, thinking_embeds=states).logits, ours)
