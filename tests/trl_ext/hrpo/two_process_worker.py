"""One rank of a two-process run, started by test_two_processes.py with torchrun: FOLDER MODE SOURCE."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.processes import leave
from tests.trl_ext.hrpo import setups
from unsloth_ext.hrpo.states import SOFT_SOURCES


def main() -> None:
    folder, mode, source = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    beta = 0.0 if source in SOFT_SOURCES else 0.02
    torch.set_num_threads(1)
    trainer = setups.hrpo(
        folder,
        recompute=mode,
        thinking_source=source,
        per_device_train_batch_size=4,
        num_iterations=2,
        beta=beta,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    flat = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    other = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(other, flat)
    resumed = setups.hrpo(
        folder,
        recompute=mode,
        thinking_source=source,
        per_device_train_batch_size=4,
        num_iterations=2,
        beta=beta,
        max_steps=4,
    )
    resumed.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
    again = torch.cat([p.detach().flatten() for p in resumed.model.parameters()])
    if trainer.is_world_process_zero():
        result = {
            "equal_on_both": torch.equal(*other),
            "resume_equal": torch.equal(flat, again),
            "deviation": [e["thinking/ratio_deviation"] for e in trainer.state.log_history if "loss" in e],
            "fraction": [e["thinking/fraction"] for e in trainer.state.log_history if "thinking/fraction" in e],
        }
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    leave()
