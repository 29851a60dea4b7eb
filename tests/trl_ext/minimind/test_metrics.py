"""Log-probs of answers against one row at a time, token by token; which of two ranks higher."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from tests.trl_ext.minimind import setups
from trl_ext.minimind.metrics import answer_log_probs, ranking_accuracy, sums
from trl_ext.minimind.stage import StageArguments


PROMPTS = [setups.turns("What is 7+5?"), setups.turns("Hello!", "Hello!", "7-3?"), setups.turns("7")]
ANSWERS = [[{"role": "assistant", "content": text}] for text in ("7+5=12####12", "4", "What is 7? 7+5-3=9####9")]


def literal(model, prompt, answer):
    tokenizer = setups.tokenizer()
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(prompt + answer, return_dict=True)["input_ids"]
    end = len(whole) - 1  # the newline behind <|im_end|> is nobody's
    assert whole[: len(before)] == before and whole[end - 1] == 2
    logits = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(logits[t - 1, whole[t]].item() for t in range(len(before), end))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_are_summed_over_their_own_tokens(batch_size):
    """To 1e-4 nats; prompts and padding count nothing."""
    model = setups.model()
    found = answer_log_probs(model, setups.tokenizer(), PROMPTS, ANSWERS, batch_size).tolist()
    assert found == pytest.approx([literal(model, *pair) for pair in zip(PROMPTS, ANSWERS, strict=True)], abs=1e-4)


def test_the_more_probable_ranks_higher():
    model = setups.model()
    others = [[{"role": "assistant", "content": text}] for text in ("9", "Hello! Hello!", "12")]
    values = [answer_log_probs(model, setups.tokenizer(), PROMPTS, side, 8) for side in (ANSWERS, others)]
    rows = Dataset.from_dict({"prompt": PROMPTS, "chosen": ANSWERS, "rejected": others})
    trainer = SimpleNamespace(model=model, accelerator=SimpleNamespace(unwrap_model=lambda m: m))
    found = ranking_accuracy(rows, setups.tokenizer())(trainer)
    assert found == (values[0] > values[1]).double().mean().item()
    assert ranking_accuracy(rows.rename_columns({"chosen": "rejected", "rejected": "chosen"}), setups.tokenizer())(
        trainer
    ) == pytest.approx(1 - found)


def test_sums_are_measured_on_the_embedded_default_alone(tmp_path):
    assert sums(StageArguments(dataset="mine.jsonl", run_dir=str(tmp_path)), setups.tokenizer()) == {}
