"""The built-in task: chain sums from reasoning-gym, a character tokenizer, and a tiny model, all made in code.

The demonstrations are imperfect on purpose. Many of them guess without reasoning, more often for longer sums, and the
others sometimes forget a carry. A model that imitates them can reason but seldom does, so reinforcement learning can
improve it. (After clean demonstrations there is nothing left to improve, and GRPO makes the model worse.)
"""

import functools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from .data import load_rows


@dataclass(frozen=True)
class Demonstrations:
    """Probabilities of the errors in demonstrations.

    Attributes:
        guess_short, guess_long: no reasoning, for sums of three terms and of more.
        lucky: a guess is right.
        slip: a needed carry or borrow is forgotten.
        noise: a step is off by one.
    """

    guess_short: float = 0.25
    guess_long: float = 0.6
    lucky: float = 0.2
    slip: float = 0.2
    noise: float = 0.03


@dataclass(frozen=True)
class Problem:
    """A sum: a `prompt` such as `7+5-3=`, its signed terms, and its value."""

    prompt: str
    terms: tuple[int, ...]
    answer: int


def problems(size: int, seed: int) -> Iterator[Problem]:
    """Distinct sums of three or four one-digit terms whose running sums are never negative."""
    rows = load_rows(
        "chain_sum", split="train", size=size, seed=seed, min_terms=3, max_terms=4, min_digits=1, max_digits=1
    )
    seen = set()
    for row in rows:
        text = row["solution"].rpartition("=")[0].replace(" ", "")
        terms = tuple(int(term) for term in re.findall(r"[+-]?\d+", text))
        if text not in seen and min(accumulate(terms)) >= 0:
            seen.add(text)
            yield Problem(f"{text}=", terms, sum(terms))


@functools.lru_cache(maxsize=2)  # a second to make, and training and evaluation ask for the same
def _pool(size: int, seed: int) -> tuple[Problem, ...]:
    return tuple(problems(size, seed))


def split_problems(held_out: int, seed: int, pool: int = 20_000) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems from one shuffled pool, so both have the same mix and share no problem.

    Raises:
        ValueError: more than half of the pool would be held out.
    """
    found = [*_pool(pool, seed)]
    if not 1 <= held_out <= len(found) // 2:
        raise ValueError(f"{held_out} held-out problems: choose 1 to {len(found) // 2} of {len(found)}")
    random.Random(seed).shuffle(found)
    return found[held_out:], found[:held_out]


def as_dataset(found: list[Problem]) -> Dataset:
    """Columns `prompt` and `answer`, as the trainer and the reward read them."""
    return Dataset.from_list([{"prompt": p.prompt, "answer": str(p.answer)} for p in found])


def demonstration(terms: tuple[int, ...], rng: random.Random, how: Demonstrations, delimiter: str) -> str:
    """A demonstration such as `7+5=12;12-3=9####9`, or an imperfect one."""
    answer = sum(terms)
    if rng.random() < (how.guess_short if len(terms) <= 3 else how.guess_long):
        return f"{delimiter}{answer + (0 if rng.random() < how.lucky else rng.choice([-3, -2, -1, 1, 2, 3]))}"
    total, steps = terms[0], []
    for term in terms[1:]:
        value = total + term
        forgotten = (total // 10) * 10 + (value % 10)  # the units are right, the tens are unchanged
        if forgotten != value and rng.random() < how.slip:
            value = forgotten
        elif rng.random() < how.noise:
            value += rng.choice([-1, 1])
        steps.append(f"{total}{term:+d}={value}")
        total = value
    return f"{';'.join(steps)}{delimiter}{total}"


def demonstrations(found: list[Problem], count: int, seed: int, delimiter: str) -> Dataset:
    """`count` rows with `prompt` and `completion`, drawn with replacement."""
    rng, how = random.Random(seed), Demonstrations()
    drawn = [rng.choice(found) for _ in range(count)]
    return Dataset.from_dict(
        {
            "prompt": [p.prompt for p in drawn],
            "completion": [demonstration(p.terms, rng, how, delimiter) for p in drawn],
        }
    )


def character_tokenizer(characters: str = "0123456789+-*/=;#., ()") -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character of arithmetic."""
    pieces = ["<pad>", "<bos>", "<eos>", "<unk>", *characters]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def tiny_config(
    tokenizer: PreTrainedTokenizerFast, layers: int = 2, width: int = 96, heads: int = 4, kv_heads: int = 4
) -> Qwen2Config:
    """Configuration of the tiny model. Two layers of width 96 have a quarter of a million parameters."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
