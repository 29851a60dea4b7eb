"""Decoding with a cache against the whole sequence again for each token; what is remembered."""

import pytest
import torch

from tests.trl_ext.minimind import setups
from trl_ext.minimind.chat import Dialogue


def without_cache(model, ids, steps):
    ids = torch.tensor([ids])
    for _ in range(steps):
        token = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
        if token == 2:
            break
    return ids[0].tolist()


def refed(model, ids, steps):
    """The tutorial's `generate_with_cache`: the whole sequence goes in again on top of the cache that holds it already."""
    ids, cache, first = torch.tensor([ids]), None, len(ids)
    for _ in range(steps):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, first:].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_is_what_no_cache_would_give(seed):
    model, tokenizer = setups.model(seed), setups.tokenizer()
    talk = Dialogue(model, tokenizer, max_new_tokens=24)
    for text in ("What is 7+5?", "Hello!"):
        before = talk.messages + setups.turns(text)
        ids = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=True)["input_ids"]
        expected = without_cache(model, ids, 24)[len(ids) :]
        assert talk.say(text) == tokenizer.decode(expected, skip_special_tokens=True)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2


def test_the_tutorials_cache_goes_wrong_from_the_second_token():
    differ = 0
    for seed in range(6):
        model = setups.model(seed)
        ids = setups.tokenizer()("What is 7+5-3? Hello!")["input_ids"]
        right, wrong = without_cache(model, ids, 12)[len(ids) :], refed(model, ids, 12)
        assert right[0] == wrong[0]
        differ += right != wrong[: len(right)]
    assert differ == 6


def test_system_message_streaming_and_sampling(capsys):
    talk = Dialogue(setups.model(), setups.tokenizer(), max_new_tokens=8, temperature=1.0, system="Be brief.")
    torch.manual_seed(0)
    answer = talk.say("Hello!", stream=True)
    assert capsys.readouterr().out.strip() == answer.strip()
    assert talk.messages[0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(ValueError, match="temperature=-1"):
        Dialogue(setups.model(), setups.tokenizer(), temperature=-1)
