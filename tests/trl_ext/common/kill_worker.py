"""A run that saves at every step and resumes from the newest whole checkpoint, for test_kill.py to kill.

python -m tests.trl_ext.common.kill_worker hrpo|latent|latent_grpo|kv|concept|planner|planner_em FOLDER
"""

import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from tests.trl_ext.concept import setups as concept
from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.kv_distill import setups as kv
from tests.trl_ext.latent import setups as latent
from tests.trl_ext.planner import setups as planner
from trl_ext.common.checkpointing import last_complete_checkpoint


class Announce(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        print(f"step {state.global_step}", flush=True)


def main() -> None:
    method, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    saving = {
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "max_steps": 40,
        "lr_scheduler_type": "cosine",
    }
    if method == "hrpo":
        trainer = hrpo.hrpo(folder, **saving, num_iterations=2, beta=0.02)
    elif method == "latent_grpo":
        trainer = latent.grpo(folder, peft=True, **saving, num_iterations=2)
    elif method == "kv":
        trainer = kv.trainer(folder / "out", peft=True, **saving)
    elif method == "concept":
        trainer = concept.trainer(folder / "out", peft=True, **saving, **concept.CASES["stable"])
    elif method == "planner":
        trainer = planner.trainer(folder / "out", peft=True, **saving, target_length=[2, 1], word_dropout=0.2)
    elif method == "planner_em":
        trainer = planner.trainer(folder / "out", peft=True, **saving, training="hard_em", e_step_every=3)
    elif method == "latent_staged":  # three stages of 13 steps
        staged = {**latent.STAGED, "stage_epochs": 5.0, "reset_optimizer": True}
        trainer = latent.trainer(folder / "out", **saving, **staged)
    elif method == "latent_written":
        trainer = latent.trainer(folder / "out", **saving, **latent.CASES["sequential, written"])
    else:
        trainer = latent.trainer(folder / "out", **saving, projection_dropout=0.1, **latent.CASES["kv"])
    trainer.add_callback(Announce())
    found = last_complete_checkpoint(folder / "out")
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    trainer.save_model(str(folder / "final"))


if __name__ == "__main__":
    main()
