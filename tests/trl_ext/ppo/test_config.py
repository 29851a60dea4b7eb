"""What PPOConfig refuses, and what it is without any field."""

import pytest

from tests.trl_ext.ppo import setups
from trl_ext import PPOConfig


QUIET = {"report_to": "none", "use_cpu": True, "bf16": False}


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"gamma": 1.1}, r"gamma=1.1: must be from 0 to 1"),
        ({"gae_lambda": -0.1}, r"gae_lambda=-0.1: must be from 0 to 1"),
        ({"vf_coef": -1.0}, r"vf_coef=-1.0: a weight is a number, 0 \(off\) or more"),
        ({"critic_learning_rate": -1e-6}, r"critic_learning_rate=-1e-06: must be at least 0"),
        ({"cliprange_value": 0.0}, r"cliprange_value=0.0: must be more than 0"),
        ({"target_kl": 0.0}, r"target_kl=0.0: must be more than 0"),
        ({"loss_type": "grpo"}, r"loss_type='grpo': choose one of dapo"),
        ({"scale_rewards": "batch"}, r"scale_rewards='batch': .* no groups; leave it at 'group'"),
        ({"importance_sampling_level": "sequence"}, r"importance_sampling_level='sequence'"),
        (
            {"steps_per_generation": 3, "num_iterations": 1, "gradient_accumulation_steps": 2},
            r"two rollouts of 3 batches",
        ),
    ],
    ids=str,
)
def test_fields_are_checked(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(str(tmp_path), **QUIET, **fields)


def test_rollouts_may_be_mixed_where_none_is_stopped(tmp_path):
    mixed = {"steps_per_generation": 3, "num_iterations": 1, "gradient_accumulation_steps": 2}
    assert PPOConfig(str(tmp_path), **QUIET, target_kl=None, **mixed).steps_per_generation == 3


def test_defaults_are_the_published_ones(tmp_path):
    args = PPOConfig(str(tmp_path), **QUIET)
    assert (args.gamma, args.gae_lambda, args.vf_coef, args.cliprange_value) == (1.0, 0.95, 0.5, 0.2)
    assert (args.epsilon, args.beta, args.num_iterations, args.target_kl) == (0.2, 0.02, 2, 0.25)
    assert (args.num_generations, args.loss_type) == (1, "dapo")
    assert PPOConfig(str(tmp_path), **QUIET, num_generations=4).num_generations == 4


def test_fewer_rows_than_a_rollout_takes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"3 rows, but a rollout needs 4 different ones"):
        setups.ppo(tmp_path, rows=3)
    setups.ppo(tmp_path, rows=2, num_generations=2)
