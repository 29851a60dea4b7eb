"""Online concept compression of a pretrained model against LoRA on all layers and on layers of equal cost.

The model is SmolLM2-135M, and 22 of its 30 layers run on concepts.

    make bench-concept-pretrained ARGS="--dataset train.jsonl --eval_dataset test.jsonl"  # GSM8K's files
    make bench-concept-pretrained ARGS="--steps 20 --only preset"                          # on generated questions

Loss and metrics are over whole texts. Metrics are on held-out rows, with concepts decided as in inference. Results are
kept in benchmarks/results/concept_pretrained_<device>.json: finished runs are not repeated without --fresh.
"""

import contextlib
import os
import tempfile
from pathlib import Path

from datasets import disable_progress_bars
from transformers import AutoModelForCausalLM

from benchmarks import setups
from benchmarks.bench_concept import CODEWORDS, PRESET, prune
from benchmarks.over_seeds import ROOT, arguments, in_order, table
from trl_ext import ConceptConfig
from trl_ext.cli.console import PlainConsole
from trl_ext.cli.user_errors import in_sentences
from trl_ext.common.fingerprint import digest
from trl_ext.concept.recipe import ScriptArguments, load, train
from trl_ext.tasks.data import DataArguments
from unsloth_ext.concept.accounting import equal_depth


R = 4
STEPS = 150
HELD_OUT = 32
RUNS: dict[str, dict] = {
    "LoRA, all layers": {"use_concepts": False},
    "LoRA, layers of equal cost": {"use_concepts": False},
    "preset": PRESET,
    "preset - codewords from states": {k: v for k, v in PRESET.items() if k != "codebook_init"},
    "fixed stride": {**CODEWORDS, "segmenter": "fixed", "stride": R},
    "fixed stride, two codebooks, token kept": {
        **CODEWORDS,
        "segmenter": "fixed",
        "stride": R,
        "num_codebooks": 2,
        "boundary_keeps_token": True,
    },
    "literal": {},
}
COLUMNS = (
    ("nll", "NLL", ".3f"),
    ("token_accuracy", "tokens", ".1%"),
    ("nll_boundary", "after a concept", ".3f"),
    ("nll_tail", "after others", ".3f"),
    ("nll_tail_random", "the same, random concepts", ".3f"),
    ("ratio", "tokens/concept", ".2f"),
    ("tail", "tail", ".1f"),
    ("perplexity", "perplexity", ".0f"),
    ("macs", "MACs", ".0%"),
    ("kv", "KV", ".0%"),
)


def run(name: str, seed: int, steps: int, data: DataArguments, eval_dataset: str | None) -> dict:
    """Train and evaluate one run."""
    with tempfile.TemporaryDirectory() as output:
        args = ConceptConfig(
            **{
                "output_dir": output,
                "max_steps": steps,
                "per_device_train_batch_size": 4,
                "seed": seed,
                "learning_rate": 5e-4,
                "concept_learning_rate": 2e-3,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 10,
                "n_shallow": 4,
                "n_deep": 4,
                "num_concepts": 512,
                "target_ratio": R,
                "completion_only_loss": False,
                "max_length": 192,
                "use_cpu": not setups.CUDA,
                "bf16": True,
                "report_to": "none",
                "save_strategy": "no",
                "gradient_checkpointing": False,
                "disable_tqdm": True,
                "logging_steps": 10,
                **RUNS[name],
            }
        )
        script = ScriptArguments(
            model_name="smollm2",
            cache_dir=str(ROOT / "runs/cache"),
            train_size=4 * steps,
            eval_size=HELD_OUT,
            eval_dataset=eval_dataset,
            eval_every=0,
            eval_batch=8,
            max_new_tokens=1,
            lora_r=16,
        )
        task = load(script, data, args)
        if name == "LoRA, layers of equal cost":
            model = AutoModelForCausalLM.from_pretrained(task.base)
            prune(model, equal_depth(model.config, args.online(model.config.num_hidden_layers), R))
            task.base = f"{output}/pruned"
            model.save_pretrained(task.base)
        trainer, found, _ = train(task, script, args, PlainConsole(quiet=True), Path(output), None)
    curve = [
        {k: e[k] for k in ("step", "loss", "loss/ce", "concept/ratio") if k in e} for e in trainer.state.log_history
    ]
    return {**found.numbers(), "curve": [e for e in curve if "loss" in e]}


def main() -> None:
    parser = arguments(__doc__, list(RUNS), STEPS, [0])
    parser.add_argument("--dataset", default="gsm_symbolic")
    parser.add_argument("--eval_dataset")
    options = parser.parse_args()
    disable_progress_bars()
    what = {"dataset": Path(options.dataset).name, "steps": options.steps}
    held_out = options.eval_dataset and Path(options.eval_dataset).name
    made_with = {**what, "eval_dataset": held_out, "runs": digest(RUNS)}
    path, results = setups.so_far("concept_pretrained", options.fresh, made_with)
    data = DataArguments(dataset=options.dataset)
    for seed in options.seeds:
        for name in options.only:
            if str(seed) in results.get(name, {}):
                continue
            with (
                open(os.devnull, "w") as nowhere,
                contextlib.redirect_stderr(nowhere),
                contextlib.redirect_stdout(nowhere),
            ):
                last = run(name, seed, options.steps, data, options.eval_dataset)
            results.setdefault(name, {})[str(seed)] = last
            print(f"seed {seed}  {table({name: {seed: last}}, COLUMNS).splitlines()[-1]}", flush=True)
            about = {"command": "make bench-concept-pretrained", **what, "made_with": made_with}
            setups.write("concept_pretrained", {**about, "results": results})
    PlainConsole().print(table(in_order(results, RUNS), COLUMNS))
    setups.write_table(path, page)
    print(path)


def page(found: dict) -> str:
    """The table of benchmarks/results/concept_pretrained_<device>.md."""
    return f"""# Concept tokens on a pretrained model

SmolLM2-135M, 22 of its 30 layers on concepts of 9 bits. {HELD_OUT} held-out texts, {found["steps"]} steps of 4 texts, one
seed. The columns are those of [concept_cpu.md](concept_cpu.md).

{table(in_order(found["results"], RUNS), COLUMNS)}"""


TABLES = {"concept_pretrained": page}


if __name__ == "__main__":
    in_sentences()
    main()
