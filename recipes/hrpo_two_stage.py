"""HRPO in two stages: the thinking projection left as it is, then trained at a rate and on a schedule of its own.

    make train-hrpo-two-stage                            # the embedded default; ARGS="--output_dir mine --seed 1"
    python recipes/hrpo_two_stage.py --model_name Qwen/Qwen2.5-1.5B-Instruct --lr_thinking_projection 5e-5

All flags of recipes/hrpo_gsm8k.py, which is run twice: into `stage_1/` of the output folder with
--lr_thinking_projection 0, then into `stage_2/` from the weights that stage 1 has left. Steps and epochs are those of each
stage.
"""

import subprocess
import sys
from pathlib import Path

from unsloth_ext.user_errors import in_sentences


in_sentences()

from trl_ext.flags import chosen
from trl_ext.run_folder import holds_results
from unsloth_ext.command_line import CommandLine


RECIPE = Path(__file__).parent / "hrpo_gsm8k.py"
STEPS = {"tiny": 45, "smollm2": 4}  # of a stage; other models train an epoch


def main() -> int:
    name = chosen(sys.argv[1:], RECIPE.parent / "configs", "hrpo", tuple(STEPS))[0]
    peek = CommandLine(add_help=False)
    peek.add_argument("--output_dir", type=Path, default=Path("runs/hrpo_two_stage"))
    peek.add_argument("--lr_thinking_projection", default="5e-5")
    peek.add_argument("--resume_from_checkpoint")
    peek.add_argument("--overwrite", nargs="?", const="true", default="false")
    given, others = peek.parse_known_args()
    first, second = given.output_dir / "stage_1", given.output_dir / "stage_2"
    if given.resume_from_checkpoint:
        raise ValueError(
            f"--resume_from_checkpoint: resume the stage itself, recipes/hrpo_gsm8k.py --output_dir {second}"
        )
    overwrite = given.overwrite.lower() not in ("false", "no", "0")
    if holds_results(second) and not overwrite:
        raise ValueError(f"{second} holds a run: --overwrite deletes what it made, --output_dir names another folder")
    length = ["--max_steps", str(STEPS[name])] if name in STEPS else ["--num_train_epochs", "1"]
    stages = (
        (first, "0", []),
        (second, given.lr_thinking_projection, ["--init_from", str(first / "final")]),
    )
    for folder, rate, more in stages:
        flags = [
            *length, *others, "--output_dir", str(folder),
            "--lr_thinking_projection", rate, "--overwrite", str(overwrite), *more,
        ]  # fmt: skip
        done = subprocess.run([sys.executable, str(RECIPE), *flags], check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
