"""Model cards of a run: the card of an ordinary trainer's model, and TRL's card in the output folder."""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import Trainer

from patches.save_pretrained import describer
from patches.versions import installed_version
from unsloth_ext.common import model_card
from unsloth_ext.common.model_card import TRAINING, outside, without_folders, write_model_card
from unsloth_ext.common.settings_file import method_of

from .method import training_methods
from .spelling import in_cell


QUICK_START = re.compile(r"## Quick start\n.*?(?=\n## Training procedure)", re.DOTALL)  # TRL 1.15 shows a pipeline here

# TRL writes this for a base model in a folder; our part of the card names it
NO_BASE = "This model is a fine-tuned version of [None](https://huggingface.co/None).\n"


def own_settings(args: Any) -> dict[str, Any]:
    """The fields that our configuration adds to its parent's."""
    ours = [cls for cls in type(args).__mro__ if cls.__module__.split(".")[0] == "trl_ext"]
    parents = [cls for cls in type(args).__mro__ if cls not in ours and hasattr(cls, "__dataclass_fields__")]
    known = {f.name for cls in parents for f in fields(cls)}
    return {f.name: getattr(args, f.name) for f in fields(args) if f.name not in known}


def read_card(folder: str | Path) -> str | None:
    """The model card in a folder; None if there is none."""
    return model_card.read_card(Path(folder, "README.md"))


def write_card_of(
    trainer: Trainer,
    folder: str | Path,
    kept: str | None = None,
    repo_id: str | None = None,
    training: bool = True,
) -> None:
    """Write or update the model card in a folder that a trainer saves to.

    Args:
        kept: the card that was there before.
        repo_id: name of the repository on the hub.
        training: whether to say how it was trained. TRL's card does so itself.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    method, settings = method_of(model.config) if describer(model) is not None else (None, None)
    write_model_card(
        folder,
        model,
        method=method.name if method else getattr(trainer, "_name", None) or type(trainer).__name__,
        settings=settings if method else own_settings(trainer.args),
        trainer=type(trainer).__name__,
        kept=kept,
        repo_id=repo_id,
        training=training_sections(trainer) if training else "",
    )


def complete_run_card(trainer: Trainer, before: str | None, last: str | None) -> str:
    """Put our part into the run's card after TRL has written its own.

    TRL overwrites the card, and its example pipeline would drop the method. A card that is not the `last` one of this
    run was written by the user: only our part of it is replaced.

    Args:
        before: the card before TRL wrote its own.
        last: what this function returned last time.

    Returns:
        The card without our part, to pass as `last` next time.
    """
    file = Path(trainer.args.output_dir, "README.md")
    if before is not None and outside(before) not in ("", last):
        file.write_text(before)
    else:
        file.write_text(QUICK_START.sub("", file.read_text().replace(NO_BASE, "")))
    write_card_of(trainer, file.parent, repo_id=trainer.hub_model_id, training=False)
    return outside(file.read_text())


VERSIONS = ("latent-reasoning-trl", "trl", "transformers", "peft", "torch", "datasets")
# Of every trainer; those of the method come after them
MAIN_FIELDS = (
    "learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "optim",
    "seed",
    "num_generations",
    "max_completion_length",
    "temperature",
    "beta",
    "max_length",
)


def training_sections(trainer: Trainer) -> str:
    """What a card says about a training: the last figures, the settings, versions, and whom to cite. In Markdown."""
    args, state = trainer.args, trainer.state
    last: dict[str, Any] = {}
    for entry in state.log_history:
        last |= {name: value for name, value in entry.items() if isinstance(value, int | float)}
    known = {"loss", "train_loss", "reward"} | {
        name for method in training_methods().values() for name, _ in method.curves
    }
    shown = {name: value for name, value in last.items() if name in known or name.startswith("eval_")}
    given = {name: getattr(args, name) for name in MAIN_FIELDS if hasattr(args, name)} | own_settings(args)
    paper = getattr(trainer, "_paper", None)
    by = f"`{type(trainer).__name__}`" + (
        f", a method introduced in [{paper['title']}](https://huggingface.co/papers/{paper['id']})" if paper else ""
    )
    lines = [TRAINING, "", f"{state.global_step} steps of {by}, in {args.world_size} process(es)."]
    if shown:
        lines += ["", "### Last figures", "", "| figure | value |", "|---|---|"]
        lines += [f"| `{name}` | {value:.4g} |" for name, value in sorted(shown.items())]
    lines += ["", "### Settings of the training", "", "`training_args.json` has all of them.", ""]
    lines += ["| field | value |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(value)} |" for name, value in given.items()]
    lines += ["", "### Framework versions", ""]
    lines += [f"- {name}: {version}" for name in VERSIONS if (version := installed_version(name)) is not None]
    if paper:
        lines += ["", "## Citation", "", "```bibtex", inspect.cleandoc(paper["citation"]), "```"]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = in_cell(str(without_folders(getattr(value, "value", value))))
    return f"`{text}`" if text else ""
