"""The GPU suite runs, as far as a machine without a GPU can tell."""

import importlib.util

import pytest
import torch

from tests.processes import fresh


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = fresh("benchmarks/gpu_check.py")
    assert done.returncode == 2 and "needs a CUDA GPU" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="unsloth is not installed")
def test_the_rehearsal_passes_on_both_backends():
    done = fresh("benchmarks/gpu_check.py", "--rehearse", imports=(), timeout=2500)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("stock", "unsloth"))]
    assert len(lines) == 36 and all(line.endswith("ok") for line in lines)
