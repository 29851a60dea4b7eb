"""The link to vLLM's model runner V1, as it runs on CPUs."""

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from .slots import Batch, ThinkingSlots


class HybridCPUModelRunner(CPUModelRunner):
    """vLLM's runner for CPUs with thinking states. `workers` turns the stock runner into this class."""

    slots: ThinkingSlots
    _free: list[int]
    _batch: Batch
    _scores: torch.Tensor | None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        count = self.scheduler_config.max_num_seqs
        self.slots = ThinkingSlots(self.get_model(), count, self.device, self.model_config.dtype)
        self._free = list(range(count))
        self._names: list[str] = []  # of the last step, in the order of its rows
        self._embeds = torch.zeros(self.max_num_tokens, self.model_config.get_hidden_size(), dtype=self.dtype)
        self._scores = None
        if self.slots.soft:
            self._keep_scores()

    def _keep_scores(self) -> None:
        """Keep the warped scores of the tokens. Greedy tokens have the scores at temperature 1."""
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        sample, truncate = self.sampler.sample, self.sampler.topk_topp_sampler.forward

        def seeing_sample(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._scores = logits.clone()
            return sample(logits, *args, **kwargs)

        def seeing_truncate(logits: torch.Tensor, generators: Any, k: Any, p: Any) -> Any:
            self._scores = apply_top_k_top_p(logits.clone(), k, p)
            return truncate(logits, generators, k, p)

        self.sampler.sample, self.sampler.topk_topp_sampler.forward = seeing_sample, seeing_truncate

    def _update_states(self, scheduler_output: Any) -> Any:
        resumed = scheduler_output.scheduled_cached_reqs
        self._free += self.slots.finish(scheduler_output.finished_req_ids)
        if scheduler_output.scheduled_new_reqs or resumed.resumed_req_ids:
            self._names = []  # a request can come back to another slot
        for name in {*(scheduler_output.preempted_req_ids or ()), *resumed.resumed_req_ids}:
            self._free += self.slots.remove(name)
        for new in scheduler_output.scheduled_new_reqs:
            prompt = len(new.prompt_token_ids)
            self.slots.add(new.req_id, self._free.pop(), prompt, prompt, new.sampling_params.extra_args)
        for name, decoded in zip(resumed.req_ids, resumed.num_output_tokens, strict=True):
            if name in resumed.resumed_req_ids:
                prompt = self.slots.requests[name].prompt
                self.slots.add(name, self._free.pop(), prompt, prompt + decoded, None)
        self.slots.apply()
        return super()._update_states(scheduler_output)

    def _preprocess(self, scheduler_output: Any, num_input_tokens: int, intermediate_tensors: Any = None) -> Any:
        ids, _, *rest = super()._preprocess(scheduler_output, num_input_tokens, intermediate_tensors)
        embeds = self._embeds[:num_input_tokens]
        embeds[:] = self.get_model().embed_input_ids(ids)
        self._batch = self._requests()
        self.slots.fuse(embeds, self._batch)
        return None, embeds, *rest

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        output = super()._sample(logits, spec_decode_metadata)
        batch = self._batch
        known = self.slots.known[batch.host_slots]
        valid = torch.from_numpy(batch.computed + batch.scheduled >= known)
        tokens = output.sampled_token_ids[:, 0].long()
        self.slots.see_tokens(batch, self.get_model().seen_hidden, tokens, valid, self._scores)
        self._scores = None
        return output

    def _requests(self) -> Batch:
        names = self.input_batch.req_ids
        if names != self._names:
            self._names = list(names)
            self._host_slots = np.fromiter((self.slots.requests[name].slot for name in names), np.int64, len(names))
        starts = self.query_start_loc.np[: len(names) + 1].astype(np.int64)
        return Batch(
            slots=torch.from_numpy(self._host_slots),
            rows=torch.from_numpy(starts[1:] - 1),
            host_slots=self._host_slots,
            computed=self.input_batch.num_computed_tokens_cpu[: len(names)].astype(np.int64),
            scheduled=np.diff(starts),
            starts=starts[:-1],
        )
