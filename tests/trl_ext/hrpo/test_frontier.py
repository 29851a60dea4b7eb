"""Shares of the soft embedding's probability, against sums over the scores of `generate` in plain Python."""

import random
from collections import Counter

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig

from tests import tiny
from trl_ext.cli.report import pyplot_for_files
from trl_ext.hrpo.frontier import KINDS, frontier_shares, plot_frontier
from trl_ext.tasks import reachability
from trl_ext.tasks.reachability import LETTERS, node_tokens
from unsloth_ext import DelimiterMatcher, ThinkingConfig, attach_thinking, hybrid_generate


@pytest.mark.parametrize("ablation", [None, "zero"])
def test_shares_against_sums_over_the_scores(ablation):
    tokenizer = reachability.tokenizer()
    model = tiny.from_config(reachability.config(tokenizer))
    nodes = node_tokens(tokenizer, LETTERS)
    with torch.no_grad():  # so that it writes nodes, and now and then the delimiter, which ends the thinking
        model.get_input_embeddings().weight[[*nodes, *tokenizer(" #")["input_ids"]]] *= 3
    attach_thinking(model, ThinkingConfig("soft_embedding", "unit", 0.1, 0.5))
    prompts = [asked.prompt for asked in reachability.split_problems(40, 0, 40)[1]]
    inputs = tokenizer(prompts, return_tensors="pt", return_token_type_ids=False)
    config = GenerationConfig(
        max_new_tokens=6,
        do_sample=False,
        temperature=0.5,
        top_k=0,
        pad_token_id=0,
        eos_token_id=2,
        output_logits=True,
        return_dict_in_generate=True,
    )
    out, trace = hybrid_generate(
        model,
        matcher=DelimiterMatcher(tokenizer, "#", len(tokenizer)),
        ablation=ablation,
        return_trace=True,
        generation_config=config,
        **inputs,
    )
    written = out.sequences[:, inputs["input_ids"].shape[1] :]
    # Trees on which many of the written nodes lie
    rng, trees = random.Random(0), []
    for row in written.tolist():
        first = LETTERS[nodes.index(row[0])] if row[0] in nodes else None
        others = rng.sample([letter for letter in LETTERS if letter != first], 7)
        trees.append("".join([others[0], first or others[6], *others[1:6]]))
    rows = Dataset.from_dict({"prompt": prompts, "tree": trees})
    found = frontier_shares(model, tokenizer, rows, delimiter="#", temperature=0.5, ablation=ablation)

    for step, shares in enumerate(found):
        sums, thinking = Counter(), 0
        for row, tree in enumerate(trees):
            if not trace.thinking_mask[row, step]:
                continue
            thinking += 1
            probs = (out.logits[step][row].float() / 0.5).softmax(-1).tolist()
            frontier = tree[1:3] if step == 0 else tree[3:7]
            parent = tree[0] if step == 0 else tokenizer.decode([int(written[row, 0])]).strip()
            below = {"": ""} | dict(zip(tree, (tree[1:3], tree[3:5], tree[5:7]), strict=False))
            for token, p in enumerate(probs):
                letter = LETTERS[nodes.index(token)] if token in nodes else None
                if letter is None:
                    sums["other tokens"] += p
                elif letter not in frontier:
                    sums["other nodes"] += p
                elif letter in below.get(parent, ""):
                    sums["frontier, below the written node"] += p
                else:
                    sums["frontier, elsewhere"] += p
        assert 20 < thinking < 40 and list(shares) == list(KINDS)
        # 1e-5: sums of 281 float32 probabilities
        assert shares == pytest.approx({kind: sums[kind] / thinking for kind in KINDS}, abs=1e-5)
    assert found[0]["frontier, elsewhere"] == pytest.approx(0, abs=1e-6)  # there is one node to start from
    assert min(found[1].values()) > 1e-3  # each kind was met


def test_the_bars_of_a_picture_add_up(tmp_path, monkeypatch):
    pyplot, drawn = pyplot_for_files(), []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    steps = [dict(zip(KINDS, (0.5, 0.2, 0.2, 0.1), strict=True)), dict(zip(KINDS, (0.1, 0.7, 0.1, 0.1), strict=True))]
    plot_frontier(tmp_path / "frontier.png", {"as trained": steps, "set to zero": steps[:1]}, "a title")
    (figure,) = drawn
    left, right = ([round(bar.get_height()) for bar in axis.patches] for axis in figure.axes)
    assert left == [50, 10, 20, 70, 20, 10, 10, 10] and right == [50, 20, 20, 10]
    tops = [bar.get_y() + bar.get_height() for bar in figure.axes[0].patches]
    assert tops[-2:] == pytest.approx([100, 100]) and (tmp_path / "frontier.png").stat().st_size > 5_000
