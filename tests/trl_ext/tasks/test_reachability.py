"""Reachability: what its graphs, demonstrations and tokenizer promise, against walks along the edges of the prompts."""

import random
from collections import Counter
from itertools import islice

import pytest
from transformers import AutoTokenizer

from trl_ext.tasks import reachability
from trl_ext.tasks.reachability import LETTERS, demonstration, split_problems
from trl_ext.tasks.reward import make_reward


PROBLEMS = list(islice(reachability.problems(3), 4000))


def read(prompt):
    """Edges, candidates and start of a prompt."""
    edges, candidates, start = (part.split() for part in prompt.split("?"))
    return [tuple(edge) for edge in edges], candidates, *start


def reached(edges, start, steps):
    """The nodes that can be reached in so many steps."""
    nodes = {start}
    for _ in range(steps):
        nodes = {b for a, b in edges if a in nodes}
    return nodes


def test_one_candidate_can_be_reached_and_it_is_the_answer():
    for asked in PROBLEMS:
        edges, candidates, start = read(asked.prompt)
        leaves = reached(edges, start, 2)
        assert leaves & {*candidates} == {asked.answer} and len({*candidates}) == 4
        assert [reached(edges, start, step) for step in range(3)] == [
            {*asked.tree[0]},
            {*asked.tree[1:3]},
            {*asked.tree[3:]},
        ]
        # The other candidates are leaves of the other tree, which has the same shape and shares no node
        (root,) = {a for a, _ in edges} - {b for _, b in edges} - {start}
        others = reached(edges, root, 2)
        assert {*candidates} - leaves <= others and not others & leaves
        assert len(edges) == 12 == len({*edges}) and len({node for edge in edges for node in edge}) == 14
        assert {*Counter(a for a, _ in edges).values()} == {2} and {*Counter(b for _, b in edges).values()} == {1}


def test_nothing_but_the_edges_tells_the_trees_apart():
    n = len(PROBLEMS)
    places, own, answers, starts = Counter(), [], Counter(), Counter()
    for asked in PROBLEMS:
        edges, candidates, start = read(asked.prompt)
        places[candidates.index(asked.answer)] += 1
        own += [place for place, (a, _) in enumerate(edges) if a in asked.tree]
        answers[asked.answer] += 1
        starts[start] += 1
    # Four standard deviations of a share over 4,000 problems: 0.027 for a quarter, 0.015 for a sixteenth
    assert all(abs(places[place] / n - 1 / 4) < 0.028 for place in range(4))
    assert all(abs(found[letter] / n - 1 / 16) < 0.016 for found in (answers, starts) for letter in LETTERS)
    assert abs(sum(own) / len(own) - 5.5) < 0.06  # four times 3.45 / sqrt(6 * 4000), and less, as drawn without return


def test_demonstrations_walk_along_edges_and_guess_when_they_miss():
    rng, right, hits, guesses = random.Random(0), 0, 0, Counter()
    for asked in PROBLEMS:
        edges, candidates, start = read(asked.prompt)
        first, second, delimiter, answer = demonstration(asked, rng, "#").split()
        assert (start, first) in edges and (first, second) in edges and delimiter == "#"
        right += answer == asked.answer
        if second in candidates:
            hits += 1
            assert answer == second
        else:
            guesses[candidates.index(answer)] += 1
    n = len(PROBLEMS)
    assert abs(hits / n - 1 / 4) < 0.028 and abs(right / n - 7 / 16) < 0.032  # four standard deviations
    assert all(abs(guesses[place] / (n - hits) - 1 / 4) < 0.032 for place in range(4))
    walks = Counter(demonstration(PROBLEMS[0], rng, "#").split()[1] for _ in range(n))
    assert walks.keys() == {*PROBLEMS[0].tree[3:]} and all(abs(share / n - 1 / 4) < 0.028 for share in walks.values())


def test_split_shares_no_question_and_is_seeded(monkeypatch):
    train, held_out = split_problems(100, seed=1, size=500)
    assert (len(train), len(held_out)) == (500, 100) and (train, held_out) == split_problems(100, seed=1, size=500)
    assert split_problems(100, seed=1, size=200) == (train[:200], held_out)  # the warm start's are the first of these
    assert split_problems(100, seed=2, size=500)[0] != train
    # Were both drawn from one seed, the questions would be dropped by their content
    monkeypatch.setattr(reachability, "HELD_OUT_SEED", 0)
    train, same = split_problems(100, seed=1, size=500)
    assert len(train) == 500 and not {p.content for p in train} & {p.content for p in same}
    for wrong in (0, 501):
        with pytest.raises(ValueError, match=f"{wrong} held-out problems: choose 1 to 500"):
            split_problems(wrong, seed=1, size=500)


def test_the_content_of_a_question_has_no_order():
    asked = PROBLEMS[0]
    edges, candidates, start = (part.split() for part in asked.prompt.split("?"))
    turned = " ".join(["", *edges[::-1], "?", *candidates[::-1], "?", *start])
    assert reachability.Problem(turned, asked.answer, asked.tree).content == asked.content
    other = " ".join(["", *edges, "?", *candidates, "?", asked.tree[1]])
    assert reachability.Problem(other, asked.answer, asked.tree).content != asked.content


def test_tokenizer_has_one_token_per_word_and_survives_saving(tmp_path):
    """Beside a Qwen2 model, `AutoTokenizer` makes a tokenizer of Qwen2's class, whatever was saved."""
    tokenizer = reachability.tokenizer()
    reachability.config(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for asked in PROBLEMS[:200]:
        text = asked.prompt + demonstration(asked, rng, "#")
        for each in (tokenizer, again):
            ids = each(text)["input_ids"]
            assert len(ids) == len(text.split()) == 23 and each.decode(ids) == text
            prompt, rest = (each(part)["input_ids"] for part in (asked.prompt, text[len(asked.prompt) :]))
            assert prompt + rest == ids  # a completion continues the prompt's tokens
        assert again(text)["input_ids"] == ids
    edges = [f" {a}{b}" for a in LETTERS for b in LETTERS if a != b]
    assert len({again(edge)["input_ids"][0] for edge in edges}) == 240
    assert (again.pad_token_id, again.eos_token_id, again.padding_side) == (0, 2, "left")
    assert again.decode([*ids, 2], skip_special_tokens=True) == text
    nodes = reachability.node_tokens(tokenizer, LETTERS)
    assert [tokenizer.decode([token]) for token in nodes] == [f" {letter}" for letter in LETTERS]


def test_only_the_one_letter_is_rewarded():
    """The reward also compares numbers and formulas; no two letters and no words are equal to it."""
    texts = [*LETTERS, *(a + b for a in LETTERS for b in LETTERS), *(f"{a} {b}" for a in LETTERS for b in LETTERS), "?"]
    given = make_reward("#")([f" B C # {text}" for text in texts], answer=["E"] * len(texts))
    assert [text for text, reward in zip(texts, given, strict=True) if reward] == ["E"]
