"""Stage 8: reinforcement against what each prompt's earlier rewards let expect (SPO).

    python recipes/minimind/spo.py [--model_name FOLDER --dataset FILE.jsonl --reward_model HUB_ID] [--field value ...]

Held out: questions answered rightly; with a reward model, its mean reward.
"""

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from trl_ext import SPOConfig, SPOTrainer
from trl_ext.minimind import rl


def main() -> None:
    rl.run(__file__, SPOConfig, SPOTrainer)


if __name__ == "__main__":
    main()
