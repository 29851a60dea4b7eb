"""Gradients under PEFT: they reach LoRA, the latent tokens' embeddings and the projection, through every iteration."""

import pytest
import torch

from unsloth_ext import backbone_of, latent_phase

from . import setups


def student_loss(trainer, batch, intervene=None) -> torch.Tensor:
    """The answer's cross-entropy after the latent phase."""
    model = trainer.model
    state = latent_phase(model, batch["question_ids"], batch["question_mask"], intervene)
    logits = trainer._student(model, state, batch).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:])


@pytest.mark.parametrize("settings", [{"num_latents": 3, "iterations": None}, {"num_latents": 4, "iterations": 3}])
def test_every_pass_and_every_trained_part_gets_its_gradient(tmp_path, settings):
    """Directional derivatives against central differences of 1e-4, to 1e-3 (norms run in fp32); each pass's inputs
    have a gradient of their own."""
    trainer = setups.trainer(tmp_path, projection_dim=16, **settings)
    model = trainer.model.double().eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    with torch.no_grad():  # LoRA starts at zero, where half of its gradients are
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)

    passes = []

    def record(z: torch.Tensor) -> torch.Tensor:
        z.retain_grad()
        passes.append(z)
        return z

    student_loss(trainer, batch, record).backward()
    assert len(passes) == 3 and all(z.grad is not None and z.grad.abs().max() > 0 for z in passes)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = {
        "LoRA A": [n for n in trained if "lora_A" in n],
        "LoRA B": [n for n in trained if "lora_B" in n],
        "embeddings": [n for n in trained if "trainable_tokens_delta" in n],
        "projection": [n for n in trained if "latent_projection" in n],
    }
    assert sum(map(len, groups.values())) == len(trained) and all(groups.values())
    gradients = {name: trained[name].grad.clone() for name in trained}
    (tokens,) = {gradients[name].shape[0] for name in groups["embeddings"]}
    assert tokens == 3 and all((gradients[n].abs().amax(-1) > 0).all() for n in groups["embeddings"])
    assert len(backbone_of(model).latent_token_ids) == 3
    for group, names in groups.items():
        directions = {name: torch.randn_like(trained[name]) for name in names}
        expected = sum((gradients[name] * directions[name]).sum() for name in names)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for name in names:
                    trained[name].add_(directions[name], alpha=sign * 1e-4)
                values.append(student_loss(trainer, batch))
                for name in names:
                    trained[name].sub_(directions[name], alpha=sign * 1e-4)
        found = (values[0] - values[1]) / 2e-4
        assert (found - expected).abs() <= 1e-3 * expected.abs() + 1e-4, (group, found, expected)
