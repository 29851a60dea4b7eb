"""Configuration of PPO."""

from dataclasses import dataclass, field

from ..common.config_checks import at_least, check_positive, check_weights, one_of
from ..common.single_sample import SingleSampleConfig


@dataclass
class PPOConfig(SingleSampleConfig):
    """Configuration of PPO (arXiv 1707.06347): `GRPOConfig` with MiniMind's published values. Learning rates stay
    GRPO's.

    Some fields of GRPO have other names in PPO. `num_iterations` is the number of epochs over a rollout. `epsilon` is
    the clipping range of the policy's ratio. `beta` is the coefficient of the KL to the reference (k3, multiplied by
    the ratio so that its gradient is that of the KL, unless `use_bias_correction_kl=False`).

    Raises:
        ValueError: a field has a value that is not allowed, or two fields contradict each other.
    """

    flags_title = "PPO"
    default_sources = {
        "MiniMind": (
            "beta",
            "num_iterations",
            "gamma",
            "gae_lambda",
            "vf_coef",
            "cliprange_value",
            "target_kl",
        )
    }

    beta: float = field(default=0.02, metadata={"help": "Coefficient of the KL to the reference; 0: no reference."})
    num_iterations: int = field(default=2, metadata={"help": "Number of epochs over each rollout."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of the next token's value."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})
    vf_coef: float = field(
        default=0.5, metadata={"help": "Coefficient of the value loss; 0: the critic is not trained."}
    )
    cliprange_value: float = field(
        default=0.2, metadata={"help": "Clipping range of values around the rollout's values."}
    )
    target_kl: float | None = field(
        default=0.25,
        metadata={
            "help": "Skip a step and the rest of its rollout if the policy is already further than this from "
            "the policy of the rollout: mean of 0.5 * (change of log-prob)^2, nats per token. None: never."
        },
    )
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic. None: the policy's."}
    )
    allow_pickle_checkpoint: bool = field(
        default=False,
        metadata={"help": "Resume from a checkpoint that holds pickled optimizer state (TRL's or transformers' own)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, loss_type=("dapo",), importance_sampling_level=("token",))
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be from 0 to 1")
        check_weights(vf_coef=self.vf_coef)
        at_least(self, critic_learning_rate=0)
        check_positive(cliprange_value=self.cliprange_value, target_kl=self.target_kl)
        batches, step = self.steps_per_generation * self.num_iterations, self.gradient_accumulation_steps
        if self.target_kl is not None and batches % step and step % batches:
            raise ValueError(
                f"gradient_accumulation_steps={step}: some steps would mix two rollouts of {batches} batches each "
                "(steps_per_generation * num_iterations), but target_kl may stop only one; let one divide the other, or "
                "set target_kl=None"
            )
