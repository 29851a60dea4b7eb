"""What one expects of an SFTTrainer: callbacks, metrics of one's own, pushing, several evaluation sets, the constructor."""

import inspect

import pytest
import torch
from datasets import Dataset
from trl import SFTTrainer

from tests import tiny
from trl_ext import KVDistillConfig, KVDistillTrainer

from . import setups


def test_the_constructor_is_sfttrainers(tmp_path, monkeypatch):
    """Arguments by position, and a configuration of one's own where none is given."""
    monkeypatch.chdir(tmp_path)
    rows, tokenizer = Dataset.from_list(setups.ROWS), tiny.tokenizer(())
    args = KVDistillConfig(output_dir="a", use_cpu=True, bf16=False, answer_delimiter="##", lambda_kv=0.5)
    trainer = KVDistillTrainer(tiny.model(), args, None, rows, rows, tokenizer, teacher_model=setups.teacher())
    assert len(trainer.train_dataset) == len(trainer.eval_dataset) == len(rows)
    ours = {n for n, p in inspect.signature(KVDistillTrainer.__init__).parameters.items() if p.kind == p.KEYWORD_ONLY}
    assert ours == {"teacher_model", "teacher_processing_class"}
    assert not ours & inspect.signature(SFTTrainer.__init__).parameters.keys()
    with pytest.raises(ValueError, match="needs a KVDistillConfig"):
        KVDistillTrainer(tiny.model(), setups.LoraConfig(), train_dataset=rows)


def test_a_conversation_has_its_segments(tmp_path):
    """By the chat template: user and template are the prompt."""
    tokenizer = tiny.tokenizer(())
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}q {{ m.content }} a {% else %}{{ m.content }}<eos>{% endif %}"
        "{% endfor %}"
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{a}+1"}],
            "completion": [{"role": "assistant", "content": f"so {a + 1}##{a + 1}"}],
        }
        for a in range(1, 9)
    ]
    trainer = setups.trainer(tmp_path, rows=rows, tokenizer=tokenizer, max_steps=1)
    row = trainer.train_dataset[0]
    ids, segments = torch.tensor(row["input_ids"]), torch.tensor(row["segment_ids"])
    texts = [tokenizer.decode(ids[segments == s]) for s in range(3)]
    assert texts[0].startswith("q ") and texts[1].endswith("##") and texts[2] == texts[1][3:-2] + "<eos>"
    trainer.train()
