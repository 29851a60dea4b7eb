"""The link to vLLM's model runner V2, which lets a model bring its own state, embeddings and sampler."""

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from .slots import Batch, ThinkingSlots


class HybridModelState(DefaultModelState):
    """The state of a hybrid model. vLLM makes one for each worker."""

    supports_prompt_embeds = False

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.slots = ThinkingSlots(model, self.max_num_reqs, device, self.dtype)
        # CUDA graphs read this tensor
        self._embeds = torch.zeros(self.max_num_tokens, self.inputs_embeds_size, dtype=self.dtype, device=device)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        self.slots.add(
            new_req_data.req_id,
            req_index,
            new_req_data.prompt_len,
            len(new_req_data.prefill_token_ids),
            params.extra_args,
        )

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.slots.remove(req_id)

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()
        self.slots.apply()

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        embeds = self._embeds[: input_batch.num_tokens_after_padding]
        count = input_batch.num_tokens
        embeds[:count] = self.model.embed_input_ids(input_batch.input_ids[:count])
        if self._is_real(input_batch):
            self.slots.fuse(embeds, self._batch(input_batch))
        return {**super().prepare_inputs(input_batch, req_states), "input_ids": None, "inputs_embeds": embeds}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "input_ids": None, "inputs_embeds": self._embeds[:num_tokens]}

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        return SeeingSampler(sampler, self), None

    def see_tokens(self, input_batch: Any, output: Any, scores: torch.Tensor | None, candidates: int | None) -> None:
        """Make the states of the tokens that were sampled; see `ThinkingSlots.see_tokens`."""
        if self._is_real(input_batch):
            tokens, valid = output.sampled_token_ids[:, 0].long(), output.num_sampled > 0
            self.slots.see_tokens(self._batch(input_batch), self.model.seen_hidden, tokens, valid, scores, candidates)

    def _is_real(self, input_batch: Any) -> bool:
        """Whether this is no dummy batch, as in profiling."""
        return input_batch.req_ids[0] in self.slots.requests

    @staticmethod
    def _batch(input_batch: Any) -> Batch:
        count = input_batch.num_reqs
        return Batch(
            slots=input_batch.idx_mapping.long(),
            rows=input_batch.query_start_loc[1 : count + 1].long() - 1,
            host_slots=input_batch.idx_mapping_np.astype(np.int64),
            computed=input_batch.num_computed_tokens_np,
            scheduled=input_batch.num_scheduled_tokens,
            starts=input_batch.query_start_loc_np[:count],
        )


class SeeingSampler:
    """vLLM's sampler, which also shows its tokens to the state. Everything else is the sampler's."""

    def __init__(self, sampler: Any, state: HybridModelState):
        self._sampler, self._state = sampler, state
        self._scores: torch.Tensor | None = None
        if state.slots.soft:
            self._sample = sampler.sample
            sampler.sample = self._sample_and_keep
            sampler.use_flashinfer = sampler.use_xpu_sampler = False  # they do not return the truncated scores

    def _sample_and_keep(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, self._scores = self._sample(*args, **kwargs)
        assert self._scores is not None
        return tokens, self._scores

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
        output = self._sampler(logits, input_batch)
        candidates = None
        if self._scores is not None:
            # Twice, since tokens whose score equals the last one's are also in
            candidates = 2 * int(self._sampler.sampling_states.top_k.np[input_batch.idx_mapping_np].max())
        self._state.see_tokens(input_batch, output, self._scores, candidates)
        self._scores = None
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)
