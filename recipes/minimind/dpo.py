"""Stage 5: prefer the better of two answers, without a reward model (DPO).

    python recipes/minimind/dpo.py [--model_name FOLDER --dataset dpo.jsonl] [--loss_type sigmoid_norm]

Held-out metric: share of pairs whose chosen answer is more probable.
"""

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from trl import DPOConfig, DPOTrainer

from trl_ext.minimind import metrics
from trl_ext.minimind.data import as_texts
from trl_ext.minimind.stage import StageArguments, load_model, parse, resumable, run


def main() -> None:
    stage, args = parse(__file__, StageArguments, DPOConfig)
    train, held_out = stage.load("dpo", "dpo")
    model, tokenizer = load_model(stage.model_name)

    def make_trainer():
        return resumable(DPOTrainer)(
            model,
            args=args,
            train_dataset=as_texts(train, tokenizer),
            eval_dataset=as_texts(held_out, tokenizer),
            processing_class=tokenizer,
        )

    measures = {"preference accuracy": metrics.ranking_accuracy(held_out, tokenizer)}
    run(__file__, stage, args, make_trainer, {**measures, **metrics.sums(stage, tokenizer)})


if __name__ == "__main__":
    main()
