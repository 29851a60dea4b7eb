"""Short runs by one process or several (torchrun): FOLDER ROWS_A_PROCESS. Started by test_two_processes.py."""

import json
import sys
from pathlib import Path

import torch

from tests.processes import leave
from tests.trl_ext.planner import setups
from unsloth_ext.planner import decoding_strategies, slot_sequence


# SGD: AdamW would turn the rounding of gradients that should be zero into whole steps
PLAIN = {"optim": "sgd", "learning_rate": 0.05, "gradient_accumulation_steps": 2, "z_dropout": 0.0}
READ = slot_sequence.SlotSequence.read
CASES = {
    "soft": {"target_length": [2.0, 1.0], "eos_weight": 0.2, "usage_weight": 0.2, "length_curriculum": [6]},
    "soft lora": {"peft": True, "target_length": [2.0, 1.0]},
    "hard_em": {"training": "hard_em", "num_beams": 4, "num_candidates": 0, "e_step_every": 2, "adaptive_e_step": True},
}


def run(folder: Path, case: str, rows: int) -> None:
    passes = []
    sizes = {"per_device_train_batch_size": rows, "per_device_eval_batch_size": rows}
    slot_sequence.SlotSequence.read = READ
    trainer = setups.trainer(folder, **PLAIN, **sizes, **CASES[case])
    slot_sequence.SlotSequence.read = lambda self: passes.append(trainer.state.global_step) or READ(self)
    trainer.train()
    trained = [passes.count(step) for step in range(4)]
    evaluated = trainer.evaluate()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    apart = trainer.accelerator.gather(weights[None])
    counts = trainer.accelerator.gather(torch.tensor([trained]))
    state = {name: x.double().flatten() for name, x in trainer.planner_state.state_dict().items()}
    kept = trainer.accelerator.gather(torch.cat(list(state.values()))[None])
    if trainer.is_world_process_zero():
        steps = [
            {k: v for k, v in e.items() if k.startswith(("loss", "grad", "planner/", "em/", "monitor/", "num_tokens"))}
            for e in trainer.state.log_history
            if "loss" in e
        ]
        torch.save({"weights": weights, "state": kept[0]}, folder / "weights.pt")
        result = {
            "steps": steps,
            "eval": {k: v for k, v in evaluated.items() if "runtime" not in k and "per_second" not in k},
            "same": bool((apart == apart[0]).all() and (kept == kept[0]).all()),
            "passes": counts.tolist(),
        }
        (folder / "result.json").write_text(json.dumps(result))


def main() -> None:
    torch.set_num_threads(1)
    # A row's own, or draws would depend on who draws them
    decoding_strategies.gumbel_noise = lambda logits, *_: 3 * torch.sin(31 * logits.detach())
    for case in CASES:
        run(Path(sys.argv[1], case), case, int(sys.argv[2]))


if __name__ == "__main__":
    main()
    leave()
