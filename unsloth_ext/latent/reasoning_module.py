"""`LatentReasoningModule`, latent tokens with in-place refinement for any causal LM (ours)."""

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..common.wrapping import backbone_of
from .config import LatentConfig, attach_latent
from .phase import LatentState, latent_phase, project_latent


class LatentReasoningModule(nn.Module):
    """M latent tokens that are refined T times: `latents = latents + latent_proj(hidden)`, slot by slot.

    This is `LatentConfig(num_latents=M, iterations=T, update="own", feedback_residual=True, projection="linear")`. The
    published methods (shifted outputs, no residual) are the defaults of `LatentConfig` and the trainers. The model gets
    its latent tokens in place, and can then be passed to a trainer or to `LatentModel`.

    Args:
        model: a causal LM without latent tokens.
        num_latent_tokens: M.
        num_iterations: T.
        tokenizer: gets `<bot>`, `<latent>` and `<eot>`. None loads the model's own.

    Attributes:
        M: as given.
        T: as given.

    Raises:
        ValueError: there is no tokenizer, or the model already has latent tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_latent_tokens: int = 24,
        num_iterations: int = 3,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        if tokenizer is None and not model.config._name_or_path:
            raise ValueError("tokenizer: pass it, since the model has no name to load one from")
        self.tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path) if tokenizer is None else tokenizer
        config = LatentConfig(
            num_latents=num_latent_tokens,
            iterations=num_iterations,
            update="own",
            feedback_residual=True,
            projection="linear",
        )
        self.model = attach_latent(model, self.tokenizer, config)
        self.M, self.T = num_latent_tokens, num_iterations

    @property
    def latent_proj(self) -> nn.Linear:
        """The linear layer from a hidden state to the change of a latent."""
        return backbone_of(self.model).latent_projection[0]

    def initial_latents(self, rows: int) -> torch.Tensor:
        """Return the embedding of `<latent>` for a number of rows: (rows, M, d) in the model's dtype."""
        backbone = backbone_of(self.model)
        embedding = backbone.get_input_embeddings()
        ids = torch.full((rows, self.M), backbone.latent_token_ids[1], device=embedding.weight.device)
        return embedding(ids)

    def jacobi_iteration(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor:
        """Refine the latents once, by a forward over question, `<bot>` and latents.

        `forward` does the same T times without reading the question again.

        Args:
            input_ids (B, Q): long, left-padded questions without `<bot>`.
            attention_mask (B, Q): long.
            latents (B, M, d): in the model's dtype.

        Returns:
            The refined latents (B, M, d) in the same dtype.
        """
        backbone = backbone_of(self.model)
        bot = input_ids.new_full((len(input_ids), 1), backbone.latent_token_ids[0])
        embeds = torch.cat([backbone.get_input_embeddings()(torch.cat([input_ids, bot], dim=1)), latents], dim=1)
        mask = torch.cat([attention_mask, attention_mask.new_ones(len(input_ids), 1 + self.M)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = backbone(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        return latents + project_latent(backbone, out.last_hidden_state[:, -self.M :])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> LatentState:
        """Run the whole latent phase.

        Args:
            input_ids (B, Q): long, left-padded questions without `<bot>`.
            attention_mask (B, Q): long. None means that every token is real.

        Returns:
            The state, whose `latents` (B, M, d) are the latents after T refinements.
        """
        return latent_phase(
            self.model, input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask
        )
