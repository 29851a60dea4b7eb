"""The executor against one plain causal text after another: likelihoods, positions, and what it does not see."""

import dataclasses

import pytest
import torch

from unsloth_ext import backbone_of, executor_forward, executor_prefix, plan_soft, text_log_prob, text_nll
from unsloth_ext.planner.vocabulary import BOS, NULL

from .setups import FAMILIES, WAYS, assert_same_gradients, config, executor_log_prob, model, plans, texts


@pytest.mark.parametrize("family, lora", [*((f, False) for f in FAMILIES), ("qwen3", True)])
def test_likelihoods_are_those_of_each_text_alone(family, lora):
    """1e-10 in fp64: values, and gradients of every trained parameter; null plans, word dropout, ragged texts."""
    net, (ids, mask), given = model(family, lora=lora), texts(), plans()
    null = torch.tensor([False, False, True, False])
    dropped = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    found = text_log_prob(net, executor_prefix(net, given, null), ids, mask, dropped)
    wanted = torch.stack(
        [
            executor_log_prob(net, p, row[m.bool()], null=n, dropped=d)
            for p, row, m, n, d in zip(given, ids, mask, null, dropped)
        ]
    )
    assert (found - wanted).abs().max() <= 1e-10
    assert_same_gradients(net, (found * torch.arange(1, 5)).sum(), (wanted * torch.arange(1, 5)).sum())


def test_losses_stand_at_their_tokens():
    """1e-12: each token's is the difference between a text with it and one without."""
    net, (ids, mask), given = model(), texts(), plans()
    nll = text_nll(net, executor_prefix(net, given), ids, mask)
    assert torch.equal(nll != 0, mask.bool())
    for t in range(1, 7):
        shorter = text_nll(net, executor_prefix(net, given), ids[:, :t], mask[:, :t])
        assert (shorter - nll[:, :t]).abs().max() <= 1e-12


def test_positions_begin_anew_for_every_type_and_text_behind_the_quota():
    net, (ids, mask) = model(), texts()
    prefix = executor_prefix(net, plans(), torch.tensor([False, False, True, False]))
    own = [row[m].tolist() for row, m in zip(prefix.positions, prefix.mask)]
    assert own == [[0, 0, 1, 2, 0, 1], [0, 0, 0, 1, 2, 3, 4], [0, 0], [0, 0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert prefix.mask.shape == (4, 10) and (prefix.mask[:, 1:] | ~prefix.mask[:, :-1]).all()  # padding on the left
    seen = []
    backbone_of(net).register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    executor_forward(net, prefix, ids, mask)
    assert seen[0]["position_ids"][:, 10:].tolist() == [[5, 6, 7, 8, 9, 10]] * 4
    assert torch.equal(seen[0]["position_ids"][:, :10], prefix.positions)
    assert seen[0]["attention_mask"].shape == (4, 16)


@pytest.mark.parametrize("null", [False, True])
def test_a_longer_quota_changes_nothing_while_text_stays_where_it_is(null):
    """1e-12: only the layout of the padding differs."""
    net, (ids, mask), given = model(), texts(), plans()
    prefix = executor_prefix(net, given, torch.full((4,), null))
    before = text_nll(net, prefix, ids, mask)
    backbone_of(net).planner_config = config(sizes=((5, 4), (4, 4)))
    assert (text_nll(net, executor_prefix(net, given, torch.full((4,), null)), ids, mask) - before).abs().max() <= 1e-12
    given = (prefix.embeds, prefix.mask, prefix.positions)
    padded = type(prefix)(*(torch.cat([x.new_zeros(4, 3, *x.shape[2:]), x], dim=1) for x in given))
    assert (text_nll(net, padded, ids, mask) - before).abs().max() <= 1e-12
    assert prefix.mask.shape[1] == (2 if null else 10)


@pytest.mark.parametrize("way", WAYS)
def test_what_the_planner_read_changes_nothing(way):
    """Bit-equal, given the concepts; and every concept counts."""
    net, (ids, mask) = model(way=way), texts()
    one, other = (plan_soft(net, texts(seed=s)[0], None, generator=torch.Generator().manual_seed(0)) for s in (5, 6))
    assert not torch.equal(one.eos, other.eos)
    other = dataclasses.replace(other, ids=one.ids, embeds=one.embeds)
    assert torch.equal(*(text_nll(net, executor_prefix(net, p), ids, mask) for p in (one, other)))
    before = text_nll(net, executor_prefix(net, plans()), ids, mask)
    for row, i, j in (plans() >= 0).nonzero().tolist():
        changed = plans()
        changed[row, i, j] = (changed[row, i, j] + 1) % 4
        after = text_nll(net, executor_prefix(net, changed), ids, mask)
        assert ((after - before).abs().sum(1) > 1e-6).nonzero().flatten().tolist() == [row]


def test_a_null_plan_is_one_embedding_whatever_the_plan():
    net, (ids, mask) = model(), texts()
    null = torch.ones(4, dtype=torch.bool)
    prefix = executor_prefix(net, plans(), null)
    head = backbone_of(net).unified_head
    assert torch.equal(prefix.embeds, torch.stack([head.special(BOS), head.special(NULL)]).expand(4, -1, -1))
    text_log_prob(net, prefix, ids, mask).sum().backward()
    touched = head.table.grad.any(-1).nonzero().flatten().tolist()
    assert touched == [BOS, NULL]


def test_a_dropped_token_is_not_read_but_predicted():
    net, (ids, mask) = model(), texts()
    dropped = torch.zeros_like(mask, dtype=torch.bool)
    dropped[:, 0] = True
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 60
    one, two = (text_nll(net, executor_prefix(net, plans()), x, mask, dropped) for x in (ids, other))
    assert torch.equal(one[:, 1:], two[:, 1:]) and not (one[:, 0] == two[:, 0]).any()
    plain = text_nll(net, executor_prefix(net, plans()), ids, mask)
    assert torch.equal(plain[:, 0], one[:, 0]) and not torch.equal(plain[:, 1], one[:, 1])


def test_a_text_of_one_token():
    """1e-12."""
    net, (ids, mask) = model(), texts()
    nll = text_nll(net, executor_prefix(net, plans()), ids[:, :1])
    assert (nll - text_nll(net, executor_prefix(net, plans()), ids, mask)[:, :1]).abs().max() <= 1e-12


def test_gradient_checkpointing_changes_nothing():
    """1e-12, of the loss and every gradient."""
    net, (ids, mask) = model().train(), texts()
    plain = text_log_prob(net, executor_prefix(net, plans()), ids, mask).sum()
    net.gradient_checkpointing_enable({"use_reentrant": False})
    ours = text_log_prob(net, executor_prefix(net, plans()), ids, mask).sum()
    assert abs(ours - plain) <= 1e-12 * abs(plain)
    assert_same_gradients(net, ours, plain, 1e-12)


def test_what_cannot_be_is_named():
    net, (ids, mask) = model(), texts("left")
    with pytest.raises(ValueError, match="padded on the right"):
        text_nll(net, executor_prefix(net, plans()), ids, mask)
    with pytest.raises(ValueError, match=r"null \(3,\) torch.bool: must be \(4,\)"):
        executor_prefix(net, plans(), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"null \(4,\) torch.float32"):
        executor_prefix(net, plans(), torch.zeros(4))
    with pytest.raises(ValueError, match=r"must be \(rows, 2, 4\)"):
        executor_prefix(net, plans()[0])
