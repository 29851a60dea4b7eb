"""The output folder of a run: which run it holds, a lock against other writers, and what a new run may delete.

`run.json` holds the run's id, the commands that started and resumed it, and the step at which it ended. Each checkpoint
holds the id too. The first process locks `run.lock` for as long as it lives; the system frees the lock of a dead
process.
"""

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

from .spelling import underscored


PROGRAM = "latent-reasoning"  # the command line of this package
RUN_FILE, LOCK_FILE = "run.json", "run.lock"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Files that a recipe leaves beside checkpoints. RESULTS are the ones that must not be lost by accident
RESULTS = ("final", "summary.json")
MADE = (*RESULTS, RUN_FILE, "curves.png", "monitors.png", "concepts.html", "completions")
SECRET = re.compile(r"--\w*(?:token|password|secret|key)(=|$)")  # values of these flags are never written

_locks: dict[Path, Any] = {}  # open files, so that the locks last until this process ends


class FolderError(ValueError):
    """The folder cannot be written to, is in use, or holds another run."""


def run_id(folder: str | Path) -> str | None:
    """The id of the run that a folder or a checkpoint belongs to; None if it has none, as in folders of earlier
    versions."""
    return _read(Path(folder)).get("id")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint, complete or not, sorted by step."""
    found = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := CHECKPOINT.fullmatch(path.name))]
    return sorted(found)


def holds_results(folder: Path) -> bool:
    """Whether the folder holds results of a run that another run would overwrite."""
    return bool(checkpoints(folder)) or any((folder / name).exists() for name in RESULTS)


def writable_folder(folder: str | Path, flag: str) -> Path:
    """The folder, which is created if it does not exist.

    Raises:
        FolderError: it is a file, or cannot be written to. The message names the flag that asked for it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = "there is a file in its place" if isinstance(error, FileExistsError) else error.strerror
        raise FolderError(f"{flag} {folder}: cannot write into this folder ({why}); name another one") from error
    return folder


def writable_file(path: str | Path, flag: str) -> Path:
    """The path, whose folder is created if it does not exist.

    Raises:
        FolderError: it is a folder, or cannot be written to. The message names the flag that asked for it.
    """
    path = Path(path)
    if path.is_dir():
        raise FolderError(f"{flag} {path}: is a folder; name a file in it")
    writable_folder(path.parent, flag)
    if path.exists() and not os.access(path, os.W_OK):
        raise FolderError(f"{flag} {path}: this file cannot be overwritten; name another one")
    return path


def lock(folder: Path) -> None:
    """Lock the folder for this process until it ends.

    Raises:
        FolderError: another process holds the lock, or the file system cannot lock.
    """
    path = (folder / LOCK_FILE).resolve()
    if path in _locks and path.exists():
        return
    # lockf, as children do not inherit it: otherwise a worker that outlives its killed parent would keep the lock
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise FolderError(f"{path}: this file system cannot lock a file ({error.strerror})") from error
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise FolderError(
            f"{folder} is in use by a run that has not ended ({holder}); wait for it or choose another --output_dir"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks[path] = file


def check_free(folder: Path, overwrite: bool) -> None:
    """Check that a new run may start in this folder. `begin` calls it too.

    Raises:
        FolderError: the folder holds results and `overwrite` is off, or it holds no record that a run made them.
    """
    if not holds_results(folder):
        return
    known = (folder / RUN_FILE).exists()
    if not overwrite:
        go_on = "Resume it: --resume_from_checkpoint latest; start" if checkpoints(folder) else "Start"
        raise FolderError(
            f"{folder} holds {_description(folder)}. {go_on} over: "
            + ("--overwrite, which deletes it" if known else "move it away")
            + "; or keep both: another --output_dir"
        )
    if not known:
        raise FolderError(
            f"--overwrite: {folder} has no {RUN_FILE}, so its files may not come from a run; move it away, or "
            "choose another --output_dir"
        )


def begin(folder: Path, overwrite: bool) -> str:
    """Start a new run in this folder, which must be locked, and return its id. With `overwrite`, an earlier run is
    deleted.

    Raises:
        FolderError: from `check_free`.
    """
    check_free(folder, overwrite)
    if holds_results(folder):
        delete_made(folder)
    made = uuid.uuid4().hex[:12]
    _write(folder, {"id": made, "commands": [_command()]})
    return made


def go_on(folder: Path, step: int) -> str:
    """Resume the run in this folder from its checkpoint at `step`, and return its id.

    Later checkpoints of the run are marked, so that they are no longer taken for its latest ones. A folder of an
    earlier version has no run and gets one.
    """
    run = _read(folder) or {"id": uuid.uuid4().hex[:12], "commands": []}
    for at, path in checkpoints(folder):
        if run_id(path) in (None, run["id"]):
            stamp(path, run["id"] if at <= step else f"{run['id']}, left at step {step}")
    run["commands"].append(_command())
    run.pop("finished", None)
    _write(folder, {**run, "resumed_at": step})
    return run["id"]


def finished(folder: Path, step: int) -> None:
    """Record that the run has ended and its results are written."""
    note(folder, finished=step)


def note(folder: Path, **values: Any) -> None:
    """Store values with the run in this folder, if there is one."""
    if (folder / RUN_FILE).exists():
        _write(folder, {**_read(folder), **values})


def noted(folder: Path, name: str) -> Any:
    """A value that `note` has stored; None if there is none."""
    return _read(folder).get(name)


def stamp(checkpoint: Path, run: str) -> None:
    """Record in a checkpoint which run made it."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    _write(checkpoint, {"id": run})


def check_apart(folder: Path, given: dict[str, Any]) -> None:
    """Raise a FolderError if `delete_made` would delete a model or file that the run starts from.

    Args:
        given: paths by the flag that names them. Other values are ignored.
    """
    made = [path.resolve() for path in _made(folder)]
    for flag, value in given.items():
        if not isinstance(value, str) or not os.path.exists(value):
            continue
        if any(Path(value).resolve().is_relative_to(path) for path in made):
            raise FolderError(f"--overwrite deletes --{flag} {value}; choose another --output_dir")


def _made(folder: Path) -> list[Path]:
    return [*(path for _, path in checkpoints(folder)), *(folder / name for name in MADE)]


def delete_made(folder: Path) -> None:
    """Delete the files that a run made, and nothing else."""
    for path in _made(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _description(folder: Path) -> str:
    run = _read(folder)
    if not run:
        return "the results of a run"
    ended = f"finished at step {run['finished']}" if "finished" in run else "unfinished"
    return f"run {run['id']} ({run['commands'][-1]['command']}; {ended})"


def command_words() -> list[str]:
    """The words of the command line, with secrets masked."""
    words = (sys.argv[0].split() if sys.argv[0].startswith(f"{PROGRAM} ") else sys.argv[:1]) + sys.argv[1:]
    for i, word in enumerate(words):
        if (flag := SECRET.match(word)) and flag[1]:
            words[i] = f"{flag[0]}***"
        elif flag and i + 1 < len(words):
            words[i + 1] = "***"
    return words


def begun_by(folder: Path) -> list[str]:
    """The words of the command that last started or resumed the run in this folder; empty if unknown."""
    commands = noted(folder, "commands")
    return shlex.split(commands[-1]["command"]) if commands else []


def resume_command(words: list[str]) -> str:
    """The command that resumes a run from its last checkpoint.

    Args:
        words: the command that started the run.
    """
    kept, skip = [], False
    for word in underscored(words):
        if word.startswith("--"):
            skip = word.partition("=")[0] in ("--resume_from_checkpoint", "--overwrite")
        if not skip:
            kept.append(word)
    return shlex.join([*_program(kept), "--resume_from_checkpoint", "latest"])


def _program(words: list[str]) -> list[str]:
    """A command line with what starts it: Python for a script, or our program where the shell finds it."""
    if words[:1] != [PROGRAM]:
        return [_python(), *words]
    found = shutil.which(PROGRAM)
    here = found and Path(found).parent == Path(sys.executable).parent
    return words if here else [_python(), "-m", "trl_ext", *words[1:]]


def _python() -> str:
    """How to call the running Python. `python` may be another one without these packages, as after `make train-hrpo`."""
    if shutil.which("python") == sys.executable:
        return "python"
    here = Path(sys.executable)
    return str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here)


def _command() -> dict[str, str]:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"command": shlex.join(command_words()), "at": now}


def _read(folder: Path) -> dict[str, Any]:
    file = folder / RUN_FILE
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise FolderError(
            f"{file} is damaged ({error}); move it away, and the folder counts as one without a run"
        ) from error


def _write(folder: Path, run: dict[str, Any]) -> None:
    part = folder / f"{RUN_FILE}.part"
    part.write_text(json.dumps(run, indent=2) + "\n")
    part.replace(folder / RUN_FILE)
