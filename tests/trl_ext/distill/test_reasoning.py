"""The weighted loss against a plain one, SFT at weight 1, tags that were new, resuming, saving, and what is refused."""

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig
from torch.nn import functional as F
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.processes import fresh
from trl_ext import LogitsDistillConfig, ReasoningDistillTrainer
from trl_ext.distill.config import TAGS
from trl_ext.distill.tags import add_tags

from . import setups


def with_tags():
    tokenizer = tiny.tokenizer(setups.PIECES)
    add_tags(tokenizer, list(TAGS))
    return tokenizer


def plain(trainer, batch):
    """(NLL of trained tokens, which of them are tags), from dense logits."""
    with torch.no_grad():
        logits = trainer.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    at = labels != -100
    names = trainer.processing_class.convert_ids_to_tokens(labels[at].tolist())
    return F.cross_entropy(logits[at], labels[at], reduction="none"), torch.tensor([name in TAGS for name in names])


def loss_of(trainer, batch):
    trainer.model.train()
    return trainer.compute_loss(trainer.model, dict(batch)).item()


@pytest.mark.parametrize("weight", [0.0, 1.0, 10.0])
def test_tags_weigh_more_and_count_as_one(tmp_path, weight):
    """1e-5 relative: the sum of weighted terms over the number of trained tokens, whatever they weigh."""
    trainer = setups.reasoning(tmp_path, tag_weight=weight)
    batch = setups.batch_of(trainer)
    nll, is_tag = plain(trainer, batch)
    assert is_tag.sum() == 16 and (~is_tag).sum() > 16
    wanted = (nll * torch.where(is_tag, weight, 1.0)).sum() / len(nll)
    assert loss_of(trainer, batch) == pytest.approx(wanted.item(), rel=1e-5)
    trainer.log({})
    assert trainer.state.log_history[-1]["loss/tags"] == pytest.approx(nll[is_tag].mean().item(), rel=1e-5)
    assert trainer.state.log_history[-1]["loss/text"] == pytest.approx(nll[~is_tag].mean().item(), rel=1e-5)


def test_logged_means_count_tokens_not_micro_batches(tmp_path):
    """One row at a time or all eight at once: the same figures in the log, to 1e-5. Rows differ in length."""
    logged = {}
    for size in (1, 8):
        trainer = setups.reasoning(
            tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=1
        )
        trainer.train()
        logged[size] = {name: trainer.state.log_history[0][name] for name in ("loss", "loss/tags", "loss/text")}
    assert logged[1] == pytest.approx(logged[8], rel=1e-5)


def test_it_is_not_the_tutorials(tmp_path):
    """It weighs every token that a tag's spelling has: "<", "t", "a", ... of the text too, which ours does not."""
    trainer = setups.reasoning(tmp_path)
    batch = setups.batch_of(trainer)
    nll, is_tag = plain(trainer, batch)
    spelled = {piece for tag in TAGS for piece in tiny.tokenizer(setups.PIECES).tokenize(tag)}
    assert "<" in spelled and len(spelled) > 10
    labels = batch["labels"][:, 1:]
    names = trainer.processing_class.convert_ids_to_tokens(labels[labels != -100].tolist())
    assert names.count("<") == 4  # of "a<b"
    theirs = is_tag | torch.tensor([name in spelled for name in names])
    tutorials = (nll * torch.where(theirs, 10.0, 1.0)).sum() / len(nll)
    assert abs(tutorials - loss_of(trainer, batch)) > 0.1 * tutorials


def test_only_tags_gradients_are_weighed(tmp_path):
    """Those of weight 10 are those of weight 1 and nine times the tags' own: 1e-5 of the largest (fp32)."""
    grads = {}
    for weight in (0.0, 1.0, 10.0):
        trainer = setups.reasoning(tmp_path, tag_weight=weight)
        trainer.compute_loss(trainer.model, setups.batch_of(trainer)).backward()
        grads[weight] = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    wanted = grads[1.0] + 9 * (grads[1.0] - grads[0.0])
    assert (grads[10.0] - wanted).abs().max() <= 1e-5 * wanted.abs().max() and not torch.equal(grads[10.0], grads[1.0])


@pytest.mark.parametrize("config", [setups.config, setups.moe_config])
@pytest.mark.parametrize("peft", [True, False])
def test_weight_one_is_sft_bit_for_bit(tmp_path, config, peft):
    """Parameters and every figure that SFT logs, where the tags were tokens already."""
    peft = peft and LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    changes = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    ours = setups.reasoning(
        tmp_path, setups.model(config()), peft=peft, tokenizer=with_tags(), tag_weight=1.0, **changes
    )
    stock = SFTTrainer(
        setups.model(config()),
        SFTConfig(**setups.settings(tmp_path, **changes)),
        **setups._common(setups.TAGGED, with_tags(), peft),
    )
    a, b = setups.trained(ours), setups.trained(stock)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    logs = [{k: v for k, v in e.items() if not k.endswith(("/tags", "/text"))} for e in setups.losses(ours)]
    assert logs == setups.losses(stock) and "loss/tags" in ours.state.log_history[0]


def test_accumulated_steps_are_one_batch(tmp_path):
    """Of unequal lengths and unequal shares of tags: weights 1e-6 (SGD), losses 1e-5."""
    rows = [row if i % 3 else {"prompt": row["prompt"], "completion": "so"} for i, row in enumerate(setups.TAGGED)]
    one, many = (
        setups.reasoning(
            tmp_path,
            rows=rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=2,
            optim="sgd",
            learning_rate=0.03,
            max_grad_norm=0.0,
        )
        for size in (8, 1)
    )
    a, b = setups.trained(one), setups.trained(many)
    assert all((a[n] - b[n]).abs().max() <= 1e-6 for n in a)
    for together, apart in zip(setups.losses(one)[:2], setups.losses(many)[:2], strict=True):
        assert apart["loss"] == pytest.approx(together["loss"], rel=1e-5)


def test_padding_free_batches_are_padded_ones(tmp_path):
    """1e-6 relative, the model's rows given as one text."""
    rows = [{"text": row["prompt"] + row["completion"]} for row in setups.TAGGED]
    padded, flat = (setups.reasoning(tmp_path, rows=rows, padding_free=f, max_length=None) for f in (False, True))
    batch = setups.batch_of(flat)
    assert batch["input_ids"].shape[0] == 1
    assert loss_of(flat, batch) == pytest.approx(loss_of(padded, setups.batch_of(padded)), rel=1e-6)


def test_a_model_by_name_with_its_own_tokenizer_gets_the_tags(tmp_path):
    """Before its rows are tokenized; saved, both are stock and load in a fresh process with equal logits."""
    setups.student(vocab_size=50).save_pretrained(tmp_path / "base")
    tiny.tokenizer(setups.PIECES).save_pretrained(tmp_path / "base")
    trainer = ReasoningDistillTrainer(
        str(tmp_path / "base"),
        setups.ReasoningDistillConfig(**setups.settings(tmp_path / "run"), model_init_kwargs={"dtype": "float32"}),
        train_dataset=Dataset.from_list(setups.TAGGED),
    )
    assert trainer.model.config.vocab_size == 54
    before = setups.weights(trainer)["model.embed_tokens.weight"]
    after = setups.trained(trainer)["model.embed_tokens.weight"]
    assert all(not torch.equal(before[i], after[i]) for i in range(50, 54))
    trainer.save_model(str(tmp_path / "saved"))
    loads_in_a_fresh_process(tmp_path, trainer, "AutoModelForCausalLM", "transformers")


@pytest.mark.parametrize("tie", [True, False])
def test_an_adapter_trains_saves_and_loads_the_new_tokens(tmp_path, tie):
    """On a base in a folder, without tags: their rows, and no other, move; a fresh process has the same logits."""
    setups.student(vocab_size=50, tie_word_embeddings=tie).save_pretrained(tmp_path / "base")
    tiny.tokenizer(setups.PIECES).save_pretrained(tmp_path / "base")
    lora = LoraConfig(**setups.LORA)
    trainer = ReasoningDistillTrainer(
        str(tmp_path / "base"),
        setups.ReasoningDistillConfig(
            **setups.settings(tmp_path / "run", learning_rate=3e-2), model_init_kwargs={"dtype": "float32"}
        ),
        train_dataset=Dataset.from_list(setups.TAGGED),
        peft_config=lora,
    )
    assert lora.trainable_token_indices is None  # the caller's is left alone
    inner = trainer.model.get_base_model()

    def rows():
        both = inner.get_input_embeddings().weight, inner.get_output_embeddings().weight
        return [x.detach().clone() for x in both]

    before = rows()
    trainer.train()
    for a, b in zip(before, rows(), strict=True):
        assert ((a - b).abs().amax(1) > 1e-3).nonzero().flatten().tolist() == [50, 51, 52, 53]
    assert torch.equal(*rows()) == tie
    trainer.save_model(str(tmp_path / "saved"))
    loads_in_a_fresh_process(tmp_path, trainer, "AutoPeftModelForCausalLM", "peft")


def loads_in_a_fresh_process(folder, trainer, loader, package):
    """Loads `saved` with its tokenizer in a fresh process: equal logits to 1e-6 on a text with tags."""
    text = "<think>so</think><answer>9</answer>"
    ids = trainer.processing_class(text, return_tensors="pt").input_ids
    torch.save(trainer.model.eval()(ids).logits.detach(), folder / "wanted.pt")
    code = f"""
import sys, torch
from transformers import AutoTokenizer
from {package} import {loader}
ids = AutoTokenizer.from_pretrained(sys.argv[1] + "/saved")({text!r}, return_tensors="pt").input_ids
assert ids.shape[1] == 7, ids
model = {loader}.from_pretrained(sys.argv[1] + "/saved").eval()
difference = (model(ids).logits - torch.load(sys.argv[1] + "/wanted.pt")).abs().max()
assert difference <= 1e-6 and "trl_ext" not in sys.modules, difference
"""
    done = fresh("-c", code, folder, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("tie", [True, False])
def test_under_lora_a_tags_rows_get_the_whole_models_gradient(tmp_path, tie):
    """1e-6 of the largest, from embedding and head; LoRA starts as the base."""
    made = [
        setups.reasoning(tmp_path, setups.student(vocab_size=50, tie_word_embeddings=tie), peft=peft)
        for peft in (False, True)
    ]
    for trainer in made:
        trainer.compute_loss(trainer.model.train(), setups.batch_of(trainer)).backward()
    whole, lora = (dict(trainer.model.named_parameters()) for trainer in made)
    for name in ["model.embed_tokens"] if tie else ["model.embed_tokens", "lm_head"]:
        wanted = whole[f"{name}.weight"].grad[50:]
        found = lora[f"base_model.model.{name}.token_adapter.trainable_tokens_delta.default"].grad
        assert wanted.abs().max() > 0 and (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("peft", [True, False])
def test_resumed_is_uninterrupted(tmp_path, peft):
    """At step 2 of 4, where the tags were new to the base: parameters and figures, bit for bit."""
    changes = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = setups.reasoning(tmp_path, peft=peft, per_device_train_batch_size=2, **changes)
    after = setups.trained(whole)
    again = setups.reasoning(tmp_path, peft=peft, per_device_train_batch_size=2, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, after[n]) for n, p in again.model.named_parameters())
    assert setups.losses(again)[:4] == setups.losses(whole)[:4]


def test_evaluation_and_outputs_are_the_parents(tmp_path):
    """The evaluation's loss is the weighted one, 1e-5; `return_outputs` has the whole logits."""
    trainer = setups.reasoning(tmp_path, eval_strategy="steps", eval_steps=2, max_steps=2, per_device_eval_batch_size=8)
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    batch = trainer.data_collator([{k: trainer.eval_dataset[i][k] for k in ("input_ids", "labels")} for i in range(8)])
    loss, outputs = trainer.compute_loss(trainer.model.eval(), dict(batch), return_outputs=True)
    assert outputs.logits.shape == (*batch["input_ids"].shape, 54) and loss.item() == logged["eval_loss"]
    nll, is_tag = plain(trainer, batch)
    assert loss.item() == pytest.approx((nll * torch.where(is_tag, 10.0, 1.0)).mean().item(), rel=1e-5)
    assert logged["eval_loss/tags"] == pytest.approx(nll[is_tag].mean().item(), rel=1e-5)
    assert logged["eval_loss/text"] == pytest.approx(nll[~is_tag].mean().item(), rel=1e-5)


def test_tags_are_learnt_sooner(tmp_path):
    """After 30 steps their NLL is below that at weight 1."""
    end = {}
    for weight in (1.0, 10.0):
        trainer = setups.reasoning(tmp_path, tag_weight=weight, max_steps=30, max_grad_norm=0.0, optim="sgd")
        trainer.train()
        end[weight] = [e["loss/tags"] for e in trainer.state.log_history if "loss/tags" in e][-1]
    assert end[10.0] < end[1.0] - 0.05


def test_tags_of_ones_own(tmp_path):
    rows = [{"prompt": "a", "completion": "<plan>so</plan>"}] * 8
    trainer = setups.reasoning(tmp_path, rows=rows, tags=["<plan>", "</plan>"])
    assert trainer.processing_class.convert_ids_to_tokens(trainer._tag_ids.tolist()) == ["<plan>", "</plan>"]
    trainer.train()


def test_what_cannot_be_trained_is_named(tmp_path):
    with pytest.raises(ValueError, match="IA3Config would leave the embeddings of the new tokens"):
        setups.reasoning(tmp_path, peft=IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="train dataset: none of <think>"):
        setups.reasoning(tmp_path, rows=setups.ROWS)
    tokenizer = tiny.tokenizer(setups.PIECES)
    done = [{"input_ids": tokenizer(row["completion"]).input_ids} for row in setups.TAGGED]
    with pytest.raises(ValueError, match="rows that are already tokenized"):
        setups.reasoning(tmp_path, rows=done, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="needs a ReasoningDistillConfig"):
        ReasoningDistillTrainer(setups.student(), LogitsDistillConfig(**setups.settings(tmp_path)))
