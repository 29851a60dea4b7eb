"""One rank of an HRPO run with rollouts in vLLM, whose engine fails at the end: FOLDER ENGINE SETTINGS (JSON)."""

import json
import os
import sys
from pathlib import Path


from tests import vllm_on_cpu  # noqa: F401  # isort: skip
import numpy as np
import torch
import torch.distributed as dist

from tests import tiny
from tests.engines.worker import prepare
from tests.trl_ext.hrpo import setups
from unsloth_ext.common.sharding import full
from unsloth_ext.common.wrapping import backbone_of


def main() -> None:
    folder, engine, settings, rank = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), int(os.environ["RANK"])
    prepare(engine)
    server = settings["vllm_mode"] == "server"
    if server:
        without_nccl()
    seen: list[tuple[str, str]] = []

    def reward(prompts, completions, **_):
        seen.extend(zip(prompts, completions, strict=True))
        np.random.rand(rank)  # a reward may draw, and not as often in each process
        return setups.reward_digits(completions)

    shared = {"use_cpu": engine == "ddp", "use_vllm": True, "per_device_train_batch_size": 4, "num_generations": 8}
    evaluation = {"per_device_eval_batch_size": 4, "num_generations_eval": 2}
    refused = None
    if server:
        try:
            setups.hrpo(folder, **shared, **settings | {"answer_delimiter": "#"})
        except ValueError as error:
            refused = str(error)
    trainer = setups.hrpo(folder, reward=reward, **shared, **evaluation, **settings)
    with torch.random.fork_rng():  # the engines of the ranks draw from it
        tiny.loud_gates(backbone_of(trainer.model))
    before = flat(trainer)
    trainer.train()
    trained = len(seen)
    deviation = trainer.evaluate(setups.prompts(3))["eval_thinking/ratio_deviation"]
    every = [torch.empty_like(before) for _ in range(dist.get_world_size())]
    dist.all_gather(every, flat(trainer))
    logs = trainer.state.log_history
    found = {
        "refused": refused,
        "deviations": [*(e["thinking/ratio_deviation"] for e in logs if "loss" in e), deviation],
        "trained": seen[:trained],
        "evaluated": seen[trained:],
        "changed": not torch.equal(before, every[0]),
        "equal": torch.equal(*every),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    generation = trainer.vllm_generation
    if rank == (0 if server else 1):

        def fails(*_, **__):
            raise RuntimeError("out of memory")

        (generation.vllm_client if server else generation.llm).generate = fails
    trainer.evaluate(setups.prompts(4))


def without_nccl() -> None:
    """Let the server keep the weights that it started with."""
    from trl.generation.vllm_client import VLLMClient

    VLLMClient.init_communicator = lambda self, device=0: None
    VLLMClient.update_named_params = lambda self, metadata, pairs: [None for _ in pairs]


def flat(trainer) -> torch.Tensor:
    return torch.cat([full(value).detach().flatten() for value in trainer.model.parameters()])


if __name__ == "__main__":
    main()
