"""Trainers in two processes on a CPU, on each engine of `accelerate launch`, with the files that TRL ships for it."""

from pathlib import Path

import trl
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from tests import processes


FILES = {"ddp": "multi_gpu", "fsdp1": "fsdp1", "fsdp2": "fsdp2"}


def launch(engine: str, *arguments: object) -> None:
    """Run `tests.engines.worker ENGINE arguments...` in two ranks."""
    processes.launch("tests.engines.worker", engine, *arguments, processes=2, env=environment(engine))


def environment(engine: str) -> dict[str, str]:
    """What `accelerate launch --config_file` of TRL's file sets, but in float32."""
    file = Path(trl.__file__).parent / "accelerate_configs" / f"{FILES[engine]}.yaml"
    flags = ["--config_file", str(file), "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([*flags, "script.py"]))
    wanted = ("ACCELERATE_", "FSDP_")
    return {name: value for name, value in prepare_multi_gpu_env(arguments).items() if name.startswith(wanted)}
