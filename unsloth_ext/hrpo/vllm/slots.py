"""The thinking states of the requests that vLLM is decoding: one slot, a row of a few tensors, for each request.

A step has two halves. Before the forward, `fuse` mixes the states of the last step into the embeddings of the tokens
that are fed. After sampling, `see_tokens` makes the states of the next step. Both work on whole tensors. The host waits
for the device, and loops over requests, only where some were preempted.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ...common.delimiter import advance
from ..residual import fuse_thinking


TRACE = "thinking_trace"  # the key of `SamplingParams.extra_args` that asks for a request's trace
PAGE = 64  # tokens
LAG = 2  # steps after which a copy to the host is surely complete: vLLM prepares at most this many ahead


class Batch(NamedTuple):
    """The requests of one step, B of them with T tokens in all.

    Attributes:
        slots (B,): long, on the device.
        rows (B,): long, on the device: the last token of each request among the T.
        host_slots (B,): the same slots, on the host.
        computed (B,): on the host, tokens of each request that were computed before.
        scheduled (B,): on the host, tokens of each request in this step.
        starts (B,): on the host, the first token of each request among the T.
    """

    slots: torch.Tensor
    rows: torch.Tensor
    host_slots: np.ndarray
    computed: np.ndarray
    scheduled: np.ndarray
    starts: np.ndarray


@dataclass
class Request:
    """A request that is being decoded, or that was preempted.

    Attributes:
        id: vLLM's name of it.
        prompt: tokens of its prompt.
        trace: the name under which its trace is kept at its end; None: it is not kept.
        slot: its slot; None: it was preempted.
        past: its history while it has no slot.
    """

    id: str
    prompt: int
    trace: str | None
    slot: int | None = None
    past: dict[str, torch.Tensor] = field(default_factory=dict)


class Step(NamedTuple):
    """What one step recorded, until its copy to the host is complete. See `History.record`."""

    event: Any
    slots: np.ndarray
    tokens: np.ndarray
    values: dict[str, torch.Tensor]
    # Slots that are emptied after this step, with their number of tokens, and where these go; None: nowhere
    then: list[tuple[int, int, dict[str, torch.Tensor] | None]]


class History:
    """What each step recorded of each request, on the host, in pages. It grows with the tokens of all running requests.

    Args:
        slots: the number of slots.
        widths: the fields, each with its width and its dtype.
    """

    def __init__(self, slots: int, widths: dict[str, tuple[int, torch.dtype]]):
        self.length = np.zeros(slots, dtype=np.int64)
        self._data = {name: torch.empty(0, PAGE, width, dtype=dtype) for name, (width, dtype) in widths.items()}
        self._pages = np.full((slots, 0), -1)  # of each slot
        self._free: list[int] = []  # pages
        self._pending: list[Step] = []

    def record(self, slots: np.ndarray, index: np.ndarray, values: dict[str, torch.Tensor]) -> None:
        """Keep `values` (B, width) as what token `index` (B,) of each slot was made with; -1 keeps nothing."""
        event = None
        if any(value.is_cuda for value in values.values()):
            values = {name: value.to("cpu", non_blocking=True) for name, value in values.items()}
            event = torch.cuda.Event()
            event.record()
        self._pending.append(Step(event, slots, index, values, []))
        if len(self._pending) > LAG:
            self._write(1)
        kept = index >= 0
        self.length[slots[kept]] = index[kept] + 1

    def flush(self) -> None:
        """Wait for all copies to the host."""
        self._write(len(self._pending))

    @torch.inference_mode(False)  # training can use the copies
    def read(self, slot: int, start: int = 0, end: int | None = None) -> dict[str, torch.Tensor]:
        """Copy the fields of tokens `start` to `end` of a slot, (end - start, width) each."""
        self.flush()
        return self._copy(slot, start, int(self.length[slot]) if end is None else end)

    def empty(self, slot: int) -> None:
        """Give the pages of a slot to others."""
        self._free += self._pages[slot][self._pages[slot] >= 0].tolist()
        self._pages[slot] = -1

    def empty_later(self, slot: int, wanted: bool) -> dict[str, torch.Tensor]:
        """Empty a slot without waiting for the last steps.

        Args:
            slot: the slot.
            wanted: whether its fields are.

        Returns:
            What `read` returns, if they are wanted. The dictionary is filled later, by `flush` at the latest.
        """
        past: dict[str, torch.Tensor] = {}
        if self._pending:
            self._pending[-1].then.append((slot, int(self.length[slot]), past if wanted else None))
        else:
            past |= self.read(slot) if wanted else {}
            self.empty(slot)
        return past

    def _copy(self, slot: int, start: int, end: int) -> dict[str, torch.Tensor]:
        place = self._places(np.full(end - start, slot), np.arange(start, end))
        return {name: data.flatten(0, 1)[place] for name, data in self._data.items()}

    @torch.inference_mode(False)
    def restore(self, slot: int, past: dict[str, torch.Tensor], length: int) -> None:
        """Put the first `length` tokens of what `read` returned into a slot."""
        self.flush()
        place = self._places(np.full(length, slot), np.arange(length))
        for name, value in past.items():
            self._data[name].flatten(0, 1)[place] = value[:length]
        self.length[slot] = length

    @torch.inference_mode(False)
    def _write(self, count: int) -> None:
        done, self._pending = self._pending[:count], self._pending[count:]
        for step in done:
            if step.event is not None:
                step.event.synchronize()
            kept = np.flatnonzero(step.tokens >= 0)
            place = self._places(step.slots[kept], step.tokens[kept])
            for name, value in step.values.items():
                self._data[name].flatten(0, 1)[place] = value[torch.from_numpy(kept)]
            for slot, length, past in step.then:
                if past is not None:
                    past |= self._copy(slot, 0, length)
                self.empty(slot)

    def _places(self, slots: np.ndarray, tokens: np.ndarray) -> torch.Tensor:
        """Where some tokens (N,) of some slots (N,) stand among the tokens of all pages; pages are made for new ones."""
        page = tokens // PAGE
        if (more := int(page.max(initial=-1)) + 1 - self._pages.shape[1]) > 0:
            self._pages = np.pad(self._pages, ((0, 0), (0, more)), constant_values=-1)
        new = self._pages[slots, page] < 0
        if new.any():
            missing = np.unique(np.stack([slots[new], page[new]]), axis=1)
            self._pages[missing[0], missing[1]] = self._take(missing.shape[1])
        return torch.from_numpy(self._pages[slots, page] * PAGE + tokens % PAGE)

    def _take(self, count: int) -> list[int]:
        """Take free pages."""
        if count > len(self._free):
            before = len(next(iter(self._data.values())))
            after = before + max(count - len(self._free), before)  # doubled, so that copies are few
            for name, data in self._data.items():
                self._data[name] = data.new_empty(after, *data.shape[1:])
                self._data[name][:before] = data
            self._free += range(before, after)
        taken, self._free[-count:] = self._free[-count:], []
        return taken


class ThinkingSlots:
    """The thinking states of all running requests.

    Args:
        model: the causal LM of `models`, with thinking modules.
        slots: the largest number of requests in a step.
        device: of the model.
        dtype: of the model.
    """

    def __init__(self, model: Any, slots: int, device: torch.device, dtype: torch.dtype):
        self.model, self.backbone = model, model.model
        self.soft = self.backbone.thinking_config.thinking_source == "soft_embedding"
        width = model.thinking_width
        self._states = torch.zeros(slots, width, dtype=dtype, device=device)
        self._thinks = torch.zeros(slots, dtype=torch.bool, device=device)
        self._matched = torch.zeros(slots, dtype=torch.long, device=device)
        fields = {"hidden_states": (width, dtype), "matched": (1, torch.int16)}
        self.history = History(slots, {**fields, "thinking_states": (width, dtype)} if self.soft else fields)
        self.requests: dict[str, Request] = {}
        self._ended: dict[str, list[tuple[str, dict[str, torch.Tensor]]]] = {}
        self._prompt = np.zeros(slots, dtype=np.int64)
        self.known = np.zeros(slots, dtype=np.int64)  # tokens that the request came with
        self._fresh: list[tuple[int, int]] = []

    # -- requests come and go -----------------------------------------------------------------------------------------

    def add(self, name: str, slot: int, prompt: int, tokens: int, extra_args: dict[str, Any] | None) -> None:
        """Give a request a slot.

        Args:
            name: vLLM's name of the request.
            slot: a free slot.
            prompt: tokens of its prompt.
            tokens: tokens that it has already; more than `prompt` if it was preempted.
            extra_args: of its sampling parameters.
        """
        request = self.requests.setdefault(name, Request(name, prompt, (extra_args or {}).get(TRACE)))
        self._prompt[slot], self.known[slot] = prompt, tokens
        request.slot, matched, decoded = slot, 0, tokens - prompt
        self.history.length[slot] = 0
        if decoded > 0:
            if len(request.past.get("matched", ())) < decoded:
                raise RuntimeError(
                    f"request {name} comes with {decoded} decoded tokens whose thinking states are not known: "
                    "thinking states cannot be resumed in another engine"
                )
            self.history.restore(slot, request.past, decoded)
            matched = int(request.past["matched"][decoded - 1])
        request.past = {}
        self._fresh.append((slot, matched))

    def apply(self) -> None:
        """Set the slots of the requests that were added since the last call."""
        if self._fresh:
            device = self._matched.device
            # From pinned memory, or the host would wait for all that the device has to do
            fresh = torch.tensor(self._fresh, pin_memory=device.type == "cuda").to(device, non_blocking=True)
            slots, matched = fresh.unbind(1)
            self._matched[slots], self._thinks[slots] = matched, False
            self._fresh = []

    def remove(self, name: str) -> list[int]:
        """Take the slot from a request that was preempted, and return it. Its history is kept."""
        request = self.requests.get(name)
        if request is None or request.slot is None:
            return []
        slot, request.past, request.slot = request.slot, self.history.read(request.slot), None
        self.history.empty(slot)
        return [slot]

    def finish(self, names: Collection[str]) -> list[int]:
        """Forget requests that ended, and return their slots. Traces that were asked for are kept until `take`."""
        ended = [self.requests.pop(name) for name in names if name in self.requests]
        for request in ended:
            past = request.past
            if request.slot is not None:
                past = self.history.empty_later(request.slot, wanted=request.trace is not None)
            if request.trace is not None:
                self._ended.setdefault(request.trace, []).append((request.id, past))
        return [request.slot for request in ended if request.slot is not None]

    def take(self, traces: Sequence[str]) -> list[list[tuple[str, dict[str, torch.Tensor]]]]:
        """Return and forget the traces with these names.

        Args:
            traces: their names: the value of `extra_args["thinking_trace"]`.

        Returns:
            For each name its requests, each with vLLM's name of it and `thinking_mask` (C,) bool, `hidden_states`
            (C, d), and with soft embeddings `thinking_states` (C, d), all on the host. C is at least the number of
            tokens of its completion.
        """
        self.history.flush()
        running, found = self._traced(), []
        for trace in traces:
            parts = self._ended.pop(trace, [])
            for request in running.get(trace, ()):
                parts.append((request.id, request.past if request.slot is None else self.history.read(request.slot)))
                request.trace = None
            found.append([(name, self._trace(past)) for name, past in parts])
        return found

    def names(self, traces: Sequence[str]) -> list[list[str]]:
        """Return, for each name, vLLM's names of the requests that `take` would return."""
        running = self._traced()
        return [
            [*(name for name, _ in self._ended.get(trace, ())), *(request.id for request in running.get(trace, ()))]
            for trace in traces
        ]

    def _traced(self) -> dict[str, list[Request]]:
        """The requests that are running, by the names of their traces.

        vLLM tells of the last requests that ended only with the next step.
        """
        running: dict[str, list[Request]] = {}
        for request in self.requests.values():
            if request.trace is not None:
                running.setdefault(request.trace, []).append(request)
        return running

    def _trace(self, past: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        matched = past.pop("matched")[:, 0]
        return {"thinking_mask": matched != self.model.thinking_done, **past}

    # -- one step -----------------------------------------------------------------------------------------------------

    def fuse(self, embeds: torch.Tensor, batch: Batch) -> None:
        """Fuse the states into the embeddings (T, d) of the tokens that are fed, in place."""
        last = embeds[batch.rows].unsqueeze(1)
        thinks, states = self._thinks[batch.slots].unsqueeze(1), self._states[batch.slots].unsqueeze(1)
        embeds[batch.rows] = fuse_thinking(self.backbone, last, thinks, states).squeeze(1)
        again = batch.computed < self.known[batch.host_slots]
        again &= batch.computed + batch.scheduled > self._prompt[batch.host_slots]
        for i in np.flatnonzero(again):  # preempted requests, whose completion is computed again
            slot, start, count = batch.host_slots[i], int(batch.starts[i]), int(batch.scheduled[i])
            first = int(batch.computed[i] - self._prompt[slot])  # of the completion; below 0 in the prompt
            past = self.history.read(slot, max(first, 0), first + count)
            mask = (past["matched"][None, :, 0] != self.model.thinking_done).to(embeds.device)
            states = past["thinking_states" if self.soft else "hidden_states"][None].to(embeds)
            states = states if self.soft else self.model.project(states)
            rows = embeds[start : start + count]  # of which the last ones are the completion's
            rows[:] = fuse_thinking(self.backbone, rows[None], mask, states)[0]

    def see_tokens(
        self,
        batch: Batch,
        hidden_states: torch.Tensor,
        tokens: torch.Tensor,
        valid: torch.Tensor,
        scores: torch.Tensor | None = None,
        candidates: int | None = None,
    ) -> None:
        """Make the states of the sampled tokens.

        Args:
            batch: the requests.
            hidden_states (B, d): after the final norm, those that the tokens were sampled from.
            tokens (B,): long, the sampled tokens.
            valid (B,): bool. False for a request whose prompt is not complete; its token does not count.
            scores (B, V): warped logits that the tokens were sampled from. Needed for soft embeddings.
            candidates: how many tokens can have a probability above zero; None: all.
        """
        before = self._matched[batch.slots]
        matched = torch.where(valid, advance(self.model.thinking_table, before, tokens), before)
        self._matched[batch.slots] = matched
        self._thinks[batch.slots] = valid & (matched != self.model.thinking_done)
        if scores is None:
            states = self.model.project(hidden_states)
        else:
            states = self.model.mix(scores.float().softmax(-1), candidates)
        self._states[batch.slots] = states
        length = batch.computed + batch.scheduled
        index = np.where(length >= self.known[batch.host_slots], length - self._prompt[batch.host_slots], -1)
        kept = {"hidden_states": hidden_states, "matched": matched[:, None].short()}
        self.history.record(batch.host_slots, index, {**kept, "thinking_states": states} if self.soft else kept)
