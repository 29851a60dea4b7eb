"""A short run by one process or several (torchrun): FOLDER CASE ROWS_A_PROCESS. Started by test_two_processes.py."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.trl_ext.latent import setups


def main() -> None:
    folder, case, rows = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    trainer = setups.trainer(
        folder, per_device_train_batch_size=rows, per_device_eval_batch_size=rows, **setups.CASES[case]
    )
    trainer.train()
    evaluated = trainer.evaluate()
    if trainer.is_world_process_zero():
        steps = [{k: v for k, v in e.items() if k.startswith(("loss", "grad"))} for e in trainer.state.log_history]
        weights = [p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]
        torch.save(torch.cat(weights), folder / "weights.pt")
        result = {"steps": [s for s in steps if "loss" in s], "eval": evaluated["eval_loss"]}
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()  # after what uses it is gone; left to the interpreter's exit it sometimes aborts
