"""Every trainer of ours and its parent in TRL, tiny, on rows of any form."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset

import trl_ext
from tests import tiny
from tests.trl_ext.concept import setups as concept
from tests.trl_ext.distill import setups as distill
from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.kv_distill import setups as kv
from tests.trl_ext.latent import setups as latent
from tests.trl_ext.planner import setups as planner
from trl_ext.distill.config import TAGS
from trl_ext.distill.tags import add_tags


LATENT = {"num_latents": 3, "answer_prompt": "##", "step_separator": ";"}
# One token for each role and turn; what the assistant says is marked
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}+{{ message['content'] }}{% else %}"
    "{% generation %}{{ message['content'] }}<eos>{% endgeneration %}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Case:
    """A trainer, and how it is made.

    Attributes:
        name: the class in `trl_ext`.
        parent: the class in `trl`.
        config: the class of its configuration in `trl_ext`.
        settings: fields that the method needs here.
        off: fields that turn the method off; None: it cannot be turned off.
        rows: of its own form.
        more: further keywords of the trainer.
        model: makes the model.
        tags: whether the tokenizer knows the tags of reasoning.
        base: makes the model's folder, for GRPO.
    """

    name: str
    parent: str
    config: str
    rows: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Any] | None = None
    more: Callable[[], dict[str, Any]] = dict
    model: Callable[[], Any] = lambda: tiny.model("qwen3", std=0.1)
    tags: bool = False
    base: Callable[[Path], str] = hrpo.base_folder

    def tokenizer(self) -> Any:
        """With a chat template whose answers are marked, and with the method's own tokens, which TRL does not add."""
        made = tiny.tokenizer(distill.PIECES if self.tags else ())
        if self.tags:
            add_tags(made, list(TAGS))
        made.chat_template = TEMPLATE
        return made

    def make(self, folder: Path, *, stock: bool = False, turned_off: bool = False, **given: Any) -> Any:
        """Our trainer, or its parent.

        Args:
            folder: output folder.
            stock: make the parent.
            turned_off: turn the method off.
            **given: keywords of the trainer; any other one is a field of the configuration.
        """
        of_trainer = {name: given.pop(name) for name in OF_TRAINER & given.keys()}
        rl = self.parent == "GRPOTrainer"
        shared: dict[str, Any] = {
            "train_dataset": hrpo.prompts() if rl else Dataset.from_list(self.rows),
            "processing_class": self.tokenizer(),
        }
        if rl:
            shared["reward_funcs"] = hrpo.reward_digits
        parts = shared | of_trainer
        torch.manual_seed(0)
        model = parts.pop("model", None) or (self.base(Path(folder)) if rl else self.model())
        config = getattr(trl, self.parent.replace("Trainer", "Config")) if stock else getattr(trl_ext, self.config)
        fields = {} if stock else self.settings | (self.off or {} if turned_off else {})
        if rl:
            args = hrpo.arguments(config, folder / "out", **(fields | given))
        else:
            args = config(**tiny.short_run(folder / "out", **{"gradient_checkpointing": False, **fields, **given}))
        torch.manual_seed(0)
        if stock:
            return getattr(trl, self.parent)(model, args=args, **parts)
        return getattr(trl_ext, self.name)(model, args=args, **({} if turned_off else self.more()), **parts)


OF_TRAINER = {
    "model",
    "train_dataset",
    "eval_dataset",
    "processing_class",
    "formatting_func",
    "peft_config",
    "reward_funcs",
}


CASES = [
    Case("HRPOTrainer", "GRPOTrainer", "HRPOConfig", [], {"answer_delimiter": "#"}, {"thinking": False}),
    Case(
        "PPOTrainer",
        "GRPOTrainer",
        "PPOConfig",
        [],
        {"num_generations": 1, "per_device_train_batch_size": 4, "target_kl": None},
    ),
    Case("SPOTrainer", "GRPOTrainer", "SPOConfig", [], {"num_generations": 1, "per_device_train_batch_size": 4}),
    Case(
        "LatentGRPOTrainer",
        "GRPOTrainer",
        "LatentGRPOConfig",
        [],
        {},
        {"thinking": False},
        base=latent.thinking_folder,
    ),
    *(
        Case(f"{method}Trainer", "SFTTrainer", f"{method}Config", latent.ROWS, settings)
        for method, settings in {
            "CODI": LATENT,
            "PCCoT": LATENT | {"iterations": 2},
            "KAVA": LATENT | {"iterations": 2},
            "LOTUS": LATENT | {"iterations": 2, "latents_per_step": 1},
            "Coconut": LATENT | {"latents_per_step": 1},
        }.items()
    ),
    Case(
        "KVDistillTrainer",
        "SFTTrainer",
        "KVDistillConfig",
        kv.ROWS,
        {"answer_delimiter": "##"},
        {"lambda_kv": 0.0},
        lambda: {"teacher_model": kv.teacher()},
    ),
    Case(
        "ConceptTrainer",
        "SFTTrainer",
        "ConceptConfig",
        concept.ROWS,
        concept.SPLIT,
        {"use_concepts": False},
        model=concept.base,
    ),
    Case(
        "PlannerExecutorTrainer",
        "SFTTrainer",
        "PlannerExecutorConfig",
        planner.ROWS,
        {"types": planner.TYPES},
        {"use_planner": False},
    ),
    Case(
        "LogitsDistillTrainer",
        "SFTTrainer",
        "LogitsDistillConfig",
        distill.ROWS,
        {},
        {"alpha": 1.0},
        lambda: {"teacher_model": distill.teacher()},
        distill.student,
    ),
    Case(
        "ReasoningDistillTrainer",
        "SFTTrainer",
        "ReasoningDistillConfig",
        distill.TAGGED,
        {},
        {"tag_weight": 1.0},
        tags=True,
        model=functools.partial(distill.student, vocab_size=72),
    ),
]
