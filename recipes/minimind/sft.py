"""Stage 3: train on dialogues, of which only the assistant's text counts (SFT).

    python recipes/minimind/sft.py [--model_name FOLDER --dataset sft_mini_512.jsonl] [--field value ...]

Held-out metrics: nats per token of the assistant's text; on the embedded task also right sums.
"""

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from trl import SFTConfig, SFTTrainer

from trl_ext.minimind import metrics
from trl_ext.minimind.stage import StageArguments, load_model, parse, resumable, run


def main() -> None:
    stage, args = parse(__file__, StageArguments, SFTConfig)
    train, held_out = stage.load("sft", "sft")
    model, tokenizer = load_model(stage.model_name)

    def make_trainer():
        return resumable(SFTTrainer)(
            model, args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
        )

    run(__file__, stage, args, make_trainer, {"response loss": metrics.loss, **metrics.sums(stage, tokenizer)})


if __name__ == "__main__":
    main()
