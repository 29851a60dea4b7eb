"""CODI (arXiv 2502.21074) on GSM8K-Aug, or, without hub and GPU, on equations with a tiny model that is trained here.

    make train-codi                                     # the embedded default; with a GPU, GPT-2 on GSM8K-Aug
    python recipes/codi_gsm8k.py --model_name meta-llama/Llama-3.2-1B-Instruct --preset codi-llama-1b
    python recipes/codi_gsm8k.py --model_name FOLDER --dataset train.jsonl --eval_dataset test.jsonl
    python recipes/codi_gsm8k.py --resume_from_checkpoint latest

Every field of TRL's SFTConfig and of CODIConfig is a flag; `--config FILE.yaml` sets many, `--preset NAME` the
published ones. Writes the adapter (`final/`), `summary.json` and `curves.png` into the output directory;
recipes/eval_latent.py analyses the adapter.
"""

import os
import sys
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from trl_ext import CODIConfig, CODITrainer
from trl_ext.cli.recipe import leave
from trl_ext.latent.recipe import train


if __name__ == "__main__":
    train(sys.argv[1:], "codi", CODIConfig, CODITrainer, Path(__file__).parent / "configs")
    leave()
