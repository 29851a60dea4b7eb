"""Sizes of nothing are named by every configuration of ours, also where no recipe has parsed them."""

import pytest

import trl_ext


CONFIGS = [name for name in trl_ext.__all__ if name.endswith("Config")]
RL = ("HRPOConfig", "PPOConfig", "SPOConfig")


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_named_before_anything_is_divided_by_it(name, tmp_path):
    wrong = {"per_device_train_batch_size": 0, "gradient_accumulation_steps": -1, "learning_rate": float("nan")}
    wrong |= {"num_generations": 0, "steps_per_generation": 0, "num_iterations": 0} if name in RL else {"max_length": 0}
    for field, value in wrong.items():
        with pytest.raises(ValueError, match=rf"{field}={value}: at least "):
            getattr(trl_ext, name)(str(tmp_path), use_cpu=True, bf16=False, **{field: value})
