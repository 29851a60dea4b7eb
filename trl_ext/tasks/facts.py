"""Built-in texts for concept tokens: facts to remember word for word, then the same text again:

    Ada 9 gloves . well so then Noah 4 maps . well Mia 6 jars . ...

A fact is four tokens and holds log2(16 * 8 * 12) = 10.6 bits. The words between facts hold only their number. So
information is concentrated in some places, as in most texts. A model can predict the whole second half if it remembers
the first, so its loss shows how much of the text it still knows.
"""

import random
from dataclasses import dataclass
from itertools import cycle, islice, pairwise

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config


NAMES = [
    "Ada",
    "Ben",
    "Cora",
    "Dan",
    "Emma",
    "Finn",
    "Gwen",
    "Hugo",
    "Iris",
    "Jack",
    "Kate",
    "Liam",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
]
NUMBERS = ["2", "3", "4", "5", "6", "7", "8", "9"]
THINGS = ["apples", "books", "coins", "doors", "eggs", "forks", "gloves", "hats", "jars", "keys", "lamps", "maps"]
FILLERS = ["well", "so", "then", "anyway"]  # repeated in this order


@dataclass(frozen=True)
class Size:
    """Size of a task and of the model for it.

    Attributes:
        fillers: number of filler words per text. How they are split among the facts is uniformly random.
    """

    facts: int = 4
    fillers: int = 16
    rows: int = 20_000
    layers: int = 6
    width: int = 64
    warm_start_steps: int = 300


SMALL = Size()


def texts(number: int, seed: int, facts: int, fillers: int = 0) -> list[str]:
    """Distinct texts of facts about different people."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < number:
        said = [f"{name} {rng.choice(NUMBERS)} {rng.choice(THINGS)} ." for name in rng.sample(NAMES, facts)]
        places = sorted(rng.sample(range(fillers + facts), facts))  # positions of the facts among the words
        before = [place - last - 1 for last, place in pairwise([-1, *places])]
        parts = [" ".join([*islice(cycle(FILLERS), n), fact]) for n, fact in zip(before, said)]
        after = islice(cycle(FILLERS), fillers - sum(before))
        found[" ".join([*parts, *after])] = None
    return list(found)


def split(held_out: int, seed: int, size: Size | None = None) -> tuple[Dataset, Dataset]:
    """(training, held-out) rows: `prompt` has the facts, `completion` repeats them, `answer` is the text to compare
    with.

    Raises:
        ValueError: more rows would be held out than trained on.
    """
    size = size or SMALL
    if held_out > size.rows:
        raise ValueError(f"eval_size={held_out}: hold out at most {size.rows}, the number of training rows")
    found = texts(size.rows + held_out, seed, size.facts, size.fillers)

    def rows(halves: list[str]) -> Dataset:
        return Dataset.from_dict({"prompt": halves, "completion": [f" {half}" for half in halves], "answer": halves})

    return rows(found[held_out:]), rows(found[:held_out])


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word."""
    pieces = ["<pad>", "<bos>", "<eos>", "<unk>", ".", *NUMBERS, *NAMES, *THINGS, *FILLERS]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # restores the spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def config(tokenizer: PreTrainedTokenizerFast, size: Size | None = None) -> Qwen3Config:
    """The configuration of the tiny model. Initial weights are five times the usual size, so that it learns to copy in
    200 steps."""
    size = size or SMALL
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=size.width // 4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def sentences(held_out: int, seed: int, facts: int) -> tuple[Dataset, Dataset]:
    """(training, held-out) rows with an empty `prompt` and a `completion` of `facts` facts, to be written from a plan.

    Raises:
        ValueError: more than half of all single facts would be held out, or a text has more facts than there are names.
    """
    if facts > len(NAMES):
        raise ValueError(f"facts={facts}: must be at most {len(NAMES)}, one for each name")
    most = len(NAMES) * len(NUMBERS) * len(THINGS) if facts == 1 else 20_000 + held_out
    if held_out > most // 2:
        raise ValueError(f"eval_size={held_out}: there are only {most} facts, so hold out at most {most // 2}")
    found = texts(most, seed, facts)

    def rows(whole: list[str]) -> Dataset:
        return Dataset.from_dict({"prompt": [""] * len(whole), "completion": whole, "answer": whole})

    return rows(found[held_out:]), rows(found[:held_out])
