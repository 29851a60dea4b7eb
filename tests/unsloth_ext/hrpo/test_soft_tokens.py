"""Soft tokens against torch.distributions, plain loops, finite differences and integrals; and their decoding."""

import math

import pytest
import torch
from torch import nn

from tests import tiny
from unsloth_ext import DelimiterMatcher, ThinkingConfig, attach_thinking, backbone_of, hybrid_generate
from unsloth_ext.hrpo import soft_tokens
from unsloth_ext.hrpo.decoding import ThinkingTrace
from unsloth_ext.hrpo.recompute import previous_hidden
from unsloth_ext.hrpo.soft_tokens import (
    SOFT_FIELDS,
    SoftTokens,
    first_plain,
    gaussian_log_prob,
    gumbel_log_prob,
    soft_log_probs,
)
from unsloth_ext.hrpo.states import SOFT_SOURCES

from .test_decoding import COMMON, alive, prompts


class Backbone(nn.Module):
    """An embedding and settings, which is all that soft tokens are drawn with."""

    def __init__(self, rows: torch.Tensor, **settings):
        super().__init__()
        self.embedding, self.thinking_config = nn.Embedding.from_pretrained(rows), ThinkingConfig(**settings)

    def get_input_embeddings(self):
        return self.embedding


def make(source, family="qwen3", dtype=torch.float32, **settings):
    net = attach_thinking(tiny.model(family, dtype=dtype), ThinkingConfig(thinking_source=source, **settings)).to(dtype)
    return net, DelimiterMatcher(tiny.tokenizer(), "#", 64)


def keep(source):
    return ("thinking_states", "log_probs", *SOFT_FIELDS[source])


def sampled(net, matcher, source, **changes):
    """Completions (4, 24) of left-padded prompts, and their trace."""
    ids, attention = prompts()
    torch.manual_seed(changes.pop("seed", 1))
    given = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.7, "top_k": 0, **COMMON, **changes}
    return hybrid_generate(net, ids, matcher, attention_mask=attention, keep=keep(source), return_trace=True, **given)


def density(source, scores, embedding, trace, row, t):
    """The log-likelihood of one soft token by torch.distributions, token by token, from the model's logits (V,)."""
    if source == "soft_gaussian":
        p = (scores / 0.5).softmax(-1)
        mean = sum(p[v] * embedding[v] for v in range(len(p)))
        std = 0.33 * embedding.pow(2).mean().sqrt()
        normal = torch.distributions.Normal(mean, std)
        constant = normal.log_prob(mean).sum()
        return (normal.log_prob(trace.thinking_states[row, t]).sum() - constant).item()
    kept = [(v, g) for v, g in zip(trace.candidates[row, t], trace.gumbels[row, t]) if g > -math.inf]
    p = scores.softmax(-1)[torch.stack([v for v, _ in kept])]
    total = 0.0
    for (_, g), share in zip(kept, p / p.sum()):
        total += torch.distributions.Gumbel(share.log(), torch.tensor(1.0)).log_prob(g).item()
    return total


# -- the densities ------------------------------------------------------------------------------------------------------


def test_the_gaussian_is_that_of_torch_without_its_constant():
    """1e-12 in fp64."""
    x, mean, std = torch.randn(3, 4, 7).double(), torch.randn(3, 4, 7).double(), torch.rand(3, 4).double() + 0.1
    normal = torch.distributions.Normal(mean, std[..., None])
    wanted = (normal.log_prob(x) - normal.log_prob(mean)).sum(-1)
    torch.testing.assert_close(gaussian_log_prob(x, mean, std), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gaussian_log_prob(x, mean, std, "mean"), wanted / 7, rtol=1e-12, atol=1e-12)


def test_the_gumbel_is_that_of_torch_and_counts_only_kept_tokens():
    """1e-12 in fp64."""
    log_probs = torch.randn(3, 4, 5).double().log_softmax(-1)
    gumbels = torch.distributions.Gumbel(log_probs, torch.ones(()).double()).sample()
    each = torch.distributions.Gumbel(log_probs, torch.ones(()).double()).log_prob(gumbels)
    torch.testing.assert_close(gumbel_log_prob(gumbels, log_probs), each.sum(-1), rtol=1e-12, atol=1e-12)
    dropped = torch.zeros(3, 4, 5, dtype=torch.bool)
    dropped[..., 3:] = True
    some = (x.masked_fill(dropped, -math.inf) for x in (gumbels, log_probs))
    torch.testing.assert_close(gumbel_log_prob(*some, "mean"), each[..., :3].mean(-1), rtol=1e-12, atol=1e-12)


def test_the_gradient_of_dropped_tokens_is_zero_and_not_nan():
    scores = torch.randn(2, 4, requires_grad=True)
    gumbels = torch.tensor([[0.3, -1.0, -math.inf, -math.inf], [0.1, 0.2, 0.3, -math.inf]])
    log_probs = scores.masked_fill(gumbels.isneginf(), -math.inf).log_softmax(-1)
    gumbel_log_prob(gumbels, log_probs).sum().backward()
    assert scores.grad.isfinite().all() and not scores.grad[gumbels.isneginf()].any() and scores.grad.abs().max() > 0.01


def reinforce(backbone, theta, reward, count=400_000):
    """Monte-Carlo policy gradient from draws and likelihoods of ours: mean and standard error, one number per logit."""
    torch.manual_seed(0)
    drawn = SoftTokens(backbone, noisy=True).draw(theta.detach().expand(count, -1))
    logits = theta.detach().expand(count, -1).clone().requires_grad_()
    rewards, log_probs = reward(drawn, logits)
    (each,) = torch.autograd.grad((rewards * log_probs).sum(), logits)
    return each.mean(0), each.std(0) / count**0.5


def test_the_policy_gradient_of_the_gaussian_is_that_of_the_integral():
    """Two dimensions, a smooth reward; the integral is a sum over a grid. Five standard errors."""
    rows, theta = (
        torch.tensor([[1.0, 0.2], [-0.5, 0.8], [0.3, -1.1]]),
        torch.tensor([0.4, -0.2, 0.1], requires_grad=True),
    )
    backbone = Backbone(rows, thinking_source="soft_gaussian")
    value = lambda x: torch.sigmoid(3 * x[..., 0] - x[..., 1] * x[..., 0])  # noqa: E731

    def reward(drawn, logits):
        mean = (logits / 0.5).softmax(-1) @ rows
        return value(drawn.state), gaussian_log_prob(drawn.state, mean, drawn.kept["noise_std"])

    std = 0.33 * rows.pow(2).mean().sqrt()
    steps = torch.linspace(-4, 4, 801)
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1)
    chance = torch.distributions.Normal((theta / 0.5).softmax(-1) @ rows, std).log_prob(grid).sum(-1).exp()
    (wanted,) = torch.autograd.grad((chance * value(grid)).sum() * 0.01**2, theta)
    found, error = reinforce(backbone, theta, reward)
    assert wanted.abs().max() > 20 * error.max()
    assert ((found - wanted).abs() <= 5 * error).all()


def test_the_policy_gradient_of_the_gumbel_is_that_of_the_integral():
    """Three tokens, and token 0 ends the thinking, which is worth 0.9; the integral is a sum over a grid. Five standard
    errors."""
    rows, theta = torch.eye(3), torch.tensor([0.4, -0.5, 0.3], requires_grad=True)
    backbone = Backbone(rows, thinking_source="soft_gumbel", gumbel_top_k=3, gumbel_top_p=1.0, gumbel_temperature=0.7)
    value = lambda y: torch.sigmoid(4 * y[..., 1] - 3 * y[..., 2] * y[..., 0])  # noqa: E731

    def reward(drawn, logits):
        candidates, gumbels = drawn.kept["candidates"], drawn.kept["gumbels"]
        log_probs = logits.gather(-1, candidates).log_softmax(-1)
        ends = drawn.token == 0
        rewards = torch.where(ends, torch.tensor(0.9), value(drawn.state))  # rows of E are one-hot: the state is y
        chosen = log_probs.gather(-1, gumbels.argmax(-1, keepdim=True)).squeeze(-1)
        return rewards, torch.where(ends, chosen, gumbel_log_prob(gumbels, log_probs))

    steps = torch.linspace(-5, 15, 121)
    grid = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), dim=-1)
    log_p = theta.log_softmax(-1)
    chance = torch.distributions.Gumbel(log_p, torch.tensor(1.0)).log_prob(grid).sum(-1).exp()
    thinks = ((grid[..., 1:].amax(-1) - grid[..., 0]).sign() + 1) / 2  # half of a cell that the border cuts
    expected = (chance * thinks * value((grid / 0.7).softmax(-1))).sum() * (20 / 120) ** 3 + 0.9 * log_p[0].exp()
    (wanted,) = torch.autograd.grad(expected, theta)
    found, error = reinforce(backbone, theta, reward)
    assert wanted.abs().max() > 20 * error.max()
    assert ((found - wanted).abs() <= 5 * error).all()


# -- one draw -----------------------------------------------------------------------------------------------------------


def test_the_largest_gumbel_is_a_sample_of_the_kept_distribution():
    """Frequencies of 100,000 draws, to five standard errors."""
    logits = torch.tensor([2.0, 1.5, 0.0, -0.5, 1.0, -9.0])
    backbone = Backbone(torch.randn(6, 3), thinking_source="soft_gumbel", gumbel_top_k=4, gumbel_top_p=0.97)
    torch.manual_seed(0)
    drawn = SoftTokens(backbone, noisy=True).draw(logits.expand(100_000, -1))
    top = logits.softmax(-1).sort(descending=True)
    kept = top.indices[:4][top.values[:4].cumsum(0) - top.values[:4] < 0.97 * top.values[:4].sum()]
    p = torch.zeros(6).index_copy(0, kept, logits[kept].softmax(-1))
    share = torch.bincount(drawn.token, minlength=6) / 100_000
    assert len(kept) >= 3 and ((share - p).abs() <= 5 * (p * (1 - p) / 100_000).sqrt()).all()
    torch.testing.assert_close(drawn.end_log_prob.exp(), p[drawn.token], rtol=1e-5, atol=0)


def test_the_noise_has_the_size_of_the_setting():
    """0.33 of the root mean square of the entries; the mean is that of the distribution at temperature 0.5. 1%."""
    rows, logits = torch.randn(9, 5) * 3, torch.randn(9)
    backbone = Backbone(rows, thinking_source="soft_gaussian")
    torch.manual_seed(0)
    drawn = SoftTokens(backbone, noisy=True).draw(logits.expand(200_000, -1))
    std = 0.33 * rows.pow(2).mean().sqrt()
    mean = (logits / 0.5).softmax(-1) @ rows
    assert ((drawn.state.mean(0) - mean).abs() <= 5 * std / 200_000**0.5).all()
    torch.testing.assert_close(drawn.state.std(0), std.expand(5), rtol=1e-2, atol=0)
    assert (drawn.token == logits.argmax()).all()


def test_without_noise_they_are_plain_mixtures():
    rows, logits = torch.randn(9, 5), torch.randn(2, 9)
    gaussian = SoftTokens(Backbone(rows, thinking_source="soft_gaussian"), noisy=False).draw(logits)
    torch.testing.assert_close(gaussian.state, (logits / 0.5).softmax(-1) @ rows, rtol=1e-5, atol=1e-6)
    settings = {"thinking_source": "soft_gumbel", "gumbel_top_k": 3, "gumbel_top_p": 1.0}
    gumbel = SoftTokens(Backbone(rows, **settings), noisy=False).draw(logits)
    top, index = logits.topk(3)
    wanted = ((top.log_softmax(-1) / 0.1).softmax(-1)[..., None] * rows[index]).sum(1)
    torch.testing.assert_close(gumbel.state, wanted, rtol=1e-5, atol=1e-6)


def test_fuzzy_tokens_are_tokens():
    """A temperature of 0.0001."""
    rows, logits = torch.randn(9, 5), torch.randn(3, 9)
    backbone = Backbone(rows, thinking_source="soft_gaussian", soft_temperature=1e-4)
    assert torch.equal(SoftTokens(backbone, noisy=False).draw(logits).state, rows[logits.argmax(-1)])


# -- decoding and the training forward ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOFT_SOURCES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_stock_model_fed_with_the_trace_finds_the_same_tokens_and_likelihoods(family, source):
    """fp32, 1e-4 of sums of about 20. The stock model gets `inputs_embeds`, and the likelihood is torch's, in a loop."""
    net, matcher = make(source, family)
    out, trace = sampled(net, matcher, source)
    completion, ids = out[:, 7:], out
    live, mask = alive(completion), trace.thinking_mask
    assert mask.any() and (~mask & live).any() and first_plain(mask).any()
    stock = tiny.model(family)
    embedding = stock.get_input_embeddings()
    full = torch.cat([prompts()[1], live.long()], 1)
    with torch.no_grad():
        embeds = embedding(ids)
        embeds[:, 7:][mask] = trace.thinking_states[mask]
        scale = getattr(stock.base_model, "embed_scale", None)
        assert scale is None or scale == 1, "the decoder would scale the states once more"
        logits = stock(
            inputs_embeds=embeds, attention_mask=full, position_ids=(full.cumsum(-1) - 1).clamp(min=0)
        ).logits[:, 6:-1]
        table = embedding(torch.arange(64))  # the rows as the decoder gets them
    for row, t in mask.nonzero().tolist():
        wanted = density(source, logits[row, t], table, trace, row, t)
        assert trace.log_probs[row, t].item() == pytest.approx(wanted, abs=1e-4, rel=1e-4)
        if source == "soft_gaussian":
            assert completion[row, t] == logits[row, t].argmax()
        else:
            best = trace.gumbels[row, t].argmax()
            assert completion[row, t] == trace.candidates[row, t, best]
            weights = (trace.gumbels[row, t] / 0.1).softmax(-1)
            fed = (weights[:, None] * table[trace.candidates[row, t]]).sum(0)
            if t + 1 < mask.shape[1] and mask[row, t + 1]:  # so that it was fed
                torch.testing.assert_close(trace.thinking_states[row, t], fed, rtol=1e-4, atol=1e-5)
    ends = first_plain(mask) & live
    for row, t in ends.nonzero().tolist():
        if source == "soft_gaussian":
            assert trace.log_probs[row, t] == 0
        else:
            p = logits[row, t].softmax(-1)
            kept = trace.candidates[row, t][trace.gumbels[row, t] > -math.inf]
            chance = p[completion[row, t]] / p[kept].sum()
            assert trace.log_probs[row, t].item() == pytest.approx(chance.log().item(), abs=1e-4)
    answer = ~mask & ~ends & live
    plain = (logits / 0.7).log_softmax(-1).gather(-1, completion[..., None]).squeeze(-1)
    torch.testing.assert_close(trace.log_probs[answer], plain[answer], rtol=1e-4, atol=1e-4)
    found = scored(net, out, full, trace, plain)
    torch.testing.assert_close(found[live], trace.log_probs[live], rtol=1e-4, atol=1e-4)


def scored(net, ids, attention, trace, token_log_probs):
    """Likelihoods as the trainer computes them."""
    hidden = previous_hidden(
        net,
        trace.thinking_mask.shape[1],
        input_ids=ids,
        attention_mask=attention,
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        thinking_mask=trace.thinking_mask,
        thinking_embeds=trace.thinking_states,
    )
    return soft_log_probs(net, hidden, trace, token_log_probs)


@pytest.mark.parametrize("source", SOFT_SOURCES)
def test_gradients_agree_with_finite_differences(source, monkeypatch):
    """fp64, central differences of step 1e-6: relative error below 1e-5. GPT-2, because RMSNorms compute in fp32. The
    chunks are of three tokens, and recomputed."""
    monkeypatch.setattr(soft_tokens, "TOKENS_PER_CHUNK", 3)
    net, _ = make(source, "gpt2", torch.float64)
    net.eval()
    ids, attention = torch.randint(3, 40, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask = torch.tensor([[True, True, True, False, False], [True, True, True, True, True]])
    trace = ThinkingTrace(mask, torch.randn(2, 5, 32).double(), noise_std=torch.full((2, 5), 0.3).double())
    trace.candidates = torch.rand(2, 5, 64).argsort(-1)[..., :4]
    trace.gumbels = torch.randn(2, 5, 4).double()
    trace.gumbels[..., 3] = -math.inf
    weight = torch.randn(2, 5).double()

    def loss():
        return (scored(net, ids, attention, trace, torch.zeros(2, 5).double()) * weight).sum()

    parameter = net.transformer.h[0].mlp.c_fc.weight
    (grad,) = torch.autograd.grad(loss(), parameter)
    assert grad.abs().max() > 0
    flat = parameter.data.view(-1)
    for index in torch.randint(parameter.numel(), (4,)).tolist():
        kept, values = flat[index].item(), []
        for sign in (1, -1):
            flat[index] = kept + sign * 1e-6
            with torch.no_grad():
                values.append(loss().item())
        flat[index] = kept
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(grad.view(-1)[index].item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("source", SOFT_SOURCES)
def test_batch_equals_single_and_cached_equals_uncached(source):
    """fp64, greedy and so without noise: a wrong input shows as another token and rounding does not."""
    net, matcher = make(source, dtype=torch.float64)
    ids, attention = prompts()

    def decode(rows, **kw):
        mask = attention[rows]
        return hybrid_generate(
            net, ids[rows], matcher, attention_mask=mask, max_new_tokens=20, do_sample=False, **COMMON, **kw
        )[:, 7:]

    batch = decode(slice(None))
    assert torch.equal(batch, decode(slice(None), use_cache=False))
    for row in range(4):
        single = decode(slice(row, row + 1))[0]
        kept = alive(batch[row : row + 1])[0][: len(single)]
        assert torch.equal(single[kept], batch[row][: len(single)][kept])


@pytest.mark.parametrize("source", SOFT_SOURCES)
def test_rows_that_ended_change_nothing_for_the_others(source):
    """All rows are decoded to the end with `return_dict_in_generate=True`. Same noise, likelihoods to 1e-4."""
    net, matcher = make(source)
    ends = {"eos_token_id": list(range(1, 12)), "seed": 6}  # many, so that rows end at different times
    out, trace = sampled(net, matcher, source, **ends)
    whole, all_rows = sampled(net, matcher, source, **ends, return_dict_in_generate=True)
    ended = torch.isin(out[:, 7:], torch.arange(1, 12))
    live = (ended.cumsum(1) - ended.int()) == 0
    assert (~live).any(1).sum() >= 2 and live[:, -2].any() and torch.equal(out, whole.sequences)
    assert torch.equal(trace.thinking_mask, all_rows.thinking_mask)
    torch.testing.assert_close(trace.log_probs[live], all_rows.log_probs[live], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", SOFT_SOURCES)
def test_answers_are_chosen_by_the_scores(source):
    """Only tokens 20 to 29 are allowed, which holds for answers and not for soft tokens."""
    net, matcher = make(source)
    allowed = torch.arange(20, 30)
    others = [i for i in range(64) if i not in allowed]
    out, trace = sampled(net, matcher, source, suppress_tokens=others)
    plain = ~trace.thinking_mask & ~first_plain(trace.thinking_mask)
    assert plain.any() and torch.isin(out[:, 7:][plain & alive(out[:, 7:])], allowed).all()
    assert not torch.isin(out[:, 7:][trace.thinking_mask], allowed).all()


@pytest.mark.parametrize("source", SOFT_SOURCES)
def test_the_mask_stops_at_the_delimiter_and_at_eos(source):
    net, matcher = make(source)
    for seed in range(3):
        out, trace = sampled(net, matcher, source, seed=seed)
        for row, completion in enumerate(out[:, 7:].tolist()):
            for t in range(len(completion)):
                text = tiny.tokenizer().decode(completion[: t + 1], skip_special_tokens=True)
                assert trace.thinking_mask[row, t].item() == ("#" not in text and 1 not in completion[: t + 1])


def test_off_is_plain_generate_and_bad_calls_are_errors():
    net, matcher = make("soft_gaussian")
    ids, _ = prompts()
    plain = net.generate(input_ids=ids, max_new_tokens=5, do_sample=False, **COMMON)
    assert torch.equal(plain, tiny.model().generate(input_ids=ids, max_new_tokens=5, do_sample=False, **COMMON))
    off = hybrid_generate(net, ids, matcher, ablation="off", max_new_tokens=5, do_sample=False, **COMMON)
    assert torch.equal(plain, off)
    with pytest.raises(ValueError, match="keep: 'gumbels': a model with thinking_source='soft_gaussian' has none"):
        hybrid_generate(net, ids, matcher, keep=("gumbels",), max_new_tokens=5, **COMMON)
    with pytest.raises(ValueError, match="beam"):
        hybrid_generate(net, ids, matcher, num_beams=2, max_new_tokens=5, **COMMON)
    states, mask = torch.zeros(2, 3, 32), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="cannot be made soft tokens"):
        backbone_of(net).fuse_thinking(states, mask, hidden_states=states)


@pytest.mark.parametrize(
    "fields",
    [
        {"soft_temperature": 0.0},
        {"noise_scale": -0.1},
        {"noise_scale": math.nan},
        {"gumbel_temperature": math.inf},
        {"gumbel_top_k": 1},
        {"gumbel_top_p": 1.5},
        {"noise_likelihood": "median"},
    ],
    ids=str,
)
def test_config_errors_name_the_field_and_the_value(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}: "):
        ThinkingConfig(thinking_source="soft_gumbel", **fields)


def test_the_temperature_is_that_of_the_paper():
    assert ThinkingConfig("soft_gaussian").soft_temperature == 0.5
    assert ThinkingConfig("soft_gumbel").soft_temperature == 1.0
