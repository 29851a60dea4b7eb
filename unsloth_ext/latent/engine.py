"""Answers after latent tokens, decoded by a stock vLLM engine (docs/vllm.md, ours).

transformers makes question and latent tokens. vLLM gets them as the embeddings of a prompt, reads them once, and decodes
the answer. This is exact for every method here: positions count up from 0, and the cached keys and values of the latent
tokens are those of one causal pass over the embeddings that the last pass read.
"""

import copy
import tempfile
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GenerationConfig

from ..common.attaching import attached_modules
from ..common.checksum import checksum
from ..common.evaluation_mode import evaluating
from ..common.generation_arguments import WORKS
from ..common.model_probe import same_states, trial_ids
from ..common.vllm_installed import require_vllm
from ..common.wrapping import backbone_of, causal_lm_of, unwrapped
from .method import METHOD


_SERVED = """
    max_new_tokens min_new_tokens do_sample temperature top_k top_p min_p num_return_sequences eos_token_id pad_token_id
"""
# Nothing that can be seen depends on them, if there are no beams and `max_new_tokens` is set
_WITHOUT_EFFECT = """
    max_length bos_token_id early_stopping length_penalty renormalize_logits disable_compile compile_config
"""
NOT_SERVED = sorted(
    (WORKS - {*_SERVED.split(), *_WITHOUT_EFFECT.split()}) | {"output_attentions", "output_hidden_states"}
)
FACTORS = ("repetition_penalty", "encoder_repetition_penalty", "typical_p")  # 1 turns them off; 0 or None the others
PASSED = ("generation_config", "tokenizer")  # beside the fields of a generation config
TRIAL = 8  # tokens of the text on which the engine is compared with the model
LIKELIEST = 20  # vLLM returns no more log-probs unless it is told to


class LatentEngine:
    """A vLLM engine that decodes the answers of one model with latent tokens.

    It starts at the first answer, with a merged copy of the model's weights. At each call it compares a checksum of the
    model's weights with that of its copy. If they differ, it takes the new weights. At the start and after each update, its
    log-probs for a trial prompt are compared with the model's. So it never decodes with weights that the model no longer
    has.

    Args:
        model: the causal LM with latent tokens, wrapped by PEFT or not.
        **settings: as for `vllm.LLM`. `gpu_memory_utilization` is 0.3 by default, as in TRL, since the model is in memory
            too.

    Attributes:
        llm: the `vllm.LLM`. None before the start.

    Raises:
        ImportError: vLLM is not installed, or not in a version that was tested.
        ValueError: the weights are quantised or sharded.
    """

    def __init__(self, model: nn.Module, **settings: Any):
        require_vllm("engine='vllm'")
        check_whole(model)
        self.settings = {"gpu_memory_utilization": 0.3, **settings}
        self.llm: Any = None
        self._causal_lm = causal_lm_of(model)
        self._weights: tuple = ()

    def update(self, model: nn.Module) -> None:
        """Take the weights of a model, unless the engine has them. `decode` does this by itself.

        Args:
            model: the causal LM with latent tokens, wrapped by PEFT or not.

        Raises:
            ValueError: the engine was made for another model.
            RuntimeError: vLLM computes something else than the model.
        """
        if causal_lm_of(model) is not self._causal_lm:
            raise ValueError("engine: it was made for another model; make a LatentEngine for this one")
        found = checksum(model)
        if found == self._weights:
            return
        self._weights = ()
        with tempfile.TemporaryDirectory(prefix="latent") as folder:
            save_merged(model, folder)
            if self.llm is not None and _keeps_head(model):
                self.close()
            if self.llm is None:
                self._start(model, folder)
            else:
                self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
                self.llm.reset_prefix_cache()
        if not self._agrees(model):
            self.close()
            raise RuntimeError(
                f"{type(self._causal_lm).__name__}: vLLM's log-probs for a trial prompt differ from transformers', so its "
                "answers would be others; decode with transformers (engine=None)"
            )
        self._weights = found

    def _start(self, model: nn.Module, folder: str) -> None:
        from vllm import LLM

        dtype = str(causal_lm_of(model).dtype).removeprefix("torch.")
        fixed = {"enable_prompt_embeds": True, "skip_tokenizer_init": True}
        self.llm = LLM(model=folder, **{"dtype": dtype, **self.settings, **fixed})

    def close(self) -> None:
        """Stop the engine and free its memory."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm, self._weights = None, ()

    @torch.no_grad()
    def _agrees(self, model: nn.Module) -> bool:
        """Return whether vLLM's log-probs after a trial prompt are the model's, up to rounding."""
        from vllm import SamplingParams

        embeds = backbone_of(model).get_input_embeddings()(trial_ids(model, TRIAL))
        with evaluating(model):
            wanted = causal_lm_of(model)(inputs_embeds=embeds).logits[0, -1].log_softmax(-1)
        count = min(LIKELIEST, len(wanted))
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=count, detokenize=False)
        (out,) = self.llm.generate([{"prompt_embeds": embeds[0].cpu()}], [params], use_tqdm=False)
        found = out.outputs[0].logprobs[0]
        log_probs = torch.tensor([one.logprob for one in found.values()], dtype=wanted.dtype)
        return same_states(log_probs, wanted.cpu()[list(found)])

    def decode(
        self, model: nn.Module, embeds: torch.Tensor, attention_mask: torch.Tensor, settings: GenerationConfig
    ) -> torch.Tensor:
        """Decode the answers to prompts of embeddings.

        Args:
            model: the causal LM with latent tokens, wrapped by PEFT or not.
            embeds (B, P, d): in the model's dtype, prompts padded on the left.
            attention_mask (B, P): long.
            settings: the complete generation config. Samples depend on torch's global generator.

        Returns:
            (B * num_return_sequences, C) long, padded on the right.

        Raises:
            ValueError: the engine was made for another model, or has no room for an answer.
            RuntimeError: vLLM computes something else than the model.
        """
        prompts = [row[mask.bool()].cpu() for row, mask in zip(embeds.detach(), attention_mask)]
        params = sampling_params(settings, len(prompts))  # before the start, which may seed torch's generator
        self.update(model)
        room, longest = self.llm.llm_engine.model_config.max_model_len, max(map(len, prompts))
        if longest + settings.max_new_tokens > room:  # vLLM would cut the answers
            raise ValueError(
                f"max_new_tokens={settings.max_new_tokens}: a question has {longest} tokens with the latent ones, and the "
                f"engine has room for {room} in all; give LatentEngine a larger max_model_len, or ask for fewer"
            )
        outs = self.llm.generate([{"prompt_embeds": prompt} for prompt in prompts], params, use_tqdm=False)
        rows = [torch.tensor(one.token_ids, dtype=torch.long) for out in outs for one in out.outputs]
        ends = _ends(settings)
        pad = settings.pad_token_id if settings.pad_token_id is not None else ends[0] if ends else 0
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(embeds.device)


def check_whole(model: nn.Module) -> None:
    """Raise a ValueError if a model's weights are quantised or sharded, so that vLLM cannot get them."""
    if getattr(causal_lm_of(model), "is_quantized", False):
        raise ValueError(
            "engine='vllm': the model is quantised; load it without quantization, or decode with engine=None"
        )
    for name, value in model.named_parameters():
        if value.is_meta or not value.numel() or hasattr(value, "full_tensor"):
            raise ValueError(f"engine='vllm': {name} is sharded or not in memory; decode with engine=None")


def check_served(settings: GenerationConfig, arguments: dict[str, Any]) -> None:
    """Check that vLLM can do what `generate` is asked for.

    Args:
        settings: the complete generation config.
        arguments: the keywords as for `generate`.

    Raises:
        ValueError: it cannot. The message names the argument.
    """
    instead = "leave it out, or decode with transformers (engine=None)"
    for name, value in arguments.items():
        if name not in PASSED and not hasattr(settings, name) and value is not None:
            raise ValueError(f"{name}: vLLM cannot do this after latent tokens; {instead}")
    for name in NOT_SERVED:
        value = getattr(settings, name, None)
        if value is not None and value != (1 if name in FACTORS else 0):
            raise ValueError(f"{name}={value!r}: vLLM cannot do this after latent tokens; {instead}")
    if settings.max_new_tokens is None:
        raise ValueError("max_new_tokens=None: vLLM needs the maximum number of tokens of an answer; set it")


def sampling_params(settings: GenerationConfig, rows: int) -> list[Any]:
    """Return vLLM's `SamplingParams` for each of a number of prompts, with seeds from torch's global generator."""
    from vllm import SamplingParams

    how: dict[str, Any] = {"temperature": 0}
    seeds: list[int | None] = [None] * rows
    if settings.do_sample:
        how = {
            "temperature": 1.0 if settings.temperature is None else settings.temperature,
            "top_k": settings.top_k or 0,
            "top_p": 1.0 if settings.top_p is None else settings.top_p,
            "min_p": settings.min_p or 0.0,
        }
        seeds = list(torch.randint(2**31, (rows,)).tolist())
    return [
        SamplingParams(
            **how,
            n=settings.num_return_sequences or 1,
            max_tokens=settings.max_new_tokens,
            min_tokens=settings.min_new_tokens or 0,
            stop_token_ids=_ends(settings),
            detokenize=False,
            seed=seed,
        )
        for seed in seeds
    ]


def _ends(settings: GenerationConfig) -> list[int]:
    ends = settings.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]


def _keeps_head(model: nn.Module) -> bool:
    """Return whether vLLM would go on with the old head after a reload: on a CPU it packs one that is tied."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu() and causal_lm_of(model).config.tie_word_embeddings


def save_merged(model: nn.Module, folder: str) -> None:
    """Save a model as vLLM opens it: adapters merged, without the modules of the latent phase. The model is not changed."""
    made = copy.deepcopy(unwrapped(model))
    if isinstance(made, PeftModel):
        off = any(one.disable_adapters for one in made.modules() if isinstance(one, BaseTunerLayer))
        made = made.unload() if off else made.merge_and_unload()
    for name in attached_modules(made, METHOD):
        delattr(backbone_of(made), name)
    # Each request says what ends its text, and vLLM would add the ends of this file
    made.generation_config = GenerationConfig()
    made.save_pretrained(folder)
