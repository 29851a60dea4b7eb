"""Decoding with a compressed cache: below the budget it is the full cache, above it each row is what it is alone."""

import pytest
import torch

from tests import tiny
from unsloth_ext.kv.cache import CompressedCache
from unsloth_ext.kv.compression import KVScoring


FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
SCORING = KVScoring("rkv", window=4)


def prompts(pad=0):
    ids = torch.randint(3, 40, (3, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 4, 9)):
        ids[row, :count], mask[row, :count] = pad, 0
    return {"input_ids": ids, "attention_mask": mask}


def decode(model, cache, inputs, tokens=40):
    out = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None, past_key_values=cache,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_below_the_budget_it_is_the_full_cache(family):
    model = tiny.model(family, std=0.1)
    tokens, logits = decode(model, None, prompts())
    same, ours = decode(model, CompressedCache(model, 100, 100, SCORING), prompts())
    assert torch.equal(tokens, same) and torch.equal(logits, ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_is_alone_and_pads_never_matter(family):
    """Over several compressions; a short question keeps pads in its cache until real keys fill it. Logits to 1e-5."""
    model = tiny.model(family, std=0.1)

    def run(inputs):
        cache = CompressedCache(model, 10, 6, SCORING)
        out = decode(model, cache, inputs)
        assert all(layer.keys.shape[2] < 16 for layer in cache.layers)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 39
        return out

    tokens, logits = run(prompts())
    again, other = run(prompts(pad=17))
    assert torch.equal(tokens, again) and torch.equal(logits, other)
    assert torch.equal(tokens, run(prompts())[0]), "nothing may stay from one prompt to the next"
    for row in range(3):
        real = prompts()["attention_mask"][row].bool()
        alone, single = run({name: x[row : row + 1, real] for name, x in prompts().items()})
        assert torch.equal(alone[0], tokens[row]) and (single[0] - logits[row]).abs().max() <= 1e-5


def test_bad_settings_are_named():
    model = tiny.model()
    for changes, message in (({"budget": 8}, "budget=8"), ({"buffer": 0}, "buffer=0")):
        with pytest.raises(ValueError, match=message):
            CompressedCache(model, **changes)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        CompressedCache(model)
