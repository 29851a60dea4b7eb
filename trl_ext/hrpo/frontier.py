"""What soft embeddings hold on the reachability task: the share of their probability on each kind of token (ours)."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from unsloth_ext.common.delimiter import DelimiterMatcher
from unsloth_ext.common.evaluation_mode import evaluating
from unsloth_ext.hrpo.decoding import hybrid_generate

from ..cli.report import pyplot_for_files
from ..tasks.reachability import DEPTH, LETTERS, MAX_NEW_TOKENS, node_tokens


# Kinds of tokens with their colours. A node is on the frontier if as many edges as steps were made lead to it
KINDS = {
    "frontier, below the written node": "#2b5d9b",
    "frontier, elsewhere": "#e07b39",
    "other nodes": "#9db8d9",
    "other tokens": "#d0d0d0",
}


@torch.no_grad()
def frontier_shares(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    delimiter: str,
    temperature: float = 1.0,
    ablation: str | None = None,
) -> list[dict[str, float]]:
    """The mean share of probability that each kind of token has in the distributions of the thinking steps.

    The decoding is greedy. A soft embedding averages the embeddings with these probabilities.

    Args:
        model: a causal LM with thinking modules.
        tokenizer: that of the task.
        rows: the columns `prompt` and `tree` of the task.
        delimiter: the text before the answer.
        temperature: of the distributions, as in training.
        ablation: replaces the thinking states, see `hybrid_generate`. None leaves them.

    Returns:
        For each step along an edge, the share of each of `KINDS`. Rows that no longer think are left out.
    """
    inputs = tokenizer(list(rows["prompt"]), padding=True, padding_side="left", return_tensors="pt").to(model.device)
    trees = torch.tensor([node_tokens(tokenizer, tree) for tree in rows["tree"]], device=model.device)
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        temperature=temperature,
        top_k=0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with evaluating(model):
        out, trace = hybrid_generate(
            model,
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            matcher=DelimiterMatcher(tokenizer, delimiter, model.config.vocab_size),
            keep=("hidden_states",),
            ablation=ablation,
            return_trace=True,
            generation_config=config,
        )
        probs = (model.get_output_embeddings()(trace.hidden_states) / temperature).float().softmax(-1)
    # The start, and the written token of each step
    written = torch.cat([trees[:, :1], out[:, inputs["input_ids"].shape[1] :]], dim=1)
    on_nodes = probs[..., node_tokens(tokenizer, LETTERS)].sum(-1)
    found = []
    for step in range(DEPTH):
        first = 2**step - 1  # of the nodes before the frontier
        parents = trees[:, first : 2 * first + 1].repeat_interleave(2, dim=1)
        on_frontier = probs[:, step].gather(1, trees[:, 2 * first + 1 : 4 * first + 3])
        below = (on_frontier * (parents == written[:, step, None])).sum(1)
        shares = [below, on_frontier.sum(1) - below, on_nodes[:, step] - on_frontier.sum(1), 1 - on_nodes[:, step]]
        thinks = trace.thinking_mask[:, step]
        found.append({kind: float(share[thinks].mean()) for kind, share in zip(KINDS, shares, strict=True)})
    return found


def plot_frontier(path: Path, shares: dict[str, list[dict[str, float]]], title: str) -> None:
    """Draw shares as stacked bars, a panel for each entry and a bar for each step.

    Args:
        path: file of the picture.
        shares: results of `frontier_shares`, by what was done to the states.
        title: title of the picture.
    """
    pyplot = pyplot_for_files()
    figure, axes = pyplot.subplots(
        1, len(shares), figsize=(1 + 3 * len(shares), 4), layout="constrained", sharey=True, squeeze=False
    )
    for axis, (name, steps) in zip(axes.flat, shares.items(), strict=True):
        labels: list[Any] = [f"step {step}" for step, _ in enumerate(steps, 1)]
        below = [0.0] * len(steps)
        for kind, colour in KINDS.items():
            heights = [100 * step[kind] for step in steps]
            axis.bar(labels, heights, bottom=below, color=colour, width=0.6, label=kind)
            below = [a + b for a, b in zip(below, heights, strict=True)]
        axis.set_title(f"states {name}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("share of the soft embedding's probability, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
