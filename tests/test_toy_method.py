"""A method is added by its folders and its records alone: a copy of the project, with the files of tests/toy_method beside
it and nothing edited, lists, trains, saves, loads and resumes it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import fresh
from tests.test_house import ROOT


COPIED = ("patches", "unsloth_ext", "trl_ext", "recipes", "docs", "requirements", "Makefile", "pyproject.toml")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The copy, and what runs Python in it."""
    folder = tmp_path_factory.mktemp("project")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
        else:
            shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "tests" / "toy_method", folder, dirs_exist_ok=True)

    def run(*arguments):
        return fresh(*arguments, cwd=folder, env={"PYTHONPATH": str(folder)})

    return folder, run


@pytest.fixture(scope="module")
def trained(project):
    """The folder of a run with LoRA, by its make target."""
    folder, run = project
    done = run("-m", "trl_ext.cli.targets", "train-toy", "--", "--lora_r", "4")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / "toy_tiny", done


def ok(done):
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_it_is_listed_and_exported(project):
    folder, run = project
    assert "make train-toy " in ok(run("-m", "trl_ext.cli.targets"))
    ok(run("-m", "trl_ext.cli.stubs"))
    assert "from .toy.trainer import ToyTrainer as ToyTrainer" in (folder / "trl_ext" / "__init__.pyi").read_text()
    table = ok(run("-c", "from unsloth_ext.common.generation_arguments import table; print(table())")).splitlines()
    assert "| toy |" in table[0]
    assert next(row for row in table if row.startswith("| `inputs_embeds` |")).split("|")[-3].strip() == "refused"


def test_it_trains_and_reports(trained):
    output, done = trained
    assert "step 6 of 6" in done.stdout and "shift 0." in done.stdout  # beside the progress
    assert (output / "summary.json").is_file() and (output / "curves.png").stat().st_size > 10_000


def test_it_resumes_bit_for_bit(project, trained):
    _, run = project
    output, _ = trained
    other = output.with_name("resumed")
    shutil.copytree(output, other)
    shutil.rmtree(other / "checkpoint-6")
    shutil.rmtree(other / "final")
    (other / "summary.json").unlink()  # as if it had been stopped at step 3
    resumed = ("--resume_from_checkpoint", str(other / "checkpoint-3"), "--output_dir", str(other), "--lora_r", "4")
    ok(run("-m", "recipes.toy", *resumed))
    whole, again = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (output, other))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert any("toy_shift" in name for name in whole)


def test_it_is_saved_with_a_card_and_loaded(project, trained):
    _, run = project
    output, _ = trained
    card = (output / "final" / "README.md").read_text()
    assert "It adds a learned vector to every input embedding." in card and "ToyModel.from_pretrained" in card
    code = f"""
import torch
from safetensors.torch import load_file
from unsloth_ext import ToyModel, backbone_of
loaded = ToyModel.from_pretrained({str(output / "final")!r})
saved = next(x for n, x in load_file({str(output / "final" / "adapter_model.safetensors")!r}).items() if "toy_shift" in n)
vector = dict(backbone_of(loaded.model).named_parameters())["toy_shift.modules_to_save.default.vector"]
assert torch.equal(vector, saved)
print(loaded.generate("1+2=", max_new_tokens=2))
try:
    loaded.generate("1+2=", inputs_embeds=vector)
except ValueError as error:
    print(error)
"""
    said = ok(run("-c", code))
    assert "inputs_embeds: the model makes its own prompt" in said


def test_other_loaders_refuse_its_folder(project, trained):
    _, run = project
    output, _ = trained
    done = run("-c", f"from unsloth_ext import LatentModel; LatentModel.from_pretrained({str(output / 'final')!r})")
    assert done.returncode and "open it with unsloth_ext.ToyModel.from_pretrained" in done.stderr
