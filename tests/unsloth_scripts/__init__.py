"""Scripts that run in a process of their own, because importing Unsloth changes it; each prints one line of JSON."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path


def run(name: str, *args: str) -> dict:
    """What `tests/unsloth_scripts/NAME.py` reports; it runs once, however many tests ask."""
    done = _finished(name, *args)
    assert done.returncode == 0, f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.strip().splitlines()[-1])


@functools.cache
def _finished(name: str, *args: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("UNSLOTH_")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tests.unsloth_scripts.{name}", *args]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280)
