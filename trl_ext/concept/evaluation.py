"""Evaluation of a model with concepts: accuracy, likelihood, compression and cost."""

import math
from dataclasses import asdict, dataclass

import torch
from datasets import Dataset
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from unsloth_ext.common.evaluation_mode import evaluating
from unsloth_ext.common.generation_arguments import check_context, end_tokens
from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.concept.accounting import cost
from unsloth_ext.concept.modules import has_concepts

from ..tasks.evaluation import wilson_interval
from ..tasks.reward import make_reward


@dataclass
class ConceptEvaluation:
    """Results over n texts. NLLs are nats per token. A model without concepts has only the first six figures.

    With `completions_only`, the NLLs and `token_accuracy` are those of the completions' tokens.

    Attributes:
        n: number of texts.
        accuracy, low, high: share of right greedy answers, with its 95% Wilson interval.
        nll: of all tokens.
        token_accuracy: share of tokens that are the most likely next token.
        nll_boundary: of tokens that follow a concept.
        nll_tail: of the other tokens.
        nll_random: with concepts replaced by uniformly drawn ones in the same places.
        nll_tail_random: the same for tokens that do not follow a concept. If it is no larger than nll_tail, concepts
            carry no information for other tokens.
        ratio: tokens per concept, decided as in inference.
        bits: capacity of concepts per token, C log2 V per concept. A text with more information cannot be kept whole.
        tail: mean number of tokens that the deep layers still see beside the concepts. If it is long, the content of
            concepts does not matter: a gate can reach a ratio with many concepts in one place and none in another.
        perplexity: exp of the entropy of codeword usage, mean over codebooks.
        used: share of codewords used at all.
        macs, kv: multiplications, and bytes of keys and values, as shares of the same model's without concepts, for
            texts of this mean length.
    """

    n: int
    accuracy: float
    low: float
    high: float
    nll: float
    token_accuracy: float
    nll_boundary: float | None = None
    nll_tail: float | None = None
    nll_random: float | None = None
    nll_tail_random: float | None = None
    ratio: float | None = None
    bits: float | None = None
    tail: float | None = None
    perplexity: float | None = None
    used: float | None = None
    macs: float | None = None
    kv: float | None = None

    def numbers(self) -> dict[str, float | None]:
        """The results as a dict."""
        return asdict(self)


@torch.no_grad()
def evaluate_concepts(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    delimiter: str | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    completions_only: bool = False,
    progress: bool = False,
) -> ConceptEvaluation:
    """Evaluate a model, with or without concepts, on held-out rows. Ours.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        rows: plain texts in the columns `prompt`, `completion` and `answer`.
        delimiter: the text before the answer in a completion; None: the completion is the answer.
        max_new_tokens: maximum number of generated tokens.
        batch_size: rows per batch.
        completions_only: leave out the tokens of the prompts, as training on completions does. Concepts are still those
            of whole texts.
        progress: show a progress bar.

    Returns:
        The results, a `ConceptEvaluation`.
    """
    backbone, head = backbone_of(model), model.get_output_embeddings()
    compresses = has_concepts(model)
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, float] = dict.fromkeys(
        ("tokens", "nll", "hits", "boundary", "made", "random", "others", "concepts", "real", "tail"), 0.0
    )
    counts = torch.zeros((), dtype=torch.long)
    right = 0
    with evaluating(model):
        for start in tqdm(
            range(0, len(rows), batch_size), "Evaluating", leave=False, disable=None if progress else True
        ):
            part = rows[start : start + batch_size]
            texts = [a + b for a, b in zip(part["prompt"], part["completion"])]
            batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(model.device)
            ids, real = batch["input_ids"], batch["attention_mask"].bool()
            out = backbone(ids, attention_mask=batch["attention_mask"], use_cache=False)
            scored = real[:, 1:]
            if completions_only:
                starts = torch.tensor([len(prompt) for prompt in tokenizer(part["prompt"])["input_ids"]])
                scored = scored & (torch.arange(1, ids.shape[1]) >= starts[:, None]).to(ids.device)
            logits = head(out.last_hidden_state)
            nll = _nll(logits, ids) * scored
            sums["hits"] += ((logits[:, :-1].argmax(-1) == ids[:, 1:]) & scored).sum().item()
            sums["tokens"] += scored.sum().item()
            sums["real"] += real.sum().item()
            sums["nll"] += nll.sum().item()
            right += _right(model, tokenizer, part, delimiter, max_new_tokens)
            if not compresses:
                continue
            config, choice = backbone.concept_config, out.choice
            made = choice.concept[:, :-1] & scored
            sums["boundary"] += nll[made].sum().item()
            sums["made"] += made.sum().item()
            sums["concepts"] += choice.concept.sum().item()
            times = torch.arange(ids.shape[1], device=ids.device)
            since = times - torch.where(choice.concept, times, -1).cummax(1).values
            sums["tail"] += ((since + config.boundary_keeps_token) * real).sum().item()
            drawn = torch.randint(config.num_concepts, choice.ids.shape, generator=generator).to(ids.device)
            drawn = drawn.masked_fill(~choice.concept[..., None], config.null)
            other = backbone(ids, attention_mask=batch["attention_mask"], concepts=drawn, use_cache=False)
            random = _nll(head(other.last_hidden_state), ids) * scored
            sums["random"] += random.sum().item()
            sums["others"] += random[~made].sum().item()
            counts = counts + torch.stack(
                [torch.bincount(found, minlength=config.num_concepts) for found in choice.ids[choice.concept].T]
            )
    n = len(rows)
    low, high = wilson_interval(right, n)
    found = ConceptEvaluation(n, right / n, low, high, sums["nll"] / sums["tokens"], sums["hits"] / sums["tokens"])
    if not compresses:
        return found
    found.ratio = sums["real"] / max(sums["concepts"], 1)
    found.bits = config.num_codebooks * math.log2(config.num_concepts) / found.ratio
    found.tail = sums["tail"] / sums["real"]
    found.nll_boundary = sums["boundary"] / max(sums["made"], 1)
    found.nll_tail = (sums["nll"] - sums["boundary"]) / max(sums["tokens"] - sums["made"], 1)
    found.nll_random = sums["random"] / sums["tokens"]
    found.nll_tail_random = sums["others"] / max(sums["tokens"] - sums["made"], 1)
    share = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    found.perplexity = (-torch.special.xlogy(share, share).sum(-1)).mean().exp().item()
    found.used = (counts > 0).double().mean().item()
    length = round(sums["real"] / n)
    ours = cost(model.config, config, found.ratio, length, found.tail)
    dense = cost(model.config, None, tokens=length)
    found.macs, found.kv = ours.macs / dense.macs, ours.kv / dense.kv
    return found


def _nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """NLL of each token but the first, (B, T - 1) float32."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none")


def _right(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    part: dict[str, list[str]],
    delimiter: str | None,
    max_new_tokens: int,
) -> int:
    """The number of right greedy answers."""
    batch = tokenizer(part["prompt"], padding=True, padding_side="left", return_tensors="pt").to(model.device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(model, tokenizer) or None,
    )
    check_context(model, batch["attention_mask"].sum(1).tolist(), config)
    out = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=config)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    if delimiter is None:
        return sum(text.strip() == answer.strip() for text, answer in zip(texts, part["answer"]))
    return int(sum(make_reward(delimiter)(texts, answer=part["answer"])))
