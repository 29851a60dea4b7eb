"""The tap sees what eager attention sees, changes nothing, and collects each layer's compressed trace."""

import pytest
import torch

from tests import tiny
from unsloth_ext import backbone_of
from unsloth_ext.common.attention_tap import attention_tap
from unsloth_ext.kv_compression.compression import KVScoring, compress_kv
from unsloth_ext.kv_compression.trace import compressed_trace


FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")


def batch():
    ids = torch.randint(3, 60, (3, 21), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, 18:] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_seen_makes_eager_attention(family):
    """softmax(q k / sqrt(D)) of the tapped tensors is `output_attentions` of the eager model, to 5e-6 (fp32; both
    models carry their own rounding from layer to layer)."""
    model, inputs = tiny.model(family), batch()
    seen = []
    with attention_tap(model, lambda layer, q, k, v: seen.append((layer, q, k))):
        tapped = model(**inputs).logits
    assert torch.equal(tapped, model(**inputs).logits), "the tap must change nothing"
    model.set_attn_implementation("eager")
    eager = model(**inputs, output_attentions=True).attentions
    assert [layer for layer, _, _ in seen] == list(range(len(eager)))
    causal = torch.ones(21, 21, dtype=torch.bool).tril() & inputs["attention_mask"].bool()[:, None, None]
    real = inputs["attention_mask"].bool()[:, None, :, None]
    for (_, q, k), attention in zip(seen, eager, strict=True):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        ours = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~causal, -1e30).softmax(-1)
        assert ((ours - attention) * real).abs().max() <= 5e-6


@pytest.mark.parametrize("scorer", ["kava", "rkv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressed_trace_is_that_of_each_row_alone(family, scorer):
    """Ragged questions, traces and answers; values to 1e-5, choices equal (fp32). GQA where the family has it."""
    model, inputs = tiny.model(family), batch()
    trace, answer = (torch.zeros(3, 21, dtype=torch.bool) for _ in range(2))
    trace[0, 8:18], answer[0, 18:21] = True, True
    trace[1, 3:16], answer[1, 16:18] = True, True
    trace[2, 12:15], answer[2, 15:19] = True, True
    scoring = KVScoring(scorer, window=2)
    with compressed_trace(model, trace, answer, 6, scoring) as layers:
        model(**inputs)
    assert len(layers) == model.config.num_hidden_layers
    assert layers[0].valid.sum(-1).tolist() == [6, 6, 3]
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = []

        def look(_, q, k, v, alone=alone, t=trace[row, real], a=answer[row, real]):
            alone.append(compress_kv(k[:, :, t], v[:, :, t], q[:, :, a], 6, scoring))

        with attention_tap(model, look):
            model(input_ids=inputs["input_ids"][row : row + 1, real])
        for ours, single in zip(layers, alone, strict=True):
            assert (ours.keys[row] - single.keys[0]).abs().max() <= 1e-5
            assert (ours.values[row] - single.values[0]).abs().max() <= 1e-5
            assert torch.equal(ours.valid[row], single.valid[0])


def test_a_tap_closes_after_an_error_and_needs_sdpa():
    model = tiny.model()
    with pytest.raises(KeyError), attention_tap(model, lambda *_: None):
        raise KeyError
    assert backbone_of(model).config._attn_implementation == "sdpa"
    seen = []
    model(**batch())
    assert not seen
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation='eager'"), attention_tap(model, lambda *_: None):
        pass


@pytest.mark.parametrize("scorer", ["kava", "rkv", "uniform"])
def test_a_row_without_a_trace_keeps_nothing(scorer):
    inputs, answer = batch(), torch.zeros(3, 21, dtype=torch.bool)
    answer[:, 17] = True
    trace = torch.zeros_like(answer)
    with (
        pytest.raises(ValueError, match="no attention is observed in layers 0 to 1"),
        compressed_trace(tiny.model(), trace, answer, 9, KVScoring(scorer)) as layers,
    ):
        tiny.model()(**inputs)
    assert not layers
    model = tiny.model()
    for filled in (False, True):
        trace[0, 5:9] = filled
        with compressed_trace(model, trace, answer, 9, KVScoring(scorer)) as layers:
            model(**inputs)
        assert layers[0].valid.sum(-1).tolist() == [4 * filled, 0, 0]
        assert torch.isfinite(layers[0].keys).all() and (layers[0].keys[1:] == 0).all()


def test_a_row_without_queries_is_named():
    trace = torch.ones(2, 5, dtype=torch.bool)
    answer = torch.tensor([[False] * 4 + [True], [False] * 5])
    with (
        pytest.raises(ValueError, match="query_mask has no token in row 1"),
        compressed_trace(tiny.model(), trace, answer, 3),
    ):
        pass
