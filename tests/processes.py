"""A module of tests as one process or as several ranks of DDP on gloo."""

import gc
import os
import socket
import subprocess
import sys

import torch.distributed as dist


def launch(module: str, *arguments: object, processes: int) -> None:
    """Runs `python -m module arguments...`, with torchrun where there is more than one process; raises on failure."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", _free_port()]
    done = subprocess.run(
        [*command, "-m", module, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def _free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def leave() -> None:
    """At the end of a rank, when its trainers are out of use; left to the interpreter's exit it sometimes aborts."""
    gc.collect()  # trainers are in cycles, and hold DDP's threads
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
