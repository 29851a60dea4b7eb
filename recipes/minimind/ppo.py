"""Stage 6: reinforcement with a critic (PPO).

    python recipes/minimind/ppo.py [--model_name FOLDER --dataset FILE.jsonl --reward_model HUB_ID] [--field value ...]

Held out: questions answered rightly; with a reward model, its mean reward.
"""

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from trl_ext import PPOConfig, PPOTrainer
from trl_ext.minimind import rl


def main() -> None:
    rl.run(__file__, PPOConfig, PPOTrainer)


if __name__ == "__main__":
    main()
