"""A model that a trainer loads by its name is whole, or what it lacks is named: it would be drawn at random."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import SFTConfig, SFTTrainer

import unsloth_ext
from tests import tiny
from tests.installed import at_least
from tests.trl_ext.concept import setups as concept
from tests.trl_ext.distill import setups as distill
from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.kv_distill import setups as kv
from tests.trl_ext.latent import setups as latent
from tests.trl_ext.planner import setups as planner
from tests.trl_ext.planner.test_resume import edit
from tests.trl_ext.ppo import setups as ppo
from tests.trl_ext.spo import setups as spo
from trl_ext.common.model_loading import check_model_and_tokenizer
from trl_ext.common.teacher import load_teacher
from trl_ext.minimind.stage import resumable


NORM = "model.layers.1.input_layernorm.weight"


def stock(folder, model):
    args = SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", max_steps=1)
    return resumable(SFTTrainer)(model, args, train_dataset=hrpo.prompts(), processing_class=tiny.tokenizer())


MAKE = {
    "hrpo": hrpo.hrpo,
    "ppo": ppo.ppo,
    "latent": latent.trainer,
    "concept": concept.trainer,
    "planner": planner.trainer,
    "kv": kv.trainer,
    "logits": distill.logits,
    "reasoning": distill.reasoning,
    "stage": stock,
    "teacher": lambda folder, model: load_teacher(model, None, False, torch.device("cpu")),
    "kv's teacher": lambda folder, model: kv.trainer(folder, given_teacher=model),
    "critic": lambda folder, model: ppo.ppo(folder, critic_model=model),
}
SPOILT = {
    f"(lacks|has no) {NORM}": lambda tensors: tensors.pop(NORM),
    f"{NORM} holds NaN or infinity": lambda tensors: tensors.update({NORM: tensors[NORM] * torch.nan}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a model that lacks a tensor, and of one with NaN."""
    made = {}
    for said, spoil in SPOILT.items():
        folder = tmp_path_factory.mktemp("model")
        concept.base().save_pretrained(folder)
        tiny.tokenizer(()).save_pretrained(folder)
        edit(folder / "model.safetensors", spoil)
        made[said] = folder
    return made


@pytest.mark.parametrize("name", MAKE)
def test_what_it_lacks_is_named(folders, tmp_path, name):
    for said, folder in folders.items():
        with pytest.raises(ValueError, match=said) as error:
            MAKE[name](tmp_path, model=str(folder))
        assert str(folder) in str(error.value)


def test_transformers_draws_it_at_random(folders):
    """A canary: where this fails, loading by name refuses it without us."""
    AutoModelForCausalLM.from_pretrained(next(iter(folders.values())))


LOADS_HEADS = at_least("transformers", "5.24")
JUDGED = {
    "hrpo": lambda folder, judge: hrpo.hrpo(folder, peft=False, reward=judge),
    "ppo": lambda folder, judge: ppo.ppo(folder, reward=judge),
    "spo": lambda folder, judge: spo.spo(folder, reward=judge),
}


@pytest.mark.parametrize("name", JUDGED)
def test_a_reward_model_given_by_its_name_is_whole(folders, tmp_path, name):
    """A language model has no head that judges."""
    with pytest.raises(ValueError, match=r"reward_funcs: .*/model.* lacks (model|score)"):
        JUDGED[name](tmp_path, [str(folders[next(iter(SPOILT))])])
    judge = tmp_path / "judge"
    tiny.tokenizer(()).save_pretrained(judge)
    tiny.tokenizer(()).save_pretrained(tmp_path / "adapter")
    config = concept.base().config
    config.num_labels = 1
    whole = AutoModelForSequenceClassification.from_config(config)
    whole.save_pretrained(judge)
    assert not isinstance(JUDGED[name](tmp_path, str(judge)).reward_funcs[0], str)
    lora = AutoModelForSequenceClassification.from_pretrained(judge, num_labels=1)
    get_peft_model(lora, LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapter")
    if LOADS_HEADS:
        JUDGED[name](tmp_path, str(tmp_path / "adapter"))
    else:
        with pytest.raises(ValueError, match="is an adapter, whose head transformers would leave out"):
            JUDGED[name](tmp_path, str(tmp_path / "adapter"))
    edit(judge / "model.safetensors", lambda tensors: tensors.update({"score.weight": torch.nan * torch.ones(1, 32)}))
    with pytest.raises(ValueError, match=r"judge: score\.weight holds NaN or infinity"):
        JUDGED[name](tmp_path, str(judge))


def test_what_is_no_reward_model_is_named(tmp_path):
    config = concept.base().config
    config.num_labels = 2
    judge = tmp_path / "judge"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(judge)
    with pytest.raises(ValueError, match=r"judge: score\.weight has the shape \(2, 32\) where a classifier of 1 logit"):
        JUDGED["hrpo"](tmp_path, str(judge))
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(judge)
    with pytest.raises(ValueError, match=r"judge has no tokenizer_config\.json"):
        JUDGED["hrpo"](tmp_path, str(judge))
    with pytest.raises(ValueError, match=r"there is no folder .*/gone"):
        JUDGED["hrpo"](tmp_path, [hrpo.reward_digits, str(tmp_path / "gone")])


def test_transformers_leaves_out_the_head_of_an_adapter(tmp_path):
    """A canary: since transformers 5.24 an adapter can be a reward model."""
    config = concept.base().config
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "judge")
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    lora = get_peft_model(judge, LoraConfig(task_type="SEQ_CLS"))
    with torch.no_grad():
        judge.score.modules_to_save["default"].weight.fill_(0.5)
    lora.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1)
    assert (loaded.score.modules_to_save["default"].weight == 0.5).all() == LOADS_HEADS


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_whose_modules_the_loader_dropped_is_refused_by_other_trainers(tmp_path, wrapped):
    """The saved model would have the settings and no modules, and nothing could open it."""
    unsloth_ext.attach_thinking(tiny.model()).save_pretrained(tmp_path / "thinking")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "thinking")
    if wrapped:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    said = r"of the method hrpo.*FastThinkingModel\.from_pretrained.*delete model\.config\.thinking"
    with pytest.raises(ValueError, match=said):
        stock(tmp_path / "out", model)
    del model.config.thinking
    check_model_and_tokenizer(model, tiny.tokenizer(), None)
