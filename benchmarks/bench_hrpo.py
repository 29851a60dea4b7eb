"""Speed and memory of HRPO.

Step time and memory are compared with TRL's GRPOTrainer, decoding with `generate` and with a literal version of the
published algorithm. All results are ratios of interleaved repetitions in one process.

    python -m benchmarks.bench_hrpo [--repeats 9] [--quick]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile

import torch
import trl
from datasets import Dataset
from peft import LoraConfig

import patches
from benchmarks import setups
from benchmarks.public_algorithm import LiteralSession
from trl_ext import HRPOConfig, HRPOTrainer
from trl_ext.cli.command_line import CommandLine
from trl_ext.cli.user_errors import in_sentences
from unsloth_ext import DelimiterMatcher, ThinkingConfig, attach_thinking, hybrid_generate
from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.hrpo.adapter import THINKING_MODULES
from unsloth_ext.hrpo.decoding import hybrid_decode


DELIMITER = "####"
TOP_K = 50  # top_k of the public code
MASTERS = "OMP_NUM_THREADS=1 python -m benchmarks.bench_hrpo --masters --length 64 --repeats 11"
MODES = {
    "grpo": None,
    "hrpo frozen projection": ("frozen", "projection"),
    "hrpo rollout projection": ("rollout", "projection"),
    "hrpo two_pass projection": ("two_pass", "projection"),
    "hrpo jacobi K=2 projection": ("jacobi", "projection"),
    "hrpo frozen soft_embedding": ("frozen", "soft_embedding"),
    "hrpo two_pass soft_embedding": ("two_pass", "soft_embedding"),
    "hrpo soft_bptt soft_embedding": ("soft_bptt", "soft_embedding"),
}


def trainer(mode: tuple[str, str] | None, size: str, rows: int, length: int):
    """A trainer whose completions all have `length` tokens. EOS is suppressed, so token counts are equal."""
    tokenizer = setups.tokenizer(8192 if size == "cpu" else 151936)
    data = Dataset.from_list([{"prompt": "What is 12 plus 7 minus 3? " * (1 + i % 3)} for i in range(64)])
    extra = {} if mode is None else {"recompute": mode[0], "thinking_source": mode[1], "jacobi_iterations": 2}
    config = (trl.GRPOConfig if mode is None else HRPOConfig)(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=rows,
        num_generations=8,
        max_completion_length=length,
        generation_kwargs={"min_new_tokens": length},
        report_to="none",
        use_cpu=not setups.CUDA,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **extra,
    )
    lora = LoraConfig(
        r=32,
        lora_alpha=64,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    cls = trl.GRPOTrainer if mode is None else HRPOTrainer
    made = cls(
        setups.qwen2(size),
        lambda completions, **_: [float(len(text) % 7) for text in completions],
        config,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora,
    )
    made.create_optimizer()
    made.current_gradient_accumulation_steps = 1
    made.accelerator.gradient_state._set_sync_gradients(True)
    return made


def one_step(made) -> None:
    """One step: rollout, rewards, loss, backward, clipping, update."""
    made.model.train()
    made._step = 0
    batch = [row for row in made.train_dataset.select(range(made.args.generation_batch_size // 8)) for _ in range(8)]
    inputs = made._prepare_inputs(batch)
    assert bool((inputs["completion_mask"] == 1).all()), "token counts must be equal"
    made.compute_loss(made.model, inputs).backward()
    made._clip_grad_norm(made.model)
    made.optimizer.step()
    made.optimizer.zero_grad()


def bench_steps(size: str, rows: int, length: int, repeats: int) -> dict:
    made = {name: trainer(mode, size, rows, length) for name, mode in MODES.items()}
    times = setups.interleaved({name: lambda t=t: one_step(t) for name, t in made.items()}, repeats)
    return {
        name: {
            "time_over_grpo": setups.quotient(values, times["grpo"]),
            "seconds": round(statistics.median(values), 4),
        }
        for name, values in times.items()
    }


def bench_memory(size: str, rows: int, length: int) -> dict:
    """Peak memory of two steps relative to GRPO: of the GPU's allocator, or of a separate process for each mode on a
    CPU."""
    peaks = {}
    for name, mode in MODES.items():
        if setups.CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            made = trainer(mode, size, rows, length)
            one_step(made)
            one_step(made)
            peaks[name] = setups.peak_memory()
            del made
        else:
            call = [
                sys.executable,
                "-m",
                "benchmarks.bench_hrpo",
                "--peak",
                name,
                "--rows",
                str(rows),
                "--length",
                str(length),
            ]
            peaks[name] = int(subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()[-1])
    return {name: {"ratio": round(peak / peaks["grpo"], 4), "MiB": peak >> 20} for name, peak in peaks.items()}


def bench_decode(size: str, batch: int, length: int, repeats: int, warm: bool) -> dict:
    """Ratios of tokens per second of hybrid decoding to `generate`, for the same number of tokens."""
    tokenizer = setups.tokenizer(8192 if size == "cpu" else 151936)
    prompt = tokenizer(["What is 12 plus 7 minus 3?"], return_tensors="pt")["input_ids"]
    ids = prompt.repeat(batch, 1).to("cuda" if setups.CUDA else "cpu")
    mask = torch.ones_like(ids)
    models = {
        source: attach_thinking(setups.qwen2(size), ThinkingConfig(thinking_source=source)).eval()
        for source in ("projection", "soft_embedding")
    }
    matcher = DelimiterMatcher(tokenizer, DELIMITER, models["projection"].config.vocab_size)
    common = {
        "attention_mask": mask,
        "max_new_tokens": length,
        "min_new_tokens": length,
        "do_sample": True,
        "pad_token_id": 0,
    }

    def generate(k: int, model=models["projection"], **extra) -> torch.Tensor:
        return model.generate(input_ids=ids, top_k=k, **common, **extra)

    def hybrid(source: str, k: int) -> torch.Tensor:
        return hybrid_generate(models[source], ids, matcher, top_k=k, **common)

    def literal() -> torch.Tensor:
        session = LiteralSession(models["soft_embedding"], matcher, tokenizer)
        return generate(TOP_K, models["soft_embedding"], custom_generate=hybrid_decode, hybrid=session)

    works = {
        "generate": lambda: generate(0),
        "hybrid projection": lambda: hybrid("projection", 0),
        "hybrid soft_embedding": lambda: hybrid("soft_embedding", 0),
        f"generate, top_k={TOP_K}": lambda: generate(TOP_K),
        f"hybrid soft_embedding, top_k={TOP_K}": lambda: hybrid("soft_embedding", TOP_K),
        f"literal soft_embedding, top_k={TOP_K}": literal,
    }
    times = setups.interleaved(works, repeats, warm)
    rates: dict = {"repeats": repeats}
    for name, values in times.items():
        base = times["generate" if "top_k" not in name else f"generate, top_k={TOP_K}"]
        rates[name] = {
            "rate_over_generate": setups.quotient(base, values),
            "tokens_per_second": round(batch * length / statistics.median(values), 1),
        }
    ours, literally = (times[f"{who} soft_embedding, top_k={TOP_K}"] for who in ("hybrid", "literal"))
    rates["rate_over_literal"] = setups.quotient(literally, ours)
    return rates


def bench_master_weights(batch: int, length: int, repeats: int, dtype: torch.dtype) -> dict:
    """Speed of decoding with float32 thinking modules relative to modules in the model's dtype."""
    tokenizer = setups.tokenizer(151936 if setups.CUDA else 8192)
    ids = tokenizer(["What is 12 plus 7 minus 3?"] * batch, return_tensors="pt")["input_ids"]
    ids = ids.to("cuda" if setups.CUDA else "cpu")
    models = {name: setups.qwen2("1.5b" if setups.CUDA else "cpu").to(dtype).eval() for name in ("float32", "model's")}
    for name, model in models.items():
        backbone = backbone_of(attach_thinking(model, ThinkingConfig()))
        for part in THINKING_MODULES if name == "model's" else ():
            small = getattr(backbone, part)
            if isinstance(small, torch.nn.Linear):  # Lambda was always float32
                plain = torch.nn.Linear(*small.weight.shape, small.bias is not None, device=ids.device, dtype=dtype)
                setattr(backbone, part, plain)
    matcher = DelimiterMatcher(tokenizer, DELIMITER, models["float32"].config.vocab_size)

    def decode(model: torch.nn.Module) -> torch.Tensor:
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": length, "min_new_tokens": length}
        return hybrid_generate(model, ids, matcher, top_k=0, do_sample=True, pad_token_id=0, **settings)

    times = setups.interleaved({name: lambda m=model: decode(m) for name, model in models.items()}, repeats)
    rates = {name: round(batch * length / statistics.median(values), 1) for name, values in times.items()}
    return {
        "rate_over_model_dtype": setups.quotient(times["model's"], times["float32"]),
        "ratio_of_medians": round(rates["float32"] / rates["model's"], 4),
        "tokens_per_second": rates,
    }


def main() -> None:
    parser = CommandLine(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=64 if not setups.CUDA else 256)
    parser.add_argument("--quick", action="store_true", help="only short completions")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--masters", action="store_true", help="only the cost of float32 thinking modules in decoding")
    options = parser.parse_args()
    patches.apply("fused_lm_head")
    size = "1.5b" if setups.CUDA else "cpu"
    if options.masters:
        found = {"command": MASTERS, "new_tokens": options.length, "repeats": options.repeats}
        for dtype in (torch.bfloat16,) if setups.CUDA else (torch.float32, torch.bfloat16):
            for batch in (8, 32):
                name = f"{str(dtype).removeprefix('torch.')}, batch {batch}"
                found[name] = bench_master_weights(batch, options.length, options.repeats, dtype)
                print(name, found[name], flush=True)
        path = setups.write("hrpo_master_weights", found)
        setups.write_table(path, masters_page)
        print(path)
        return
    if options.peak:
        made = trainer(MODES[options.peak], size, options.rows, options.length)
        one_step(made)
        one_step(made)
        print(setups.peak_memory())
        return
    results = {
        "command": "make bench-hrpo",
        "model": f"Qwen2 shape, {sum(p.numel() for p in setups.qwen2(size).parameters()) / 1e6:.0f}M parameters",
        "completions_per_step": options.rows,
        "completion_tokens": options.length,
        "repeats": options.repeats,
    }

    def measured(name: str, value: dict) -> None:
        """Write each result at once, so that a stopped run keeps its results."""
        print(name, value, flush=True)
        results[name] = value
        path = setups.write("bench_hrpo" if options.quick else "hrpo", results)
        setups.write_table(path, page)
        print(path, flush=True)

    measured("step_time_over_grpo", bench_steps(size, options.rows, options.length, options.repeats))
    measured("peak_memory_over_grpo", bench_memory(size, options.rows, options.length))
    lengths = (64,) if options.quick else (256, 1024)
    for length in lengths:
        for batch in (8, 32):
            long = length > lengths[0]  # measured second, when everything is warm
            repeats = 3 if long else options.repeats
            measured(f"decode, batch {batch}, {length} tokens", bench_decode(size, batch, length, repeats, long))


def page(found: dict) -> str:
    """The tables of benchmarks/results/hrpo_<device>.md, of the parts that are there."""
    decoded = {name.removeprefix("decode, "): part for name, part in found.items() if name.startswith("decode, ")}
    headings = [f"{name}, {part['repeats']} pairs" for name, part in decoded.items()]
    lines = [
        "# Speed and memory of HRPO",
        "",
        f"{setups.model_text(found)}. Each figure is the median of pairs that were measured in turn in one process, "
        "with the lowest and highest pair.",
        "",
        f"One step (rollout, loss, backward, update; LoRA r = 32, {found['completions_per_step']} completions of "
        f"{found['completion_tokens']} tokens) over TRL's `GRPOTrainer`, {found['repeats']} pairs:",
        "",
        "| | time | peak memory of the process |",
        "|---|---|---|",
    ]
    memory = {name: f"{part['ratio']:.2f}" for name, part in found.get("peak_memory_over_grpo", {}).items()}
    lines += [
        f"| {name} | {setups.quotient_text(step['time_over_grpo'])} | {memory.get(name, '')} |"
        for name, step in found.get("step_time_over_grpo", {}).items()
        if name != "grpo"
    ]
    lines += [
        "",
        "Tokens per second of hybrid decoding over transformers' `generate` with the same warpers. The last row is the "
        "rate over the published algorithm taken literally, in the same loop: each row's text is decoded and searched at "
        "every step, and the soft embedding is a dense V x d product.",
        "",
        f"| {' | '.join(['', *headings])} |",
        "|---" * (len(decoded) + 1) + "|",
    ]
    rows = {
        "projection": "hybrid projection",
        "soft embedding, whole vocabulary": "hybrid soft_embedding",
        f"soft embedding, `top_k={TOP_K}`": f"hybrid soft_embedding, top_k={TOP_K}",
    }
    for label, name in rows.items():
        cells = [setups.quotient_text(part[name]["rate_over_generate"]) for part in decoded.values()]
        lines.append(f"| {' | '.join([label, *cells])} |")
    literal = [setups.quotient_text(part["rate_over_literal"]) for part in decoded.values()]
    lines.append(f"| {' | '.join(['the same over the literal algorithm', *literal])} |")
    return "\n".join(lines)


def masters_page(found: dict) -> str:
    """The table of benchmarks/results/hrpo_master_weights_<device>.md."""
    lines = [
        "# Decoding with float32 thinking modules",
        "",
        f"Rate with float32 modules over the rate with modules in the model's dtype; {found['new_tokens']} new tokens, "
        f"{found['repeats']} pairs. In float32 both sides are alike, so these rows show the noise.",
        "",
        "| model | median of pairs (lowest to highest) | ratio of the median rates |",
        "|---|---|---:|",
    ]
    for name, part in found.items():
        if isinstance(part, dict) and "rate_over_model_dtype" in part:
            lines.append(
                f"| {name} | {setups.quotient_text(part['rate_over_model_dtype'])} | {part['ratio_of_medians']:.2f} |"
            )
    return "\n".join(lines)


TABLES = {"hrpo": page, "bench_hrpo": page, "hrpo_master_weights": masters_page}  # bench_hrpo: --quick


if __name__ == "__main__":
    in_sentences()
    main()
