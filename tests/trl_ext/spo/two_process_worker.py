"""One rank of a run: FOLDER ROWS-OF-A-RANK VALUE_TRACKER."""

import json
import sys
from pathlib import Path

import torch

from tests.processes import leave
from tests.trl_ext.spo import setups


def main() -> None:
    folder, rows, tracker = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    given = {
        "per_device_train_batch_size": rows,
        "value_tracker": tracker,
        "rollout_func": setups.rollouts,
        "num_iterations": 2,
        "max_steps": 12,
        "learning_rate": 3e-4,
        "save_strategy": "steps",
        "save_steps": 5,
    }
    trainer = setups.spo(folder, **given)
    drawn = []
    parent = trainer._advantages
    trainer._advantages = lambda inputs, output, rewards: (
        drawn.append(rewards.tolist()) or parent(inputs, output, rewards)
    )
    trainer.train()
    flat = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    resumed = setups.spo(folder, **given)
    resumed.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-5"))
    again = torch.cat([p.detach().flatten() for p in resumed.model.parameters()])
    if trainer.is_world_process_zero():
        result = {
            "rewards": drawn,
            "a": trainer.tracker.a.tolist(),
            "divergence": [e["spo/divergence"] for e in trainer.state.log_history if e.get("spo/divergence")],
            "loss": [e["loss"] for e in trainer.state.log_history if "loss" in e],
            "resume_equal": torch.equal(flat, again) and torch.equal(trainer.tracker.a, resumed.tracker.a),
        }
        (folder / "result.json").write_text(json.dumps(result))
        torch.save(flat, folder / "weights.pt")


if __name__ == "__main__":
    main()
    leave()
