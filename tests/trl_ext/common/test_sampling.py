"""Rollouts from another distribution than the loss computes: said by name, wherever the setting comes from."""

import http.server
import inspect
import threading
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from tests.trl_ext.hrpo import setups
from tests.trl_ext.ppo import setups as ppo_setups
from trl_ext import HRPOConfig
from trl_ext.common.sampling import UNCHANGED, UNCHANGED_IN_VLLM, rollout_config, warn_of_truncation
from trl_ext.common.sampling import _check_vllm_kwargs as check_vllm_kwargs
from trl_ext.common.sampling import _wait_for_server as wait_for_server


pytestmark = pytest.mark.usefixtures("transformers_warnings")


def named(caplog) -> list[str]:
    return [r.message.partition("=")[0] for r in caplog.records if "that rollouts are sampled from" in r.message]


@pytest.mark.parametrize(
    "changes, fields",
    [
        ({}, []),
        ({"temperature": 0.7}, []),
        ({"top_k": 5}, ["top_k"]),
        ({"top_p": 0.9, "repetition_penalty": 1.1}, ["top_p", "repetition_penalty"]),
        ({"min_p": 0.1}, ["min_p"]),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, ["no_repeat_ngram_size"]),
        ({"generation_kwargs": {"temperature": 0.5}}, ["temperature"]),  # the loss has the other one
        ({"temperature": 0.5, "generation_kwargs": {"temperature": 0.5, "do_sample": False}}, ["do_sample"]),
    ],
)
def test_settings_of_the_trainer(tmp_path, caplog, changes, fields):
    setups.hrpo(tmp_path, **changes)
    assert named(caplog) == fields
    caplog.clear()
    ppo_setups.ppo(tmp_path, **changes)
    assert named(caplog) == fields


@pytest.mark.parametrize(
    "changes, fields",
    [
        ({"generation_kwargs": {"stop": ["a"], "max_tokens": 3, "presence_penalty": 0.0}}, []),
        ({"min_p": 0.1, "generation_kwargs": {"top_k": 4}}, ["top_k", "min_p"]),
        ({"generation_kwargs": {"presence_penalty": 0.5, "bad_words": ["a"]}}, ["presence_penalty", "bad_words"]),
        ({"generation_kwargs": {"logit_bias": {5: 1.0}, "min_tokens": 2}}, ["min_tokens", "logit_bias"]),
        ({"vllm_structured_outputs_regex": "[0-9]+"}, ["vllm_structured_outputs_regex"]),
    ],
)
def test_settings_of_rollouts_in_vllm(tmp_path, caplog, changes, fields):
    args = setups.arguments(HRPOConfig, tmp_path, temperature=0.8, **changes)
    assert warn_of_truncation(rollout_config(SimpleNamespace(use_vllm=True, args=args)), 0.8) == fields
    assert named(caplog) == fields


@pytest.mark.vllm
def test_every_setting_of_vllm_that_changes_the_distribution_is_known():
    """A new one must be looked at."""
    from vllm import SamplingParams

    harmless = {
        *("n", "seed", "logprobs", "temperature", "stop", "stop_token_ids", "ignore_eos", "max_tokens"),
        *("prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start", "logprob_token_ids", "flat_logprobs"),
        *("detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"),
        *("output_kind", "stream_interval", "skip_clone", "output_text_buffer_length", "extra_args"),
        *("skip_reading_prefix_cache", "repetition_detection", "routed_experts_prompt_start"),
        "watermarking",  # by an engine that TRL does not make
    }
    known = {*UNCHANGED, *UNCHANGED_IN_VLLM}
    public = {name for name in inspect.signature(SamplingParams).parameters if not name.startswith("_")}
    assert not public - harmless - known
    assert UNCHANGED_IN_VLLM.keys() - {"vllm_structured_outputs_regex"} <= public


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"n": 2}, r"generation_kwargs: n=2: TRL asks for one completion for each row .*, and leave n out"),
        ({"logprobs": 5}, "generation_kwargs: logprobs=5: TRL would take"),
        ({"seed": 0}, "generation_kwargs: seed=0: each completion of a group would be the same"),
    ],
)
def test_settings_of_vllm_that_cannot_be_given(tmp_path, kwargs, message):
    def arguments(**changes):
        return setups.arguments(HRPOConfig, tmp_path, generation_kwargs=kwargs, **changes)

    with pytest.raises(ValueError, match=message):
        check_vllm_kwargs(arguments())
    if "seed" in kwargs:
        check_vllm_kwargs(arguments(vllm_mode="server"))  # vLLM gives each completion a seed of its own


def test_settings_that_the_model_was_published_with(tmp_path, caplog):
    """`generate` takes min_p from the model, since the trainer leaves it open; training's states do too."""
    trainer = setups.hrpo(tmp_path)
    assert not trainer.warper.truncates
    trainer.model.generation_config.min_p = 0.3
    again = setups.hrpo(tmp_path, model=trainer.model, peft=False)
    assert named(caplog) == ["min_p"]
    scores = torch.tensor([[0.0, -0.5, -9.0]])
    assert again.warper(scores).isinf().tolist() == [[False, False, True]]


def test_every_field_of_generation_that_makes_a_logits_processor_is_known():
    """transformers builds its processors from these fields; a new one must be looked at."""
    from transformers.generation.utils import GenerationMixin

    source = inspect.getsource(GenerationMixin._get_logits_processor)
    used = {name for name in vars(GenerationConfig()) if f"generation_config.{name}" in source}
    harmless = {
        "temperature",  # compared with the loss's
        "max_length",
        "use_cache",
        "num_return_sequences",
        "renormalize_logits",
        "remove_invalid_values",
        "eos_token_id",
        "_eos_token_tensor",
        "_pad_token_tensor",
    }
    assert used - harmless <= UNCHANGED.keys(), used - harmless - UNCHANGED.keys()
    assert UNCHANGED.keys() <= vars(GenerationConfig()).keys()
    assert warn_of_truncation(GenerationConfig(temperature=0.7), 0.7) == []


@pytest.mark.parametrize("make", [setups.hrpo, ppo_setups.ppo], ids=["hrpo", "ppo"])
def test_settings_of_rollouts_that_would_be_passed_over_are_named(tmp_path, make):
    for given, said in (
        ({"min_new_token": 3}, r"'min_new_token': generate has no such setting; did you mean min_new_tokens"),
        ({"stop_strings": ["a"]}, "TRL passes no tokenizer"),
        ({"temperature": 0}, "temperature=0: must be more than 0"),
    ):
        with pytest.raises(ValueError, match=said):
            make(tmp_path, generation_kwargs=given)
    trainer = make(tmp_path, lr_scheduler_kwargs={"foo": 1}, lr_scheduler_type="cosine")
    with pytest.raises(ValueError, match=r"lr_scheduler_kwargs=\{'foo': 1\} do not fit lr_scheduler_type=cosine"):
        trainer.train()


@pytest.fixture
def answers():
    """What a server answers, one status after the other, and its address."""
    statuses = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(statuses.pop(0) if self.path == "/health" else 400)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield statuses, server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("by_url", [True, False])
def test_a_server_that_starts_is_waited_for(answers, caplog, monkeypatch, by_url):
    monkeypatch.setattr("time.sleep", lambda _: None)
    statuses, port = answers
    statuses += [503, 503, 200]
    url = f"http://127.0.0.1:{port}" if by_url else None
    place = {"vllm_server_base_url": url, "vllm_server_host": "127.0.0.1", "vllm_server_port": 9 if by_url else port}
    wait_for_server(SimpleNamespace(**place, vllm_server_timeout=30))
    assert not statuses
    assert [r.message for r in caplog.records] == [
        f"Waiting up to 30 s (vllm_server_timeout) for a server at http://127.0.0.1:{port}"
    ]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "localhost", "http://127.0.0.1:{port}"])
def test_a_missing_server_is_a_sentence(answers, url):
    """Nothing there, no URL, and something that is not vLLM."""
    statuses, port = answers
    statuses += [404]
    url = url.format(port=port)
    with pytest.raises(
        ValueError, match=rf"vllm_mode='server': no vLLM server answers at {url} \(.*vllm_server_base_url"
    ):
        wait_for_server(SimpleNamespace(vllm_server_base_url=url, vllm_server_timeout=0))
