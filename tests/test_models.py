"""The trained models of docs/models: they open, write what their pages say, and answer held-out questions."""

import itertools
import json
import random
import re
import runpy
from pathlib import Path

import pytest

from trl_ext.evaluation import command
from trl_ext.evaluation.compare import read_evaluation
from trl_ext.minimind import embedded
from trl_ext.tasks.arithmetic import split_problems
from unsloth_ext.common.model_card import changed_by_hand
from unsloth_ext.common.text_model import TextModel


MODELS = Path(__file__).parents[1] / "docs" / "models"
FOLDERS = sorted(path.name for path in MODELS.iterdir() if path.is_dir())

# Bounds for 40 held-out questions, by what is done to the latent steps. The pages have the accuracy of the whole set
BOUNDS = {
    "hrpo_sums": {"on": (0.8, 1), "zero": (0.8, 1), "off": (0.8, 1)},  # its states carry nothing
    "kava_equations": {"on": (0.8, 1), "zero": (0, 0.2), "shuffle": (0, 0.3), "off": (0.95, 1)},
    "pccot_equations": {"on": (0.95, 1), "zero": (0, 0.25), "off": (0.95, 1)},
    "codi_equations": {"on": (0.95, 1), "zero": (0, 0.3), "shuffle": (0, 0.35), "off": (0.95, 1)},
    "lotus_equations": {"on": (0.95, 1), "zero": (0, 0.3), "shuffle": (0, 0.35)},
    "kv_distill_equations": {"on": (0.95, 1)},
    "concept_facts": {"on": (0.9, 1)},
    "planner_facts": {"on": (0.95, 1), "shuffle": (0, 0.1)},
    "ppo_dialogue": {"on": (0.7, 1)},
    "spo_dialogue": {"on": (0.7, 1)},
    "distill_dialogue": {"on": (0.35, 0.75)},
    "reason_dialogue": {"on": (0.6, 0.9)},
}
TASKS = {"kv_distill_equations": "equations"}


def asked_in_dialogue(file: Path) -> str:
    """Sums that were kept out of MiniMind's stages, asked in words, as a file of the user's."""
    rows = embedded.questions(split_problems(embedded.Sizes().held_out, 0)[1], random.Random(0), True)
    turns = [row["conversations"] for row in itertools.islice(rows, 40)]
    file.write_text("".join(json.dumps({"question": a["content"], "answer": b["content"]}) + "\n" for a, b in turns))
    return f"gsm8k={file}"


@pytest.mark.parametrize("name", FOLDERS)
def test_it_answers_held_out_questions(name, tmp_path):
    bounds = BOUNDS[name]
    if name.endswith("_dialogue"):
        flags = [
            "--tasks",
            "gsm8k",
            "--data",
            asked_in_dialogue(tmp_path / "rows.jsonl"),
            "--max_new_tokens",
            "60",
            "--system_prompt",
            "",
        ]
    else:
        flags = ["--held_out", "40", *(["--tasks", TASKS[name]] if name in TASKS else [])]
    command.main([str(MODELS / name), "--output", str(tmp_path), "--states", *bounds, *flags])
    found = {row["state"]: row["accuracy"] for row in read_evaluation(str(tmp_path))["results"]}
    assert found.keys() == bounds.keys()
    assert all(low <= found[state] <= high for state, (low, high) in bounds.items()), found


@pytest.mark.parametrize("name", FOLDERS)
def test_its_page_is_right(name, tmp_path, monkeypatch, capsys):
    """What it writes, greedy; the code that opens it; it is small; and nobody's folders are named."""
    monkeypatch.chdir(MODELS.parents[1])
    page = (MODELS / name / "README.md").read_text()
    examples = dict(re.findall(r"^\| `(.+)` \| `(.+)` \|$", page.partition("## How to open it")[0], re.MULTILINE))
    model = TextModel.from_pretrained(str(MODELS / name))
    for asked, written in examples.items():
        prompt = asked
        if model.tokenizer.chat_template:
            said = [{"role": "user", "content": asked}]
            prompt = model.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        tokens = model.complete(**model.tokenize([prompt]), max_new_tokens=60, do_sample=False)
        assert model.decode(tokens)[0].strip() == written.replace("\\n", "\n"), asked
    assert examples
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    script = tmp_path / "card.py"
    script.write_text(code)
    runpy.run_path(str(script))
    assert capsys.readouterr().out.strip()
    assert sum(file.stat().st_size for file in (MODELS / name).iterdir()) < 1.6e6
    assert not changed_by_hand(page), "make it by `latent-reasoning convert` and `card`"
    assert "## Results" in page and "## Training" in page and str(Path.home()) not in page
