"""Trainers in two processes on a CPU, on each engine of `accelerate launch`, with the files that TRL ships for it."""

import json
import sys
from pathlib import Path
from typing import Any

import trl
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests import processes


FILES = {"ddp": "multi_gpu"} | {name: name for name in ("fsdp1", "fsdp2", "zero1", "zero2", "zero3")}


def launch(engine: str, case: str, folder: Path, **options: Any) -> None:
    """Run `tests.engines.worker ENGINE CASE FOLDER OPTIONS` in two ranks; the engine "one": in one process."""
    count = 1 if engine == "one" else 2
    arguments = engine, case, folder, json.dumps(options)
    half = {"ACCELERATE_MIXED_PRECISION": "bf16"} if options.get("settings", {}).get("bf16") else {}
    processes.launch("tests.engines.worker", *arguments, processes=count, env=environment(engine) | half)


def environment(engine: str) -> dict[str, str]:
    """What `accelerate launch --config_file` of TRL's file sets, but in float32."""
    if engine == "one":
        return {}
    file = Path(trl.__file__).parent / "accelerate_configs" / f"{FILES[engine]}.yaml"
    return environment_of(file)


def environment_of(file: Path) -> dict[str, str]:
    """What `accelerate launch --config_file FILE` sets, but in float32 and with two processes."""
    always = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    argv = ["--config_file", str(file), *always, "script.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        # What DeepSpeed compiles is of this environment. In a shared cache, another one's killed build stops all others
        own = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": f"{sys.prefix}/torch_extensions"}
        env = prepare_deepspeed_cmd_env(arguments)[1] | own
    else:
        env = prepare_multi_gpu_env(arguments)
    if env.get("FSDP_VERSION") == "1":  # accelerate looks for a GPU to send the weights of the first process
        env |= {"FSDP_SYNC_MODULE_STATES": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    return {name: value for name, value in env.items() if name.startswith(("ACCELERATE_", "FSDP_", "DS_", "TORCH_"))}
