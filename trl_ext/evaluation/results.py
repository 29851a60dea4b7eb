"""What an evaluation found: accuracy with an interval, pass@k and maj@k, costs, accuracy by question length."""

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import comb
from typing import Any

from ..tasks.evaluation import wilson_interval
from .tasks import EvaluationTask


BINS = 4


@dataclass
class Result:
    """Of one task and one state of the model.

    Attributes:
        task: name of the task.
        state: what was done to the latent steps.
        n: number of questions.
        samples: number of texts for each.
        accuracy: share of right texts.
        low, high: its 95% Wilson interval, over the questions.
        answered: share of texts that give an answer.
        pass_at: by k, the chance that at least one of k texts is right (the unbiased estimator of arXiv 2107.03374).
        maj_at: by k, the share of questions whose most frequent answer among the first k texts is right; among equally
            frequent ones the first counts.
        tokens, forwards: means over texts: new tokens, and forward passes for them and for latent steps.
        latent_share: latent steps over forward passes; above 1 where one pass makes several, as in PCCoT and KaVa.
        seconds: wall time of decoding for each text, in batches.
        by_length: for quarters of the questions, from the shortest: characters of the longest, number, accuracy. Questions
            of one length are in one part, so there may be fewer.
        right: by question, the number of right texts.
        questions: a hash of all questions and answers in order, by which two evaluations are known to be of the same ones.
    """

    task: str
    state: str
    n: int
    samples: int
    accuracy: float
    low: float
    high: float
    answered: float
    pass_at: dict[int, float]
    maj_at: dict[int, float]
    tokens: float
    forwards: float
    latent_share: float
    seconds: float
    by_length: list[tuple[int, int, float]]
    right: list[int]
    questions: str

    def numbers(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


def pass_at(right: list[int], samples: int, k: int) -> float:
    """The mean over questions of 1 - C(n - c, k) / C(n, k), with c of n texts right."""
    return sum(1 - comb(samples - c, k) / comb(samples, k) for c in right) / len(right)


def majority(task: EvaluationTask, texts: list[str]) -> str | None:
    """The most frequent answer of some texts; None if none gives one. The same number in other words counts as one."""
    votes: Counter[str] = Counter()
    for text in texts:
        answer = task.answer_in(text)
        if answer is not None:
            same = (known for known in votes if task.is_same(known, answer))
            votes[next(same, answer)] += 1
    return votes.most_common(1)[0][0] if votes else None


def result_of(task: EvaluationTask, state: str, texts: list[list[str]], costs: dict[str, float]) -> Result:
    """Score the texts of a task.

    Args:
        task: the task.
        state: what was done to the latent steps.
        texts: for each row of the task as many texts.
        costs: sums over all texts, see `LatentReasoningLM.costs`.
    """
    answers = [row["answer"] for row in task.rows]
    asked = [(row["question"], row["answer"]) for row in task.rows]
    right = [sum(task.is_right(text, answer) for text in some) for some, answer in zip(texts, answers, strict=True)]
    n, samples, count = len(texts), len(texts[0]), costs["completions"]
    share = sum(right) / (n * samples)
    interval = wilson_interval(share * n, n)  # type: ignore[arg-type]  # with several texts no whole number
    sizes = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})

    def voted(k: int) -> float:
        found = [majority(task, some[:k]) for some in texts]
        return sum(f is not None and task.is_same(a, f) for f, a in zip(found, answers, strict=True)) / n

    lengths = [len(row["prompt"]) for row in task.rows]
    bounds = sorted({sorted(lengths)[(i + 1) * n // BINS - 1] for i in range(BINS)} if n >= BINS else {max(lengths)})
    parts = [[i for i in range(n) if low < lengths[i] <= high] for low, high in pairwise([-1, *bounds])]
    return Result(
        task=task.name,
        state=state,
        n=n,
        samples=samples,
        accuracy=share,
        low=interval[0],
        high=interval[1],
        answered=sum(task.answer_in(text) is not None for some in texts for text in some) / (n * samples),
        pass_at={k: pass_at(right, samples, k) for k in sizes},
        maj_at={k: voted(k) for k in sizes if k > 1},
        tokens=costs["tokens"] / count,
        forwards=costs["forwards"] / count,
        latent_share=costs["latent"] / max(costs["forwards"], 1),
        seconds=costs["seconds"] / count,
        by_length=[
            (longest, len(part), sum(right[i] for i in part) / (len(part) * samples))
            for longest, part in zip(bounds, parts, strict=True)
        ],
        right=right,
        questions=hashlib.sha256(repr(asked).encode()).hexdigest()[:12],
    )
