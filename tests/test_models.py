"""The trained models of docs/models: they open, answer held-out questions, and their ablations say what the pages say."""

import re
import runpy
from pathlib import Path

import pytest

from trl_ext.evaluation import command
from trl_ext.evaluation.compare import read_evaluation


MODELS = Path(__file__).parents[1] / "docs" / "models"


def accuracies(folder, out, *flags):
    command.main([str(folder), "--held_out", "40", "--output", str(out), *flags])
    return {row["state"]: row["accuracy"] for row in read_evaluation(str(out))["results"]}


def test_hrpo_adds_and_its_states_carry_nothing(tmp_path):
    """40 sums that were kept out of its training. In training it had 95.0% of 200, in each state."""
    found = accuracies(MODELS / "hrpo_sums", tmp_path, "--states", "on", "zero", "off")
    assert found["on"] >= 0.85 and abs(found["on"] - found["zero"]) <= 0.05 and abs(found["on"] - found["off"]) <= 0.05


def test_kava_answers_with_latent_tokens_that_matter(tmp_path):
    """40 questions that were kept out of its training. In training it had 93.0% of 200, and 3.0% with zeros."""
    found = accuracies(MODELS / "kava_equations", tmp_path, "--states", "on", "zero", "shuffle", "off")
    assert found["on"] >= 0.8 and found["zero"] <= 0.2 and found["shuffle"] <= 0.3 and found["off"] >= 0.95


@pytest.mark.parametrize("folder", sorted(path for path in MODELS.iterdir() if path.is_dir()), ids=lambda f: f.name)
def test_the_card_opens_its_model(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(MODELS.parents[1])
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    script = tmp_path / "card.py"
    script.write_text(code)
    runpy.run_path(str(script))
    assert capsys.readouterr().out.strip()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1.3e6
