"""Do the methods work on this GPU? Short runs in bf16, fp32 and 4-bit, with Unsloth imported and without. HRPO: rollout and
training agree, every part learns, the patched functions are the live ones. CODI, PCCoT, KaVa: `gpu_latent.py`. KV
distillation: `gpu_kv_distill.py`. Concept tokens: `gpu_concept.py`. Planner and executor: `gpu_planner.py`. SPO, PPO and
distillation of logits and reasoning: `gpu_minimind.py`. A process for each backend and precision, all at once on a GPU.
Ends with a table and `results/gpu_check_<device>.json`; its seconds say what a case costs, not how fast a method is.

    python benchmarks/gpu_check.py [--rehearse]

The timings are `bench_hrpo.py`'s. `--rehearse` runs it without a GPU, Unsloth's CUDA code included.
"""

import argparse
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
from unittest import mock

import setups

from trl_ext.cli.command_line import CommandLine
from trl_ext.cli.user_errors import in_sentences


PRECISIONS = ("float32", "bfloat16", "4bit")
# Of |p_train / p_rollout - 1| over the scored tokens of a step: the largest where all is float32. In bf16 a cached step and
# a full forward round differently, and random weights carry it on: there the mean, 0.02 to 0.11; states lost, 0.75 to 1.4
LARGEST, MEAN = 1e-3, 0.15
MODES = [
    ("projection", "frozen"),
    ("projection", "rollout"),
    ("projection", "jacobi"),
    ("soft_embedding", "frozen"),
    ("soft_embedding", "soft_bptt"),
]
LEARNS = ("lora_", "thinking_residual_gate_r", "thinking_residual_gate_i", "thinking_residual_Lambda")
STEPS = 3


def backend(name: str, precision: str, rehearse: bool) -> dict:
    """One process: every case of one backend in one precision."""
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
    with torch.no_grad():  # random weights of ordinary size: the model's outputs depend on what it reads
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
        base.get_input_embeddings().weight[0] = 0  # and pad is never sampled, which Unsloth would take for padding
    base.save_pretrained(folder)
    setups.tokenizer(base.config.vocab_size - 64).save_pretrained(folder)  # Unsloth may add some
    import gpu_concept
    import gpu_kv_distill
    import gpu_latent
    import gpu_minimind
    import gpu_planner

    modules = {gpu_latent: "", gpu_kv_distill: "KV ", gpu_concept: "concepts ", gpu_planner: "planner "}
    if name == "stock":
        modules[gpu_minimind] = ""  # Unsloth's trainers are refused
    cases = {f"{source} {mode}": partial(train, folder, name, precision, source, mode) for source, mode in MODES}
    for module, prefix in modules.items():
        cases |= {f"{prefix}{case}": partial(module.train, folder, case, precision) for case in module.CASES}
    report: dict = {}
    for case, run in cases.items():
        result = report[f"{precision} {case}"] = checked(run)
        print(f"{name:8} {precision} {case:36} {verdict(result)}", file=sys.stderr, flush=True)
    report["live patches"] = [patch.name for patch in patches.status().values() if patch.live]
    return report


def checked(run: Callable[[], dict]) -> dict:
    """What a case says, and whether it passed. One that raises has failed, and the others are still asked."""
    try:
        result = run()
    except Exception as error:
        traceback.print_exc()
        return {"passed": False, "error": f"{type(error).__name__}: {error}"}
    result["passed"] = result["finite"] and not result["not_learning"] and result["deviation"] <= result["bound"]
    return result


def train(folder: str, name: str, precision: str, source: str, mode: str) -> dict:
    """A few steps; what they say about agreement and learning."""
    import torch
    from datasets import Dataset

    import trl_ext.hrpo.trainer as hrpo
    from trl_ext import HRPOConfig, HRPOTrainer
    from unsloth_ext import FastThinkingModel, ThinkingConfig, backbone_of

    projects = source == "projection" and mode != "frozen"  # a gradient reaches the projection
    exact = precision == "float32" and not (name == "unsloth" and setups.CUDA)  # there it trains under bf16 autocast
    means, largest = [], hrpo.ratio_deviation

    def mean_too(new: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        means.append(((new - rollout).exp() - 1).abs()[mask != 0].mean().item())
        return largest(new, rollout, mask)

    four_bit = precision == "4bit"
    model, tokenizer = FastThinkingModel.from_pretrained(
        folder,
        max_seq_length=512 if setups.CUDA else 256,  # from 512 on Unsloth offloads activations, to pinned memory
        dtype=torch.bfloat16 if four_bit else getattr(torch, precision),
        load_in_4bit=four_bit,
        device_map="cuda" if setups.CUDA else "cpu",
        thinking=ThinkingConfig(source, residual_r_min=0.8, residual_r_max=0.9),
        use_unsloth=name == "unsloth",
    )
    model = FastThinkingModel.get_peft_model(model, r=16)
    torch.nn.init.normal_(backbone_of(model).thinking_projection.modules_to_save["default"].weight, std=0.05)
    args = HRPOConfig(
        thinking_source=source,
        recompute=mode,
        jacobi_iterations=64,
        num_generations=4,
        max_completion_length=64,
        temperature=0.5,
        learning_rate=1e-4,
        **setups.few_steps(precision, STEPS),
    )
    trainer = HRPOTrainer(
        model,
        lambda completions, **_: [float(len(text) % 7) for text in completions],
        args,
        train_dataset=Dataset.from_list([{"prompt": "What is 12 plus 7? " * (1 + i % 3)} for i in range(24)]),
        processing_class=tokenizer,
    )
    with mock.patch.object(hrpo, "ratio_deviation", mean_too):
        learned = setups.watched(trainer, [*LEARNS, *(["thinking_projection"] if projects else [])])
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        **learned,
        "seconds_per_step": round(min(entry["step_time"] for entry in steps), 3),
        "deviation": max(entry["thinking/ratio_deviation"] for entry in steps) if exact else max(means),
        "bound": LARGEST if exact else MEAN,
        "trainer": f"{HRPOTrainer.__mro__[1].__name__}",
        "thinking_fraction": steps[0]["thinking/fraction"],
    }


def process(name: str, precision: str, rehearse: bool) -> dict:
    """`backend` in a process of its own: Unsloth, once imported, has patched all of it."""
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
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in fp32; writes nothing")
    parser.add_argument("--backend", choices=("stock", "unsloth"), help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=PRECISIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not setups.CUDA and not options.rehearse:
        print("gpu-check needs a CUDA GPU and this machine has none; --rehearse runs it on the CPU")
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
