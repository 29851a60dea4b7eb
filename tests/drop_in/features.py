"""What a user of TRL may ask of a trainer, and what each of ours answers. `test_features` holds them to this table."""

import dataclasses
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.kv_distill import setups as kv

from .trainers import Case


@dataclasses.dataclass(frozen=True)
class Feature:
    """Something that TRL's trainers can do.

    Attributes:
        name: as the page has it.
        shown: how the tests show that it works.
        fields: of the configuration.
        keywords: of the trainer, made from the case.
        parents: which trainers of TRL have it.
        slow: whether its tests take long.
    """

    name: str
    shown: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    keywords: Callable[[Case], dict[str, Any]] = lambda case: {}
    parents: tuple[str, ...] = ("GRPOTrainer", "SFTTrainer")
    slow: bool = False


def pairs(case: Case) -> list[tuple[str, str]]:
    """Prompts and completions of a trainer's own rows, if it reads such."""
    rows = case.rows if case.rows and "prompt" in case.rows[0] else kv.ROWS
    return [(row["prompt"], row["completion"]) for row in rows]


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def reward(completions: list[Any], **_: Any) -> list[float]:
    """As `hrpo.reward_digits`, also of conversations."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return hrpo.reward_digits(texts)


def own_rows(case: Case) -> Dataset:
    return hrpo.prompts() if case.parent == "GRPOTrainer" else Dataset.from_list(case.rows)


def iterable(case: Case) -> dict[str, Any]:
    return {"train_dataset": own_rows(case).to_iterable_dataset()}


def chats(case: Case) -> dict[str, Any]:
    """Conversations with a prompt, and with a completion where there is one."""
    if case.parent == "GRPOTrainer":
        rows = [{"prompt": [says("user", row["prompt"])]} for row in hrpo.prompts()]
        return {"train_dataset": Dataset.from_list(rows), "reward_funcs": reward}
    rows = [{"prompt": [says("user", p)], "completion": [says("assistant", c)]} for p, c in pairs(case)]
    return {"train_dataset": Dataset.from_list(rows)}


def rendered(case: Case) -> dict[str, Any]:
    """What the chat template makes of `chats`."""
    if case.parent == "GRPOTrainer":
        rows = [{"prompt": f"+{row['prompt']}"} for row in hrpo.prompts()]
        return {"train_dataset": Dataset.from_list(rows), "reward_funcs": reward}
    return {"train_dataset": Dataset.from_list([{"prompt": f"+{p}", "completion": c} for p, c in pairs(case)])}


def messages(case: Case) -> dict[str, Any]:
    rows = [{"messages": [says("user", p), says("assistant", c)]} for p, c in pairs(case)]
    return {"train_dataset": Dataset.from_list(rows)}


def texts(case: Case) -> dict[str, Any]:
    return {"train_dataset": Dataset.from_list([{"text": p + c} for p, c in pairs(case)])}


def formatted(case: Case) -> dict[str, Any]:
    rows = Dataset.from_list([{"asked": p, "answered": c} for p, c in pairs(case)])
    return {"train_dataset": rows, "formatting_func": lambda row: row["asked"] + row["answered"]}


SFT = ("SFTTrainer",)
FEATURES = [
    Feature("`label_smoothing_factor`", "the loss changes", {"label_smoothing_factor": 0.3}),
    Feature("NEFTune (`neftune_noise_alpha`)", "the gradient changes", {"neftune_noise_alpha": 20.0}),
    Feature("`completion_only_loss=False`", "the loss changes", {"completion_only_loss": False}, parents=SFT),
    Feature(
        "`assistant_only_loss`",
        "equal to rows with the answer as completion",
        {"assistant_only_loss": True},
        messages,
        SFT,
    ),
    Feature("`formatting_func`", "equal to rows that are formatted before", {}, formatted, SFT),
    Feature("iterable datasets", "equal to the same rows in order (GRPO: prompts are sampled in order)", {}, iterable),
    Feature("conversational rows", "equal to rows that are rendered before", {}, chats),
    Feature("`packing`", "fewer rows", {"packing": True, "max_length": 64}, parents=SFT),
    Feature(
        '`train_sampling_strategy="group_by_length"`',
        "the sampler is transformers' LengthGroupedSampler",
        {"train_sampling_strategy": "group_by_length"},
    ),
    Feature(
        "`torch_compile`",
        "equal losses to 1e-4",
        {"torch_compile": True, "torch_compile_backend": "eager"},
        slow=True,
    ),
    Feature("Liger (`use_liger_kernel`)", "not run: its kernels need a GPU", {"use_liger_kernel": True}),
]
LIGER, ITERABLE = FEATURES[-1].name, "iterable datasets"
NOT_LABELS = "label_smoothing_factor=0.3: the policy loss has no labels to smooth"
NO_LENGTHS = "train_sampling_strategy='group_by_length': rollouts are drawn by TRL's own sampler"
LATENT_COLUMNS = "train dataset: column 'question' is missing"
ONE_LENGTH = "train_sampling_strategy='group_by_length': rows have several texts here, so no single length"
LATENT = {
    "`label_smoothing_factor`": "label_smoothing_factor=0.3: the loss of latent distillation supports only 0.0",
    "`completion_only_loss=False`": "completion_only_loss=False: questions are read, not trained on",
    "`assistant_only_loss`": "assistant_only_loss=True: rows are question, steps and answer, not conversations",
    "`formatting_func`": "formatting_func: rows are question, steps and answer",
    "conversational rows": LATENT_COLUMNS,
    "`packing`": "packing=True: latent tokens stand inside each row",
    '`train_sampling_strategy="group_by_length"`': ONE_LENGTH,
}
DISTILLED = {"`label_smoothing_factor`": "label_smoothing_factor=0.3: the distillation loss replaces it"}
RL = {"`label_smoothing_factor`": NOT_LABELS, '`train_sampling_strategy="group_by_length"`': NO_LENGTHS}
REFUSED: dict[str, dict[str, str]] = {
    "HRPOTrainer": RL,
    "PPOTrainer": RL,
    "SPOTrainer": RL | {"iterable datasets": "train_dataset is a IterableDataset, but SPO tracks every row"},
    "LatentGRPOTrainer": RL,
    "CODITrainer": LATENT,
    "PCCoTTrainer": LATENT,
    "KAVATrainer": LATENT,
    "LOTUSTrainer": LATENT,
    "CoconutTrainer": LATENT,
    "KVDistillTrainer": {
        "`completion_only_loss=False`": "completion_only_loss=False: labels tell the prompt from the completion",
        "`packing`": "packing=True: segments belong to single rows",
        LIGER: "use_liger_kernel=True: it replaces the attention from which keys and values are captured",
    },
    "ConceptTrainer": {LIGER: "use_liger_kernel=True: it replaces the forward pass that compresses"},
    "PlannerExecutorTrainer": {
        "`label_smoothing_factor`": "label_smoothing_factor=0.3: the executor's loss supports only 0.0",
        "`completion_only_loss=False`": "completion_only_loss=False: labels tell the prompt from the completion",
        "`assistant_only_loss`": "assistant_only_loss=True: the executor writes the whole completion",
        "`formatting_func`": "train dataset, row 0: its labels leave no prompt for the planner",
        "`packing`": "packing=True: each row has its own plan",
        '`train_sampling_strategy="group_by_length"`': ONE_LENGTH,
        LIGER: "use_liger_kernel=True: the loss needs two passes of the backbone",
    },
    "LogitsDistillTrainer": DISTILLED,
    "ReasoningDistillTrainer": DISTILLED,
}
"""By trainer and feature, how the message of the ValueError begins. What is not here works."""
