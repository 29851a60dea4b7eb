"""When a trainer's weights are pushed to vLLM. No engine is needed."""

from types import SimpleNamespace

import torch
from trl.generation.vllm_generation import VLLMGeneration

from tests import tiny
from tests.trl_ext.ppo import setups as ppo
from trl_ext.common.vllm_pushes import pushing_weights


def pushes(trainer):
    """Whether TRL would push in a rollout of this trainer."""
    with pushing_weights(trainer):
        due = trainer.state.global_step != trainer._last_loaded_step  # TRL's own condition
        trainer._last_loaded_step = trainer.state.global_step
    return due


def test_weights_are_pushed_when_they_changed_or_the_step_did():
    model = tiny.model()
    trainer = SimpleNamespace(model=model, state=SimpleNamespace(global_step=0), _last_loaded_step=0)
    assert pushes(trainer) and not pushes(trainer)
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 1] += 1e-3
    assert pushes(trainer) and not pushes(trainer)  # as after a checkpoint was loaded
    trainer.state.global_step = 1
    assert pushes(trainer)
    trainer.state.global_step = 0
    assert pushes(trainer) and not pushes(trainer)


def test_rollouts_of_ppo_push_so(tmp_path, monkeypatch):
    trainer = ppo.ppo(tmp_path)
    seen = []
    stock = VLLMGeneration._iter_named_params
    parent = next(
        cls for cls in type(trainer).__mro__ if "_generate" in vars(cls) and cls.__module__.startswith("trl.")
    )

    def generate(self, *_):
        seen.append((self._last_loaded_step, VLLMGeneration._iter_named_params is stock))

    monkeypatch.setattr(parent, "_generate", generate)
    trainer.use_vllm, trainer._last_loaded_step = True, 5
    trainer._generate([])
    assert seen == [(-1, False)]
    assert VLLMGeneration._iter_named_params is stock
