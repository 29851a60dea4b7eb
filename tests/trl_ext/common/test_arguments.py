"""What is a path where a function or a dataset belongs is named by a trainer at construction."""

from pathlib import Path

import pytest
from peft import get_peft_model
from trl import SFTConfig

from tests import tiny
from tests.trl_ext.common.test_checkpointing import SafeSFTTrainer
from tests.trl_ext.common.test_resume import make_grpo, make_hrpo, make_ppo
from tests.trl_ext.concept import setups as concept
from tests.trl_ext.distill.setups import logits
from tests.trl_ext.hrpo import setups
from tests.trl_ext.kv_distill import setups as kv
from trl_ext import HRPOConfig, HRPOTrainer, PPOConfig, PPOTrainer, SPOConfig, SPOTrainer


@pytest.mark.parametrize(
    "trainer, config, settings",
    [
        (HRPOTrainer, HRPOConfig, {"answer_delimiter": "#"}),
        (PPOTrainer, PPOConfig, {"beta": 0.0}),
        (SPOTrainer, SPOConfig, {"num_generations": 1}),
    ],
)
@pytest.mark.parametrize("rewards", [Path("judge"), ["judge", Path("judge")], (len, len)])
def test_rewards(tmp_path, trainer, config, settings, rewards):
    args = setups.arguments(config, tmp_path, **settings)
    with pytest.raises(ValueError, match=r"^reward_funcs=.*: give a function, a reward model or the name"):
        trainer(tiny.model(), rewards, args, train_dataset=setups.prompts(), processing_class=tiny.tokenizer())


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_datasets(tmp_path, name):
    for path in ("rows.jsonl", Path("rows.jsonl")):
        with pytest.raises(ValueError, match=f"^{name}=.*rows.jsonl.*: give the dataset itself"):
            SafeSFTTrainer(tiny.model(), SFTConfig(tmp_path, use_cpu=True, bf16=False), **{name: path})


@pytest.mark.parametrize("make", [logits, concept.trainer, kv.trainer])
def test_data_of_which_nothing_is_left(tmp_path, make):
    with pytest.raises(ValueError, match=r"^train_dataset: has no rows"):
        make(tmp_path, rows=[])
    with pytest.raises(ValueError, match=r"^train.dataset: no row is left: max_length=4 .*; raise it"):
        make(tmp_path, max_length=4)


@pytest.mark.parametrize("make", [make_hrpo, make_grpo])
def test_fewer_rows_than_a_rollout_takes(tmp_path, make, monkeypatch):
    """Of which GRPO would train no step, and say that it had trained."""
    rows = setups.prompts()
    for few, said in ((0, "has no rows"), (1, r"train_dataset has 1 rows, but a rollout needs 2 different ones")):
        monkeypatch.setattr(setups, "prompts", lambda few=few: rows.select(range(few)))
        with pytest.raises(ValueError, match=said):
            make(tmp_path, tiny.model(), None)


@pytest.mark.parametrize("make", [make_hrpo, make_ppo, make_grpo])
def test_the_adapter_that_the_reference_is_made_of(tmp_path, make):
    """TRL copies the one called "default", whichever is trained."""
    for names in (["mine"], ["default", "mine"]):
        model = get_peft_model(tiny.model(), setups.lora(), names[0])
        for name in names[1:]:
            model.add_adapter(name, setups.lora())
        model.set_adapter(names[-1])
        with pytest.raises(ValueError, match=r"^the model's active adapter is 'mine', but with beta=0.1 .* 'default':"):
            make(tmp_path, model, None, beta=0.1)


@pytest.mark.parametrize("make", [make_hrpo, make_ppo, make_grpo])
@pytest.mark.parametrize("begins", ["pissa", "olora", "pissa_niter_4"])
def test_an_adapter_that_changes_what_is_beneath_it_has_no_reference_there(tmp_path, make, begins):
    """With the adapter off, the model is without the part that went into it: a KL of 0.2 before the first step."""
    lora = setups.lora()
    lora.init_lora_weights = begins
    with pytest.raises(ValueError, match=rf"^peft_config: init_lora_weights='{begins}' initialises .*set beta=0.0"):
        make(tmp_path, tiny.model(), lora, beta=0.1)
    make(tmp_path, tiny.model(), lora, beta=0.0)
