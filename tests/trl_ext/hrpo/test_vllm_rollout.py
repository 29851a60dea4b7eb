"""What the trainer makes of an engine's traces. No engine is needed."""

import types

import torch

from tests import tiny
from trl_ext.hrpo.vllm_rollout import take_trace
from unsloth_ext import ThinkingConfig, attach_thinking


EOS = 1


def test_a_trace_ends_with_its_completion_and_its_last_token_does_not_think():
    model = tiny.from_config(tiny.config("qwen2"), std=0.1)
    attach_thinking(model, ThinkingConfig())
    width = model.config.hidden_size
    completions = [[5, EOS, 7, EOS], [6, 5], [], [8, 9, EOS]]  # EOS in the middle is one that the rollout went past
    log_probs = [[-0.1, -0.2, None, -0.4], [-1.0, -2.0], [], [-3.0, -4.0, -5.0]]
    # vLLM may record one token more than there is, and names its requests in any order
    traces = [
        (
            f"{row}-0000000a",
            {"thinking_mask": torch.ones(5, dtype=torch.bool), "hidden_states": torch.full((5, width), row)},
        )
        for row in (2, 0, 3, 1)
    ]
    trainer = types.SimpleNamespace(
        model=model,
        fields=("hidden_states",),
        eos_token_ids=[EOS],
        accelerator=types.SimpleNamespace(device=torch.device("cpu"), process_index=0),
        vllm_generation=types.SimpleNamespace(
            mode="colocate",
            tensor_parallel_size=1,
            llm=types.SimpleNamespace(collective_rpc=lambda name, args: [[traces]]),
        ),
    )
    trace = take_trace(trainer, "a", completions, log_probs)
    assert trace.thinking_mask.tolist() == [
        [True, True, True, False],
        [True, True, False, False],
        [False] * 4,
        [True, True, False, False],
    ]
    assert [row.count_nonzero().item() for row in trace.hidden_states[..., 0]] == [0, 2, 0, 3]
    assert trace.hidden_states[:, 0, 0].tolist() == [0, 1, 0, 3] and trace.hidden_states.dtype == torch.float32
    assert torch.equal(trace.log_probs[0].isnan(), torch.tensor([False, False, True, False]))
    assert trace.log_probs[3, :3].tolist() == log_probs[3]
