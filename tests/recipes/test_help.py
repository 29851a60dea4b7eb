"""`--help` of every recipe: the method's flags first, in groups with titles, each explained, before anything is loaded."""

import re
import runpy
import sys
from pathlib import Path

import pytest


RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = sorted([*RECIPES.glob("*.py"), *RECIPES.glob("minimind/*.py")])
CHAINS = ("all", "hrpo_two_stage")  # which run others
# The first title of each, where it is not the shared one
FIRST = {
    "hrpo_gsm8k": "HRPO",
    "codi_gsm8k": "Latent tokens (CODI, PCCoT, KaVa, LOTUS, Coconut)",
    "pccot_gsm8k": "Latent tokens (CODI, PCCoT, KaVa, LOTUS, Coconut)",
    "kava_gsm8k": "Latent tokens (CODI, PCCoT, KaVa, LOTUS, Coconut)",
    "lotus_gsm8k": "Latent tokens (CODI, PCCoT, KaVa, LOTUS, Coconut)",
    "coconut_gsm8k": "Latent tokens (CODI, PCCoT, KaVa, LOTUS, Coconut)",
    "latent_grpo": "GRPO after latent tokens",
    "concept_v1": "Concept tokens",
    "concept_v2": "Concept tokens",
    "kv_distill": "KV distillation",
    "planner_executor": "Planner and executor",
    "profile_alignment": "Models, data and alignment",
    "distill": "Distillation of logits",
    "lora": "LoRA",
    "ppo": "PPO",
    "reason": "Distillation of reasoning",
    "spo": "SPO",
    "report": "Flags",
    "chat": "Dialogue",
    **dict.fromkeys(CHAINS, "options"),
}


def shown(script, flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), flag])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_help(script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for flag in ("--help",) if script.stem in CHAINS else ("--help", "--help-all"):
        text = shown(script, flag, monkeypatch, capsys)
        titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
        assert titles[0] == FIRST.get(script.stem, "Model, data and evaluation") and len(titles) == len({*titles})
        assert not any(re.search(r"(Arguments|Config)$", title) for title in titles)  # words, no classes
        flags = re.findall(r"^  (--\w+)", text, re.MULTILINE)
        assert len(flags) == len({*flags})
        for name in flags:
            assert re.search(rf"^  {name}( \S+)*(  +|\n {{20,}})\S", text, re.MULTILINE), name
    assert not list(tmp_path.iterdir())  # nothing was begun
