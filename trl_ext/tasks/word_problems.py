"""Word problems with written steps, from reasoning-gym's generator of animals and their legs.

    question  How many legs are there in total if you have 3 spiders, 7 tigers, 5 crabs?
    steps     3*8=24  7*4=28  24+28=52  5*10=50  52+50=102
    answer    102

A pretrained model knows how many legs an animal has. The generator makes as many problems as one asks for; it gives no
steps, so they are made here: each product, and from the second animal on the sum so far.
"""

from typing import Any

from .data import HELD_OUT_SEED, without


ANIMALS = 3
INSTANCES = 9


def problems(size: int, seed: int, animals: int = ANIMALS, instances: int = INSTANCES) -> list[dict[str, Any]]:
    """Rows with `question`, `steps` and `answer`. No question comes twice.

    Args:
        size: number of rows to make, before repeated questions are left out.
        seed: row i is made from seed + i.
        animals: number of kinds of animals in a problem.
        instances: the most animals of a kind.
    """
    import reasoning_gym

    made = reasoning_gym.create_dataset(
        "leg_counting",
        size=size,
        seed=seed,
        min_animals=animals,
        max_animals=animals,
        max_instances=instances,
    )
    rows = {}
    for row in made:
        question = "H" + row["question"].partition("Now, h")[2].strip()  # before it stands what the task is
        rows[question] = {
            "question": question,
            "steps": steps_of(row["metadata"]["animals"]),
            "answer": row["answer"],
        }
    return list(rows.values())


def steps_of(animals: dict[str, int]) -> list[str]:
    """The steps of a problem, from the number of animals of each kind."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS as LEGS

    steps: list[str] = []
    total = 0
    for animal, count in animals.items():
        product = count * LEGS[animal]
        steps.append(f"{count}*{LEGS[animal]}={product}")
        if len(steps) > 1:
            steps.append(f"{total}+{product}={total + product}")
        total += product
    return steps


def split(train: int, held_out: int, seed: int, **options: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """About `train` rows to train on, and `held_out` other ones; other seeds have other rows. The arguments are those of
    `problems`."""
    first = seed * 10 * HELD_OUT_SEED
    unseen = problems(held_out, first + HELD_OUT_SEED, **options)
    return without(problems(train, first, **options), unseen), unseen
