"""The fields that HRPO adds to GRPO's configuration."""

from dataclasses import dataclass, field, fields

from unsloth_ext.hrpo.recompute import RECOMPUTE_MODES, trace_fields
from unsloth_ext.hrpo.residual import ThinkingConfig
from unsloth_ext.hrpo.states import SOFT_SOURCES

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
        "arXiv 2509.19170": ("noise_scale", "noise_likelihood"),
        "the code of arXiv 2511.06411": ("gumbel_temperature", "gumbel_top_k", "gumbel_top_p"),
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
            "help": "How a thinking state is made: 'projection' (of the previous hidden state), "
            "'soft_embedding' (the paper's probability-weighted embedding), or 'soft_gaussian' or 'soft_gumbel' (soft "
            "tokens, see docs/soft_tokens.md). A model with thinking modules keeps the one it was made with."
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
    soft_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of the distribution that a soft token mixes; default: 0.5 for 'soft_gaussian', 1 for "
            "'soft_gumbel'."
        },
    )
    noise_scale: float = field(
        default=0.33,
        metadata={
            "help": "Standard deviation of the noise of 'soft_gaussian', as a share of the root mean square of the "
            "embedding's entries."
        },
    )
    gumbel_temperature: float = field(default=0.1, metadata={"help": "Temperature of the mixture of 'soft_gumbel'."})
    gumbel_top_k: int = field(default=5, metadata={"help": "Number of tokens that 'soft_gumbel' keeps at most."})
    gumbel_top_p: float = field(
        default=0.95, metadata={"help": "Probability of the tokens that 'soft_gumbel' keeps at most, in total."}
    )
    noise_likelihood: str = field(
        default="sum",
        metadata={
            "help": "Log-likelihood of a soft token: 'sum' over its dimensions or kept tokens (both papers), or their "
            "'mean' (the code of arXiv 2511.06411)."
        },
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
        self.thinking_config()  # checks its fields
        one_of(self, recompute=RECOMPUTE_MODES)
        if self.soft_tokens:
            self._check_soft_tokens()
        if self.recompute == "soft_bptt" and self.thinking_source != "soft_embedding":
            raise ValueError(
                f"recompute='soft_bptt' needs thinking_source='soft_embedding', got {self.thinking_source!r}; the "
                "projection gets its gradient from 'rollout', 'two_pass' or 'jacobi'"
            )
        at_least(self, jacobi_iterations=1, lr_residual_gate=0, lr_residual_lambda=0, lr_thinking_projection=0)

    @property
    def soft_tokens(self) -> bool:
        """Whether soft tokens are the thinking."""
        return self.thinking and self.thinking_source in SOFT_SOURCES

    def thinking_config(self) -> ThinkingConfig:
        """The settings of the model's thinking modules."""
        return ThinkingConfig(**{f.name: getattr(self, f.name) for f in fields(ThinkingConfig)})

    def _check_soft_tokens(self) -> None:
        trace_fields(self.recompute, self.thinking_source)  # checks recompute
        source = f"thinking_source={self.thinking_source!r}"
        if getattr(self, "beta", 0.0):
            raise ValueError(
                f"beta={self.beta} with {source}: the KL term of GRPO compares probabilities of tokens, and a soft token "
                "has a density; set beta=0"
            )
        if getattr(self, "use_vllm", False):
            raise ValueError(f"use_vllm=True with {source}: vLLM cannot draw soft tokens; set use_vllm=False")
