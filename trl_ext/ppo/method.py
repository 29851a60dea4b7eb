"""The record of PPO."""

from ..common.method import TrainingMethod


METHOD = TrainingMethod(
    name="ppo",
    about="PPO: reinforcement learning with a critic.",
    trainers={"PPOTrainer": "PPOConfig"},
    exports={"PPOConfig": "config", "PPOTrainer": "trainer"},
)
