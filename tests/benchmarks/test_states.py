"""The runs of bench_states that differ from HRPO's: soft tokens, and latent tokens."""

import pytest
from transformers import AutoModelForCausalLM

from benchmarks import bench_states
from benchmarks.bench_states import LATENTS
from tests.marks import slow
from trl_ext.tasks import reachability


REWARDED = f"{LATENTS}, then rewards"


@pytest.mark.parametrize("name", [REWARDED, slow("soft tokens, Gumbel"), slow("soft tokens, Gaussian")])
def test_a_run_measures_what_its_table_shows(tmp_path, monkeypatch, name):
    tokenizer = reachability.tokenizer()
    AutoModelForCausalLM.from_config(reachability.config(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    problems = reachability.split_problems(8, 0, 300)
    monkeypatch.setattr(bench_states, "warm_start_of", lambda seed: str(tmp_path))
    monkeypatch.setattr(reachability, "split_problems", lambda held_out, seed: problems)
    if name == REWARDED:
        monkeypatch.setitem(bench_states.RUNS, name, {"taught": 1, "rewarded": True})
    found = bench_states.run(name, 0, 1)
    kinds = {"greedy", "greedy_zero", "greedy_shuffle", "greedy_noise"}
    if name != REWARDED:
        kinds |= {kind.replace("greedy", "sampled") for kind in kinds} | {"greedy_hard", "sampled_hard"}
    assert kinds <= found.keys() and all(0 <= found[kind] <= 1 for kind in kinds) and found["seconds"] > 0
    page = bench_states.page({"results": {name: {"0": found}}, "made_with": {"steps": 1, "held_out": "8"}})
    assert f"| {name} | {found['greedy']:.1%} |" in page and f"| {name} | {found['greedy_zero']:.1%} |" in page
