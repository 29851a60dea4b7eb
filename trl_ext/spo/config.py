"""Configuration of SPO."""

from dataclasses import dataclass, field

from ..common.config_checks import one_of
from ..common.single_sample import SingleSampleConfig
from .tracker import AutoAdaptiveValueTracker


TRACKERS = ("prompt", "global")


@dataclass
class SPOConfig(SingleSampleConfig):
    """Configuration of SPO (arXiv 2509.13232): `GRPOConfig` with the paper's values.

    These are one completion per prompt, token-level clipping at 0.2 and 0.28, and no KL. `shuffle_dataset=False` takes
    rows in order instead of by priority.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    flags_title = "SPO"
    default_sources = {
        "paper": (
            "num_generations",
            "epsilon_high",
            "value_tracker",
            "rho_mode",
            "D_half",
            "rho_min",
            "rho_max",
            "sampling_epsilon",
        )
    }

    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clipping range of the importance ratio."})
    value_tracker: str = field(
        default="prompt", metadata={"help": "One value per 'prompt', or one 'global' value for all."}
    )
    rho_mode: str = field(
        default="kl",
        metadata={"help": "How the decay rho is set: by the policy's movement ('kl'), or 'constant'."},
    )
    rho_const: float = field(
        default=0.9, metadata={"help": "rho for rho_mode='constant', or if the movement is unknown."}
    )
    D_half: float = field(
        default=0.06, metadata={"help": "Movement in nats per token at which rho is 1/2 before it is clipped."}
    )
    rho_min: float = field(
        default=0.875, metadata={"help": "Lower bound of rho; the start counts as 1 / (1 - rho_min) visits."}
    )
    rho_max: float = field(default=0.96, metadata={"help": "Upper bound of rho."})
    initial_value: float = field(default=0.5, metadata={"help": "Expected reward of a prompt before its first visit."})
    sampling_epsilon: float = field(
        default=0.05,
        metadata={"help": "Sampling weight added to sqrt(v (1 - v)), so that certain prompts are drawn too."},
    )
    allow_pickle_checkpoint: bool = field(
        default=False,
        metadata={"help": "Resume from a checkpoint that holds pickled optimizer state (TRL's or transformers' own)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations != 1:
            raise ValueError(f"num_generations={self.num_generations}: SPO uses one completion per prompt")
        one_of(self, value_tracker=TRACKERS)
        if self.sampling_epsilon <= 0:
            raise ValueError(
                f"sampling_epsilon={self.sampling_epsilon}: must be more than 0, or some prompts would never come again"
            )
        self.tracker(1)

    def tracker(self, prompts: int) -> AutoAdaptiveValueTracker:
        """The value tracker with these settings, for a dataset of `prompts` rows."""
        return AutoAdaptiveValueTracker(
            self.rho_mode,
            self.rho_const,
            self.D_half,
            prompts if self.value_tracker == "prompt" else 1,
            self.rho_min,
            self.rho_max,
            self.initial_value,
        )
