"""docs/dropin.md is what `tests.drop_in.page` makes, and its two lines are enough."""

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.trl_ext.hrpo import setups as hrpo

from .features import own_rows
from .page import lines_of, page
from .trainers import CASES


DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_made_from_the_tables():
    assert (DOCS / "dropin.md").read_text() == page(), "run python -m tests.drop_in.page > docs/dropin.md"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_lines_take_the_place_of_trls(tmp_path, case):
    """A script for TRL, after the two lines of the page. It trains, and the loss is a number."""
    names = {}
    exec(lines_of(case), names)
    config, trainer = names[case.parent.replace("Trainer", "Config")], names[case.parent]
    torch.manual_seed(0)
    if case.parent == "GRPOTrainer":
        args = hrpo.arguments(config, tmp_path / "out", **case.settings)
        made = trainer(
            model=case.base(tmp_path),
            args=args,
            reward_funcs=hrpo.reward_digits,
            train_dataset=own_rows(case),
            processing_class=case.tokenizer(),
        )
    else:
        args = config(**tiny.short_run(tmp_path / "out", gradient_checkpointing=False, **case.settings))
        made = trainer(
            model=case.model(),
            args=args,
            train_dataset=own_rows(case),
            processing_class=case.tokenizer(),
            **case.more(),
        )
    made.train()
    assert [entry["loss"] for entry in made.state.log_history if "loss" in entry]
