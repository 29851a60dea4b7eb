"""Accuracy by real generation: batched as alone, passes counted, numbers read as meant, intervals that mean something."""

import numpy as np
import pytest
import torch

from tests import tiny
from trl_ext.latent.evaluation import bootstrap_interval, evaluate_answers, is_right
from trl_ext.latent.sources import row_of_gsm8k
from trl_ext.latent.visualization import _mean, plot_similarity, probe
from trl_ext.tasks.evaluation import wilson_interval
from unsloth_ext import LatentConfig, LatentModel, attach_latent, kv_similarity
from unsloth_ext.common.ablations import ABLATIONS
from unsloth_ext.latent.model import question_batch

from .setups import ROWS


class Reading:
    """An engine that is transformers, on the embeddings that vLLM would get."""

    calls = 0

    def update(self, model):
        pass

    def decode(self, model, embeds, attention_mask, settings):
        self.calls += 1
        return model.generate(inputs_embeds=embeds, attention_mask=attention_mask, generation_config=settings)


def make(**settings):
    model, tokenizer = tiny.model(std=0.1), tiny.tokenizer(())
    settings = {"num_latents": 3, "iterations": 2, "projection_dim": 16, **settings}
    attach_latent(model, tokenizer, LatentConfig(**settings))
    return model.eval(), tokenizer


HOW = {"answer_prompt": "#", "max_new_tokens": 6}


@pytest.mark.parametrize("iterations, passes", [(None, 4), (0, 1), (2, 3)])
def test_completions_are_those_of_each_question_alone_and_passes_are_counted(iterations, passes):
    model, tokenizer = make(iterations=iterations)
    rows = ROWS[:5]
    found = evaluate_answers(model, tokenizer, rows, batch_size=2, **HOW)
    alone = LatentModel(model, tokenizer)
    lengths = []
    for row, text in zip(rows, found.completions, strict=True):
        assert alone.generate([row["question"]], max_new_tokens=6, do_sample=False) == [text]
        ids = alone.generate(**question_batch_of(tokenizer, row), max_new_tokens=6, do_sample=False, pad_token_id=0)
        new = ids[0, len(tokenizer(row["question"])["input_ids"]) + 2 + 3 :].tolist()
        lengths.append(new.index(1) + 1 if 1 in new else len(new))
    assert found.forward_passes == pytest.approx(passes + np.mean(lengths))
    assert (found.low, found.high) == wilson_interval(sum(found.right), 5) and found.low < found.high
    assert found.n == 5 and found.seconds > 0 and not model.training
    assert set(vars(found)) - set(found.numbers()) == {"right", "completions"} and found.numbers()["n"] == 5


def question_batch_of(tokenizer, row):
    batch = question_batch(tokenizer, [row["question"]])
    return {"questions": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def test_off_is_plain_generate_and_ablations_change_the_latents():
    model, tokenizer = make()
    off = evaluate_answers(model, tokenizer, ROWS[:3], latents="off", **HOW)
    for row, text in zip(ROWS, off.completions, strict=False):
        ids = tokenizer(row["question"], return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=1)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == text
    texts = {name: evaluate_answers(model, tokenizer, ROWS, latents=name, **HOW).completions for name in ABLATIONS}
    on = evaluate_answers(model, tokenizer, ROWS, **HOW).completions
    assert all(texts[name] != on for name in ("zero", "noise")), "the latents matter"
    with pytest.raises(ValueError, match="latents='half'"):
        evaluate_answers(model, tokenizer, ROWS, latents="half", **HOW)


@pytest.mark.parametrize(
    "completion, answer, right",
    [
        ("The answer is: 42", "42", True),
        ("<<2*3=6>> The answer is: 1,203", "1203", True),
        ("The answer is: -7", "-7", True),
        ("The answer is: 7", "-7", False),
        ("The answer is: $18", "18", True),
        ("The answer is: 0.5", "1/2", True),
        ("The answer is: 18.0", "18", True),
        ("42", "42", False),
        ("The answer is:", "42", False),
        ("The answer is: 4 The answer is: 42", "42", False),
    ],
)
def test_the_number_behind_the_answer_prompt(completion, answer, right):
    assert is_right(completion, answer, "The answer is:") is right


def test_an_annotated_row_is_right_when_its_own_answer_is_given():
    row = row_of_gsm8k({"question": "Q", "answer": "<<1-8=-7>>\n#### -7"}, "here")
    assert is_right(f" The answer is: {row['answer']}", row["answer"], "The answer is:")


def test_intervals_cover_and_grow_with_disagreeing_seeds():
    """One run: the binomial's 2.5% and 97.5% points. Seeds that disagree widen it beyond that of one long run."""
    rng = np.random.default_rng(1)
    right = [[True] * 70 + [False] * 30]
    low, high = bootstrap_interval(right)
    expected = np.quantile(rng.binomial(100, 0.7, 200_000) / 100, [0.025, 0.975])
    assert abs(low - expected[0]) <= 0.011 and abs(high - expected[1]) <= 0.011
    same = bootstrap_interval([[True] * 70 + [False] * 30] * 3)
    apart = bootstrap_interval([[True] * 40 + [False] * 60, [True] * 70 + [False] * 30, [True] * 100])
    assert apart[1] - apart[0] > 2 * (same[1] - same[0])
    assert bootstrap_interval([[True] * 10]) == (1.0, 1.0)


def test_the_probe_counts_results_of_the_steps():
    model, tokenizer = make()
    rows = [{"question": "1+2=", "steps": ["1+2=3"], "answer": "3"}, {"question": "x", "steps": ["no"], "answer": "1"}]
    everything = probe(model, tokenizer, rows, k=model.get_input_embeddings().weight.shape[0])
    assert everything.found == everything.by_chance == 1.0
    top = probe(model, tokenizer, rows, k=1)
    assert [len(slots) for slots in top.tokens] == [3, 3] and all(len(s) == 1 for slots in top.tokens for s in slots)
    assert top.found == float(any(slot == ["3"] for slot in top.tokens[0]))
    assert top.by_chance == float(any(slot == ["3"] for slot in top.tokens[1]))
    assert probe(model, tokenizer, rows[1:]).found is None


def test_the_picture_is_drawn(tmp_path):
    model, _ = make()
    ids = torch.randint(3, 40, (2, 6))
    traces = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    answers = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 0, 0, 0]])
    found = kv_similarity(model, ids, torch.ones_like(ids), torch.randint(3, 40, (2, 5)), traces, answers)
    plot_similarity(tmp_path / "latent.png", found, "title")
    assert (tmp_path / "latent.png").stat().st_size > 10_000


def test_means_of_the_picture_are_over_the_rows_that_have_the_slot():
    values, mask = (
        torch.tensor([[1.0, 4.0, 7.0], [3.0, 5.0, 8.0]]),
        torch.tensor([[True, True, False], [True, False, False]]),
    )
    means = _mean(values, mask)
    assert means[:2].tolist() == [2.0, 4.0] and means[2].isnan()


def test_a_tokenizer_without_an_end_lets_every_answer_run_on():
    model, tokenizer = make()
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    assert evaluate_answers(model, tokenizer, ROWS[:3], batch_size=2, **HOW).forward_passes == 3 + 6


@pytest.mark.parametrize("latents", ["on", "off"])
def test_nothing_is_generated_behind_the_models_positions(latents):
    with pytest.raises(ValueError, match="up to 300 new tokens: more than the model's 256 positions"):
        evaluate_answers(*make(), ROWS[:3], latents=latents, answer_prompt="#", max_new_tokens=300)


@pytest.mark.parametrize("latents", ["on", "zero", "off"])
def test_an_engine_decodes_every_answer(latents):
    """Equal texts and counts from the embeddings alone."""
    model, tokenizer = make()
    wanted = evaluate_answers(model, tokenizer, ROWS[:5], latents=latents, batch_size=2, **HOW)
    engine = Reading()
    found = evaluate_answers(model, tokenizer, ROWS[:5], latents=latents, batch_size=2, engine=engine, **HOW)
    assert engine.calls == 3
    assert found.completions == wanted.completions and found.forward_passes == wanted.forward_passes
