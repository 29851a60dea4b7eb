"""Requests of many kinds in one engine: sampled, seeded, several completions, staggered, aborted, stopped."""

import pytest
import torch

from .engines import (
    DELIMITER,
    alone,
    check,
    check_sampled,
    checkpoint,
    engine,
    prompts,
    run,
    sampling,
    worker,
)


pytestmark = pytest.mark.vllm
STEPS = 12


@pytest.fixture(scope="module")
def model():
    return checkpoint()[0]


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint()[2]


@pytest.fixture(scope="module")
def llm():
    from tests import vllm_on_cpu

    with engine(checkpoint()[1]) as made:
        assert made.llm_engine.vllm_config.scheduler_config.async_scheduling == vllm_on_cpu.V2  # as on GPUs
        yield made


WARPS = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 1.1, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 8, "top_p": 0.9},
]


def test_sampled_completions_score_the_same_in_training(llm, model):
    """With one warp a request, all in one batch, beside a greedy one."""
    params = [sampling(max_tokens=STEPS, seed=3, **warp) for warp in WARPS] + [sampling(max_tokens=STEPS)]
    out, traces = run(llm, params)
    for text, warp, one, (trace,) in zip(prompts(len(WARPS)), WARPS, out, traces, strict=False):
        check_sampled(one.outputs[0], trace, text, model, **warp)


def test_a_seed_gives_the_same_tokens_in_any_batch(llm):
    text, seeded = prompts(5)[4], {"temperature": 1.0, "max_tokens": STEPS, "seed": 11}
    (one,), ((first,),) = run(llm, [sampling(**seeded)], [text])
    many, traces = run(llm, [sampling(temperature=1.0) for _ in range(6)] + [sampling(**seeded)], [*prompts(6), text])
    assert many[-1].outputs[0].token_ids == one.outputs[0].token_ids
    torch.testing.assert_close(traces[-1][0].hidden_states, first.hidden_states, rtol=0, atol=1e-4)
    (other,), _ = run(llm, [sampling(**{**seeded, "seed": 12})], [text])
    assert other.outputs[0].token_ids != one.outputs[0].token_ids


def test_each_of_several_completions_has_its_own_trace(llm, model):
    settings = {"temperature": 1.0, "max_tokens": STEPS, "n": 3}
    texts = prompts(2)
    out, traces = run(llm, [sampling(**settings), sampling(**settings)], texts)
    assert len({tuple(completion.token_ids) for one in out for completion in one.outputs}) > 3
    for text, one, parts in zip(texts, out, traces, strict=True):
        for completion, trace in zip(one.outputs, parts, strict=True):
            check_sampled(completion, trace, text, model)


def test_requests_that_arrive_while_others_run(llm, model, tokenizer):
    """One arrives at each step, one is aborted, and its slot is used again."""
    from unsloth_ext import take_traces

    texts, params, done = prompts(9), [sampling(max_tokens=STEPS) for _ in range(9)], {}
    core = llm.llm_engine
    for step in range(9):
        core.add_request(f"late{step}", {"prompt_token_ids": texts[step]}, params[step])
        if step == 4:
            core.abort_request(["late2"])
        done |= {one.request_id: one for one in core.step() if one.finished}
    while core.has_unfinished_requests():
        done |= {one.request_id: one for one in core.step() if one.finished}
    ((_, aborted),) = worker(llm).take_thinking_traces([params[2].extra_args["thinking_trace"]])[0]
    assert 0 < len(aborted["thinking_mask"]) < STEPS
    kept = [i for i in range(9) if i != 2]
    out = [done[f"late{i}"] for i in kept]
    traces = take_traces(llm, [params[i] for i in kept], out)
    for i, one, (trace,) in zip(kept, out, traces, strict=True):
        check(one.outputs[0], trace, texts[i], model, tokenizer, max_new_tokens=STEPS)


def allowed(tokenizer, *characters):
    """Settings for vLLM and for transformers that leave these tokens only."""
    ids = tokenizer.convert_tokens_to_ids(list(characters))
    return {"allowed_token_ids": ids}, {"suppress_tokens": [i for i in range(64) if i not in ids]}


@pytest.mark.parametrize(
    "characters, pieces",
    [
        (("#", "a", "b", "c"), {"#"}),  # split into two tokens
        (("1#", "#", "a", "b"), {"1#", "#"}),  # begins inside a token
        (("##", "a", "b", "c"), {"##"}),  # one token
        (("##",), {"##"}),  # the first token
        (("a", "b", "c", "1"), set()),  # never
    ],
)
def test_the_thinking_ends_with_the_delimiter(llm, model, tokenizer, characters, pieces):
    ours, theirs = allowed(tokenizer, *characters)
    count, ended = 5, 0
    out, traces = run(llm, [sampling(max_tokens=STEPS, **ours) for _ in range(count)])
    for text, one, (trace,) in zip(prompts(count), out, traces, strict=True):
        check(one.outputs[0], trace, text, model, tokenizer, max_new_tokens=STEPS, **theirs)
        thought = trace.thinking_mask[0].sum()
        ended += int(thought < STEPS)
        assert (DELIMITER in tokenizer.decode(one.outputs[0].token_ids)) == (thought < STEPS)
        if characters == ("##",):
            assert thought == 0
    assert (ended > 0) == bool(pieces)


def test_each_way_to_end(llm, model, tokenizer):
    """One token, a token that stops, a text that stops, EOS first, EOS ignored."""
    text = prompts(6)[5]
    wanted, _ = alone(model, tokenizer, text, max_new_tokens=STEPS)
    third = wanted[2]
    first_eos = {"allowed_token_ids": [1]}
    cases = [
        (sampling(max_tokens=1), {"max_new_tokens": 1}),
        (sampling(stop_token_ids=[third]), {"max_new_tokens": STEPS, "eos_token_id": [1, third]}),
        (
            sampling(stop=[tokenizer.decode([third])]),
            {"max_new_tokens": STEPS, "stop_strings": [tokenizer.decode([third])], "tokenizer": tokenizer},
        ),
        (sampling(**first_eos), {"max_new_tokens": STEPS, "suppress_tokens": [0, *range(2, 64)]}),
        (
            sampling(max_tokens=4, ignore_eos=True, **first_eos),
            {"max_new_tokens": 4, "suppress_tokens": [0, *range(2, 64)], "eos_token_id": None},
        ),
    ]
    out, traces = run(llm, [params for params, _ in cases], [text] * len(cases))
    lengths = [len(one.outputs[0].token_ids) for one in out]
    assert lengths == [1, wanted.index(third) + 1, wanted.index(third) + 1, 1, 4]
    for one, (trace,), (_, settings) in zip(out, traces, cases, strict=True):
        check(one.outputs[0], trace, text, model, tokenizer, **settings)


def test_nothing_is_kept_of_requests_that_ended(llm):
    from vllm import SamplingParams

    slots = worker(llm).slots
    texts = [{"prompt_token_ids": text} for text in prompts(7)]
    run(llm, [sampling(max_tokens=3) for _ in texts])
    llm.generate(texts, SamplingParams(max_tokens=3, temperature=1.0), use_tqdm=False)
    run(llm, [sampling(max_tokens=2)])
    assert len(slots.requests) == 1  # vLLM tells its worker of the last request that ended only with the next step
    assert not slots._ended


def test_requests_that_share_a_trace_are_an_error(llm):
    """vLLM has one list of traces for both; nothing is taken, so that the traces can still be had."""
    from unsloth_ext import take_traces

    shared = sampling(max_tokens=2)
    out = llm.generate([{"prompt_token_ids": text} for text in prompts(2)], shared, use_tqdm=False)
    for params in ([shared, shared], [shared], [shared, type(shared)()]):
        with pytest.raises(ValueError, match=r"params: each request needs its own SamplingParams, made by traced"):
            take_traces(llm, params, out)
    assert len(worker(llm).take_thinking_traces([shared.extra_args["thinking_trace"]])[0]) == 2


def test_parameters_and_outputs_of_other_calls_are_an_error(llm, model, tokenizer):
    """Nothing is taken, so that the traces can still be had."""
    from unsloth_ext import take_traces

    texts = prompts(3)
    inputs = [{"prompt_token_ids": text} for text in texts]
    sampled = {"temperature": 1.0, "n": 2}
    params = [sampling(max_tokens=STEPS, **more) for more in ({}, {}, sampled)]
    out = llm.generate(inputs, params, use_tqdm=False)
    with pytest.raises(ValueError, match=r"params\[0\] are those of request \d+, and outputs\[0\] is of \d+: give the"):
        take_traces(llm, [params[1], params[0], params[2]], out)
    traces = take_traces(llm, params, out)
    for text, one, (trace,) in zip(texts[:2], out[:2], traces[:2], strict=True):
        check(one.outputs[0], trace, text, model, tokenizer, max_new_tokens=STEPS)
    for completion, trace in zip(out[2].outputs, traces[2], strict=True):
        check_sampled(completion, trace, texts[2], model)
    with pytest.raises(ValueError, match=r"params\[0\]: the engine has no trace of request \d+; it was taken already"):
        take_traces(llm, params, out)
    llm.generate(inputs, params, use_tqdm=False)
    again = llm.generate(inputs, params, use_tqdm=False)
    with pytest.raises(
        ValueError, match=r"params\[0\] are those of request \d+, \d+, .* each call parameters of its own"
    ):
        take_traces(llm, params, again)
    assert [
        len(part) for part in worker(llm).take_thinking_traces([p.extra_args["thinking_trace"] for p in params])
    ] == [2, 2, 4]


def test_log_probs_of_the_prompt_do_not_disturb_the_thinking(llm, model, tokenizer):
    text = prompts(4)[3]
    (one,), ((trace,),) = run(llm, [sampling(max_tokens=STEPS, prompt_logprobs=0)], [text])
    check(one.outputs[0], trace, text, model, tokenizer, max_new_tokens=STEPS)
