"""Online concept compression over seeds: the literal objective, each extension, and alternatives.

    make bench-concept                                            # with the other parts
    python -m benchmarks.bench_concept --seeds 0 --only literal all

The task is that of recipes/concept_v2.py, with the same tiny model, rows, steps and LoRA in every run. Metrics are on
held-out rows, with concepts decided as in inference. Results are kept in benchmarks/results/concept_<device>.json:
finished runs are not repeated without --fresh.
"""

import contextlib
import os
import tempfile
import time

import torch

from benchmarks import setups
from benchmarks.over_seeds import ROOT, compare, in_order, seeds_of, table
from trl_ext.cli.user_errors import in_sentences
from trl_ext.concept.config import PRESETS


STEPS = 600
HELD_OUT = 500
R = 4
PRESET = PRESETS["stable"]
ALL = {**PRESET, "max_tail": 8}  # the preset has no limit: see the table
LABELS = {
    "codebook_init": "codewords from states",
    "gate": "two-sided gate",
    "ratio_weight": "ratio loss",
    "usage_weight": "usage KL",
    "calibrate_null": "calibrated NULL",
    "warm_start_share": "warm start",
    "max_tail": "at most 8 tokens",
}
OTHERS: dict[str, dict] = {
    "temperature to 0.3": {"temperature_end": 0.3},
    "boundary keeps token": {"boundary_keeps_token": True},
}
CODEWORDS = {
    name: PRESET[name] for name in ("codebook_init", "usage_weight")
}  # extensions that do not concern where concepts end
# (a) the literal objective, (b) each extension alone, all but one, and some more, (c) to (f) alternatives
RUNS: dict[str, dict] = {
    "literal": {},
    **{f"literal + {label}": {name: ALL[name]} for name, label in LABELS.items()},
    **{f"literal + {label}": changes for label, changes in OTHERS.items()},
    "all": ALL,
    **{
        f"all - {label}": {other: value for other, value in ALL.items() if other != name}
        for name, label in LABELS.items()
    },
    "all - at most 8 tokens - warm start": {**PRESET, "warm_start_share": 0.0},
    **{f"all + {label}": {**ALL, **changes} for label, changes in OTHERS.items()},
    "all + at most 48 NULLs": {**ALL, "max_nulls": 48},
    "all, 256 codewords": {**ALL, "num_concepts": 256},
    "all, two codebooks of 32": {**ALL, "num_codebooks": 2},
    **{f"all, {name}": {**ALL, "segmenter": name} for name in ("threshold", "entropy", "autoregressive")},
    "fixed stride": {**CODEWORDS, "segmenter": "fixed", "stride": R},
    "random boundaries": {**CODEWORDS, "gate": "factorised"},
    "LoRA, all layers": {"use_concepts": False},
    "LoRA, layers of equal cost": {"use_concepts": False},
}


def base() -> str:
    """The folder of the model that all runs start from."""
    from trl_ext.tasks import facts, warm_start

    steps = facts.SMALL.warm_start_steps
    return warm_start.tiny_with_facts(ROOT / "runs/cache", seed=0, held_out=HELD_OUT, steps=steps, progress=False)


def run(name: str, seed: int, steps: int) -> dict:
    """Train and evaluate one run."""
    torch.set_num_threads(1)
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from trl_ext import ConceptConfig, ConceptTrainer
    from trl_ext.concept.evaluation import evaluate_concepts
    from trl_ext.tasks import facts
    from unsloth_ext import backbone_of
    from unsloth_ext.concept.accounting import equal_depth

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        folder = base()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        train, held_out = facts.split(HELD_OUT, 0)
        set_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(folder)
        args = ConceptConfig(
            **{
                "output_dir": tempfile.mkdtemp(),
                "max_steps": steps,
                "per_device_train_batch_size": 64,
                "seed": seed,
                "learning_rate": 4e-3,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 20,
                "adam_beta2": 0.98,
                "n_shallow": 1,
                "n_deep": 1,
                "num_concepts": 32,
                "target_ratio": R,
                "completion_only_loss": False,
                "max_length": None,
                "use_cpu": not setups.CUDA,
                "bf16": False,
                "report_to": "none",
                "save_strategy": "no",
                "gradient_checkpointing": False,
                "disable_tqdm": True,
                "logging_steps": 10,
                **RUNS[name],
            }
        )
        if name == "LoRA, layers of equal cost":
            prune(model, equal_depth(model.config, args.online(model.config.num_hidden_layers), R))
        trainer = ConceptTrainer(
            model,
            args,
            train_dataset=train,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        if name == "random boundaries":
            backbone_of(trainer.model).concept_gate.rescore = lambda score: 1 / R - torch.rand_like(score)
        started = time.time()
        trainer.train()
        seconds = time.time() - started
        found = evaluate_concepts(trainer.model, tokenizer, held_out, max_new_tokens=40, batch_size=250)
    kept = ("loss/ce", "concept/ratio", "concept/perplexity")
    curve = [{k: e[k] for k in ("step", *kept) if k in e} for e in trainer.state.log_history if "loss" in e]
    return {**found.numbers(), "ms_per_step": 1000 * seconds / steps, "curve": curve}


def prune(model: torch.nn.Module, layers: int) -> list[int]:
    """Keep fewer layers, evenly spaced and with the first and the last, in place. Returns which."""
    places = torch.linspace(0, model.config.num_hidden_layers - 1, layers).round().long().tolist()
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in places)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = layers
    model.config.layer_types = ["full_attention"] * layers
    return places


COLUMNS = (
    ("accuracy", "texts repeated", ".0%"),
    ("token_accuracy", "tokens", ".0%"),
    ("nll", "NLL", ".3f"),
    ("nll_boundary", "after a concept", ".3f"),
    ("nll_tail", "after others", ".3f"),
    ("nll_tail_random", "the same, random concepts", ".3f"),
    ("nll_random", "all, random concepts", ".3f"),
    ("ratio", "tokens/concept", ".2f"),
    ("tail", "tail", ".1f"),
    ("perplexity", "perplexity", ".1f"),
    ("used", "used", ".0%"),
    ("macs", "MACs", ".0%"),
    ("kv", "KV", ".0%"),
)


def page(found: dict) -> str:
    """The table of benchmarks/results/concept_<device>.md."""
    results, made_with = in_order(found["results"], RUNS), found["made_with"]
    return f"""# Concept tokens over seeds

{seeds_of(results)} seeds, {made_with["held_out"]}, {made_with["steps"]} steps; mean (lowest..highest).

- texts repeated: held-out texts that are repeated exactly; tokens: tokens predicted right.
- NLL: nats per token of the held-out texts. "After a concept" and "after others" split it by the token before.
- random concepts: the same figure when each concept is replaced by a random one.
- tail: mean number of tokens since the last concept. Perplexity and used: of the codewords.
- MACs, KV: multiplications, and keys and values in the cache, as shares of the model without concepts.

{table(results, COLUMNS)}"""


TABLES = {"concept": page}


def main() -> None:
    base()  # made before two processes need it
    compare(__doc__, "concept", RUNS, run, STEPS, COLUMNS, f"{HELD_OUT} held-out texts", page)


if __name__ == "__main__":
    in_sentences()
    main()
