"""Rollouts of HRPO in vLLM: the engine that TRL makes for them, and the traces of what it sampled.

TRL's `VLLMGeneration` generates, and pushes the weights before each rollout. Among them are the thinking modules, which
are weights of the plugin's model (`unsloth_ext.hrpo.vllm`).
"""

import contextlib
import math
import os
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch.nn.utils.rnn import pad_sequence
from transformers.trainer_utils import get_last_checkpoint

from patches.vllm_engine_settings import engine_settings
from unsloth_ext.common.settings_file import read_json
from unsloth_ext.common.sharding import whole_weights
from unsloth_ext.common.wrapping import backbone_of, causal_lm_of
from unsloth_ext.hrpo.decoding import ThinkingTrace
from unsloth_ext.hrpo.method import METHOD
from unsloth_ext.hrpo.states import project
from unsloth_ext.hrpo.vllm.models import ARCHITECTURES, FAMILIES, PREFIX
from unsloth_ext.hrpo.vllm.plugin import check_heads
from unsloth_ext.hrpo.vllm.slots import TRACE
from unsloth_ext.hrpo.vllm.traces import in_order, unpacked

from ..common.sampling import check_vllm_rollouts


def check_vllm(args: Any) -> None:
    """Check, before anything is loaded, that vLLM can make the rollouts.

    Args:
        args: the trainer's arguments.

    Raises:
        ImportError: vLLM is not installed, or not in a tested version.
        ValueError: a setting does not work with thinking states.
    """
    check_vllm_rollouts(args, thinks=True)
    if args.vllm_model_impl not in ("auto", "vllm"):
        raise ValueError(
            f"vllm_model_impl={args.vllm_model_impl!r}: only vLLM's own models can think; set vllm_model_impl='auto'"
        )


def refuse_thinking_model(model: Any, token: str | None) -> None:
    """Raise a ValueError if rollouts in vLLM would think although the trainer does not.

    Args:
        model: the model or its name.
        token: the access token for the hub.
    """
    name = model if isinstance(model, str) else model.config._name_or_path
    if METHOD.key in (read_json(name, "config.json", token) or {}):
        raise ValueError(
            f"thinking=False with use_vllm=True: {name} has thinking modules, and vLLM would decode with them; save it "
            "without them (unsloth_ext.drop_thinking), or set use_vllm=False"
        )


def check_model(architecture: str, config: Any) -> None:
    """Check that a vLLM engine of the trainer's can think with a model.

    Args:
        architecture: the name of the model's class.
        config: the model's configuration.

    Raises:
        ValueError: it cannot.
    """
    if PREFIX + architecture not in ARCHITECTURES:
        raise ValueError(
            f"use_vllm=True: vLLM can think with {', '.join(FAMILIES)}, and not with {architecture}; set use_vllm=False"
        )
    try:
        check_heads(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    except ValueError as error:
        raise ValueError(f"use_vllm=True: {error}; set use_vllm=False, or train a model with such heads") from error


def check_pushed(model: torch.nn.Module) -> None:
    """Check that vLLM gets the trainer's policy when TRL pushes the weights, LoRA merged.

    Args:
        model: the trainer's model.

    Raises:
        ValueError: the model is quantised, or has an adapter that cannot be pushed.
    """
    bare = causal_lm_of(model)
    if getattr(bare.config, "quantization_config", None):
        raise ValueError(
            "use_vllm=True: the model is quantised, so pushing its weights would round LoRA away and vLLM would sample "
            "from another policy than the trainer's; load it unquantised (load_in_4bit=False), or set use_vllm=False"
        )
    embedding, head = bare.get_input_embeddings(), bare.get_output_embeddings()
    if isinstance(embedding, TrainableTokensWrapper):
        raise ValueError(
            "use_vllm=True: TRL cannot push trainable_token_indices; leave them out of the adapter, or set use_vllm=False"
        )
    tied = embedding.weight is head.weight and not isinstance(embedding, BaseTunerLayer)
    if bare.config.tie_word_embeddings and not tied:
        raise ValueError(
            "use_vllm=True: the adapter changes one of the model's tied embeddings, and vLLM has one matrix for both; "
            "leave them out of the adapter, or name the input embedding in modules_to_save with ensure_weight_tying=True"
        )


@contextlib.contextmanager
def thinking_engine(trainer: Any) -> Iterator[None]:
    """While the parent constructs, let the engine that it makes think."""

    def settings() -> dict[str, Any]:
        model = trainer.model
        name = type(causal_lm_of(model)).__name__
        if not model.name_or_path:
            raise ValueError(
                "use_vllm=True: vLLM opens the model by its name, and this one has none; save it, and load it from there"
            )
        check_model(name, model.config)
        check_pushed(model)
        trainer._tokenizer.save_pretrained(folder)
        causal_lm_of(model).config.save_pretrained(folder)  # vLLM looks for it beside a tokenizer, and waits for it
        half = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else None
        return {
            "hf_overrides": {
                "architectures": [PREFIX + name],
                METHOD.key: asdict(backbone_of(model).thinking_config),
            },
            "tokenizer": folder,  # the model's folder may have another one, or none
            "additional_config": {"answer_delimiter": trainer.hrpo.answer_delimiter, "pushed_weights": True},
            # "auto" would give a model in float32 half precision
            "dtype": half or str(causal_lm_of(model).dtype).removeprefix("torch."),
        }

    with tempfile.TemporaryDirectory(prefix="tokenizer") as folder, engine_settings(settings):
        yield


def check_server(trainer: Any) -> None:
    """Compare how a server thinks with how the trainer does (`vllm_mode="server"`).

    Args:
        trainer: the constructed `HRPOTrainer`.

    Raises:
        ValueError: from `check_pushed`, or the server does not think, thinks in another way, or is several engines.
    """
    check_pushed(trainer.model)
    problem = [_server_problem(trainer) if trainer.accelerator.is_main_process else None]
    if found := broadcast_object_list(problem, from_process=0)[0]:  # no process waits for one that ended
        raise ValueError(f"vllm_mode='server': {found}")


def _server_problem(trainer: Any) -> str | None:
    """How a server thinks otherwise than the trainer, and what to do; None if it does not. For the main process."""
    config = asdict(backbone_of(trainer.model).thinking_config)
    wanted = {**config, "answer_delimiter": trainer.hrpo.answer_delimiter}
    initial = ("residual_r_min", "residual_r_max")  # of new modules only
    client = trainer.vllm_generation.vllm_client
    try:
        workers = _results(client, "describe_thinking")
        total = client.get_world_size()
    except Exception as error:
        return (
            f"the server at {client.base_url} does not say how it thinks ({error}); start it on a model with thinking "
            "modules, with VLLM_SERVER_DEV_MODE=1, where this package is installed (docs/vllm.md)"
        )
    if total > len(workers):
        return (
            f"the server at {client.base_url} has {total // len(workers)} data-parallel engines, and the traces of "
            "thinking states can be read from one only; start it with --data-parallel-size 1"
        )
    found = workers[0]
    for name in sorted(wanted.keys() - {*initial}):
        if found[name] != wanted[name]:
            return (
                f"{name} is {wanted[name]!r} in the trainer and {found[name]!r} in the server at {client.base_url}; start "
                "the server with the trainer's"
            )
    if found["delimiter_digest"] != trainer.matcher.digest:
        return (
            f"the delimiter {trainer.matcher.delimiter!r} has other tokens in the trainer than in the server at "
            f"{client.base_url}: their tokenizers or the sizes of their vocabularies differ; start the server with the "
            "trainer's tokenizer (--tokenizer)"
        )
    return None


def _results(client: Any, method: str, *args: str) -> list[Any]:
    """Call a method of each worker of the server's first engine."""
    return client._post(f"{client.base_url}/collective_rpc", json={"method": method, "args": [*args]})["results"]


@contextlib.contextmanager
def asking_for_traces(trainer: Any) -> Iterator[str]:
    """Let the rollout in the block ask for its traces. It yields the name under which the engine keeps them.

    Completions end with any end token of the trainer's, as in transformers. vLLM itself knows those of the model's folder.

    Args:
        trainer: the `HRPOTrainer`.

    Raises:
        RuntimeError: the engine failed.
        ValueError: it refused the rollout's settings.
    """
    from vllm.exceptions import VLLMValidationError

    generation = trainer.vllm_generation
    name, before = uuid.uuid4().hex, generation.generation_kwargs
    key = "vllm_xargs" if generation.mode == "server" else "extra_args"
    ends = [] if before.get("ignore_eos") else trainer.eos_token_ids
    generation.generation_kwargs = {
        **before,
        "stop_token_ids": [*(before.get("stop_token_ids") or ()), *ends],
        key: {**(before.get(key) or {}), TRACE: name},
    }
    try:
        if generation.mode == "colocate" and generation.tensor_parallel_size > 1:
            _draw_alike(generation.tp_group)
        yield name
    except VLLMValidationError as error:
        raise ValueError(
            f"vLLM refused the rollout of step {trainer.state.global_step + 1}: {error}; correct vllm_max_model_length or "
            "generation_kwargs"
        ) from error
    except Exception as error:
        saved = get_last_checkpoint(trainer.args.output_dir) if os.path.isdir(trainer.args.output_dir) else None
        what = (
            f"the last checkpoint is {saved}: resume from it" if saved else "there is no checkpoint to resume from yet"
        )
        raise RuntimeError(
            f"the vLLM engine failed in the rollout of step {trainer.state.global_step + 1} "
            f"({type(error).__name__}: {error}); {what}"
        ) from error
    finally:
        generation.generation_kwargs = before


def _draw_alike(group: Any) -> None:
    """Let the ranks of one engine sample the same tokens.

    vLLM seeds a request with numpy's global generator, in each rank by itself. A reward may have drawn from it too.
    """
    state = [np.random.get_state()]
    torch.distributed.broadcast_object_list(state, group=group, group_src=0)
    np.random.set_state(state[0])


def take_trace(
    trainer: Any, name: str, completions: list[list[int]], log_probs: list[list[float | None]]
) -> ThinkingTrace:
    """Fetch what a rollout thought.

    Args:
        trainer: the `HRPOTrainer`.
        name: from `asking_for_traces`.
        completions: token ids of this process's B rows.
        log_probs: of these tokens, as the engine sampled them; None where it gave none.

    Returns:
        The trace (B, C), C the longest completion, on the trainer's device and in its model's dtype.
    """
    device = trainer.accelerator.device
    backbone = backbone_of(trainer.model)
    dtype = backbone.get_input_embeddings().weight.dtype
    rows = _rows(trainer, name, len(completions))
    ends = set(trainer.eos_token_ids)
    masks = []
    for row, completion in zip(rows, completions, strict=True):
        mask = row["thinking_mask"][: len(completion)]
        if completion and completion[-1] in ends:
            mask[-1] = False
        masks.append(mask)

    def padded(parts: list[torch.Tensor]) -> torch.Tensor:
        return pad_sequence(parts, batch_first=True).to(device)

    known = [torch.tensor([math.nan if one is None else one for one in row]) for row in log_probs]
    trace = ThinkingTrace(padded(masks), log_probs=padded(known))
    lengths = [len(completion) for completion in completions]
    for field in trainer.fields:
        made = field == "thinking_states" and field not in rows[0]  # of hidden states, by the weights of the rollout
        source = "hidden_states" if made else field
        value = padded([row[source][:length] for row, length in zip(rows, lengths, strict=True)]).to(dtype)
        if made:
            with torch.no_grad(), whole_weights(trainer.model):
                value = project(backbone, value)
        setattr(trace, field, value)
    return trace


def _rows(trainer: Any, name: str, count: int) -> list[dict[str, torch.Tensor]]:
    """The trace of each row of this process, on the CPU."""
    generation, accelerator = trainer.vllm_generation, trainer.accelerator
    if generation.mode == "colocate":
        parts = generation.llm.collective_rpc("take_thinking_traces", args=([name],))[0][0]
        rows = in_order(parts)
        group = generation.tensor_parallel_size
        start = torch.distributed.get_rank(group=generation.tp_group) * count if group > 1 else 0
    else:
        payload = [None]
        if accelerator.is_main_process:
            payload = _results(generation.vllm_client, "take_thinking_traces_text", name)[:1]
        rows = unpacked(broadcast_object_list(payload, from_process=0)[0])
        start = accelerator.process_index * count
    if len(rows) < start + count:
        raise RuntimeError(
            f"vLLM returned {len(rows)} traces of thinking states where {start + count} were needed: the engine does not "
            "think, or another client took them"
        )
    return rows[start : start + count]
