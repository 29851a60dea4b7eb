"""What comes from outside is printed letter by letter, on a screen and into a file."""

import pytest
from rich.table import Table

from trl_ext.cli.console import LOG_WIDTH, PlainConsole
from unsloth_ext.minimind.tokenizer import train_tokenizer


ODD = "[/INST] [bold]x[/] :smile: [/nope] $\\frac"


def test_nothing_is_markup(capsys):
    table = Table(title=f"title {ODD}")
    table.add_column(f"head {ODD}")
    table.add_row(f"cell {ODD}")
    console = PlainConsole()
    console.print(f"text {ODD}")
    console.print(table)
    out = capsys.readouterr().out
    assert all(f"{what} {ODD}" in out for what in ("title", "head", "cell", "text"))


@pytest.mark.parametrize("columns", [None, "40"])
def test_a_path_stays_on_one_line(capsys, monkeypatch, columns):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    path = "/a/long/folder" * 20 + "/summary.json"
    table = Table(title=f"{path}: 12 problems")
    table.add_column("x")
    console = PlainConsole()
    console.print(f"Written: {path}, {path}")
    console.print(table)
    out = capsys.readouterr().out.splitlines()
    assert f"Written: {path}, {path}" in out and f"{path}: 12 problems" in out
    assert console.width == int(columns or LOG_WIDTH)


def test_the_other_ranks_say_nothing(capsys):
    PlainConsole(quiet=True).print("x")
    assert not capsys.readouterr().out


def test_training_a_tokenizer_puts_no_empty_lines_into_a_file(capfd):
    train_tokenizer(iter(["12 plus 7? 19.\n"]), 260)
    assert capfd.readouterr() == ("", "")
