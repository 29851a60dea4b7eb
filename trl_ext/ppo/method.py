"""The record of PPO."""

from ..common.method import Command, TrainingMethod


METHOD = TrainingMethod(
    name="ppo",
    about="PPO: reinforcement learning with a critic.",
    trainers={"PPOTrainer": "PPOConfig"},
    exports={"PPOConfig": "config", "PPOTrainer": "trainer"},
    commands=(
        Command(
            "train-ppo",
            "PPO: with a critic; the embedded default of MiniMind's stages",
            "recipes/minimind/ppo.py",
            trainer="PPOTrainer",
            parent="GRPOTrainer",
            paper="1707.06347",
            what="reinforcement learning with a critic",
            evidence="73%, GRPO 63%",
            data=("trl_ext.minimind.data:row_reader", "rl"),
        ),
    ),
)
