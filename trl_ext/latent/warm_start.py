"""The tiny model that GRPO after latent tokens starts from: CODI on the equations, stopped half way; cached as a folder."""

import inspect
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed

from trl_ext.cli.console import PlainConsole
from unsloth_ext.common import hub
from unsloth_ext.latent import phase

from ..cli.report import compact_progress
from ..tasks import equations
from ..tasks.warm_start import cached, in_one_process, tiny_with_steps
from . import losses, trainer
from .methods import CODIConfig, CODITrainer


@in_one_process
def tiny_with_latents(cache: Path, *, seed: int, held_out: int, sft_steps: int, codi_steps: int, progress: bool) -> str:
    """The folder of the tiny model after some steps of CODI on the equations, cached like `tiny_with_steps`.

    Args:
        cache: folder for all such models.
        seed: of data and weights.
        held_out: number of held-out equations.
        sft_steps: number of steps of SFT on explicit steps, before CODI.
        codi_steps: number of steps of CODI. With 500 it is always right, and reinforcement has nothing to add.
        progress: show a progress bar.
    """
    base = tiny_with_steps(cache, seed=seed, held_out=held_out, steps=sft_steps, progress=progress)
    settings: dict[str, Any] = {
        "num_latents": 6,
        "projection_dim": 96,
        "w_codi": 1.0,
        "w_latent_ce": 1.0,
        "answer_prompt": equations.ANSWER_PROMPT,
        "step_separator": equations.STEP_SEPARATOR,
        "max_steps": codi_steps,
        "per_device_train_batch_size": 64,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 50,
        "weight_decay": 0.01,
        "adam_beta2": 0.98,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "seed": seed,
    }

    def make(part: Path) -> None:
        if progress:
            PlainConsole().print(
                f"Training its latent tokens with {codi_steps} steps of CODI; later runs find it in {cache}"
            )
        set_seed(seed)
        args = CODIConfig(
            output_dir=str(part / "trainer"),
            report_to="none",
            save_strategy="no",
            logging_steps=max(1, codi_steps // 10),
            disable_tqdm=not progress,
            **settings,
        )
        rows = Dataset.from_list(equations.split(held_out, seed)[0])
        codi = CODITrainer(base, args, train_dataset=rows, processing_class=hub.load_tokenizer(base))
        compact_progress(codi)
        codi.train()
        shutil.rmtree(part / "trainer", ignore_errors=True)
        codi.save_model(str(part))

    parts = [Path(base).name, settings, *(inspect.getsource(module) for module in (losses, phase, trainer))]
    return cached(cache, "tiny-latents", parts, make)
