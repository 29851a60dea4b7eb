"""Scripts that run in a process of their own, because importing Unsloth changes it; each prints one line of JSON."""

import functools
import json
import subprocess

from tests.processes import STOCK, fresh


IMPORTS = {"hrpo_losses": STOCK, "cpu_backend": (), "kv_compiled": ()}  # what others import comes too late


def run(name: str, *args: str) -> dict:
    """What `tests/unsloth_scripts/NAME.py` reports; it runs once, however many tests ask."""
    done = _finished(name, *args)
    assert done.returncode == 0, f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.strip().splitlines()[-1])


@functools.cache
def _finished(name: str, *args: str) -> subprocess.CompletedProcess:
    imports = IMPORTS.get(name, ("tests.unsloth_on_cpu",))
    return fresh("-m", f"tests.unsloth_scripts.{name}", *args, imports=imports, timeout=280)
