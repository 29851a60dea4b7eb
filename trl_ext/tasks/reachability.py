"""The built-in task on which thinking states matter: which leaf can be reached from a node of a small graph.

A graph is two separate trees of seven nodes, whose letters are drawn anew for each problem:

    prompt       AB CD AE ... ? K G M D ? A      its edges in any order, four leaves, the node to start from
    completion   E G # G                         a walk from the start, and the leaf that can be reached

One of the four leaves is in the start's tree, three are in the other. Both trees are drawn from one distribution, so only
the edges tell them apart. Demonstrations walk at random and guess when the walk has missed. A model that imitates them
knows at each step every node that could be next, and a written walk keeps only one of them. A thinking state can keep
all. Single edges and nodes are single tokens, so that one step along an edge takes one attention layer.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2Tokenizer

from .arithmetic import tiny_config
from .data import HELD_OUT_SEED


LETTERS = "ABCDEFGHIJKLMNOP"
DEPTH = 2  # edges from the root of a tree to a leaf
NODES = 2 ** (DEPTH + 1) - 1  # of one tree
CANDIDATES = 4
MAX_NEW_TOKENS = DEPTH + 4  # the walk, the delimiter, the answer and the end take one less


@dataclass(frozen=True)
class Problem:
    """A graph, its question and the answer.

    Attributes:
        prompt: edges, candidates and start, each word after a space.
        answer: the candidate that can be reached.
        tree: the letters of the start's tree. Node i has the children 2 i + 1 and 2 i + 2, so node 0 is the start.
    """

    prompt: str
    answer: str
    tree: str

    @property
    def content(self) -> tuple[frozenset[str], ...]:
        """Edges, candidates and start without their order, which changes nothing in the question."""
        return tuple(frozenset(part.split()) for part in self.prompt.split("?"))


def problem(rng: random.Random) -> Problem:
    """A random problem."""
    letters = rng.sample(LETTERS, 2 * NODES)
    trees = letters[:NODES], letters[NODES:]
    edges = [tree[(i - 1) // 2] + tree[i] for tree in trees for i in range(1, NODES)]
    rng.shuffle(edges)
    leaves, others = (tree[NODES // 2 :] for tree in trees)
    answer = rng.choice(leaves)
    candidates = [answer, *rng.sample(others, CANDIDATES - 1)]
    rng.shuffle(candidates)
    words = [*edges, "?", *candidates, "?", trees[0][0]]
    return Problem("".join(f" {word}" for word in words), answer, "".join(trees[0]))


def problems(seed: int) -> Iterator[Problem]:
    """Distinct problems without end."""
    rng, seen = random.Random(seed), set()
    while True:
        made = problem(rng)
        if made.content not in seen:
            seen.add(made.content)
            yield made


def split_problems(held_out: int, seed: int, size: int = 20_000) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems from two seeds. No question is in both.

    A larger `size` adds training problems behind the others.

    Raises:
        ValueError: there would be more held-out than training problems.
    """
    if not 1 <= held_out <= size:
        raise ValueError(f"{held_out} held-out problems: choose 1 to {size}, the number of training problems")
    kept = [made for made, _ in zip(problems(seed + HELD_OUT_SEED), range(held_out))]
    asked = {made.content for made in kept}
    unseen = (made for made in problems(seed) if made.content not in asked)
    return [made for made, _ in zip(unseen, range(size))], kept


def as_dataset(found: list[Problem]) -> Dataset:
    """Columns `prompt` and `answer`, as the trainer and the reward read them, and `tree`."""
    return Dataset.from_list([{"prompt": p.prompt, "answer": p.answer, "tree": p.tree} for p in found])


def demonstration(asked: Problem, rng: random.Random, delimiter: str) -> str:
    """A random walk, the delimiter, and the leaf where the walk ended, or one of the candidates if it is none."""
    node, walk = 0, []
    for _ in range(DEPTH):
        node = 2 * node + 1 + rng.randrange(2)
        walk.append(asked.tree[node])
    candidates = asked.prompt.split("?")[1].split()
    answer = walk[-1] if walk[-1] in candidates else rng.choice(candidates)
    return "".join(f" {word}" for word in (*walk, delimiter, answer))


def demonstrations(found: list[Problem], seed: int, delimiter: str) -> Dataset:
    """Rows with `prompt` and `completion`, one for each problem."""
    rng = random.Random(seed)
    return Dataset.from_dict(
        {
            "prompt": [asked.prompt for asked in found],
            "completion": [demonstration(asked, rng, delimiter) for asked in found],
        }
    )


def tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer with one token for each node and each possible edge, with the space before it.

    It has Qwen2's class. `AutoTokenizer` gives any tokenizer that is saved beside a Qwen2 model the rules of this class,
    by which a tokenizer of whole words would lose its words.
    """
    single = [*"#?", *LETTERS]
    edges = [(a, b) for a in LETTERS for b in LETTERS if a != b]
    space = "Ġ"  # a space in the alphabet of byte-level BPE
    pieces = ["<pad>", "<bos>", "<eos>", "<unk>", space, *single]
    pieces += [space + character for character in single] + [space + a + b for a, b in edges]
    return Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[(space, character) for character in single] + [(space + a, b) for a, b in edges],
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def node_tokens(tokenizer: PreTrainedTokenizerBase, nodes: str) -> list[int]:
    """The token of each node, which is a letter."""
    return tokenizer("".join(f" {node}" for node in nodes))["input_ids"]


def config(tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    """The configuration of the tiny model. Initial weights are six times the usual size, so that it learns to look up
    edges."""
    found = tiny_config(tokenizer, width=64)
    found.initializer_range = found.hidden_size**-0.5
    return found
