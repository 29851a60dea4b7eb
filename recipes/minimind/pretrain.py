"""Stage 2: pretrain a language model with random weights on plain text.

    python recipes/minimind/pretrain.py [--preset minimind2-small --dataset pretrain_hq.jsonl] [--field value ...]

Held-out metric: perplexity.
"""

from dataclasses import dataclass, field

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from trl_ext.minimind import metrics
from trl_ext.minimind.stage import DataStageArguments, parse, resumable, run
from unsloth_ext import minimind_config
from unsloth_ext.common.hub import load_tokenizer, new_causal_lm


@dataclass
class Arguments(DataStageArguments):
    preset: str = field(default="tiny", metadata={"help": "Size and architecture; see docs/minimind.md."})
    tokenizer: str = field(
        default="runs/minimind/tokenizer/final", metadata={"help": "Folder or hub id of the tokenizer."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model_name = self.tokenizer  # the model that the stage starts from


def main() -> None:
    stage, args = parse(__file__, Arguments, SFTConfig)
    config, tokenizer = minimind_config(stage.preset), load_tokenizer(stage.tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"--tokenizer {stage.tokenizer} has {len(tokenizer)} tokens, but --preset {stage.preset} has embeddings for "
            f"{config.vocab_size}; recipes/minimind/tokenizer.py --vocab_size {config.vocab_size} makes one that fits"
        )
    train, held_out = stage.load("pretrain", "pretrain")

    def make_trainer():
        set_seed(args.seed)
        return resumable(SFTTrainer)(
            new_causal_lm(config),
            args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )

    run(__file__, stage, args, make_trainer, {"perplexity": metrics.perplexity})


if __name__ == "__main__":
    main()
