"""What trainers on each engine send to vLLM for a rollout. No engine of vLLM is needed."""

import pytest
import torch
from safetensors.torch import load_file

from tests.trl_ext.hrpo import setups as hrpo

from .launch import launch


CASES = ("hrpo", "hrpo, LoRA", "ppo, LoRA", "spo")


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """The folder in which a case ran on DDP, by case."""
    folders = {}

    def run(case):
        if case not in folders:
            folders[case] = tmp_path_factory.mktemp("case")
            hrpo.base_folder(folders[case])
            launch("ddp", case, folders[case], push=True)
        return folders[case]

    return run


@pytest.mark.engines
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("case", CASES)
def test_vllm_gets_the_policy(ddp, case, engine):
    """Merged adapters among it: the values of DDP, in each process."""
    folder = ddp(case)
    launch(engine, case, folder, push=True)
    expected = torch.load(folder / "ddp0.pushed.pt")
    for rank in range(2):
        found = torch.load(folder / f"{engine}{rank}.pushed.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # As in test_engines: HRPO's gates are clipped otherwise by DeepSpeed
            torch.testing.assert_close(
                found[name], value, rtol=1e-3, atol=3e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
    trained = "model.layers.0.self_attn.q_proj.weight"
    before = load_file(folder / "base-qwen3" / "model.safetensors")[trained]
    assert (expected[trained] - before).abs().max() > 1e-3  # far more than the tolerance
