"""The benchmark's peer decodes what we decode: only its way there differs."""

import sys
from pathlib import Path

import torch

from tests import tiny
from unsloth_ext import DelimiterMatcher, ThinkingConfig, attach_thinking, backbone_of, hybrid_generate
from unsloth_ext.hrpo.decoding import hybrid_decode


def test_the_literal_peer_samples_the_same_tokens(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "public_algorithm", raising=False)
    from public_algorithm import LiteralSession

    tokenizer = tiny.tokenizer()
    model = attach_thinking(tiny.model(), ThinkingConfig(thinking_source="soft_embedding"))
    tiny.loud_gates(backbone_of(model))
    matcher = DelimiterMatcher(tokenizer, "#", 64)
    ids = torch.randint(3, 40, (8, 7))
    common = {"max_new_tokens": 24, "do_sample": True, "top_k": 4, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(1)
    ours, trace = hybrid_generate(model, ids, matcher, attention_mask=torch.ones_like(ids), return_trace=True, **common)
    session = LiteralSession(model, matcher, tokenizer)
    torch.manual_seed(1)
    theirs = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), custom_generate=hybrid_decode, hybrid=session, **common
    )
    assert torch.equal(ours, theirs)
    assert trace.thinking_mask.any() and not trace.thinking_mask.all()
