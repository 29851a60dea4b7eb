"""Feedback that adds to the previous input, slot by slot, in both ways of updating; whole texts, no cache, one row."""

import pytest
import torch

from unsloth_ext import backbone_of
from unsloth_ext.latent.phase import latent_phase, project_latent

from .test_phase import make, questions


@torch.no_grad()
def literal(model, question, update, residual):
    backbone = backbone_of(model)
    config, (bot, latent, _) = backbone.latent_config, backbone.latent_token_ids
    embed = backbone.get_input_embeddings()
    front = embed(torch.cat([question, torch.tensor([bot])]))
    z = embed(torch.full((config.num_latents,), latent))
    fixed = None
    for t in range(1 + config.iterations):
        hidden = backbone(inputs_embeds=torch.cat([front, z])[None]).last_hidden_state[0]
        if t == config.iterations:
            return z, hidden[-config.num_latents :]
        made = project_latent(backbone, hidden)
        slots = [fixed] if fixed is not None and update == "shifted" else []
        for j in range(len(slots), config.num_latents):
            at = len(front) + j - (update == "shifted")  # the position whose output becomes the input of slot j
            slots.append(made[at] + z[j] if residual else made[at])
        z = torch.stack(slots)
        fixed = z[0]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("update", ["shifted", "own"])
def test_latents_are_those_of_the_literal_loop(update, residual):
    """1e-5 (fp32). The first latent token of `shifted` reads <bot> alone: once made, it stays."""
    model = make(update=update, feedback_residual=residual)
    ids, mask = questions()
    with torch.no_grad():
        state = latent_phase(model, ids, mask)
    for row in range(3):
        z, hidden = literal(model, ids[row, mask[row].bool()], update, residual)
        torch.testing.assert_close(state.latents[row], z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.hidden_states[row], hidden, rtol=1e-5, atol=1e-5)
