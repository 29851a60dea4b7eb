"""Answers decoded by vLLM against those of transformers."""

import contextlib
import copy
import functools
import gc

import pytest
import torch
from transformers import GenerationConfig

from unsloth_ext import LatentEngine, LatentModel, backbone_of, latent_generate
from unsloth_ext.latent.engine import sampling_params, save_merged

from .adapted import METHODS, adapted, change
from .test_phase import questions


pytestmark = pytest.mark.vllm
STEPS = 12
# Sums in another order, in fp32
LOG_PROBS = {"rtol": 0, "atol": 1e-4}
make = functools.partial(adapted, wide=True)


@contextlib.contextmanager
def engine_of(model, **settings):
    """An engine in this process, gone at the end of the block."""
    from tests import vllm_on_cpu  # noqa: F401, I001
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LatentEngine(
        model, enforce_eager=True, max_model_len=128, max_num_seqs=5, kv_cache_memory_bytes=1 << 24, **settings
    )
    try:
        yield engine
    finally:
        engine.close()
        cleanup_dist_env_and_memory()
        gc.collect()


def greedy(**settings):
    return {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **settings}


def check_equal(model, engine, **settings):
    ids, mask = questions()
    wanted = latent_generate(model, ids, mask, **greedy(**settings))
    found = latent_generate(model, ids, mask, engine=engine, **greedy(**settings))
    assert torch.equal(found, wanted)
    return wanted


@pytest.mark.parametrize(("family", "method"), [("llama", "CODI"), ("gpt2", "PCCoT"), ("gemma", "KaVa")])
def test_greedy_answers_are_those_of_transformers(family, method):
    """Ragged questions, with and without an end token, until the answers have ended."""
    model, _ = make(family, **METHODS[method])
    with engine_of(model) as engine:
        plain = check_equal(model, engine)[:, -STEPS:]
        assert len(plain.unique(dim=0)) == 3
        end = plain[0, 4].item()
        ended = check_equal(model, engine, eos_token_id=[end, 1])
        later = check_equal(model, engine, eos_token_id=end, min_new_tokens=8)
        assert (ended[0, -STEPS:] == end).any() and not torch.equal(ended, later)
        check_equal(model, engine, max_new_tokens=1)


def test_new_weights_are_used_at_the_next_call(monkeypatch):
    """By the same engine. If it computed something else than the model, it would be stopped."""
    model, _ = make(tied=False)
    with engine_of(model) as engine:
        before = check_equal(model, engine)
        llm = engine.llm
        change(model)
        assert not torch.equal(check_equal(model, engine), before)
        model.base_model.disable_adapter_layers()
        check_equal(model, engine)
        assert engine.llm is llm
        model.base_model.enable_adapter_layers()

        def save_other(model, folder):
            other = copy.deepcopy(model)
            with torch.no_grad():
                other.get_output_embeddings().weight.mul_(1.05)
            save_merged(other, folder)

        monkeypatch.setattr("unsloth_ext.latent.engine.save_merged", save_other)
        with pytest.raises(RuntimeError, match="Qwen2ForCausalLM: vLLM's log-probs"):
            check_equal(model, engine)
        assert engine.llm is None


def test_an_engine_with_a_tied_head_starts_again_on_a_cpu():
    """There vLLM packs the head, and reloading would leave its rows of the latent tokens as they were."""
    model, _ = make()
    with engine_of(model) as engine:
        before = check_equal(model, engine)
        llm = engine.llm
        change(model)
        assert not torch.equal(check_equal(model, engine), before)
        assert engine.llm is not llm


def test_an_answer_that_the_engine_has_no_room_for_is_refused():
    """vLLM would cut it."""
    model, _ = make("llama")
    with engine_of(model) as engine:
        room = 128 + 1 - check_equal(model, engine, max_new_tokens=1).shape[1]
        check_equal(model, engine, max_new_tokens=room)
        with pytest.raises(
            ValueError, match=rf"max_new_tokens={room + 1}: a question has {128 - room} tokens .* 128 in"
        ):
            check_equal(model, engine, max_new_tokens=room + 1)


def test_samples_follow_the_model():
    """Log-probs of sampled tokens are the model's under the same temperature, top-k and min-p; seeds are torch's."""
    from tests import vllm_on_cpu

    model, tokenizer = make()
    top_k = 0 if vllm_on_cpu.V2 else 20  # Triton's interpreter cannot run vLLM's kernel for it
    sampled = {"do_sample": True, "temperature": 0.8, "top_k": top_k, "min_p": 0.02, "num_return_sequences": 3}
    how = GenerationConfig(**greedy(**sampled))
    ids, mask = questions()
    prompt = ids.shape[1] + 2 + 5
    embed = backbone_of(model).get_input_embeddings()
    with engine_of(model, logprobs_mode="processed_logprobs") as engine:
        torch.manual_seed(3)
        out, state = latent_generate(model, ids, mask, engine=engine, return_state=True, **greedy(**sampled))
        torch.manual_seed(3)
        params = sampling_params(how, len(ids))
        for one in params:
            one.logprobs = 0
        thought = torch.tensor(backbone_of(model).latent_token_ids)[[0, 2]]
        bot, eot = embed(thought)[:, None].detach()
        prompts = [
            torch.cat([embed(row[real.bool()]).detach(), bot, latents, eot])
            for row, real, latents in zip(ids, mask, state.latents, strict=True)
        ]
        again = engine.llm.generate([{"prompt_embeds": one} for one in prompts], params, use_tqdm=False)
        rows = [one for request in again for one in request.outputs]
        assert [list(one.token_ids) for one in rows] == out[:, prompt:].tolist()
        assert len({tuple(one.token_ids) for one in rows[:3]}) == 3
        for i, one in enumerate(rows):
            front = torch.cat([prompts[i // 3], embed(torch.tensor(one.token_ids[:-1]))])[None]
            with torch.no_grad():
                logits = model(inputs_embeds=front).logits[0, -STEPS:] / 0.8
            logits[logits < logits.topk(top_k or logits.shape[1]).values[:, -1:]] = -torch.inf
            logits[logits.softmax(-1) < 0.02 * logits.softmax(-1).amax(-1, keepdim=True)] = -torch.inf
            wanted = logits.log_softmax(-1).gather(-1, torch.tensor(one.token_ids)[:, None])[:, 0]
            found = torch.tensor([next(iter(each.values())).logprob for each in one.logprobs])
            torch.testing.assert_close(found, wanted, **LOG_PROBS)
        loaded = LatentModel(model, tokenizer)
        texts = ["1+2=", "(3+4)*5="]
        short = {"max_new_tokens": 6, "do_sample": False}
        assert loaded.generate(texts, engine=engine, **short) == loaded.generate(texts, **short)
        assert loaded.generate(texts[0], engine=engine, **short) == loaded.generate(texts[0], **short)
        with pytest.raises(ValueError, match="engine: it was made for another model"):
            latent_generate(make()[0], ids, mask, engine=engine, **greedy())
