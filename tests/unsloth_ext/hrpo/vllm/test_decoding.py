"""Decoding in vLLM against `hybrid_generate`, request by request."""

import pytest
import torch

from .engines import alone, checkpoint, engine, log_probs, prompts


pytestmark = pytest.mark.vllm
STEPS = 40
# Sums in another order: 1e-6 at one token. Each state is made from the one before, so differences grow along a text
GREEDY = {"rtol": 0, "atol": 2e-4}


def greedy(count=12, **settings):
    from vllm import SamplingParams

    from unsloth_ext.hrpo.vllm.engine import traced

    return [traced(SamplingParams(temperature=0, max_tokens=STEPS, logprobs=0, **settings)) for _ in range(count)]


def run(llm, params, texts=None):
    from unsloth_ext.hrpo.vllm.engine import take_traces

    texts = prompts(len(params)) if texts is None else texts
    out = llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
    return out, take_traces(llm, params, out)


def check_greedy(llm, model, tokenizer, params=None):
    """Equal tokens, log-probs, masks and states; and different from plain decoding, or the test shows nothing."""
    params = params or greedy()
    texts, plain = prompts(len(params)), 0
    for text, out, (trace,) in zip(texts, *run(llm, params), strict=True):
        wanted, reference = alone(model, tokenizer, text, max_new_tokens=STEPS)
        completion = out.outputs[0]
        assert list(completion.token_ids) == wanted
        torch.testing.assert_close(log_probs(completion), reference.log_probs[0], **GREEDY)
        assert trace.thinking_mask.tolist() == reference.thinking_mask.tolist()
        torch.testing.assert_close(trace.hidden_states, reference.hidden_states, rtol=0, atol=1e-3)
        ids = torch.tensor([text])
        bare = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False)
        plain += bare[0, len(text) :].tolist() == wanted
    assert plain < len(texts)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
def test_greedy_decoding_equals_hybrid_generate(family):
    """Twelve ragged requests in five slots."""
    model, folder, tokenizer = checkpoint(family)
    with engine(folder) as llm:
        check_greedy(llm, model, tokenizer)
