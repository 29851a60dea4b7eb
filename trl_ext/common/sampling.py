"""Checks that rollouts are sampled from the distribution that the importance ratio is computed with."""

import copy
import inspect
import time
import urllib.request
from typing import Any

from transformers import GenerationConfig
from transformers.utils import logging

from unsloth_ext.common.vllm_installed import require_vllm

from .config_checks import one_of
from .spelling import did_you_mean


logger = logging.get_logger(__name__)

# Fields besides temperature that change the distribution, and their neutral values
UNCHANGED = {
    "do_sample": (None, True),
    "num_beams": (None, 1),
    "top_k": (None, 0),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "sequence_bias": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1),
    "watermarking_config": (None,),
}
# The same for the settings that only vLLM has
UNCHANGED_IN_VLLM = {
    "presence_penalty": (None, 0.0),
    "frequency_penalty": (None, 0.0),
    "min_tokens": (None, 0),
    "logit_bias": (None,),
    "allowed_token_ids": (None,),
    "bad_words": (None,),
    "structured_outputs": (None,),
    "vllm_structured_outputs_regex": (None,),
    "thinking_token_budget": (None,),
    "trace_decode_token_ids": (None,),
}


def rollout_config(trainer: Any) -> GenerationConfig:
    """The generation settings of a `GRPOTrainer`'s rollouts.

    `generate` takes settings that the trainer leaves open from the model's own `generation_config.json`. vLLM does not.
    """
    if trainer.use_vllm:
        args = trainer.args
        given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
        given |= {"vllm_structured_outputs_regex": args.vllm_structured_outputs_regex, **(args.generation_kwargs or {})}
        config = GenerationConfig(do_sample=True)
        for name, value in given.items():
            if hasattr(config, name) or name in UNCHANGED_IN_VLLM:
                setattr(config, name, value)
        return config
    config = copy.deepcopy(trainer.generation_config)
    own = getattr(trainer.accelerator.unwrap_model(trainer.model), "generation_config", None)
    if own is not None:
        config.update(**own.to_dict(), defaults_only=True)
    return config


def check_generation_kwargs(given: dict[str, Any] | None) -> None:
    """Raise a ValueError for a rollout setting that `generate` would ignore or cannot apply."""
    known = vars(GenerationConfig())
    for name, value in (given or {}).items():
        if name not in known:
            raise ValueError(f"generation_kwargs: {name!r}: generate has no such setting{did_you_mean(name, known)}")
        if name == "stop_strings" and value is not None:
            raise ValueError(
                f"generation_kwargs: stop_strings={value!r}: TRL passes no tokenizer to generate, which they need"
            )
        if name == "temperature" and not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"generation_kwargs: temperature={value!r}: must be more than 0")


def check_vllm_rollouts(args: Any, thinks: bool = False) -> None:
    """Check, before anything is loaded, that vLLM is there and knows the settings of rollouts. Wait for its server.

    Args:
        args: the trainer's arguments.
        thinks: rollouts have thinking states.

    Raises:
        ImportError: vLLM is not installed, or not in a tested version.
        ValueError: vLLM has no setting of a name in `generation_kwargs`, or refuses its value, or TRL cannot pass it on;
            the device or the number of processes does not suit a setting; or there is no server.
    """
    require_vllm("use_vllm=True")
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.platforms import current_platform

    params = dict.fromkeys(inspect.signature(SamplingParams).parameters)
    for name in args.generation_kwargs or {}:
        if name not in params:
            raise ValueError(f"generation_kwargs: {name!r}: vLLM has no such setting{did_you_mean(name, params)}")
    _check_vllm_kwargs(args)
    one_of(args, vllm_mode=("colocate", "server"))
    if args.vllm_mode == "server":
        if args.process_index == 0:
            _wait_for_server(args)
        return
    try:
        SamplingParams(**(args.generation_kwargs or {}))
    except (AttributeError, TypeError, ValueError, VLLMValidationError) as error:
        raise ValueError(f"generation_kwargs: vLLM refuses them: {error}") from error
    if current_platform.is_cpu() and not thinks:  # models that think keep their weights
        raise ValueError(
            "use_vllm=True: TRL cannot push weights to vLLM's build for CPUs, which packs them; set use_vllm=False"
        )
    if args.vllm_enable_sleep_mode and not current_platform.is_sleep_mode_available():
        raise ValueError(
            f"vllm_enable_sleep_mode=True: vLLM cannot sleep on this device ({current_platform.device_type}); set "
            "vllm_enable_sleep_mode=False"
        )
    if args.world_size % args.vllm_tensor_parallel_size:
        raise ValueError(
            f"vllm_tensor_parallel_size={args.vllm_tensor_parallel_size}: it must divide the number of processes, which "
            f"is {args.world_size}; set it to 1, or start more processes with accelerate launch"
        )


def _check_vllm_kwargs(args: Any) -> None:
    """Refuse settings of vLLM that TRL overwrites for its own use, or that leave nothing to learn."""
    given = args.generation_kwargs or {}
    reasons = {
        "n": "TRL asks for one completion for each row of the batch; set num_generations",
        "logprobs": "TRL would take the log-probabilities of the likeliest tokens for those of the sampled ones",
    }
    if args.vllm_mode == "colocate" and args.num_generations > 1:
        reasons["seed"] = "each completion of a group would be the same; set the trainer's seed"
    for name, reason in reasons.items():
        if given.get(name) is not None:
            raise ValueError(f"generation_kwargs: {name}={given[name]!r}: {reason}, and leave {name} out")


def _wait_for_server(args: Any) -> None:
    """Wait until vLLM's server is up, so that a missing one is noticed before the model is loaded."""
    url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
    end, said = time.monotonic() + args.vllm_server_timeout, False
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except (OSError, ValueError) as error:  # no answer, another status, or no URL
            if time.monotonic() >= end:
                raise ValueError(
                    f"vllm_mode='server': no vLLM server answers at {url} ({error}); start it with `vllm serve`, correct "
                    "vllm_server_base_url, or set vllm_mode='colocate'"
                ) from error
        if not said:
            logger.warning(f"Waiting up to {args.vllm_server_timeout:g} s (vllm_server_timeout) for a server at {url}")
            said = True
        time.sleep(1)


def warn_of_truncation(config: Any, temperature: float) -> list[str]:
    """Warn of settings that sample rollouts from another distribution than the loss computes.

    Args:
        config: a `GenerationConfig`, or a trainer's arguments.
        temperature: the temperature of the loss.

    Returns:
        The names of these settings.
    """
    unchanged = {"temperature": (temperature,), **UNCHANGED, **UNCHANGED_IN_VLLM}
    found = [name for name, neutral in unchanged.items() if getattr(config, name, None) not in neutral]
    for name in found:
        logger.warning(
            f"{name}={getattr(config, name)}: it changes the distribution that rollouts are sampled from, but the "
            f"importance ratio is computed with the unchanged one, so updates are biased; set {name}={unchanged[name][-1]} "
            "(in the trainer's arguments, or in the model's generation_config)"
        )
    return found
