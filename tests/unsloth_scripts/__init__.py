"""Scripts that run in a process of their own, because importing Unsloth changes it; each prints one line of JSON."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path


@functools.cache
def run(name: str, *args: str, timeout: float = 300) -> dict:
    """What `tests/unsloth_scripts/NAME.py` reports."""
    root = Path(__file__).parents[2]
    # A cache location in the environment would come before the script's own
    environment = {k: v for k, v in os.environ.items() if not k.startswith("UNSLOTH_")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tests.unsloth_scripts.{name}", *args]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.strip().splitlines()[-1])
