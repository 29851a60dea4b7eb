"""The toy method on equations with their steps.

make train-toy
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from transformers import AutoModelForCausalLM, set_seed
from trl_ext.toy.method import METHOD

from trl_ext import ToyConfig, ToyTrainer
from trl_ext.cli.flags import chosen
from trl_ext.cli.parser import RecipeParser
from trl_ext.cli.recipe import RecipeArguments, finish, start
from trl_ext.cli.report import before_after_table, compact_progress
from trl_ext.tasks import equations
from trl_ext.tasks.evaluation import AccuracyCallback, evaluate


CONFIGS = Path(__file__).parent / "configs"
EMBEDDED = ("tiny",)


@dataclass
class ScriptArguments(RecipeArguments):
    """What the recipe adds to the trainer's configuration."""


def main() -> None:
    parser = RecipeParser((ScriptArguments, ToyConfig), EMBEDDED)
    _, config, others = chosen(sys.argv[1:], CONFIGS, "toy", EMBEDDED)
    script, args = parser.parse_args_and_config(["--config", str(config), *others])
    started = time.time()
    console, output, resume = start(args, script)
    tokenizer = equations.tokenizer()
    set_seed(args.seed)
    base = output / "base"
    AutoModelForCausalLM.from_config(equations.config(tokenizer, equations.STUDENT)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    train, held_out = (equations.explicit(rows) for rows in equations.split(script.eval_size, 0))
    train = train.select(range(args.max_steps * args.per_device_train_batch_size))  # what it is trained on
    how = {"delimiter": "#", "max_new_tokens": 8, "batch_size": script.eval_batch, "thinking": "off"}
    accuracy = AccuracyCallback(script.eval_every, lambda model: evaluate(model, tokenizer, held_out, **how))
    trainer = ToyTrainer(
        str(base),
        args,
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=script.lora(),
        callbacks=[accuracy],
    )
    compact_progress(trainer)
    trainer.train(resume_from_checkpoint=resume)
    after = evaluate(trainer.model, tokenizer, held_out, **how)
    trainer.save_model(str(output / "final"))
    before_after_table(accuracy.before, after, console)
    finish(trainer, console, started, ("Toy", script.model_name), accuracy, after, METHOD.curves, script=asdict(script))


if __name__ == "__main__":
    main()
