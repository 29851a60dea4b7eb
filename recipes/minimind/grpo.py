"""Stage 7: reinforcement against the mean of a group (GRPO), or CISPO (--loss_type cispo --epsilon_high 5.0).

    python recipes/minimind/grpo.py [--model_name FOLDER --dataset FILE.jsonl --reward_model HUB_ID] [--field value ...]

Held out: questions answered rightly; with a reward model, its mean reward.
"""

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from trl import GRPOConfig, GRPOTrainer

from trl_ext.common.grpo_checkpointing import GRPOCheckpointMixin
from trl_ext.minimind import rl
from trl_ext.minimind.stage import resumable


def main() -> None:
    rl.run(__file__, GRPOConfig, resumable(GRPOTrainer, GRPOCheckpointMixin))


if __name__ == "__main__":
    main()
