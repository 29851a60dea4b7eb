"""A short run by one process or several (torchrun): METHOD FOLDER CASE ROWS_A_PROCESS. Started by test_two_processes.py."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.processes import leave
from tests.trl_ext.concept import setups as concept
from tests.trl_ext.kv_distill import setups as kv
from tests.trl_ext.latent import setups as latent
from trl_ext.concept import trainer as concept_trainer


# The first, for evaluation, of equal lengths: its mean is over batches
ROWS = [
    {"prompt": f"{a}+{b}=", "completion": f"{a}+{b}=9;{' so' * (b if a > 2 else 0)}##{a}"}
    for a in range(1, 6)
    for b in range(1, 5)
]


def rounding(rank: int) -> None:
    """As if this process's arithmetic had led k-means elsewhere."""
    made = concept_trainer.set_codebook
    concept_trainer.set_codebook = lambda backbone, states, seed: made(backbone, states, seed + rank)


def main() -> None:
    method, folder, case, rows = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    sizes = {"per_device_train_batch_size": rows, "per_device_eval_batch_size": rows}
    if method == "latent":
        trainer = latent.trainer(folder, **sizes, **(latent.STAGED if case == "staged" else latent.CASES[case]))
        named = trainer._named_trained()
    elif method == "concept":
        # One codeword: what each process would sample is its own
        cases = {**concept.CASES, "codebook": {"codebook_init": "kmeans", "num_concepts": 8}}
        plain = {"optim": "sgd", "learning_rate": 0.1, "num_concepts": 1, **cases[case]}
        trainer = concept.trainer(folder, rows=ROWS, **plain, **sizes)
        named = dict(trainer.model.named_parameters())
    else:
        # SGD: AdamW would turn the rounding of gradients that should be zero into whole steps
        plain = {"optim": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": 2}
        trainer = kv.trainer(folder, rows=ROWS, **plain, **sizes, **kv.CASES[case])
        named = trainer._named_trained()
    if case == "codebook":
        rounding(dist.get_rank())
    trainer.train()
    if case == "codebook":
        weights = torch.cat([p.detach().flatten() for n, p in named.items() if "concept_" in n])
        every = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
        dist.all_gather(every, weights)
        if trainer.is_world_process_zero():
            torch.save(torch.stack(every), folder / "weights.pt")
        return
    evaluated = trainer.evaluate()
    if trainer.is_world_process_zero():
        steps = [
            {k: v for k, v in e.items() if k.startswith(("loss", "grad", "kv/", "concept/")) and "target" not in k}
            for e in trainer.state.log_history
        ]
        torch.save(torch.cat([p.detach().flatten() for p in named.values() if p.requires_grad]), folder / "weights.pt")
        result = {"steps": [s for s in steps if "loss" in s], "eval": evaluated["eval_loss"]}
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    leave()
