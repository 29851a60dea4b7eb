"""What Unsloth is told that it may train in full."""

from patches.peft_module_check import PATCH
from tests import tiny
from unsloth_ext import attach_thinking


def test_only_thinking_modules_that_are_there_pass():
    asked = []
    allowed = PATCH.wrap(lambda model, name: asked.append(name) or "as Unsloth says")
    with_them, without = attach_thinking(tiny.model()), tiny.model()
    assert allowed(with_them, "thinking_projection") is True and not asked
    others = [(without, "thinking_projection"), (with_them, "thinking_more"), (with_them, "q_proj"), (with_them, None)]
    assert {allowed(*other) for other in others} == {"as Unsloth says"} and asked == [name for _, name in others]
