"""Generation after latent tokens, and `LatentModel` (CODI, arXiv 2502.21074; PCCoT, arXiv 2506.18582)."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common.compat import CACHE
from ..common.evaluation_mode import evaluating
from ..common.generation_arguments import check_context, grouped, left_padded, refuse_empty, settle, with_tokenizer
from ..common.method_model import MethodModel
from ..common.question_ids import question_ids
from ..common.wrapping import backbone_of
from .config import attach_saved, remember_latent
from .engine import LatentEngine, check_served
from .method import METHOD
from .phase import Intervention, LatentState, latent_phase


@contextlib.contextmanager
def thinking_again(model: PreTrainedModel | PeftModel, state: LatentState, copies: int) -> Iterator[None]:
    """Insert the latent inputs at their positions in every text that begins with question, <bot> and latent tokens.

    Decoding without a cache needs this.
    """
    end = state.attention_mask.shape[1]
    latents = state.latents.repeat_interleave(copies, dim=0)

    def hook(_: torch.nn.Module, __: tuple, embeds: torch.Tensor) -> torch.Tensor:
        return torch.cat([embeds[:, : end - latents.shape[1]], latents.to(embeds.dtype), embeds[:, end:]], dim=1)

    handle = backbone_of(model).get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def latent_generate(
    model: PreTrainedModel | PeftModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    intervene: Intervention | None = None,
    return_state: bool = False,
    engine: LatentEngine | None = None,
    **generate_kwargs: Any,
) -> Any:
    """Run the latent phase, then `model.generate` on its cache, or vLLM on its embeddings.

    Args:
        model: a causal LM with latent tokens, wrapped by PEFT or not.
        input_ids (B, Q): long, left-padded questions without <bot>.
        attention_mask (B, Q): long. None means that every token is real.
        intervene: an ablation, see `latent_phase`.
        return_state: also return the `LatentState`.
        engine: a vLLM engine that decodes the answers (docs/vllm.md). It takes the model's weights if they changed. None
            means transformers.
        **generate_kwargs: as for `generate`. docs/generation.md lists what works.

    Returns:
        What `generate` returns for the prompt `question <bot> <latent> x M <eot>`, or this and the `LatentState` with
        `return_state`. A question costs `state.num_forwards` passes, and one for each token after it.

    Raises:
        ValueError: an argument does not work with the latent phase or with vLLM, or a question leaves no room for the
            answer.
    """
    settings = settle(model, "latent", generate_kwargs)
    if engine is not None:
        check_served(settings, generate_kwargs)
    copies = settings.num_return_sequences or 1
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    backbone = backbone_of(model)
    bot, latent, eot = backbone.latent_token_ids
    check_context(model, attention_mask.sum(1).tolist(), settings, around=backbone.latent_config.num_latents + 2)
    with evaluating(model), torch.no_grad():
        state = latent_phase(model, input_ids, attention_mask, intervene)
        thought = torch.tensor([bot, *[latent] * backbone.latent_config.num_latents, eot], device=input_ids.device)
        ids = torch.cat([input_ids, thought.expand(len(input_ids), -1)], dim=1)
        mask = torch.cat([state.attention_mask, state.attention_mask.new_ones(len(ids), 1)], dim=1)
        if engine is not None:
            embed = backbone.get_input_embeddings()
            embeds = torch.cat([embed(ids[:, : -len(thought) + 1]), state.latents, embed(ids[:, -1:])], dim=1)
            answers = engine.decode(model, embeds, mask, settings)
            out = torch.cat([ids.repeat_interleave(copies, dim=0), answers], dim=1)
            return (out, state) if return_state else out
        if copies > 1:
            ids, mask = (x.repeat_interleave(copies, dim=0) for x in (ids, mask))
            # The copies are in the batch. `generate` warns of a setting beside a configuration
            generate_kwargs.pop("num_return_sequences", None)
            if generate_kwargs.get("generation_config") is None:
                generate_kwargs["num_return_sequences"] = 1
            else:
                generate_kwargs["generation_config"] = config = copy.deepcopy(generate_kwargs["generation_config"])
                config.num_return_sequences = 1
        inputs = {"input_ids": ids, "attention_mask": mask, **generate_kwargs}
        if settings.cache_implementation is not None:  # `generate` refuses a kind of cache together with a cache
            inputs["cache_implementation"] = None
        if settings.use_cache:
            state.cache.batch_repeat_interleave(copies)
            out = model.generate(**{CACHE: state.cache}, **inputs)
        else:
            with thinking_again(model, state, copies):
                out = model.generate(**inputs)
    return (out, state) if return_state else out


def question_batch(tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> dict[str, torch.Tensor]:
    """Tokenize questions and pad them on the left.

    Args:
        tokenizer: the tokenizer of the model.
        questions: the texts.

    Returns:
        `input_ids` and `attention_mask`, both (B, Q) long.

    Raises:
        ValueError: a question has no tokens.
    """
    rows = [question_ids(tokenizer, question) for question in questions]
    refuse_empty([len(row) for row in rows])
    return left_padded(tokenizer, rows)


class LatentModel(MethodModel):
    """A model with latent tokens and its tokenizer, for answering questions.

    Args:
        model: the causal LM, or a `PeftModel` around it.
        tokenizer: its tokenizer, with the latent tokens and padding on the left.

    Attributes:
        model: as given. An adapter is saved without the embedding matrix if nothing is lost by it.
        tokenizer: as given.

    Raises:
        ValueError: the model has no latent tokens.
    """

    method = METHOD
    attach_arguments = "model, tokenizer"

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model, tokenizer)
        self._engine: LatentEngine | None = None
        if isinstance(model, PeftModel):
            remember_latent(model)

    @classmethod
    def _attach(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, saved: Any, name: str) -> None:
        attach_saved(model, tokenizer, saved, name)

    def generate(
        self, questions: str | list[str] | torch.Tensor, engine: LatentEngine | str | None = None, **kwargs: Any
    ) -> Any:
        """Answer questions.

        Args:
            questions: a text, several texts, or ids (B, Q) long as for `latent_generate`.
            engine: what decodes the answers: None for transformers, `"vllm"` for a vLLM engine that is made at the first
                call and kept, or a `LatentEngine`.
            **kwargs: keywords of `latent_generate`.

        Returns:
            An answer for a text, a list of answers for several texts. With `num_return_sequences` > 1 each answer is a
            list. For ids, and with `return_dict_in_generate` or `return_state`, what `latent_generate` returns.

        Raises:
            ValueError: `engine` is unknown.
        """
        if isinstance(engine, str) and engine != "vllm":
            raise ValueError(f"engine={engine!r}: choose 'vllm', or None for transformers")
        if isinstance(questions, str):
            found = self.generate([questions], engine, **kwargs)
            return found[0] if isinstance(found, list) else found
        if not len(questions):
            return []
        if isinstance(questions, torch.Tensor):
            return latent_generate(self.model, questions, engine=self._engine_of(engine), **kwargs)
        batch = {k: v.to(self.model.device) for k, v in question_batch(self.tokenizer, list(questions)).items()}
        kwargs = with_tokenizer(self.tokenizer, kwargs)
        settings = settle(self.model, "latent", kwargs)
        out = latent_generate(self.model, **batch, engine=self._engine_of(engine), **kwargs)
        if settings.return_dict_in_generate or kwargs.get("return_state"):
            return out
        prompt = batch["input_ids"].shape[1] + 2 + backbone_of(self.model).latent_config.num_latents
        return grouped(self.tokenizer.batch_decode(out[:, prompt:], skip_special_tokens=True), len(questions))

    def _engine_of(self, engine: LatentEngine | str | None) -> LatentEngine | None:
        if engine != "vllm":
            return engine  # type: ignore[return-value]
        if self._engine is None:
            self._engine = LatentEngine(self.model)
        return self._engine
