"""HRPO in two stages: first with a frozen thinking projection, then with a trained one and a new schedule.

    make train-hrpo-two-stage                            # the embedded default; ARGS="--output_dir mine --seed 1"
    python recipes/hrpo_two_stage.py --model_name Qwen/Qwen2.5-1.5B-Instruct --lr_thinking_projection 5e-5

It runs recipes/hrpo_gsm8k.py twice and takes all of its flags. Stage 1 writes to `stage_1/` of the output folder, with
--lr_thinking_projection 0. Stage 2 starts from its weights and writes to `stage_2/`. Steps and epochs are per stage. Steps,
epochs and the projection's rate in stage 2 may come from a --config file.
"""

import subprocess
import sys
from argparse import SUPPRESS
from pathlib import Path

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from trl_ext.cli.command_line import CommandLine
from trl_ext.cli.flags import chosen, read_config
from trl_ext.common.config_checks import at_least
from trl_ext.common.run_folder import begun_by, check_free, resume_command


RECIPE = Path(__file__).parent / "hrpo_gsm8k.py"
STEPS = {"tiny": 45, "smollm2": 4}  # steps per stage; other models train for one epoch


def main() -> int:
    parser = CommandLine(
        description=__doc__.split("\n\n")[0],
        epilog="All other flags are those of recipes/hrpo_gsm8k.py, for both stages; its --help shows them.",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/hrpo_two_stage"),
        metavar="FOLDER",
        help="Folder for stage_1/ and stage_2/ (default: runs/hrpo_two_stage).",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="A configuration file of recipes/hrpo_gsm8k.py, for both stages."
    )
    parser.add_argument(
        "--lr_thinking_projection",
        type=float,
        metavar="NUMBER",
        help="Learning rate of the thinking projection in stage 2 (default: from --config, or 5e-5); stage 1 uses 0.",
    )
    parser.add_switch("--overwrite", "Delete earlier runs in both folders and start over.")
    parser.add_argument("--check_flags", action="store_true", help="Check flags and configuration, and exit.")
    parser.add_argument("--resume_from_checkpoint", nargs="?", const="latest", help=SUPPRESS)
    parser.add_argument("--help_all", action="help", help=SUPPRESS)
    given, others = parser.parse_known_args()
    at_least(given, lr_thinking_projection=0)
    said = {}
    if given.config is not None:
        said, others = read_config(given.config), ["--config", str(given.config), *others]
    rate = given.lr_thinking_projection
    rate = said.get("lr_thinking_projection", 5e-5) if rate is None else rate
    first, second = given.output_dir / "stage_1", given.output_dir / "stage_2"
    if given.resume_from_checkpoint:
        command = begun_by(second) or begun_by(first) or ["recipes/hrpo_gsm8k.py", "--output_dir", str(second)]
        raise ValueError(f"--resume_from_checkpoint: resume the stage with its own command: {resume_command(command)}")
    if given.check_flags:  # the flags are the same for both stages
        return subprocess.run([sys.executable, str(RECIPE), *others, "--check_flags"], check=False).returncode
    for folder in (first, second):
        check_free(folder, given.overwrite)
    name = chosen(sys.argv[1:], RECIPE.parent / "configs", "hrpo", tuple(STEPS))[0]
    length = ["--max_steps", str(STEPS[name])] if name in STEPS else ["--num_train_epochs", "1"]
    if said.keys() & {"max_steps", "num_train_epochs"}:
        length = []
    stages = ((first, 0.0, []), (second, rate, ["--init_from", str(first / "final")]))
    for folder, rate, more in stages:
        flags = [
            *length,
            *others,
            "--output_dir",
            str(folder),
            "--lr_thinking_projection",
            str(rate),
            "--overwrite",
            str(given.overwrite),
            *more,
        ]
        done = subprocess.run([sys.executable, str(RECIPE), *flags], check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
