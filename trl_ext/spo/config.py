"""What SPO adds to GRPO's configuration."""

from dataclasses import dataclass, field

from ..common.config_checks import one_of
from ..common.single_sample import SingleSampleConfig
from .tracker import AutoAdaptiveValueTracker


TRACKERS = ("prompt", "global")


@dataclass
class SPOConfig(SingleSampleConfig):
    """`GRPOConfig` with the paper's values: one completion a prompt, token-level clipping at 0.2 and 0.28, no KL.

    `shuffle_dataset=False` takes rows in order instead of by priority.
    """

    flags_title = "SPO"

    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clipping of the importance ratio."})
    value_tracker: str = field(
        default="prompt", metadata={"help": "One value for each 'prompt', or a 'global' one of all rewards."}
    )
    rho_mode: str = field(
        default="kl",
        metadata={"help": "What a visit keeps of the past: by the policy's movement ('kl'), or 'constant'."},
    )
    rho_const: float = field(default=0.9, metadata={"help": "What is kept where the movement is unknown, or constant."})
    D_half: float = field(default=0.06, metadata={"help": "Nats a token at which half of the past is forgotten."})
    rho_min: float = field(
        default=0.875, metadata={"help": "Least that is kept; 1 / (1 - rho_min) visits at the start."}
    )
    rho_max: float = field(default=0.96, metadata={"help": "Most that is kept."})
    initial_value: float = field(default=0.5, metadata={"help": "Expected reward of a prompt before its first visit."})
    sampling_epsilon: float = field(
        default=0.05, metadata={"help": "Weight of a prompt whose outcome is certain, beside sqrt(v (1 - v))."}
    )
    allow_pickle_checkpoint: bool = field(
        default=False,
        metadata={"help": "Resume from a checkpoint that holds pickled optimizer state (TRL's or transformers' own)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations != 1:
            raise ValueError(f"num_generations={self.num_generations}: SPO takes one completion a prompt")
        one_of(self, value_tracker=TRACKERS)
        if self.sampling_epsilon <= 0:
            raise ValueError(
                f"sampling_epsilon={self.sampling_epsilon}: must be more than 0, or some prompts never come again"
            )
        self.tracker(1)

    def tracker(self, prompts: int) -> AutoAdaptiveValueTracker:
        """The tracker of these fields for a dataset of so many rows; checks them."""
        return AutoAdaptiveValueTracker(
            self.rho_mode,
            self.rho_const,
            self.D_half,
            prompts if self.value_tracker == "prompt" else 1,
            self.rho_min,
            self.rho_max,
            self.initial_value,
        )
