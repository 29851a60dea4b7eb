"""One rank of a run: FOLDER ROWS-OF-A-RANK."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.processes import leave
from tests.trl_ext.ppo import setups


NAMES = ("loss", "grad_norm", "kl", "ppo/value", "ppo/value_loss", "ppo/explained_variance", "ppo/approx_kl")


def flat(trainer) -> torch.Tensor:
    return torch.cat([p.flatten() for p in setups.trained(trainer).values()])


def main() -> None:
    folder, rows = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    given = {
        "per_device_train_batch_size": rows,
        "rollout_func": setups.rollouts,
        "num_iterations": 4,
        "max_steps": 10,
        # SGD: AdamW would turn the rounding of gradients that should be zero into whole steps
        "optim": "sgd",
        "learning_rate": 0.1,
        "target_kl": 1e-3,
        "save_strategy": "steps",
        "save_steps": 5,
    }
    trainer = setups.ppo(folder, **given)
    trainer.train()
    resumed = setups.ppo(folder, **given)
    resumed.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-5"))
    here = flat(trainer)
    ranks = [torch.empty_like(here) for _ in range(dist.get_world_size())] if dist.is_initialized() else [here]
    if dist.is_initialized():
        dist.all_gather(ranks, here)
    if trainer.is_world_process_zero():
        result = {
            "steps": {name: setups.logged(trainer, name) for name in NAMES},
            "stopped": setups.logged(trainer, "ppo/stopped"),
            "equal_on_both": torch.equal(ranks[0], ranks[-1]),
            "resume_equal": torch.equal(here, flat(resumed)),
        }
        (folder / "result.json").write_text(json.dumps(result))
        torch.save(here, folder / "weights.pt")


if __name__ == "__main__":
    main()
    leave()
