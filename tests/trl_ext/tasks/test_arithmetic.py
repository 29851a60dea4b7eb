"""The embedded default: what its problems and demonstrations promise."""

import random
import re

from trl_ext.tasks import arithmetic
from trl_ext.tasks.arithmetic import Demonstrations, demonstration


def test_split_shares_no_problem_and_is_seeded():
    train, held_out = arithmetic.split_problems(100, seed=1, pool=2000)
    assert len(held_out) == 100 and not {p.prompt for p in train} & {p.prompt for p in held_out}
    assert (train, held_out) == arithmetic.split_problems(100, seed=1, pool=2000)
    assert all(p.answer == eval(p.prompt[:-1]) == sum(p.terms) for p in train)
    assert all(len(p.terms) in (3, 4) for p in train)


def test_faultless_demonstrations_are_right():
    never = Demonstrations(guess_short=0, guess_long=0, lucky=0, slip=0, noise=0)
    for terms in [(7, 5, -3), (1, 9, 9, -8), (5, 5, -9)]:
        text = demonstration(terms, random.Random(0), never, "####")
        steps, answer = text.split("####")
        assert int(answer) == sum(terms)
        assert all(eval(left) == int(right) for left, right in re.findall(r"([^;=]+)=(-?\d+)", steps))


def test_faults_occur_at_their_rates():
    rng = random.Random(0)
    texts = [demonstration((7, 5, 1, 1), rng, Demonstrations(), "####") for _ in range(4000)]
    guesses = [t for t in texts if t.startswith("####")]
    worked = [t for t in texts if not t.startswith("####")]
    assert abs(len(guesses) / 4000 - 0.6) < 0.03
    assert abs(sum(t == "####14" for t in guesses) / len(guesses) - 0.2) < 0.04
    assert abs(sum(t.startswith("7+5=2;") for t in worked) / len(worked) - 0.2) < 0.04  # the forgotten carry


def test_tokenizer_is_one_token_per_character_and_lossless():
    tokenizer = arithmetic.character_tokenizer()
    text = "7+5=12;12-3=9####9"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
