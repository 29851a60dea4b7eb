"""The classes that stand alone compute what the trainers compute."""

import pytest
import torch

from tests import tiny
from trl_ext import CODILoss, KAVALoss, KVDistillationLoss, LatentReasoningModule, RKVCompressor
from unsloth_ext import KVScoring, LatentModel, backbone_of, compress_kv

from . import setups


NOTE = {
    "num_latents": 4,
    "iterations": 3,
    "w_kv": 1.0,
    "w_codi": 10.0,
    "codi_loss": "l1",
    "codi_std_mode": "normalize_states",
    "codi_std_scope": "token",
    "kv_loss": "mse",
    "kv_std_mode": "normalize_states",
    "kv_projection": True,
    "update": "own",
    "feedback_residual": True,
    "projection": "linear",
}


def kept_in(seen: dict, name: str, method):
    def call(*args):
        seen[name] = (args, method(*args))
        return seen[name][1]

    return call


@pytest.mark.parametrize("layer_norm", [False, True])
def test_kava_loss_is_the_trainers(tmp_path, layer_norm):
    """The loss and each term, 1e-6 relative, from what the trainer's passes leave; projections that are no identity."""
    trainer = setups.trainer(tmp_path, kv_layer_norm=layer_norm, **NOTE)
    model, backbone = trainer.model.eval(), backbone_of(trainer.model)
    projection = backbone.latent_kv_projection
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    seen = {}
    for name in ("_teacher", "_student", "_kv_distance"):
        setattr(trainer, name, kept_in(seen, name, getattr(trainer, name)))
    wanted = trainer.compute_loss(model, dict(batch))
    logged = {k.removeprefix("loss/"): v[0] for k, v in trainer._metrics["eval"].items() if k.startswith("loss/")}

    loss = KAVALoss(use_layernorm=layer_norm, head_dim=8)
    loss.kv_loss.projection.load_state_dict(projection.modules_to_save["default"].state_dict())
    student, (teacher, kept) = seen["_student"][1], seen["_teacher"][1]
    rows = torch.arange(4)
    hidden = (
        [layer[rows, batch["student_at"]] for layer in student.hidden_states],
        [layer[rows, batch["teacher_at"] + 1] for layer in teacher.hidden_states],
    )
    latent_kv = seen["_kv_distance"][0][0]
    found, terms = loss(
        torch.tensor(logged["ce_student"]),
        torch.tensor(logged["ce_teacher"]),
        *hidden,
        latent_kv,
        [(layer.keys, layer.values) for layer in kept],
        kept[0].valid,
    )
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(logged, rel=1e-6)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6) and found.item() > 1


@pytest.mark.parametrize("peft", [True, False])
def test_the_projections_are_trained_saved_and_loaded(tmp_path, peft):
    tiny.model(std=0.1).save_pretrained(tmp_path / "base")
    tiny.tokenizer(()).save_pretrained(tmp_path / "base")
    trainer = setups.trainer(tmp_path, peft=peft, model=str(tmp_path / "base"), kv_layer_norm=True, **NOTE)
    moved = setups.trained(trainer)
    for part in ("kv_projection", "keys_norm", "values_norm", "latent_projection"):
        assert any(part in name for name in moved), part
    assert not any("lora" in name and "projection" in name for name in moved)
    trainer.save_model(str(tmp_path / "final"))
    again = LatentModel.from_pretrained(str(tmp_path / "final")).model
    for name in ("latent_kv_projection", "latent_projection"):
        ours, theirs = (getattr(backbone_of(m), name).state_dict() for m in (trainer.model, again))
        assert ours.keys() == theirs.keys() and all(
            torch.equal(ours[k], theirs[k]) for k in ours if "original" not in k
        )


def test_as_the_identity_it_changes_nothing(tmp_path):
    """At the start the projected distance is the plain one, 1e-6."""
    losses = []
    for projected in (False, True):
        trainer = setups.trainer(tmp_path / str(projected), **{**NOTE, "kv_projection": projected})
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        trainer.compute_loss(trainer.model.eval(), batch)
        losses.append(trainer._metrics["eval"]["loss/kv"][0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kv_projection": True}, "kv_projection=True with w_kv=0"),
        ({"kv_layer_norm": True, "w_kv": 1.0}, "kv_layer_norm=True.*kv_projection=True"),
        ({"projection": "cubic"}, "projection='cubic': choose one of mlp, linear"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        setups.trainer(tmp_path, **changes)


def test_codi_loss_is_scaled_by_each_vectors_own_deviation():
    """Layer by layer in fp64, 1e-6 relative; a list of layers and a stack are the same."""
    student, teacher = torch.randn(3, 4, 8), 2 * torch.randn(3, 4, 8)
    std = teacher.double().std(-1, keepdim=True)
    wanted = (student.double() / std - teacher.double() / std).abs().mean().item()
    assert CODILoss()(student, teacher).item() == pytest.approx(wanted, rel=1e-6)
    assert CODILoss()(list(student), list(teacher)) == CODILoss()(student, teacher)
    plain = CODILoss("mse", layerwise_std=False)(student, teacher).item()
    assert plain == pytest.approx((student - teacher).square().mean().item(), rel=1e-6)
    with pytest.raises(ValueError, match="loss_type='l3'"):
        CODILoss("l3")


def test_kv_loss_makes_its_projection_when_it_knows_the_width():
    kv = torch.randn(2, 3, 2, 4, 8), torch.randn(2, 3, 2, 4, 8)
    loss = KVDistillationLoss()
    assert loss(kv, kv).item() == 0 and loss.k_proj.weight.shape == (8, 8)
    assert {name for name, _ in loss.named_parameters()} == {
        f"projection.{side}.{part}" for side in ("keys", "values") for part in ("weight", "bias")
    }
    apart = KVDistillationLoss(use_projection=False, layerwise_std=False)(kv, (kv[0] + 1, kv[1]))
    assert apart.item() == pytest.approx(0.5, rel=1e-5)
    with pytest.raises(ValueError, match="use_layernorm=True"):
        KVDistillationLoss(use_projection=False, use_layernorm=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_refining_in_place_is_the_latent_phase(family):
    """T refinements that read the question anew, and the cached phase: 1e-5 (fp32); batched and padded."""
    module = LatentReasoningModule(tiny.model(family), 3, 2, tokenizer=tiny.tokenizer(()))
    assert (module.M, module.T) == (3, 2) and isinstance(module.latent_proj, torch.nn.Linear)
    module.eval()
    ids, mask = torch.randint(5, 40, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    latents = module.initial_latents(2)
    with torch.no_grad():
        for _ in range(module.T):
            latents = module.jacobi_iteration(ids, mask, latents)
        state = module(ids, mask)
    assert (state.latents - latents).abs().max() <= 1e-5 and latents.std() > 0.1
    assert LatentModel(module.model, module.tokenizer)
    with pytest.raises(ValueError, match="tokenizer: pass it"):
        LatentReasoningModule(tiny.model(family))


def test_compression_from_attention_weights_is_that_from_queries(tmp_path):
    """With a key-value head for each query head: the same keys, from the softmax over all keys, as eager attention has."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3, 12, 8), torch.randn(2, 3, 12, 8)
    queries = torch.randn(2, 3, 4, 8)
    steps = torch.arange(12) < torch.tensor([[9], [3]])
    answers = torch.arange(4) < torch.tensor([[4], [2]])
    weights = (queries @ keys.transpose(-1, -2) / 8**0.5).softmax(-1)
    compressor = RKVCompressor(num_latent_tokens=5, lambda_mix=0.9)
    found = compressor.compress(keys, values, weights, steps, answers)
    wanted = compress_kv(keys, values, queries, 5, KVScoring(mix_lambda=0.9), key_mask=steps, query_mask=answers)
    assert torch.equal(found.indices, wanted.indices) and torch.equal(found.keys, wanted.keys)
    assert torch.equal(found.valid, wanted.valid) and found.valid.sum(1).tolist() == [5, 3]
    importance = compressor.compute_importance_score(weights, steps, answers)
    assert (importance.sum(-1) - 1).abs().max() <= 1e-6 and not importance[~steps[:, None].expand_as(importance)].any()
    alone = compressor.compute_importance_score(weights[1:, :, :2], steps[1:])  # without the answer's padding
    assert (importance[1:] - alone).abs().max() <= 1e-6
    for nothing in ((steps & False, answers), (steps, answers & False)):
        assert not compressor.compute_importance_score(weights, *nothing).any()
    grouped = compressor.compute_importance_score(torch.cat([weights, weights], 1), steps, answers, 3)
    assert grouped.shape == importance.shape
    for bad in ({"num_latent_tokens": 0}, {"lambda_mix": 2.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RKVCompressor(**bad)


@pytest.mark.parametrize("smaller", [(1, 2, 2, 5, 8), (3, 1, 2, 5, 8), (3, 2, 1, 5, 8), (3, 2, 2, 1, 8)])
def test_tensors_of_two_shapes_are_not_repeated(smaller):
    """Of one layer, row, head or position in the place of several."""
    few, many = torch.ones(smaller), torch.ones(3, 2, 2, 5, 8)
    for student, teacher in ((few, many), (many, few)):
        with pytest.raises(ValueError, match=r"the student's \(.*\) and the teacher's \(.*\) need one shape"):
            KVDistillationLoss(use_projection=False)((student, student), (teacher, teacher))
        with pytest.raises(ValueError, match=r"the student's \(.*\) and the teacher's \(.*\) need one shape"):
            CODILoss()(student.flatten(1, 3), teacher.flatten(1, 3))
