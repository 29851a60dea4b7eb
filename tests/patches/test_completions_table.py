"""The table of sampled completions shows names of rewards and columns letter by letter."""

import pytest
from rich.errors import MarkupError
from trl.trainer import utils

from patches import completions_table
from patches.registry import applied, status
from tests.trl_ext.hrpo import setups


SHOWN = {"prompts": ["1+"], "completions": ["[/INST]"], "advantages": [0.0], "step": 3}


def test_names_are_no_markup(capsys):
    rewards, extra = {"[/bold]": [1.0], "rm[v2]": [0.5]}, {"[red]": ["[/x]"]}
    if not status()["completions_table"].live:
        with pytest.raises(MarkupError):  # to be removed once TRL shows them
            utils.print_prompt_completions_sample(**SHOWN, rewards=rewards)
    with applied("completions_table"):
        utils.print_prompt_completions_sample(**SHOWN, rewards=rewards, extra=extra)
        utils.print_prompt_completions_sample(**SHOWN, rewards={"plain": [1.0]}, num_samples=1)
    out = capsys.readouterr().out
    for text in ("[/bold]", "rm[v2]", "[red]", "[/x]", "[/INST]", "plain"):
        assert text in out


def test_a_trainer_that_shows_completions_shows_them(tmp_path, capsys, monkeypatch):
    """Its own columns too."""
    monkeypatch.setenv("COLUMNS", "200")

    def odd(completions, log_extra, **_):
        log_extra("[/column]", completions)
        return [float(len(each)) for each in completions]

    odd.__name__ = "[/bold]"
    setups.hrpo(tmp_path, max_steps=1, reward=odd, log_completions=True).train()
    out = capsys.readouterr().out
    assert "[/bold]" in out and "[/column]" in out


def test_ensure_applies_it():
    completions_table.ensure()
    assert status()["completions_table"].live
