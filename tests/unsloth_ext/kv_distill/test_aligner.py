"""The note's snippets, both directions, layers and shapes, real models of three families, a fresh process."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.processes import fresh
from unsloth_ext import (
    AttentionShape,
    MapProjectionAligner,
    SegmentTimeWarper,
    captured_kvq,
    create_flat_aligner,
    create_reasoning_focused_warper,
    create_structural_loss,
    create_structured_aligner,
)
from unsloth_ext.kv_distill.capture import stacked
from unsloth_ext.kv_distill.shapes import teacher_layers


ROPE = {"rope_theta": 1e4, "max_position_embeddings": 256}
TEACHER = AttentionShape(6, 12, 4, 16, ROPE)
STUDENT = AttentionShape(3, 8, 2, 8, ROPE)
IDS = torch.tensor([[0] * 6 + [1] * 10 + [2] * 4, [0] * 3 + [1] * 5 + [2] * 2 + [-1] * 10])


def kvq(shape, times=20, seed=0, layers=None):
    torch.manual_seed(seed)
    layers = layers or shape.num_layers
    k, v = (torch.randn(2, layers, shape.num_kv_heads, times, shape.head_dim) for _ in range(2))
    return k, v, torch.randn(2, layers, shape.num_heads, times, shape.head_dim)


def shapes(tensors):
    return [tuple(x.shape) for x in tensors]


@pytest.mark.parametrize("create", [create_structured_aligner, create_flat_aligner])
@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
def test_the_notes_snippet_runs_as_written(create, direction):
    aligner = create(TEACHER, STUDENT, direction=direction)
    k_t, v_t, q_t = kvq(TEACHER)
    k_s, v_s, q_s = aligner(k_t, v_t, q_t, IDS)
    assert shapes((k_s, v_s, q_s)) == [(2, 3, 2, 20, 8), (2, 3, 2, 20, 8), (2, 3, 8, 20, 8)]
    assert k_s.requires_grad == (direction == "teacher_to_student")
    s_k, s_v, s_q = kvq(STUDENT, seed=1)
    loss_fn = create_structural_loss(alpha_k=1.0, alpha_v=1.0, alpha_attn=0.5, temperature=1.0)
    loss, metrics = loss_fn(s_k, s_v, s_q, k_s, v_s, q_s)
    assert loss.isfinite() and {"k", "v", "attn", "target_std_k", "target_rank_v"} <= metrics.keys()
    warped = create_reasoning_focused_warper()(k_t, IDS, T_s=50)
    assert warped.shape == (2, 6, 4, 50, 16)
    aligner.time_warper = create_reasoning_focused_warper()
    assert shapes(aligner(k_t, v_t, q_t, IDS, T_s=50))[0] == (2, 3, 2, 50, 8)
    assert aligner(k_t, v_t)[2] is None


def test_one_field_switches_between_the_modes():
    for mode, create in (("structured", create_structured_aligner), ("flat", create_flat_aligner)):
        torch.manual_seed(0)
        switched = create_structured_aligner(TEACHER, STUDENT, mode=mode)
        torch.manual_seed(0)
        wanted = create(TEACHER, STUDENT)
        assert switched.to_dict() == wanted.to_dict() and switched.to_dict()["mode"] == mode
        assert all(torch.equal(x, y) for x, y in zip(switched(*kvq(TEACHER), IDS), wanted(*kvq(TEACHER), IDS)))
    with pytest.raises(ValueError, match="mode='round'"):
        create_structured_aligner(TEACHER, STUDENT, mode="round")


@pytest.mark.parametrize("mode", ["structured", "flat"])
@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
@pytest.mark.parametrize("length", [None, 13, 32])
def test_pairs_meet_in_the_shape_of_the_side_that_is_not_projected(mode, direction, length):
    aligner = MapProjectionAligner(TEACHER, STUDENT, mode, direction)
    s, t, mask = aligner.pairs(kvq(STUDENT), kvq(TEACHER, layers=3), IDS, T_s=length)
    target = TEACHER if direction == "student_to_teacher" else STUDENT
    times = length or 20
    kv, q = (2, 3, target.num_kv_heads, times, target.head_dim), (2, 3, target.num_heads, times, target.head_dim)
    assert shapes(s) == shapes(t) == [kv, kv, q]
    assert mask.sum(1).tolist() == ([20, 10] if length is None else [length, length])
    learnt, fixed = (s, t) if direction == "student_to_teacher" else (t, s)
    assert all(x.requires_grad for x in learnt) and not any(x.requires_grad for x in fixed)


@pytest.mark.parametrize("space", ["rerotate", "pre", "post"])
@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
def test_equal_shapes_and_the_identity_change_nothing(space, direction):
    """1e-5, both ways; without rotary embedding only in "pre", which takes it off."""
    aligner = create_structured_aligner(TEACHER, TEACHER, direction=direction, rope_space=space, frozen=True)
    given = kvq(TEACHER)
    for ours, theirs in zip(aligner(*given), given, strict=True):
        same = (ours - theirs).abs().max() <= 1e-5
        assert same == (space != "pre" or theirs is given[1])
    s, t, mask = aligner.pairs(given, given, IDS)
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(s, t, strict=True))
    loss, _ = create_structural_loss()(*s, *t, mask)
    assert loss.abs() <= 1e-5


def test_layer_maps():
    assert teacher_layers("uniform", 28, 28) == list(range(28))
    assert teacher_layers("uniform", 6, 3) == [0, 2, 4] and teacher_layers("uniform", 2, 4) == [0, 0, 1, 1]
    assert teacher_layers("uniform", 7, 3) == [0, 2, 4] and teacher_layers("last", 7, 3) == [4, 5, 6]
    k, v, q = kvq(TEACHER)
    chosen = create_structured_aligner(TEACHER, STUDENT, layer_map=[0, 0, 5], direction="teacher_to_student")
    out = chosen(k, v, q)[1]
    assert torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(out[:, 2:], chosen.maps["v"](v[:, 5:]))
    for wrong in ([0, 1], [0, 1, 6], "first", [0.5, 1, 2]):
        with pytest.raises(ValueError, match="layer_map="):
            create_structured_aligner(TEACHER, STUDENT, layer_map=wrong)
    with pytest.raises(ValueError, match="'last'"):
        teacher_layers("last", 2, 3)


@pytest.mark.parametrize("mode", ["structured", "flat"])
def test_what_pads_hold_never_matters(mode):
    """Loss and gradients, exactly."""
    aligner = MapProjectionAligner(TEACHER, STUDENT, mode)
    s, t = kvq(STUDENT), kvq(TEACHER, layers=3, seed=1)
    found = []
    for value in (0.0, 7.0):
        spoiled = [tuple(x.masked_fill((IDS < 0)[:, None, None, :, None], value) for x in side) for side in (s, t)]
        aligner.zero_grad()
        s_, t_, mask = aligner.pairs(*spoiled, IDS)
        loss, metrics = create_structural_loss(alpha_norm=0.3)(*s_, *t_, mask)
        loss.backward()
        found.append([loss.detach(), *metrics.values(), *(p.grad for p in aligner.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("side", [0, 1])
def test_a_row_in_a_batch_is_the_row_alone(side):
    """1e-5, padded on the left or the right."""
    aligner = create_structured_aligner(TEACHER, STUDENT)
    s, t = kvq(STUDENT), kvq(TEACHER, layers=3, seed=1)
    ids = IDS if side else IDS.flip(1).sub(0).where(IDS.flip(1) < 0, IDS.flip(1))
    together = aligner.pairs(s, t, ids)
    real = ids[1] >= 0
    alone = aligner.pairs(*[tuple(x[1:, :, :, real] for x in pair) for pair in (s, t)], ids[1:, real])
    for both, single in zip(together[:2], alone[:2], strict=True):
        for a, b in zip(both, single, strict=True):
            torch.testing.assert_close(a[1:, :, :, real], b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("teacher_family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("student_family", ["llama", "qwen2", "qwen3"])
def test_caches_of_real_models_meet(teacher_family, student_family):
    """What is captured is what a cache holds (exactly), with gradients that reach the student's embeddings."""
    config = tiny.config(teacher_family)
    config.num_hidden_layers, config.num_attention_heads, config.hidden_size, config.layer_types = 4, 6, 48, None
    config.num_key_value_heads = 3
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), "layer_types": None})).eval()
    student = tiny.model(student_family)
    aligner = create_structured_aligner(teacher.config, student.config)
    assert aligner.layers == [0, 2]
    ids = torch.randint(3, 40, (2, 20))
    mask = (IDS >= 0).long()
    with torch.no_grad(), captured_kvq(teacher, aligner.layers) as theirs:
        cache = teacher(ids, attention_mask=mask, use_cache=True).past_key_values
    for layer in aligner.layers:
        assert torch.equal(theirs[layer][0], cache.layers[layer].keys)
        assert torch.equal(theirs[layer][1], cache.layers[layer].values)
    with captured_kvq(student) as ours:
        student(ids, attention_mask=mask, use_cache=False)
    s, t, real = aligner.pairs(stacked(ours, range(2)), stacked(theirs, aligner.layers), IDS)
    loss, _ = create_structural_loss(alpha_norm=0.1)(*s, *t, real)
    loss.backward()
    assert student.get_input_embeddings().weight.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in aligner.parameters())
    assert not any(p.grad is not None for p in teacher.parameters())


SCRIPT = """
import sys, torch
from unsloth_ext import MapProjectionAligner
aligner = MapProjectionAligner.from_pretrained(sys.argv[1])
torch.manual_seed(5)
given = torch.randn(1, 6, 4, 9, 16), torch.randn(1, 6, 4, 9, 16), torch.randn(1, 6, 12, 9, 16)
print(sum(x.double().abs().sum().item() for x in aligner(*given, torch.zeros(1, 9, dtype=torch.long), T_s=12)))
"""


@pytest.mark.parametrize("mode", ["structured", "flat"])
def test_a_saved_aligner_says_the_same_in_a_fresh_process(tmp_path, mode):
    """1e-6 relative."""
    warper = create_reasoning_focused_warper()
    aligner = MapProjectionAligner(TEACHER, STUDENT, mode, layer_map="last", time_warper=warper)
    for parameter in aligner.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    aligner.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"aligner.json", "aligner.safetensors"}
    torch.manual_seed(5)
    given = torch.randn(1, 6, 4, 9, 16), torch.randn(1, 6, 4, 9, 16), torch.randn(1, 6, 12, 9, 16)
    wanted = sum(x.double().abs().sum().item() for x in aligner(*given, torch.zeros(1, 9, dtype=torch.long), T_s=12))
    done = fresh("-c", SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert abs(float(done.stdout) / wanted - 1) <= 1e-6


def test_damaged_folders_and_wrong_tensors_are_named(tmp_path):
    aligner = create_structured_aligner(TEACHER, STUDENT)
    aligner.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "aligner.json").read_text())
    for change in ({"mode": "round"}, {"share_dim_proj": False}, {"student": {}}, {"time_warper": {"ratio_map": {}}}):
        (tmp_path / "aligner.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=str(tmp_path)):
            MapProjectionAligner.from_pretrained(tmp_path)
    (tmp_path / "aligner.json").write_text(json.dumps(config))
    (tmp_path / "aligner.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=str(tmp_path)):
        MapProjectionAligner.from_pretrained(tmp_path)
    (tmp_path / "aligner.safetensors").unlink()
    with pytest.raises(ValueError, match=r"aligner\.safetensors is missing"):
        MapProjectionAligner.from_pretrained(tmp_path)
    k, v, q = kvq(TEACHER)
    with pytest.raises(ValueError, match="k of the teacher"):
        aligner(q, v, q)
    with pytest.raises(ValueError, match="q of the teacher"):
        aligner(k, v, k)
    for wrong in ({"direction": "both"}, {"rope_space": "none"}, {"init": "best"}):
        with pytest.raises(ValueError, match="choose one of"):
            create_structured_aligner(TEACHER, STUDENT, **wrong)
    with pytest.raises(ValueError, match="flat"):
        create_flat_aligner(TEACHER, STUDENT, init="uniform")
    for wrong in ({"num_layers": 2}, {"layers": 2}, "qwen", tiny.model()):
        with pytest.raises(ValueError):
            create_structured_aligner(wrong, STUDENT)


def test_different_texts_meet_segment_by_segment():
    """The student reads half the reasoning: each of its times has the teacher's of the same segment."""
    teacher_ids = torch.tensor([[0] * 4 + [1] * 12 + [2] * 4])
    student_ids = torch.tensor([[0] * 4 + [1] * 6 + [2] * 4])
    aligner = create_structured_aligner(TEACHER, TEACHER)
    segment = teacher_ids[:, None, None, :, None].float()
    t = tuple(segment.expand(1, 6, h, 20, 16) for h in (4, 4, 12))
    s = tuple(student_ids[:, None, None, :, None].float().expand(1, 6, h, 14, 16) for h in (4, 4, 12))
    ours, theirs, mask = aligner.pairs(s, t, student_ids, teacher_ids)
    assert mask.shape == (1, 14) and (ours[1] - theirs[1]).abs().max() <= 1e-5
    ours, theirs, mask = aligner.pairs(s, t, student_ids, teacher_ids, T_s=30)
    assert mask.shape == (1, 30) and (ours[1] - theirs[1]).abs().max() <= 1e-5


def test_closed_form_fits_and_does_not_learn():
    """Procrustes on one batch brings the two nearer than the uniform start; frozen, no parameter has a gradient."""
    torch.manual_seed(0)
    same = create_structured_aligner(TEACHER, STUDENT, direction="teacher_to_student", frozen=True)
    t, ids = kvq(TEACHER, layers=3), IDS
    truth = create_structured_aligner(TEACHER, STUDENT, direction="teacher_to_student", init="random")
    s = tuple(x.detach() for x in truth.pairs(kvq(STUDENT), t, ids)[1])
    fitted = create_structured_aligner(TEACHER, STUDENT, direction="teacher_to_student", init="procrustes", frozen=True)
    assert not fitted.fitted and same.fitted
    fitted.fit(s, t, ids)
    loss = create_structural_loss(alpha_attn=0.0)
    start, end = (loss(*sum(a.pairs(s, t, ids)[:2], ()), ids >= 0)[0] for a in (same, fitted))
    assert fitted.fitted and end < 0.8 * start and not end.requires_grad
    assert not any(p.requires_grad for p in fitted.parameters())


def test_a_warper_of_ones_without_length_takes_every_token():
    aligner = create_structured_aligner(TEACHER, STUDENT, time_warper=SegmentTimeWarper())
    plain = create_structured_aligner(TEACHER, STUDENT)
    given = kvq(TEACHER)
    for a, b in zip(aligner(*given, IDS), plain(*given, IDS), strict=True):
        real = (IDS >= 0)[:, None, None, :, None]
        assert ((a - b) * real).abs().max() <= 1e-5


def test_what_comes_after_the_last_layer_asked_for_is_not_computed():
    """And the model is as before."""
    model, ids = tiny.model(), torch.randint(3, 40, (2, 9))
    with torch.no_grad(), captured_kvq(model) as whole:
        wanted = model(ids).logits
    ran = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad(), captured_kvq(model, [0], stop=True) as found:
        model(ids)
        raise AssertionError("the forward should not have come back")
    assert ran == [] and found.keys() == {0} and all(torch.equal(a, b) for a, b in zip(found[0], whole[0], strict=True))
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(ids).logits, wanted)
    with pytest.raises(RuntimeError, match="another"), captured_kvq(model, [0], stop=True):
        raise RuntimeError("another")


@pytest.mark.parametrize("times, atol", [(None, 1e-5), (5, 0.0)])
def test_positions_go_off_and_on_again_unless_times_stay_as_they_are(times, atol):
    """A teacher with segments of its own goes the long way; with other times every teacher does."""
    aligner = create_structured_aligner(TEACHER, STUDENT, rope_space="rerotate")
    student = torch.randn(1, 3, 2, 9, 8), torch.randn(1, 3, 2, 9, 8), torch.randn(1, 3, 8, 9, 8)
    teacher = torch.randn(1, 3, 4, 9, 16), torch.randn(1, 3, 4, 9, 16), torch.randn(1, 3, 12, 9, 16)
    ids = torch.zeros(1, 9, dtype=torch.long)
    short, long = (aligner.pairs(student, teacher, ids, own, T_s=times)[:2] for own in (None, ids))
    for a, b in zip([*short[0], *short[1]], [*long[0], *long[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
