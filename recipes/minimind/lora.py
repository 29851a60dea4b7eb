"""Stage 4: learn something new in low-rank adapters beside frozen weights (LoRA).

    python recipes/minimind/lora.py [--model_name FOLDER --dataset lora_identity.jsonl] [--field value ...]

Held-out metric: nats per token of the assistant's text.
"""

from dataclasses import dataclass, field

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from trl import SFTConfig, SFTTrainer

from trl_ext.cli.recipe import LoraArguments
from trl_ext.common.config_checks import at_least
from trl_ext.minimind import metrics
from trl_ext.minimind.stage import StageArguments, load_model, parse, resumable, run


@dataclass
class Arguments(StageArguments, LoraArguments):
    lora_r: int = field(default=16, metadata={"help": "Rank of LoRA."})

    def __post_init__(self) -> None:
        super().__post_init__()
        LoraArguments.__post_init__(self)
        at_least(self, lora_r=1)


def main() -> None:
    stage, args = parse(__file__, Arguments, SFTConfig)
    train, held_out = stage.load("lora", "sft")
    model, tokenizer = load_model(stage.model_name)

    def make_trainer():
        return resumable(SFTTrainer)(
            model,
            args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=stage.lora(),
        )

    run(__file__, stage, args, make_trainer, {"response loss": metrics.loss, **metrics.sums(stage, tokenizer)})


if __name__ == "__main__":
    main()
