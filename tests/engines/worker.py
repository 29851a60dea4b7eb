"""One of two ranks that train a few steps: ENGINE CASE FOLDER [OPTIONS]. Each writes losses, lengths and weights.

OPTIONS is JSON with `settings` (of the configuration), `resume` (a checkpoint), `evaluate` (before training), `push`
(what vLLM would get at the end), `alike` (each row of HRPO draws the same in any number of processes) and `name` (of the
files).
"""

import functools
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from datasets import Dataset
from transformers import training_args
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from tests import tiny
from tests.processes import leave
from tests.trl_ext.concept import setups as concept
from tests.trl_ext.distill import setups as distill
from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.kv_distill import setups as kv
from tests.trl_ext.latent import setups as latent
from tests.trl_ext.planner import setups as planner
from tests.trl_ext.ppo import setups as ppo
from tests.trl_ext.spo import setups as spo
from trl_ext.common.vllm_pushes import pushing_weights
from trl_ext.tasks.evaluation import evaluate
from unsloth_ext import LatentModel
from unsloth_ext.common.sharding import full
from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.hrpo.recompute import RECOMPUTE_MODES
from unsloth_ext.hrpo.states import SOFT_SOURCES

from . import stock


def untied():
    """A model whose embedding and head are two matrices, which accelerate makes two units of FSDP2."""
    config = tiny.config("llama")
    config.tie_word_embeddings = False
    return tiny.from_config(config, std=0.1)


CASES = {
    **stock.CASES,
    "hrpo": functools.partial(hrpo.hrpo, peft=False),
    "hrpo, LoRA": hrpo.hrpo,
    **{
        f"hrpo, {source}, {mode}": functools.partial(hrpo.hrpo, peft=False, thinking_source=source, recompute=mode)
        for source in ("projection", "soft_embedding")
        for mode in RECOMPUTE_MODES
        if (source, mode) != ("projection", "soft_bptt")
    },
    **{
        f"hrpo, {source}": functools.partial(hrpo.hrpo, peft=False, thinking_source=source, recompute="frozen")
        for source in SOFT_SOURCES
    },
    "hrpo, embedding_rms": functools.partial(hrpo.hrpo, peft=False, thinking_norm="embedding_rms"),
    **{
        f"hrpo, untied, {name}": lambda folder, case=case, **changes: hrpo.hrpo(
            folder, peft=False, model=untied(), **case, **changes
        )
        for name, case in {
            "rollout": {"thinking_source": "soft_embedding", "recompute": "rollout"},
            "two_pass": {"thinking_source": "soft_embedding", "recompute": "two_pass"},
            "jacobi": {"thinking_source": "soft_embedding", "recompute": "jacobi"},
            "embedding_rms": {"thinking_norm": "embedding_rms"},
        }.items()
    },
    "logits": lambda folder, **changes: distill.logits(folder, teacher_model=f"{folder}/teacher", **changes),
    "logits, LoRA": lambda folder, **changes: distill.logits(
        folder, teacher_model=f"{folder}/teacher", peft=True, **changes
    ),
    "reasoning": distill.reasoning,
    **{
        f"kv, {name}": lambda folder, case=case, **changes: kv.trainer(
            folder, given_teacher=f"{folder}/kv_teacher", **case, **changes
        )
        for name, case in kv.CASES.items()
    },
    **{f"concept, {name}": functools.partial(concept.trainer, **case) for name, case in concept.CASES.items()},
    "concept, LoRA": functools.partial(concept.trainer, peft=True),
    "hrpo, reference model": functools.partial(hrpo.hrpo, peft=False, beta=0.1),
    **{f"latent, {name}": functools.partial(latent.trainer, peft=False, **case) for name, case in latent.CASES.items()},
    **{  # engines clip the step decoder by itself
        f"latent, {name}": functools.partial(latent.trainer, peft=False, max_grad_norm=0.0, **latent.CASES[name])
        for name in ("sequential, written", "jacobi, written")
    },
    "latent grpo": latent.grpo,
    "latent grpo, LoRA": functools.partial(latent.grpo, peft=True),
    "latent, staged": functools.partial(latent.trainer, peft=False, **latent.STAGED),
    "latent, LoRA": functools.partial(latent.trainer, **latent.CASES["sequential"]),
    "planner": planner.trainer,
    "planner, LoRA": functools.partial(planner.trainer, peft=True),
    "ppo": ppo.ppo,
    "ppo, target_kl": functools.partial(ppo.ppo, target_kl=1e-4, num_iterations=4, max_steps=8),
    "ppo, LoRA": lambda folder, **changes: ppo.ppo(folder, peft_config=ppo.lora(), **changes),
    "spo": spo.spo,
    "spo, LoRA": functools.partial(spo.spo, peft=True),
}

# Not run against DDP in float32
OTHERS = {
    "latent, half": lambda folder, **changes: latent.trainer(
        folder, peft=False, model=tiny.model(std=0.1, dtype=torch.bfloat16), **latent.CASES["sequential"], **changes
    )
}


def prepare(engine: str) -> None:
    """accelerate starts FSDP and DeepSpeed only where there are GPUs. Let it take gloo for NCCL, and the CPU for a GPU."""
    if engine in ("one", "ddp"):
        return
    training_args.is_torch_bf16_gpu_available = lambda: True
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    made = DeepSpeedPlugin.__post_init__

    def splitting_all(plugin):  # ZeRO-3 would keep weights of less than 100,000 numbers whole, which here are all
        made(plugin)
        plugin.hf_ds_config.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = splitting_all


def writes(case: str) -> bool:
    """Whether the trained model of a case is asked for texts."""
    return case.startswith(("hrpo", "latent", "logits", "kv"))


def written(trainer, case: str) -> list[str]:
    """What the trained model writes, as in the evaluation of a recipe."""
    questions = ["1+2=", "3+4=", "5=", "1+1+1="]
    if not writes(case):
        return []
    if case.startswith("latent"):
        return LatentModel(trainer.model, trainer.processing_class).generate(
            questions, max_new_tokens=8, min_new_tokens=4
        )
    rows = Dataset.from_list([{"prompt": question, "answer": "1"} for question in questions])
    return evaluate(trainer.model, trainer.processing_class, rows, delimiter="#", max_new_tokens=8).completions


def drawing_alike() -> Callable[..., torch.Tensor]:
    """In place of `torch.multinomial`: a row draws by its place among the rows of all processes. No text ends."""
    rank, step = int(os.environ.get("RANK", 0)), itertools.count()

    def draw(probs: torch.Tensor, *_, **__) -> torch.Tensor:
        row = torch.arange(len(probs)) + rank * len(probs)
        place = ((row + 1) * 0.618034 + next(step) * 0.754878) % 1
        probs = probs.double().clone()
        probs[:, :3] = 0  # special tokens
        sums = probs.cumsum(-1)
        return (sums < place[:, None] * sums[:, -1:]).sum(-1, keepdim=True)

    return draw


def noise_alike() -> None:
    """Let the noise of soft tokens depend on the place of a row among the rows of all processes, and not on a seed."""
    rank, step = int(os.environ.get("RANK", 0)), itertools.count(1)

    def uniform(like: torch.Tensor) -> torch.Tensor:
        row = torch.arange(len(like))[:, None] + rank * len(like) + 1
        place = row * 0.618034 + torch.arange(like.shape[1]) * 0.569840 + next(step) * 0.754878
        return (place % 1).clamp(0.01, 0.99).to(like.dtype)

    torch.randn_like = lambda like: torch.special.ndtri(uniform(like))
    torch.Tensor.exponential_ = lambda like: like.copy_(-uniform(like).log())


def pushed(trainer) -> dict[str, torch.Tensor]:
    """What TRL sends to vLLM for a rollout, by name."""
    generation = VLLMGeneration.__new__(VLLMGeneration)
    generation.model, generation.accelerator = trainer.model, trainer.accelerator
    generation._dist = DistributedBackend(trainer.accelerator)
    with pushing_weights(trainer):
        return {name: value.detach().clone() for name, value in generation._iter_named_params()}


def main() -> None:
    engine, case, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    options = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    processes = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    prepare(engine)
    trainer = (CASES | OTHERS)[case](
        folder,
        per_device_train_batch_size=8 // processes,
        use_cpu=engine in ("one", "ddp"),
        **options.get("settings", {}),
    )
    lengths = []
    if case.startswith("hrpo"):
        with torch.random.fork_rng():  # each process samples its own
            tiny.loud_gates(backbone_of(trainer.model))
        # So many tokens end a text that the processes need different numbers of forwards
        ends = [1] if options.get("alike") else [1, *range(10, 25)]
        trainer.eos_token_ids = trainer.generation_config.eos_token_id = ends
        generate = trainer._generate_single_turn

        def seeing(*args, **kwargs):
            out = generate(*args, **kwargs)
            lengths.append(max(map(len, out[0])))
            return out

        trainer._generate_single_turn = seeing
    if options.get("alike"):
        torch.multinomial = drawing_alike()
        noise_alike()
    if options.get("evaluate"):
        trainer.evaluate()
    trainer.train(options.get("resume"))
    # With FSDP1 no texts can be written
    texts = [] if engine == "fsdp1" or "resume" in options else written(trainer, case)
    named = getattr(trainer, "_named_trained", lambda: dict(trainer.model.named_parameters()))()
    weights = {name: full(value).detach().clone() for name, value in named.items()}
    rank = int(os.environ.get("RANK", 0))
    logs = [
        {
            name: value
            for name, value in entry.items()
            if name in ("loss", "grad_norm", "kl", "thinking/ratio_deviation", "ppo/stopped")
        }
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    name = options.get("name", engine)
    (folder / f"{name}{rank}.json").write_text(json.dumps({"logs": logs, "lengths": lengths, "texts": texts}))
    torch.save(weights, folder / f"{name}{rank}.pt")
    if options.get("push"):
        torch.save(pushed(trainer), folder / f"{name}{rank}.pushed.pt")


if __name__ == "__main__":
    main()
    leave()
