"""`recipes/hrpo_gsm8k.py --use_vllm`: the configuration for a GPU as it is shipped, from the command line, and what it
refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from packaging.version import Version
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from tests.recipes.running import RECIPES, run_recipe
from tests.recipes.test_shipped_configs import CONFIGS, SHORT, save, write_rows
from unsloth_ext import FastThinkingModel


pytestmark = [pytest.mark.vllm, pytest.mark.v1]
RATIO = 1e-4  # float32; the same sums in another order, at a temperature of 0.5
FLAGS = [
    *("--config", str(RECIPES / "configs" / "hrpo_gsm8k.yaml"), "--model_name", "model", "--bf16", "false"),
    *(*SHORT, *CONFIGS["hrpo"][2], "--use_vllm", "--vllm_enable_sleep_mode", "false"),
]


def shell(folder, *flags):
    """Run the recipe in a process of its own, as from a shell."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, str(RECIPES / "hrpo_gsm8k.py"), *FLAGS, *flags]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr  # also not at exit, when the engine ends


def steps_of(checkpoint):
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "reward" in entry]
    for entry in steps:
        assert entry["thinking/ratio_deviation"] < RATIO
        assert abs(entry["sampling/importance_sampling_ratio/mean"] - 1) < RATIO
    return steps


@pytest.mark.slow
def test_it_trains_is_resumed_and_has_a_second_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("model", LlamaConfig, 2, 128)
    write_rows()
    fast = "--learning_rate", "1e-2", "--lr_residual_gate", "1e-2"  # what is not pushed would show
    first = *fast, "--lr_thinking_projection", "0"
    shell(tmp_path, *first, "--max_steps", "2")
    shell(tmp_path, *first, "--max_steps", "4", "--resume_from_checkpoint", "latest")
    second = "--lr_thinking_projection", "1e-2", "--init_from", "out/final", "--output_dir", "out_2"
    shell(tmp_path, *fast, *second, "--max_steps", "2")
    for name, steps in (("out", 4), ("out_2", 2)):
        folder = tmp_path / name
        entries = steps_of(folder / f"checkpoint-{steps}")
        assert [entry["step"] for entry in entries] == [*range(1, steps + 1)]
        assert (entries[-1]["thinking/projection_mean_change"] > 0) == (name == "out_2")
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["steps"] == steps and summary["n_eval"] == 4 and summary["before"] and summary["after"]
        assert (folder / "curves.png").stat().st_size > 10_000
        FastThinkingModel.from_pretrained(folder / "final")


@pytest.fixture
def run(monkeypatch, tmp_path):
    from tests import vllm_on_cpu  # noqa: F401

    monkeypatch.chdir(tmp_path)
    write_rows()
    with mock.patch.dict(os.environ):  # TRL sets those of several processes
        yield lambda *flags: run_recipe(monkeypatch, "hrpo_gsm8k.py", *FLAGS, "--max_steps", "1", *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--vllm_enable_sleep_mode", "true"],
            r"vllm_enable_sleep_mode=True: vLLM cannot sleep on this device \(cpu\)",
        ),
        (["--vllm_tensor_parallel_size", "2"], "vllm_tensor_parallel_size=2: it must divide the number of processes"),
        (["--vllm_mode", "both"], "vllm_mode='both': choose one of colocate, server"),
        (
            ["--vllm_mode", "server", "--vllm_server_base_url", "http://127.0.0.1:9", "--vllm_server_timeout", "0"],
            r"vllm_mode='server': no vLLM server answers at http://127\.0\.0\.1:9 ",
        ),
        (["--thinking", "false"], "use_vllm=True: TRL cannot push weights to vLLM's build for CPUs"),
        (["--generation_kwargs", '{"top_kk": 2}'], "generation_kwargs: 'top_kk': vLLM has no such setting"),
    ],
)
def test_refused_before_a_model_is_looked_for(run, flags, message):
    with pytest.raises(ValueError, match=message):
        run(*flags)
    assert not Path("out").exists()


def test_another_version_is_refused_first(run, monkeypatch):
    monkeypatch.setattr("patches.versions.installed_version", lambda _: Version("0.20.0"))
    with pytest.raises(ImportError, match=r"vllm 0\.20\.0 is not among the tested versions .*pip install"):
        run()
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "kind, width, flags, message",
    [
        (
            GPT2Config,
            128,
            ["--lora_target_modules", "c_attn", "--max_seq_length", "512"],
            "and not with GPT2LMHeadModel",
        ),
        (Qwen2Config, 96, [], r"use_vllm=True: head_dim=24: vLLM's attention on a CPU needs one of 32, "),
        (Qwen2Config, 128, ["--load_in_4bit", "true"], r"the model is quantised, .*load_in_4bit=False"),
        (Qwen2Config, 128, ["--vllm_max_model_length", "100"], "vllm_max_model_length=100: prompt 0 has 141 tokens"),
        (Qwen2Config, 128, ["--vllm_max_model_length", "4096"], r"max_model_len \(4096\) is greater than"),
    ],
    ids=["family", "heads", "quantised", "room", "longer than the model"],
)
def test_refused_before_training(run, kind, width, flags, message):
    save("model", kind, 2, width)
    with pytest.raises(ValueError, match=message):
        run(*flags)
    assert not list(Path("out").glob("checkpoint-*"))


def test_the_tiny_model_is_refused_before_it_is_taught(run, monkeypatch):
    monkeypatch.setattr("trl_ext.tasks.warm_start.tiny_warm_start", lambda *_, **__: pytest.fail("taught"))
    with pytest.raises(ValueError, match=r"use_vllm=True: head_dim=24: vLLM's attention on a CPU"):
        run_recipe(monkeypatch, "hrpo_gsm8k.py", "--use_vllm")
