"""Unsloth's decoder forward with thinking states equals the stock decoder's, in every layout it is used in."""

import importlib.util

import pytest

from tests.unsloth_scripts import run


pytestmark = [
    pytest.mark.unsloth,
    pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="unsloth is not installed"),
]
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma")
LAYOUTS = ("left_padded", "left_packed", "packed", "not_thinking", "notes_call", "notes_recompute")


@pytest.fixture(scope="module")
def report():
    return run("families")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_the_stock_models(report, family, layout):
    assert report["forward"][family]["thinking_matters"] > 0.1
    assert report["forward"][family]["fast_calls"] > 0
    assert report["forward"][family][layout] <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_thinking_modules_equal_the_stock_models(report, family):
    assert report["forward"][family]["gradients"] <= 1e-5


def test_gradient_checkpointing_changes_no_gradient(report):
    assert report["checkpointing"] <= 1e-6


def test_every_binding_is_replaced_and_restored(report):
    undo = report["undo"]
    assert undo.pop("modules") >= 6 and undo.pop("fingerprint") == 12
    assert all(undo.values()), undo


def test_a_model_loaded_before_the_patch_thinks_too(report):
    assert report["loaded_first"] <= 1e-5
