"""docs/vllm.md, word for word."""

import shlex
import shutil

import pytest

from tests.test_examples import PAGES, SERVE, run_examples
from unsloth_ext import FastThinkingModel

from .engines import checkpoint


pytestmark = [pytest.mark.vllm, pytest.mark.v1]


def test_the_examples_run(tmp_path, monkeypatch):
    from tests import vllm_on_cpu  # noqa: F401

    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint()[1], "thinking-model")
    model, tokenizer = FastThinkingModel.from_pretrained("thinking-model", dtype="float32", use_unsloth=False)
    FastThinkingModel.get_peft_model(model, r=2).save_pretrained("adapter")
    tokenizer.save_pretrained("adapter")
    run_examples(PAGES["vllm"])


@pytest.mark.parametrize("command", SERVE)
def test_the_flags_of_the_server_are_there(command):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from tests import vllm_on_cpu  # noqa: F401

    words = shlex.split(command)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words[words.index("serve") + 1 :])
    assert args.additional_config == {"answer_delimiter": "####"}
