"""Every stage of a small language model, one after the other, and the report.

    make minimind                                        # the embedded default
    make minimind ARGS="--overwrite --run_dir runs/mine --pretrain '--max_steps 600' --dpo '--beta 0.2'"
    python recipes/minimind/all.py --published           # MiniMind's sizes, with its files in dataset/

Each stage is a recipe of its own and takes its own flags, given in one string. `--run_dir` moves all folders of the
embedded default; of a folder that holds stages already only `--overwrite` deletes anything, and only what the stages made.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import yaml

from unsloth_ext.user_errors import in_sentences


in_sentences()

from trl_ext.run_folder import holds_results
from unsloth_ext.command_line import CommandLine


RECIPES = Path(__file__).parent
STAGES = ("tokenizer", "pretrain", "sft", "lora", "dpo", "ppo", "grpo", "spo", "distill", "reason")
RUN_DIR = "runs/minimind"  # as the configurations call it


def command(name: str, run_dir: str, published: bool, flags: list[str]) -> list[str]:
    """A stage's, with its configuration's folders moved."""
    config = RECIPES / "configs" / f"{name}{'' if published else '_tiny'}.yaml"
    made = [sys.executable, str(RECIPES / f"{name}.py"), "--config", str(config)]
    if not published and run_dir != RUN_DIR:
        for field, value in yaml.safe_load(config.read_text()).items():
            if str(value).startswith(RUN_DIR):
                made += [f"--{field}", run_dir + value.removeprefix(RUN_DIR)]
    return made + flags


def main() -> int:
    parser = CommandLine(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run_dir", default=RUN_DIR, help="Where the stages' folders are.")
    parser.add_argument("--published", action="store_true", help="MiniMind's published sizes and files.")
    parser.add_argument("--overwrite", action="store_true", help="Delete what earlier stages made, and begin anew.")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES, help="Only these, in the usual order.")
    for name in STAGES:
        parser.add_argument(f"--{name}", type=shlex.split, default=[], metavar="FLAGS", help=f"For {name}.py.")
    options = parser.parse_args()
    if options.published and options.run_dir != RUN_DIR:
        parser.error("--run_dir moves the embedded default; the published configurations name their folders themselves")
    names = [name for name in STAGES if name in options.stages]
    run_dir = Path("runs/minimind_gpu" if options.published else options.run_dir)
    there = [str(run_dir / name) for name in names if holds_results(run_dir / name)]
    if there and not options.overwrite:
        parser.error(
            f"{', '.join(there)}: holds a run already; --overwrite deletes what it made, --run_dir names another folder, "
            "--stages takes some of the stages"
        )
    overwrite = ["--overwrite", "true"] if options.overwrite else []
    for name in names:
        flags = [*overwrite, *getattr(options, name)]
        done = subprocess.run(command(name, options.run_dir, options.published, flags), check=False)
        if done.returncode:
            return done.returncode
    return subprocess.run(command("report", options.run_dir, options.published, []), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
