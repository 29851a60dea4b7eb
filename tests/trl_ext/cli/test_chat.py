"""`latent-reasoning chat` with models of every kind."""

import io

import pytest

from tests.kinds import ALL, saved
from trl_ext.cli import chat
from unsloth_ext.common.text_model import TextModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}

    def get(method, peft=True):
        if (method, peft) not in found:
            found[method, peft] = saved(method, peft, tmp_path_factory.mktemp(method))
        return str(found[method, peft])

    return get


@pytest.mark.parametrize("method, peft", ALL)
def test_each_turn_is_answered(folders, method, peft, capsys):
    folder = folders(method, peft)
    assert chat.main([folder, "--say", "1+2=", "7=", "--max_new_tokens", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    model = TextModel.from_pretrained(folder)
    for i, prompt in enumerate(("1+2=", "7=")):
        out = model.complete(**model.tokenize([prompt]), max_new_tokens=6, do_sample=False)
        assert lines[3 * i : 3 * i + 2] == [f"user: {prompt}", f"{method}: {model.decode(out)[0]}"]
        latent = f", {int(out.latent)} of them latent" if out.latent.any() else ""
        assert method != "latent" or latent
        assert lines[3 * i + 2] == f"({int(out.lengths)} tokens, {int(out.forwards)} forward passes{latent})"


def test_a_dialogue_is_kept_with_a_chat_template(folders, monkeypatch, capsys):
    seen = []
    tokenize = TextModel.tokenize

    def seeing(self, prompts):
        self.tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
        return seen.append(prompts[0]) or tokenize(self, prompts)

    monkeypatch.setattr(TextModel, "tokenize", seeing)
    opened = TextModel.from_pretrained.__func__

    def templated(cls, *given, **how):
        model = opened(cls, *given, **how)
        model.tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
        return model

    monkeypatch.setattr(TextModel, "from_pretrained", classmethod(templated))
    chat.main([folders("plain"), "--say", "1+2=", "7=", "--system", "no", "--max_new_tokens", "3"])
    answer = capsys.readouterr().out.splitlines()[1].removeprefix("plain: ")
    assert seen == ["s:no;u:1+2=;a:", f"s:no;u:1+2=;a:{answer};u:7=;a:"]


def test_turns_come_from_a_pipe(folders, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("1+2=\n\n7=\n"))
    chat.main([folders("plain"), "--max_new_tokens", "2"])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("user")] == [
        "user: 1+2=",
        "user: 7=",
    ]


def test_sampling_follows_the_seed(folders, capsys):
    said = []
    for seed in ("1", "1", "2"):
        chat.main([folders("hrpo"), "--say", "1+2=", "--temperature", "1.5", "--seed", seed, "--max_new_tokens", "8"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--state", "off"], "--state off: a concept model has on"),
        (["--system", "x"], "--system: this concept model reads one text at a time"),
        (["--max_new_tokens", "0"], "max_new_tokens=0"),
        (["--temperature", "-1"], "temperature=-1"),
    ],
)
def test_wrong_flags(folders, flags, said):
    with pytest.raises(ValueError) as error:
        chat.main([folders("concept"), "--say", "1", *flags])
    assert str(error.value).startswith(said)


def test_without_a_length_it_takes_what_is_left(tmp_path, capsys):
    """A model with few positions answers; a length that was asked for is refused."""
    folder = str(saved("latent", True, tmp_path))
    opened = TextModel.from_pretrained(folder)
    assert opened.room(10) == opened.model.config.max_position_embeddings - 10 - 4 - 2
    assert chat.main([folder, "--say", "1+" * 80]) == 0
    assert "tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="positions"):
        chat.main([folder, "--say", "1+2=", "--max_new_tokens", "9999"])
