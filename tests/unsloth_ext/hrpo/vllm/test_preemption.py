"""Too little memory for all requests: vLLM preempts some and computes their completions again, in chunks."""

import pytest

from .engines import alone, check, check_sampled, checkpoint, engine, run, sampling, worker


pytestmark = pytest.mark.vllm
STEPS = 16
COUNT = 6
TEXTS = [
    [5 + (7 * i + j) % 40 for j in range(22 + i)] for i in range(COUNT)
]  # the second block begins while they decode


@pytest.fixture(scope="module", params=["projection", "soft_embedding"])
def saved(request):
    return checkpoint(source=request.param)


@pytest.fixture(scope="module")
def llm(saved):
    # 6 blocks of 32 tokens for 5 texts of two blocks each, and at most 11 tokens a step
    small = {"block_size": 32, "num_gpu_blocks_override": 7, "max_num_batched_tokens": 11, "max_model_len": 64}
    with engine(saved[1], **small) as made:
        yield made


@pytest.fixture
def preemptions(llm, monkeypatch):
    """The names of the requests that were preempted."""
    slots, names = worker(llm).slots, []
    remove = slots.remove

    def seeing(name):
        freed = remove(name)
        names.extend([name] if freed else [])
        return freed

    monkeypatch.setattr(slots, "remove", seeing)
    return names


def test_preempted_requests_decode_the_same(llm, saved, preemptions):
    model, _, tokenizer = saved
    out, traces = run(llm, [sampling(max_tokens=STEPS, ignore_eos=True) for _ in range(COUNT)], TEXTS)
    assert len(preemptions) > 1
    for text, one, (trace,) in zip(TEXTS, out, traces, strict=True):
        check(one.outputs[0], trace, text, model, tokenizer, max_new_tokens=STEPS, eos_token_id=None)


def test_sampled_requests_that_were_preempted_score_the_same_in_training(llm, saved, preemptions):
    warp = {"temperature": 0.9, "top_k": 20}
    out, traces = run(
        llm, [sampling(max_tokens=STEPS, ignore_eos=True, n=2, **warp) for _ in range(COUNT // 2)], TEXTS[: COUNT // 2]
    )
    assert preemptions
    for text, one, parts in zip(TEXTS, out, traces, strict=False):
        for completion, trace in zip(one.outputs, parts, strict=True):
            check_sampled(completion, trace, text, saved[0], **warp)


def test_requests_that_are_aborted_while_they_are_preempted(llm, saved, preemptions):
    """Their traces so far can be had, and their places serve others."""
    model, _, tokenizer = saved
    core, params, done = llm.llm_engine, [sampling(max_tokens=STEPS, ignore_eos=True) for _ in range(COUNT)], {}
    for i, text in enumerate(TEXTS):
        core.add_request(f"many{i}", {"prompt_token_ids": text}, params[i])
    while not preemptions:
        core.step()
    gone = int(preemptions[0].removeprefix("many").split("-")[0])
    core.abort_request([f"many{gone}"])
    while core.has_unfinished_requests():
        done |= {one.request_id: one for one in core.step() if one.finished}
    for i, text in enumerate(TEXTS):
        ((_, past),) = worker(llm).take_thinking_traces([params[i].extra_args["thinking_trace"]])[0]
        if i == gone:
            assert 0 < len(past["thinking_mask"]) < STEPS
        else:
            (one,) = done[f"many{i}"].outputs
            assert len(past["thinking_mask"]) >= len(one.token_ids)
            assert list(one.token_ids) == alone(model, tokenizer, text, max_new_tokens=STEPS, eos_token_id=None)[0]
    out, traces = run(llm, [sampling(max_tokens=5) for _ in range(COUNT)], TEXTS)
    for text, one, (trace,) in zip(TEXTS, out, traces, strict=True):
        check(one.outputs[0], trace, text, model, tokenizer, max_new_tokens=5)
    assert not worker(llm).slots._ended
