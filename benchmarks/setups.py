"""Models, data and timers that the benchmarks share. Weights are random, as speed does not depend on them."""

import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, Qwen2Config


RESULTS = Path(__file__).parent / "results"
CUDA = torch.cuda.is_available()
# Width, inner width, layers, query heads, key-value heads, vocabulary
SHAPES = {
    "check": (256, 512, 2, 4, 2, 2048),
    "cpu": (384, 1024, 6, 6, 2, 8192),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
}


def qwen2(size: str) -> torch.nn.Module:
    """A model with random weights in the shape of Qwen2.

    `check` is as small as attention kernels allow. `cpu` has 13M parameters, so that arithmetic dominates Python on two
    cores. `1.5b` has the shape of Qwen2.5-1.5B.
    """
    hidden, inner, layers, heads, kv, vocab = SHAPES[size]
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if CUDA else torch.float32
    with torch.device("cuda" if CUDA else "cpu"):  # initialise on the GPU: a billion random numbers are slow on a CPU
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def model_text(found: dict) -> str:
    """The model of a file of results, for its table."""
    hidden, _, layers, heads, kv, vocab = SHAPES["cpu" if found["device"] == "cpu" else "1.5b"]
    return (
        f"{found['model']} (width {hidden}, {layers} layers, {heads} query and {kv} key-value heads, vocabulary {vocab}), "
        "random weights"
    )


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, filled up with made-up tokens. `#` is a single token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(["<pad>", "<eos>", *alphabet])}
    for i in range(vocab_size - len(vocab)):
        vocab[f"w{i}"] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def loading(precision: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for float32, bfloat16 or 4bit on this device."""
    found = {"dtype": "float32" if precision == "float32" else "bfloat16", "device_map": "cuda" if CUDA else "cpu"}
    if precision == "4bit":
        found["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    return found


def reasoned() -> Dataset:
    """Questions and answers of several lengths."""
    return Dataset.from_list(
        [
            {
                "prompt": "What is 12 plus 7? " * (1 + i % 3),
                "completion": "12 + 7 = 19. " * (1 + i % 4) + f"#### {19 + i}",
            }
            for i in range(24)
        ]
    )


def few_steps(precision: str, steps: int) -> dict[str, Any]:
    """Arguments of a trainer for a short run on this device."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 8,
        "max_steps": steps,
        "logging_steps": 1,
        "bf16": precision != "float32",
        "use_cpu": not CUDA,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def watched(trainer: Any, parts: list[str]) -> dict:
    """Train, and return whether losses and gradient norms were finite and which parts did not change."""
    learning = {n: p for n, p in trainer._named_trained().items() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in learning.items()}
    trainer.train()
    moved = [n for n, p in learning.items() if not torch.equal(p, before[n])]
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "finite": all(math.isfinite(entry[name]) for entry in steps for name in ("loss", "grad_norm")),
        "not_learning": [part for part in parts if not any(part in n for n in moved)],
    }


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Wall time of one call, including work on the device, or its time on another clock."""
    if CUDA:
        torch.cuda.synchronize()
    start = clock()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return clock() - start


def interleaved(
    works: dict[str, Callable[[], object]],
    repeats: int,
    warm: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times of each function, measured in turn (A B C A B C ...), so that slow changes of the machine affect all
    equally.

    One uncounted round comes first, unless `warm` is set.
    """
    for work in () if warm else works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, clock))
    return times


def quotient(above: list[float], below: list[float]) -> dict[str, float]:
    """Ratios of times that were measured in turn.

    Returns:
        Median, lowest and highest of the pairs, and the ratio of the fastest times, which other work on the machine
        disturbs least.
    """
    pairs = sorted(a / b for a, b in zip(above, below, strict=True))
    return {
        "median": round(statistics.median(pairs), 4),
        "fastest": round(min(above) / min(below), 4),
        "lowest": round(pairs[0], 4),
        "highest": round(pairs[-1], 4),
    }


def quotient_text(q: dict[str, float]) -> str:
    """A `quotient` as text: the median with the lowest and the highest pair."""
    return f"{q['median']:.2f} ({q['lowest']:.2f} to {q['highest']:.2f})"


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU's allocator, or of this process in main memory."""
    if CUDA:
        return torch.cuda.max_memory_allocated()
    # Not getrusage: a child process inherits its parent's peak there
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def device_name() -> str:
    return torch.cuda.get_device_name().replace(" ", "-").lower() if CUDA else "cpu"


def write(name: str, results: dict) -> Path:
    """Write `results/<name>_<device>.json`, with the device and the versions that were measured."""
    RESULTS.mkdir(exist_ok=True)
    import transformers
    import trl

    header = {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
    }
    path = RESULTS / f"{name}_{device_name()}.json"
    part = path.with_suffix(".part")  # a file that is cut off would lose all results
    part.write_text(json.dumps({**header, **results}, indent=2) + "\n")
    return part.replace(path)


def write_table(path: Path, table: Callable[[dict], str]) -> None:
    """Write the Markdown page beside a JSON file of results."""
    path.with_suffix(".md").write_text(page(path, table))


def page(path: Path, table: Callable[[dict], str]) -> str:
    """The Markdown page of a JSON file of results.

    Args:
        path: the JSON file.
        table: makes Markdown with a heading from the content of the file.
    """
    found = json.loads(path.read_text())
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    device = f"a CPU (threads: {found['threads']})" if found["device"] == "cpu" else found["device"]
    return (
        f"{table(found)}\n\nMade by `{found['command']}` from [{path.name}]({path.name}). Measured on {device}, "
        f"{found['machine']}, with {versions}.\n"
    )


def so_far(name: str, fresh: bool, made_with: dict[str, Any]) -> tuple[Path, dict[str, dict]]:
    """The file of results on this device, and its results.

    Raises:
        ValueError: it was made with other settings, and `fresh` is not set.
    """
    path = RESULTS / f"{name}_{device_name()}.json"
    if fresh:
        path.unlink(missing_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {"made_with": made_with, "results": {}}
    before = found.get("made_with", {})
    other = [f"{k}={before.get(k)}, now {v}" for k, v in made_with.items() if before.get(k) != v]
    if other:
        raise ValueError(f"{path} was made with other settings ({'; '.join(other)}): --fresh deletes these results")
    return path, found["results"]
