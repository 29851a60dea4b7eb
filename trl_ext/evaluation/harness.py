"""lm-evaluation-harness's own tasks in `latent-reasoning eval`."""

import hashlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import lm_eval
import torch
import yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from ..common.spelling import did_you_mean
from .command import EMBEDDED_TASKS, FILE_TASKS
from .lm_eval_model import LatentReasoningLM


def load_tasks(names: list[str], include_path: str | None, num_fewshot: int) -> dict[str, Any]:
    """Load tasks of the harness, and the parts of groups and tags.

    Args:
        names: of tasks, groups or tags.
        include_path: a folder with more tasks, as YAML files; None: only the harness's.
        num_fewshot: solved examples before each question; 0: as the task has it.

    Returns:
        Tasks by name.

    Raises:
        ValueError: there is no such task, its data cannot be loaded, a metric of it is unknown, or it has too few examples.
    """
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):  # the harness's own are read only if they are needed: 6 seconds
        check_files(include_path)
        manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_tasks:
            known = (*EMBEDDED_TASKS, *FILE_TASKS, *manager.all_tasks)
            raise ValueError(
                f"--tasks {name}: there is no such task{did_you_mean(name, known)}; ours are "
                f"{', '.join((*EMBEDDED_TASKS, *FILE_TASKS))}, and lm-evaluation-harness has {len(manager.all_tasks)} "
                "(lm-eval ls tasks)"
            )
    tasks: dict[str, Any] = {}
    for name in names:
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:  # of whichever library reads its data
            raise ValueError(f"--tasks {name}: cannot be loaded: {type(error).__name__}: {error}") from error
    for name, task in tasks.items():
        if num_fewshot:
            task.set_config(key="num_fewshot", value=num_fewshot)
        if task.get_config("num_fewshot"):
            choose_examples(task)
        check_task(name, task)
    return tasks


def check_files(include_path: str | None) -> None:
    """Raise a ValueError for a YAML file of a folder that cannot be read. The harness passes over it in silence."""
    for file in sorted(Path(include_path).rglob("*.yaml")) if include_path else ():
        try:
            load_yaml(file, resolve_func=False)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"--include_path {include_path}: {file} cannot be read as a task: {error}") from error


def choose_examples(task: Any) -> None:
    """Let a task without other rows take its examples from its test rows.

    The harness does so too, but then a question may be among its own examples. With a named split it is not.
    """
    shown = task.fewshot_cfg
    if shown.split is None and shown.samples is None and not (task.has_training_docs() or task.has_validation_docs()):
        shown.split = task.config.test_split


def check_task(name: str, task: Any) -> None:
    """Raise a ValueError for what the harness would find out, in the middle of its work, by a traceback."""
    if task.config.process_results is None:  # with it, metrics are names that it returns
        for metric, function in getattr(task, "_metric_fn_list", {}).items():
            if function is None:
                raise ValueError(f"--tasks {name}: lm-evaluation-harness knows no metric {metric!r}")
    for metric, function in task.aggregation().items():
        if function is None:
            raise ValueError(f"--tasks {name}: lm-evaluation-harness does not know the aggregation of {metric!r}")
    given = task.config.generation_kwargs or {}
    until, most = given.get("until") or [], given.get("max_gen_toks", 1)
    if not all(
        isinstance(text, str)
        for text in ([until] if isinstance(until, str) else until if isinstance(until, list) else [0])
    ):
        raise ValueError(f"--tasks {name}: until={until!r} in generation_kwargs: must be a text or a list of texts")
    if not isinstance(most, int) or most < 1:
        raise ValueError(f"--tasks {name}: max_gen_toks={most!r} in generation_kwargs: must be at least 1")
    wanted = task.get_config("num_fewshot") or 0
    if wanted:
        there = len(task.fewshot_docs()) - (task.fewshot_cfg.split == task.config.test_split)
        if wanted > there:
            raise ValueError(
                f"--tasks {name}: {wanted} examples before each question (num_fewshot), and it has {there}"
            )


def meaningful(lm: LatentReasoningLM, tasks: dict[str, Any], refuse: bool = False) -> dict[str, Any]:
    """The tasks that have a meaning for a model and its state.

    Args:
        lm: the model and its state.
        tasks: by name.
        refuse: whether one without a meaning is an error.

    Raises:
        ValueError: a task asks for log-likelihoods, and this model in this state has none.
    """
    found = {}
    for name, task in tasks.items():
        why_not = lm.why_not(task.OUTPUT_TYPE)
        if why_not is None:
            found[name] = task
        elif refuse:
            raise ValueError(f"--tasks {name} with latent steps {lm.state!r}: {why_not}")
    return found


def run_tasks(
    lm: LatentReasoningLM, tasks: dict[str, Any], flags: Namespace
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], list[dict[str, Any]]]]:
    """Evaluate one state of a model on tasks of the harness.

    Args:
        lm: the model and its state.
        tasks: by name, see `load_tasks`.
        flags: of `command.parser()`.

    Returns:
        For each task, filter and metric what the harness found and the scores of the questions; and by task and state what
        was asked and answered.
    """
    found, samples = [], {}
    for name, task in tasks.items():
        torch.manual_seed(flags.seed)
        chat = bool(lm.opened.tokenizer.chat_template)
        out = lm_eval.evaluate(
            lm=lm,
            task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
            limit=flags.limit,
            bootstrap_iters=1000,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            system_instruction=flags.system_prompt or None,
        )
        asked = sorted(out["samples"][name], key=lambda sample: sample["doc_id"])
        samples[name, lm.state] = [
            {key: sample[key] for key in ("doc", "target", "arguments", "resps", "filtered_resps", "filter")}
            | {metric: sample[metric] for metric in sample["metrics"]}
            for sample in asked
        ]
        questions = hashlib.sha256("".join(sample["doc_hash"] for sample in asked).encode()).hexdigest()[:12]
        for key, value in out["results"][name].items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            scores = [sample.get(metric) for sample in asked if sample["filter"] == kept]
            graded = all(isinstance(score, int | float) for score in scores)
            found.append(
                {
                    "task": name,
                    "metric": metric,
                    "filter": kept,
                    "state": lm.state,
                    "n": len(scores),
                    "num_fewshot": task.get_config("num_fewshot") or 0,
                    "chat_template": chat,
                    "value": value,
                    "stderr": _number(out["results"][name].get(f"{metric}_stderr,{kept}")),
                    "scores": [float(score) for score in scores] if graded else None,
                    "questions": questions,
                }
            )
    return found, samples


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None  # the harness writes "N/A"
