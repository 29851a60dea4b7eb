"""Model cards of a run: the card of an ordinary trainer's model, and TRL's card in the output folder."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import Trainer

from patches.save_pretrained import describer
from unsloth_ext.common.model_card import outside, write_model_card
from unsloth_ext.common.settings_file import method_of


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
    file = Path(folder, "README.md")
    return file.read_text() if file.is_file() else None


def write_card_of(trainer: Trainer, folder: str | Path, kept: str | None = None, repo_id: str | None = None) -> None:
    """Write or update the model card in a folder that a trainer saves to.

    Args:
        kept: the card that was there before.
        repo_id: name of the repository on the hub.
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
    write_card_of(trainer, file.parent, repo_id=trainer.hub_model_id)
    return outside(file.read_text())
