"""The thinking residual, which mixes a thinking state into an input embedding (HRPO, arXiv 2505.18454, eq. 3-5).

    r = sigmoid(W_r e + b_r)            i = sigmoid(W_i e + b_i)
    a = exp(-c softplus(-Lambda) r)     c = 8, a in (0, 1], elementwise
    fused = a e + sqrt(1 - a^2 + eps) (i s)

`e` (B, T, d) is the token's input embedding, `s` (B, T, d) its thinking state. All four modules are registered
submodules of the decoder (`model.base_model`). So optimizers, PEFT and safetensors see them as
`thinking_residual_gate_r`, `thinking_residual_gate_i`, `thinking_residual_Lambda` and `thinking_projection`.
"""

import math
import types
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..common.attaching import check_attachable, remember, settings_of
from ..common.master_weights import MasterLinear, MasterWeights, beside
from ..common.wrapping import backbone_of, causal_lm_of
from .adapter import THINKING_MODULES, join_adapter
from .forward import teach_forward
from .method import METHOD
from .soft_tokens import LIKELIHOODS
from .states import NORMS, SOFT_SOURCES, SOURCES, project


GATE_SCALE = 8.0  # c
EPS = 1e-8
PROJECTION_INIT_STD = 0.001


@dataclass
class ThinkingConfig:
    """How a model thinks. Saved in `latent_reasoning.json`, and in a full model's `config.json` under `"thinking"`.

    Attributes:
        thinking_source: `"projection"`, `s = W h / |W h|` of the previous hidden state h; or `"soft_embedding"`, the
            probability-weighted input embedding of the paper; or `"soft_gaussian"` or `"soft_gumbel"`, the soft tokens of
            `unsloth_ext.hrpo.soft_tokens`, which take the place of the token and use none of the modules.
        thinking_norm: the norm of projected states: `"unit"`, `"embedding_rms"` (the mean norm of an input embedding)
            or `"none"`.
        residual_r_min, residual_r_max: at r = 1 the initial `a` is uniform between these two.
        soft_temperature: of the distribution that a soft token mixes. None means 0.5 for `"soft_gaussian"` (arXiv
            2509.19170, sec. 4; 0.0001 gives its "fuzzy" tokens) and else 1 (the code of arXiv 2511.06411).
        noise_scale: of `"soft_gaussian"`: sigma over the root mean square of the embedding's entries (arXiv 2509.19170).
        gumbel_temperature, gumbel_top_k, gumbel_top_p: of `"soft_gumbel"` (the code of arXiv 2511.06411).
        noise_likelihood: the log-likelihood of a soft token is the `"sum"` over its dimensions or kept tokens (both
            papers' equations), or their `"mean"` (the code of arXiv 2511.06411).

    Raises:
        ValueError: a value is unknown or out of range.
    """

    thinking_source: str = field(default="projection")
    thinking_norm: str = field(default="unit")
    residual_r_min: float = field(default=0.99)
    residual_r_max: float = field(default=0.999)
    soft_temperature: float | None = field(default=None)
    noise_scale: float = field(default=0.33)
    gumbel_temperature: float = field(default=0.1)
    gumbel_top_k: int = field(default=5)
    gumbel_top_p: float = field(default=0.95)
    noise_likelihood: str = field(default="sum")

    def __post_init__(self) -> None:
        if self.soft_temperature is None:
            self.soft_temperature = 0.5 if self.thinking_source == "soft_gaussian" else 1.0
        for name in ("soft_temperature", "noise_scale", "gumbel_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be more than 0")
        if self.gumbel_top_k < 2:
            raise ValueError(f"gumbel_top_k={self.gumbel_top_k}: must be at least 2, or there is nothing to mix")
        if not 0 < self.gumbel_top_p <= 1:
            raise ValueError(f"gumbel_top_p={self.gumbel_top_p}: must be more than 0 and at most 1")
        if self.noise_likelihood not in LIKELIHOODS:
            raise ValueError(f"noise_likelihood={self.noise_likelihood!r}: choose one of {', '.join(LIKELIHOODS)}")
        if self.thinking_source not in SOURCES:
            raise ValueError(f"thinking_source={self.thinking_source!r}: choose one of {', '.join(SOURCES)}")
        if self.thinking_norm not in NORMS:
            raise ValueError(f"thinking_norm={self.thinking_norm!r}: choose one of {', '.join(NORMS)}")
        if not 0 < self.residual_r_min < self.residual_r_max < 1:
            raise ValueError(
                f"residual_r_min={self.residual_r_min}, residual_r_max={self.residual_r_max}: need "
                "0 < residual_r_min < residual_r_max < 1"
            )


class ThinkingResidualLambda(MasterWeights):
    """The learned decay rate `Lambda` (d,), float32.

    At initialisation `exp(-c softplus(-Lambda))` is uniform in [r_min, r_max], so `a = u^r` exactly.
    """

    def __init__(self, hidden_size: int, r_min: float, r_max: float, device: torch.device | None = None):
        super().__init__()
        u = torch.empty(hidden_size, dtype=torch.float64).uniform_(r_min, r_max)
        initial = -torch.log(u.pow(-1 / GATE_SCALE) - 1)
        self.Lambda = nn.Parameter(initial.float().to(device))

    def forward(self, r: torch.Tensor) -> torch.Tensor:
        """Return log a (..., d), in fp32 or wider, for the recurrence gate r (..., d)."""
        r = r.to(torch.promote_types(r.dtype, torch.float32))
        return -GATE_SCALE * F.softplus(-self.Lambda) * r


def gate(backbone: nn.Module, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (a, sqrt(1 - a^2 + eps), i), each (..., d) in fp32 or wider, for token embeddings (..., d)."""
    r = torch.sigmoid(backbone.thinking_residual_gate_r(embeds))
    i = torch.sigmoid(backbone.thinking_residual_gate_i(embeds))
    log_a = backbone.thinking_residual_Lambda(r)
    # expm1 keeps 1 - a^2 accurate for a near 1, where the difference would round to 0
    return log_a.exp(), (EPS - torch.expm1(2 * log_a)).sqrt(), i


def fuse_thinking(
    backbone: nn.Module,
    inputs_embeds: torch.Tensor,
    thinking_mask: torch.Tensor,
    thinking_states: torch.Tensor | None = None,
    hidden_states: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fuse thinking states into input embeddings where the mask is set (arXiv 2505.18454, eq. 3-5).

    Soft tokens replace the embeddings instead.

    Args:
        backbone: the decoder with the thinking modules.
        inputs_embeds (B, T, d): floating point, token embeddings.
        thinking_mask (B, S): bool, S <= T: which of the *last* S positions think.
        thinking_states (B, S, d): floating point, the state of each of these positions. It was made from the position
            before it.
        hidden_states (B, S, d): floating point. Thinking states are made from these instead, with gradients into
            `thinking_projection`. [:, t] is the hidden state that *produced* the token at t, that of position t-1.
            Soft tokens cannot be made from them.

    Returns:
        (B, T, d) in the dtype of `inputs_embeds`, a new tensor (in-place writes would break gradient checkpointing).

    Raises:
        ValueError: not exactly one of the two is given, or it does not fit the mask and `inputs_embeds`.
    """
    soft = backbone.thinking_config.thinking_source in SOFT_SOURCES
    if soft and hidden_states is not None:
        raise ValueError("hidden_states cannot be made soft tokens, which are drawn; pass thinking_states")
    if (thinking_states is None) == (hidden_states is None):
        raise ValueError("thinking_mask needs either thinking_states or the hidden_states that they are made from")
    if hidden_states is not None:
        thinking_states = project(backbone, hidden_states)
    span = thinking_mask.shape[1]
    if thinking_states.shape[:2] != thinking_mask.shape or span > inputs_embeds.shape[1]:
        raise ValueError(
            f"thinking_mask {tuple(thinking_mask.shape)} and states {tuple(thinking_states.shape)} do not cover the "
            f"end of inputs_embeds {tuple(inputs_embeds.shape)}"
        )
    before, embeds = (
        inputs_embeds[:, : inputs_embeds.shape[1] - span],
        inputs_embeds[:, inputs_embeds.shape[1] - span :],
    )
    if soft:  # they take the place of the token
        fused = thinking_states.to(embeds.dtype)
    else:
        a, b, i = gate(backbone, embeds)
        fused = (a * embeds + b * (i * thinking_states.to(embeds.dtype))).to(embeds.dtype)
    fused = torch.where(thinking_mask[..., None].bool(), fused, embeds)
    return fused if span == inputs_embeds.shape[1] else torch.cat([before, fused], dim=1)


def has_thinking(model: nn.Module) -> bool:
    """Return whether a model, wrapped by PEFT or not, has thinking modules."""
    return settings_of(model, METHOD) is not None


def attach_thinking(model: PreTrainedModel, config: ThinkingConfig | None = None) -> PreTrainedModel:
    """Add thinking modules to a causal LM, in place, and make its forward accept thinking states.

    Any causal LM whose decoder takes `inputs_embeds` works, which is tested by forwards of a short text
    (`unsloth_ext.hrpo.forward`). The modules are fp32 whatever the model's dtype. The global RNG is used.

    Args:
        model: the causal LM, wrapped by PEFT or not.
        config: how to think. None means the defaults.

    Returns:
        The same model.

    Raises:
        ValueError: the model already has thinking modules, has no input embeddings, or has a forward that would lose
            thinking states.
    """
    config = config or ThinkingConfig()
    backbone = check_attachable(model, METHOD)
    embedding = backbone.get_input_embeddings()
    if embedding is None:
        raise ValueError(f"{type(model).__name__} has no input embeddings to fuse thinking states into")
    teach_forward(causal_lm_of(model), backbone, config.thinking_source)
    for name, module in thinking_modules(embedding.weight.shape[1], config, **beside(embedding.weight)).items():
        backbone.add_module(name, module)
    backbone.fuse_thinking = types.MethodType(fuse_thinking, backbone)
    if isinstance(model, PeftModel):
        join_adapter(model)
    remember(model, METHOD, config)
    return model


def thinking_modules(
    hidden_size: int, config: ThinkingConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Make new thinking modules, by name. The global RNG is used.

    Args:
        hidden_size: d.
        config: how to think.
        device: of the modules.
        dtype: of the linear layers.
    """
    d, like = hidden_size, {"device": device, "dtype": dtype}
    gate_r, gate_i = MasterLinear(d, d, **like), MasterLinear(d, d, **like)
    decay = ThinkingResidualLambda(d, config.residual_r_min, config.residual_r_max, device)
    projection = MasterLinear(d, d, bias=False, **like)
    for linear in (gate_r, gate_i):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    nn.init.normal_(projection.weight, std=PROJECTION_INIT_STD)
    return dict(zip(THINKING_MODULES, (gate_r, gate_i, decay, projection), strict=True))


def drop_thinking(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the thinking modules, in place. A plain causal LM remains. Merge or unload PEFT first."""
    backbone = backbone_of(model)
    for name in (*THINKING_MODULES, "thinking_config", "fuse_thinking", "describe_saved", "complete_saved"):
        if hasattr(backbone, name):
            delattr(backbone, name)
    if hasattr(model.config, "thinking"):
        del model.config.thinking
    return model
