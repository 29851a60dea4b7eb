"""The losses against the official code of CODI and PCCoT and brute-force KaVa (golden tensors)."""

import pytest
import torch

from tests.golden.load import load, model_of
from trl_ext.latent.losses import codi_loss, cross_entropy, kv_loss, latent_targets, masked_mean, std_of
from unsloth_ext import backbone_of
from unsloth_ext.latent.config import LatentConfig, LatentProjection
from unsloth_ext.latent.phase import latent_phase


def answer(model, state, ids, mask):
    """The pass over <eot> and the answer."""
    full = torch.cat([state.attention_mask, mask], dim=1)
    return model(
        input_ids=ids,
        attention_mask=full,
        position_ids=(full.cumsum(-1) - 1)[:, -ids.shape[1] :],
        past_key_values=state.cache,
        output_hidden_states=True,
    )


def at(hidden_states, positions):
    """(L, B, d): one position a row from every layer."""
    hidden = torch.stack(hidden_states)
    return hidden[:, torch.arange(hidden.shape[1]), positions]


def check_and_backward(losses, case):
    """Each to 1e-6, their sum to 2e-6 (three roundings)."""
    for key, value in losses.items():
        assert abs(value - case[f"out.{key}"]) <= 1e-6, key
    total = sum(losses.values())
    assert abs(total - case["out.loss"]) <= 2e-6
    total.backward()


@pytest.mark.parametrize("name", ["pccot_gpt2_T3_c5_eq", "pccot_gpt2_T5_c5_eq_sequential"])
def test_pccot_losses(name):
    """To 1e-6, the gradient to 1e-5 (fp32). The official latents attend left pads, whose own attention is masked entirely:
    what gradient passes through such a row is up to the version of transformers, so of the attention's weights the value
    part is compared, which that does not touch."""
    case, config = load(name)
    model = model_of(case, "gpt2")
    question, latents, kd = case["in.key_indices"].tolist()
    ids, mask = case["in.input_ids"], case["in.attention_mask"]
    backbone = backbone_of(model)
    backbone.latent_config = LatentConfig(config["c"], config["T"])
    backbone.latent_token_ids = tuple(int(ids[0, i]) for i in (question - 1, question, latents))
    teacher = model(
        input_ids=case["in.cot_input_ids"], attention_mask=case["in.cot_attention_mask"], output_hidden_states=True
    )
    state = latent_phase(model, ids[:, : question - 1], mask[:, : question - 1], attend_pads=True)
    student = answer(model, state, ids[:, latents:], mask[:, latents:])
    distill = codi_loss(
        at(student.hidden_states[1:], torch.full((3,), kd)),
        at(teacher.hidden_states[1:], case["in.cot_kd_indices"]),
        std_scope="layer",
    )
    losses = {
        "ccot_loss": cross_entropy(student.logits, case["in.labels"]),
        "cot_loss": cross_entropy(teacher.logits, case["in.cot_labels"]),
        "kd_loss": distill,
    }
    check_and_backward(losses, case)
    for key in (k for k in case if k.startswith("grad.")):
        assert key.endswith("c_attn.weight")
        assert (model.get_parameter(key[5:]).grad - case[key])[:, 64:].abs().max() <= 1e-5


def test_codi_losses():
    """To 1e-6, gradients to 1e-5 (fp32), with the official projection."""
    case, _ = load("codi_gpt2_equal_len_tf5")
    model = model_of(case, "gpt2", prefix="w.codi.")
    backbone = backbone_of(model)
    backbone.latent_config = LatentConfig(
        num_latents=case["mid.latent_hidden"].shape[1], iterations=None, projection_dim=48
    )
    projection = LatentProjection(32, backbone.latent_config)
    projection.load_state_dict({k[6:].replace("ln.", "4."): v for k, v in case.items() if k.startswith("w.prj.")})
    backbone.latent_projection = projection.eval()
    question, ids = case["in.encoder_input_ids"], case["in.decoder_input_ids"]
    backbone.latent_token_ids = (int(question[0, -1]), -1, int(ids[0, 0]))
    teacher = model(input_ids=case["in.ref_input_ids"], output_hidden_states=True)
    state = latent_phase(model, question[:, :-1], torch.ones_like(question[:, :-1]))
    student = answer(model, state, ids, torch.ones_like(ids))
    distill = codi_loss(
        at(student.hidden_states, case["in.model_answer_position"] - 1),
        at(teacher.hidden_states, case["in.ref_answer_position"] - 1),
    )
    losses = {
        "ce_loss": cross_entropy(student.logits, case["in.labels"]),
        "ref_ce_loss": cross_entropy(teacher.logits, case["in.ref_labels"]),
        "distill_loss": distill,
    }
    check_and_backward(losses, case)
    for key in (k for k in case if k.startswith("grad.")):
        name = key[5:]
        ours = (
            projection.get_parameter(name[4:].replace("ln.", "4."))
            if name.startswith("prj.")
            else model.get_parameter(name.removeprefix("codi."))
        )
        assert (ours.grad - case[key]).abs().max() <= 1e-5, key


def codi_llama():
    """The official Llama case, its model with the projection, and where each side predicts the answer's first token."""
    case, config = load("codi_llama_smoothl1_std_f20_tf5")
    model = model_of(case, "llama", prefix="w.codi.")
    backbone = backbone_of(model)
    backbone.latent_config = LatentConfig(case["mid.latent_hidden"].shape[1], None, projection_dim=48)
    projection = LatentProjection(32, backbone.latent_config)
    projection.load_state_dict({k[6:].replace("ln.", "4."): v for k, v in case.items() if k.startswith("w.prj.")})
    backbone.latent_projection = projection.eval()
    backbone.latent_token_ids = (int(case["in.encoder_input_ids"][0, -1]), -1, int(case["in.decoder_input_ids"][0, 0]))
    return case, config, model


def test_codi_losses_on_llama():
    """Of the whole ragged batch, from the official logits and selected states: each loss to 1e-6."""
    case, config, _ = codi_llama()
    distill = codi_loss(case["mid.student_sel"], case["mid.teacher_sel"]) * config["distill_loss_factor"]
    ce = cross_entropy(case["out.logits"], case["in.labels"])
    reference = cross_entropy(case["out.ref_logits"], case["in.ref_labels"])
    assert abs(ce - case["out.ce_loss"]) <= 1e-6 and abs(reference - case["out.ref_ce_loss"]) <= 1e-6
    assert abs(distill - case["out.distill_loss"]) <= 4e-6  # 20 times a smaller number
    assert abs(ce + reference + distill - case["out.loss"]) <= 5e-6


def test_codi_is_the_official_code_on_llama():
    """Latent hidden states, logits and selected states to 1e-5 (fp32), of the row without pads: in the others the official
    latents attend to pads. On Llama it selects the token after the one that predicts the answer."""
    case, _, model = codi_llama()
    (row,) = case["in.encoder_attention_mask"].all(-1).nonzero().flatten().tolist()
    question, ids = case["in.encoder_input_ids"][row : row + 1, :-1], case["in.decoder_input_ids"][row : row + 1]
    real = case["in.ref_attention_mask"][row].bool()
    with torch.no_grad():
        state = latent_phase(model, question, torch.ones_like(question))
        student = answer(model, state, ids, torch.ones_like(ids))
        teacher = model(input_ids=case["in.ref_input_ids"][row : row + 1, real], output_hidden_states=True)
    assert (state.hidden_states[0] - case["mid.latent_hidden"][row]).abs().max() <= 1e-5
    assert (student.logits[0] - case["out.logits"][row]).abs().max() <= 1e-5
    assert (teacher.logits[0] - case["out.ref_logits"][row, real]).abs().max() <= 1e-5
    found = at(student.hidden_states, case["in.model_answer_position"][row : row + 1])
    assert (found - case["mid.student_sel"][:, row, None]).abs().max() <= 1e-5
    found = at(teacher.hidden_states, case["in.ref_answer_position"][row : row + 1])
    assert (found - case["mid.teacher_sel"][:, row, None]).abs().max() <= 1e-5


@pytest.mark.parametrize("masked", ["", "_masked"])
@pytest.mark.parametrize(
    "mode, ours", [("none", "none"), ("teacher", "divide_loss"), ("normalize", "normalize_states")]
)
@pytest.mark.parametrize("loss", ["l1", "mse", "smooth_l1"])
def test_kv_losses(loss, mode, ours, masked):
    """To 1e-6 (fp32)."""
    case, _ = load("kava_scores")
    student, teacher, valid = (case[f"loss_{k}"].transpose(0, 1) for k in ("ks", "kt", "valid"))
    valid = valid.bool() if masked else torch.ones_like(valid, dtype=torch.bool)
    value = kv_loss(student, teacher, valid, loss=loss, std_mode=ours)
    assert abs(value - case[f"loss_{loss}_{mode}{masked}"]) <= 1e-6


def test_a_student_ten_times_the_teacher_is_seen():
    teacher = torch.randn(2, 3, 2, 4, 8)
    valid = torch.ones(3, 4, dtype=torch.bool)
    for mode in ("none", "divide_loss", "normalize_states"):
        assert kv_loss(10 * teacher, teacher, valid, loss="mse", std_mode=mode) > 10


def test_slots_that_no_teacher_fills_have_no_weight_and_no_gradient():
    student = torch.randn(2, 3, 2, 4, 8, requires_grad=True)
    valid = torch.tensor([[True, True, False, False]] * 3)
    kv_loss(student, torch.randn(2, 3, 2, 4, 8), valid, std_mode="divide_loss").backward()
    assert (student.grad[:, :, :, 2:] == 0).all() and (student.grad[:, :, :, :2] != 0).any()
    nothing = kv_loss(student, torch.zeros(2, 3, 2, 4, 8), torch.zeros(3, 4, dtype=torch.bool))
    assert nothing == 0


@pytest.mark.parametrize("scope", ["layer", "global", "token"])
@pytest.mark.parametrize("mode", ["divide_loss", "normalize_states", "none"])
@pytest.mark.parametrize("loss", ["smooth_l1", "l1", "mse"])
def test_two_processes_give_what_one_gives(loss, mode, scope):
    """Their mean is the loss of the whole batch, to 1e-6; rows and tokens split unevenly (fp32)."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 8)
    logits, labels = torch.randn(5, 6, 11), torch.randint(0, 11, (5, 6))
    labels[3:, 2:] = -100
    keys, kept, valid = *torch.randn(2, 3, 5, 2, 4, 8), torch.rand(5, 4) > 0.3
    parts = (slice(0, 2), slice(2, 5))

    def all_of(rows, all_sum):
        return torch.stack(
            [
                codi_loss(
                    student[:, rows], teacher[:, rows], loss=loss, std_mode=mode, std_scope=scope, all_sum=all_sum
                ),
                cross_entropy(logits[rows], labels[rows], all_sum),
                kv_loss(keys[:, rows], kept[:, rows], valid[rows], loss=loss, std_mode=mode, all_sum=all_sum),
            ]
        )

    # Every process makes the same calls: replay them until each sum has met its partner's
    sums: list[torch.Tensor] = []
    while True:
        seen = []
        for rows in parts:
            calls = []

            def all_sum(x, calls=calls):
                calls.append(x.clone())
                return sums[len(calls) - 1] if len(calls) <= len(sums) else x

            result = all_of(rows, all_sum)
            seen.append((calls, result))
        if len(sums) == len(seen[0][0]):
            break
        sums.append(seen[0][0][len(sums)] + seen[1][0][len(sums)])
    mean = torch.stack([result for _, result in seen]).mean(0)
    assert (mean - all_of(slice(None), lambda x: x)).abs().max() <= 1e-6


def test_means_and_deviations_are_torchs():
    values = torch.randn(4, 5)
    mask = torch.rand(4, 5) > 0.4
    assert abs(std_of(values, mask) - values[mask].std()) <= 1e-6
    assert abs(masked_mean(values, mask) - values[mask].mean()) <= 1e-6


@pytest.mark.parametrize("loss", ["mse", "l1", "smooth_l1"])
@pytest.mark.parametrize("scope", ["layer", "global", "token"])
def test_codi_is_divided_by_the_unit_of_its_loss(loss, scope):
    """Row by row in fp64: a squared distance by the variance, the others by the standard deviation; 1e-5 relative. The
    teacher's standard deviation is 3, far from 1, where the two would be the same."""
    student, teacher = torch.randn(2, 4, 8), 3 * torch.randn(2, 4, 8)
    found = codi_loss(student, teacher, loss=loss, std_mode="divide_loss", std_scope=scope)
    total = 0.0
    for layer in range(2):
        for row in range(4):
            of = {"layer": teacher[layer], "global": teacher, "token": teacher[layer, row]}[scope].double().std()
            apart = (student - teacher)[layer, row].double()
            each = {"mse": apart**2 / of**2, "l1": apart.abs() / of}.get(loss)
            if each is None:
                each = torch.where(apart.abs() < 1, apart**2 / 2, apart.abs() - 0.5) / of
            total += each.sum().item()
    assert found.item() == pytest.approx(total / student.numel(), rel=1e-5)


@pytest.mark.parametrize(
    "which, lengths, wanted",
    [
        ("spread", (7, 3, 0), [[10, 11, 13, 15], [20, 21, 22, -100], [-100] * 4]),
        ("first", (7, 3, 0), [[10, 11, 12, 13], [20, 21, 22, -100], [-100] * 4]),
        ("spread", (2, 3, 0), [[10, 11, -100, -100], [20, 21, 22, -100], [-100] * 4]),
    ],
)
def test_which_token_a_latent_token_stands_for(which, lengths, wanted):
    """Steps of seven, three and no tokens, and four latent tokens: floor(7 j / 4) is 0, 1, 3, 5."""
    trace = torch.arange(max(lengths)) + torch.tensor([[10], [20], [30]])
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    assert latent_targets(trace, mask.long(), 4, which).tolist() == wanted
