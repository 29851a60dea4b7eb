"""Fresh processes, and modules of tests as several ranks of DDP on gloo."""

import functools
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist


ROOT = Path(__file__).parents[1]
STOCK = (
    "torch",
    "datasets",
    "peft",
    "trl.trainer.sft_trainer",
    "trl.trainer.grpo_trainer",
    "matplotlib.pyplot",
    "rich",
)


def fresh(
    *argv: object,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    imports: tuple[str, ...] = STOCK,
    timeout: float = 250,
) -> subprocess.CompletedProcess:
    """`python argv...` in a process that knows nothing of this one. It is forked from one that has imported other people's
    packages, for which Python would need 15 seconds, and none of ours."""
    return _together([list(map(str, argv))], cwd, [env or {}], imports, timeout)[0]


def launch(module: str, *arguments: object, processes: int, env: dict[str, str] | None = None) -> None:
    """Runs `python -m module arguments...` in as many ranks, as torchrun would; raises on failure."""
    argv = ["-m", module, *map(str, arguments)]
    each = [(env or {}) | own for own in (ranks(processes) if processes > 1 else [{}])]
    every = _together([argv] * processes, ROOT, each, STOCK, 250)
    assert not any(done.returncode for done in every), "\n".join(done.stderr[-3000:] for done in every)


def ranks(processes: int) -> list[dict[str, str]]:
    """The environment of each rank, as torchrun makes it."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _together(
    argvs: list[list[str]], cwd: Path, envs: list[dict], imports: tuple[str, ...], timeout: float
) -> list[subprocess.CompletedProcess]:
    here = {} if imports != STOCK else {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            {
                "argv": argv,
                "cwd": str(cwd),
                "env": here | env,
                "stdout": f"{folder}/{i}.out",
                "stderr": f"{folder}/{i}.err",
            }
            for i, (argv, env) in enumerate(zip(argvs, envs, strict=True))
        ]
        server = _server(imports)
        server.stdin.write(json.dumps({"jobs": jobs, "timeout": timeout}) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the server of {', '.join(imports)} is gone (exit status {server.wait()})"
        return [
            subprocess.CompletedProcess(
                job["argv"], status, Path(job["stdout"]).read_text(), Path(job["stderr"]).read_text()
            )
            for job, status in zip(jobs, json.loads(answer), strict=True)
        ]


@functools.cache
def _server(imports: tuple[str, ...]) -> subprocess.Popen:
    """It ends with this process, which closes its input."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("UNSLOTH_")}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fork_server", *imports],
        cwd=ROOT,
        env=env | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


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
