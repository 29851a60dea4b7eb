"""An evaluation before training. transformers prepares the model for it, and with DDP would never synchronise it again."""

import torch

from .launch import launch


def test_it_changes_nothing(tmp_path):
    """Weights of both processes, bit for bit. On FSDP2 transformers refuses it ("a model and optimizer must be passed")."""
    found = []
    for evaluate in (False, True):
        launch("ddp", "latent, sequential", tmp_path, evaluate=evaluate)
        found += [torch.load(tmp_path / f"ddp{rank}.pt") for rank in range(2)]
    first, *others = found
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())
