"""Stage 10: learn a reasoning teacher's answers, in which the tags around the thoughts weigh more.

    python recipes/minimind/reason.py [--model_name FOLDER --dataset r1_mix_1024.jsonl] [--field value ...]

Held-out metrics: nats per token of the assistant's text; on the embedded task also right sums between the tags.
"""

from dataclasses import dataclass, field

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from trl_ext import ReasoningDistillConfig, ReasoningDistillTrainer
from trl_ext.minimind import metrics
from trl_ext.minimind.stage import StageArguments, load_model, parse, run


@dataclass
class Arguments(StageArguments):
    every_row_tagged: bool = field(
        default=True, metadata={"help": "Refuse answers without all four tags; set to false for mixed files."}
    )


def main() -> None:
    stage, args = parse(__file__, Arguments, ReasoningDistillConfig)
    train, held_out = stage.load("reason", "reason" if stage.every_row_tagged else "sft")
    model, tokenizer = load_model(stage.model_name)

    def make_trainer():
        return ReasoningDistillTrainer(
            model, args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
        )

    measures = {
        "loss of text": metrics.part("text"),
        "loss of tags": metrics.part("tags"),
        **metrics.sums(stage, tokenizer, "<answer>", 60),
    }
    run(__file__, stage, args, make_trainer, measures)


if __name__ == "__main__":
    main()
