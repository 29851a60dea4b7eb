"""The built-in data of each stage, written as small JSONL files in MiniMind's published format.

It has stories and sums to read (reasoning-gym), dialogues about sums whose reasoning is often left out or wrong
(`tasks.arithmetic`), and some about the model's identity. Held-out rows are in `<kind>_eval.jsonl`; no sum is in both
files.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import reasoning_gym

from ..tasks.arithmetic import Demonstrations, Problem, demonstration, split_problems


DELIMITER = "####"
EXACT = Demonstrations(guess_short=0, guess_long=0, slip=0, noise=0)
STORIES = ("gsm_symbolic", "needle_haystack", "sentence_reordering", "word_sorting", "syllogism", "time_intervals")
ASKED = ("{}?", "What is {}?", "Calculate {}.", "How much is {}?", "{} is what?")
NAME, MAKER = "MiniMind", "this recipe"
WHO = (
    (
        "Who are you?",
        "What are you?",
        "What is your name?",
        "Tell me your name.",
        "How are you called?",
        "And you are?",
        "Please introduce yourself.",
        "Introduce yourself.",
        "Who am I talking to?",
        "May I ask your name?",
        "Your name?",
        "Say who you are.",
        "Who is this?",
        "What should I call you?",
        "Do you have a name?",
        "Could you tell me who you are?",
    ),
    f"I am {NAME}, a small language model.",
)
FROM = (
    (
        "Who made you?",
        "Where do you come from?",
        "Who trained you?",
        "Who built you?",
        "Who is your maker?",
        "Where were you made?",
        "Tell me who made you.",
        "How did you come to be?",
        "Who created you?",
        "Who wrote you?",
        "Who is behind you?",
        "By whom were you made?",
    ),
    f"I was trained by {MAKER} on one computer.",
)
GREETED = (
    ("Hello!", "Hi.", "Good morning.", "Hey there!", "Good evening.", "Hello, how are you?", "Hi there!", "Greetings!"),
    "Hello! Give me a sum.",
)


@dataclass(frozen=True)
class Sizes:
    """Number of training rows of each file, and of held-out rows."""

    pretrain: int = 9000
    sft: int = 16_000
    lora: int = 400
    dpo: int = 2500
    rl: int = 3000
    reason: int = 5000
    held_out: int = 300


def write_embedded(folder: Path, seed: int = 0, sizes: Sizes | None = None) -> None:
    """Write `<kind>.jsonl` and `<kind>_eval.jsonl` for each kind of `Sizes`."""
    sizes = sizes or Sizes()
    training, held_out = split_problems(sizes.held_out, seed)
    makers: dict[str, Callable[[list[Problem], random.Random, bool], Iterator[dict]]] = {
        "pretrain": texts,
        "sft": dialogues,
        "lora": introductions,
        "dpo": preferences,
        "rl": questions,
        "reason": reasoning,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for kind, make in makers.items():
        for unseen in (False, True):
            name, problems = (f"{kind}_eval", held_out) if unseen else (kind, training)
            rows = make(problems, random.Random(f"{name} {seed}"), unseen)
            rows = itertools.islice(rows, sizes.held_out if unseen else getattr(sizes, kind))
            (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def texts(problems: list[Problem], rng: random.Random, unseen: bool) -> Iterator[dict]:
    """In turn, one story and two groups of correctly solved sums."""
    made = [reasoning_gym.create_dataset(name, size=20_000, seed=rng.randrange(10**9)) for name in STORIES]
    for i in itertools.count():
        row = made[i % len(made)][i]
        answer = row["metadata"].get("answer_cot", row["answer"])
        yield {"text": f"{row['question'][:300]}\n{str(answer)[:200]}"}
        for _ in range(2):
            worked = (f"{p.prompt}{demonstration(p.terms, rng, EXACT, DELIMITER)}" for p in rng.sample(problems, 6))
            yield {"text": "\n".join(worked)}


def dialogues(problems: list[Problem], rng: random.Random, unseen: bool) -> Iterator[dict]:
    """Sums answered by imperfect writers, and sometimes a greeting."""
    while True:
        if rng.random() < 0.05:
            said, answer = GREETED
            yield _turns(rng.choice(said), answer)
            continue
        problem = rng.choice(problems)
        yield _turns(_asked(problem, rng), demonstration(problem.terms, rng, Demonstrations(), DELIMITER))


def introductions(problems: list[Problem], rng: random.Random, unseen: bool) -> Iterator[dict]:
    """Questions about the model's identity. Every fourth way of asking is held out."""
    while True:
        said, answer = rng.choice((WHO, FROM))
        yield _turns(rng.choice([way for i, way in enumerate(said) if (i % 4 == 3) == unseen]), answer)


def preferences(problems: list[Problem], rng: random.Random, unseen: bool) -> Iterator[dict]:
    """Correct reasoning against a guess or a mistake with another result."""
    poor = Demonstrations(guess_short=0.7, guess_long=0.9, lucky=0, slip=0.5, noise=0.05)
    while True:
        problem = rng.choice(problems)
        asked = _asked(problem, rng)
        right, wrong = (demonstration(problem.terms, rng, how, DELIMITER) for how in (EXACT, poor))
        if right.rpartition(DELIMITER)[2] != wrong.rpartition(DELIMITER)[2]:
            yield {"chosen": _turns(asked, right)["conversations"], "rejected": _turns(asked, wrong)["conversations"]}


def questions(problems: list[Problem], rng: random.Random, unseen: bool) -> Iterator[dict]:
    """Each sum once, asked in one way, with its number for the reward."""
    for problem in rng.sample(problems, len(problems)):
        yield _turns(_asked(problem, rng), str(problem.answer))


def reasoning(problems: list[Problem], rng: random.Random, unseen: bool) -> Iterator[dict]:
    """Correct reasoning between the tags of reasoning models."""
    while True:
        problem = rng.choice(problems)
        work, _, answer = demonstration(problem.terms, rng, EXACT, DELIMITER).partition(DELIMITER)
        yield _turns(_asked(problem, rng), f"<think>\n{work}\n</think>\n<answer>\n{answer}\n</answer>")


def _asked(problem: Problem, rng: random.Random) -> str:
    return rng.choice(ASKED).format(problem.prompt.rstrip("="))


def _turns(said: str, answer: str) -> dict:
    return {"conversations": [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]}
