"""The model card of a saved folder: what the model is, how to open it, and what other loaders leave out.

We own one part of `README.md`, between two comments, and some keys of its metadata. Saving again rewrites only that
part. If somebody changed the part, it is kept, with a warning.
"""

import functools
import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers.utils import CHAT_TEMPLATE_FILE
from yaml import YAMLError

from .method import attaching_methods


logger = logging.getLogger(__name__)

LIBRARY = "latent-reasoning-trl"
BEGIN = "<!-- latent-reasoning-trl {}: written when the model is saved, until it is changed -->"
END = "<!-- latent-reasoning-trl: end -->"
PART = re.compile(
    re.escape(BEGIN).replace(re.escape("{}"), "([0-9a-f]{12})") + r"\n(.*?)\n" + re.escape(END), re.DOTALL
)

RESULTS, TRAINING = "## Results", "## Training"
SECTION = rf"{RESULTS}\n(.*?)(?={TRAINING}\n|\Z)"  # the results, up to what was said about the training

# How an example reads a question, and how it does where the tokenizer has a chat template
ASKED = 'tokenizer(["1+2="], return_tensors="pt", return_token_type_ids=False)'
SAID = """\
tokenizer.apply_chat_template(
    [[{"role": "user", "content": "1+2="}]], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""

# How to open an ordinary model. tests/unsloth_ext/common/test_saved.py runs this and the examples of the records
ORDINARY = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained({where}), AutoTokenizer.from_pretrained({where})
inputs = tokenizer(["1+2="], return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))"""


@dataclass
class Part:
    """Our part of a card, with its metadata."""

    text: str
    metadata: dict[str, Any]
    tags: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{BEGIN.format(digest(self.text))}\n{self.text}\n{END}"


def digest(text: str) -> str:
    """Return 12 hex digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_model_card(
    folder: str | Path,
    model: nn.Module,
    *,
    method: str,
    settings: Any = None,
    trainer: str | None = None,
    kept: str | None = None,
    repo_id: str | None = None,
    base: str | None = None,
    training: str = "",
) -> None:
    """Write `README.md` into a folder that a model was saved to.

    Args:
        folder: the folder.
        model: the model that was saved.
        method: the name of a latent reasoning method, or of the training method of an ordinary model.
        settings: the settings of the method.
        trainer: the class that trained the model, if known.
        kept: the card that was there before the model was saved.
        repo_id: the hub repository that the folder is uploaded to, if any.
        base: the model that it was made from; None: as the model says.
        training: sections about the training, in Markdown.
    """
    part = model_part(folder, model, method, settings, trainer, repo_id, base)
    part.text += f"\n\n{training}" if training else ""
    file = Path(folder, "README.md")
    found = kept if kept is not None else file.read_text() if file.is_file() else None
    card = ModelCard(found, ignore_metadata_errors=True) if found is not None and not is_template(found) else None
    if card is None:
        card = ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n\n{part}\n")
    else:
        card.text = with_part(card.text, part, file)
    for key, value in part.metadata.items():
        if value is None:
            card.data.__dict__.pop(key, None)
        else:
            card.data[key] = value
    card.data["tags"] = sorted({*(card.data.get("tags") or []), *part.tags})
    file.write_text(str(card))


def is_template(content: str) -> bool:
    """Return whether a card is the unchanged template of PEFT or the hub."""
    return ModelCard(content, ignore_metadata_errors=True).text.strip().startswith(_template())


@functools.cache
def _template() -> str:
    return ModelCard.from_template(ModelCardData()).text.strip()


def read_card(file: Path) -> str | None:
    """Return the text of a card; None if there is none.

    Raises:
        ValueError: it is not UTF-8, or its metadata cannot be read.
    """
    if not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8-sig")
        ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, YAMLError) as error:
        raise ValueError(
            f"{file} cannot be read as a model card ({' '.join(str(error).split())}): repair it, or delete it"
        ) from error
    return text


def trained_by(content: str) -> str | None:
    """Return the training method of an ordinary model, as our part of its card names it; None if it does not."""
    found = PART.search(content)
    title = found and re.search(r"\A# A model trained by (.+)", found[2])
    return title[1] if title else None


def results_in(content: str) -> str:
    """Return the results in our part of a card, without their heading; empty if there are none."""
    found = PART.search(content)
    results = found and re.search(SECTION, found[2], re.DOTALL)
    return results[1].strip() if results else ""


def changed_by_hand(text: str) -> bool:
    """Return whether a card has our part, and somebody has changed it since."""
    found = PART.search(text)
    return found is not None and found[1] != digest(found[2])


def with_part(text: str, part: Part, file: Path) -> str:
    """Return the text of a card with our part, in the place of the old part or at the end."""
    found = PART.search(text)
    if found is None:
        return f"{text.rstrip()}\n\n{part}\n"
    if changed_by_hand(text):
        logger.warning(
            f"{file} has a part about opening the model that was changed by hand and is kept; delete it to get a new one"
        )
        return text
    return _with(text, part)


def _with(text: str, part: Part) -> str:
    """Return a text with `part` in the place of the part that it has."""
    return PART.sub(lambda _: str(part), text, count=1)


def with_results(content: str, results: str) -> str:
    """Return a card with these results in our part, before what it says about the training, in the place of older ones.

    Args:
        content: the card, which has such a part; see `changed_by_hand`.
        results: a section in Markdown that begins with `RESULTS`.
    """
    card = ModelCard(content, ignore_metadata_errors=True)
    found = PART.search(card.text)
    assert found is not None
    before, _, training = re.sub(SECTION, "", found[2], flags=re.DOTALL).partition(TRAINING)
    part = Part("\n\n".join([before.rstrip(), *filter(None, [results, training and f"{TRAINING}{training}"])]), {})
    card.text = _with(card.text, part)
    return str(card)


def write_copy_card(folder: str | Path, model: nn.Module, content: str, method: str, settings: Any) -> None:
    """Write the card of a copy of a model in another form.

    It says how to open the copy, and keeps the results and the training, the base, and what others wrote.

    Args:
        folder: of the copy.
        model: the copy.
        content: the card of the model.
        method: as for `write_model_card`.
        settings: the settings of the method; None: of an ordinary model.
    """
    found = PART.search(content)
    text = found[2] if found else ""
    results, training = results_in(content), "".join(text.partition(TRAINING)[1:])
    was = re.search("made from `([^`]+)`", text)
    card = ModelCard(content, ignore_metadata_errors=True)
    base, tags = card.data.get("base_model"), card.data.get("tags") or []
    card.data["tags"] = [
        tag for tag in tags if tag not in ("peft", "lora") and not tag.startswith("base_model:adapter")
    ]
    card.text = _with(card.text, Part("", {}))
    write_model_card(
        folder,
        model,
        method=method,
        settings=settings,
        kept=str(card),
        base=base if isinstance(base, str) else was and was[1],
        training="\n\n".join(filter(None, [results and f"{RESULTS}\n\n{results}", training])),
    )


def outside(content: str) -> str:
    """Return what others wrote in a card: its text without our part and PEFT's note of its version."""
    text = PART.sub("", ModelCard(content, ignore_metadata_errors=True).text)
    return re.sub(r"### Framework versions\n\n(- PEFT \S+\s*)+\Z", "", text.strip()).strip()


def _name_of(model: nn.Module) -> str:
    """Return the name or path that a model was loaded from; empty if it has none."""
    return getattr(getattr(model, "config", None), "_name_or_path", "")


def model_part(
    folder: str | Path,
    model: nn.Module,
    method: str,
    settings: Any,
    trainer: str | None,
    repo_id: str | None,
    base: str | None = None,
) -> Part:
    """Build our part of a model's card. The arguments are those of `write_model_card`."""
    record = attaching_methods().get(method)
    adapter = getattr(model, "active_peft_config", None) if hasattr(model, "get_base_model") else None
    base = base or (adapter.base_model_name_or_path if adapter is not None else _name_of(model))
    where = repo_id or place(folder)
    kind = "an adapter (PEFT)" if adapter is not None else "a full model"
    example = record.example if record else ORDINARY
    if Path(folder, CHAT_TEMPLATE_FILE).is_file():
        example = example.replace(ASKED, SAID)
    lines = [
        f"# A model of the method {method}" if record else f"# A model trained by {method}",
        "",
        f"{record.about if record else 'It is an ordinary causal language model: every loader reads the whole of it.'} "
        f"The folder holds {kind}{f', made from `{without_folders(base)}`' if base else ''}."
        + (f" Trained by `{trainer}`." if trainer else ""),
        "",
        "## How to open it",
        "",
        *(["In the folder itself:", ""] if where == "." else []),
        "```python",
        example.replace("{where}", json.dumps(where, ensure_ascii=False)),
        "```",
    ]
    if record:
        lines += [
            "",
            "## What other loaders leave out",
            "",
            f"Loaders that do not know `{LIBRARY}` drop {record.dropped}. `AutoModelForCausalLM`, `pipeline` and what is "
            "built on them (such as `hf` of lm-eval) report the dropped tensors as UNEXPECTED and go on; `PeftModel` says "
            "nothing. Formats such as GGUF have no place for them. Figures measured that way are not this model's.",
        ]
    if settings:
        lines += ["", "## Settings", "", "```json", json.dumps(without_folders(settings), indent=2, default=str), "```"]
    tags = [method, *(["latent-reasoning"] if record else []), *(["peft"] if adapter is not None else [])]
    tags += [tag for tag in getattr(model, "model_tags", None) or [] if tag]
    library = LIBRARY if record else "peft" if adapter is not None else "transformers"
    return Part(
        "\n".join(lines),
        {"base_model": hub_id(base), "library_name": library, "method": method, "pipeline_tag": "text-generation"},
        tags,
    )


def without_folders(value: Any) -> Any:
    """Return a setting in which absolute paths are only their last part. No card tells where somebody's folders are."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str | Path) and Path(value).is_absolute() else value


def place(folder: str | Path) -> str:
    """Return how a card names its own folder: relative to the working directory if inside it, else `.`.

    So no card contains a home directory.
    """
    path = os.path.relpath(folder)
    return "." if path.startswith("..") else Path(path).as_posix()


def hub_id(name: str | None) -> str | None:
    """Return `name` if it may be a hub id, else None. The hub refuses cards that name a path as base model."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
