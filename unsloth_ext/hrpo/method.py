"""The record of HRPO, which fuses hidden states into input embeddings until a delimiter ends the thinking."""

from ..common.method import Method


MODULES = (
    "thinking_residual_gate_r",
    "thinking_residual_gate_i",
    "thinking_residual_Lambda",
    "thinking_projection",
)

METHOD = Method(
    name="hrpo",
    exports={
        "FastThinkingModel": "fast_model",
        "HybridSession": "decoding",
        "ThinkingConfig": "residual",
        "ThinkingTrace": "decoding",
        "attach_thinking": "residual",
        "drop_thinking": "residual",
        "has_thinking": "residual",
        "hybrid_decode": "decoding",
        "hybrid_generate": "decoding",
        "project": "states",
        "soft_embedding": "states",
        "take_traces": "vllm.engine",
        "thinking_llm": "vllm.engine",
        "traced": "vllm.engine",
        "with_thinking_modules": "adapter",
    },
    what="thinking modules",
    key="thinking",
    settings="ThinkingConfig",
    attribute="thinking_config",
    modules=MODULES,
    linear_modules=MODULES,
    attach="attach_thinking",
    loader="FastThinkingModel",
    about="It thinks in hidden states until a delimiter ends the thinking (HRPO, arXiv 2505.18454).",
    dropped="the thinking modules: what is left decodes without thinking",
    drop="residual:drop_thinking",
    example="""\
from unsloth_ext import DelimiterMatcher, FastThinkingModel, hybrid_generate

model, tokenizer = FastThinkingModel.from_pretrained({where})
inputs = tokenizer(["1+2="], return_tensors="pt", return_token_type_ids=False).to(model.device)
matcher = DelimiterMatcher(tokenizer, "####", model.config.vocab_size)  # the text that ended the thinking in training
out = hybrid_generate(model, matcher=matcher, max_new_tokens=32, **inputs)
print(tokenizer.decode(out[0], skip_special_tokens=True))""",
    completion="completion:complete",
    newer=(
        "soft_temperature",
        "noise_scale",
        "gumbel_temperature",
        "gumbel_top_k",
        "gumbel_top_p",
        "noise_likelihood",
    ),
    states=("on", "zero", "shuffle", "noise", "interpolate", "off"),
    refused_arguments=("num_beams",),
    without_vllm="thinking states are decoded by an engine of their own, which thinking_llm makes",
)
