"""Speed and memory of key-value compression and latent tokens, as ratios measured in one process.

It compares scoring inside SDPA with eager attention, redundancy with its T x T form, a step of KAVATrainer with SFT,
Jacobi with sequential latent tokens, and decoding with a compressed cache with a full one.

    python -m benchmarks.bench_kv_compression [--repeats 7] [--quick] [--only training]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional as F
from transformers import DynamicCache
from trl import SFTConfig, SFTTrainer

import patches
from benchmarks import setups
from trl_ext import CODIConfig, CODITrainer, KAVAConfig, KAVATrainer, PCCoTConfig, PCCoTTrainer
from trl_ext.cli.command_line import CommandLine
from trl_ext.cli.user_errors import in_sentences
from unsloth_ext import CompressedCache, LatentConfig, attach_latent, compressed_trace, latent_phase
from unsloth_ext.kv_compression.compression import take
from unsloth_ext.kv_compression.scores import kava_redundancy
from unsloth_ext.latent.config import thinking_with


LENGTHS = (512, 1024, 2048)
ANSWER = 16
BUDGET = 24
WAYS = ("plain", "tap", "eager")
DEVICE = "cuda" if setups.CUDA else "cpu"


# -- scoring the trace ------------------------------------------------------------------------------------------------


def prompt(length: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids with masks of the trace and the answer. An eighth of each row is the question."""
    ids = torch.randint(2, 2000, (rows, length), device=DEVICE)
    column = torch.arange(length, device=DEVICE).expand(rows, -1)
    return ids, (column >= length // 8) & (column < length - ANSWER), column >= length - ANSWER


def scored(way: str, model: torch.nn.Module, length: int, rows: int) -> Callable[[], list]:
    """A forward pass that returns the compressed keys and values of the trace in each layer.

    `tap` scores inside SDPA, `eager` scores from the attention maps that transformers returns, `plain` does not score.
    """
    ids, trace, answer = prompt(length, rows)
    span, last = slice(length // 8, length - ANSWER), slice(length - ANSWER, length)

    @torch.no_grad()
    def tap() -> list:
        with compressed_trace(model, trace, answer, BUDGET) as kept:
            model.model(ids, use_cache=False)
        return kept

    @torch.no_grad()
    def eager() -> list:
        cache = DynamicCache(config=model.config)
        maps = model.model(ids, past_key_values=cache, output_attentions=True).attentions
        kept = []
        for attention, layer in zip(maps, cache.layers, strict=True):
            keys, values = layer.keys[:, :, span], layer.values[:, :, span]
            paid = attention[:, :, last, span].float().unflatten(1, (keys.shape[1], -1)).amax(2)
            importance = (paid / paid.sum(-1, keepdim=True)).mean(2)
            real = trace[:, span]
            kept.append(take(keys, values, 0.1 * importance + 0.9 * kava_redundancy(keys, real), BUDGET, real))
        return kept

    @torch.no_grad()
    def plain() -> list:
        model.model(ids, use_cache=False)
        return []

    return {"tap": tap, "eager": eager, "plain": plain}[way]


def scoring_model(size: str, way: str) -> torch.nn.Module:
    model = setups.qwen2(size).eval()
    model.set_attn_implementation("eager" if way == "eager" else "sdpa")
    return model


def bench_scoring(size: str, rows: int, repeats: int) -> dict:
    models, found = {way: scoring_model(size, way) for way in WAYS}, {}
    for length in LENGTHS:
        times = setups.interleaved({way: scored(way, models[way], length, rows) for way in WAYS}, repeats)
        peaks = {way: peak(size, way, length, rows) for way in ("none", *WAYS)}
        above = {way: max(peaks[way] - peaks["none"], 1) for way in WAYS}
        found[str(length)] = {
            "time_tap_over_eager": setups.quotient(times["tap"], times["eager"]),
            "time_tap_over_plain": setups.quotient(times["tap"], times["plain"]),
            "memory_tap_over_eager": round(above["tap"] / above["eager"], 4),
            "memory_tap_over_plain": round(above["tap"] / above["plain"], 4),
            "MiB_above_the_model": {way: round(value / 2**20, 1) for way, value in above.items()},
        }
    return found


def peak(size: str, way: str, length: int, rows: int) -> int:
    """Peak memory of one such forward: of the GPU's allocator, or of a separate process on a CPU. `none` only loads the
    model."""
    if not setups.CUDA:
        call = [
            sys.executable,
            "-m",
            "benchmarks.bench_kv_compression",
            "--peak",
            way,
            "--length",
            str(length),
            "--rows",
            str(rows),
        ]
        return int(subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()[-1])
    model = scoring_model(size, way)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if way != "none":
        scored(way, model, length, rows)()
    return setups.peak_memory()


# -- redundancy -------------------------------------------------------------------------------------------------------


def pairwise_redundancy(keys: torch.Tensor, key_mask: torch.Tensor) -> torch.Tensor:
    """The same redundancy from the matrix of all cosines."""
    unit = F.normalize(keys.float(), dim=-1) * key_mask[:, None, :, None]
    cosine = unit @ unit.transpose(-1, -2)
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    mean = cosine.sum(-1) / key_mask.sum(-1)[:, None, None]
    return (-mean).masked_fill(~key_mask[:, None], float("-inf")).softmax(-1)


def bench_redundancy(repeats: int) -> dict:
    found = {}
    for length in LENGTHS:
        keys = torch.randn(8, 8, length, 64, device=DEVICE)
        mask = torch.ones(8, length, dtype=torch.bool, device=DEVICE)
        torch.testing.assert_close(kava_redundancy(keys, mask), pairwise_redundancy(keys, mask), atol=1e-6, rtol=1e-4)
        works = {"sum": lambda: kava_redundancy(keys, mask), "pairs": lambda: pairwise_redundancy(keys, mask)}
        times = setups.interleaved(works, repeats)
        found[str(length)] = {"time_over_pairs": setups.quotient(times["sum"], times["pairs"])}
    return found


# -- a training step --------------------------------------------------------------------------------------------------


STEPS = [f"<<{i}*{i + 1}={i * (i + 1)}>>" for i in range(11, 23)]
ROW = {"question": "What is it, all of it, in the end? " * 3, "steps": STEPS, "answer": "484"}
TRAINERS = {
    "CODI, M=6": (CODITrainer, CODIConfig, {"num_latents": 6, "projection_dim": 384}),
    "PCCoT, M=24, T=3": (PCCoTTrainer, PCCoTConfig, {}),
    "KaVa, M=24, T=3": (KAVATrainer, KAVAConfig, {"projection_dim": 384}),
}
# What a further term of the loss adds to a step
TERMS = {
    "CODI, M=6, the LM head reads the latent tokens": ("CODI, M=6", {"w_latent_ce": 1.0}),
    "CODI, M=6, a decoder writes the steps": ("CODI, M=6", {"w_step_decoder": 1.0}),
    "PCCoT, M=24, T=3, the LM head reads the latent tokens": ("PCCoT, M=24, T=3", {"w_latent_ce": 1.0}),
}


def trainer(name: str, size: str, rows: int, **changes: Any):
    """A trainer on `rows` equal rows. SFT reads question, steps and answer, the same tokens as the teacher."""
    tokenizer = setups.tokenizer(8192 if size == "cpu" else 151936)
    common = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": rows,
        "report_to": "none",
        "bf16": False,
        "use_cpu": not setups.CUDA,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    lora = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    model = setups.qwen2(size)
    if name == "SFT":
        text = "".join(step + " " for step in ROW["steps"][:-1]) + "The answer is:" + ROW["answer"]
        data = Dataset.from_list([{"prompt": ROW["question"], "completion": text}] * rows)
        made = SFTTrainer(
            model,
            SFTConfig(**common, max_length=None),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora,
        )
    else:
        cls, config, settings = TRAINERS[name]
        data = Dataset.from_list([ROW] * rows)
        made = cls(
            model,
            config(**common, **settings, **changes),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora,
        )
    made.create_optimizer()
    return made, made.data_collator([made.train_dataset[i] for i in range(rows)])


def one_step(made, batch: dict) -> None:
    made.model.train()
    made.compute_loss(made.model, made._prepare_inputs(dict(batch))).backward()
    made.optimizer.step()
    made.optimizer.zero_grad()


def bench_steps(size: str, rows: int, repeats: int) -> dict:
    made = {name: trainer(name, size, rows) for name in ("SFT", *TRAINERS)}
    tokens = int(made["SFT"][1]["attention_mask"].sum())
    teacher = made["KaVa, M=24, T=3"][1]
    assert tokens == int(teacher["question_mask"].sum() + teacher["teacher_mask"].sum()), "the same tokens"
    times = setups.interleaved({name: lambda m=m: one_step(*m) for name, m in made.items()}, repeats)
    found: dict = {name: {"time_over_sft": setups.quotient(times[name], times["SFT"])} for name in TRAINERS}
    return {"tokens_a_row": tokens // rows, **found}


def bench_terms(size: str, rows: int, repeats: int) -> dict:
    made = {name: trainer(name, size, rows) for name in {base for base, _ in TERMS.values()}}
    made |= {name: trainer(base, size, rows, **changes) for name, (base, changes) in TERMS.items()}
    times = setups.interleaved({name: lambda m=m: one_step(*m) for name, m in made.items()}, repeats)
    return {name: {"time_over_without": setups.quotient(times[name], times[base])} for name, (base, _) in TERMS.items()}


# -- latent tokens, and decoding --------------------------------------------------------------------------------------


def bench_jacobi(size: str, rows: int, repeats: int) -> dict:
    model = attach_latent(setups.qwen2(size), setups.tokenizer(2000), LatentConfig(24, 3))
    ids = torch.randint(2, 2000, (rows, 64), device=DEVICE)
    mask = torch.ones_like(ids)

    def phase(iterations: int | None, grad: bool) -> None:
        with thinking_with(model, iterations=iterations), torch.set_grad_enabled(grad):
            state = latent_phase(model, ids, mask)
            if grad:
                state.hidden_states.square().mean().backward()

    works = {
        f"{way}, {'and backward' if grad else 'forward'}": lambda t=t, g=grad: phase(t, g)
        for grad in (False, True)
        for way, t in (("Jacobi T=3", 3), ("sequential", None))
    }
    times = setups.interleaved(works, repeats)
    return {
        what: {"time_over_sequential": setups.quotient(times[f"Jacobi T=3, {what}"], times[f"sequential, {what}"])}
        for what in ("forward", "and backward")
    }


def bench_decoding(size: str, rows: int, length: int, repeats: int) -> dict:
    """Decode the same number of tokens with a full cache (transformers' default) and with R-KV's: budget 128, buffer
    128."""
    model = setups.qwen2(size).eval()
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, length + 64)
    ids = torch.randint(2, 2000, (rows, 64), device=DEVICE)
    held: dict[str, int] = {}

    @torch.no_grad()
    def decode(name: str) -> None:
        cache = DynamicCache(config=model.config) if name == "full" else CompressedCache(model, 128, 128)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
        )
        held[name] = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))

    times = setups.interleaved({name: lambda n=name: decode(n) for name in ("full", "R-KV")}, repeats, warm=True)
    return {
        "rows": rows,
        "rate_over_full_cache": setups.quotient(times["full"], times["R-KV"]),
        "tokens_per_second": {name: round(rows * length / statistics.median(t), 1) for name, t in times.items()},
        "cache_MiB": {name: round(size / 2**20, 2) for name, size in held.items()},
        "cache_over_full": round(held["R-KV"] / held["full"], 4),
    }


def main() -> None:
    parser = CommandLine(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4 if not setups.CUDA else 8)
    parser.add_argument("--quick", action="store_true", help="decode only 256 tokens")
    parser.add_argument("--only", help="run only the part whose name begins with this; the file keeps the others")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    patches.apply("fused_lm_head")
    size = "1.5b" if setups.CUDA else "cpu"
    if options.peak:
        model = scoring_model(size, options.peak)
        if options.peak != "none":
            scored(options.peak, model, options.length, options.rows)()
        print(setups.peak_memory())
        return
    results: dict = {
        "command": "make bench-kv-compression",
        "model": f"Qwen2 shape, {sum(p.numel() for p in setups.qwen2(size).parameters()) / 1e6:.0f}M parameters",
        "rows": options.rows,
        "repeats": options.repeats,
    }

    length = 256 if options.quick else 4096
    parts: dict[str, Callable[[], dict]] = {
        "scoring the trace": lambda: bench_scoring(size, options.rows, options.repeats),
        "redundancy": lambda: bench_redundancy(options.repeats),
        "training step": lambda: bench_steps(size, options.rows, options.repeats),
        "further terms": lambda: bench_terms(size, options.rows, options.repeats),
        "latent phase": lambda: bench_jacobi(size, options.rows, options.repeats),
        f"decoding {length} tokens": lambda: bench_decoding(size, options.rows, length, 1 if options.quick else 3),
    }
    name = "bench_kv_compression" if options.quick else "kv_compression"
    path = setups.RESULTS / f"{name}_{setups.device_name()}.json"
    if options.only and path.exists():
        kept = json.loads(path.read_text())
        results |= {part: kept[part] for part in parts if part in kept}
    for part, measure in parts.items():
        if options.only and not part.startswith(options.only):
            continue
        results[part] = measure()
        print(part, results[part], flush=True)
        setups.write(name, results)  # written at once, so that a stopped run keeps its results
        setups.write_table(path, page)
    print(path)


def page(found: dict) -> str:
    """The tables of benchmarks/results/kv_compression_<device>.md, of the parts that are there."""
    scoring, redundancy = found.get("scoring the trace", {}), found.get("redundancy", {})
    text = setups.quotient_text
    lines = [
        "# Speed and memory of key-value compression and of latent tokens",
        "",
        f"{setups.model_text(found)}, {found['rows']} rows. Each figure is the median of pairs that were measured "
        "in turn in one process, with the lowest and highest pair.",
        "",
        f"A forward that ends with each layer's trace compressed to {BUDGET} keys. The tap scores inside SDPA; eager reads "
        "the maps of `output_attentions`.",
        "",
        f"| T = | {' | '.join(scoring)} |",
        "|---" * (len(scoring) + 1) + "|",
    ]
    rows = {
        "time, tap over eager": lambda part: text(part["time_tap_over_eager"]),
        "time, tap over the same forward without scoring": lambda part: text(part["time_tap_over_plain"]),
        "peak memory above the model, tap over eager": lambda part: f"{part['memory_tap_over_eager']:.2f}",
        "peak memory above the model, tap / eager, MiB": lambda part: (
            f"{part['MiB_above_the_model']['tap']:.0f} / {part['MiB_above_the_model']['eager']:,.0f}"
        ),
    }
    lines += [f"| {' | '.join([label, *map(cell, scoring.values())])} |" for label, cell in rows.items()]
    cells = [text(part["time_over_pairs"]) for part in redundancy.values()]
    lines.append(f"| {' | '.join(['time of redundancy (KaVa) over its T x T form', *cells])} |")
    lines += ["", "| | ratio |", "|---|---|"]
    for name, part in found.get("training step", {}).items():
        if isinstance(part, dict):
            tokens = found["training step"]["tokens_a_row"]
            lines.append(
                f"| a step of {name} over SFTTrainer on the same {tokens} tokens a row | {text(part['time_over_sft'])} |"
            )
    for name, part in found.get("further terms", {}).items():
        lines.append(f"| a step of {name}, over the step without | {text(part['time_over_without'])} |")
    for name, part in found.get("latent phase", {}).items():
        what = name.replace("and", "forward and")
        label = f"latent phase, Jacobi T = 3 over 24 sequential tokens (question of 64), {what}"
        lines.append(f"| {label} | {text(part['time_over_sequential'])} |")
    for name, part in found.items():
        if name.startswith("decoding "):
            what = f"{name} with R-KV (budget 128, buffer 128)"
            lines.append(f"| {what}: tokens per second over the full cache | {text(part['rate_over_full_cache'])} |")
            size = f"{part['cache_over_full']:.3f} ({part['cache_MiB']['R-KV']:.1f} of {part['cache_MiB']['full']:.0f} MiB)"
            lines.append(f"| {what}: cache at the end over the full one | {size} |")
    return "\n".join(lines)


TABLES = {"kv_compression": page, "bench_kv_compression": page}  # the latter: --quick


if __name__ == "__main__":
    in_sentences()
    main()
