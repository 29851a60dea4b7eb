"""A user's error ends a command with one sentence and status 2; a bug keeps its traceback."""

import logging
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from transformers.utils.versions import require_version

from patches.versions import UntestedVersionError, require_tested
from tests import tiny
from trl_ext.cli import user_errors
from trl_ext.cli.user_errors import explained, sentence
from trl_ext.common.config_checks import one_of


def raised(work) -> BaseException:
    with pytest.raises(BaseException) as found:
        work()
    return found.value


class Some:
    color = "red"


def reraised():
    try:
        one_of(Some, color=("blue",))
    except ValueError as error:
        raise error


def from_another():
    try:
        int("x")
    except ValueError as error:
        error.add_note("note")
        raise


def a_module_in_its_forward_pass():
    import torch

    class Refuses(torch.nn.Module):
        def forward(self, x):
            return one_of(Some, color=("blue",))

    Refuses()(1)


def transformers_checks_a_setting():
    from transformers import TrainingArguments

    TrainingArguments(output_dir="x", report_to="none", use_cpu=True, eval_strategy="sometimes")


def transformers_in_a_forward_pass():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    LlamaForCausalLM(config)()


def a_template_without_system_messages():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


def torch_innards():
    import torch

    torch.nn.Linear(2, 3)(torch.zeros(4))


@pytest.mark.parametrize(
    "work, said",
    [
        (lambda: one_of(Some, color=("blue", "green")), "color='red': choose one of blue, green"),
        (reraised, "color='red': choose one of blue"),
        (lambda: os.stat("no/such/file"), "no/such/file: No such file or directory"),
        (lambda: os.listdir("/proc/self/mem"), "/proc/self/mem: Not a directory"),
        (lambda: __import__("no_such_package.part"), "the package 'no_such_package' is not installed in"),
        (lambda: require_version("no-such-package>=0.9.3"), "the package 'no-such-package' is not installed in"),
        (a_module_in_its_forward_pass, "color='red': choose one of blue"),
        (
            a_template_without_system_messages,
            "the tokenizer's chat template does not accept these messages, or it is damaged:  ",
        ),
        (transformers_checks_a_setting, "sometimes is not a valid IntervalStrategy"),
    ],
)
def test_what_a_user_did_is_a_sentence(work, said):
    found = sentence(raised(work))
    assert found.startswith(said) and "\n" not in found


@pytest.mark.parametrize(
    "work",
    [
        lambda: int("x"),
        from_another,
        lambda: {}["x"],
        lambda: [][0],
        lambda: len(1),
        lambda: 1 / 0,
        lambda: __import__("unsloth_ext.no_such_module"),
        torch_innards,
        transformers_in_a_forward_pass,
        threading.Lock().release,
    ],
)
def test_a_bug_is_none(work):
    assert sentence(raised(work)) is None


def test_versions_and_error_classes_of_our_own(monkeypatch):
    monkeypatch.setattr("patches.versions.version_problem", lambda package: f"{package} 0.1 is not tested")
    error = raised(lambda: require_tested("trl"))
    assert isinstance(error, UntestedVersionError) and "trl 0.1 is not tested" in sentence(error)


def from_vllm(code, **names):
    """Run code that is said to be vLLM's."""
    exec(code, {"__name__": "vllm.config", **names})


def test_what_vllm_says_of_an_engine_is_a_sentence():
    """It checks its settings with pydantic."""
    pydantic = pytest.importorskip("pydantic")

    def check(self):
        if self.length > 9:
            raise ValueError("length (10)\nis too much")
        return self

    fields = {"share": (float, pydantic.Field(le=1, default=1)), "length": (int, 1)}
    checks = {"check": pydantic.model_validator(mode="after")(check)}
    settings = pydantic.create_model("Settings", **fields, __validators__=checks)
    error = raised(lambda: from_vllm("Settings(share=2)", Settings=settings))
    assert sentence(error).startswith("share: Input should be less than or equal to 1 (from vllm; ")
    error = raised(lambda: from_vllm("Settings(length=10)", Settings=settings))
    assert sentence(error).startswith("length (10) is too much (from vllm; ")
    assert sentence(raised(lambda: settings(share=2))) is None
    error = raised(lambda: from_vllm("raise ValueError('Free memory is too little')"))
    assert sentence(error).startswith("Free memory is too little (from vllm; ")


def test_others_may_explain_an_error_first(monkeypatch):
    monkeypatch.setattr(
        user_errors, "explainers", [lambda e: ("stopped", 130) if isinstance(e, KeyboardInterrupt) else None]
    )

    def stop():
        raise KeyboardInterrupt

    assert explained(raised(stop)) == ("stopped", 130)
    assert explained(raised(lambda: os.stat("no/such/file")))[1] == 2
    assert explained(raised(lambda: int("x"))) is None


SCRIPT = """
from trl_ext.cli.user_errors import in_sentences
in_sentences()
in_sentences()
import sys
from trl_ext.common.config_checks import one_of
class Some: color = "red"
one_of(Some, color=("blue",)) if "user" in sys.argv else int("x")
"""


def test_the_process_says_it_and_exits_with_2(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(*argv, **env):
        done = subprocess.run(
            [sys.executable, str(script), *argv], env={**os.environ, **env}, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr.splitlines()

    sentence = "script.py: color='red': choose one of blue"
    assert run("user") == (2, [sentence])
    status, lines = run("user", "--traceback")
    assert status == 2 and lines[0].startswith("Traceback") and lines[-1] == sentence
    assert run("user", LATENT_TRACEBACK="1") == (status, lines)
    status, lines = run("bug")
    assert status == 1 and lines[0].startswith("Traceback") and "ValueError: invalid literal" in lines[-1]
    # A rank whose launcher does not end it has something of its own to say
    code = SCRIPT.replace("in_sentences()\nin_", "import trl_ext.cli.user_errors as u\nu.PATIENCE = 0.1\nin_", 1)
    script.write_text(code)
    assert run("user", RANK="1") == (2, [sentence.replace("color", "rank 1: color")])


def test_a_full_disk_is_a_sentence_in_every_command(monkeypatch):
    monkeypatch.setattr(user_errors, "explainers", [])  # what a run has said of its folder
    with open("/dev/full", "w") as file:
        file.write("x")
        assert explained(raised(file.flush)) == ("The disk is full", 2)
        with pytest.raises(OSError):
            file.close()


@pytest.fixture
def in_a_recipe(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", SimpleNamespace(speaks=True))  # is not to be changed
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals(in_a_recipe, monkeypatch, terminal):
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: terminal))
    user_errors.in_sentences()
    assert os.environ.get("TQDM_DISABLE") == (None if terminal else "1")


def test_an_offer_that_nobody_needs_is_left_out(in_a_recipe, caplog):
    """bitsandbytes makes it when it is imported, on some CPUs only."""
    user_errors.in_sentences()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    logger.warning("another")
    assert [record.getMessage() for record in caplog.records] == ["another"]


def test_what_peft_sets_right_by_itself_is_left_out(in_a_recipe, recwarn):
    """A LoRA on GPT-2's layers, as CODI's and PCCoT's configurations have it."""
    user_errors.in_sentences()
    get_peft_model(tiny.model("gpt2"), LoraConfig(target_modules=["c_attn"]))
    assert not [warning for warning in recwarn if "fan_in_fan_out" in str(warning.message)]
