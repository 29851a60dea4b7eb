"""Stage 9: a student learns from a teacher's next-token distributions, not from the text alone.

    python recipes/minimind/distill.py [--model_name STUDENT --teacher_model_name_or_path TEACHER --dataset FILE.jsonl]

Held-out metrics: nats per token of the assistant's text; on the embedded task also right sums. --alpha 1 is the control.
"""

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from trl_ext import LogitsDistillConfig, LogitsDistillTrainer
from trl_ext.minimind import metrics
from trl_ext.minimind.stage import StageArguments, load_model, parse, run


def main() -> None:
    stage, args = parse(__file__, StageArguments, LogitsDistillConfig)
    train, held_out = stage.load("sft", "sft")
    model, tokenizer = load_model(stage.model_name)

    def make_trainer():
        return LogitsDistillTrainer(model, args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer)

    loss = metrics.loss if args.alpha == 1 else metrics.part("ce")
    measures = {"response loss": loss, **metrics.sums(stage, tokenizer)}
    run(__file__, stage, args, make_trainer, measures)


if __name__ == "__main__":
    main()
