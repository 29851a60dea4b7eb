"""A planner in fp64, and what it should say: no cache, no padding, no branches, each prediction a plain causal text."""

import functools
import itertools

import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from unsloth_ext import PlannerConfig, attach_planner, backbone_of, with_planner_modules
from unsloth_ext.planner.vocabulary import BOS, DROPPED, NULL, PLAN


FAMILIES = ("llama", "qwen2", "qwen3")
WAYS = [(ordering, multi) for ordering in ("sequential", "parallel") for multi in (False, True)]
LENGTHS = (7, 3, 5, 1)


def config(ordering="sequential", multi_token=False, sizes=((5, 3), (4, 4))):
    types = [{"name": f"t{i}", "num_concepts": v, "quota": q} for i, (v, q) in enumerate(sizes)]
    return PlannerConfig(types, ordering, multi_token)


def model(family="qwen3", way=WAYS[0], sizes=((5, 3), (4, 4)), lora=False, dtype=torch.float64):
    """Every parameter large enough to matter, type embeddings too."""
    net = attach_planner(tiny.model(family), config(*way, sizes=sizes))
    if lora:
        peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        vars(peft).update(with_planner_modules(peft))
        net = get_peft_model(net, peft)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "unified_head" in name or "lora_" in name:
                parameter.normal_(std=0.3)
    net = net.to(dtype).eval()
    for module in net.modules():
        if type(module).__name__.endswith("RMSNorm") and dtype is torch.float64:
            module.forward = functools.partial(norm, module)
    return net


def norm(module, x):
    """As theirs, without the step through fp32."""
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def texts(side="right", seed=2):
    """Ids and mask (4, 7) of ragged texts."""
    ids = torch.randint(3, 60, (len(LENGTHS), 7), generator=torch.Generator().manual_seed(seed))
    times = torch.arange(7)
    mask = torch.stack([times < n if side == "right" else times >= 7 - n for n in LENGTHS])
    return ids, mask.long()


def plans():
    """For the types of `config`: full, empty, of one concept and of the quota."""
    return torch.tensor(
        [
            [[4, 0, -1, -1], [3, -1, -1, -1]],
            [[-1, -1, -1, -1], [0, 1, 2, 3]],
            [[1, 2, 3, -1], [-1, -1, -1, -1]],
            [[0, 0, 0, -1], [1, 1, 1, 1]],
        ]
    )


def causal(net, slots, positions):
    """Final hidden states (T, d) of one row of embeddings, by transformers' own causal path."""
    backbone = backbone_of(net)
    embeds, positions = torch.stack(slots)[None], torch.tensor([positions])
    mask = torch.ones_like(positions)
    return backbone(
        inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
    ).last_hidden_state[0]


def rows_of(net):
    """The table's rows, written out: by name, and `V`, `Q` by type."""
    head, types = backbone_of(net).unified_head, backbone_of(net).planner_config.types
    at, v, q = 4 + len(types), [], []
    for kind in types:
        v.append(range(at, at + kind.num_concepts + 1))
        at += kind.num_concepts + 1
    for kind in types if backbone_of(net).planner_config.multi_token else ():
        q.append(range(at, at + kind.quota))
        at += kind.quota
    assert at == len(head.table)
    return v, q


class Literal:
    """One text, type after type and step after step. `embed(i, j)` is what concept j of type i was read as."""

    def __init__(self, net, ids):
        self.net, self.backbone, self.ids = net, backbone_of(net), ids
        self.head, self.config = self.backbone.unified_head, self.backbone.planner_config
        self.v, self.q = rows_of(net)

    def typed(self, row, kind):
        return self.head.table[row] + self.head.type_embedding[kind]

    def logits(self, i, read):
        """Of the next concept of type `i`, or of all of them with queries, given what was read (n lists of (d,))."""
        length = len(self.ids)
        tokens = self.backbone.embed_tokens(self.ids) + self.head.type_embedding[0]
        slots, positions = [*tokens, self.typed(PLAN, 0)], [*range(length + 1)]
        for k in [i] if self.config.ordering == "parallel" else range(i + 1):
            concepts = [embed + self.head.type_embedding[k + 1] for embed in read[k]]
            if k == i and self.config.multi_token:
                concepts = [self.typed(row, k + 1) for row in self.q[k]]
            slots += [self.typed(4 + k, k + 1), *concepts]
            positions += range(length + 1, length + 2 + len(concepts))
        hidden = causal(self.net, slots, positions)
        logits = hidden @ self.head.table[list(self.v[i])].T
        return logits[-len(self.q[i]) :] if self.config.multi_token else logits[-1]

    def log_prob(self, plan):
        total, read = 0, [[] for _ in plan]
        for i, kind in enumerate(self.config.types):
            concepts = [int(c) for c in plan[i] if c >= 0]
            for j in range(min(len(concepts) + 1, kind.quota)):
                logits = self.logits(i, read)
                log_probs = (logits[j] if self.config.multi_token else logits).log_softmax(-1)
                total = total + log_probs[concepts[j] if j < len(concepts) else kind.num_concepts]
                if j < len(concepts):
                    read[i].append(self.head.table[self.v[i][concepts[j]]])
        return total

    def greedy(self):
        read, plan = [[] for _ in self.config.types], torch.full((len(self.config.types), self.config.max_quota), -1)
        for i, kind in enumerate(self.config.types):
            for j in range(kind.quota):
                logits = self.logits(i, read)
                concept = int((logits[j] if self.config.multi_token else logits).argmax())
                if concept == kind.num_concepts:
                    break
                plan[i, j] = concept
                read[i].append(self.head.table[self.v[i][concept]])
        return plan


def every_plan(net):
    """(N, n, Q): all there are."""
    settings = backbone_of(net).planner_config
    each = [
        [
            list(concepts) + [-1] * (settings.max_quota - n)
            for n in range(kind.quota + 1)
            for concepts in itertools.product(range(kind.num_concepts), repeat=n)
        ]
        for kind in settings.types
    ]
    return torch.tensor(list(itertools.product(*each)))


def executor_log_prob(net, plan, ids, embeds=None, null=False, dropped=None):
    """log p of one text (T,) after one plan (n, Q): a plain causal text."""
    literal = Literal(net, ids)
    quota = literal.config.max_quota
    slots, positions = [literal.typed(BOS, 0)], [0]
    for i, concepts in enumerate(plan if not null else ()):
        concepts = [int(c) for c in concepts if c >= 0]
        given = (
            [literal.head.table[literal.v[i][c]] for c in concepts] if embeds is None else embeds[i][: len(concepts)]
        )
        slots += [literal.typed(4 + i, i + 1), *[embed + literal.head.type_embedding[i + 1] for embed in given]]
        positions += range(len(concepts) + 1)
    if null:
        slots, positions = [*slots, literal.typed(NULL, 0)], [0, 0]
    start = len(slots)
    for t, token in enumerate(ids):
        lost = dropped is not None and dropped[t]
        read = literal.head.table[DROPPED] if lost else literal.backbone.embed_tokens(token)
        slots.append(read + literal.head.type_embedding[0])
        positions.append(quota + 1 + t)
    hidden = causal(net, slots, positions)[start - 1 : -1]
    logits = net.get_output_embeddings()(hidden)
    return logits.log_softmax(-1).gather(-1, ids[:, None]).sum()


def gradients(net, value):
    """Of every parameter that took part."""
    read = {n: p for n, p in net.named_parameters() if p.requires_grad}
    return dict(zip(read, torch.autograd.grad(value, list(read.values()), allow_unused=True, retain_graph=True)))


def assert_same_gradients(net, ours, plain, tolerance=1e-10):
    ours, plain = gradients(net, ours), gradients(net, plain)
    some = 0
    for name, wanted in plain.items():
        found = ours[name]
        if wanted is None:
            assert found is None or found.abs().max() == 0, name
            continue
        assert (found - wanted).abs().max() <= tolerance * max(1, wanted.abs().max()), name
        some += bool(wanted.abs().max() > 0)
    assert some > 5
