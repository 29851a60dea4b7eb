"""HRPOTrainer in two processes, with an engine in each or one over both."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.engines.launch import environment as environment_of
from tests.processes import ROOT, ranks

from .test_vllm import FAST, RATIO, base


pytestmark = pytest.mark.vllm
COLOCATE = {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.05, "vllm_max_model_length": 64}


def two_ranks(folder, engine="ddp", watched=False, **settings):
    """Run vllm_worker.py in two processes, and return what each found.

    At the end an engine fails. Both processes must end, with an error each. With `watched`, a process that fails ends the
    other one, as with torchrun.
    """
    command = [sys.executable, "-m", "tests.trl_ext.hrpo.vllm_worker", str(folder), engine, json.dumps(settings)]
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    of_engine = environment_of(engine) if engine != "ddp" else {}
    running = []
    try:
        for log, environment in zip(logs, ranks(2), strict=True):
            with log.open("w") as file:
                running.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=os.environ | of_engine | environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
        end = time.monotonic() + 400
        while None in (codes := [process.poll() for process in running]) and time.monotonic() < end:
            if watched and any(codes):
                for process in running:
                    process.terminate()
            time.sleep(0.5)
    finally:
        for process in running:
            process.kill()
    texts = [log.read_text() for log in logs]
    files = [folder / f"rank{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), "\n".join(text[-3000:] for text in texts)
    assert 1 in codes and {*codes} <= {1, -signal.SIGTERM if watched else 1}
    failed = "the vLLM engine failed in the rollout of step"
    assert any(f"{failed} {settings['max_steps'] + 1} (RuntimeError: out of memory)" in text for text in texts)
    return [json.loads(file.read_text()) for file in files]


def check(found, steps):
    """Check that each row got its own trace, and that the processes trained the same weights on other completions."""
    for rank in found:
        assert rank["equal"]
        assert len(rank["deviations"]) == steps + 1 and max(rank["deviations"]) < RATIO
    first, second = ([prompt for prompt, _ in rank["evaluated"]] for rank in found)
    # 3 prompts, 2 completions each, 4 rows a process: accelerate fills up with the first prompt
    assert len(first) == len(second) == 4 and len({*first, *second}) == 3 and first[:2] == second[2:]
    for one, other in zip(*(rank["trained"] for rank in found), strict=True):
        assert one[0] == other[0]  # the 8 completions of a prompt are made in both processes
    assert {text for _, text in found[0]["trained"]}.isdisjoint(text for _, text in found[1]["trained"])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_two_processes(tmp_path, size):
    """Two processes with one engine cannot notice that the other is gone, while they wait for it in shared memory."""
    settings = {**COLOCATE, **FAST, "model": base(tmp_path), "max_steps": 3}
    found = two_ranks(tmp_path, watched=size == 2, vllm_tensor_parallel_size=size, **settings)
    check(found, steps=3)
    assert found[0]["changed"]


LORA = {"peft": True, "recompute": "rollout"}
STATES = {"peft": False, "recompute": "frozen"}  # a process makes them of its rows' hidden states
SOFT = {"peft": False, "recompute": "rollout", "thinking_source": "soft_embedding"}
SHARDED = [(engine, case) for engine in ("fsdp2", "zero3") for case in (LORA, STATES, SOFT)] + [("zero2", LORA)]


def sharded(folder, engine, case):
    """Weights are gathered for each push, adapters merged, so the ratio stays 1 while all weights change."""
    settings = {**COLOCATE, **FAST, "model": base(folder), "max_steps": 3, **case}
    found = two_ranks(folder, engine, watched=True, **settings)
    check(found, steps=3)
    assert found[0]["changed"]


def test_sharded_weights_and_an_adapter(tmp_path):
    sharded(tmp_path, *SHARDED[0])


@pytest.mark.slow
@pytest.mark.parametrize("engine, case", SHARDED[1:])
def test_sharded_weights(tmp_path, engine, case):
    sharded(tmp_path, engine, case)
