"""Errors of the user end a command with one sentence and exit status 2; bugs keep their traceback.

A recipe calls `in_sentences()` before its heavy imports, so that errors in them are reported in the same way. This
module imports only the standard library.
"""

import dis
import errno
import importlib.util
import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from traceback import walk_tb
from types import TracebackType


STATUS = 2
SHOW_TRACEBACK = "LATENT_TRACEBACK"
"""If this environment variable is 1, or with `--traceback`, user errors show their traceback too."""

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / name) + os.sep for name in ("patches", "unsloth_ext", "trl_ext", "recipes", "benchmarks"))
# Libraries whose deliberate errors, outside a model's forward pass, are about wrong arguments
THEIRS = (
    "trl",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "tokenizers",
    "unsloth",
    "unsloth_zoo",
    "vllm",
)
DELIBERATE = (ValueError, OSError, ImportError, NotImplementedError, FloatingPointError)
FULL = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk is full: a quota is used up",
    errno.EFBIG: "A file would be larger than the file system or `ulimit -f` allows",
}
IN_A_MODEL = {"_call_impl", "generate"}
PATIENCE = 5.0  # seconds that other ranks wait for the launcher to end them after the first has reported the error

explainers: list[Callable[[BaseException], tuple[str, int] | None]] = []
"""Functions that are asked first, in order. Each returns a sentence and an exit status for an error, or None."""


def in_sentences() -> None:
    """Print user errors as one sentence on stderr from now on, and exit with status 2. `sentence` recognises them.

    Of several processes only the first prints. The flag `--traceback` is removed from `sys.argv` and shows tracebacks
    too.
    """
    if "--traceback" in sys.argv:
        sys.argv.remove("--traceback")
        os.environ[SHOW_TRACEBACK] = "1"
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # for all libraries: in a file, bars would be one endless line
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_offer)
    # PEFT warns about GPT-2's layers, and then corrects the setting itself
    warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
    usual = sys.excepthook
    if getattr(usual, "speaks", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        found = explained(error)
        if found is None:
            usual(kind, error, trace)
            return
        text, status = found
        if os.environ.get(SHOW_TRACEBACK, "0") == "1":
            usual(kind, error, trace)
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(PATIENCE)
            text = f"rank {rank}: {text}"
        sys.stdout.flush()
        # Not sys.stderr: with several processes, torch's hook collects what this one prints, and loses it at the exit
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.__stderr__, flush=True)
        sys.exit(status)

    hook.speaks = True  # type: ignore[attr-defined]  # read above
    sys.excepthook = hook


def _is_no_offer(record: logging.LogRecord) -> bool:
    """Drop an offer of bitsandbytes 0.50 on CPUs with AVX512-BF16: a 4-bit kernel from the hub, even for runs without 4
    bits."""
    return "kernels-community" not in record.getMessage()


def explained(error: BaseException) -> tuple[str, int] | None:
    """The sentence and exit status for a user's error; None for a bug."""
    for explain in explainers:
        if found := explain(error):
            return found
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted", 128 + signal.SIGINT
    if full := disk_is_full(error):
        return full, STATUS
    text = sentence(error)
    return (text, STATUS) if text else None


def disk_is_full(error: BaseException) -> str | None:
    """Why nothing more could be written; None for other errors."""
    for number, said in FULL.items():
        # safetensors and torch use their own words
        words = (os.strerror(number), f"os error {number})")
        if getattr(error, "errno", None) == number or any(each in str(error) for each in words):
            return said
    return None


def sentence(error: BaseException) -> str | None:
    """One line that reports a user's error; None for a bug.

    User errors are errors that our packages raise on purpose, missing files and packages, and errors that TRL,
    transformers and similar libraries raise on purpose outside a model's forward pass, where they check settings, names
    and files. Bugs are errors without a `raise` statement (`int("x")`), errors from torch, and kinds that are not meant
    for users (TypeError, KeyError).
    """
    if isinstance(error, ModuleNotFoundError) and _is_absent(error.name):
        package = _package(error.name or "")
        checkout = (ROOT / "Makefile").is_file()
        remedy = "`make setup` makes .venv, which has it" if checkout else f"pip install {package}"
        return f"the package {package!r} is not installed in {sys.executable}; {remedy}"
    frames = list(walk_tb(error.__traceback__))
    if not frames:
        return None
    frame, _ = frames[-1]
    file = os.path.abspath(frame.f_code.co_filename)
    ours = file.startswith(OURS)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if type(error).__module__ == "jinja2.exceptions":  # for example "System role not supported"
        return f"the tokenizer's chat template does not accept these messages, or it is damaged:  {text}"
    packages = [each.f_globals.get("__name__", "").split(".")[0] for each, _ in frames]
    if type(error).__module__.startswith("pydantic") and "vllm" in packages:  # its check of an engine's settings
        wrong = error.errors()[0]  # type: ignore[attr-defined]
        said = [f"{name}:" for name in wrong["loc"]] + wrong["msg"].removeprefix("Value error, ").split()
        return f"{' '.join(said)} (from vllm; --traceback shows where)"
    raised = _is_raised(error.__traceback__)  # type: ignore[arg-type]  # there are frames, so it is not None
    if not text or not raised or not (isinstance(error, DELIBERATE) or _is_our_kind(error)):
        return None
    if ours:
        return text
    if packages[-1] in THEIRS and not any(each.f_code.co_name in IN_A_MODEL for each, _ in frames):
        return f"{text} (from {packages[-1]}; --traceback shows where)"
    return None


def _is_absent(name: str | None) -> bool:
    package = _package(name or "")
    return bool(package) and importlib.util.find_spec(package) is None


def _package(name: str) -> str:
    """The package in a module's name, or in transformers' message "The 'deepspeed>=0.9.3' distribution was not ..."."""
    found = re.search(r"'([\w-]+)", name)
    return found[1] if found else name.split(".")[0]


def _is_our_kind(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("patches", "unsloth_ext", "trl_ext")


def _is_raised(trace: TracebackType) -> bool:
    """Whether the innermost frame is at a `raise` statement."""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
