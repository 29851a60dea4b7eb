"""What a user got wrong ends a command with one sentence and exit status 2; a bug keeps its traceback.

A recipe calls `in_sentences()` before its heavy imports, so that what goes wrong in them is said in the same way. Nothing
here imports more than the standard library.
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
"""Set this environment variable to 1, or give `--traceback`, and user errors show their traceback too."""

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / name) + os.sep for name in ("patches", "unsloth_ext", "trl_ext", "recipes", "benchmarks"))
# Libraries whose deliberate errors, outside a model's forward pass, are about what they were given
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
)
DELIBERATE = (ValueError, OSError, ImportError, NotImplementedError, FloatingPointError)
FULL = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk is full: a quota is used up",
    errno.EFBIG: "A file would be larger than the file system or `ulimit -f` allows",
}
IN_A_MODEL = {"_call_impl", "generate"}
PATIENCE = 5.0  # seconds that other ranks wait for the launcher to end them, once the first has said what is wrong

explainers: list[Callable[[BaseException], tuple[str, int] | None]] = []
"""Asked first, in turn: a sentence and an exit status for an error, or None."""


def in_sentences() -> None:
    """From now on an uncaught error that `sentence` knows is printed by it on stderr, and the process exits with 2.

    Of several processes the first one speaks. The flag `--traceback` is taken out of `sys.argv` and shows the rest.
    """
    if "--traceback" in sys.argv:
        sys.argv.remove("--traceback")
        os.environ[SHOW_TRACEBACK] = "1"
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # every library's bars; a file would get one endless line of them
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_offer)
    # PEFT says this of GPT-2's layers, and then sets it right itself
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
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)
        sys.exit(status)

    hook.speaks = True  # type: ignore[attr-defined]  # asked for above
    sys.excepthook = hook


def _is_no_offer(record: logging.LogRecord) -> bool:
    """On a CPU with AVX512-BF16 bitsandbytes 0.50 offers a 4-bit kernel of the hub, also to runs without 4 bits."""
    return "kernels-community" not in record.getMessage()


def explained(error: BaseException) -> tuple[str, int] | None:
    """The sentence and exit status of a user's error; None for a bug."""
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
    """Why nothing more could be written; None where that is not the error."""
    for number, said in FULL.items():
        # safetensors and torch say it in words of their own
        words = (os.strerror(number), f"os error {number})")
        if getattr(error, "errno", None) == number or any(each in str(error) for each in words):
            return said
    return None


def sentence(error: BaseException) -> str | None:
    """What to say of a user's error, on one line; None for a bug.

    A user's error is one that our packages raise on purpose, a file or package that is not there, and what TRL,
    transformers and their kin raise on purpose outside a model's forward pass: they check settings, names and files. An
    error that no `raise` made (`int("x")`), that comes out of torch, or that is of a kind nobody writes for users
    (TypeError, KeyError) is a bug.
    """
    if isinstance(error, ModuleNotFoundError) and _is_absent(error.name):
        package = _package(error.name or "")
        return f"the package {package!r} is not installed in {sys.executable}; `make setup` makes .venv, which has it"
    frames = list(walk_tb(error.__traceback__))
    if not frames:
        return None
    frame, _ = frames[-1]
    file = os.path.abspath(frame.f_code.co_filename)
    ours = file.startswith(OURS)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if type(error).__module__ == "jinja2.exceptions":  # "System role not supported", say
        return f"the tokenizer's chat template does not take these messages, or is damaged: {text}"
    raised = _is_raised(error.__traceback__)  # type: ignore[arg-type]  # it has frames
    if not text or not raised or not (isinstance(error, DELIBERATE) or _is_our_kind(error)):
        return None
    if ours:
        return text
    package = frame.f_globals.get("__name__", "").split(".")[0]
    if package in THEIRS and not any(each.f_code.co_name in IN_A_MODEL for each, _ in frames):
        return f"{text} (from {package}; --traceback shows where)"
    return None


def _is_absent(name: str | None) -> bool:
    package = _package(name or "")
    return bool(package) and importlib.util.find_spec(package) is None


def _package(name: str) -> str:
    """Of a module's name, or of what transformers says in its place: The 'deepspeed>=0.9.3' distribution was not ..."""
    found = re.search(r"'([\w-]+)", name)
    return found[1] if found else name.split(".")[0]


def _is_our_kind(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("patches", "unsloth_ext", "trl_ext")


def _is_raised(trace: TracebackType) -> bool:
    """Whether the innermost frame stands at a `raise`."""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
