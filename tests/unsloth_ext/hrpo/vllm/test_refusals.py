"""What vLLM cannot do with thinking states, and checkpoints that are not whole, are refused when the engine is made."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from unsloth_ext.hrpo.vllm.plugin import check_engine

from .engines import checkpoint, engine


pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds=True"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "decode_context_parallel_size=2"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config"),
        ({"kv_offloading_size": 1.0}, "kv_offloading_size=1.0"),
        ({"worker_cls": "some.other.Worker"}, "worker_cls='some.other.Worker'"),
        ({"runner": "pooling", "convert": "embed"}, "runner='pooling'"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, named):
    with pytest.raises(ValueError, match=f"{named}.*: vLLM cannot decode thinking states with it"):
        engine(checkpoint()[1], **settings).__enter__()


def test_soft_embeddings_need_the_whole_vocabulary():
    with pytest.raises(ValueError, match="tensor_parallel_size=2 with soft embeddings: vLLM cannot"):
        engine(checkpoint(source="soft_embedding")[1], tensor_parallel_size=2).__enter__()


def test_a_delimiter_that_the_tokenizer_cannot_write_is_an_error():
    with pytest.raises(ValueError, match="the tokenizer cannot produce the delimiter 'Ä'"):
        engine(checkpoint()[1], answer_delimiter="Ä").__enter__()


def test_a_family_that_vllm_cannot_think_with_is_an_error(tmp_path):
    shutil.copytree(checkpoint()[1], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2MoeForCausalLM"]}))
    with pytest.raises(
        ValueError, match="is a Qwen2MoeForCausalLM with thinking modules, and vLLM can think with Gemma"
    ):
        engine(tmp_path).__enter__()


def test_a_checkpoint_without_thinking_tensors_is_an_error_at_the_start(tmp_path):
    shutil.copytree(checkpoint()[1], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "thinking_projection" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the checkpoint lacks model\.thinking_projection\.weight$"):
        engine(tmp_path).__enter__()


def test_weights_that_a_trainer_never_pushed_are_an_error(tmp_path):
    shutil.copytree(checkpoint()[1], tmp_path, dirs_exist_ok=True)
    tensors = {n: v for n, v in load_file(tmp_path / "model.safetensors").items() if "thinking" not in n}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    message = r"the thinking modules have no weights: .*, and no trainer pushed them"
    with (
        engine(tmp_path, additional_config={"pushed_weights": True}) as llm,
        pytest.raises(ValueError, match=message),
    ):
        llm.generate([{"prompt_token_ids": [5, 6]}], use_tqdm=False)


def test_beam_search_is_refused():
    from vllm.sampling_params import BeamSearchParams

    with (
        engine(checkpoint()[1]) as llm,
        pytest.raises(ValueError, match="beam_search: it sends completions as prompts"),
    ):
        llm.beam_search([{"prompt_token_ids": [5]}], BeamSearchParams(beam_width=2, max_tokens=2))


@pytest.mark.v1
def test_the_older_model_runner_is_refused_where_there_is_a_gpu(monkeypatch):
    from vllm.platforms import current_platform

    with engine(checkpoint()[1]) as llm, monkeypatch.context() as patch:
        config = llm.llm_engine.vllm_config
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        check_engine(config)
        patch.setattr(type(current_platform), "is_cpu", lambda self: False)
        with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0: vLLM cannot decode thinking states with it"):
            check_engine(config)
