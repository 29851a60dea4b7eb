"""`latent-reasoning plan --model 7b --gpus 16 --engine fsdp2 --method hrpo`: does it fit, and what does it cost?

It prints the memory of each GPU by part, the traffic of a step, and the times of rollout and training. Parameters are
counted in the real model, and activations in its real forward, both without memory (meta and fake tensors). docs/scale.md
says which terms were measured, and which are estimates.
"""

import copy
import dataclasses
import math
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

from ..common.engines import ENGINES
from ..common.run_folder import PROGRAM
from .command_line import CommandLine
from .console import PlainConsole


# hidden_size, intermediate_size, layers, heads, KV heads, vocabulary, tied embeddings: those of Qwen2.5
SIZES = {
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "3b": (2048, 11008, 36, 16, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "14b": (5120, 13824, 48, 40, 8, 152064, False),
    "32b": (5120, 27648, 64, 40, 8, 152064, False),
    "72b": (8192, 29568, 80, 64, 8, 152064, False),
}
# Memory in GiB, dense bf16 FLOP/s, and bytes/s of its memory, its links in a node (one way) and its network between nodes
GPUS = {
    "a100-80": (80, 312e12, 2.0e12, 300e9, 25e9),
    "h100": (80, 989e12, 3.35e12, 450e9, 50e9),
    "h200": (141, 989e12, 4.8e12, 450e9, 50e9),
}
PER_NODE = 8
SAMPLES = ("hrpo", "spo", "ppo")
LATENT = ("codi", "pccot", "kava")
TAUGHT = ("logits_distill", "kv_distill")
METHODS = (*SAMPLES, *LATENT, *TAUGHT, "reasoning_distill", "concept", "planner")
ONE_UNIT = (*LATENT, "planner")  # FSDP2 gathers all weights at once for them
BUCKET = 500_000_000  # numbers in DeepSpeed's buckets for reductions
LIVE = 1_000_000_000  # numbers that ZeRO-3 keeps gathered
CHUNK = 2048  # tokens whose logits TRL has in memory at once
USED = 0.4  # share of the FLOP/s that training reaches (an assumption)
READ = 0.5  # share of the memory's speed that decoding reaches (an assumption)
GIB = 2**30


@dataclasses.dataclass
class Run:
    """What is to be trained, and on what.

    Attributes:
        model: a key of `SIZES`, a folder or a hub id.
        method: one of `METHODS`.
        engine: "one" (one process), "ddp", or a key of `ENGINES`.
        gpus: number of processes.
        rows: rows of one forward in each process.
        prompt, completion: tokens of a row.
        generated: rows of a rollout in each process.
        mixed: train in bf16 (mixed precision), as the files in recipes/accelerate/ say; else in float32.
        lora_r: rank of LoRA on all linear layers; 0: all weights are trained.
        checkpointing: recompute the activations of each layer in the backward.
        teacher: a model, for methods with one.
        latents: number of latent tokens, for methods with them.
        vllm_gpus: further GPUs, of a vLLM server with tensor parallelism that makes the rollouts; 0: the training GPUs
            make them.
    """

    model: str = "7b"
    method: str = "hrpo"
    engine: str = "fsdp2"
    gpus: int = 8
    rows: int = 4
    prompt: int = 256
    completion: int = 768
    generated: int = 32
    mixed: bool = True
    lora_r: int = 0
    checkpointing: bool = True
    teacher: str = "7b"
    latents: int = 6
    vllm_gpus: int = 0


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a size, a folder or a hub id."""
    if name.lower() not in SIZES:
        return AutoConfig.from_pretrained(name)
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = SIZES[name.lower()]
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


def _model(
    config: PreTrainedConfig, run: Run, layers: int | None = None, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    config = copy.deepcopy(config)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if run.lora_r:
        lora = LoraConfig(r=run.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    return model.train()


def parameters(config: PreTrainedConfig, run: Run) -> tuple[int, int, int]:
    """Numbers of all parameters, of the trained ones, and of the largest part that FSDP2 gathers at once."""
    with torch.device("meta"):
        model = _model(config, run)
    counts = [p.numel() for p in model.parameters()]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layer = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0]
    embedding = model.get_input_embeddings().weight.numel()
    return sum(counts), trained, 2 * max(sum(p.numel() for p in layer.parameters()), embedding)


def activations(config: PreTrainedConfig, run: Run, tokens: int) -> tuple[int, int]:
    """Bytes that a forward of `rows` x `tokens` saves for its backward: (all layers together, outside of the layers).

    They are those of one and two layers; the others are like the second. LoRA on all linear layers saves about the same as
    training all weights, as it needs the same inputs, so its own small ones are left out.
    """
    one, two = (_saved(config, run, tokens, layers) for layers in (1, 2))
    layers = config.get_text_config().num_hidden_layers
    layer = two - one
    outside = one - layer
    if not run.checkpointing:
        return layer * layers, outside
    hidden = run.rows * tokens * config.get_text_config().hidden_size * (2 if run.mixed else 4)
    return layers * hidden + layer, outside


def _saved(config: PreTrainedConfig, run: Run, tokens: int, layers: int) -> int:
    found: dict[int, int] = {}
    with FakeTensorMode():
        autocast = run.mixed and run.engine in ("one", "ddp")  # the other engines cast the weights
        dtype = torch.bfloat16 if run.mixed and not autocast else torch.float32
        model = _model(config, dataclasses.replace(run, lora_r=0), layers, dtype)
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                found[storage._cdata] = storage.nbytes()
            return x

        ids = torch.zeros(run.rows, tokens, dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
            total = sum(found.values())
        del out
    return total


def memory(run: Run) -> dict[str, float]:
    """Bytes on each GPU by part, and the two peaks.

    The keys are "weights", "gathered weights", "gradients", "optimizer", "buckets" (for reductions), "activations",
    "logits", "rollout states", "KV cache", "teacher", "critic", "peak of training" and "peak of rollouts".
    """
    config = config_of(run.model)
    text = config.get_text_config()
    count, trained, unit = parameters(config, run)
    n, half = run.gpus, 2 if run.mixed else 4
    sharded = run.engine in ENGINES
    tokens = run.prompt + run.completion
    found: dict[str, float] = {}
    # Weights, and what is gathered of them
    if not sharded:
        found["weights"], gathered = 4 * count, 0.0
        found["gradients"] = 4 * trained
        found["buckets"] = 4 * trained if n > 1 else 0
        found["optimizer"] = 8 * trained
    elif run.engine.startswith("fsdp"):
        found["weights"] = 4 * count / n
        gathered = half * (count if run.method in ONE_UNIT else min(count, unit))
        found["gradients"] = 4 * trained / n
        found["optimizer"] = 8 * trained / n
        found["buckets"] = 0
    else:
        stage = int(run.engine[-1])
        found["weights"] = half * count / (n if stage == 3 else 1) + 4 * trained / n
        gathered = half * min(count, LIVE) if stage == 3 else 0.0
        found["gradients"] = half * trained / (1 if stage == 1 else n)
        found["buckets"] = half * BUCKET
        found["optimizer"] = 8 * trained / n
    found["gathered weights"] = gathered
    # One forward and its backward
    passes = _passes(run)
    inside, outside = activations(config, run, tokens)
    found["activations"] = passes * inside + outside
    whole = run.method in (*LATENT, "planner", "logits_distill")
    scored = run.rows * (run.completion if run.method in SAMPLES else tokens)
    found["logits"] = text.vocab_size * 4 * (2 * scored * passes if whole else 2 * min(scored, CHUNK))
    # What the method keeps
    found["rollout states"] = found["KV cache"] = 0.0
    if run.method in SAMPLES and not run.vllm_gpus:
        found["KV cache"] = _kv_cache(config, run)
    if run.method == "hrpo":
        found["rollout states"] = run.generated * run.completion * text.hidden_size * half
    found["teacher"] = 0.0
    if run.method in TAUGHT:
        share = n if run.engine in ("fsdp1", "fsdp2", "zero3") else 1
        found["teacher"] = 2 * parameters(config_of(run.teacher), dataclasses.replace(run, lora_r=0))[0] / share
    found["critic"] = 16.0 * count if run.method == "ppo" else 0.0
    stays = sum(found[name] for name in ("weights", "optimizer", "buckets", "rollout states", "teacher", "critic"))
    # Activations leave while gradients come. The unsharded gradients of one part wait for their reduction. Those of one
    # unit all come in the first backward of several, while the activations of the others are still there
    part, together = (min(trained, unit), 0) if run.method not in ONE_UNIT else (trained, trained)
    waiting, there = (half * part, half * together) if run.engine.startswith("fsdp") else (0, 0)
    working = max(found["activations"] + found["logits"] + there, found["gradients"] + waiting)
    found["peak of training"] = stays + gathered + working
    found["peak of rollouts"] = 0.0
    if run.method in SAMPLES:
        at_once = 0.0
        if run.engine in ("fsdp1", "fsdp2", "zero3"):
            # A push to vLLM gathers one weight after the other, and with LoRA all of them
            at_once = 2 * unit if run.vllm_gpus and not run.lora_r else half * count
        sampled = 0 if run.vllm_gpus else run.generated * text.vocab_size * 4 * 3
        found["peak of rollouts"] = stays + at_once + found["KV cache"] + sampled
    return found


def server_memory(run: Run) -> dict[str, float]:
    """Bytes on each GPU of the vLLM server: its weights, and the KV cache of the whole rollout.

    With less room for the cache, vLLM makes the rollout in parts.
    """
    config = config_of(run.model)
    count, _, _ = parameters(config, dataclasses.replace(run, lora_r=0))
    return {
        "weights": 2 * count / run.vllm_gpus,
        "KV cache": _kv_cache(config, run) * run.gpus / run.vllm_gpus,
    }


def _kv_cache(config: PreTrainedConfig, run: Run) -> float:
    """Bytes of the keys and values of a rollout in one process."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rows = run.generated * (run.prompt + run.completion)
    return 2 * text.num_hidden_layers * heads * width * rows * (2 if run.mixed else 4)


def _passes(run: Run) -> float:
    """How many forwards of whole rows a loss holds the activations of."""
    if run.method in LATENT:  # question and teacher; latent tokens and the student's answer, half of the completion
        return 1 + (run.latents + run.completion / 2) / (run.prompt + run.completion)
    return {"planner": 2}.get(run.method, 1)


def traffic(run: Run) -> dict[str, float]:
    """Bytes that each GPU sends in one step, by cause."""
    count, trained, _ = parameters(config_of(run.model), run)
    half, share = 2 if run.mixed else 4, (run.gpus - 1) / run.gpus
    found = {"gradients": 0.0, "weights": 0.0, "weights for a rollout": 0.0, "rollout states": 0.0}
    if run.engine == "ddp":
        found["gradients"] = 2 * 4 * trained * share
    elif run.engine in ENGINES:
        found["gradients"] = half * trained * share
        gathers = {"fsdp1": 2, "fsdp2": 1 if run.method in ONE_UNIT else 2, "zero3": 2}.get(run.engine)
        found["weights"] = half * (trained if gathers is None else gathers * count) * share
        if gathers and run.method in SAMPLES:
            found["weights for a rollout"] = half * count * share
    if run.vllm_gpus:  # the first process sends them to the server
        found["weights for a rollout"] += 2 * count
    if run.vllm_gpus and run.method == "hrpo":  # and the thinking states of all rows to the other processes
        width = config_of(run.model).get_text_config().hidden_size
        found["rollout states"] = run.generated * run.gpus * run.completion * width * half
    return found


def times(run: Run, gpu: str) -> dict[str, float]:
    """Seconds of one step, by part: estimates from the GPU's speeds."""
    config = config_of(run.model)
    count, _, _ = parameters(config, run)
    _, flops, speed, inside, between = GPUS[gpu]
    tokens = (run.prompt + run.completion) * (run.generated if run.method in SAMPLES else run.rows)
    passes = 6 + 2 * run.checkpointing + (2 if run.method in SAMPLES else 0) + (2 if run.method in TAUGHT else 0)
    link = inside if run.gpus <= PER_NODE else between
    found = {
        "training": passes * _passes(run) * count * tokens / (flops * USED),
        "traffic": sum(traffic(run).values()) / link,
        "rollout": 0.0,
    }
    if run.method in SAMPLES:
        rows, by = (run.generated * run.gpus, run.vllm_gpus) if run.vllm_gpus else (run.generated, 1)
        step = (2 * count + _kv_cache(config, run) * rows / run.generated / 2) / (speed * READ * by)
        found["rollout"] = run.completion * max(step, 2 * count * rows / (flops * USED * by))
    return found


def parser() -> CommandLine:
    """The parser of this command."""
    made = CommandLine(prog=f"{PROGRAM} plan", description=__doc__.partition("\n")[0])
    default = Run()
    made.add_argument("--model", default=default.model, help=f"{', '.join(SIZES)}, a folder or a hub id")
    made.add_argument("--method", default=default.method, choices=METHODS)
    made.add_argument("--engine", default=default.engine, choices=("one", "ddp", *ENGINES))
    made.add_argument("--gpu", default="h100", choices=GPUS)
    made.add_argument("--teacher", default=default.teacher, help="the same, for methods with a teacher")
    for name, what in (
        ("gpus", "number of GPUs"),
        ("rows", "rows of one forward on each GPU (per_device_train_batch_size)"),
        ("prompt", "tokens of a prompt"),
        ("completion", "tokens of a completion"),
        ("generated", "rows of a rollout on each GPU"),
        ("lora_r", "rank of LoRA; 0: all weights are trained"),
        ("latents", "number of latent tokens"),
        ("vllm_gpus", "further GPUs, of a vLLM server that makes the rollouts; 0: the training GPUs make them"),
    ):
        made.add_argument(f"--{name}", type=int, default=getattr(default, name), help=what)
    made.add_argument("--float32", action="store_true", help="no mixed precision")
    made.add_argument("--no_checkpointing", action="store_true", help="keep all activations")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan of a run. Return 1 if it does not fit."""
    flags = vars(parser().parse_args(argv))
    gpu = flags.pop("gpu")
    run = Run(mixed=not flags.pop("float32"), checkpointing=not flags.pop("no_checkpointing"), **flags)
    for name in ("gpus", "rows", "prompt", "completion", "generated"):
        if getattr(run, name) < 1:
            raise ValueError(f"--{name} {getattr(run, name)}: must be at least 1")
    if run.engine == "one" and run.gpus > 1:
        raise ValueError(f"--engine one --gpus {run.gpus}: one process has one GPU; choose another engine")
    if run.vllm_gpus and run.method not in SAMPLES:
        raise ValueError(f"--vllm_gpus {run.vllm_gpus}: only {', '.join(SAMPLES)} have rollouts; leave it out")
    found = memory(run)
    console = PlainConsole()
    table = Table(title=f"{run.method} of {run.model} on {run.gpus} x {gpu} with {run.engine}", title_justify="left")
    for heading in ("", "GiB on each GPU"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, size in found.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}", end_section=name in ("critic", "KV cache"))
    console.print(table)
    peak, holds = max(found["peak of training"], found["peak of rollouts"]), GPUS[gpu][0] - 4
    fits = peak / GIB <= holds
    verdict = "fits" if fits else "does not fit"
    room = f"a {gpu}, which has {holds} for tensors (4 are left for CUDA and gaps)"
    console.print(f"{peak / GIB:.1f} GiB {verdict} into {room}")
    if run.vllm_gpus:
        parts = server_memory(run)
        fits = fits and parts["weights"] / GIB < holds
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        enough = "" if sum(parts.values()) / GIB <= holds else "; the rollout is made in parts"
        if parts["weights"] / GIB >= holds:
            enough = ": its weights do not fit"
        console.print(f"GiB on each GPU of the vLLM server: {listed}{enough}")
    nodes = math.ceil(run.gpus / PER_NODE) + math.ceil(run.vllm_gpus / PER_NODE)
    console.print(f"nodes of {PER_NODE} GPUs: {nodes}")
    sent = ", ".join(f"{name} {size / GIB:.2f}" for name, size in traffic(run).items() if size)
    console.print(f"traffic of a step, GiB sent by each GPU: {sent or 'none'}")
    spent = ", ".join(f"{name} {seconds:.2f}" for name, seconds in times(run, gpu).items() if seconds)
    console.print(f"seconds of a step, estimated from the speeds of a {gpu}: {spent}")
    return 0 if fits else 1
