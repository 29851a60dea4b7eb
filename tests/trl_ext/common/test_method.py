"""Records of the training side: a mistake in one is named with its file."""

from dataclasses import replace

import pytest

from trl_ext.common import method
from trl_ext.common.method import Command, commands, index_table, training_methods


SPO = training_methods()["spo"]
TARGET = Command("train-x", "x", "x.py")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"commands": TARGET}, "commands=.* is not a tuple"),
        ({"trainers": {"NoTrainer": "SPOConfig"}}, "NoTrainer is named in `trainers`"),
        ({"trainers": {"SPOTrainer": "NoConfig"}}, "NoConfig is named in `trainers`"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(changes, said):
    with pytest.raises(ValueError, match=rf"^trl_ext/spo/method.py: {said}"):
        replace(SPO, **changes)


def test_a_target_of_two_methods_is_named_with_both_files(monkeypatch):
    records = {name: replace(SPO, name=name, commands=(TARGET,)) for name in ("a", "b")}
    monkeypatch.setattr(method, "training_methods", lambda: records)
    with pytest.raises(ValueError, match=r"^trl_ext/b/method.py: the target train-x is in trl_ext/a/method.py already"):
        commands()


def test_a_record_without_a_title_is_named(monkeypatch):
    records = {**training_methods(), "spo": replace(SPO, about="One completion a prompt.")}
    monkeypatch.setattr(method, "training_methods", lambda: records)
    with pytest.raises(ValueError, match=r"^trl_ext/spo/method.py: about='One completion a prompt.'; write 'Title: "):
        index_table()
