"""The structural loss against plain loops, eager attention and finite differences; the collapse of the note's direction."""

import pytest
import torch

from tests import tiny
from unsloth_ext import AttentionShape, captured_kvq, create_structural_loss, create_structured_aligner
from unsloth_ext.kv_distill import loss as loss_module
from unsloth_ext.kv_distill.capture import stacked
from unsloth_ext.kv_distill.loss import spread


MASK = torch.tensor([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 0, 0], [1] * 4 + [0] * 5])


def sides(seed=0, kv=2, q=4, dtype=torch.float32):
    torch.manual_seed(seed)
    return [tuple(torch.randn(3, 2, heads, 9, 6, dtype=dtype) for heads in (kv, kv, q)) for _ in range(2)]


def plain(s, t, mask, alpha, temperature):
    """By loops over rows, layers, heads and times."""
    sums = dict.fromkeys(("k", "v", "attn", "norm"), 0.0)
    counts = dict.fromkeys(sums, 0)
    for b in range(3):
        real = [i for i in range(9) if mask[b, i]]
        for layer in range(2):
            for i in real:
                for name, at in (("k", 0), ("v", 1)):
                    for h in range(s[at].shape[2]):
                        x, y = s[at][b, layer, h, i], t[at][b, layer, h, i]
                        sums[name] += 1 - float(x @ y / x.norm() / y.norm())
                        counts[name] += 1
                        sums["norm"] += float((x.norm().log() - y.norm().log()) ** 2)
                        counts["norm"] += 1
                keys = [j for j in real if j <= i]
                for h in range(s[2].shape[2]):
                    group = h // (s[2].shape[2] // s[0].shape[2])
                    rows = [
                        (side[0][b, layer, group, keys] @ side[2][b, layer, h, i] / (temperature * 6**0.5)).softmax(-1)
                        for side in (s, t)
                    ]
                    sums["attn"] += float((rows[1] * (rows[1] / rows[0]).log()).sum())
                    counts["attn"] += 1
    terms = {name: value / counts[name] for name, value in sums.items()}
    return sum(alpha[name] * value for name, value in terms.items()), terms


@pytest.mark.parametrize("heads", [(2, 4), (1, 5), (3, 3)])
@pytest.mark.parametrize(
    "alpha", [(1.0, 1.0, 0.5, 0.3), (2.0, 0, 0, 0), (0, 2.0, 0, 0), (0, 0, 2.0, 0), (0, 0, 0, 2.0)]
)
def test_it_is_the_plain_loop_and_each_alpha_works_alone(alpha, heads):
    """1e-5 (double)."""
    s, t = sides(kv=heads[0], q=heads[1], dtype=torch.float64)
    loss, metrics = create_structural_loss(*alpha[:3], temperature=1.7, alpha_norm=alpha[3])(*s, *t, MASK)
    wanted, terms = plain(s, t, MASK, dict(zip(("k", "v", "attn", "norm"), alpha)), 1.7)
    assert abs(loss.item() - wanted) <= 1e-5
    on = {name for name, a in zip(("k", "v", "attn", "norm"), alpha) if a}
    assert on == metrics.keys() & terms.keys()
    assert all(abs(metrics[name].item() - terms[name]) <= 1e-5 for name in on)


def test_a_few_rows_at_a_time_are_all_rows(monkeypatch):
    """1e-6, gradients too."""
    found = []
    for elements in (2**24, 3 * 2 * 4 * 9 * 2, 1):
        monkeypatch.setattr(loss_module, "MAP_ELEMENTS", elements)
        s, t = sides()
        s = [x.requires_grad_() for x in s]
        loss, _ = create_structural_loss()(*s, *t, MASK)
        found.append([loss.detach(), *torch.autograd.grad(loss, s)])
    for other in found[1:]:
        assert all((a - b).abs().max() <= 1e-6 for a, b in zip(found[0], other, strict=True))


def test_the_same_on_both_sides_is_zero():
    s, _ = sides()
    loss, metrics = create_structural_loss(alpha_norm=1.0)(*s, *s, MASK)
    assert loss.abs() <= 1e-6 and all(metrics[name].abs() <= 1e-6 for name in ("k", "v", "attn", "norm"))


def test_it_notices_scale():
    """Keys four times as long: cosines see nothing, attention and norms do."""
    (k, v, q), _ = sides()
    _, metrics = create_structural_loss(alpha_norm=1.0)(4 * k, v, q, k, v, q, MASK)
    assert metrics["k"].abs() <= 1e-5 and metrics["attn"] > 0.3
    assert abs(metrics["norm"] - torch.tensor(4.0).log() ** 2 / 2) <= 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_attention_rows_are_the_models_own(family):
    """KL against the rows of eager attention, 1e-5."""
    models = [tiny.model(family, seed) for seed in (0, 1)]
    ids = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = MASK.clone()
    mask[1] = torch.tensor([1] * 7 + [0] * 2)
    captured, rows = [], []
    for model in models:
        with torch.no_grad(), captured_kvq(model) as found:
            model(ids, attention_mask=mask, use_cache=False)
        captured.append(stacked(found, range(2)))
        model.set_attn_implementation("eager")
        with torch.no_grad():
            rows.append(torch.stack(model(ids, attention_mask=mask, output_attentions=True).attentions, dim=1))
    _, metrics = create_structural_loss()(*captured[0], *captured[1], mask)
    kl = (torch.special.xlogy(rows[1], rows[1]) - torch.special.xlogy(rows[1], rows[0])).sum(-1)
    wanted = (kl * mask[:, None, None]).sum() / (mask.sum() * kl.shape[1] * kl.shape[2])
    assert abs(metrics["attn"] - wanted) <= 1e-5


def test_gradients_are_finite_differences():
    torch.manual_seed(0)
    s, t = ([torch.randn(1, 1, h, 4, 2, dtype=torch.float64) for h in (1, 1, 2)] for _ in range(2))
    s = [x.requires_grad_() for x in s]
    mask = torch.tensor([[1, 1, 1, 0]])
    fn = create_structural_loss(alpha_norm=0.5)
    assert torch.autograd.gradcheck(lambda *x: fn(*x, *t, mask)[0], s, eps=1e-6, atol=1e-5)


def test_effective_rank_and_std():
    """Of vectors in a plane 2, of white ones nearly D, of one that is always the same std 0 (1e-6)."""
    torch.manual_seed(0)
    mask = torch.ones(2, 500)
    plane = torch.randn(2, 1, 2, 500, 2) @ torch.linalg.qr(torch.randn(16, 2))[0].T
    assert abs(spread(plane, mask.bool())[1] - 2) <= 0.05
    white = torch.randn(2, 1, 2, 500, 16)
    std, rank = spread(white, mask.bool())
    assert rank > 15.5 and abs(std - 1) <= 0.03
    mask[:, 100:] = 0
    same = torch.ones(2, 1, 2, 500, 16)
    same[:, :, :, 100:] = 9.0
    std, rank = spread(same, mask.bool())
    assert std <= 1e-6 and rank.isfinite()


def teach(direction, frozen=False, alpha=(1.0, 1.0, 0.0), steps=40):
    """A student of free tensors under the loss alone; the teacher's target before and after."""
    torch.manual_seed(0)
    teacher, student = AttentionShape(1, 4, 4, 32), AttentionShape(1, 2, 2, 32)
    aligner = create_structured_aligner(teacher, student, direction=direction, frozen=frozen, rope_space="post")
    t = tuple(torch.randn(4, 1, 4, 64, 32) for _ in range(3))
    # The student is a narrow function of the same content, as a model with less room is
    narrow = [torch.nn.Linear(128, 4), torch.nn.Linear(4, 64)]
    flat = t[0].transpose(2, 3).flatten(-2)
    trained = [*aligner.parameters(), *(p for layer in narrow for p in layer.parameters())]
    optimizer = torch.optim.Adam([p for p in trained if p.requires_grad], lr=1e-2)
    ids, loss_fn = torch.zeros(4, 64, dtype=torch.long), create_structural_loss(*alpha)
    ranks, losses = [], []
    for _ in range(steps):
        k = narrow[1](narrow[0](flat)).unflatten(-1, (2, 32)).transpose(2, 3)
        s_, t_, mask = aligner.pairs((k, k, k), t, ids)
        loss, metrics = loss_fn(*s_, *t_, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ranks.append(metrics["target_rank_k"].item())
        losses.append(loss.item())
    return ranks[0], ranks[-1], losses[-1]


def test_the_notes_direction_collapses_and_the_default_does_not():
    """With cosines the target that learns ends in a few of 32 dimensions; that of the default, and a frozen one, stays."""
    start, end, loss = teach("teacher_to_student", steps=400)
    assert start > 25 and end < 10 and loss < 0.3
    for settings in ({"direction": "student_to_teacher"}, {"direction": "teacher_to_student", "frozen": True}):
        start, end, loss = teach(**settings)
        assert start > 25 and end == pytest.approx(start, rel=1e-4)


def test_what_cannot_be_is_named():
    s, t = sides()
    with pytest.raises(ValueError, match="alpha_k=-1"):
        create_structural_loss(alpha_k=-1)
    with pytest.raises(ValueError, match="all 0"):
        create_structural_loss(0, 0, 0)
    with pytest.raises(ValueError, match="temperature=0"):
        create_structural_loss(temperature=0)
    with pytest.raises(ValueError, match="give the queries s_q and t_q"):
        create_structural_loss()(s[0], s[1], None, t[0], t[1], None)
    with pytest.raises(ValueError, match="v: "):
        create_structural_loss()(s[0], s[1][:, :1], s[2], *t)
    assert create_structural_loss(alpha_attn=0)(s[0], s[1], None, t[0], t[1], None)[0].isfinite()
