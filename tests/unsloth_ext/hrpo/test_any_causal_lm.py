"""Thinking in any causal LM: what was sampled is what training scores, in families that hand keywords on and in those that
swallow them; others are refused when the modules are attached."""

import pytest
import torch
import transformers

from tests import tiny
from unsloth_ext import DelimiterMatcher, ThinkingConfig, attach_thinking, backbone_of, has_thinking, hybrid_generate
from unsloth_ext.hrpo.decoding import ThinkingTrace
from unsloth_ext.hrpo.recompute import previous_hidden, thinking_keywords
from unsloth_ext.hrpo.states import Warper, project


TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128, **TOKENS}
OPT = {"ffn_dim": 64, **SMALL}
CONFIGS = {
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, **TOKENS}),
    "falcon": ("FalconConfig", SMALL),
    "granite": (
        "GraniteConfig",
        {
            "intermediate_size": 64,
            "logits_scaling": 3.0,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            **SMALL,
        },
    ),
    "phi": ("PhiConfig", {"intermediate_size": 64, **SMALL}),
    "opt": ("OPTConfig", {"word_embed_proj_dim": 32, **OPT}),
    "opt_narrow": ("OPTConfig", {"word_embed_proj_dim": 16, **OPT}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 128,
            **TOKENS,
        },
    ),
    "gptj": ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4, **TOKENS}),
}
FAMILIES = (*tiny.FAMILIES, *CONFIGS)


def build(family: str, dtype=torch.float32):
    if family in tiny.FAMILIES:
        return tiny.model(family, dtype=dtype)
    name, fields = CONFIGS[family]
    return tiny.from_config(getattr(transformers, name)(**fields), dtype=dtype).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", ["projection", "soft_embedding"])
def test_log_probs_of_the_rollout_are_those_of_training(family, source):
    """fp32, max |difference| <= 1e-4 for saved states and for Jacobi with as many iterations as tokens, which starts from
    nothing that the rollout saved; without states it is more than 0.1."""
    net = attach_thinking(build(family), ThinkingConfig(thinking_source=source))
    tiny.loud_gates(backbone_of(net))
    ids = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(3))
    attention = torch.ones_like(ids)
    ids[1, :4], attention[1, :4] = 0, 0
    matcher = DelimiterMatcher(tiny.tokenizer(), "#")
    torch.manual_seed(1)
    out, trace = hybrid_generate(
        net,
        ids,
        matcher,
        attention_mask=attention,
        keep=("thinking_states", "hidden_states", "log_probs"),
        return_trace=True,
        max_new_tokens=8,
        do_sample=True,
        temperature=0.8,
        top_k=0,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert trace.thinking_mask.any()
    full = torch.cat([attention, torch.ones_like(out[:, 6:])], dim=1)
    inputs = {"input_ids": out, "attention_mask": full, "position_ids": (full.cumsum(-1) - 1).clamp(min=0)}
    if family == "bloom":  # distances, counted from the mask
        del inputs["position_ids"]
    warp = Warper(0.8, 0, 1.0, None)

    def log_probs(**thinking):
        logits = warp(net(**inputs, **thinking).logits[:, 5:-1])
        return logits.log_softmax(-1).gather(-1, out[:, 6:, None]).squeeze(-1)

    saved = ThinkingTrace(trace.thinking_mask, trace.thinking_states, trace.hidden_states)
    unsaved = ThinkingTrace(
        trace.thinking_mask, torch.zeros_like(trace.thinking_states), torch.zeros_like(trace.hidden_states)
    )
    modes = [("frozen", saved), ("jacobi", unsaved)] + [("rollout", saved)] * (source == "projection")
    for mode, kept in modes:
        found = log_probs(**thinking_keywords(net, mode, kept, warp, 9, **inputs))
        assert (found - trace.log_probs).abs().max() <= 1e-4, mode
    assert (log_probs() - trace.log_probs).abs().max() > 0.1
    hidden = previous_hidden(net, 8, **inputs)
    plain = net.get_output_embeddings()(hidden[:, 1:])
    logits = net(**inputs).logits[:, 6:-1]
    torch.testing.assert_close(plain / getattr(net.config, "logits_scaling", 1), logits, rtol=1e-5, atol=1e-5)


def test_the_states_of_two_pass_are_of_a_pass_without_thinking():
    """Projection states of plain hidden states, on a family that swallows keywords: 1e-6."""
    net = attach_thinking(build("bloom"))
    tiny.loud_gates(backbone_of(net))
    ids, mask = torch.randint(3, 40, (2, 9)), torch.ones(2, 4, dtype=torch.bool)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = thinking_keywords(net, "two_pass", ThinkingTrace(mask), Warper(1.0, 0, 1.0, None), 1, **inputs)
    hidden = net(**inputs, output_hidden_states=True).hidden_states[-1][:, 4:-1]
    states = project(backbone_of(net), found["thinking_hidden_states_cache"])
    torch.testing.assert_close(states, project(backbone_of(net), hidden), rtol=1e-6, atol=1e-6)
    given = net(**inputs, **found).logits
    wanted = net(**inputs, thinking_mask=mask, thinking_embeds=states).logits
    torch.testing.assert_close(given, wanted, rtol=1e-6, atol=1e-6)


def test_states_that_would_be_lost_are_refused_at_attach():
    """RoBERTa counts positions from ids, which are not there beside embeddings."""
    roberta = transformers.RobertaConfig(intermediate_size=64, is_decoder=True, **SMALL)
    net = transformers.RobertaForCausalLM(roberta).eval()
    with pytest.raises(ValueError, match="RobertaForCausalLM cannot think: its forward loses thinking states"):
        attach_thinking(net)
    assert not has_thinking(net) and not hasattr(net.base_model, "fuse_thinking")


def test_hidden_states_that_differ_are_refused_at_attach():
    net = tiny.model("llama")
    net.get_decoder().register_forward_hook(lambda _, __, out: type(out)(last_hidden_state=out.last_hidden_state * 2))
    net.lm_head.register_forward_pre_hook(lambda _, args: (args[0] / 2,))
    with pytest.raises(ValueError, match="LM head does not read its decoder's output"):
        attach_thinking(net)


def test_unknown_scaling_of_logits_is_refused_for_soft_embeddings():
    net = tiny.model("llama")
    net.register_forward_hook(lambda _, __, out: type(out)(logits=out.logits * 3))
    with pytest.raises(ValueError, match="scales its logits in a way"):
        attach_thinking(net, ThinkingConfig(thinking_source="soft_embedding"))
    attach_thinking(net)


def test_attaching_draws_as_before_and_leaves_the_mode():
    """The question is asked without the global generator, in evaluation mode."""
    net = tiny.model("llama").train()
    torch.manual_seed(0)
    attach_thinking(net)
    assert net.training
    found = backbone_of(net).thinking_residual_Lambda.Lambda.detach()
    torch.manual_seed(0)
    for _ in range(2):
        torch.nn.Linear(32, 32)
    from unsloth_ext.hrpo.residual import ThinkingResidualLambda

    assert torch.equal(found, ThinkingResidualLambda(32, 0.99, 0.999).Lambda)
