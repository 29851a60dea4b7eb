"""Online concept compression: a language model whose middle layers read discrete concepts only, made of its own tokens.

    make train-concept                                  # the embedded default; with a GPU, Qwen3-0.6B on GSM8K
    python recipes/concept_v2.py --preset literal --output_dir runs/concept_literal
    python recipes/concept_v2.py --model_name Qwen/Qwen3-0.6B --dataset openai/gsm8k --dataset_config main --lora_r 32
    python recipes/concept_v2.py --resume_from_checkpoint latest

Every field of TRL's SFTConfig and of ConceptConfig is a flag; `--config FILE.yaml` sets many. Writes the model (`final/`),
`summary.json`, `curves.png` and `concepts.html`, which shows held-out texts with the ends of their concepts and the
codewords, into the output directory.
"""

import os
import sys
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from accelerate import PartialState

from trl_ext.concept.recipe import ScriptArguments, parse, run


CONFIGS = Path(__file__).parent / "configs"


def main() -> None:
    script, data, args = parse(sys.argv[1:], ScriptArguments, CONFIGS)
    run((script, data, args), {"concepts": args}, "Concept tokens")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # with the trainer gone; several processes left to the exit may abort there
