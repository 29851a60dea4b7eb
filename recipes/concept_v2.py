"""Online concept compression: a language model whose middle layers read only discrete concepts, made of its own tokens.

    make train-concept                                  # the embedded default; with a GPU, Qwen3-0.6B on GSM8K
    python recipes/concept_v2.py --preset literal --output_dir runs/concept_literal
    python recipes/concept_v2.py --model_name Qwen/Qwen3-0.6B --dataset openai/gsm8k --dataset_config main --lora_r 32
    python recipes/concept_v2.py --resume_from_checkpoint latest

Every field of TRL's SFTConfig and of ConceptConfig is a flag; `--config FILE.yaml` sets many. Writes the model
(`final/`), `summary.json`, `curves.png` and `concepts.html` to the output directory. The page shows held-out texts
with their concepts and codewords.
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

from trl_ext import ConceptTrainer, evaluate_concepts
from trl_ext.cli.recipe import finish, leave, start
from trl_ext.cli.report import compact_progress
from trl_ext.concept.method import METHOD
from trl_ext.concept.recipe import (
    BASE,
    ScriptArguments,
    base_evaluation,
    comparison,
    evaluation_options,
    load,
    parse,
    show_pieces,
)
from trl_ext.tasks.evaluation import AccuracyCallback
from unsloth_ext.common.hub import load_causal_lm


CONFIGS = Path(__file__).parent / "configs"


def main() -> None:
    script, data, args = parse(sys.argv[1:], ScriptArguments, CONFIGS)
    started = time.time()
    console, output, resume = start(args, script)

    # Data, and an evaluation of the model before it has concepts
    task = load(script, data, args)
    base = base_evaluation(task, script, args)

    # Model and trainer: the trainer attaches the concepts before LoRA wraps the model
    how = evaluation_options(task, script, args)
    accuracy = AccuracyCallback(
        script.eval_every, lambda model: evaluate_concepts(model, task.tokenizer, task.held_out, **how)
    )
    set_seed(args.seed)
    trainer = ConceptTrainer(
        load_causal_lm(task.base, method=METHOD.name, trust_remote_code=args.trust_remote_code),
        args,
        train_dataset=task.train,
        eval_dataset=task.held_out if args.eval_strategy != "no" else None,
        processing_class=task.tokenizer,
        peft_config=script.lora(),
        callbacks=[accuracy],
    )
    compact_progress(trainer)

    # Train
    trainer.train(resume_from_checkpoint=resume)

    # Evaluate, save and show
    after = evaluate_concepts(trainer.model, task.tokenizer, task.held_out, **how)
    trainer.save_model(str(output / "final"))
    if args.use_concepts:
        show_pieces(trainer, task, console, f"Concept tokens, {script.model_name}")
    if not trainer.is_world_process_zero():
        return
    finish(
        trainer,
        console,
        started,
        ("Concept tokens", script.model_name, data.dataset),
        accuracy,
        after,
        METHOD.curves,
        base=base.numbers(),
        script=asdict(script),
        data=asdict(data),
    )
    comparison({BASE: base, "concepts": after}, console)


if __name__ == "__main__":
    main()
    leave()
