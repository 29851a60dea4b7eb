"""The embedded defaults of the recipes in two processes, with the files in recipes/accelerate/."""

import json
import shlex

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from tests import processes
from tests.processes import ROOT

from .launch import environment_of


FILES = ROOT / "recipes" / "accelerate"
SMALL = (
    "--max_steps 2 --eval_size 12 --eval_every 1 --disable_tqdm true --per_device_train_batch_size 8 --logging_steps 1"
)
RECIPES = {
    "hrpo_gsm8k": "--sft_steps 10 --dry_run_rows 4 --max_completion_length 8",
    "codi_gsm8k": "--sft_steps 10",
    "kava_gsm8k": "--sft_steps 10",
    "pccot_gsm8k": "--sft_steps 10",
    "lotus_gsm8k": "--sft_steps 10",
    "coconut_gsm8k": "--sft_steps 10 --reset_optimizer false",
    "latent_grpo": "--sft_steps 10 --codi_steps 2 --dry_run_rows 4",
    "kv_distill": "--teacher_steps 10",
    "concept_v2": "--base_steps 5",
    "planner_executor": "",
}
RUN = [(recipe, file) for recipe in RECIPES for file in ("ddp", "fsdp2", "zero2", "zero3")]
REFUSED = {("planner_executor", "zero3"): "Planner-executor cannot train on DeepSpeed ZeRO-3"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(tmp_path, cache, recipe, file):
    flags = shlex.split(f"{SMALL} {RECIPES[recipe]} --cache_dir {cache} --output_dir {tmp_path / 'out'}")
    flags += ["--use_cpu", str(file == "ddp")]
    script = ROOT / "recipes" / f"{recipe}.py"
    env = environment_of(FILES / f"{file}.yaml")
    processes.launch("tests.engines.recipe_worker", file, script, *flags, processes=2, env=env)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["n_eval"] == 12
    assert (tmp_path / "out" / "final").is_dir() and (tmp_path / "out" / "curves.png").exists()


@pytest.mark.engines
def test_the_default_trains_in_two_processes(tmp_path, cache):
    run(tmp_path, cache, "hrpo_gsm8k", "ddp")


@pytest.mark.engines
@pytest.mark.parametrize("recipe, file", RUN)
def test_every_recipe_with_every_file(tmp_path, cache, recipe, file):
    if (recipe, file) in REFUSED:
        with pytest.raises(AssertionError, match=REFUSED[recipe, file]):
            run(tmp_path, cache, recipe, file)
    else:
        run(tmp_path, cache, recipe, file)


def test_a_sentence_says_what_is_wrong(tmp_path):
    """Once torch has started the processes, it handles uncaught errors too."""
    flags = ["--dataset", "gsm8k", "--output_dir", str(tmp_path / "out")]
    script = ROOT / "recipes" / "hrpo_gsm8k.py"
    with pytest.raises(AssertionError, match="--dataset gsm8k: the tiny model can only read"):
        processes.launch(
            "tests.engines.recipe_worker", "ddp", script, *flags, processes=2, env=environment_of(FILES / "ddp.yaml")
        )


def test_several_nodes_meet_at_the_first():
    flags = ["--rdzv_backend", "c10d", "--machine_rank", "2", "--main_process_ip", "10.0.0.1"]
    argv = ["--config_file", str(FILES / "several_nodes.yaml"), *flags, "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    env = prepare_multi_gpu_env(arguments)
    assert arguments.rdzv_endpoint == "10.0.0.1:29500" and arguments.rdzv_backend == "c10d"
    assert (int(arguments.nnodes), int(arguments.nproc_per_node), arguments.node_rank) == (4, 8, 2)
    assert env["FSDP_VERSION"] == "2" and env["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize("file", sorted(FILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_file_says_what_accelerate_reads(file):
    _, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    )
    assert defaults.num_processes == 8 * defaults.num_machines and defaults.mixed_precision == "bf16"
