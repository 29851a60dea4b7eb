"""Learning rates and gradient bounds by role."""

import torch
from torch import nn

from trl_ext.common.parameter_groups import clip_each_role, split_by_role


def test_each_role_is_bounded_by_itself_and_one_without_gradient_has_norm_0_where_its_weights_are():
    """`meta` stands for a GPU: torch's norm of no gradient is on the CPU, and a total of all could not be made."""
    model = nn.ModuleDict(
        {"inner": nn.ModuleDict({"gate": nn.Linear(2, 1, bias=False), "head": nn.Linear(2, 1, bias=False)})}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    split_by_role(optimizer, model, {"gate": 0.5})
    assert {group["role"]: group["lr"] for group in optimizer.param_groups} == {"policy": 1.0, "gate": 0.5}
    model.inner.gate.weight.grad, model.inner.head.weight.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.3, 0.4]])
    assert {role: round(norm.item(), 4) for role, norm in clip_each_role(optimizer, 1.0).items()} == {
        "policy": 0.5,
        "gate": 5,
    }
    assert torch.allclose(model.inner.gate.weight.grad, torch.tensor([[0.6, 0.8]])), "to norm 1"
    assert torch.equal(model.inner.head.weight.grad, torch.tensor([[0.3, 0.4]])), "as it was"
    away = torch.optim.SGD([{"params": [nn.Parameter(torch.empty(2, device="meta"))], "role": "projection"}], lr=1.0)
    assert clip_each_role(away, 1.0)["projection"].device.type == "meta"
