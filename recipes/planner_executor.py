"""A planner writes a short plan of typed concepts, and an executor writes the text from the plan alone, with one
backbone.

    make train-planner                                  # the embedded default; with a GPU, Qwen3-0.6B on GSM8K
    python recipes/planner_executor.py --config recipes/configs/planner_tiny.yaml --model_name runs/planner_tiny/final \
        --training hard_em --output_dir runs/planner_em                    # start from a model with a planner
    python recipes/planner_executor.py --types '[{"name": "what", "num_concepts": 64, "quota": 4}]' --multi_token true
    python recipes/planner_executor.py --resume_from_checkpoint latest

Every field of TRL's SFTConfig and of PlannerExecutorConfig is a flag; `--config FILE.yaml` sets many. Writes the model
(`final/`), `summary.json`, `curves.png` and `monitors.png` to the output directory. It also prints held-out texts with
the texts that were written from their plans and from random plans.
"""

import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from accelerate.utils import is_peft_model
from rich.table import Table
from transformers import set_seed

from trl_ext import PlannerExecutorConfig, PlannerExecutorTrainer
from trl_ext.cli.console import PlainConsole
from trl_ext.cli.flags import chosen
from trl_ext.cli.parser import RecipeParser
from trl_ext.cli.recipe import RecipeArguments, check_tiny, finish, leave, start
from trl_ext.cli.report import compact_progress, plot_curves
from trl_ext.common.config_checks import at_least
from trl_ext.planner.evaluation import PlanEvaluation, evaluate_plans
from trl_ext.planner.method import METHOD, MONITOR_CURVES
from trl_ext.planner.monitor_callback import PlannerMonitorCallback
from trl_ext.tasks import facts
from trl_ext.tasks.completions import completions, plain
from trl_ext.tasks.data import DataArguments
from trl_ext.tasks.evaluation import AccuracyCallback
from unsloth_ext import PlannerExecutorModel
from unsloth_ext.common.hub import load_causal_lm, load_tokenizer, new_causal_lm, saved_settings


CONFIGS = Path(__file__).parent / "configs"
EMBEDDED = ("tiny",)
TINY = facts.Size(layers=2, width=64)


@dataclass
class ScriptArguments(RecipeArguments):
    """The recipe's own flags, besides the trainer's configuration."""

    facts: int = field(default=1, metadata={"help": "Number of facts in a tiny text, 10.6 bits each."})
    max_new_tokens: int = field(default=256, metadata={"help": "Maximum number of tokens of a text in evaluation."})
    answer_delimiter: str = field(default="####", metadata={"help": "Text before the answer in a completion."})
    monitor_every: int = field(
        default=50, metadata={"help": "Number of steps between monitors that need extra forward passes."}
    )
    auto: bool = field(
        default=False, metadata={"help": "Let the monitors change settings instead of only giving advice."}
    )
    show: int = field(default=12, metadata={"help": "Number of held-out texts to print."})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, facts=1, max_new_tokens=1, monitor_every=1, show=0)


def load(script: ScriptArguments, data: DataArguments, args: PlannerExecutorConfig):
    """The model, its tokenizer, training and held-out rows, and the text before an answer."""
    plans = script.model_name != "tiny" and saved_settings(script.model_name, "planner") is not None
    if not plans:
        check_tiny(script.model_name, data.dataset)
    if plans:
        before = PlannerExecutorModel.from_pretrained(script.model_name, trust_remote_code=args.trust_remote_code)
        model, tokenizer = before.model, before.tokenizer
    elif script.model_name == "tiny":
        tokenizer = facts.tokenizer()
        set_seed(args.seed)
        model = new_causal_lm(facts.config(tokenizer, TINY))
    else:
        tokenizer = load_tokenizer(script.model_name, trust_remote_code=args.trust_remote_code)
        model = load_causal_lm(script.model_name, trust_remote_code=args.trust_remote_code)
    if data.dataset == "tiny":
        if tokenizer.get_vocab() != facts.tokenizer().get_vocab():
            raise ValueError(
                f"--model_name {script.model_name} --dataset tiny: the model has another tokenizer than the tiny task"
            )
        return model, tokenizer, *facts.sentences(script.eval_size, script.warm_start_seed, script.facts), None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    examples, *both = data.split(
        train_size=script.train_size, eval_dataset=script.eval_dataset, eval_size=script.eval_size, seed=args.seed
    )
    rows = (plain(completions(some, tokenizer, script.answer_delimiter, examples), tokenizer) for some in both)
    return model, tokenizer, *rows, script.answer_delimiter


def show(before: PlanEvaluation, after: PlanEvaluation, console: PlainConsole) -> None:
    """Print metrics before and after training, then the samples."""
    table = Table(title=f"Held-out texts: {after.n}", title_justify="left")
    for head in ("", "before", "after"):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    per_type = lambda values: ", ".join(f"{name} {value:.1f}" for name, value in values.items())  # noqa: E731
    for label, value in (
        ("written correctly", lambda e: f"{e.accuracy:.1%} ({e.low:.1%} to {e.high:.1%})"),
        ("  from a random plan", lambda e: f"{e.random_accuracy:.1%}"),
        ("tokens predicted as most likely", lambda e: f"{e.token_accuracy:.1%}"),
        ("NLL, nats per token", lambda e: f"{e.nll:.3f}"),
        ("  without a plan", lambda e: f"{e.nll_null:.3f}"),
        ("  another text's plan", lambda e: f"{e.nll_shuffled:.3f}"),
        ("  a random plan", lambda e: f"{e.nll_random:.3f}"),
        ("concepts per plan", lambda e: per_type(e.lengths)),
        ("perplexity of concept usage", lambda e: per_type(e.perplexity)),
        ("different plans", lambda e: f"{e.distinct:.0%}"),
        ("bits of a plan, bits explained", lambda e: f"{e.bits:.1f}, {e.explained_bits:.1f}"),
        ("tokens per concept", lambda e: f"{e.ratio:.2f}"),
        ("ms to plan, to write", lambda e: f"{e.plan_ms:.1f}, {e.write_ms:.1f}"),
    ):
        table.add_row(label, value(before), value(after))
    console.print(table)
    samples = Table(title="Held-out texts", title_justify="left", show_lines=True)
    for head in ("text", "plan", "written from it", "written from a random one"):
        samples.add_column(head)
    for text, plan, written, unplanned in after.samples:
        shown = " | ".join(" ".join(map(str, codes)) for codes in plan)
        samples.add_row(text.strip(), shown, written.strip(), unplanned.strip())
    if after.samples:
        console.print(samples)


def main() -> None:
    parser = RecipeParser((ScriptArguments, DataArguments, PlannerExecutorConfig), EMBEDDED)
    _, config, others = chosen(sys.argv[1:], CONFIGS, "planner", EMBEDDED)
    script, data, args = parser.parse_args_and_config(["--config", str(config), *others])
    if not args.use_planner:
        raise ValueError(
            "use_planner=False: this recipe measures plans, which plain SFT does not have; in Python, "
            "PlannerExecutorTrainer accepts it"
        )
    started = time.time()
    console, output, resume = start(args, script)
    model, tokenizer, train, held_out, delimiter = load(script, data, args)
    how = {
        "mode": args.mode,
        "delimiter": delimiter,
        "max_new_tokens": script.max_new_tokens,
        "batch_size": script.eval_batch,
        "show": script.show,
        "progress": not args.disable_tqdm and args.process_index == 0,
    }
    accuracy = AccuracyCallback(script.eval_every, lambda model: evaluate_plans(model, tokenizer, held_out, **how))
    monitor = PlannerMonitorCallback(auto=script.auto, every=script.monitor_every)
    trainer = PlannerExecutorTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=None if is_peft_model(model) else script.lora(),
        callbacks=[accuracy, monitor],
    )
    compact_progress(trainer)
    trainer.train(resume_from_checkpoint=resume)
    after = evaluate_plans(trainer.model, tokenizer, held_out, **how)
    trainer.save_model(str(output / "final"))
    if not trainer.is_world_process_zero():
        return
    show(accuracy.before, after, console)
    title = ("Planner and executor", script.model_name, data.dataset)
    types = [kind.name for kind in args.planner().types]
    looked = (*MONITOR_CURVES, *((f"monitor/entropy_{name}", f"entropy of a concept of type {name}") for name in types))
    plot_curves(output / "monitors.png", trainer.state.log_history, [], ", ".join(dict.fromkeys(title)), looked)
    console.print(f"Written: {output / 'monitors.png'}")
    finish(
        trainer,
        console,
        started,
        title,
        accuracy,
        after,
        METHOD.curves,
        applied=monitor.applied,
        samples=after.samples,
        script=asdict(script),
        data=asdict(data),
    )


if __name__ == "__main__":
    main()
    leave()
