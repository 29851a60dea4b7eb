"""A run that saves at every step and resumes from the newest whole checkpoint, for test_kill.py to kill.

python -m tests.trl_ext.latent.kill_worker FOLDER
"""

import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from tests.trl_ext.latent import setups
from trl_ext.checkpointing import last_complete_checkpoint


class Announce(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        print(f"step {state.global_step}", flush=True)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    trainer = setups.trainer(
        folder / "out", save_strategy="steps", save_steps=1, save_total_limit=2, max_steps=40,
        lr_scheduler_type="cosine", projection_dropout=0.1, **setups.CASES["kv"],
    )  # fmt: skip
    trainer.add_callback(Announce())
    found = last_complete_checkpoint(folder / "out")
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    trainer.save_model(str(folder / "final"))


if __name__ == "__main__":
    main()
