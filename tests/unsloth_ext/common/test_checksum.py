"""The checksum of a model's weights."""

import pytest
import torch
from peft.tuners.lora import LoraLayer

from tests.unsloth_ext.latent.adapted import adapted
from unsloth_ext.common.checksum import checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checksum_sees_the_smallest_change_of_any_parameter(dtype):
    model = adapted()[0].to(dtype)
    seen = {checksum(model)}
    assert checksum(model) in seen
    for i, parameter in enumerate(model.parameters(), start=1):
        with torch.no_grad():
            parameter.flatten()[-1:].copy_(torch.nextafter(parameter.flatten()[-1:], torch.tensor(9.0, dtype=dtype)))
        seen.add(checksum(model))
        assert len(seen) == 1 + i
    for parameter in model.parameters():
        if parameter.dim() == 2:
            for dim in (0, 1):
                with torch.no_grad():
                    parameter.copy_(parameter.roll(1, dim))
                seen.add(checksum(model))
    assert len(seen) == 1 + i + 2 * sum(parameter.dim() == 2 for parameter in model.parameters())
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", 0.5)
    with_scale = checksum(model)
    model.base_model.disable_adapter_layers()
    assert len({*seen, with_scale, checksum(model)}) == len(seen) + 2
