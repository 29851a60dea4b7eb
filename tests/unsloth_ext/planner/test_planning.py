"""The planner against one text after the other: likelihoods, greedy plans, samples, beams, positions, passes."""

import pytest
import torch

from tests.marks import slow
from unsloth_ext import backbone_of, plan, plan_log_prob, plan_log_probs
from unsloth_ext.planner.head import concept_embeds
from unsloth_ext.planner.planning import teacher_forced
from unsloth_ext.planner.vocabulary import PLAN

from .setups import FAMILIES, WAYS, Literal, assert_same_gradients, every_plan, model, plans, texts


SMALL = ((2, 2), (3, 1))  # 7 x 4 plans
CASES = [(f, WAYS[0], False) for f in FAMILIES] + [("qwen3", way, lora) for way in WAYS for lora in (False, True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family, way, lora", CASES)
def test_likelihoods_are_those_of_each_text_alone(family, way, lora, side):
    """1e-10 in fp64: values, and gradients of every trained parameter; ragged texts."""
    net, (ids, mask), given = model(family, way, lora=lora), texts(side), plans()
    found = plan_log_prob(net, ids, mask, given)
    wanted = torch.stack([Literal(net, row[m.bool()]).log_prob(p) for row, m, p in zip(ids, mask, given)])
    assert (found - wanted).abs().max() <= 1e-10
    assert_same_gradients(net, (found * torch.arange(1, 5)).sum(), (wanted * torch.arange(1, 5)).sum())


@pytest.mark.parametrize("way", WAYS)
def test_each_prediction_has_its_slot(way):
    """Zero behind the end, none for the end of a full type."""
    net, (ids, mask) = model(way=way), texts()
    found = plan_log_probs(net, ids, mask, plans())
    made = torch.tensor([[3, 2], [1, 4], [3, 1], [3, 4]])
    assert torch.equal(found != 0, torch.arange(4) < made[..., None])


@pytest.mark.parametrize("way", WAYS)
def test_all_plans_together_have_probability_one(way):
    """1e-10: no prediction leaks into another type, none is counted twice."""
    net = model(way=way, sizes=SMALL)
    every = every_plan(net)
    ids = texts()[0][:1].expand(len(every), -1)
    assert len(every) == 28 and abs(plan_log_prob(net, ids, None, every).exp().sum() - 1) <= 1e-10


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family, way, lora", CASES)
def test_greedy_plans_are_those_of_each_text_alone(family, way, lora, side):
    net, (ids, mask) = model(family, way, lora=lora), texts(side)
    found = plan(net, ids, mask)
    wanted = [Literal(net, row[m.bool()]).greedy() for row, m in zip(ids, mask)]
    assert torch.equal(found, torch.stack(wanted))
    assert len({tuple(row.flatten().tolist()) for row in found}) > 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [slow(1.0), 2.0])
def test_samples_are_as_frequent_as_they_are_likely(way, temperature):
    """20,000 of them, within 5 standard deviations for every plan; a temperature flattens each prediction."""
    net = model(way=way, sizes=SMALL)
    every, ids = every_plan(net), texts()[0][:1]
    head = backbone_of(net).unified_head
    count = 20_000
    found = plan(
        net,
        ids,
        do_sample=True,
        num_return_sequences=count,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    head.forward = lambda hidden, i: type(head).forward(head, hidden, i) / temperature
    wanted = plan_log_prob(net, ids.expand(len(every), -1), None, every).exp()
    seen = (found[:, None] == every).all(-1).all(-1).sum(0)
    assert seen.sum() == count
    assert ((seen - count * wanted).abs() <= 5 * (count * wanted * (1 - wanted)).sqrt() + 1).all()


@pytest.mark.parametrize("sizes", [SMALL, SMALL[::-1]])
@pytest.mark.parametrize("way", WAYS)
def test_enough_beams_find_the_likeliest_plans_in_their_order(way, sizes):
    """All 28 plans of every text, the last one too."""
    net = model(way=way, sizes=sizes)
    every, (ids, mask) = every_plan(net), texts()
    found = plan(net, ids, mask, num_beams=28, num_return_sequences=28).unflatten(0, (4, 28))
    for row, m, ours in zip(ids, mask, found):
        scores = plan_log_prob(net, row[m.bool()].expand(28, -1), None, every)
        assert torch.equal(ours, every[scores.argsort(descending=True)])
    assert torch.equal(plan(net, ids, mask, num_beams=28), found[:, 0])


def test_few_beams_are_enough_where_predictions_do_not_see_each_other():
    net = model(way=("parallel", True))
    every, (ids, mask) = every_plan(net), texts()
    every = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:2000]]
    found = plan(net, ids, mask, num_beams=2, num_return_sequences=2)
    assert torch.equal(plan(net, ids, mask, num_beams=2), found[::2])
    ours = plan_log_prob(net, ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0), found).view(4, 2)
    assert (ours[:, 0] > ours[:, 1]).all()
    for row, m, (_, second) in zip(ids, mask, ours):
        others = plan_log_prob(net, row[m.bool()].expand(len(every), -1), None, every)
        assert (others > second + 1e-9).sum() <= 1  # the best plan at most


@pytest.mark.parametrize("way", WAYS)
def test_types_see_each_other_only_in_sequence(way):
    """Another type's rows, separator and embedding: bit-equal logits in parallel; in sequence those before matter."""
    net, (ids, mask), given = model(way=way), texts(), plans()
    head = backbone_of(net).unified_head

    def logits():
        alive = given >= 0
        embeds = torch.stack([head.concepts(i)[given[:, i].clamp(min=0)] for i in (0, 1)], dim=1)
        return teacher_forced(net, ids, mask, embeds, alive)

    with torch.no_grad():
        before = logits()
        assert [x.shape for x in before] == [(4, 3, 6), (4, 4, 5)]
        for changed, other in ((0, 1), (1, 0)):
            kept = head.table.clone(), head.type_embedding.clone()
            head.table[head.vocabulary.outputs(changed)] += 1
            head.table[head.vocabulary.sep(changed)] += 1
            head.type_embedding[changed + 1] += 1
            after = logits()
            head.table.copy_(kept[0]), head.type_embedding.copy_(kept[1])
            assert not torch.equal(after[changed], before[changed])
            unseen = way[0] == "parallel" or changed == 1
            assert torch.equal(after[other], before[other]) == unseen


class Passes(list):
    """Positions of each pass through the backbone."""

    def __init__(self, net):
        self.hook = backbone_of(net).register_forward_pre_hook(
            lambda _, __, kwargs: self.append(kwargs["position_ids"]), with_kwargs=True
        )


def test_positions_begin_anew_for_every_type():
    net, (ids, mask) = model(), texts("left")
    passes = Passes(net)
    plan_log_probs(net, ids, mask, plans())
    assert len(passes) == 1
    for row, length in zip(passes[0].tolist(), (7, 3, 5, 1)):
        o = length + 1
        assert row[7 - length :] == [*range(length), length, o, o + 1, o + 2, o + 3, o, o + 1, o + 2, o + 3]


@pytest.mark.parametrize(
    "way, widths",
    [
        (WAYS[0], [9, 1, 1, 2, 1, 1, 1]),
        (WAYS[1], [7 + 1 + 1 + 3, 3 + 1 + 4]),
        (WAYS[2], [7 + 1 + 2, 2, 2, 1]),
        (WAYS[3], [7 + 1 + 4 + 5]),
    ],
)
def test_a_text_is_read_once_and_concepts_in_as_few_passes_as_can_be(way, widths):
    """Slots of each pass where nothing ends before its quota: what is not needed any more is not read."""
    net, (ids, _) = model(way=way), texts()
    head = backbone_of(net).unified_head

    def never_ending(hidden, i):
        logits = type(head).forward(head, hidden, i)
        return torch.cat([logits[..., :-1], logits[..., -1:] - 1e3], dim=-1)

    head.forward = never_ending
    passes = Passes(net)
    assert (plan(net, ids) >= 0).sum() == 4 * 7
    assert [p.shape[1] for p in passes] == widths
    passes.clear()
    head.forward = lambda hidden, i: -never_ending(hidden, i)
    assert (plan(net, ids) == -1).all()
    assert len(passes) == {WAYS[0]: 2, WAYS[1]: 2, WAYS[2]: 1, WAYS[3]: 1}[way]


@pytest.mark.parametrize("way", WAYS)
def test_eager_attention_says_the_same(way):
    """1e-4 of logs in fp64: eager attention's softmax is fp32."""
    net, (ids, mask) = model(way=way), texts("left")
    wanted, greedy = plan_log_probs(net, ids, mask, plans()), plan(net, ids, mask)
    net.set_attn_implementation("eager")
    assert (plan_log_probs(net, ids, mask, plans()) - wanted).abs().max() <= 1e-4
    assert torch.equal(plan(net, ids, mask), greedy)


def test_an_empty_text_has_a_plan():
    net = model()
    none = torch.zeros(2, 0, dtype=torch.long)
    assert torch.equal(plan(net, none), Literal(net, none[0]).greedy().expand(2, -1, -1))
    assert backbone_of(net).unified_head.special(PLAN).shape == (32,)


def test_training_goes_on_after_planning():
    net, (ids, mask) = model().train(), texts()
    net.gradient_checkpointing_enable({"use_reentrant": False})
    wanted = plan(net.eval(), ids, mask)
    assert torch.equal(plan(net.train(), ids, mask), wanted) and net.training
    plan_log_prob(net, ids, mask, plans()).sum().backward()  # one pass: no cache that could be lost


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_return_sequences": 0}, "num_return_sequences=0: must be at least 1"),
        ({"num_return_sequences": 3}, "num_return_sequences=3 from num_beams=1"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 from num_beams=2"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=2 with do_sample=True"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0.0: must be more than 0"),
        ({"num_beams": 40, "num_return_sequences": 29}, "num_return_sequences=29: there are fewer plans"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    net, (ids, mask) = model(sizes=SMALL), texts()
    with pytest.raises(ValueError, match=message):
        plan(net, ids, mask, **settings)


def test_likelihoods_of_what_is_no_plan():
    net, (ids, mask) = model(), texts()
    with pytest.raises(ValueError, match="plan has 3 rows, input_ids 4"):
        plan_log_prob(net, ids, mask, plans()[:3])
    with pytest.raises(ValueError, match="at most 3 of them"):
        plan_log_prob(net, ids, mask, plans() * 0)


@pytest.mark.parametrize("way", WAYS)
def test_diverse_beams_pay_for_what_beams_before_them_have(way):
    """Against a loop over slots and beams; the greedy plan is among them, and enough to pay makes all of them differ."""
    net, (ids, mask) = model(way=way), texts()
    config = backbone_of(net).planner_config
    beams = [torch.full((4, len(config.types), config.max_quota), -1) for _ in range(3)]
    rows = torch.arange(4)
    for i, kind in enumerate(config.types):
        for j in range(kind.quota):
            paid = torch.zeros(4, kind.num_concepts + 1, dtype=torch.float64)
            for beam in beams:
                alive = torch.ones(4, dtype=torch.bool) if j == 0 else beam[:, i, j - 1] >= 0
                embeds = concept_embeds(backbone_of(net), beam)
                log_probs = teacher_forced(net, ids, mask, embeds, beam >= 0)[i][:, j].log_softmax(-1)
                choice = (log_probs - 1.5 * paid).argmax(-1)
                paid[rows[alive], choice[alive]] += 1
                beam[:, i, j] = choice.where(alive & (choice < kind.num_concepts), -1)
    scores = torch.stack([plan_log_prob(net, ids, mask, beam) for beam in beams], dim=1)
    wanted = torch.stack(beams, dim=1)[rows[:, None], scores.argsort(dim=1, descending=True, stable=True)]
    ask = {"num_beams": 3, "num_return_sequences": 3}
    assert torch.equal(plan(net, ids, mask, beam_diversity=1.5, **ask).unflatten(0, (4, 3)), wanted)
    greedy = plan(net, ids, mask)
    apart = plan(net, ids, mask, beam_diversity=1e4, **ask).unflatten(0, (4, 3))
    for row, one in zip(apart, greedy):
        assert len(row.unique(dim=0)) == 3 and (row == one).flatten(1).all(1).any()
    with pytest.raises(ValueError, match="beam_diversity=-1"):
        plan(net, ids, mask, beam_diversity=-1.0, **ask)
