"""Baselines for online concept compression: plain LoRA fine-tuning, and a concept for every N tokens.

    python recipes/concept_v1.py                                             # both, the embedded default
    python recipes/concept_v1.py --baseline fixed --stride 8 --concepts_per_stride 2
    python recipes/concept_v1.py --baseline lora --model_name Qwen/Qwen3-0.6B --dataset openai/gsm8k --dataset_config main

Rows, steps, LoRA, evaluation and configuration files are those of recipes/concept_v2.py. The results are written to
`lora/` and `fixed/` in runs/concept_v1, or in the folder that --output_dir names.
"""

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from trl_ext.cli.user_errors import in_sentences


in_sentences()


from trl_ext.cli.recipe import leave
from trl_ext.common.config_checks import one_of
from trl_ext.common.spelling import underscored
from trl_ext.concept.recipe import ScriptArguments, parse, refuse_resume, run


CONFIGS = Path(__file__).parent / "configs"
# Values that replace those of a configuration for concepts chosen by the head
BASELINES = {
    "lora": {"use_concepts": False},
    "fixed": {
        "segmenter": "fixed",
        "ratio_weight": 0.0,
        "calibrate_null": False,
        "warm_start_share": 0.0,
        "max_tail": None,
        "max_nulls": None,
    },
}
SET = {name for fields in BASELINES.values() for name in fields}


@dataclass
class BaselineArguments(ScriptArguments):
    """`ScriptArguments` and the choice of baselines."""

    baseline: str = field(default="both", metadata={"help": f"{', '.join(BASELINES)} or both."})

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, baseline=(*BASELINES, "both"))


def main() -> None:
    for flag in underscored(sys.argv[1:]):
        if (name := flag.removeprefix("--").partition("=")[0]) in SET and flag.startswith("--"):
            raise ValueError(f"--{name}: baselines set this themselves; recipes/concept_v2.py takes this flag")
    # Not the configuration's own output folder: it belongs to the run that these are compared with
    script, data, args = parse(sys.argv[1:], BaselineArguments, CONFIGS, output_dir="runs/concept_v1")
    names = list(BASELINES) if script.baseline == "both" else [script.baseline]
    if len(names) > 1:
        refuse_resume(args)
    runs = {}
    for name in names:
        folder = Path(args.output_dir) / name if len(names) > 1 else args.output_dir
        runs[name] = replace(args, output_dir=str(folder), **BASELINES[name])
    run((script, data, args), runs, "Baselines of concept tokens")


if __name__ == "__main__":
    main()
    leave()
