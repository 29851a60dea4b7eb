"""Thinking states against plain references written from the formulas."""

import pytest
import torch
from transformers import GenerationConfig

from tests import tiny
from unsloth_ext import ThinkingConfig, attach_thinking, backbone_of, project, soft_embedding
from unsloth_ext.hrpo.states import Warper


@pytest.mark.parametrize("norm", ["unit", "embedding_rms", "none"])
def test_projection(norm):
    net = attach_thinking(tiny.model(), ThinkingConfig(thinking_norm=norm))
    backbone = backbone_of(net)
    h = torch.randn(3, 5, 32)
    wh = h @ backbone.thinking_projection.weight.T
    unit = wh / (wh.norm(dim=-1, keepdim=True) + 1e-8)
    rms = backbone.get_input_embeddings().weight.pow(2).sum(-1).mean().sqrt()
    expected = {"unit": unit, "embedding_rms": unit * rms, "none": wh}[norm]
    torch.testing.assert_close(project(backbone, h), expected, rtol=1e-5, atol=1e-6)


def test_soft_embedding_reads_few_rows_and_equals_the_dense_product():
    embedding = torch.nn.Embedding(500, 16)
    scores = Warper(0.7, 20, 0.9, 0.01)(torch.randn(6, 500) * 3)
    probs = scores.softmax(-1)
    expected = probs @ embedding.weight / probs.pow(2).sum(-1, keepdim=True).sqrt()
    count = int((probs > 0).sum(-1).max())
    assert count <= 20
    torch.testing.assert_close(soft_embedding(embedding, probs, count), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(soft_embedding(embedding, probs), expected, rtol=1e-5, atol=1e-6)


SAMPLING = [
    {"temperature": 0.6, "top_k": 7, "top_p": 0.8, "min_p": 0.05},
    {"top_k": 7, "top_p": 1.0},
    {"top_k": 0, "top_p": 0.8},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.3},
    {"top_k": 0, "top_p": 1.0, "temperature": 0.6},
]


@pytest.mark.parametrize("sampling", SAMPLING)
def test_warper_is_what_generate_samples_from(sampling):
    """Each setting by itself too, where no other hides it."""
    net = tiny.model().eval()
    config = GenerationConfig(**sampling, do_sample=True)
    out = net.generate(
        torch.randint(3, 40, (4, 6)),
        generation_config=config,
        max_new_tokens=1,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    assert torch.equal(Warper.of(config)(out.logits[0]), out.scores[0])
    assert not torch.equal(out.logits[0], out.scores[0])
    assert Warper.of(config).truncates == out.scores[0].isinf().any()
