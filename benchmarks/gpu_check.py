"""Check that the methods work on this GPU: short runs in bf16, fp32 and 4-bit, with and without Unsloth.

The record of each method names the file with its cases. Each backend and precision has a separate process; on a GPU
they run all at once. The check ends with a table and `results/gpu_check_<device>.json`. Its seconds show the cost of a
case, not the speed of a method.

    python benchmarks/gpu_check.py [--rehearse]

`bench_hrpo.py` measures speed. `--rehearse` runs the check without a GPU, including Unsloth's CUDA code.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import setups

from trl_ext.cli.command_line import CommandLine
from trl_ext.cli.user_errors import in_sentences
from trl_ext.common.method import training_methods


PRECISIONS = ("float32", "bfloat16", "4bit")


def backend(name: str, precision: str, rehearse: bool) -> dict:
    """Run every case of one backend in one precision, in this process."""
    if name == "unsloth":
        if rehearse:
            sys.path.insert(0, str(Path(__file__).parents[1]))
            from tests import unsloth_on_cpu  # noqa: F401
        else:
            import unsloth  # noqa: F401
    import torch

    import patches

    folder = tempfile.mkdtemp()
    base = setups.qwen2("check").float()
    with torch.no_grad():  # random weights of ordinary size, so that outputs depend on inputs
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
        base.get_input_embeddings().weight[0] = 0  # so that pad is never sampled: Unsloth would treat it as padding
    base.save_pretrained(folder)
    setups.tokenizer(base.config.vocab_size - 64).save_pretrained(folder)  # leaves room for tokens that Unsloth may add
    cases = {}
    for method in training_methods().values():
        if not method.gpu_check or (method.gpu_check_needs_stock and name == "unsloth"):
            continue
        module = importlib.import_module(method.gpu_check.removesuffix(".py"))
        cases |= {f"{method.name} {case}": partial(module.train, folder, case, precision) for case in module.CASES}
    report: dict = {}
    for case, run in cases.items():
        result = report[f"{precision} {case}"] = checked(run)
        print(f"{name:8} {precision} {case:36} {verdict(result)}", file=sys.stderr, flush=True)
    report["live patches"] = [patch.name for patch in patches.status().values() if patch.live]
    return report


def checked(run: Callable[[], dict]) -> dict:
    """The result of a case, and whether it passed. A case that raises has failed; the others still run."""
    try:
        result = run()
    except Exception as error:
        traceback.print_exc()
        return {"passed": False, "error": f"{type(error).__name__}: {error}"}
    result["passed"] = result["finite"] and not result["not_learning"] and result["deviation"] <= result["bound"]
    return result


def process(name: str, precision: str, rehearse: bool) -> dict:
    """Run `backend` in a separate process, because an imported Unsloth patches the whole process."""
    call = [sys.executable, __file__, "--backend", name, "--precision", precision]
    cache = {"UNSLOTH_COMPILE_LOCATION": f"unsloth_compiled_cache/{precision}"}
    done = subprocess.run(
        [*call, *(["--rehearse"] if rehearse else [])],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **cache},
    )
    if done.returncode:
        return {precision: {"passed": False, "error": f"exit status {done.returncode}"}}
    return json.loads(done.stdout.splitlines()[-1])


def verdict(result: dict) -> str:
    if "error" in result:
        return f"FAILED {result['error'][:150]}"
    measured = f"off by {result['deviation']:.1e}, {result['seconds_per_step']:.2f} s/step"
    return f"{measured}  " + ("ok" if result["passed"] else f"FAILED {result['not_learning'] or ''}")


def main() -> int:
    parser = CommandLine(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="run on a CPU, in fp32, without writing results")
    parser.add_argument("--backend", choices=("stock", "unsloth"), help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=PRECISIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not setups.CUDA and not options.rehearse:
        print("gpu-check needs a CUDA GPU, but this machine has none; --rehearse runs it on the CPU")
        return 2
    if options.backend:
        print(json.dumps(backend(options.backend, options.precision, options.rehearse)))
        return 0
    ways = list(product(("stock", "unsloth"), ["float32"] if options.rehearse else PRECISIONS))
    with ThreadPoolExecutor(1 if options.rehearse else len(ways)) as pool:
        reports = list(pool.map(lambda way: process(*way, options.rehearse), ways))
    found: dict[str, dict] = {}
    for (name, _), report in zip(ways, reports, strict=True):
        found.setdefault(name, {}).update(report)
        for case, result in report.items():
            if isinstance(result, dict):
                print(f"{name:8} {case:44} {verdict(result)}")
    passed = all(r["passed"] for cases in found.values() for r in cases.values() if isinstance(r, dict))
    if not options.rehearse:
        print(setups.write("gpu_check", {"command": "make gpu-check", **found}))
    return int(not passed)


if __name__ == "__main__":
    in_sentences()
    sys.exit(main())
