"""Soft planning against a loop over one text without cache, with the same noise; where each gradient comes from."""

import dataclasses

import pytest
import torch

from unsloth_ext import backbone_of, executor_prefix, plan, plan_lengths, plan_soft, text_log_prob
from unsloth_ext.planner import decoding_strategies
from unsloth_ext.planner.planning import teacher_forced

from .setups import FAMILIES, WAYS, Literal, assert_same_gradients, executor_log_prob, gradients, model, plans, texts


TEMPERATURE = 0.7
CASES = [(f, WAYS[0], False) for f in FAMILIES] + [("qwen3", way, lora) for way in WAYS for lora in (False, True)]


@pytest.fixture
def noise(monkeypatch):
    """Gumbel noise (4, quota, V + 1) of each type, the same for every caller; `noise.rows` says whose is drawn."""

    class Noise(list):
        rows = slice(None)

    generator = torch.Generator().manual_seed(1)
    drawn = Noise(
        -torch.rand(4, quota, size + 1, dtype=torch.float64, generator=generator).log().neg().log()
        for size, quota in ((5, 3), (4, 4))
    )
    step, now = decoding_strategies.SoftDecoding.step, {}

    def noted(self, i, j, logits):
        now.update(i=i, j=j)
        return step(self, i, j, logits)

    monkeypatch.setattr(decoding_strategies.SoftDecoding, "step", noted)
    monkeypatch.setattr(decoding_strategies, "gumbel_noise", lambda logits, _: drawn[now["i"]][drawn.rows, now["j"]])
    return drawn


def literal_soft(net, ids, noise):
    """Of one text: plan, embeddings for the executor by type, p(<EOS>) by type, log-probabilities by type."""
    literal = Literal(net, ids)
    fed, read, ends, found = ([[] for _ in noise] for _ in range(4))
    plan = torch.full((len(noise), 4), -1)
    multi = literal.config.multi_token
    for i, kind in enumerate(literal.config.types):
        codes = literal.head.table[literal.v[i][0] : literal.v[i][0] + kind.num_concepts]
        survival, ended = 1.0, False
        for j in range(kind.quota):
            if ended and not multi:
                break
            logits = literal.logits(i, fed)
            logits = logits[j] if multi else logits
            p = logits.softmax(-1)
            survival = survival * (1 - p[-1])
            ends[i].append(p[-1])
            noisy = logits + noise[i][j]
            concept = int(noisy.argmax())
            found[i].append(p.log())
            if ended or concept == kind.num_concepts:
                ended = True
                continue
            plan[i, j] = concept
            soft = (noisy[:-1] / TEMPERATURE).softmax(-1) @ codes
            embed = codes[concept] + (soft - soft.detach())
            fed[i].append(embed)
            read[i].append(embed * (1 + survival - survival.detach()))
        ends[i] += ends[i][-1:] * (kind.quota - len(ends[i]))
    return plan, read, ends, found


def literal_length(ends):
    total = 0
    for j in range(len(ends)):
        alive = 1
        for k in range(j + 1):
            alive = alive * (1 - ends[k])
        total = total + alive
    return total


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family, way, lora", CASES)
def test_plans_and_all_gradients_are_those_of_each_text_alone(noise, family, way, lora, side):
    """1e-10 in fp64, through the executor, the lengths and the log-probabilities; codewords are exact."""
    net, (ids, mask) = model(family, way, lora=lora), texts(side)
    answers = texts(seed=5)
    soft = plan_soft(net, ids, mask, TEMPERATURE)
    ours = -text_log_prob(net, executor_prefix(net, soft), *answers)
    open_, plain, wanted_plans = soft.open, [], []
    weights = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for i, log_probs in enumerate(soft.log_probs):
        steps, choices = log_probs.shape[1:]
        there = log_probs * weights[i, :steps, :choices]
        ours = ours + torch.where(open_[:, i, :steps, None], there, 0).sum((1, 2))
    ours = ours + (soft.expected_lengths * torch.tensor([1.0, -2.0])).sum(1)
    for r, (row, m) in enumerate(zip(ids, mask)):
        chosen, read, ends, found = literal_soft(net, row[m.bool()], [n[r] for n in noise])
        wanted_plans.append(chosen)
        answer = answers[0][r][answers[1][r].bool()]
        total = -executor_log_prob(net, chosen, answer, embeds=read)
        for i, (sign, log_probs) in enumerate(zip((1, -2), found)):
            assert (soft.expected_lengths[r, i] - literal_length(ends[i])).abs() <= 1e-10
            assert (soft.eos[r, i, : len(ends[i])] - torch.stack(ends[i])).abs().max() <= 1e-10
            total = total + sign * literal_length(ends[i])
            made = int((chosen[i] >= 0).sum() + 1)
            for j, p in enumerate(log_probs[:made]):
                total = total + (p * weights[i, j, : len(p)]).sum()
        plain.append(total)
    assert torch.equal(soft.ids, torch.stack(wanted_plans))
    assert len({tuple(x) for x in plan_lengths(soft.ids).tolist()}) > 1
    plain = torch.stack(plain)
    assert (ours - plain).abs().max() <= 1e-10 * plain.abs().max()
    assert_same_gradients(net, (ours * torch.arange(1, 5)).sum(), (plain * torch.arange(1, 5)).sum())


@pytest.mark.parametrize("way", WAYS)
def test_the_cached_loop_is_one_pass_over_the_same_embeddings(way):
    """1e-10: values, and gradients of every parameter."""
    net, (ids, mask) = model(way=way), texts("left")
    soft = plan_soft(net, ids, mask, generator=torch.Generator().manual_seed(0))
    alive = soft.ids >= 0
    embeds = soft.hard + (soft.soft - soft.soft.detach())
    ours = plain = 0
    for i, wanted in enumerate(teacher_forced(net, ids, mask, embeds, alive)):
        found = soft.log_probs[i]
        made = soft.open[:, i, : found.shape[1]]
        wanted = wanted.log_softmax(-1)[:, : found.shape[1]][made]
        found = found[made]
        assert len(found) > 4 and (found - wanted).abs().max() <= 1e-10
        ours, plain = ours + (found * found.detach()).sum(), plain + (wanted * found.detach()).sum()
    assert_same_gradients(net, ours, plain)


@pytest.mark.parametrize("way", WAYS)
def test_what_a_soft_plan_holds(way):
    net, (ids, mask) = model(way=way), texts("left")
    soft = plan_soft(net, ids, mask, generator=torch.Generator().manual_seed(0))
    head, alive = backbone_of(net).unified_head, soft.ids >= 0
    codes = torch.stack([head.concepts(i)[soft.ids[:, i].clamp(min=0)] for i in (0, 1)], dim=1)
    assert torch.equal(soft.embeds, codes * alive[..., None]) and torch.equal(soft.hard, soft.embeds)
    assert torch.equal(soft.soft.abs().sum(-1) > 0, alive)
    quotas = torch.tensor([3, 4])
    made = torch.arange(4) < torch.minimum(plan_lengths(soft.ids) + 1, quotas)[..., None]
    assert torch.equal(soft.open, made) and (soft.eos[:, 0, 3] == 1).all()
    plain = torch.stack([torch.stack([literal_length(eos) for eos in row]) for row in soft.eos])
    assert (soft.expected_lengths - plain).abs().max() <= 1e-12
    for i, log_probs in enumerate(soft.log_probs):
        assert log_probs.shape[-1] == (6, 5)[i]
        assert (log_probs.exp().sum(-1) - 1).abs().max() <= 1e-12
        made = soft.open[:, i, : log_probs.shape[1]]
        assert (log_probs[..., -1].exp() - soft.eos[:, i, : log_probs.shape[1]])[made].abs().max() <= 1e-12
    ours, plain = (executor_prefix(net, p) for p in (soft, soft.ids))
    assert torch.equal(ours.embeds[ours.mask], plain.embeds[plain.mask]) and torch.equal(ours.mask, plain.mask)


@pytest.mark.parametrize("way", WAYS)
def test_gradient_of_expected_lengths_is_their_slope(way):
    """1e-6 against central differences of the <EOS> rows, which move no embedding that is fed back."""
    net, (ids, mask) = model(way=way), texts("left")
    head = backbone_of(net).unified_head
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)

    def lengths():
        soft = plan_soft(net, ids, mask, generator=torch.Generator().manual_seed(0))
        return soft.ids, (soft.expected_lengths * weights).sum()

    before, value = lengths()
    slope = gradients(net, value)[next(n for n, p in net.named_parameters() if p is head.table)]
    for i in (0, 1):
        row = head.vocabulary.eos(i)
        for column in range(0, 32, 7):
            ends = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    head.table[row, column] += step
                    ids_now, found = lengths()
                    head.table[row, column] -= step
                assert torch.equal(ids_now, before)
                ends.append(found)
            assert abs((ends[0] - ends[1]) / 2e-5 - slope[row, column]) <= 1e-6


def test_the_executor_pulls_at_the_end_through_the_weights_alone():
    """1e-12: <EOS>'s gradient is that of the concepts' inputs times a_j = prod (1 - p)."""
    net, (ids, mask) = model(), texts("left")
    head = backbone_of(net).unified_head
    soft = plan_soft(net, ids, mask, generator=torch.Generator().manual_seed(0))
    leaf = soft.embeds.detach().requires_grad_()
    through = dataclasses.replace(soft, embeds=leaf)
    (pull,) = torch.autograd.grad(text_log_prob(net, executor_prefix(net, through), ids, texts()[1]).sum(), leaf)
    found = torch.autograd.grad((soft.embeds * pull).sum(), head.table, retain_graph=True)[0]
    survival = (1 - soft.eos).cumprod(-1)
    wanted = torch.autograd.grad(((soft.embeds.detach() * pull).sum(-1) * survival).sum(), head.table)[0]
    for i in (0, 1):
        row = head.vocabulary.eos(i)
        assert (found[row] - wanted[row]).abs().max() <= 1e-12 * max(1, wanted[row].abs().max())
        assert wanted[row].abs().max() > 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_samples_do_not_depend_on_the_temperature_but_gradients_do(noise, way):
    net, (ids, mask) = model(way=way), texts()
    sharp, soft = plan_soft(net, ids, mask, 0.05), plan_soft(net, ids, mask, 5.0)
    assert torch.equal(sharp.ids, soft.ids) and torch.equal(sharp.embeds, soft.embeds)
    alive = sharp.ids >= 0
    near, far = ((p.soft - p.hard)[alive].norm(dim=-1) for p in (sharp, soft))
    assert near.mean() < 0.2 * far.mean()


def test_noise_is_gumbels():
    """Mean 0.5772, variance pi^2 / 6, within 4 standard errors; finite in fp32 however often it is drawn."""
    drawn = decoding_strategies.gumbel_noise(torch.zeros(1_000_000), torch.Generator().manual_seed(0))
    assert abs(drawn.mean() - 0.57722) < 4 * (torch.pi**2 / 6 / 1e6) ** 0.5
    assert abs(drawn.var() - torch.pi**2 / 6) < 4 * (4.4 * (torch.pi**2 / 6) ** 2 / 1e6) ** 0.5
    assert drawn.isfinite().all()


def test_a_type_stops_when_every_row_has_ended(noise):
    net, (ids, mask) = model(), texts()
    widths = []
    backbone_of(net).register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    for rows in noise:
        rows[:, 1:, -1] = 1e3  # one concept at most
        rows[:, 0, -1] = -1e3
    soft = plan_soft(net, ids, mask)
    assert (plan_lengths(soft.ids) == 1).all() and widths == [9, 1, 1, 1]
    assert [x.shape for x in soft.log_probs] == [(4, 2, 6), (4, 2, 5)]
    for rows in noise:
        rows[..., -1] = 1e3
    widths.clear()
    soft = plan_soft(net, ids, mask)
    assert (soft.ids == -1).all() and widths == [9, 1] and not soft.embeds.any()
    assert (soft.eos[:, 0, 0] == soft.eos[:, 0, 2]).all()
    text_log_prob(net, executor_prefix(net, soft), ids, mask).sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_single_precision_trains(way, attention):
    """Finite gradients in fp32 and bf16 weights, padding on the left."""
    for dtype in (torch.float32, torch.bfloat16):
        net, (ids, mask) = model(way=way, dtype=dtype), texts("left")
        net.set_attn_implementation(attention)
        soft = plan_soft(net, ids, mask, generator=torch.Generator().manual_seed(0))
        assert soft.expected_lengths.dtype is soft.embeds.dtype is torch.float32
        nll = -text_log_prob(net, executor_prefix(net, soft), *texts())
        assert nll.dtype is torch.float32
        (nll.sum() + soft.expected_lengths.sum()).backward()
        head = backbone_of(net).unified_head
        for parameter in net.parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all()
        assert all(head.table.grad[head.vocabulary.outputs(i)].any(-1).all() for i in (0, 1))


def test_gradient_checkpointing_is_refused_where_it_would_drop_the_cache():
    for way in WAYS:
        net, (ids, mask) = model(way=way).train(), texts()
        net.gradient_checkpointing_enable({"use_reentrant": False})
        if way == ("parallel", True):
            plan_soft(net, ids, mask).embeds.sum().backward()
            continue
        with pytest.raises(ValueError, match="gradient checkpointing is on"):
            plan_soft(net, ids, mask)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_must_be_positive(temperature):
    net = model()
    with pytest.raises(ValueError, match=f"temperature={temperature}: must be more than 0"):
        plan_soft(net, texts()[0], None, temperature)


def test_without_noise_a_soft_plan_is_the_greedy_one(noise):
    net, (ids, mask) = model(), texts()
    for rows in noise:
        rows.zero_()
    assert torch.equal(plan_soft(net, ids, mask).ids, plan(net, ids, mask))
    assert plans().shape == plan(net, ids, mask).shape
