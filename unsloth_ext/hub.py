"""Small files of a model, wherever it lies."""

import json
import os
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError


def read_json(folder: str, filename: str, token: str | None) -> dict | None:
    """A JSON file of a local folder or a hub repository; None where there is none."""
    path = Path(folder, filename)
    if not os.path.isdir(folder):
        try:
            path = Path(hf_hub_download(folder, filename, token=token))
        except (EntryNotFoundError, OSError, ValueError):
            return None
    return json.loads(path.read_text()) if path.exists() else None
