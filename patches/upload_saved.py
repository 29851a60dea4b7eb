"""Patch of `push_to_hub`, which writes transformers' model card over the saved one before it uploads (5.17).

Every upload goes through `_upload_modified_files`, also those of PEFT, Unsloth and `save_pretrained(push_to_hub=True)`.
"""

import functools
from pathlib import Path
from typing import Any

from .registry import Patch, Site
from .save_pretrained import describer


def _sites(*owners: type) -> list[Site]:
    from transformers.utils.hub import PushToHubMixin

    return [(owner, "_upload_modified_files") for owner in owners or (PushToHubMixin,)]


def _wrap(original: Any) -> Any:
    @functools.wraps(original)
    def upload(self, working_dir, repo_id, *args, **kwargs):
        describe = describer(self)
        if describe is not None:
            card = Path(working_dir, "README.md")
            describe(self, working_dir, card.read_text() if card.is_file() else None, repo_id)
        return original(self, working_dir, repo_id, *args, **kwargs)

    return upload


PATCH = Patch(
    name="upload_saved",
    package="transformers",
    target="PushToHubMixin._upload_modified_files",
    parameters=("self", "working_dir", "repo_id"),
    sites=_sites,
    wrap=_wrap,
    places=("transformers/utils/hub.py:PushToHubMixin._upload_modified_files",),
    effect="Before an upload, the decoder's `describe_saved` completes the folder again.",
    reason="every method with modules: `push_to_hub` writes a card of its own over ours",
    upstream="no upstream issue is known",
    removable="when `push_to_hub` keeps a model card that is in the folder",
)
