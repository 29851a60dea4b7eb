"""Speed of hybrid decoding: without the rows that have ended, and with a compiled step on a static cache.

Each time is compared with decoding all rows, not compiled, with a growing cache. Tokens and thinking masks are compared
as well. On a CPU the times are those that one thread computes, so other work on the machine disturbs them little.

    python -m benchmarks.bench_decoding [--repeats 3] [--rows 32 8]
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor
from transformers.modeling_outputs import CausalLMOutputWithPast

from benchmarks import setups
from trl_ext.cli.command_line import CommandLine
from trl_ext.cli.user_errors import in_sentences
from unsloth_ext import DelimiterMatcher, HybridSession, ThinkingConfig, attach_thinking, hybrid_decode
from unsloth_ext.hrpo.states import project


SHORTEST, LONGEST = 16, 256  # tokens of ragged completions
FULL = 128  # tokens of completions that end together
ALL_ROWS = {"return_dict_in_generate": True}  # the cache is returned, so no row leaves it
# Thinking source, and whether tokens are sampled
RAGGED = {
    "projection, sampled": ("projection", True),
    "soft embedding, greedy": ("soft_embedding", False),
}


class Lengths(LogitsProcessor):
    """Ends each row by EOS when it has its number of tokens.

    Args:
        lengths (B,): long.
        prompt: tokens of the prompt.
        eos: id of EOS.
    """

    def __init__(self, lengths: torch.Tensor, prompt: int, eos: int):
        self.lengths, self.prompt, self.eos = lengths, prompt, eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ends = self.lengths == input_ids.shape[1] - self.prompt + 1
        scores[:, self.eos] = torch.where(ends, 1e4, float("-inf"))
        return scores


class CompiledSession(HybridSession):
    """A session whose step after the prompt is one compiled function: state, fusion, decoder and head.

    It stands in for the model's forward, so transformers' loop stays the loop. For Qwen2 and the projection only.
    """

    def use(self, model: nn.Module, step: Callable) -> None:
        stock = model.forward

        @functools.wraps(stock)  # `generate` reads its signature
        def forward(input_ids: torch.Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
            if self._pending is None:
                return stock(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
            known = {name: kwargs[name] for name in ("attention_mask", "position_ids")}
            (basis, _), self._pending = self._pending, None
            logits, hidden = step(input_ids, basis, self._masks[-1], past_key_values, **known)
            self._last_hidden = hidden.clone()  # a CUDA graph writes its output in place
            return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

        model.forward = forward


def compiled_step(model: nn.Module) -> Callable:
    backbone = model.get_decoder()
    words, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight

    def step(ids: torch.Tensor, basis: torch.Tensor, thinking_mask: torch.Tensor, cache: Any, **kwargs: Any):
        state = project(backbone, basis)
        embeds = backbone.fuse_thinking(nn.functional.embedding(ids, words), thinking_mask[:, None], state[:, None])
        hidden = backbone(inputs_embeds=embeds, past_key_values=cache, use_cache=True, **kwargs).last_hidden_state
        return nn.functional.linear(hidden, head), hidden[:, -1]

    return torch.compile(step, mode="reduce-overhead" if setups.CUDA else "default")


class Decoding:
    """One model, its prompts, and the ways to decode them."""

    def __init__(self, source: str, rows: int, length: int, ragged: bool):
        self.model = attach_thinking(
            setups.qwen2("1.5b" if setups.CUDA else "cpu"), ThinkingConfig(thinking_source=source)
        ).eval()
        tokenizer = setups.tokenizer(self.model.config.vocab_size)
        self.ids = tokenizer(["What is 12 plus 7 minus 3?"] * rows, return_tensors="pt")["input_ids"]
        self.ids = self.ids.to(self.model.device)
        self.matcher = DelimiterMatcher(tokenizer, "####", self.model.config.vocab_size)
        self.length = length
        lengths = torch.linspace(SHORTEST, length, rows).round().long() if ragged else torch.full((rows,), length)
        self.lengths = lengths[torch.randperm(rows, generator=torch.Generator().manual_seed(0))].to(self.ids.device)
        self.tokens: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.step = compiled_step(self.model)

    def decode(self, name: str, sampled: bool, **kwargs: Any) -> None:
        kind = CompiledSession if name == "compiled step" else HybridSession
        session = kind(self.model, self.matcher)
        if isinstance(session, CompiledSession):
            session.use(self.model, self.step)
        torch.manual_seed(0)
        try:
            out = self.model.generate(
                input_ids=self.ids,
                attention_mask=torch.ones_like(self.ids),
                custom_generate=hybrid_decode,
                hybrid=session,
                logits_processor=[Lengths(self.lengths, self.ids.shape[1], 1)],
                max_new_tokens=self.length,
                do_sample=sampled,
                top_k=0 if sampled else None,
                pad_token_id=0,
                **kwargs,
            )
        finally:
            vars(self.model).pop("forward", None)
        self.tokens[name] = getattr(out, "sequences", out), session.trace().thinking_mask

    def measured(self, works: dict[str, dict], sampled: bool, repeats: int) -> dict:
        """Times of the first way over those of each other way."""
        ways = {name: lambda name=name, kw=kw: self.decode(name, sampled, **kw) for name, kw in works.items()}
        times = setups.interleaved(ways, repeats, clock=time.perf_counter if setups.CUDA else time.process_time)
        (first, base), *others = times.items()
        tokens, thinking_mask = self.tokens[first]
        return {
            name: {
                "times_as_fast": setups.quotient(base, values),
                "seconds": [round(statistics.median(x), 3) for x in (base, values)],
                "rows_with_equal_tokens": int((self.tokens[name][0] == tokens).all(1).sum()),
                "thinking_masks_equal": torch.equal(self.tokens[name][1], thinking_mask),
            }
            for name, values in others
        }


def main() -> None:
    parser = CommandLine(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 8])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = setups.qwen2("1.5b" if setups.CUDA else "cpu")
    found: dict = {
        "command": "make bench-decoding",
        "model": f"Qwen2 shape, {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters",
        "repeats": options.repeats,
        "ended rows": {},
        "compiled step": {},
    }

    def keep(part: str, name: str, value: dict) -> None:
        """Write each result at once, so that a stopped run keeps its results."""
        print(part, name, value, flush=True)
        found[part][name] = value
        setups.write_table(setups.write("decoding", found), page)

    for rows in options.rows:
        for name, (source, sampled) in RAGGED.items():
            made = Decoding(source, rows, LONGEST, ragged=True)
            works = {"all rows": ALL_ROWS, "live rows": {}}
            keep("ended rows", f"{rows} rows, {name}", made.measured(works, sampled, options.repeats))
    for rows in options.rows:
        made = Decoding("projection", rows, FULL, ragged=False)
        static = {"cache_implementation": "static"}
        works = {"all rows": ALL_ROWS, "static cache": static, "compiled step": static}
        keep("compiled step", f"{rows} rows", made.measured(works, False, options.repeats))


def page(found: dict) -> str:
    """The tables of benchmarks/results/decoding_<device>.md."""
    lines = [
        "# Faster hybrid decoding",
        "",
        f"{setups.model_text(found)}. How many times as fast as decoding all rows, not compiled, with a growing cache. "
        f"Each figure is the median of {found['repeats']} pairs that were measured in turn in one process, with the "
        "lowest and highest pair. The second figure is the ratio of the fastest times."
        + (" The times are those that one thread computed." if found["device"] == "cpu" else ""),
        "",
        f"Ended rows leave the forwards; completions of {SHORTEST} to {LONGEST} tokens, evenly spread:",
        "",
        "| | times as fast | fastest | rows with equal tokens |",
        "|---|---|---:|---:|",
    ]
    lines += [_line(name, part["live rows"]) for name, part in found["ended rows"].items()]
    lines += [
        "",
        f"A static cache, and on it a compiled step (greedy, projection); all completions have {FULL} tokens:",
        "",
        "| | times as fast | fastest | rows with equal tokens |",
        "|---|---|---:|---:|",
    ]
    lines += [
        _line(f"{rows}, {name}", value) for rows, part in found["compiled step"].items() for name, value in part.items()
    ]
    return "\n".join(lines)


def _line(name: str, value: dict) -> str:
    ratio = value["times_as_fast"]
    equal = value["rows_with_equal_tokens"]
    return f"| {name} | {setups.quotient_text(ratio)} | {ratio['fastest']:.2f} | {equal} |"


TABLES = {"decoding": page}


if __name__ == "__main__":
    in_sentences()
    main()
