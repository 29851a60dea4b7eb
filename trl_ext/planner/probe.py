"""Probe of one batch: how much worse the executor is with plans other than the text's own."""

import torch
from torch import nn

from unsloth_ext.common.evaluation_mode import evaluating
from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.planner.executor import executor_prefix, text_nll
from unsloth_ext.planner.planning import plan

from . import monitors


ROWS = 16


@torch.no_grad()
def probe(model: nn.Module, batch: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, float]:
    """Measure the first 16 rows of a batch, with greedy plans. Ours.

        monitor/delta_nll_null, ..._shuffled, ..._random    cost of another plan, nats per token; shuffled needs two rows
        monitor/commonest_plan                              share of texts that have the most common plan
        monitor/nll_0-64, ...                               NLL by position, nats per token

    Args:
        model: a causal LM with a planner, wrapped or not.
        batch: as of `PlannerCollator`, on the model's device.
        generator: of random plans and of the shuffled order.
    """
    batch = {name: value[:ROWS] for name, value in batch.items()}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    scored = batch["labels"][:, 1:] != -100
    sizes = [kind.num_concepts for kind in backbone_of(model).planner_config.types]

    def nll(plans: torch.Tensor, null: bool = False) -> torch.Tensor:
        everywhere = torch.full((len(ids),), null, device=ids.device)
        return text_nll(model, executor_prefix(model, plans, everywhere), ids, mask) * scored

    with evaluating(model):
        own = plan(model, batch["plan_input_ids"], batch["plan_attention_mask"])
        good = nll(own)
        bad = {"null": nll(own, null=True), "random": nll(monitors.random_like(own, sizes, generator))}
        if len(ids) > 1:
            bad["shuffled"] = nll(monitors.shuffled(own, generator))
    found = {f"delta_nll_{name}": monitors.delta_nll(x[scored], good[scored]) for name, x in bad.items()}
    found["commonest_plan"] = monitors.commonest_share(own)
    found |= {f"nll_{name}": value for name, value in monitors.nll_by_bucket(good, scored).items()}
    return {f"monitor/{name}": value.item() for name, value in found.items()}
