"""Unsloth's GRPO loss with thinking states: against a plain loss, and when something is wrong."""

import importlib.util

import pytest

import patches
from patches.grpo_accumulated_loss import thinking_batch, thinking_forwards
from tests import tiny
from tests.unsloth_scripts import run
from unsloth_ext import attach_thinking
from unsloth_ext.hrpo.adapter import THINKING_MODULES


unsloth = [
    pytest.mark.unsloth,
    pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="unsloth is not installed"),
]
LAYOUTS = [pytest.param(x, marks=unsloth) for x in ("packing=1 mini_batch=None", "packing=0 mini_batch=2")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_a_plain_one(layout):
    found = run("grpo")[layout]
    assert found["thinking_matters"] > 0.01
    assert found["loss_difference"] <= 1e-5 and found["gradient_difference"] <= 1e-5
    assert found["old_log_probs"] <= 1e-5
    assert found["packed"] is (True if "packing=1" in layout else None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_thinking_states_it_is_the_original_bit_for_bit(layout):
    assert run("grpo")[layout]["untouched"] and run("grpo")[layout]["restored"]


@pytest.mark.parametrize("case", [pytest.param(x, marks=unsloth) for x in ("other_rows", "nothing", "unpatched")])
def test_nothing_is_lost_in_silence(case):
    assert case in run("grpo")["errors"]


@pytest.mark.unsloth
@unsloth[1]
def test_unsloths_exports_keep_the_thinking_modules_or_are_refused():
    found = run("grpo")["refused"]
    files = found.pop("files")
    assert files["modules"] == sorted(THINKING_MODULES) and files["equal"] and files["settings"] and files["card"]
    assert "but no latent_reasoning.json" in files["lost"]  # what Unsloth writes without our patch
    names = {"gguf", "push gguf", "push merged", "merged and push", "4-bit", "fp8", "torchao", "ggml", "openvino"}
    assert found.keys() == names
    for name, message in found.items():
        assert "would leave out this model's thinking modules" in message, name


@pytest.mark.slow
@pytest.mark.unsloth
@unsloth[1]
def test_saved_models_say_the_same_in_a_fresh_process():
    report = run("loading", run("grpo")["saved"])
    for how in (True, False):
        assert "but no latent_reasoning.json" in report.pop(f"lost {how}")
    assert report.pop("runs/missing").startswith("there is no folder")
    assert report.pop("no such/model/at all").startswith("there is no folder")
    for kind, found in report.items():
        assert found["difference"] <= 1e-5, kind
        assert found["unsloth"] is kind.endswith("True")
        assert found["trainable"] == 6


def test_rows_are_found_in_any_layout():
    """A stock model: whole batch, chunks, rows without padding and one long row, all in the batch's own order."""
    import torch

    model = attach_thinking(tiny.model("llama"))
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 4, 5, 6, 0, 0], [9, 4, 5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    states = torch.randn(3, 3, 32)
    seen = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True, prepend=False)
    thinking = {"thinking_mask": mask, "thinking_embeds": states}
    calls = [ids, ids[:1], ids[1:], *[row[row != 0][None] for row in ids], ids[ids != 0][None]]
    with thinking_forwards(model, ids, 0, **thinking):
        # our pre-hook was registered later, so it has not run yet when `seen` is filled; kwargs is one dict for both
        for call in calls:
            model(input_ids=call)
    handed = [(k["thinking_mask"], k["thinking_embeds"]) for k in seen]
    whole = torch.nn.functional.pad(mask, (3, 0))
    assert handed[0][0].equal(whole) and handed[1][0].equal(whole[:1]) and handed[2][0].equal(whole[1:])
    assert [h[0].tolist() for h in handed[3:6]] == [[[False, True, True, False]], [[False] * 3 + [True]], [[False] * 4]]
    assert handed[6][0].equal(whole[ids != 0][None])
    # Rows 1 and 2 have the same tokens: their order decides
    assert handed[4][1][0, 3].equal(states[1, 0]) and handed[5][1][0, 3].equal(states[2, 0])
    with pytest.raises(ValueError, match="not rows of the batch"), thinking_forwards(model, ids, 0, **thinking):
        model(input_ids=ids[:, :4])
    with pytest.raises(patches.PatchError, match=r"rows \[1, 2\]"), thinking_forwards(model, ids, 0, **thinking):
        model(input_ids=ids[:1])
    with pytest.raises(ValueError, match="do not cover"), thinking_forwards(model, ids[:2], 0, **thinking):
        pass


def test_states_that_nobody_took_are_an_error():
    with pytest.raises(patches.PatchError, match="without its thinking states"), thinking_batch(thinking_mask=None):
        pass
    with pytest.raises(TypeError, match="thinking_maks"), thinking_batch(thinking_maks=None):
        pass
