"""What an evaluation says, against each text by itself."""

import pytest
import torch
from torch.nn import functional as F

from tests import tiny
from trl_ext.concept.evaluation import _right, evaluate_concepts
from trl_ext.tasks import facts
from unsloth_ext import OnlineConceptConfig, attach_concepts, backbone_of

from . import setups


def made(keeps):
    net = setups.base()
    attach_concepts(net, OnlineConceptConfig(1, 2, 1, 16, 2, gate="factorised", max_tail=5, boundary_keeps_token=keeps))
    with torch.no_grad():
        backbone_of(net).concept_head.bias[-1] += torch.tensor(16.0).log()  # p near 1/2
    return net.eval()


@pytest.mark.parametrize("keeps", [False, True])
def test_every_figure_is_the_texts_own(keeps):
    """1e-5: of texts of different lengths, in batches of 3."""
    net, tokenizer = made(keeps), tiny.tokenizer(())
    rows = setups.Dataset.from_list([{**row, "answer": row["completion"]} for row in setups.ROWS[:8]])
    found = evaluate_concepts(net, tokenizer, rows, batch_size=3, max_new_tokens=4)
    nll, hits, after, others, tails, codes, written = [], [], [], [], [], [], 0
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
        out = backbone_of(net)(ids, use_cache=False)
        logits = net.lm_head(out.last_hidden_state)[0, :-1]
        each = F.cross_entropy(logits, ids[0, 1:], reduction="none")
        hits += (logits.argmax(-1) == ids[0, 1:]).tolist()
        concept = out.choice.concept[0]
        nll += each.tolist()
        after += each[concept[:-1]].tolist()
        others += each[~concept[:-1]].tolist()
        codes.append(out.choice.ids[0, concept])
        tail = 0
        for is_concept in concept.tolist():
            tail = 0 if is_concept else tail + 1
            tails.append(tail + keeps)
        prompt = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        new = net.generate(prompt, do_sample=False, max_new_tokens=4, pad_token_id=0, eos_token_id=1)[
            0, prompt.shape[1] :
        ]
        written += tokenizer.decode(new, skip_special_tokens=True).strip() == row["completion"].strip()
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    codes = torch.cat(codes)
    share = [codes[:, k].bincount(minlength=16) / len(codes) for k in (0, 1)]
    entropy = mean([-torch.special.xlogy(s, s).sum().item() for s in share])
    for name, value in {
        "nll": mean(nll),
        "token_accuracy": mean(hits),
        "bits": len(codes) * 2 * 4 / (len(nll) + 8),
        "nll_boundary": mean(after),
        "nll_tail": mean(others),
        "tail": mean(tails),
        "ratio": (len(nll) + 8) / len(codes),
        "perplexity": torch.tensor(entropy).exp().item(),
        "used": mean([(s > 0).float().mean().item() for s in share]),
        "accuracy": written / 8,
    }.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5), name
    assert 1 < found.ratio < 6 and found.nll_random != found.nll


def test_what_random_concepts_cost_is_told_by_who_reads_them():
    """1e-5: all tokens, and those that do not follow a concept."""
    net, tokenizer = made(False), tiny.tokenizer(())
    rows = setups.Dataset.from_list([{**row, "answer": row["completion"]} for row in setups.ROWS[:8]])
    found = evaluate_concepts(net, tokenizer, rows, batch_size=8, max_new_tokens=1)
    texts = [tokenizer(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"] for row in rows]
    drawn = torch.randint(16, (8, max(ids.shape[1] for ids in texts), 2), generator=torch.Generator().manual_seed(0))
    every, others = [], []
    for ids, codes in zip(texts, drawn):
        concept = backbone_of(net)(ids, use_cache=False).choice.concept[0]
        codes = codes[: len(concept)].masked_fill(~concept[:, None], 16)
        logits = net.lm_head(backbone_of(net)(ids, concepts=codes[None], use_cache=False).last_hidden_state)[0, :-1]
        each = F.cross_entropy(logits, ids[0, 1:], reduction="none")
        every += each.tolist()
        others += each[~concept[:-1]].tolist()
    assert found.nll_random == pytest.approx(sum(every) / len(every), rel=1e-5)
    assert found.nll_tail_random == pytest.approx(sum(others) / len(others), rel=1e-5)
    assert found.nll_tail_random != pytest.approx(found.nll_tail, rel=1e-3)


def test_completions_alone_can_count():
    """1e-5: of the tokens behind each prompt, with concepts made of the whole text."""
    net, tokenizer = made(False), tiny.tokenizer(())
    rows = setups.Dataset.from_list([{**row, "answer": row["completion"]} for row in setups.ROWS[:8]])
    found = evaluate_concepts(net, tokenizer, rows, batch_size=3, max_new_tokens=1, completions_only=True)
    whole = evaluate_concepts(net, tokenizer, rows, batch_size=3, max_new_tokens=1)
    every, others = [], []
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
        out = backbone_of(net)(ids, use_cache=False)
        each = F.cross_entropy(net.lm_head(out.last_hidden_state)[0, :-1], ids[0, 1:], reduction="none")
        first = len(row["prompt"]) - 1  # a token is a character
        every += each[first:].tolist()
        others += each[first:][~out.choice.concept[0, first:-1]].tolist()
    assert len({len(row["prompt"]) for row in rows}) > 1
    assert found.nll == pytest.approx(sum(every) / len(every), rel=1e-5)
    assert found.nll_tail == pytest.approx(sum(others) / len(others), rel=1e-5)
    assert found.nll != pytest.approx(whole.nll, rel=1e-3)
    assert (found.ratio, found.tail, found.macs) == (whole.ratio, whole.tail, whole.macs)


def test_a_model_without_concepts_has_the_first_figures_only():
    net, tokenizer = setups.base().eval(), tiny.tokenizer(())
    rows = setups.Dataset.from_list([{"prompt": "1+1=", "completion": "2 ##2", "answer": "2"}] * 2)
    found = evaluate_concepts(net, tokenizer, rows, delimiter="##", max_new_tokens=3)
    assert found.n == 2 and found.nll > 0 and found.ratio is None and found.kv is None


def test_a_model_that_repeats_is_right():
    """Exactness is the text's, whatever spaces stand around it."""
    tokenizer = facts.tokenizer()
    train, _ = facts.split(1, 0, facts.Size(rows=4))
    net = setups.base()
    net.generate = lambda input_ids, **_: torch.cat([input_ids, input_ids], dim=1)
    net.resize_token_embeddings(len(tokenizer))
    assert evaluate_concepts(net, tokenizer, train.select(range(4)), max_new_tokens=64).accuracy == 1.0


def test_nothing_is_generated_behind_the_models_positions():
    rows = setups.Dataset.from_list([{"prompt": "1+1=", "completion": "2 ##2", "answer": "2"}] * 2)
    with pytest.raises(ValueError, match="up to 300 new tokens: more than the model's 256 positions"):
        evaluate_concepts(setups.base().eval(), tiny.tokenizer(()), rows, delimiter="##", max_new_tokens=300)


def test_an_answer_and_its_end_are_right(monkeypatch):
    net, tokenizer = setups.base().eval(), tiny.tokenizer(())
    answer = torch.tensor([tokenizer("3<eos>")["input_ids"]])

    def generate(input_ids, generation_config, **_):
        assert generation_config.eos_token_id == [tokenizer.eos_token_id]
        return torch.cat([input_ids, answer], dim=1)

    monkeypatch.setattr(net, "generate", generate)
    assert _right(net, tokenizer, {"prompt": ["1+2="], "answer": ["3"]}, None, 4) == 1
