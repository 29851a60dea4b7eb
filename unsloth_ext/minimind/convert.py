"""Loading of MiniMind's published weight files (`.pth`) into stock classes."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .presets import minimind_config


BUFFERS = ("freqs_cos", "freqs_sin")  # rotary tables in older files; the configuration has the same information


def load_minimind(file: str | Path, preset: str, yarn: bool = False) -> PreTrainedModel:
    """Load a weight file into a stock causal LM.

    Args:
        file: a state dict saved by `torch.save`. It is read with `weights_only=True`, so no code in it is run.
        preset, yarn: as for `minimind_config`.

    Returns:
        The model, fp32, in evaluation mode.

    Raises:
        ValueError: the file is no state dict, or has other tensors or shapes than the preset. The message names the
            first.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # errors of several kinds
        raise ValueError(f"{file} is no state dict that can be loaded safely: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file} is no state dict: it does not hold only tensors")
    config = minimind_config(preset, yarn)
    if preset == "minimind3-moe":
        config.norm_topk_prob = True  # the published weights were trained so
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    found = {name: value for name, value in state.items() if name.split(".")[-1] not in BUFFERS}
    found.setdefault("lm_head.weight", found.get("model.embed_tokens.weight"))
    experts = {"minimind2-moe": _granite, "minimind3-moe": _qwen}.get(preset)
    if experts is not None:
        try:
            found = experts(found, config.num_hidden_layers, config.num_local_experts)
        except KeyError as error:
            raise ValueError(f"{file} has no {error.args[0]}, which {preset} needs") from error
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | found.keys()):
        here, there = (None if x.get(name) is None else list(x[name].shape) for x in (found, wanted))
        if here != there:
            raise ValueError(f"{file}: {name} is {here or 'missing'}, {preset} has {there or 'none'}")
    if not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"]):
        raise ValueError(f"{file}: lm_head.weight is not model.embed_tokens.weight, which {preset} ties")
    model.load_state_dict(found)
    return model.eval()


def _stacked(state: dict[str, torch.Tensor], prefix: str, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove a layer's experts from the state and stack them: gate and up (E, 2 inner, d), down (E, d, inner)."""
    gate, up, down = (
        torch.stack([state.pop(f"{prefix}.{e}.{name}_proj.weight") for e in range(experts)])
        for name in ("gate", "up", "down")
    )
    return torch.cat([gate, up], dim=1), down


def _qwen(state: dict[str, torch.Tensor], layers: int, experts: int) -> dict[str, torch.Tensor]:
    for i in range(layers):
        here = f"model.layers.{i}.mlp.experts"
        state[f"{here}.gate_up_proj"], state[f"{here}.down_proj"] = _stacked(state, here, experts)
    return state


def _granite(state: dict[str, torch.Tensor], layers: int, experts: int) -> dict[str, torch.Tensor]:
    for i in range(layers):
        old, new = f"model.layers.{i}.mlp", f"model.layers.{i}.block_sparse_moe"
        stacked = _stacked(state, f"{old}.experts", experts)
        state[f"{new}.experts.gate_up_proj"], state[f"{new}.experts.down_proj"] = stacked
        state[f"{new}.router.weight"] = state.pop(f"{old}.gate.weight")
        inner, outer = _stacked(state, f"{old}.shared_experts", 1)
        shared = f"model.layers.{i}.shared_mlp"
        state[f"{shared}.input_linear.weight"], state[f"{shared}.output_linear.weight"] = inner[0], outer[0]
    return state
