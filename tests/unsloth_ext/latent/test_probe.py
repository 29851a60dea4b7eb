"""What the LM head reads in latent tokens, and cosines of caches, against plain loops over rows without pads."""

import pytest
import torch
from torch.nn import functional as F

from unsloth_ext import KVScoring, backbone_of, kv_similarity, latent_phase, probe_latents
from unsloth_ext.latent.config import thinking_with

from .test_phase import FAMILIES, make, questions


@pytest.mark.parametrize("iterations", [None, 0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_the_latent_inputs_and_the_probe_reads_them(family, iterations):
    """1e-5 against one pass without a cache over question, <bot> and the latent inputs."""
    model = make(family, iterations=iterations)
    ids, mask = questions()
    with torch.no_grad():
        state = latent_phase(model, ids, mask)
    tokens, probabilities = probe_latents(model, state, k=4)
    backbone = backbone_of(model)
    embed = backbone.get_input_embeddings()
    for row in range(3):
        question = torch.cat([ids[row, mask[row].bool()], torch.tensor([backbone.latent_token_ids[0]])])
        with torch.no_grad():
            inputs = torch.cat([embed(question), state.latents[row]])[None]
            out = model(inputs_embeds=inputs, output_hidden_states=True)
        torch.testing.assert_close(state.hidden_states[row], out.hidden_states[-1][0, -5:], atol=1e-5, rtol=1e-4)
        expected = out.logits[0, -5:].float().softmax(-1).topk(4)
        assert torch.equal(tokens[row], expected.indices)
        torch.testing.assert_close(probabilities[row], expected.values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_similarity_equals_a_plain_loop_over_rows(family):
    """1e-5. Rows with a long, a short and no trace; pads of both sides."""
    model = make(family, iterations=2)
    ids, mask = questions()
    torch.manual_seed(1)
    traces, answers = (7, 3, 0), (2, 4, 3)
    teacher = torch.randint(3, 60, (3, 9))
    column = torch.arange(9)
    trace_mask = (column < torch.tensor(traces)[:, None]).long()
    answer_mask = (column < torch.tensor([t + a for t, a in zip(traces, answers)])[:, None]).long() - trace_mask
    found = kv_similarity(model, ids, mask, teacher, trace_mask, answer_mask, KVScoring("crop"))
    assert found.keys.shape == (2, 3, 5, 7) and found.valid.sum(-1).tolist() == [5, 3, 0]
    for row, (t, a) in enumerate(zip(traces, answers, strict=True)):
        real = ids[row : row + 1, mask[row].bool()]
        with torch.no_grad():
            cache = model(torch.cat([real, teacher[row : row + 1, : t + a]], dim=1), use_cache=True).past_key_values
            latent = latent_phase(model, real, torch.ones_like(real)).latent_kv()
        for layer in range(2):
            for name, ours in zip(("keys", "values"), latent[layer], strict=True):
                theirs = getattr(cache.layers[layer], name)[0, :, real.shape[1] : real.shape[1] + t]
                each = torch.stack(
                    [
                        torch.stack([F.cosine_similarity(ours[0, :, m], theirs[:, j], dim=-1).mean() for j in range(t)])
                        if t
                        else torch.zeros(0)
                        for m in range(5)
                    ]
                )
                got = getattr(found, name)[layer, row]
                torch.testing.assert_close(got[:, :t], each, atol=1e-5, rtol=1e-4)
                assert not got[:, t:].any()
                kept = getattr(found, f"kept_{name}")[layer, row]  # crop keeps the first ones
                torch.testing.assert_close(kept[: min(t, 5)], each.diagonal()[: min(t, 5)], atol=1e-5, rtol=1e-4)


def test_fewer_latent_tokens_for_a_while():
    model = make(iterations=None)
    ids, mask = questions()
    whole = latent_phase(model, ids, mask)
    with thinking_with(model, num_latents=2):
        fewer = latent_phase(model, ids, mask)
    assert fewer.latents.shape[1] == 2 and backbone_of(model).latent_config.num_latents == 5
    torch.testing.assert_close(fewer.latents, whole.latents[:, :2], atol=1e-6, rtol=1e-5)  # sequential: a prefix
    with pytest.raises(ValueError, match="num_latents=0"), thinking_with(model, num_latents=0):
        pass
