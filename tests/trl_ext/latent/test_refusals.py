"""What cannot work is refused before training, by name."""

import copy
import dataclasses
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests import families, tiny
from trl_ext.common.checkpointing import CheckpointError
from trl_ext.latent.data import LatentDataError
from trl_ext.latent.preparation import tokenizer_of
from unsloth_ext import LatentConfig, attach_latent, backbone_of, with_latent_modules

from . import setups


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"packing": True}, "packing=True"),
        ({"padding_free": True}, "padding_free=True"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True"),
        ({"w_codi": -1.0}, "w_codi=-1.0"),
        ({"codi_loss": "l2"}, "codi_loss='l2'"),
        ({"kv_std_mode": "student"}, "kv_std_mode='student'"),
        ({"w_kv": 1.0, "kv_scorer": "rkv", "num_latents": 8}, "num_latents=8"),
        ({"kv_scorer": "best"}, "scorer='best'"),
        ({"num_latents": 0}, "num_latents=0"),
        ({"num_latents": 4.0}, "num_latents=4.0"),
        ({"w_codi": float("nan")}, "w_codi=nan"),
        ({"w_kv": float("inf")}, "w_kv=inf"),
        ({"w_latent_ce": -1.0}, "w_latent_ce=-1"),
        ({"latent_ce_tokens": "results"}, "latent_ce_tokens='results'"),
        ({"latent_ce_passes": "first"}, "latent_ce_passes='first'"),
        ({"w_student": 0.0, "w_teacher": 0.0, "w_codi": 0.0}, "are all 0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"loss_type": "dft"}, "loss_type='dft'"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy='group_by_length': rows have several texts",
        ),
        ({"eval_packing": True}, "eval_packing=True"),
        ({"completion_only_loss": False}, "completion_only_loss=False: questions are read"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "dataset_kwargs: skip_prepare_dataset"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError) as error:
        setups.Config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **changes)
    assert message in str(error.value)


def test_data_and_models_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(LatentDataError, match="train dataset, row 1: steps"):
        setups.trainer(tmp_path, rows=[setups.ROWS[0], {**setups.ROWS[1], "steps": []}])
    with pytest.raises(ValueError, match="column 'steps' is missing; it has question, answer"):
        setups.trainer(tmp_path, rows=[{"question": "1", "answer": "1"}])
    with pytest.raises(ValueError, match="column 'trace_ids' is missing; it has question_ids"):
        setups.trainer(tmp_path, rows=[{"question_ids": [5, 6]}])
    with pytest.raises(ValueError, match="train dataset: has no rows"):
        setups.trainer(tmp_path, dataset=Dataset.from_list(setups.ROWS).select([]))
    short = [{**row, "steps": row["steps"][:1]} for row in setups.ROWS]
    with pytest.raises(ValueError, match=r"no row has a reasoning trace .* drop_last_step=False keeps it"):
        setups.trainer(tmp_path, rows=short)
    for allowed in (
        {"rows": [*short, setups.ROWS[0]]},
        {"rows": short, "drop_last_step": False},
        {"rows": short, "w_codi": 0.0, "w_kv": 0.0},
    ):
        setups.trainer(tmp_path, **allowed)
    wrapped = setups.trainer(tmp_path).model
    bare = wrapped.unload()
    assert backbone_of(bare).latent_config.num_latents == 24
    eager = tiny.model()
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        setups.trainer(tmp_path, model=eager, w_kv=1.0)


def test_families_that_cannot_think_or_be_looked_into_are_named_at_construction(tmp_path):
    """KaVa looks inside attention; a window that no row fills does no harm. Experts train without their own loss."""
    for family, changes, message in (
        ("falcon", {"w_kv": 1.0}, "no attention is observed in layers 0 to 3"),
        ("deepseek_v3", {"w_kv": 1.0}, "in layer 0 attention does not read the keys and values that the cache holds"),
        ("gemma2, window", {"w_kv": 1.0}, "sliding-window attention over 8 tokens in layers 0, 2; w_kv=1.0 needs"),
        ("gemma2, window", {"num_latents": 7}, "9 tokens: the model has sliding-window attention over 8 tokens"),
        ("jamba", {}, "linear attention or a state space in layers 0, 2"),
        ("mixtral", {}, "router_aux_loss_coef=0.001: .*set router_aux_loss_coef=0.0"),
    ):
        settings = {"num_latents": 4, "max_length": 64, **changes}
        with pytest.raises(ValueError, match=message):
            setups.trainer(tmp_path, model=families.model(family), **settings)
    kava = {"w_kv": 1.0, "num_latents": 4, "max_steps": 1}
    trainer = setups.trainer(
        tmp_path, model=families.model("mistral, window", sliding_window=64), max_length=64, **kava
    )
    trainer.train()
    assert any("loss/kv" in row for row in trainer.state.log_history)
    trainer = setups.trainer(tmp_path, model=families.model("mixtral"), router_aux_loss_coef=0.0, max_steps=1)
    trainer.train()


def test_adapters_that_would_leave_the_latent_tokens_untrained_are_refused(tmp_path):
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="pass the unwrapped model with peft_config"):
        setups.trainer(tmp_path, peft=False, model=get_peft_model(tiny.model(), lora))
    model = attach_latent(tiny.model(), tiny.tokenizer(()), LatentConfig(3, 1, projection_dim=8))
    whole = {**lora.to_dict(), **with_latent_modules(lora, model)}
    for field, name, how in (
        ("modules_to_save", ["embed_tokens"], "'embed_tokens' would be trained as a whole"),
        ("modules_to_save", ["model.embed_tokens"], "'embed_tokens' would be trained as a whole"),
        ("modules_to_save", ["lm_head"], "'lm_head' would be trained as a whole"),  # tied
        ("target_modules", ["q_proj", "embed_tokens"], "'embed_tokens' would be given an adapter"),
        ("target_modules", r".*(q_proj|embed_tokens)", "'embed_tokens' would be given an adapter"),
    ):
        with pytest.raises(ValueError, match=f"{field}=.*{how}, but the latent tokens' rows"):
            with_latent_modules(LoraConfig(**{field: name}), model)
    for lacking in ("trainable_token_indices", "modules_to_save"):
        adapter = get_peft_model(copy.deepcopy(model), LoraConfig(**{**whole, lacking: None}))
        with pytest.raises(ValueError, match=f"{lacking} would leave the latent tokens untrained"):
            setups.trainer(tmp_path, peft=False, model=adapter, num_latents=3)
    setups.trainer(tmp_path, peft=False, model=get_peft_model(model, LoraConfig(**whole)), num_latents=3).save_model()
    with pytest.raises(ValueError, match="is an adapter"):
        setups.trainer(tmp_path, model=str(tmp_path))


def test_rows_beyond_a_table_of_positions_are_named(tmp_path):
    """GPT-2 has 128; latent tokens count."""
    row = setups.ROWS[0]
    longest = 128 - 2 - 2 - 2 - 6  # `##`, 7 and EOS, <bot> and <eot>, six latent tokens
    rows = [
        row,
        {**row, "question": "1" * longest, "answer": "7"},
        {**row, "question": "1" * (longest + 1), "answer": "7"},
    ]
    with pytest.raises(
        LatentDataError, match="row 2: more tokens, latent tokens included, than the model's 128 positions"
    ):
        setups.trainer(tmp_path, family="gpt2", rows=rows, num_latents=6)
    setups.trainer(tmp_path, family="gpt2", rows=rows[:2], num_latents=6)
    setups.trainer(tmp_path, family="qwen3", rows=rows, num_latents=6)


def test_a_tokenizer_that_could_not_end_an_answer_is_refused(tmp_path):
    tokenizer = tiny.tokenizer(())
    tokenizer.eos_token = None
    args = setups.Config(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="no eos_token"):
        setups.LatentTrainer(tiny.model(), args, processing_class=tokenizer)
    for asked, pad in ((None, "<eos>"), ("#", "#")):
        tokenizer = tiny.tokenizer(())
        tokenizer.pad_token = None
        assert tokenizer_of(tiny.model(), dataclasses.replace(args, pad_token=asked), tokenizer).pad_token == pad


def test_nan_ends_a_run_by_name(tmp_path):
    model = tiny.model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    trainer = setups.trainer(tmp_path, model=model, **setups.CASES["jacobi"])
    with pytest.raises(FloatingPointError, match="loss/ce_student is nan after 0 steps"):
        trainer.train()


@pytest.mark.parametrize("peft", [True, False])
def test_a_checkpoint_without_the_projection_is_refused(tmp_path, peft):
    settings = {**setups.CASES["kv"], "peft": peft, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    setups.trainer(tmp_path, **settings).train()
    file = next((tmp_path / "checkpoint-1").glob("*model.safetensors"))
    tensors = load_file(file)
    lost = next(name for name in tensors if "latent_projection" in name)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"has no {re.escape(lost)}"):
        setups.trainer(tmp_path, **{**settings, "max_steps": 2}).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )
