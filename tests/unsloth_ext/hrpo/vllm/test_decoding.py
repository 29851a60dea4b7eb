"""Decoding in vLLM against `hybrid_generate`, request by request, for every family."""

import pytest
import torch

from .engines import check, checkpoint, engine, prompts, run, sampling


pytestmark = pytest.mark.vllm
STEPS = 16


@pytest.mark.parametrize(
    "family, norm",
    [("llama", "unit"), ("qwen2", "unit"), ("qwen3", "embedding_rms"), ("mistral", "unit"), ("gemma", "embedding_rms")],
)
def test_greedy_decoding_equals_hybrid_generate(family, norm):
    """Eight ragged requests in five slots: tokens, log-probs, masks and states; and plain decoding is different."""
    model, folder, tokenizer = checkpoint(family, norm=norm)
    params = [sampling(max_tokens=STEPS) for _ in range(8)]
    with engine(folder) as llm:
        found = run(llm, params)
    for text, out, (trace,) in zip(prompts(8), *found, strict=True):
        check(out.outputs[0], trace, text, model, tokenizer, max_new_tokens=STEPS)
    ids = torch.tensor([text])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False)
    assert plain[0, len(text) :].tolist() != list(out.outputs[0].token_ids)  # or the test shows nothing
