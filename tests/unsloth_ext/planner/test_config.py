"""Settings, the table's layout, and which modules a model is given."""

from dataclasses import asdict

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig

from tests import tiny
from unsloth_ext import (
    ConceptTypeConfig,
    PlannerConfig,
    attach_planner,
    backbone_of,
    plan_lengths,
    with_planner_modules,
)
from unsloth_ext.common.attaching import read_settings
from unsloth_ext.planner.method import METHOD
from unsloth_ext.planner.vocabulary import BOS, DROPPED, NULL, PLAN, PlannerVocabulary, check_plan

from .setups import WAYS, config, model, plans


@pytest.mark.parametrize("way", WAYS)
def test_rows_stand_as_documented_and_none_twice(way):
    vocabulary = PlannerVocabulary(config(*way))
    rows = [BOS, PLAN, NULL, DROPPED, vocabulary.sep(0), vocabulary.sep(1)]
    for i, (size, quota) in enumerate(((5, 3), (4, 4))):
        span = vocabulary.outputs(i)
        assert span.stop - span.start == size + 1 and vocabulary.eos(i) == span.stop - 1
        assert vocabulary.concepts(i) == slice(span.start, span.stop - 1)
        queries = vocabulary.queries(i)
        assert queries.stop - queries.start == (quota if way[1] else 0)
        rows += [*range(span.start, span.stop), *range(queries.start, queries.stop)]
    assert sorted(rows) == list(range(vocabulary.size))


def test_settings_survive_json():
    given = PlannerConfig([ConceptTypeConfig("a", 3, 2), {"name": "b", "quota": 5}], "parallel", True)
    assert given.types[1] == ConceptTypeConfig("b", 256, 5) and given.max_quota == 5
    assert PlannerConfig(**asdict(given)) == given == read_settings(asdict(given), "x", METHOD)
    assert PlannerConfig().groups == [[0]] and given.groups == [[0, 1]]
    assert PlannerConfig(given.types).groups == [[0], [1]]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"types": []}, r"types=\[\]: must be a list of at least one"),
        ({"types": [{"size": 3}]}, "not a ConceptTypeConfig; its fields are name, num_concepts, quota"),
        ({"types": [{"quota": 0}]}, "quota=0: must be a whole number, at least 1"),
        ({"types": [{"num_concepts": True}]}, "num_concepts=True"),
        ({"types": [{"name": ""}]}, "name=''"),
        ({"types": [{}, {}]}, "names must differ, found plan, plan"),
        ({"ordering": "random"}, "ordering='random': choose one of sequential, parallel"),
        ({"multi_token": 1}, "multi_token=1: must be True or False"),
    ],
)
def test_what_cannot_be_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PlannerConfig(**settings)


def put(plan, row, i, j, concept):
    plan[row, i, j] = concept
    return plan


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p[:, :1], "must be .rows, 2, 4. torch.int64"),
        (lambda p: p.int(), "torch.int32: must be"),
        (lambda p: put(p, 0, 1, 0, 4), r"plan\[0, 1, 0\]=4: type 't1' has concepts 0 to 3, at most 4"),
        (lambda p: put(p, 2, 0, 3, 0), r"plan\[2, 0, 3\]=0: .* at most 3"),
        (lambda p: put(p, 3, 1, 1, -1), r"plan\[3, 1, 2\]=1"),
        (lambda p: put(p, 1, 0, 0, -2), r"plan\[1, 0, 0\]=-2"),
    ],
)
def test_what_is_no_plan_is_named(change, message):
    check_plan(plans(), config())
    with pytest.raises(ValueError, match=message):
        check_plan(change(plans()), config())


def test_lengths():
    assert plan_lengths(plans()).tolist() == [[2, 1], [0, 4], [3, 0], [3, 4]]


@pytest.mark.parametrize("std, larger", [(0.02, True), (1.0, False)])
def test_new_rows_are_as_large_as_embeddings_and_logits_larger_than_noise(std, larger):
    """Logits of normed states start with a standard deviation of 3, or more where embeddings are that large; 5%. <BOS> is
    the model's own."""
    net = tiny.model(std=std)
    with torch.no_grad():
        net.model.norm.weight.fill_(0.7)
    weight = net.get_input_embeddings().weight
    net = attach_planner(net, config(sizes=((500, 3),)))
    head = backbone_of(net).unified_head
    states = net.model.norm(torch.randn(500, 32, generator=torch.Generator().manual_seed(3)))
    assert abs(head(states, 0).std() / (3 if larger else std * 0.7 * 32**0.5) - 1) < 0.05
    rows = list(range(1, 5))  # <PLAN>, <NULL>, <DROPPED>, <SEP>
    assert abs(head.table[rows].std() / weight.square().mean().sqrt() - 1) < 0.25
    assert torch.equal(head.table[BOS], weight[net.config.bos_token_id])
    assert head.type_embedding.shape == (2, 32) and not head.type_embedding.any()
    assert net.config.planner == asdict(config(sizes=((500, 3),)))
    bare = tiny.model()
    bare.config.bos_token_id = None
    head = backbone_of(attach_planner(bare)).unified_head
    assert not (head.table[BOS] == weight[1]).any()


def test_lora_trains_the_head_as_it_is():
    net = model(lora=True)
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    assert sum("unified_head" in name for name in trained) == 2
    assert not any("unified_head" in name and "lora_" in name for name, _ in net.named_parameters())
    assert with_planner_modules(LoraConfig(modules_to_save=["a"])) == {"modules_to_save": ["a", "unified_head"]}


def test_what_cannot_plan_says_so():
    with pytest.raises(ValueError, match="already has the planner"):
        attach_planner(model())
    with pytest.raises(ValueError, match="wrapped by PEFT already"):
        attach_planner(model(lora=True))
    with pytest.raises(ValueError, match="TrainableTokensConfig cannot train the planner"):
        with_planner_modules(TrainableTokensConfig())
    net = tiny.model()
    net.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2'"):
        attach_planner(net)
    net = tiny.model()
    net.config.layer_types, net.config.sliding_window = ["full_attention", "sliding_attention"], 16
    with pytest.raises(ValueError, match="sliding-window attention over 16 tokens in layer 1; a plan needs"):
        attach_planner(net)
