"""Speed of thinking states in vLLM, against vLLM without them, and against decoding without vLLM.

    make bench-vllm                    # the `.venv-vllm` of the tests; with a GPU, .venv with vLLM

Weights are random. All ways of one part are measured in turn in one process. vLLM compiles its models, and captures CUDA
graphs on a GPU, as it does for users. On a CPU the times are those that one thread computes, so other work on the machine
disturbs them little.
"""

import contextlib
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import setups
from benchmarks.bench_decoding import ALL_ROWS, Lengths
from patches.vllm_engine_settings import engine_settings
from trl_ext.cli.command_line import CommandLine
from trl_ext.cli.user_errors import in_sentences
from unsloth_ext import (
    DelimiterMatcher,
    LatentConfig,
    LatentEngine,
    LatentModel,
    ThinkingConfig,
    attach_latent,
    attach_thinking,
    drop_thinking,
    hybrid_generate,
)


SHORTEST, LONGEST = 16, 256  # tokens of the completions, evenly spread
USUAL = 64  # tokens of a trainer's completions on average
STEPS = 2  # of a trainer, for one time
FILE = setups.RESULTS / f"vllm_{setups.device_name()}.json"
PARTS = ("decoding", "step", "latents")
ROWS = (32, 256) if setups.CUDA else (32,)  # of decoding; the other parts take the first


@contextlib.contextmanager
def engine_on_cpu() -> Iterator[None]:
    """While TRL's GRPO constructs, let its engine be one that is on a CPU what HRPO's is: in float32, with its weights.

    vLLM takes half precision for a model in float32, which is slow on most CPUs. Its build for CPUs packs the weights of
    each layer and drops them, so TRL could not push new ones.
    """
    from vllm.model_executor.layers import utils

    def keep(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = F.linear

    stock, utils.dispatch_cpu_unquantized_gemm = utils.dispatch_cpu_unquantized_gemm, keep
    try:
        with engine_settings(lambda: {"dtype": "float32"}):
            yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = stock


@functools.cache
def checkpoint(thinks: bool) -> tuple[Any, Any, str]:
    """A model, its tokenizer, and the folder that both were saved to."""
    model = setups.qwen2("1.5b" if setups.CUDA else "cpu").eval()
    tokenizer = setups.tokenizer(model.config.vocab_size)
    attach_thinking(model, ThinkingConfig())
    if not thinks:
        drop_thinking(model)
    folder = tempfile.mkdtemp(prefix="thinking" if thinks else "plain")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, folder


@functools.cache
def engine(folder: str) -> Any:
    from vllm import LLM

    return LLM(
        folder,
        max_model_len=512,
        max_num_seqs=ROWS[-1],
        gpu_memory_utilization=0.2 if setups.CUDA else 0.05,
        dtype="bfloat16" if setups.CUDA else "float32",
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=False,
    )


def ragged(rows: int) -> tuple[list[list[int]], torch.Tensor]:
    """Prompts, and the number of tokens of each completion (rows,)."""
    tokenizer = checkpoint(True)[1]
    prompts = [tokenizer("What is 12 plus 7? " * (1 + i % 3))["input_ids"] for i in range(rows)]
    lengths = torch.linspace(SHORTEST, LONGEST, rows).round().long()
    return prompts, lengths[torch.randperm(rows, generator=torch.Generator().manual_seed(0))]


def memory_limit(rows: int) -> float:
    """Tokens a second if a step only read the weights, and the keys and values of its rows, at the speed of a copy."""
    model = checkpoint(True)[0]
    prompts, lengths = ragged(rows)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    shape = model.config
    width = shape.num_key_value_heads * shape.hidden_size // shape.num_attention_heads
    a_token = 2 * shape.num_hidden_layers * width * model.dtype.itemsize
    contexts = sum(n * len(prompt) + n * (n + 1) // 2 for prompt, n in zip(prompts, lengths.tolist(), strict=True))
    source = torch.ones(2**28, dtype=torch.int32, device=model.device)
    goal = torch.empty_like(source)
    fastest = min(setups.seconds(lambda: goal.copy_(source)) for _ in range(10))
    bandwidth = 2 * source.nbytes / fastest
    return float(lengths.sum() * bandwidth / (weights * lengths.max() + a_token * contexts))


def decoding(rows: int) -> dict[str, Any]:
    """The ways to decode ragged rollouts, with what training needs of them."""
    from vllm import SamplingParams

    from unsloth_ext import take_traces, traced

    model, tokenizer, folder = checkpoint(True)
    prompts, lengths = ragged(rows)
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    matcher = DelimiterMatcher(tokenizer, "####", model.config.vocab_size)

    def in_vllm(llm: Any, thinks: bool) -> None:
        params = [
            SamplingParams(temperature=1.0, max_tokens=int(n), ignore_eos=True, logprobs=0, detokenize=False)
            for n in lengths
        ]
        params = [traced(one) for one in params] if thinks else params
        out = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        assert [len(one.outputs[0].token_ids) for one in out] == lengths.tolist()
        if thinks:
            take_traces(llm, params, out)

    def in_transformers(**more: Any) -> None:
        ends = Lengths(lengths.to(model.device), inputs["input_ids"].shape[1], 1)
        settings = {"max_new_tokens": LONGEST, "do_sample": True, "top_k": 0, "pad_token_id": 0}
        keep = ("hidden_states", "log_probs")
        hybrid_generate(
            model, matcher=matcher, keep=keep, return_trace=True, logits_processor=[ends], **inputs, **settings, **more
        )

    return {
        "hybrid in vLLM": functools.partial(in_vllm, engine(folder), True),
        "vLLM without thinking states": functools.partial(in_vllm, engine(checkpoint(False)[2]), False),
        "hybrid_generate": in_transformers,
        "hybrid_generate that decodes ended rows too": functools.partial(in_transformers, **ALL_ROWS),
    }


def step(rows: int) -> dict[str, Any]:
    """Trainers of the same prompts, each run for a few steps. So many tokens end a text that the lengths are ragged."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from trl_ext import HRPOConfig, HRPOTrainer

    model, tokenizer, folder = checkpoint(False)
    ends = torch.linspace(1, model.config.vocab_size - 1, model.config.vocab_size // USUAL).long()
    model.generation_config.eos_token_id = ends.tolist()
    model.generation_config.save_pretrained(folder)
    data = Dataset.from_list([{"prompt": "What is 12 plus 7? " * (1 + i % 3)} for i in range(64)])
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    def trainer(cls: type, config: type, **settings: Any) -> Any:
        common = setups.few_steps("bfloat16" if setups.CUDA else "float32", STEPS)
        common |= {"per_device_train_batch_size": rows, "num_generations": 8, "max_completion_length": LONGEST}
        engine = {"vllm_gpu_memory_utilization": 0.2 if setups.CUDA else 0.05, "vllm_max_model_length": 512}
        return cls(
            folder,
            lambda completions, **_: [float(len(text) % 7) for text in completions],
            config(**common, **(engine if settings["use_vllm"] else {}), **settings),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, target_modules=layers),
        )

    in_vllm = {"use_vllm": True, "vllm_mode": "colocate"}
    found = {
        "HRPO with vLLM": trainer(HRPOTrainer, HRPOConfig, **in_vllm).train,
        "HRPO with generate": trainer(HRPOTrainer, HRPOConfig, use_vllm=False).train,
    }
    with contextlib.nullcontext() if setups.CUDA else engine_on_cpu():
        found["GRPO of TRL with vLLM"] = trainer(GRPOTrainer, GRPOConfig, **in_vllm).train
    return found


def latents(rows: int) -> dict[str, Any]:
    """Answers after six latent tokens (CODI), greedy."""
    model = setups.qwen2("1.5b" if setups.CUDA else "cpu").eval()
    tokenizer = setups.tokenizer(model.config.vocab_size)
    attach_latent(model, tokenizer, LatentConfig(num_latents=6, iterations=None, projection_dim=None))
    latent = LatentModel(model, tokenizer)
    engine = LatentEngine(
        model,
        gpu_memory_utilization=0.2 if setups.CUDA else 0.05,
        max_model_len=512,
        max_num_seqs=rows,
    )
    texts = ["What is 12 plus 7? " * (1 + i % 3) for i in range(rows)]
    settings = {"max_new_tokens": LONGEST // 2, "do_sample": False}
    return {
        "answers in vLLM": lambda: latent.generate(texts, engine=engine, **settings),
        "answers in transformers": lambda: latent.generate(texts, **settings),
    }


def measured(times: dict[str, list[float]]) -> dict[str, Any]:
    """How many times as fast the first way is as each other one, and the seconds of each."""
    (_, ours), *others = times.items()
    return {
        "times_as_fast": {name: setups.quotient(values, ours) for name, values in others},
        "seconds": {name: round(statistics.median(values), 3) for name, values in times.items()},
    }


def main() -> None:
    parser = CommandLine(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=3 if setups.CUDA else 5)
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--more", action="store_true", help="keep the other parts of the file")
    options = parser.parse_args()
    if len(options.parts) > 1:  # in processes of their own: engines of LLM and of TRL do not share one
        for part in options.parts:
            given = ["--parts", part, "--repeats", str(options.repeats)]
            given += ["--rows", *map(str, options.rows)] if options.rows else []
            given += ["--more"] if part != options.parts[0] else []
            subprocess.run([sys.executable, __file__, *given], check=True)
        return
    torch.set_num_threads(1)
    import vllm

    (part,) = options.parts
    found: dict[str, Any] = {
        "command": "make bench-vllm",
        "model": f"Qwen2 shape, {sum(p.numel() for p in checkpoint(False)[0].parameters()) / 1e6:.0f}M parameters",
        "vllm": vllm.__version__,
        "repeats": options.repeats,
        "parts": json.loads(FILE.read_text())["parts"] if options.more else {},
    }
    for rows in options.rows or (ROWS if part == "decoding" else ROWS[:1]):
        works = {"decoding": decoding, "step": step, "latents": latents}[part](rows)
        clock = time.perf_counter if setups.CUDA else time.process_time
        result = measured(setups.interleaved(works, options.repeats, clock=clock))
        if part == "decoding":
            rate = int(ragged(rows)[1].sum()) / next(iter(result["seconds"].values()))
            result |= {"tokens_per_second": round(rate), "share_of_memory_limit": round(rate / memory_limit(rows), 3)}
        print(part, rows, result, flush=True)
        found = {**found, "parts": {**found["parts"], f"{part}, {rows} rows": result}}
        setups.write_table(setups.write("vllm", found), page)


def page(found: dict) -> str:
    """The table of benchmarks/results/vllm_<device>.md."""
    lines = [
        "# vLLM",
        "",
        f"{setups.model_text(found)}. vLLM {found['vllm']}. How many times as fast one way is as another. Each figure is "
        f"the median of {found['repeats']} pairs, measured in turn in one process, with the lowest and highest pair. "
        "The second figure is the ratio of the fastest times."
        + (" The times are those that one thread computed." if found["device"] == "cpu" else ""),
        "",
        f"Decoding: sampled completions of {SHORTEST} to {LONGEST} tokens, evenly spread, with log-probs, and with hidden "
        f"states where there are any. A step: {STEPS} steps of a trainer with LoRA, whose completions have {USUAL} tokens "
        f"on average and {LONGEST} at most. Latents: greedy answers of {LONGEST // 2} tokens after six latent tokens of "
        "CODI.",
        "",
        "| | over | times as fast | fastest |",
        "|---|---|---|---:|",
    ]
    for part, value in found["parts"].items():
        ours = next(iter(value["seconds"]))
        lines += [
            f"| {ours}, {part.partition(', ')[2]} | {name} | {setups.quotient_text(ratio)} | {ratio['fastest']:.2f} |"
            for name, ratio in value["times_as_fast"].items()
        ]
    lines += ["", "The memory limit is a step that only reads the weights, keys and values, at the speed of a copy."]
    lines += [
        f"{part.capitalize()}, hybrid in vLLM: {value['tokens_per_second']:,} tokens a second, "
        f"{value['share_of_memory_limit']:.0%} of the memory limit."
        for part, value in found["parts"].items()
        if "tokens_per_second" in value
    ]
    return "\n".join(lines)


TABLES = {"vllm": page}


if __name__ == "__main__":
    in_sentences()
    main()
