"""What an evaluation says, against each text by itself."""

import math
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from trl_ext.planner import monitors
from trl_ext.planner.evaluation import _perplexity, evaluate_plans
from unsloth_ext import PlannerExecutorModel, execute_plan, executor_prefix, plan, plan_lengths
from unsloth_ext.planner.executor import executor_forward

from . import setups


@pytest.mark.parametrize("mode, count", [("generate", None), ("reconstruct", None), ("generate", 2)])
def test_every_figure_is_the_texts_own(tmp_path, mode, count):
    """1e-5: of texts of different lengths, all in one batch, so that random and shuffled plans are known."""
    trainer = setups.trainer(tmp_path, mode=mode)
    net, tokenizer = trainer.model.eval(), trainer.processing_class
    rows = setups.Dataset.from_list([{**row, "answer": row["completion"]} for row in setups.ROWS[::3][:count]])
    n = len(rows)
    found = evaluate_plans(net, tokenizer, rows, mode=mode, max_new_tokens=5, batch_size=n, show=2)
    texts = [row["prompt"] + row["completion"] if mode == "reconstruct" else row["completion"] for row in rows]
    reads = texts if mode == "reconstruct" else [row["prompt"] for row in rows]
    plans = torch.cat([plan(net, tokenizer(text, return_tensors="pt")["input_ids"]) for text in reads])
    generator = torch.Generator().manual_seed(0)
    drawn = monitors.random_like(plans, [5, 4], generator)
    others = monitors.shuffled(plans, generator)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}

    def nll(text, one, null=False):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        logits = net.lm_head(executor_forward(net, executor_prefix(net, one, torch.tensor([null])), ids))[0]
        return F.cross_entropy(logits, ids[0], reduction="none"), logits.argmax(-1) == ids[0]

    def written(one):
        out = execute_plan(net, one, max_new_tokens=5, do_sample=False, **ends)[0]
        return tokenizer.decode(out, skip_special_tokens=True)

    with torch.no_grad():
        own, hits = (torch.cat(x) for x in zip(*(nll(t, plans[i : i + 1]) for i, t in enumerate(texts))))
        without = torch.cat([nll(t, plans[i : i + 1], null=True)[0] for i, t in enumerate(texts)])
        shuffled, chance = (torch.cat([nll(t, p[i : i + 1])[0] for i, t in enumerate(texts)]) for p in (others, drawn))
    lengths = plan_lengths(plans).double().mean(0).tolist()
    for name, value in {
        "nll": own.mean(),
        "nll_null": without.mean(),
        "nll_shuffled": shuffled.mean(),
        "nll_random": chance.mean(),
        "token_accuracy": hits.double().mean(),
        "explained_bits": (without - own).sum() / n / math.log(2),
        "bits": lengths[0] * math.log2(5) + lengths[1] * 2,
        "ratio": len(own) / n / sum(lengths),
        "distinct": len({str(p.tolist()) for p in plans}) / n,
        "accuracy": sum(written(plans[i : i + 1]).strip() == t.strip() for i, t in enumerate(texts)) / n,
    }.items():
        assert getattr(found, name) == pytest.approx(float(value), rel=1e-5), name
    numbers = found.numbers()
    assert found.samples and set(vars(found)) - set(numbers) == {"samples"} and numbers["nll"] == found.nll
    assert found.lengths == pytest.approx(dict(zip("ab", lengths)))
    for i, name in enumerate("ab"):
        counts = Counter(code for code in plans[:, i].flatten().tolist() if code >= 0)
        shares = [count / counts.total() for count in counts.values()]
        assert found.perplexity[name] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert [sample[0] for sample in found.samples] == texts[:2]
    assert [sample[2] for sample in found.samples] == [written(plans[i : i + 1]) for i in (0, 1)]


def test_a_text_is_right_by_its_answer_or_else_as_a_whole(tmp_path, monkeypatch):
    trainer = setups.trainer(tmp_path)
    row = {"prompt": "1+2=", "completion": "3 ##3", "answer": "3"}
    for written, delimiter, right in (
        ("2 ##3", "##", 1),
        ("3 ##3", None, 1),
        ("2 ##3", None, 0),
        ("3", "##", 0),
        ("3", None, 0),
    ):
        monkeypatch.setattr(PlannerExecutorModel, "execute", lambda *_, text=written, **__: [text] * 2)
        found = evaluate_plans(
            trainer.model.eval(),
            trainer.processing_class,
            setups.Dataset.from_list([row] * 2),
            delimiter=delimiter,
            max_new_tokens=5,
        )
        assert found.accuracy == found.random_accuracy == right, (written, delimiter)


def test_perplexity_of_few_concepts():
    """Of none at all it is 1, as of one."""
    for ids, wanted in (([-1, -1], 1.0), ([3, -1], 1.0), ([3, 0], 2.0)):
        assert _perplexity(torch.tensor([ids]), 5) == pytest.approx(wanted)
