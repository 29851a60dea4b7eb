"""vLLM's workers for hybrid models. They tell the slots which requests ended, and hand out traces."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from vllm.platforms import current_platform

from .slots import ThinkingSlots
from .traces import in_order, packed


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class HybridWorker(Worker):
    """The platform's worker for a hybrid model."""

    _started = False

    def init_device(self) -> None:
        super().init_device()
        if not self.use_v2_model_runner:
            from .runner_v1 import HybridCPUModelRunner

            self.model_runner.__class__ = HybridCPUModelRunner

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        model: Any = self.model_runner.get_model()
        if model.pushed_weights and current_platform.is_cpu():
            for module in model.modules():
                if hasattr(module, "cpu_linear"):  # on packed weights, which a trainer's would not change
                    module.cpu_linear = torch.nn.functional.linear

    @property
    def slots(self) -> ThinkingSlots:
        """The thinking states of the running requests."""
        runner: Any = self.model_runner
        return runner.model_state.slots if self.use_v2_model_runner else runner.slots

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()  # with requests of its own, before a trainer pushes weights
        self._started = True
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        if self._started:
            self.model_runner.get_model().check_loaded()
        if self.use_v2_model_runner:  # which does not tell its models apart what ended and what was preempted
            self.slots.finish(scheduler_output.finished_req_ids)
        return super().execute_model(scheduler_output)

    def thinking_trace_requests(self, traces: Sequence[str]) -> list[list[str]]:
        """Return the requests that traces are of, see `ThinkingSlots.names`."""
        return self.slots.names(traces)

    def take_thinking_traces(self, traces: Sequence[str]) -> list[list[tuple[str, dict[str, torch.Tensor]]]]:
        """Return and forget traces, see `ThinkingSlots.take`. Call it with `LLM.collective_rpc`."""
        return self.slots.take(traces)

    def take_thinking_traces_text(self, trace: str) -> str:
        """Return and forget the traces of one name, in order, as text (`traces.packed`), for another process."""
        return packed(in_order(self.slots.take([trace])[0]))

    def describe_thinking(self) -> dict[str, Any]:
        """How this engine thinks: the settings of the thinking modules, the delimiter, and the digest of its tokens."""
        model: Any = self.model_runner.get_model()
        return {
            **asdict(model.model.thinking_config),
            "answer_delimiter": model.answer_delimiter,
            "delimiter_digest": model.thinking_digest,
        }
