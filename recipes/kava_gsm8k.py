"""KaVa (arXiv 2510.02312) on GSM8K-Aug, or, with no hub and no GPU, on equations with a tiny model taught here.

    make train-kava                                     # the embedded default; with a GPU, Llama-3.2-1B on GSM8K-Aug
    python recipes/kava_gsm8k.py --model_name meta-llama/Llama-3.2-1B-Instruct --preset kava-llama-1b-aug
    python recipes/kava_gsm8k.py --model_name FOLDER --dataset train.jsonl --eval_dataset test.jsonl
    python recipes/kava_gsm8k.py --resume_from_checkpoint latest

Every field of TRL's SFTConfig and of KAVAConfig is a flag; `--config FILE.yaml` sets many, `--preset NAME` the published
ones. Writes the adapter (`final/`), `summary.json` and `curves.png` into the output directory; recipes/eval_latent.py looks
at the adapter closer.
"""

from pathlib import Path

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from accelerate import PartialState

from trl_ext import KAVAConfig, KAVATrainer
from trl_ext.latent.recipe import run


if __name__ == "__main__":
    run("kava", KAVAConfig, KAVATrainer, Path(__file__).parent / "configs")
    PartialState().destroy_process_group()  # with the trainer gone; several processes left to the exit may abort there
