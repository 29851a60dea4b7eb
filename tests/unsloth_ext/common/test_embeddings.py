"""How large input embeddings are."""

import torch

from tests import tiny
from unsloth_ext import backbone_of
from unsloth_ext.common.embeddings import embedding_norm


def test_the_norm_of_narrow_embeddings_is_not_rounded_on_the_way():
    """1e-6: squares of bfloat16 have three digits."""
    net = tiny.model(dtype=torch.bfloat16)
    weight = net.get_input_embeddings().weight.detach().double()
    wanted = weight.norm(dim=-1).square().mean().sqrt()
    assert abs(embedding_norm(backbone_of(net)) / wanted - 1) <= 1e-6
