"""GRPO of a model that thinks in latent tokens, or, without hub and GPU, of a tiny model that CODI first trains here.

    make train-latent-grpo                             # the embedded default; with a GPU, of runs/codi_gsm8k/final
    python recipes/latent_grpo.py --config latent_grpo_tiny --model_name runs/kava_tiny/final --output_dir runs/mine
    python recipes/latent_grpo.py --model_name FOLDER --dataset train.jsonl --eval_dataset test.jsonl
    python recipes/latent_grpo.py --resume_from_checkpoint latest --max_steps 400

The model is one of CODI, PCCoT, KaVa, LOTUS or Coconut, an adapter or whole. Every field of TRL's GRPOConfig is a flag;
`--config FILE.yaml` sets many. Writes the model (`final/`), `summary.json` and `curves.png` into the output directory;
recipes/eval_latent.py analyses the model.
"""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import GenerationConfig, set_seed

from trl_ext import LatentGRPOConfig, LatentGRPOTrainer
from trl_ext.cli.console import PlainConsole
from trl_ext.cli.flags import chosen
from trl_ext.cli.parser import RecipeParser
from trl_ext.cli.recipe import leave, start
from trl_ext.cli.report import compact_progress
from trl_ext.common.config_checks import at_least
from trl_ext.latent.config import LatentArguments
from trl_ext.latent.evaluation import evaluate_answers
from trl_ext.latent.recipe import EMBEDDED, LatentRecipeArguments, ablated, load_data, report
from trl_ext.latent.warm_start import tiny_with_latents
from trl_ext.tasks.dry_run import dry_run
from trl_ext.tasks.evaluation import AccuracyCallback
from trl_ext.tasks.reward import make_reward
from unsloth_ext import LatentModel
from unsloth_ext.common.generation_arguments import check_context
from unsloth_ext.common.wrapping import backbone_of


@dataclass
class ScriptArguments(LatentRecipeArguments):
    """The recipe's own flags, besides the trainer's configuration."""

    answer_prompt: str = field(
        default=LatentArguments.answer_prompt,
        metadata={"help": "Text before each answer, as in the training of the latent tokens."},
    )
    codi_steps: int = field(
        default=160, metadata={"help": "Steps of CODI in the tiny model's warm start, after --sft_steps."}
    )
    dry_run_rows: int = field(
        default=64, metadata={"help": "Number of rows to sample before training, to check the rewards."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, codi_steps=1, dry_run_rows=1)
        if not self.answer_prompt.strip():
            raise ValueError(
                f"answer_prompt={self.answer_prompt!r}: the reward looks for the answer after it; name the text that the "
                "model was trained with"
            )
        if self.model_name == "tiny" and self.dataset != "tiny":
            raise ValueError(
                f"--dataset {self.dataset}: the tiny model can only read the built-in equations; leave --dataset out"
            )


def parse() -> tuple[ScriptArguments, LatentGRPOConfig]:
    """Parse the flags, which override the configuration file."""
    _, config, flags = chosen(sys.argv[1:], Path(__file__).parent / "configs", "latent_grpo", EMBEDDED)
    parser = RecipeParser((ScriptArguments, LatentGRPOConfig), EMBEDDED)
    script, args = parser.parse_args_and_config(["--config", str(config), *flags])
    if not args.thinking:
        raise ValueError(
            "thinking=False: this recipe trains latent tokens; for GRPO without them use TRL's GRPOTrainer"
        )
    return script, args


def load_model(script: ScriptArguments, args: LatentGRPOConfig, console: PlainConsole) -> LatentModel:
    """The policy with its latent tokens, and its tokenizer."""
    name = script.model_name
    if name == "tiny":
        name = tiny_with_latents(
            Path(script.cache_dir),
            seed=script.warm_start_seed,
            held_out=script.eval_size,
            sft_steps=script.sft_steps,
            codi_steps=script.codi_steps,
            progress=not args.disable_tqdm,
        )
    set_seed(args.seed)
    loaded = LatentModel.from_pretrained(name, **(args.model_init_kwargs or {}))
    if is_peft_model(loaded.model):
        console.print(f"--model_name {name} is an adapter: it is trained further, --lora_* is ignored")
    return loaded


def main() -> None:
    script, args = parse()
    started = time.time()
    console, output, resume = start(args, script)

    # Data: rows of question and answer; steps are not read
    to_train, held_out = load_data(script, console, need_steps=False)
    console.print(to_train.report())
    train = Dataset.from_list([{"prompt": row["question"], "answer": row["answer"]} for row in to_train.usable])

    # Model, reward and trainer
    loaded = load_model(script, args, console)
    tokenizer = loaded.tokenizer
    for rows in (train["prompt"], [row["question"] for row in held_out]):
        check_context(
            loaded.model,
            [len(ids) for ids in tokenizer(list(rows))["input_ids"]],
            GenerationConfig(max_new_tokens=args.max_completion_length),
            around=backbone_of(loaded.model).latent_config.num_latents + 2,
        )
    delimiter = script.answer_prompt.strip()
    reward = make_reward(delimiter)
    how = {
        "answer_prompt": script.answer_prompt,
        "max_new_tokens": args.max_completion_length,
        "batch_size": script.eval_batch,
        "progress": not args.disable_tqdm and args.process_index == 0,
    }
    accuracy = AccuracyCallback(script.eval_every, lambda model: evaluate_answers(model, tokenizer, held_out, **how))
    trainer = LatentGRPOTrainer(
        loaded.model,
        reward,
        args,
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=None if is_peft_model(loaded.model) else script.lora(),
        callbacks=[accuracy],
    )
    compact_progress(trainer)

    # A look before training: what is sampled, and which rewards it earns
    looked_at = train.select(range(min(script.dry_run_rows, len(train))))
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
    sampled = LatentModel(trainer.model, tokenizer).generate(
        looked_at["prompt"], max_new_tokens=args.max_completion_length, **sampling
    )
    dry_run(looked_at, sampled, reward, delimiter, console)
    before = ablated(trainer.model, tokenizer, held_out, how)

    trainer.train(resume_from_checkpoint=resume)

    # With latent tokens, and with replaced ones
    after = {"latent tokens": evaluate_answers(trainer.model, tokenizer, held_out, **how)}
    after |= ablated(trainer.model, tokenizer, held_out, how)
    trainer.save_model(str(output / "final"))
    if not trainer.is_world_process_zero():
        return
    before["latent tokens"] = accuracy.before
    results = {name: (before[name], after[name]) for name in after}
    report(trainer, console, started, script, accuracy, results, data=to_train.report())


if __name__ == "__main__":
    main()
    leave()
