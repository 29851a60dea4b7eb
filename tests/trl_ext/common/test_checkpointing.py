"""Mixtures of experts, which are saved in another form than they are trained in, and 8-bit optimizers: resumed is
uninterrupted, to the bit."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from patches import fused_lm_head
from tests import moe, tiny
from trl_ext.common import checkpointing
from trl_ext.common.checkpointing import CheckpointError, SafeCheckpointMixin


ROWS = Dataset.from_list([{"input_ids": [(5 * i + 3 * j) % 40 + 3 for j in range(4 + i % 5)]} for i in range(24)])


class SafeSFTTrainer(SafeCheckpointMixin, SFTTrainer):
    pass


def sft(folder, net, peft=None, **changes):
    fused_lm_head.ensure()
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        **changes,
    }
    return SafeSFTTrainer(
        net,
        SFTConfig(**settings),
        train_dataset=ROWS,
        eval_dataset=ROWS.select(range(4)),
        processing_class=tiny.tokenizer(),
        peft_config=peft,
    )


def saved(folder, net, peft=None):
    """A checkpoint of an untrained model, and its trainer."""
    trainer = sft(folder, net, peft)
    trainer.save_model(str(folder / "saved"))
    trainer.state.save_to_json(str(folder / "saved" / "trainer_state.json"))
    return trainer, folder / "saved"


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def losses(trainer):
    return [(e["loss"], e["aux_loss"]) for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize("kind", moe.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_is_uninterrupted(tmp_path, kind, dtype):
    """At step 2 of 4, in a model of other weights that stays the same object; and the experts have learnt by then."""
    first = moe.model(kind).to(dtype)
    before = moe.experts(first)
    whole = sft(tmp_path, first)
    whole.train()
    trained = moe.experts(first)
    net = moe.model(kind, seed=1).to(dtype)
    parameters = {n: p.data_ptr() for n, p in net.named_parameters()}
    again = sft(tmp_path, net)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.model is net and {n: p.data_ptr() for n, p in net.named_parameters()} == parameters
    assert_equal(weights(whole), weights(again))
    assert losses(again) == losses(whole)
    state, resumed = whole._named_state(), again._named_state()
    assert state.keys() == resumed.keys() and all(
        torch.equal(state[n][k], resumed[n][k]) for n in state for k in state[n]
    )
    assert before and all(not torch.equal(before[n], trained[n]) for n in before)


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "lion_8bit"])
def test_resumed_is_uninterrupted_with_an_8_bit_optimizer(tmp_path, optim):
    """Its parameters share a table, from the size on at which it computes in 8 bits."""

    def made(seed):
        config = tiny.config("llama", vocab_size=256)
        config.intermediate_size = 128
        return tiny.from_config(config, seed)

    whole = sft(tmp_path, made(0), optim=optim)
    whole.train()
    assert any(
        value.dtype == torch.uint8
        for state in whole._named_state().values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    again = sft(tmp_path, made(1), optim=optim)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(whole), weights(again))


def test_tensors_of_another_dtype_keep_it_exactly(tmp_path):
    """A router in fp32 in a model in bf16."""

    def made(seed):
        net = moe.model("minimind3-moe", seed=seed).to(torch.bfloat16)
        for weight in moe.routers(net).values():
            weight.data = weight.data.float() * 1.001
        return net

    first, folder = saved(tmp_path, made(0))
    again = sft(tmp_path, made(1))
    again._load_from_checkpoint(str(folder))
    assert_equal(weights(first), weights(again))
    assert {p.dtype for p in again.model.parameters()} == {torch.float32, torch.bfloat16}


def test_modules_that_were_added_to_the_model_are_loaded_too(tmp_path):
    def made(seed, width=3):
        net = moe.model("minimind3-moe", seed=seed)
        net.model.added = torch.nn.Linear(16, width)
        return net

    first, folder = saved(tmp_path, made(0))
    again = sft(tmp_path, made(1))
    again._check_checkpoint(folder)
    again._load_from_checkpoint(str(folder))
    assert_equal(weights(first), weights(again))
    with pytest.raises(CheckpointError, match=r"it has model\.added\.bias \(3,\), this one has \(5,\)"):
        sft(tmp_path, made(0, width=5))._check_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"it has model\.added\.bias, this one has no such tensor"):
        sft(tmp_path, moe.model("minimind3-moe"))._check_checkpoint(folder)
    first.model.model.other = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"saved has no model\.other\.bias"):
        first._check_checkpoint(folder)


@pytest.mark.parametrize("kind", moe.KINDS)
def test_trainer_alone_would_pass_over_the_experts(tmp_path, kind):
    """A canary: where it fails, transformers reads its own checkpoints, and the mixin need not."""
    first, folder = saved(tmp_path, moe.model(kind))
    net = moe.model(kind, seed=1)
    before = moe.experts(net)
    Trainer._load_from_checkpoint(sft(tmp_path, net), str(folder))
    assert torch.equal(net.lm_head.weight, first.model.lm_head.weight)
    assert_equal(before, moe.experts(net))


@pytest.mark.parametrize("kind", moe.KINDS)
def test_the_best_model_is_loaded_whole(tmp_path, kind):
    """The first of four by a metric that likes losses: experts too, bit for bit."""
    net = moe.model(kind)
    trainer = sft(
        tmp_path,
        net,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        greater_is_better=True,
    )
    kept, save = {}, trainer._save_checkpoint

    def keep(*args):
        save(*args)
        kept[trainer.state.global_step] = weights(trainer)

    trainer._save_checkpoint = keep
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert best == 1 and trainer.model is net
    assert_equal(weights(trainer), kept[best])
    assert not any(torch.equal(kept[best][n], kept[4][n]) for n in moe.experts(net))


@pytest.mark.parametrize("options", [{"max_shard_size": "4KB"}, {"save_original_format": False}], ids=str)
def test_in_several_files_or_as_held_in_memory(tmp_path, options):
    first, folder = saved(tmp_path, moe.model("minimind3-moe"))
    (folder / "model.safetensors").unlink()
    first.model.save_pretrained(folder, **options)
    assert (len(list(folder.glob("model*.safetensors"))) > 2) == ("max_shard_size" in options)
    again = sft(tmp_path, moe.model("minimind3-moe", seed=1))
    again._check_checkpoint(folder)
    again._load_from_checkpoint(str(folder))
    assert_equal(weights(first), weights(again))


LORAS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "router": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
}


@pytest.mark.parametrize("case", LORAS)
def test_an_adapter_resumes_too(tmp_path, case):
    lora = LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **LORAS[case])
    whole = sft(tmp_path, moe.model("minimind3-moe"), lora)
    start = weights(whole)
    whole.train()
    again = sft(tmp_path, moe.model("minimind3-moe"), lora)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(whole), weights(again))
    assert losses(again) == losses(whole)
    kind = {"attention": "v_proj.lora_B", "experts": "experts.lora_B", "router": "gate.modules_to_save"}[case]
    learnt = [n for n, p in weights(whole).items() if kind in n and not torch.equal(p, start[n])]
    assert learnt, list(start)


ANOTHER = [
    ("minimind3-moe", {"num_local_experts": 8}, r"experts\.down_proj \(4, 16, 16\), this one has \(8, 16, 16\)"),
    ("minimind2-moe", {"num_local_experts": 8}, r"experts\.down_proj \(4, 16, 24\), this one has \(8, 16, 24\)"),
    ("minimind3-moe", {"moe_intermediate_size": 8}, r"experts\.down_proj \(4, 16, 16\), this one has \(4, 16, 8\)"),
    ("minimind3-moe", {"num_hidden_layers": 1}, r"it has model\.layers\.1\..*, this one has no such tensor"),
    ("minimind3-moe", {"num_hidden_layers": 3}, r"has no model\.layers\.2\."),
]


@pytest.mark.parametrize("kind, changes, message", ANOTHER)
def test_another_models_checkpoint_is_refused_by_name(tmp_path, kind, changes, message):
    _, folder = saved(tmp_path, moe.model(kind))
    other = sft(tmp_path, moe.model(kind, **changes))
    before = weights(other)
    with pytest.raises(CheckpointError, match=message):
        other.train(resume_from_checkpoint=str(folder))
    assert_equal(before, weights(other))


def test_dense_models_and_adapters_are_refused(tmp_path):
    _, dense = saved(tmp_path / "dense", tiny.model("qwen3"))
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    _, adapter = saved(tmp_path / "lora", moe.model("minimind3-moe"), lora)
    whole = sft(tmp_path, moe.model("minimind3-moe"))
    for folder, message in ((dense, r"it has model\.embed_tokens"), (adapter, r"saved/model\.safetensors is missing")):
        with pytest.raises(CheckpointError, match=message):
            whole.train(resume_from_checkpoint=str(folder))


def test_lost_experts_are_missed(tmp_path):
    whole, folder = saved(tmp_path, moe.model("minimind3-moe"))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for e in range(4):
        del tensors[f"model.layers.1.mlp.experts.{e}.down_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.1\.mlp\.experts\.down_proj"):
        whole.train(resume_from_checkpoint=str(folder))
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]  # one of four: they cannot be joined
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is of another model, or damaged"):
        whole.train(resume_from_checkpoint=str(folder))


def test_dense_models_are_left_to_trainer(tmp_path, monkeypatch):
    first, folder = saved(tmp_path, tiny.model("qwen3"))
    again = sft(tmp_path, tiny.model("qwen3", seed=1))
    monkeypatch.setattr(type(again.model), "from_pretrained", None)  # it is not called
    again._check_checkpoint(folder)
    again._load_from_checkpoint(str(folder))
    assert_equal(weights(first), weights(again))


def test_a_run_does_not_go_on_from_weights_alone(tmp_path):
    """Trainer would, with a new optimizer and the schedule from its start."""
    sft(tmp_path, tiny.model(), save_only_model=True, max_steps=2).train()
    with pytest.raises(CheckpointError, match=r"checkpoint-1 has no optimizer\.safetensors .*save_only_model=True"):
        sft(tmp_path, tiny.model()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    again = sft(tmp_path, tiny.model(), max_steps=1)
    again.begin_with(tmp_path / "checkpoint-1")
    again.train()


def test_rows_beyond_a_table_of_positions_are_named(tmp_path):
    """They would end the run in the middle, with an IndexError, on a GPU with a device assert."""
    config = tiny.config("gpt2")
    config.n_positions = 7
    with pytest.raises(
        ValueError, match=r"^train_dataset, row 4: 8 tokens, more than the 7 positions of the model; lower"
    ):
        sft(tmp_path, tiny.from_config(config))
    sft(tmp_path, tiny.from_config(config), max_length=7)


def test_an_adapter_is_not_opened_by_name(tmp_path):
    get_peft_model(tiny.model(), LoraConfig(r=2, base_model_name_or_path="x")).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    tiny.model().save_pretrained(tmp_path / "base")
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    with pytest.raises(ValueError, match=r"adapter' is an adapter, which TRL does not load by name: merge it"):
        sft(tmp_path, str(tmp_path / "adapter"))


def test_rows_that_make_no_batch_are_named(tmp_path):
    trainer = sft(tmp_path, tiny.model(), per_device_train_batch_size=len(ROWS) + 1, dataloader_drop_last=True)
    with pytest.raises(
        ValueError, match=rf"has {len(ROWS)} row.*do not fill one batch of {len(ROWS) + 1}; give more rows"
    ):
        trainer.train()


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_rates_that_follow_a_metric_go_on(tmp_path, kind):
    """They are in no position on a schedule: an optimizer begun anew has the rate of step 0."""
    adaptive = {
        "lr_scheduler_type": kind,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "optim": "sgd",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "mode": "max"},  # a loss that falls is a bad sign
    }
    whole, again = (sft(tmp_path, tiny.model(), **adaptive) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rates = [[e["learning_rate"] for e in t.state.log_history if "learning_rate" in e] for t in (whole, again)]
    assert rates[0] == rates[1] and rates[0][-1] < rates[0][0]
    assert_equal(weights(whole), weights(again))


@pytest.mark.parametrize(
    "name, first, then",
    [
        ("optim", "adamw_torch", "adafactor"),
        ("optim", "rmsprop", "sgd"),
        ("lr_scheduler_type", "cosine", "reduce_lr_on_plateau"),
        ("lr_scheduler_type", "greedy", "reduce_lr_on_plateau"),
        ("lr_scheduler_type", "greedy", "linear"),
    ],
)
def test_the_state_of_another_optimizer_or_schedule_is_named(tmp_path, name, first, then):
    """It is passed over in silence, or a KeyError in the first step."""
    evaluating = {"eval_strategy": "steps", "eval_steps": 1}
    sft(tmp_path, tiny.model(), max_steps=1, **{name: first}, **evaluating).train()
    again = sft(tmp_path, tiny.model(), **{name: then}, **evaluating)
    with pytest.raises(CheckpointError, match=rf"state of {name}='{first}', which '{then}' cannot use"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_other_functions_of_the_step_and_kernels_go_on(tmp_path):
    sft(tmp_path, tiny.model(), max_steps=1, optim="adamw_torch_fused", lr_scheduler_type="cosine").train()
    again = sft(tmp_path, tiny.model(), max_steps=2, optim="adamw_torch", lr_scheduler_type="constant")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 2


@pytest.mark.parametrize("gives", [True, False], ids=["ours", "upstream"])
def test_single_tokens_of_a_tied_embedding_are_trained(tmp_path, monkeypatch, gives):
    """TRL's head is the wrapped one: with the tokens' new rows. Once upstream goes alone, `give_head_a_bias` can."""
    if not gives:
        monkeypatch.setattr(checkpointing, "give_head_a_bias", lambda _: None)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=[4, 9, 14])
    trainer = sft(tmp_path, tiny.model("qwen3", std=0.1), lora, save_strategy="no")
    rows = next(p for n, p in trainer.model.named_parameters() if "trainable_tokens_delta" in n)
    before = rows.detach().clone()
    if not gives:
        with pytest.raises(AttributeError, match="'TrainableTokensWrapper' object has no attribute 'bias'"):
            trainer.train()
        return
    names = list(trainer.model.state_dict())
    with torch.no_grad():
        rows.normal_()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    labels = batch["labels"][:, 1:]
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), wanted)
    trainer.train()
    assert not torch.equal(rows, before) and list(trainer.model.state_dict()) == names
