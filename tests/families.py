"""Tiny random models of many families, and what each method says to them: the table of docs/families.md.

Windows are of 8 tokens where a name says so; the models have 256 positions.
"""

import torch
import transformers

from tests import tiny


SMALL = {
    "vocab_size": 49,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
WINDOW = 8
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
MLA = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 4,
    "moe_intermediate_size": 16,
}
STATES = {
    "mamba_d_state": 4,
    "mamba_d_conv": 2,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 4,
    "use_mamba_kernels": False,
    "num_experts": 1,
}
CONFIGS = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {}),
    "smollm3": ("SmolLM3", {}),
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 4.0,
            "attention_multiplier": 0.2,
        },
    ),
    "gemma": ("Gemma", {}),
    "cohere": ("Cohere", {}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoX", {}),
    "opt": ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 64}),
    "bloom": ("Bloom", {"n_layer": 4, "n_head": 4}),
    "falcon": ("Falcon", {"multi_query": False, "new_decoder_architecture": False}),
    "mixtral": ("Mixtral", EXPERTS),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
    "deepseek_v3": ("DeepseekV3", MLA),
    "mistral, window": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2, window": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "phi3, window": ("Phi3", {"sliding_window": WINDOW}),
    "gemma2, window": ("Gemma2", {"sliding_window": WINDOW}),
    "gemma3, window": ("Gemma3Text", {"sliding_window": WINDOW}),
    "llama4, chunks": ("Llama4Text", {"attention_chunk_size": WINDOW, **EXPERTS, "intermediate_size_mlp": 64}),
    "gpt_neo, window": (
        "GPTNeo",
        {
            "window_size": WINDOW,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
        },
    ),
    "mamba": ("Mamba", {"state_size": 4}),
    "rwkv": ("Rwkv", {"attention_hidden_size": 32}),
    "qwen3_next": (
        "Qwen3Next",
        {
            **EXPERTS,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "jamba": ("Jamba", {**STATES, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "falcon_h1": ("FalconH1", STATES),
}
# transformers 5.17 decodes a batch of RWKV otherwise than its rows, without us too
UNDECIDED = [("rwkv", "hrpo")]
OTHER_NAMES = ("Falcon", "Bloom", "GPT2", "GPTNeo")  # for sizes, or none


def config(family: str, **changes):
    """The configuration of a family."""
    name, special = CONFIGS[family]
    other = ("head_dim", "num_key_value_heads", "intermediate_size") if name in OTHER_NAMES else ()
    small = {k: v for k, v in SMALL.items() if k not in other}
    return getattr(transformers, f"{name}Config")(**{**small, **special, **changes})


def model(family: str, std: float = 0.1, dtype: torch.dtype = torch.float32, **changes):
    """A random causal LM, with norms and biases that are not what they begin as."""
    net = tiny.from_config(config(family, **changes), std=std, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return net
