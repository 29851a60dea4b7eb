"""What one expects of an SFTTrainer: callbacks, metrics of one's own, pushing, several evaluation sets, the constructor."""

import inspect

from datasets import Dataset
from trl import SFTTrainer

from tests import tiny
from tests.processes import fresh
from trl_ext import PlannerExecutorConfig, PlannerExecutorTrainer
from unsloth_ext import PlannerExecutorModel

from . import setups


def test_evaluation_takes_rows_as_they_come(tmp_path):
    trainer = setups.trainer(tmp_path)
    fresh = trainer.evaluate(Dataset.from_list(setups.ROWS[:8]))
    assert fresh["eval_loss"] == trainer.evaluate()["eval_loss"] == trainer.evaluate(trainer.eval_dataset)["eval_loss"]


def test_the_constructor_is_sfttrainers(tmp_path, monkeypatch):
    """Arguments by position, by keyword, and a model by name."""
    rows, tokenizer = Dataset.from_list(setups.ROWS), tiny.tokenizer(())
    args = PlannerExecutorConfig(**setups.settings(tmp_path / "a"))
    trainer = PlannerExecutorTrainer(tiny.model(), args, None, rows, rows, tokenizer)
    assert len(trainer.train_dataset) == len(trainer.eval_dataset) == len(rows)
    assert inspect.signature(PlannerExecutorTrainer.__init__).parameters.keys() <= {
        *inspect.signature(SFTTrainer.__init__).parameters,
        "others",
        "keywords",
    }
    tiny.model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lora = setups.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    named = PlannerExecutorTrainer(str(tmp_path / "model"), args, train_dataset=rows, peft_config=lora)
    named.train()
    assert lora.modules_to_save is None  # the caller's stays as it is
    assert any("unified_head" in name for name, p in named.model.named_parameters() if p.requires_grad)


def test_conversations_are_prompt_and_completion(tmp_path):
    tokenizer = tiny.tokenizer(())
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}q {{ m.content }} a {% else %}{{ m.content }}<eos>{% endif %}"
        "{% endfor %}"
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{a}+1"}],
            "completion": [{"role": "assistant", "content": f"{a + 1}"}],
        }
        for a in range(1, 9)
    ]
    trainer = setups.trainer(tmp_path, rows=rows, tokenizer=tokenizer, max_steps=1)
    row = trainer.train_dataset[0]
    assert [tokenizer.decode(row[name]) for name in ("plan_ids", "text_ids")] == ["q 1+1 a ", "2<eos>"]
    trainer.train()


SCRIPT = """
import sys
from unsloth_ext import PlannerExecutorModel
for folder in sys.argv[1:]:
    print(PlannerExecutorModel.from_pretrained(folder).plan(["1+9=", "2++3="]).tolist())
"""


def test_what_is_saved_loads_in_a_fresh_process(tmp_path):
    """Final folders and checkpoints, with LoRA and without; plans are the trained model's."""
    folders, wanted = [], []
    for peft in (True, False):
        here = tmp_path / str(peft)
        base = tiny.model(std=0.15)
        base.save_pretrained(here / "base")
        base.name_or_path = base.config._name_or_path = str(here / "base")
        trainer = setups.trainer(
            here / "run", peft, model=base, max_steps=6, learning_rate=3e-2, save_strategy="steps", save_steps=6
        )
        trainer.train()
        trainer.save_model(str(here / "final"))
        plans = PlannerExecutorModel(trainer.model.eval(), tiny.tokenizer(())).plan(["1+9=", "2++3="]).tolist()
        folders += [here / "final", here / "run" / "checkpoint-6"]
        wanted += [str(plans)] * 2
    done = fresh("-c", SCRIPT, *folders)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().split("\n")[-4:] == wanted and len(set(wanted)) == 2
    for folder in folders:
        assert not {f.suffix for f in folder.iterdir()} & {".bin", ".pt", ".pkl"}
