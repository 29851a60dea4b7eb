"""recipes/hrpo_gsm8k.py with the configuration of the GPU run, on Unsloth's CUDA code: a tiny model, a file of rows."""

from tests import unsloth_on_cpu  # noqa: F401 - before all else


# isort: split
import json
import runpy
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests import tiny


ROOT = Path(__file__).parents[2]


def base(folder: Path) -> str:
    config = tiny.config("qwen2")
    config.max_position_embeddings = 512
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp())
    rows = [{"question": f"{i} and {i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sys.argv = [
        "hrpo_gsm8k.py",
        "--model_name",
        base(folder / "base"),
        "--dataset",
        str(folder / "rows.jsonl"),
        "--eval_size",
        "4",
        "--eval_every",
        "1",
        "--max_steps",
        "2",
        "--max_seq_length",
        "480",
        "--max_completion_length",
        "16",
        "--dry_run_rows",
        "4",
        "--output_dir",
        str(folder / "out"),
        "--bf16",
        "false",
        "--use_cpu",
        "true",
        "--optim",
        "adamw_torch",
        "--save_steps",
        "1",
        "--disable_tqdm",
        "true",
        "--model_init_kwargs",
        '{"dtype": "float32", "device_map": "cpu"}',
    ]
    finished = runpy.run_path(str(ROOT / "recipes" / "hrpo_gsm8k.py"), run_name="__main__")
    report = {
        "summary": json.loads((folder / "out" / "summary.json").read_text()),
        "trainer": finished["HRPOTrainer"].__mro__[1].__name__,
        "files": sorted(path.name for path in (folder / "out" / "final").iterdir()),
        "checkpoints": sorted(path.name for path in (folder / "out").glob("checkpoint-*")),
    }
    print(json.dumps(report))
