"""Stage 7: reinforcement learning against the mean of a group (GRPO), or CISPO (--loss_type cispo --epsilon_high 5.0).

    python recipes/minimind/grpo.py [--model_name FOLDER --dataset FILE.jsonl --reward_model HUB_ID] [--field value ...]

Held-out metric: questions answered right; with a reward model, its mean reward.
"""

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from trl import GRPOConfig, GRPOTrainer

from trl_ext.common.grpo_checkpointing import GRPOCheckpointMixin
from trl_ext.minimind import rl
from trl_ext.minimind.stage import load_model, resumable, run


def main() -> None:
    stage, args = rl.parse_rl(__file__, GRPOConfig)
    train, held_out = stage.load("rl", "rl")
    model, tokenizer = load_model(stage.model_name)
    reward, budget = stage.reward(), rl.TokenBudget(stage.max_generated_tokens)

    def make_trainer():
        trainer = resumable(GRPOTrainer, GRPOCheckpointMixin)(
            model,
            reward,
            args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[budget],
        )
        return rl.diagnosed(trainer)

    measures = rl.measures(stage, args, held_out, tokenizer)
    run(__file__, stage, args, make_trainer, measures, generated_tokens=lambda: budget.generated)


if __name__ == "__main__":
    main()
