"""The fields that HRPO adds to GRPO's configuration."""

from dataclasses import dataclass, field

from unsloth_ext.hrpo.recompute import RECOMPUTE_MODES
from unsloth_ext.hrpo.residual import ThinkingConfig

from ..common import mixin_bases
from ..common.config_checks import at_least, check_values, one_of


@dataclass
class HRPOArguments(mixin_bases.GRPOConfig):
    """Fields of `HRPOConfig` beyond those of TRL's `GRPOConfig`.

    Raises:
        ValueError: a field has a value that is not allowed, or two fields contradict each other.

    Example:

    >>> from trl_ext import HRPOConfig
    >>> args = HRPOConfig(output_dir="out", recompute="rollout", lr_thinking_projection=5e-5)
    """

    flags_title = "HRPO"
    default_sources = {
        "paper": (
            "answer_delimiter",
            "residual_r_min",
            "residual_r_max",
            "lr_residual_gate",
            "lr_residual_lambda",
        ),
        "design note": ("thinking_source", "thinking_norm", "lr_thinking_projection"),
    }

    thinking: bool = field(
        default=True, metadata={"help": "Use thinking states. If false, the trainer is TRL's GRPOTrainer, bit for bit."}
    )
    answer_delimiter: str = field(
        default="####", metadata={"help": "Text that ends the thinking; later tokens use plain embeddings."}
    )
    thinking_source: str = field(
        default="projection",
        metadata={
            "help": "How a thinking state is made: 'projection' (of the previous hidden state) or "
            "'soft_embedding' (the paper's probability-weighted embedding). A model with thinking modules keeps "
            "the one it was made with."
        },
    )
    thinking_norm: str = field(
        default="unit", metadata={"help": "Normalisation of a projected state: 'unit', 'embedding_rms' or 'none'."}
    )
    residual_r_min: float = field(default=0.99, metadata={"help": "Smallest initial weight of the token embedding."})
    residual_r_max: float = field(default=0.999, metadata={"help": "Largest initial weight of the token embedding."})
    recompute: str = field(
        default="rollout",
        metadata={
            "help": "How the training forward gets the thinking states:  'frozen', 'rollout', 'two_pass', 'soft_bptt' "
            "(soft_embedding only) or 'jacobi'. See docs/hrpo.md."
        },
    )
    jacobi_iterations: int = field(
        default=1, metadata={"help": "No-gradient refinement passes of recompute='jacobi' (K)."}
    )
    lr_residual_gate: float = field(default=1e-4, metadata={"help": "Learning rate of the two residual gates."})
    lr_residual_lambda: float = field(default=1e-3, metadata={"help": "Learning rate of Lambda."})
    lr_thinking_projection: float = field(
        default=1e-4, metadata={"help": "Learning rate of the thinking projection; 0 freezes it."}
    )
    clip_grad_per_group: bool = field(
        default=True,
        metadata={
            "help": "Clip each parameter group to max_grad_norm separately. At the start, the projection's gradient is "
            "about a thousand times larger than the others and would use up a global bound."
        },
    )
    allow_pickle_checkpoint: bool = field(
        default=False,
        metadata={"help": "Resume from a checkpoint that holds pickled optimizer state (TRL's or transformers' own)."},
    )

    def __post_init__(self) -> None:
        check_values(self)
        if hasattr(super(), "__post_init__"):
            super().__post_init__()
        if not self.answer_delimiter:
            raise ValueError("answer_delimiter='': give the text that ends the thinking, such as '####'")
        self.thinking_config()  # checks thinking_source, thinking_norm, residual_r_min, residual_r_max
        one_of(self, recompute=RECOMPUTE_MODES)
        if self.recompute == "soft_bptt" and self.thinking_source != "soft_embedding":
            raise ValueError(
                f"recompute='soft_bptt' needs thinking_source='soft_embedding', got {self.thinking_source!r}; the "
                "projection gets its gradient from 'rollout', 'two_pass' or 'jacobi'"
            )
        at_least(self, jacobi_iterations=1, lr_residual_gate=0, lr_residual_lambda=0, lr_thinking_projection=0)

    def thinking_config(self) -> ThinkingConfig:
        """The settings of the model's thinking modules."""
        return ThinkingConfig(self.thinking_source, self.thinking_norm, self.residual_r_min, self.residual_r_max)
