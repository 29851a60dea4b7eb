"""Runs the tasks of `latent-reasoning eval` with lm-evaluation-harness."""

import logging
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import lm_eval
import torch
from lm_eval.tasks import TaskManager

from unsloth_ext.common.text_model import TextModel, trained_with

from ..tasks import equations
from ..tasks.data import SYSTEM_PROMPT
from .command import EMBEDDED_TASKS, FILE_TASKS
from .engine import Engine
from .harness import load_tasks, meaningful, run_tasks
from .lm_eval_model import LatentReasoningLM
from .results import Result, result_of
from .tasks import EMBEDDED, EvaluationTask, embedded_task, file_task


ASKS_FOR_STEPS = SYSTEM_PROMPT.partition(".")[0]  # how the system prompt begins that questions get if none is given


def evaluate_tasks(
    flags: Namespace, files: dict[str, str]
) -> tuple[list[Result], list[dict[str, Any]], dict[tuple[str, str], list[dict[str, Any]]]]:
    """Evaluate a checkpoint.

    Args:
        flags: of `command.parser()`.
        files: of tasks that need one.

    Returns:
        The results of our tasks, those of the harness's (see `harness.run_tasks`), and by task and state the texts.

    Raises:
        ValueError: a task or state is unknown, or a file or model cannot be read.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    others = [name for name in dict.fromkeys(flags.tasks or ()) if name not in (*EMBEDDED_TASKS, *FILE_TASKS)]
    for name, value in (("samples", flags.samples != 1), ("max_new_tokens", flags.max_new_tokens)):
        if others and value:
            raise ValueError(f"--{name} {getattr(flags, name)}: {others[0]} has its own in its YAML file; leave it out")
    theirs = load_tasks(others, flags.include_path, flags.num_fewshot) if others else {}
    kind = {} if flags.dtype is None else {"dtype": flags.dtype}
    kind |= {"load_in_4bit": True} if flags.load_in_4bit else {}
    opened = TextModel.from_pretrained(flags.checkpoint, delimiter=flags.answer_delimiter, **kind).to_accelerator()
    states = flags.states or (opened.states if flags.ablations else [s for s in opened.states if s in ("on", "off")])
    states = list(dict.fromkeys(states))
    for state in states:
        if state not in opened.states:
            raise ValueError(f"--states {state}: a {opened.kind} model has {', '.join(opened.states)}")
    if flags.system_prompt and (opened.kind == "latent" or not opened.tokenizer.chat_template):
        raise ValueError(
            f"--system_prompt: {flags.checkpoint} "
            + ("reads one question and answers it" if opened.kind == "latent" else "has no chat template")
            + "; leave it out"
        )
    trained = trained_with(flags.checkpoint)
    names = dict.fromkeys(flags.tasks or [EMBEDDED[opened.kind]])
    tasks = []
    for name in names:
        if name in EMBEDDED_TASKS:
            prompt = str(trained.get("answer_prompt", equations.ANSWER_PROMPT)).strip()
            marker = prompt if name == "equations" else opened.delimiter
            tasks.append(
                shortened(embedded_task(name, flags.held_out, flags.seed, marker, opened, flags.system_prompt), flags)
            )
        elif name in FILE_TASKS:
            how = {"limit": flags.limit, "examples": flags.num_fewshot, "max_new_tokens": flags.max_new_tokens or 512}
            how["system_prompt"] = flags.system_prompt
            tasks.append(file_task(name, files[name], opened, trained, **how))
    with Engine(opened, flags.checkpoint) if flags.engine == "vllm" else nullcontext() as engine:
        how = {"thinking_temperature": flags.temperature, "batch_size": flags.batch_size, "engine": engine}
        return measured([LatentReasoningLM(opened, state=state, **how) for state in states], tasks, theirs, flags)


def measured(
    lms: list[LatentReasoningLM], tasks: list[EvaluationTask], theirs: dict[str, Any], flags: Namespace
) -> tuple[list[Result], list[dict[str, Any]], dict[tuple[str, str], list[dict[str, Any]]]]:
    """Evaluate each state of a model on tasks of ours and of the harness. Returns what `evaluate_tasks` returns."""
    for name in theirs:  # a state that was asked for must have a meaning; of the default ones, one must
        if not any(name in meaningful(lm, theirs, refuse=bool(flags.states)) for lm in lms):
            meaningful(lms[0], theirs, refuse=True)
    results, found_by_harness, samples = [], [], {}
    manager = TaskManager(include_defaults=False)
    for task in tasks:
        for lm in lms:
            lm.forget_costs()
            torch.manual_seed(flags.seed)
            made = manager.load([task.for_lm_eval(flags.samples, flags.temperature)])
            out = lm_eval.evaluate(lm=lm, task_dict=made, log_samples=True, bootstrap_iters=0)
            found = sorted(out["samples"][task.name], key=lambda sample: sample["doc_id"])
            texts = [sample["resps"][0] for sample in found]
            results.append(result_of(task, lm.state, texts, lm.costs))
            samples[task.name, lm.state] = [
                {**row, "texts": some, "right": [task.is_right(text, row["answer"]) for text in some]}
                for row, some in zip(task.rows, texts, strict=True)
            ]
    for lm in lms if theirs else ():
        found, asked = run_tasks(lm, meaningful(lm, theirs), flags)
        found_by_harness += found
        samples |= asked
    return results, found_by_harness, samples


def shortened(task: EvaluationTask, flags: Namespace) -> EvaluationTask:
    """An embedded task with the length and number of rows that the flags give."""
    if flags.num_fewshot:
        raise ValueError(f"--num_fewshot {flags.num_fewshot}: {task.name} has no solved examples; leave it out")
    if flags.system_prompt and task.name != "sums":
        raise ValueError(f"--system_prompt: {task.name} has none; leave it out")
    return replace(task, rows=task.rows[: flags.limit], max_new_tokens=flags.max_new_tokens or task.max_new_tokens)
