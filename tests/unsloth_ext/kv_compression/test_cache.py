"""Decoding with a compressed cache: below the budget it is the full cache, above it each row is what it is alone."""

import pytest
import torch
import transformers

from tests import tiny
from unsloth_ext.kv_compression.cache import CompressedCache
from unsloth_ext.kv_compression.compression import KVScoring


FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
SCORING = KVScoring("rkv", window=4)


def prompts(pad=0):
    ids = torch.randint(3, 40, (3, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 4, 9)):
        ids[row, :count], mask[row, :count] = pad, 0
    return {"input_ids": ids, "attention_mask": mask}


def decode(model, cache, inputs, tokens=40, **ways):
    out = model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        past_key_values=cache,
        output_logits=True,
        return_dict_in_generate=True,
        **ways,
    )
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


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_a_prompt_read_in_chunks_is_one_read_at_once_and_pads_stay_pads(chunk):
    """Below the budget; some rows' first chunks are all padding. Tokens exactly, logits to 1e-5."""
    model = tiny.model("qwen3", std=0.1)
    tokens, logits = decode(model, CompressedCache(model, 40, 40, SCORING), prompts(), 12)
    for pad in (0, 17):
        cache = CompressedCache(model, 40, 40, SCORING)
        same, ours = decode(model, cache, prompts(pad), 12, prefill_chunk_size=chunk)
        assert torch.equal(tokens, same) and (logits - ours).abs().max() <= 1e-5
        assert cache.layers[0].valid.sum(-1).tolist() == [23, 19, 14]


def test_chunks_of_a_padded_batch_are_compressed_as_each_row_alone():
    """Compressed while the prompt is read; pads are whole chunks, so that chunks are the same alone. Tokens exactly."""
    model = tiny.model("qwen3", std=0.1)
    ids = torch.randint(3, 40, (3, 24), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :12] = 0, 0

    def run(ids, mask):
        cache = CompressedCache(model, 10, 6, SCORING)
        inputs = {"input_ids": ids, "attention_mask": mask}
        return decode(model, cache, inputs, 12, prefill_chunk_size=4)[0]

    tokens = run(ids, mask)
    assert torch.equal(tokens, run(ids.masked_fill(mask == 0, 9), mask))
    for row, pads in enumerate((0, 4, 12)):
        assert torch.equal(run(ids[row : row + 1, pads:], mask[row : row + 1, pads:])[0], tokens[row])


@torch.no_grad()
def test_a_chunk_after_a_compression_is_its_tokens_one_by_one():
    """Every token's logits, to 1e-5: each sees what was kept, the chunk's tokens before it and itself."""
    model = tiny.model("qwen3", std=0.1)
    ids = torch.randint(3, 40, (2, 21), generator=torch.Generator().manual_seed(6))
    caches = [CompressedCache(model, 10, 6, SCORING) for _ in range(2)]
    for cache in caches:
        model(ids[:, :16], past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == 10
    together = model(ids[:, 16:], past_key_values=caches[0]).logits
    apart = [model(ids[:, t : t + 1], past_key_values=caches[1]).logits for t in range(16, 21)]
    assert (together - torch.cat(apart, 1)).abs().max() <= 1e-5


def test_bad_settings_are_named():
    model = tiny.model()
    for changes, message in (({"budget": 8}, "budget=8"), ({"buffer": 0}, "buffer=0")):
        with pytest.raises(ValueError, match=message):
            CompressedCache(model, **changes)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        CompressedCache(model)


def test_attention_that_reads_copies_of_the_keys_is_named():
    """JetMoe repeats keys behind its cache: nothing would be dropped."""
    config = transformers.JetMoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    model = tiny.from_config(config, std=0.1).eval()
    with pytest.raises(ValueError, match="did not read the keys that the compressed cache holds"):
        decode(model, CompressedCache(model, 10, 6, SCORING), prompts())
