"""What cannot be trained is named before it begins."""

import shutil

import pytest
import torch
from peft import PrefixTuningConfig
from transformers import AutoModelForCausalLM

from tests import families, tiny
from trl_ext import KVDistillConfig
from trl_ext.common.checkpointing import CheckpointError

from . import setups


CONFIG = {
    "lambda_kv": -1,
    "alpha_k": -0.5,
    "temperature": 0,
    "kv_projection_mode": "round",
    "kv_direction": "both",
    "kv_layer_map": "[1",
    "rope_space": "none",
    "kv_init": "best",
    "T_s": 2,
    "ratio_map": {"P": 1},
    "alpha_map": {"P": 0, "R": 2, "A": 0},
    "answer_delimiter": "",
    "aligner_learning_rate": -1,
    "packing": True,
    "padding_free": True,
    "completion_only_loss": False,
    "eval_packing": True,
    "dataset_kwargs": {"skip_prepare_dataset": True},
}


@pytest.mark.parametrize("name", CONFIG)
def test_wrong_fields_are_named(tmp_path, name):
    with pytest.raises(ValueError, match=name if name != "kv_layer_map" else "kv_layer_map="):
        KVDistillConfig(**setups.settings(tmp_path, **{name: CONFIG[name]}))


def test_wrong_combinations_are_named(tmp_path):
    for changes, message in (
        ({"alpha_k": 0, "alpha_v": 0, "alpha_attn": 0}, "all 0"),
        ({"kv_projection_mode": "flat", "kv_init": "uniform"}, "kv_init"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ({"ratio_map": "[1, 2]"}, "ratio_map"),
    ):
        with pytest.raises(ValueError, match=message):
            KVDistillConfig(**setups.settings(tmp_path, **changes))
    given = KVDistillConfig(**setups.settings(tmp_path, ratio_map='{"P": 1, "R": 0.5, "A": 1}'))
    assert given.time_warper().ratio_map["R"] == 0.5
    off = KVDistillConfig(**setups.settings(tmp_path, packing=True, lambda_kv=0.0))
    assert off.packing


def test_teachers_that_cannot_teach_are_named(tmp_path):
    with pytest.raises(ValueError, match="teacher_model: pass a teacher"):
        setups.trainer(tmp_path, given_teacher=None)
    with pytest.raises(ValueError, match="layer_map"):
        setups.trainer(tmp_path, kv_layer_map="[0, 9]")
    small = AutoModelForCausalLM.from_config(tiny.config("qwen3", vocab_size=30))
    with pytest.raises(ValueError, match="30 embeddings"):
        setups.trainer(tmp_path, given_teacher=small)
    eager = setups.teacher()
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="sdpa"):
        setups.trainer(tmp_path, given_teacher=eager)
    with pytest.raises(ValueError, match="teacher_model_init_kwargs"):
        setups.trainer(tmp_path, teacher_model_init_kwargs={"dtype": "float32"})


def test_models_whose_keys_cannot_be_looked_at_are_named(tmp_path):
    """On either side, before the first batch; a window that no row fills is none."""
    for family, message in (
        ("falcon", "no attention is observed in layers 0 to 3"),
        ("deepseek_v3", "in layer 0 attention does not read the keys and values that the cache holds"),
        ("mistral, window", "sliding-window attention over 8 tokens in layers 0 to 3; lambda_kv=1.0 needs"),
    ):
        other = families.model(family, vocab_size=64)
        with pytest.raises(ValueError, match=message):
            setups.trainer(tmp_path, given_teacher=other)
    wide = families.model("mistral, window", vocab_size=64, sliding_window=64)
    setups.trainer(tmp_path, given_teacher=wide, max_length=64)
    with pytest.raises(ValueError, match="no attention is observed"):
        setups.trainer(tmp_path, model=families.model("falcon", vocab_size=64))


def test_other_vocabularies_are_refused_by_token_and_the_same_are_taken(tmp_path):
    setups.teacher().to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    tiny.tokenizer(("##",)).save_pretrained(tmp_path / "teacher")
    setups.trainer(tmp_path, given_teacher=str(tmp_path / "teacher"))  # has one token more
    with pytest.raises(ValueError, match=r"have different vocabularies: '(##|1#)' is \d+ in the student"):
        setups.trainer(tmp_path, given_teacher=str(tmp_path / "teacher"), tokenizer=tiny.tokenizer(("1#", "##")))


def test_a_teacher_by_name_keeps_its_dtype(tmp_path):
    setups.teacher().to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    tiny.tokenizer(()).save_pretrained(tmp_path / "teacher")
    trainer = setups.trainer(tmp_path, given_teacher=None, teacher_model_name_or_path=str(tmp_path / "teacher"))
    assert trainer.teacher.dtype == torch.bfloat16 and trainer.model.dtype == torch.float32
    trainer.train()
    wide = setups.trainer(
        tmp_path, given_teacher=str(tmp_path / "teacher"), teacher_model_init_kwargs='{"dtype": "float32"}'
    )
    assert wide.teacher.dtype == torch.float32


def test_virtual_tokens_are_refused(tmp_path):
    with pytest.raises(ValueError, match="PrefixTuningConfig adds virtual tokens"):
        setups.KVDistillTrainer(
            tiny.model(),
            KVDistillConfig(**setups.settings(tmp_path)),
            train_dataset=setups.Dataset.from_list(setups.ROWS),
            processing_class=tiny.tokenizer(()),
            peft_config=PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            teacher_model=setups.teacher(),
        )


def test_checkpoints_of_another_projection_or_without_one_are_refused(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    setups.trainer(tmp_path, **changes).train()
    folder = tmp_path / "checkpoint-2"
    for other, message in (
        ({"kv_projection_mode": "flat"}, "mode='structured', this run 'flat'"),
        ({"alpha_map": {"P": 0, "R": 0.5, "A": 0}}, "time_warper=None"),
        ({"given_teacher": tiny.model("qwen3")}, "teacher="),
    ):
        with pytest.raises(CheckpointError, match=message):
            setups.trainer(tmp_path, **other, **changes).train(resume_from_checkpoint=str(folder))
    (folder / "aligner" / "aligner.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"aligner\.safetensors is truncated"):
        setups.trainer(tmp_path, **changes).train(resume_from_checkpoint=str(folder))
    shutil.rmtree(folder / "aligner")
    with pytest.raises(CheckpointError, match=r"aligner\.json is missing"):
        setups.trainer(tmp_path, **changes).train(resume_from_checkpoint=str(folder))
