"""KV distillation over seeds: the same student with each projection to its teacher, and controls.

The controls are cross-entropy only, the note's direction, and each projection with an untrained teacher.

    python -m benchmarks.bench_kv_distill [--seeds 0 1 2] [--steps N]

Settings are those of recipes/configs/kv_distill_tiny.yaml. Writes benchmarks/results/kv_distill_<device>.json after
every run, and at the end the table beside it and docs/kv_distill.png. Finished runs are not repeated without
`--fresh`.
"""

import dataclasses
import functools
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import setups
from benchmarks.over_seeds import in_order, seeds_of
from trl_ext.cli.command_line import CommandLine
from trl_ext.cli.console import PlainConsole
from trl_ext.cli.user_errors import in_sentences
from trl_ext.common.fingerprint import digest


ROOT = Path(__file__).parents[1]
GROUPS: dict[str, dict] = {
    "CE only": {"lambda_kv": 0.0},
    "Baseline": {"kv_projection_mode": "flat"},
    "V4.0-1": {"init_uniform": False},
    "V4.0-2": {},
    "V4.0-3": {"share_dim_proj": False},
    "V4.0-2, one head from one": {"kv_init": "identity"},
    "V4.0-2, teacher to student": {"kv_direction": "teacher_to_student"},
}
UNTRAINED = ", untrained teacher"
RUNS = [*GROUPS, *(n + UNTRAINED for n in ("Baseline", "V4.0-1", "V4.0-2", "V4.0-3", "V4.0-2, one head from one"))]
STEPS, EVERY = 280, 70  # so few that cross-entropy alone does not learn the task
HELD_OUT = 500


def run(group: str, seed: int, steps: int, teacher: str) -> dict:
    """Train and evaluate one run."""
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed

    from trl_ext import KVDistillConfig, KVDistillTrainer
    from trl_ext.tasks import equations
    from trl_ext.tasks.evaluation import AccuracyCallback, evaluate

    name = group.removesuffix(UNTRAINED)
    args, max_new_tokens = settings(**GROUPS[name], seed=seed, max_steps=steps)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    taught = AutoModelForCausalLM.from_pretrained(teacher)
    if name != group:
        set_seed(1000 + seed)
        taught = AutoModelForCausalLM.from_config(taught.config)
    set_seed(seed)
    student = AutoModelForCausalLM.from_config(equations.config(tokenizer, equations.STUDENT))
    train, held_out, questions = prepared(teacher, steps)
    evaluating = 0.0

    def answers(model: torch.nn.Module):
        nonlocal evaluating
        start = time.time()
        how = {"delimiter": args["answer_delimiter"], "max_new_tokens": max_new_tokens, "thinking": "off"}
        found = evaluate(model, tokenizer, questions, batch_size=HELD_OUT, **how)
        evaluating += time.time() - start
        return found

    accuracy = AccuracyCallback(EVERY, answers)
    trainer = KVDistillTrainer(
        student,
        KVDistillConfig(**args, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        teacher_model=taught,
        callbacks=[accuracy],
    )
    trainer.remove_callback(PrinterCallback)
    start = time.time()
    trainer.train()
    seconds = time.time() - start - evaluating
    after = answers(trainer.model)
    held = trainer.evaluate()
    logged = [entry for entry in trainer.state.log_history if "kv/loss" in entry]
    return {
        "accuracy": after.accuracy,
        "curve": [*accuracy.curve, (steps, after.accuracy)],
        "held_out_ce": held.get("eval_loss/ce", held["eval_loss"]),
        "parameters": sum(p.numel() for p in trainer.aligner.parameters()) if trainer.aligner else 0,
        "ms_per_step": seconds / steps * 1000,
        "kv": {k: v for k, v in logged[-1].items() if k.startswith("kv/")} if logged else {},
        "target_rank": [e["kv/target_rank_k"] for e in (logged[0], logged[-1])] if logged else None,
    }


def settings(**changes: Any) -> tuple[dict, int]:
    """The recipe's settings, without output, and the maximum number of new tokens in evaluation."""
    from datasets import disable_progress_bars
    from transformers.utils import logging

    from trl_ext import KVDistillConfig

    disable_progress_bars()
    logging.set_verbosity_error()
    found = yaml.safe_load((ROOT / "recipes/configs/kv_distill_tiny.yaml").read_text())
    known = KVDistillConfig.__dataclass_fields__
    args = {k: v for k, v in found.items() if k in known} | changes
    args |= {
        "output_dir": tempfile.mkdtemp(),
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": EVERY,
        "use_cpu": not setups.CUDA,
        "per_device_eval_batch_size": HELD_OUT,
    }
    return args, found["max_new_tokens"]


@functools.cache
def prepared(teacher: str, steps: int) -> tuple:
    """Training and held-out rows as the trainer prepares them, once per process, and the questions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_ext import KVDistillConfig, KVDistillTrainer
    from trl_ext.tasks import equations

    args, _ = settings()
    size = dataclasses.replace(equations.SMALL, rows=steps * args["per_device_train_batch_size"])
    train, held_out = (equations.explicit(rows) for rows in equations.split(HELD_OUT, 0, size))
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    trainer = KVDistillTrainer(
        AutoModelForCausalLM.from_config(equations.config(tokenizer, equations.STUDENT)),
        KVDistillConfig(**args),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        teacher_model=teacher,
    )
    return trainer.train_dataset, trainer.eval_dataset, held_out


def spread(values: list[float], form: str) -> str:
    """Mean, lowest and highest value as text."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(results: dict[str, dict[str, dict]]) -> str:
    """A Markdown table: mean, lowest and highest over the seeds."""
    steps = next(iter(next(iter(results.values())).values()))["curve"][-1][0]
    headings = [
        "",
        f"accuracy after {steps} steps",
        "teacher untrained",
        "held-out cross-entropy",
        "teacher untrained",
        "structural loss",
        "rank of the target's keys",
        "parameters",
        "ms a step",
    ]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for name in (name for name in GROUPS if name in results):
        runs, control = list(results[name].values()), list(results.get(name + UNTRAINED, {}).values())
        kv = "kv/loss" in runs[0]["kv"]
        cells = [
            name,
            *(spread([r["accuracy"] for r in side], ".1%") if side else "" for side in (runs, control)),
            *(spread([r["held_out_ce"] for r in side], ".3f") if side else "" for side in (runs, control)),
            spread([r["kv"]["kv/loss"] for r in runs], ".2f") if kv else "",
            " to ".join(f"{statistics.mean(r['target_rank'][i] for r in runs):.1f}" for i in (0, 1)) if kv else "",
            f"{runs[0]['parameters']:,}",
            f"{min(r['ms_per_step'] for r in runs):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path, results: dict[str, dict[str, dict]]) -> None:
    """Plot accuracy over steps (mean and range over seeds), and each seed's held-out cross-entropy.

    Untrained teachers are dashed lines and hollow points.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained", width_ratios=(3, 2))
    names = [name for name in GROUPS if name in results]
    for index, name in enumerate(names):
        color = f"C{index}"
        for group, dashed in ((name, False), (name + UNTRAINED, True)):
            runs = results.get(group, {}).values()
            if not runs:
                continue
            curves = [dict(map(tuple, run["curve"])) for run in runs]
            steps = sorted(curves[0])
            values = [[curve[step] for curve in curves] for step in steps]
            left.plot(steps, [statistics.mean(v) for v in values], "--" if dashed else "-", color=color, linewidth=2)
            if not dashed:
                left.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.12)
            right.scatter(
                [run["held_out_ce"] for run in runs],
                [index] * len(runs),
                edgecolors=color,
                facecolors="none" if dashed else color,
            )
    left.set(xlabel="step", ylabel="held-out accuracy (dashed: teacher untrained)", ylim=(0, 1))
    right.set(xlabel="held-out cross-entropy, nats (hollow: teacher untrained)", xlim=(0, None))
    right.set_yticks(range(len(names)), names)
    for index, label in enumerate(right.get_yticklabels()):
        label.set(color=f"C{index}", fontweight="bold")
    right.invert_yaxis()
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = CommandLine(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--teacher_steps", type=int, help="instead of the task's number")
    parser.add_argument("--only", nargs="*", default=RUNS, choices=RUNS)
    parser.add_argument("--cache", default="runs/cache")
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    from trl_ext.tasks import equations, warm_start

    config = (ROOT / "recipes/configs/kv_distill_tiny.yaml").read_text()
    made_with = {"steps": options.steps, "teacher_steps": options.teacher_steps, "runs": digest([GROUPS, config])}
    path, results = setups.so_far("kv_distill", options.fresh, made_with)
    teacher = warm_start.tiny_with_steps(
        Path(options.cache),
        seed=0,
        held_out=HELD_OUT,
        steps=options.teacher_steps or equations.TEACHER.warm_start_steps,
        size=equations.TEACHER,
        progress=False,
    )
    workers = 1 if setups.CUDA else 2  # small models gain more from a second process than from a second thread
    jobs = [(g, s) for s in options.seeds for g in options.only if str(s) not in results.get(g, {})]
    with ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=None
    ) as pool:
        running = {pool.submit(run, g, s, options.steps, teacher): (g, s) for g, s in jobs}
        for done in as_completed(running):
            group, seed = running[done]
            last = done.result()
            results.setdefault(group, {})[str(seed)] = last
            print(f"seed {seed}  {group}: {last['accuracy']:.3f}, {last['ms_per_step']:.0f} ms a step", flush=True)
            setups.write("kv_distill", {"command": "make bench-kv-distill", "made_with": made_with, "results": results})
    done = in_order(results, RUNS)
    PlainConsole().print(table(done))
    setups.write_table(path, page)
    if path.name == "kv_distill_cpu.json":
        plot(ROOT / "docs/kv_distill.png", done)
    print(path)


def page(found: dict) -> str:
    """The table of benchmarks/results/kv_distill_<device>.md."""
    results = in_order(found["results"], RUNS)
    return f"""# KV distillation over seeds

{seeds_of(results)} seeds, {HELD_OUT} held-out questions; mean (lowest to highest). A student with random weights is
trained for the same number of steps by each way. "Teacher untrained" is the same run with a teacher that learnt nothing:
what the teacher knows is the difference between the two columns.

{table(results)}"""


TABLES = {"kv_distill": page}


if __name__ == "__main__":
    in_sentences()
    main()
