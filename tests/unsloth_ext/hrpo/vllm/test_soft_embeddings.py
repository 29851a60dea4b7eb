"""Soft embeddings as thinking states: each state is made of the distribution that its token was drawn from."""

import pytest

from .engines import check, check_sampled, checkpoint, engine, prompts, run, sampling
from .test_requests import STEPS, WARPS


pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def saved():
    return checkpoint("gemma", source="soft_embedding")  # which scales its embeddings


@pytest.fixture(scope="module")
def llm(saved):
    with engine(saved[1]) as made:
        yield made


def test_greedy_decoding_equals_hybrid_generate(llm, saved):
    model, _, tokenizer = saved
    out, traces = run(llm, [sampling(max_tokens=STEPS) for _ in range(5)])
    for text, one, (trace,) in zip(prompts(5), out, traces, strict=True):
        check(one.outputs[0], trace, text, model, tokenizer, max_new_tokens=STEPS)


def test_states_are_made_of_the_warped_distribution(llm, saved):
    """One warp a request, beside a greedy request, whose states come from the distribution at temperature 1."""
    model, _, tokenizer = saved
    params = [sampling(max_tokens=STEPS, seed=3, **warp) for warp in WARPS] + [sampling(max_tokens=STEPS)]
    out, traces = run(llm, params)
    texts = prompts(len(params))
    for text, warp, one, (trace,) in zip(texts, WARPS, out, traces, strict=False):
        check_sampled(one.outputs[0], trace, text, model, **warp)
    check(out[-1].outputs[0], traces[-1][0], texts[-1], model, tokenizer, max_new_tokens=STEPS)


def test_few_candidates(llm, saved):
    """Only top-k requests, so that few rows of the embedding are read; and processors before the warp."""
    model = saved[0]
    params = [sampling(max_tokens=STEPS, seed=5, temperature=1.3, top_k=k) for k in (1, 2, 4)]
    out, traces = run(llm, params)
    for text, k, one, (trace,) in zip(prompts(3), (1, 2, 4), out, traces, strict=True):
        check_sampled(one.outputs[0], trace, text, model, temperature=1.3, top_k=k)
