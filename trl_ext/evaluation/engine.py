"""`latent-reasoning eval --engine vllm`: vLLM decodes where it serves a kind of model (docs/vllm.md)."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from unsloth_ext import LatentEngine, take_traces, thinking_llm, traced
from unsloth_ext.common.completions import Completions
from unsloth_ext.common.generation_arguments import end_tokens
from unsloth_ext.common.text_model import TextModel
from unsloth_ext.common.vllm_installed import require_vllm

from ..cli.convert import main as convert


class Engine:
    """A vLLM engine for an opened model. It is a context manager, which stops the engine.

    Args:
        opened: the model.
        checkpoint: where it was opened from.
        **settings: as for `vllm.LLM`.

    Attributes:
        states: those in which vLLM decodes; transformers decodes the others.

    Raises:
        ImportError: vLLM is not installed, or not in a version that was tested.
        ValueError: vLLM does not serve this kind of model.
    """

    def __init__(self, opened: TextModel, checkpoint: str, **settings: Any):
        require_vllm("--engine vllm")
        if opened.kind not in ("plain", "hrpo", "latent") and opened.method is not None:
            raise ValueError(f"--engine vllm: {opened.method.without_vllm}; leave it out ({opened.kind} models)")
        self.opened, self.stack = opened, ExitStack()
        if opened.kind == "latent":  # transformers makes the latent tokens, whatever is done to them
            self.states = tuple(state for state in opened.states if state != "off")
            self.llm: Any = LatentEngine(opened.model, **settings)
            return
        self.states = ("on",)
        folder = str(Path(self.stack.enter_context(TemporaryDirectory(prefix="engine")), "whole"))
        convert([checkpoint, folder])
        shared = {"gpu_memory_utilization": 0.3, **settings}  # the model is in memory too, as in TRL
        if opened.kind == "hrpo":
            self.llm = thinking_llm(folder, opened.delimiter, **shared)
        else:
            from vllm import LLM

            self.llm = LLM(model=folder, **shared)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.opened.kind == "latent":
            self.llm.close()
        else:
            self.llm.llm_engine.engine_core.shutdown()
        self.stack.close()

    def complete(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, state: str = "on", **generate_kwargs: Any
    ) -> Completions:
        """Complete prompts, as `TextModel.complete` does.

        Args:
            input_ids (B, P): long, left-padded.
            attention_mask (B, P): long.
            state: one of `states`.
            **generate_kwargs: `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `stop_strings`.
        """
        if self.opened.kind == "latent":
            return self.opened.complete(input_ids, attention_mask, state=state, engine=self.llm, **generate_kwargs)
        from vllm import SamplingParams

        stops, sampled = generate_kwargs.get("stop_strings") or [], generate_kwargs.get("do_sample", False)
        ends = end_tokens(self.opened.model, self.opened.tokenizer)
        params = SamplingParams(
            max_tokens=generate_kwargs["max_new_tokens"],
            temperature=generate_kwargs.get("temperature", 1.0) if sampled else 0.0,
            top_k=generate_kwargs.get("top_k") or -1 if sampled else -1,
            top_p=generate_kwargs.get("top_p") or 1.0 if sampled else 1.0,
            stop=list(stops),
            include_stop_str_in_output=True,
            stop_token_ids=ends,
            ignore_eos=True,  # the ids that end a text stand in `stop_token_ids`
        )
        prompts = [{"prompt_token_ids": row[mask.bool()].tolist()} for row, mask in zip(input_ids, attention_mask)]
        thinks = self.opened.kind == "hrpo"
        each = [traced(params) if thinks else params for _ in prompts]
        outputs = self.llm.generate(prompts, each, use_tqdm=False)
        latent = [0] * len(prompts)
        if thinks:
            latent = [int(trace.thinking_mask.sum()) for (trace,) in take_traces(self.llm, each, outputs)]
        rows = [list(output.outputs[0].token_ids) for output in outputs]
        longest, pad = max(map(len, rows)), self.opened.tokenizer.pad_token_id
        tokens = torch.tensor([row + [ends[0] if pad is None else pad] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return Completions(tokens, lengths, lengths, torch.tensor(latent))
