"""A check of data, reward and rollouts before training starts: which rewards can be earned."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from trl_ext.cli.console import PlainConsole

from .data import DataError
from .reward import final_answer


@dataclass
class DryRun:
    """Results of a dry run.

    Attributes:
        parse_rate: share of sampled completions with exactly one delimiter and an answer after it.
        rewards: number of sampled completions for each reward.
        gold_reward: mean reward of the correct answers.
    """

    parse_rate: float
    rewards: dict[float, int]
    gold_reward: float


def check_rewards(name: str, rewards: list) -> list[float]:
    """The rewards as floats.

    Raises:
        DataError: a reward is None, NaN or infinite. The message names the function and the row.
    """
    for row, reward in enumerate(rewards):
        if reward is None or not math.isfinite(reward):
            raise DataError(
                f"reward function {name} returned {reward} for row {row}; return a finite number for each row"
            )
    return [float(reward) for reward in rewards]


def dry_run(
    rows: Dataset, sampled: list[str], reward: Callable[..., list[float]], delimiter: str, console: PlainConsole
) -> DryRun:
    """Score the correct answers and the sampled completions, and print a summary with one sample.

    Args:
        rows: the columns `prompt` and `answer`.
        sampled: completions of the first rows.
        reward: the reward function.
        delimiter: the text before the answer.
        console: where to print.

    Raises:
        DataError: no correct answer earns a reward (the reward does not fit the data), or a reward is not a number.
    """
    n = len(sampled)
    answers = rows["answer"][:n]
    name = reward.__name__
    gold = check_rewards(name, reward([f"{delimiter} {answer}" for answer in answers], answer=answers))
    if not any(gold):
        raise DataError(
            f"no reward can ever be earned: {name} returns 0 even for {delimiter + ' ' + answers[0]!r}, the correct answer "
            "of the first row. Check the delimiter and the answers of the dataset"
        )
    rewards = check_rewards(name, reward(sampled, answer=answers))
    parsed = sum(final_answer(text, delimiter) is not None for text in sampled) / n
    result = DryRun(parsed, dict(sorted(Counter(rewards).items())), sum(gold) / n)
    table = Table(title=f"Dry run on {n} sampled completions", title_justify="left")
    for heading in ("parse rate", "rewards (value: count)", "reward of the gold answers"):
        table.add_column(heading)
    histogram = ", ".join(f"{value:g}: {count}" for value, count in result.rewards.items())
    table.add_row(f"{result.parse_rate:.1%}", histogram, f"{result.gold_reward:.2f}")
    console.print(table)
    sample = Text(f"{_shown(rows[0]['prompt'])}\n").append(sampled[0], style="bold")
    title = Text(f"sample (answer {answers[0]}, reward {rewards[0]:g})")  # a plain string would be read as markup
    console.print(Panel(sample, title=title, title_align="left", expand=False))
    if len(result.rewards) == 1:
        console.print(
            f"Every sampled reward is {rewards[0]:g}: groups without variance give no gradient. Expect no progress "
            "until that changes (an easier task, a better initial model, more samples).",
            style="yellow",
        )
    return result


def _shown(prompt: str | list[dict]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"[{m['role']}] {m['content']}" for m in prompt)
