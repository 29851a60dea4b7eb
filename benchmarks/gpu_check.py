"""Do the methods work on this GPU? Short runs in bf16, fp32 and 4-bit, with Unsloth imported and without. HRPO: rollout and
training agree, every part learns, the patched functions are the live ones. CODI, PCCoT, KaVa: `gpu_latent.py`. KV
distillation: `gpu_kv.py`. Concept tokens: `gpu_concept.py`. Planner and executor: `gpu_planner.py`. SPO, PPO and
distillation of logits and reasoning: `gpu_minimind.py`. Ends with a table and `results/gpu_check_<device>.json`.

    python benchmarks/gpu_check.py [--rehearse]

The timings are `bench_hrpo.py`'s. `--rehearse` runs it without a GPU, Unsloth's CUDA code included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import setups


# (precision, largest |p_train / p_rollout - 1| over 64 tokens at the first inner step). In bf16 a cached step and a full
# forward round differently: there the bound only tells noise from states that did not arrive (which is 1 and more)
PRECISIONS = {"float32": 1e-3, "bfloat16": 0.5, "4bit": 0.5}
MODES = [
    ("projection", "rollout"),
    ("projection", "jacobi"),
    ("soft_embedding", "frozen"),
    ("soft_embedding", "soft_bptt"),
]
LEARNS = ("lora_", "thinking_residual_gate_r", "thinking_residual_gate_i", "thinking_residual_Lambda")
STEPS = 3


def backend(name: str, rehearse: bool) -> dict:
    """One process of one backend: every precision and mode."""
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
    import gpu_kv
    import gpu_latent
    import gpu_minimind
    import gpu_planner

    report: dict = {}
    for precision in ["float32"] if rehearse else PRECISIONS:
        for source, mode in MODES:
            report[f"{precision} {source} {mode}"] = train(folder, name, precision, source, mode)
        for method in gpu_latent.METHODS:
            report[f"{precision} {method}"] = gpu_latent.train(folder, method, precision)
        for case in gpu_kv.CASES:
            report[f"{precision} KV {case}"] = gpu_kv.train(folder, case, precision)
        for case in gpu_concept.CASES:
            report[f"{precision} concepts {case}"] = gpu_concept.train(folder, case, precision)
        for case in gpu_planner.CASES:
            report[f"{precision} planner {case}"] = gpu_planner.train(folder, case, precision)
        for case in gpu_minimind.CASES if name == "stock" else ():  # Unsloth's trainers are refused
            report[f"{precision} {case}"] = gpu_minimind.train(folder, case, precision)
    for result in report.values():
        result["passed"] = result["finite"] and not result["not_learning"] and result["deviation"] <= result["bound"]
    report["live patches"] = [patch.name for patch in patches.status().values() if patch.live]
    return report


def train(folder: str, name: str, precision: str, source: str, mode: str) -> dict:
    """A few steps; what they say about agreement and learning."""
    import torch
    from datasets import Dataset

    from trl_ext import HRPOConfig, HRPOTrainer
    from unsloth_ext import FastThinkingModel, ThinkingConfig, backbone_of

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
    learned = setups.watched(trainer, [*LEARNS, *(["thinking_projection"] if source == "projection" else [])])
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        **learned,
        "seconds_per_step": round(min(entry["step_time"] for entry in steps), 3),
        "deviation": max(entry["thinking/ratio_deviation"] for entry in steps),
        "bound": PRECISIONS[precision],
        "trainer": f"{HRPOTrainer.__mro__[1].__name__}",
        "thinking_fraction": steps[0]["thinking/fraction"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in fp32; writes nothing")
    parser.add_argument("--backend", choices=("stock", "unsloth"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not setups.CUDA and not options.rehearse:
        print("gpu-check needs a CUDA GPU and this machine has none; --rehearse runs it on the CPU")
        return 2
    if options.backend:
        print(json.dumps(backend(options.backend, options.rehearse)))
        return 0
    found, passed = {}, True
    for name in ("stock", "unsloth"):
        call = [sys.executable, __file__, "--backend", name, *(["--rehearse"] if options.rehearse else [])]
        done = subprocess.run(
            call, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        found[name] = (
            json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"exit status": done.returncode}
        )
        passed &= done.returncode == 0
        for case, result in found[name].items():
            if isinstance(result, dict) and "passed" in result:
                passed &= result["passed"]
                verdict = "ok" if result["passed"] else f"FAILED {result['not_learning'] or ''}"
                deviation, seconds = result["deviation"], result["seconds_per_step"]
                print(f"{name:8} {case:44} off by {deviation:.1e}, {seconds:.2f} s/step  {verdict}")
    if not options.rehearse:
        print(setups.write("gpu_check", {"command": "make gpu-check", **found}))
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
