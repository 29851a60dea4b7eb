"""vLLM's classes of causal LMs with thinking modules as weights of the model: `HybridQwen2ForCausalLM` and others."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ...common.delimiter import DelimiterMatcher
from ..method import METHOD
from ..residual import ThinkingConfig, thinking_modules
from ..states import mix_rows, normalise


PREFIX = "Hybrid"
FAMILIES = ("GemmaForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ARCHITECTURES = tuple(PREFIX + family for family in FAMILIES)
DELIMITER = "####"  # as in HRPOConfig


class HybridModel(nn.Module):
    """Mixin for vLLM's class of a causal LM. Put it before that class.

    The modules stand in the decoder under the names that checkpoints have, in float32.

    Attributes:
        answer_delimiter: the text that ends the thinking.
        thinking_table (S, V + 1): int16, of the delimiter's automaton (`DelimiterMatcher`).
        thinking_done: the state in which the delimiter is complete.
        thinking_digest: the hash of the table (`DelimiterMatcher.digest`).
        thinking_width: d.
        pushed_weights: whether a trainer pushes its weights (`additional_config["pushed_weights"]`).
        seen_hidden: the hidden states (B, d) that the last logits were computed from.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        from vllm.tokenizers import get_tokenizer

        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model_config = vllm_config.model_config
        backbone: Any = self.model
        backbone.thinking_config = ThinkingConfig(**getattr(model_config.hf_config, METHOD.key))
        if backbone.thinking_config.thinking_source == "soft_embedding" or (
            backbone.thinking_config.thinking_norm == "embedding_rms"
        ):
            self.embedding_modules: dict[str, str] = {}  # no LoRA there: states are made of the rows of the base model
        self.thinking_width = model_config.get_hidden_size()
        device = next(self.parameters()).device
        made = thinking_modules(self.thinking_width, backbone.thinking_config, device=device, dtype=torch.float32)
        for name, module in made.items():
            backbone.add_module(name, module.requires_grad_(False))
        tokenizer = get_tokenizer(
            model_config.tokenizer,
            tokenizer_mode="hf",
            revision=model_config.tokenizer_revision,
            trust_remote_code=model_config.trust_remote_code,
        )
        self.answer_delimiter = vllm_config.additional_config.get("answer_delimiter", DELIMITER)
        matcher = DelimiterMatcher(tokenizer, self.answer_delimiter, model_config.get_vocab_size())
        self.thinking_done, self.thinking_digest = matcher.done, matcher.digest
        # A buffer of the model, so that vLLM keeps it when it sleeps
        self.register_buffer("thinking_table", matcher.table.to(device), persistent=False)
        self.seen_hidden: torch.Tensor | None = None
        self.pushed_weights = bool(vllm_config.additional_config.get("pushed_weights"))
        if self.pushed_weights:  # by a trainer, so vLLM must not pack them for the CPU and drop them
            for module in self.modules():
                module._cpu_skip_gemm_dispatch = True
        self._missing = {*self._thinking_parameters()}
        if vllm_config.load_config.load_format == "dummy":
            self._missing.clear()
        self._norm: torch.Tensor | None = None

    @staticmethod
    def get_model_state_cls() -> type:
        """Return the class of the state that vLLM's model runner V2 makes for this model."""
        from .runner_v2 import HybridModelState

        return HybridModelState

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """Run the decoder, always on embeddings: vLLM compiles it for the kind of input that comes first."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        return super().forward(None, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Compute logits, as the stock model, and remember what they were computed from."""
        self.seen_hidden = hidden_states
        return super().compute_logits(hidden_states, *args, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load weights by the names of transformers; those of the thinking modules stay in float32."""
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        own = self._thinking_parameters()
        loaded = set()

        def others() -> Iterable[tuple[str, torch.Tensor]]:
            for name, value in weights:
                if name in own:
                    # While vLLM reloads, its own loader waits for all weights of a module
                    getattr(own[name], "weight_loader", default_weight_loader)(own[name], value)
                    loaded.add(name)
                elif ".modules_to_save." not in name:  # PEFT's copies for other adapters, such as the KL reference
                    yield name, value

        loaded |= super().load_weights(others())
        self._missing -= loaded
        self._norm = None
        if not self.pushed_weights:
            self.check_loaded()
        # vLLM takes what is not named for an error. A trainer pushes the modules after the start
        return loaded | self._missing

    def _thinking_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the thinking modules. Trainers push weights one by one, so the whole model is not searched."""
        return {
            f"model.{module}.{name}": value
            for module in METHOD.modules
            for name, value in self.model.get_submodule(module).named_parameters()
        }

    def check_loaded(self) -> None:
        """Raise a ValueError if the thinking modules never got their weights."""
        if self._missing:
            raise ValueError(
                f"the thinking modules have no weights: the checkpoint lacks {', '.join(sorted(self._missing))}"
                + (", and no trainer pushed them" if self.pushed_weights else "")
            )

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Project hidden states (..., d) to thinking states of the same shape and dtype."""
        backbone: Any = self.model
        projected = backbone.thinking_projection(hidden_states)
        return normalise(projected, backbone.thinking_config.thinking_norm, self._embedding_norm).to(
            hidden_states.dtype
        )

    def mix(self, probs: torch.Tensor, candidates: int | None) -> torch.Tensor:
        """Make soft-embedding states (..., d) of distributions (..., V) over the tokens, without vLLM's padding."""
        embedding = self._embedding
        return mix_rows(embedding.weight[: embedding.org_vocab_size], probs, candidates) * self._embed_scale

    @property
    def _embedding(self) -> Any:
        embedding: Any = self.model.embed_tokens
        return getattr(embedding, "base_layer", embedding)  # inside vLLM's LoRA

    @property
    def _embed_scale(self) -> torch.Tensor | float:
        return getattr(self.model, "normalizer", 1.0)

    def _embedding_norm(self) -> torch.Tensor:
        from vllm.distributed import tensor_model_parallel_all_reduce

        if self._norm is None:  # since the last weights came
            # vLLM's padding is zero; each rank has some of the rows
            norm = torch.linalg.vector_norm(self._embedding.weight.detach(), dtype=torch.float32)
            square = tensor_model_parallel_all_reduce(norm.square())
            self._norm = (square / self._embedding.org_vocab_size).sqrt() * self._embed_scale
        return self._norm


def __getattr__(name: str) -> type:
    """Make the class of an architecture when vLLM asks for it."""
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm import ModelRegistry

    stock = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
    made = type(name, (HybridModel, stock), {"__module__": __name__, "__doc__": f"{stock.__name__} that thinks."})
    globals()[name] = made
    return made
