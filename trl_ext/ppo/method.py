"""The record of PPO."""

from ..common.method import TrainingMethod


METHOD = TrainingMethod(
    name="ppo",
    about="PPO: policy optimization with a critic, on TRL's rollouts and losses.",
    trainers={"PPOTrainer": "PPOConfig"},
    exports={"PPOConfig": "config", "PPOTrainer": "trainer"},
)
