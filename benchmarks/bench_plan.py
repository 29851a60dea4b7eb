"""Memory that short runs take on a CPU, against `latent-reasoning plan`: two sizes, several engines, in float32.

    make bench-plan

The figure is by how much a process's peak of resident memory grows over what it has after the same run with a tiny model.
So libraries and the engine's own start do not count.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from benchmarks.setups import write, write_table
from patches import fused_lm_head
from tests import processes, tiny
from tests.engines.launch import environment
from tests.engines.worker import prepare
from trl_ext.cli import plan


SIZES = {
    "tiny": (32, 64, 1, 2, 1, 64, True),
    "small": (768, 3072, 8, 12, 4, 8192, True),
    "large": (1024, 4096, 10, 16, 4, 8192, True),
}
ROWS, PROMPT, COMPLETION = 4, 64, 192


def planned(engine: str, size: str, method: str) -> plan.Run:
    count = 1 if engine == "one" else 2
    shape = {"rows": ROWS, "prompt": PROMPT, "completion": COMPLETION, "generated": ROWS}
    return plan.Run(model=size, method=method, engine=engine, gpus=count, mixed=False, checkpointing=False, **shape)


def resident(name: str) -> int:
    """Bytes of this process in memory: `VmRSS`, now; `VmHWM`, at most since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def train(engine: str, size: str, method: str, folder: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    from trl_ext import CODIConfig, CODITrainer, HRPOConfig, HRPOTrainer

    config, tokenizer = plan.config_of(size), tiny.tokenizer(())
    config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    common = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": ROWS,
        "report_to": "none",
        "bf16": False,
        "use_cpu": engine in ("one", "ddp"),
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    if method == "hrpo":
        rows = Dataset.from_list([{"prompt": "1+" * (PROMPT // 2)}] * 64)
        always = {"min_new_tokens": COMPLETION}
        own = {"num_generations": ROWS, "max_completion_length": COMPLETION, "generation_kwargs": always}
        reward = lambda completions, **_: [float(len(text)) for text in completions]  # noqa: E731
        trainer = HRPOTrainer(
            model, reward, HRPOConfig(**common, **own), train_dataset=rows, processing_class=tokenizer
        )
    elif method == "codi":
        half = COMPLETION // 2
        row = {"question": "1" * (PROMPT - 2), "steps": ["2" * half], "answer": "3" * (half - 4)}
        args = CODIConfig(**common, num_latents=planned(engine, size, method).latents, drop_last_step=False)
        trainer = CODITrainer(model, args, train_dataset=Dataset.from_list([row] * 64), processing_class=tokenizer)
    else:
        rows = Dataset.from_list([{"prompt": "1" * PROMPT, "completion": "2" * (COMPLETION - 1)}] * 64)
        trainer = SFTTrainer(model, SFTConfig(**common), train_dataset=rows, processing_class=tokenizer)
    trainer.train()


def work(engine: str, size: str, method: str, folder: Path) -> None:
    plan.SIZES |= SIZES
    torch.set_num_threads(1)
    prepare(engine)
    fused_lm_head.ensure()
    train(engine, "tiny", method, folder)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    train(engine, size, method, folder)
    found = {"grown": resident("VmHWM") - before}
    (folder / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["small", "large"])
    parser.add_argument("--engines", nargs="+", default=["one", "fsdp2"])
    parser.add_argument("--methods", nargs="+", default=["reasoning_distill", "hrpo", "codi"])
    args = parser.parse_args()
    plan.SIZES |= SIZES
    results = []
    for size, engine, method in ((s, e, m) for s in args.sizes for e in args.engines for m in args.methods):
        run = planned(engine, size, method)
        expected = plan.memory(run)
        peak = max(expected["peak of training"], expected["peak of rollouts"])
        # glibc gives only large blocks back when they are freed
        env = environment(engine) | {"MALLOC_MMAP_THRESHOLD_": "262144"}
        ranks = processes.ranks(run.gpus) if run.gpus > 1 else [{}]
        with TemporaryDirectory() as name:
            argv = [sys.executable, __file__, "work", engine, size, method, name]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            started = [subprocess.Popen(argv, env={**os.environ, **env, **own}, **quiet) for own in ranks]
            if any(each.wait() for each in started):
                raise RuntimeError(f"{' '.join(argv)} failed")
            grown = json.loads(Path(name, "0.json").read_text())["grown"]
        results.append(
            {"size": size, "engine": engine, "method": method, "measured": grown, "planned": peak, "parts": expected}
        )
        print(
            f"{size:6}{engine:7}{method:18} measured {grown / 2**20:6.0f} MiB, planned {peak / 2**20:6.0f}: "
            f"{peak / grown:.2f}",
            flush=True,
        )
        path = write("plan", {"command": "make bench-plan", "runs": results})
    write_table(path, page)


def page(found: dict) -> str:
    """The table of benchmarks/results/plan_<device>.md."""
    lines = [
        "# Memory against the calculator",
        "",
        f"Three steps in float32, {ROWS} rows of {PROMPT + COMPLETION} tokens, AdamW, without gradient checkpointing. "
        "Measured: by how much a process's peak of resident memory grows over that of the same run with a tiny model.",
        "",
        "| method | size | engine | measured, MiB | planned, MiB | planned / measured |",
        "|---|---|---|---:|---:|---:|",
    ]
    for run in found["runs"]:
        measured, planned = run["measured"] / 2**20, run["planned"] / 2**20
        names = " | ".join(run[name] for name in ("method", "size", "engine"))
        lines.append(f"| {names} | {measured:,.0f} | {planned:,.0f} | {planned / measured:.2f} |")
    return "\n".join(lines)


TABLES = {"plan": page}


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:5], Path(sys.argv[5]))
    else:
        main()
