"""Models that recipes make: published whole, by whichever run was first."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from patches.versions import installed_version
from tests import tiny
from trl_ext.tasks import arithmetic, equations, facts, reachability, warm_start
from trl_ext.tasks.warm_start import publish


def test_a_run_that_comes_second_takes_what_the_first_has_made(tmp_path):
    folder = tmp_path / "model"

    def make(part):
        (part / "weights").write_text("second")
        folder.mkdir()
        (folder / "weights").write_text("first")  # by another process, meanwhile

    publish(folder, make)
    assert (folder / "weights").read_text() == "first" and list(tmp_path.iterdir()) == [folder]


def test_a_run_that_fails_leaves_nothing(tmp_path):
    def make(part):
        (part / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "model", make)
    assert not list(tmp_path.iterdir())


MADE = {
    "tiny": (warm_start.tiny_warm_start, {"delimiter": "####"}),
    "steps": (warm_start.tiny_with_steps, {}),
    "facts": (warm_start.tiny_with_facts, {}),
    "reachability": (warm_start.tiny_reachability, {"delimiter": "#"}),
}


@pytest.fixture
def where(monkeypatch, tmp_path):
    """The folder that a model would be in, which is not taught."""
    monkeypatch.setattr(warm_start.Taught, "teach", lambda self, part, rows, progress: None)

    def folder(kind="tiny", **changes):
        make, more = MADE[kind]
        return make(tmp_path, **{"seed": 0, "held_out": 20, "steps": 30, "progress": False, **more, **changes})

    return folder


def test_teaching_is_announced_once(where, capsys):
    where(progress=True)
    assert "30 steps of SFT" in capsys.readouterr().out
    where(progress=True)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("kind", MADE)
def test_nothing_that_changes_the_model_is_left_out_of_its_name(where, monkeypatch, kind):
    same = where(kind)
    assert where(kind) == same == where(kind, progress=True)
    changed = {where(kind, **change) for change in ({"seed": 1}, {"held_out": 21}, {"steps": 31})}
    original = warm_start.sft_settings
    for name, value in original(30, 8, 1e-3, 0).items():
        other = "linear" if name == "lr_scheduler_type" else not value if isinstance(value, bool) else (value or 0) + 1
        with monkeypatch.context() as patch:
            patch.setattr(warm_start, "sft_settings", lambda *how, n=name, o=other: original(*how) | {n: o})
            changed.add(where(kind))
    with monkeypatch.context() as patch:  # rates and batches in the code that calls it
        patch.setattr(
            warm_start, "sft_settings", lambda steps, batch, rate, *more: original(steps, batch, 2 * rate, *more)
        )
        changed.add(where(kind))
    with monkeypatch.context() as patch:
        patch.setattr(warm_start, "installed_version", lambda name: "0" if name == "trl" else installed_version(name))
        changed.add(where(kind))
    module, name = {
        "tiny": (arithmetic, "tiny_config"),
        "steps": (equations, "config"),
        "facts": (facts, "config"),
        "reachability": (reachability, "config"),
    }[kind]
    config = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *how, **more: _wider(config(*how, **more)))
    changed.add(where(kind))
    assert same not in changed


def _wider(config):
    config.intermediate_size *= 2
    return config


def test_the_delimiter_and_the_size_count(where):
    assert len({where(), where(delimiter="##"), where(kind="steps"), where(kind="facts")}) == 4
    assert where(kind="reachability", delimiter="##") != where(kind="reachability")
    assert where(heads=3) != where()
    assert where(kind="steps", size=equations.TEACHER) != where(kind="steps")
    assert where(kind="facts", size=facts.Size(width=32)) != where(kind="facts")


def test_an_unpacked_file_is_a_folder_of_plain_floats_that_ends_its_turns(monkeypatch, tmp_path):
    """Loading of the file itself is transformers' (and needs a package of its own)."""

    def load(folder, gguf_file, dtype, quantization_config):
        assert (folder, gguf_file, quantization_config.dequantize) == (tmp_path, "model.gguf", True)
        model = tiny.model("llama", dtype=dtype)
        model.config.quantization_config = quantization_config
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *_, **__: tiny.tokenizer(("<|im_end|>", "<|endoftext|>"))
    )
    warm_start._unpack_gguf(tmp_path / "model.gguf", tmp_path / "made")
    monkeypatch.undo()
    tokenizer, config = (kind.from_pretrained(tmp_path / "made") for kind in (AutoTokenizer, AutoConfig))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert not hasattr(config, "quantization_config")
    for settings in (config, GenerationConfig.from_pretrained(tmp_path / "made")):
        assert settings.eos_token_id == tokenizer.eos_token_id and settings.pad_token_id == tokenizer.pad_token_id
