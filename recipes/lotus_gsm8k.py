"""LOTUS (arXiv 2606.31779) on GSM8K-Aug, or, without hub and GPU, on equations with a tiny model that is trained here.

    make train-lotus                                     # the embedded default; with a GPU, GPT-2 on GSM8K-Aug
    python recipes/lotus_gsm8k.py --model_name meta-llama/Llama-3.2-1B-Instruct --preset lotus-llama-1b
    python recipes/lotus_gsm8k.py --model_name FOLDER --dataset train.jsonl --eval_dataset test.jsonl
    python recipes/lotus_gsm8k.py --resume_from_checkpoint latest

Every field of TRL's SFTConfig and of LOTUSConfig is a flag; `--config FILE.yaml` sets many, `--preset NAME` the
published ones. Writes the adapter (`final/`), `summary.json` and `curves.png` into the output directory;
recipes/eval_latent.py analyses the adapter.
"""

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from transformers import set_seed

from trl_ext import LOTUSConfig, LOTUSTrainer
from trl_ext.cli.recipe import finish, leave, start
from trl_ext.cli.report import compact_progress, comparison_table
from trl_ext.latent.evaluation import evaluate_answers
from trl_ext.latent.method import METHOD
from trl_ext.latent.recipe import evaluation_options, load_data, load_tokenizer, parse, tokenized
from trl_ext.tasks.evaluation import AccuracyCallback
from unsloth_ext.common.ablations import ABLATIONS


CONFIGS = Path(__file__).parent / "configs"


def main() -> None:
    script, args = parse(sys.argv[1:], "lotus", LOTUSConfig, CONFIGS)
    started = time.time()
    console, output, resume = start(args, script)

    # Data: rows of question, steps and answer
    train, held_out = load_data(script, console)
    base, tokenizer = load_tokenizer(script, args)
    datasets = tokenized(train, held_out, tokenizer, args)
    console.print(train.report())

    # Model and trainer: the trainer loads the model and attaches the latent tokens before LoRA wraps it
    accuracy = AccuracyCallback(script.eval_every, lambda model: evaluate_answers(model, tokenizer, held_out, **how))
    set_seed(args.seed)
    trainer = LOTUSTrainer(
        base,
        args,
        **datasets,
        processing_class=tokenizer,
        peft_config=script.lora(),
        callbacks=[accuracy],
    )
    compact_progress(trainer)
    model = trainer.model
    how = evaluation_options(script, args, model)
    explicit = evaluate_answers(model, tokenizer, held_out, latents="off", **how)

    # Train
    trainer.train(resume_from_checkpoint=resume)

    # Evaluate: with latent tokens, with replaced latent tokens, and with explicit steps
    after = {name: evaluate_answers(model, tokenizer, held_out, latents=name, **how) for name in ("on", *ABLATIONS)}
    explicit_after = evaluate_answers(model, tokenizer, held_out, latents="off", **how)
    trainer.save_model(str(output / "final"))
    if not trainer.is_world_process_zero():
        return
    rows = {
        "latent tokens": (accuracy.before, after["on"]),
        **{f"latent tokens: {name}": (None, after[name]) for name in ABLATIONS},
        "explicit steps": (explicit, explicit_after),
    }
    comparison_table(rows, console)
    finish(
        trainer,
        console,
        started,
        ("LOTUS", script.model_name, script.dataset),
        accuracy,
        after["on"],
        METHOD.curves,
        method="lotus",
        results={name: [found and found.numbers() for found in pair] for name, pair in rows.items()},
        data=train.report(),
        script=asdict(script),
    )


if __name__ == "__main__":
    main()
    leave()
