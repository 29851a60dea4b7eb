"""A process that imports some modules once, then forks a fresh process for each job, whose longest part it would be.

    python -m tests.fork_server MODULE...

Reads jobs from its standard input, a line of JSON for jobs that run together; `tests.processes` writes them.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
from typing import NoReturn


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(together(order["jobs"], order["timeout"])), file=answers, flush=True)


def together(jobs: list[dict], timeout: float) -> list[int]:
    """Their exit statuses. When one fails or time is up, the others are killed: -9."""
    running = {start(job): i for i, job in enumerate(jobs)}
    statuses, deadline = [-9] * len(jobs), time.monotonic() + timeout
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process in running:
            statuses[running.pop(process)] = os.waitstatus_to_exitcode(status)
        if any(status not in (0, -9) for status in statuses) or time.monotonic() > deadline:
            for left in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(left, signal.SIGKILL)
        time.sleep(0.01)
    return statuses


def start(job: dict) -> int:
    """Forks; gives the new process's id."""
    process = os.fork()
    if process:
        return process
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    run(job["argv"])


def run(argv: list[str]) -> NoReturn:
    """What Python does with such arguments."""
    status = 0
    try:
        if argv[0] == "-m":
            sys.argv, sys.path[0] = argv[1:], os.getcwd()
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        elif argv[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *argv[2:]], ""
            exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = argv, os.path.dirname(os.path.abspath(argv[0]))
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        status = 1
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
