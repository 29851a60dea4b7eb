"""Texts from plans: `generate` is a greedy loop without cache; saved models come back whole in a fresh process."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.processes import fresh
from unsloth_ext import (
    PlannerExecutorModel,
    attach_planner,
    backbone_of,
    execute_plan,
    executor_forward,
    executor_prefix,
    plan,
    plan_log_prob,
    plan_soft,
    with_planner_modules,
)

from .setups import FAMILIES, WAYS, config, model, plans, texts


SETTINGS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def greedy(net, given, count):
    """One plan (1, n, Q), everything anew for every token."""
    ids = torch.zeros(1, 0, dtype=torch.long)
    for _ in range(count):
        asked = torch.cat([ids, ids.new_zeros(1, 1)], dim=1)  # what is predicted is not read
        hidden = executor_forward(net, executor_prefix(net, given), asked)[:, -1]
        ids = torch.cat([ids, net.get_output_embeddings()(hidden).argmax(-1)[None]], dim=1)
    return ids[0]


@pytest.mark.parametrize("family, lora", [*((f, False) for f in FAMILIES), ("qwen3", True)])
def test_execution_is_the_greedy_loop_and_batched_is_alone(family, lora):
    net, given = model(family, lora=lora), plans()
    with torch.no_grad():
        out = execute_plan(net, given, **SETTINGS)
        for row, p in zip(out, given):
            assert torch.equal(row, greedy(net, p[None], 8))
            assert torch.equal(row, execute_plan(net, p[None], **SETTINGS)[0])
    assert len({tuple(row.tolist()) for row in out}) == 4
    assert not backbone_of(net)._forward_pre_hooks


def test_several_texts_and_beams_for_a_plan():
    """Each as likely as it says: copies of a row keep its positions."""
    net, given = model(), plans()
    again = {**SETTINGS, "num_return_sequences": 3}
    torch.manual_seed(0)
    out = execute_plan(net, given, **{**again, "do_sample": True, "top_k": 0})
    assert out.shape == (12, 8) and len({tuple(row.tolist()) for row in out[:3]}) > 1
    surest = execute_plan(net, given, **{**again, "do_sample": True, "top_k": 1})
    assert torch.equal(surest, execute_plan(net, given, **SETTINGS).repeat_interleave(3, dim=0))
    found = execute_plan(
        net, given, **again, num_beams=3, length_penalty=0.0, output_scores=True, return_dict_in_generate=True
    )
    prefix = executor_prefix(net, given.repeat_interleave(3, dim=0))
    with torch.no_grad():
        hidden = executor_forward(net, prefix, found.sequences)
        log_probs = net.get_output_embeddings()(hidden).log_softmax(-1).gather(-1, found.sequences[..., None])
    assert (log_probs.sum((1, 2)) - found.sequences_scores).abs().max() <= 1e-4  # transformers' own scores are fp32


def test_execution_leaves_the_model_as_it_was():
    net, given = model().train(), plans()
    net.gradient_checkpointing_enable({"use_reentrant": False})
    net.eval()
    wanted = execute_plan(net, given, **SETTINGS)
    plan(net, *texts())
    assert torch.equal(execute_plan(net.train(), given, **SETTINGS), wanted) and net.training
    with pytest.raises(ValueError, match="use_cache=False"):
        execute_plan(net, given, use_cache=False)
    net.gradient_checkpointing_disable()
    assert plan_soft(net, *texts()).embeds.requires_grad


def saved(folder, lora=True, way=WAYS[0]):
    """(What was saved, where)."""
    base, tokenizer = tiny.model(std=0.1), tiny.tokenizer(())
    base.save_pretrained(folder / "base")
    base.name_or_path = base.config._name_or_path = str(folder / "base")
    net = attach_planner(base, config(*way))
    if lora:
        peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        vars(peft).update(with_planner_modules(peft))
        net = get_peft_model(net, peft)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    ours = PlannerExecutorModel(net.eval(), tokenizer)
    ours.save_pretrained(folder / "saved")
    return ours, folder / "saved"


ASKED = ["1+2+3=", "7-4=", ""]
SCRIPT = """
import sys, json, torch, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message=".*gradient_checkpointing")  # PEFT's, since transformers 5.23
from unsloth_ext import PlannerExecutorModel, backbone_of, plan_log_prob
loaded = PlannerExecutorModel.from_pretrained(sys.argv[1])
asked = json.loads(sys.argv[2])
plans = loaded.plan(asked)
ids = torch.arange(3, 10).expand(len(plans), -1)
print(json.dumps([
    plans.tolist(),
    loaded.plan(asked, num_beams=4).tolist(),
    loaded.generate(asked, max_new_tokens=6, do_sample=False),
    [x.hex() for x in plan_log_prob(loaded.model, ids, None, plans).tolist()],
]))
"""


@pytest.mark.parametrize("lora, way", [(True, WAYS[3]), (False, WAYS[0])])
def test_a_saved_model_says_the_same_in_a_fresh_process(tmp_path, lora, way):
    """Bit-equal: plans, their likelihoods, texts."""
    ours, folder = saved(tmp_path, lora, way)
    assert not {f.suffix for f in folder.iterdir()} & {".bin", ".pt", ".pkl"}
    done = fresh("-c", SCRIPT, folder, json.dumps(ASKED))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "UNEXPECTED" not in done.stdout + done.stderr
    found = json.loads(done.stdout.strip().split("\n")[-1])
    given = ours.plan(ASKED)
    assert found[0] == given.tolist() and found[1] == ours.plan(ASKED, num_beams=4).tolist()
    assert found[2] == ours.generate(ASKED, max_new_tokens=6, do_sample=False)
    likely = plan_log_prob(ours.model, torch.arange(3, 10).expand(3, -1), None, given)
    assert found[3] == [x.hex() for x in likely.tolist()]
    assert len({str(p) for p in found[0]}) > 1 and len(set(found[2])) > 1


def test_adapters_come_back_from_what_was_loaded(tmp_path):
    """Saved, loaded, trained on, saved again: the settings and both parameters are still there."""
    ours, folder = saved(tmp_path)
    loaded = PlannerExecutorModel.from_pretrained(str(folder))
    assert backbone_of(loaded.model).planner_config == config()
    head = [n for n, p in loaded.model.named_parameters() if p.requires_grad and "unified_head" in n]
    assert len(head) == 2
    loaded.save_pretrained(tmp_path / "again")
    again = PlannerExecutorModel.from_pretrained(str(tmp_path / "again"))
    assert torch.equal(again.plan(ASKED), ours.plan(ASKED))
    assert (
        load_file(folder / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "again" / "adapter_model.safetensors").keys()
    )


def test_one_text_or_none():
    loaded = PlannerExecutorModel(model(dtype=torch.float32), tiny.tokenizer(()))
    found = loaded.generate(ASKED, max_new_tokens=3, do_sample=False)
    assert [loaded.generate(text, max_new_tokens=3, do_sample=False) for text in ASKED] == found
    assert found == loaded.execute(loaded.plan(ASKED), max_new_tokens=3, do_sample=False)
    assert loaded.plan("7-4=").shape == (1, 2, 4)
    assert loaded.generate([]) == [] and loaded.execute(plans()[:0]) == []


def test_models_without_a_planner_say_so(tmp_path):
    with pytest.raises(ValueError, match="has no planner; call attach_planner"):
        PlannerExecutorModel(tiny.model(), tiny.tokenizer())
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer_config"):
        PlannerExecutorModel.from_pretrained(str(tmp_path))
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no settings of the method planner"):
        PlannerExecutorModel.from_pretrained(str(tmp_path))
    net = attach_planner(tiny.model(), config())
    net = get_peft_model(net, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="would leave the planner untrained"):
        PlannerExecutorModel(net, tiny.tokenizer())


A, S, M = "adapter_model.safetensors", "latent_reasoning.json", "model.safetensors"


def edit_planner(file, **changes):
    found = json.loads(file.read_text())
    found["settings"] = {k: v for k, v in {**found["settings"], **changes}.items() if v is not None}
    file.write_text(json.dumps(found))


def edit_head(file, change):
    tensors = load_file(file)
    change(tensors, next(name for name in tensors if name.endswith("unified_head.table")))
    save_file(tensors, file, metadata={"format": "pt"})


WRONG = {
    "lost": (True, "lacks .*table", lambda f: edit_head(f / A, lambda t, n: t.pop(n))),
    "short": (True, "does not fit the model", lambda f: edit_head(f / A, lambda t, n: t.update({n: t[n][:5].clone()}))),
    "nan": (True, "holds NaN", lambda f: edit_head(f / A, lambda t, n: t[n].view(-1)[:1].fill_(torch.nan))),
    "no ordering": (True, "not those of this version: ordering", lambda f: edit_planner(f / S, ordering=None)),
    "more": (True, "not those of this version: depth", lambda f: edit_planner(f / S, depth=1)),
    "types": (True, "its planner settings: types=.a.", lambda f: edit_planner(f / S, types="a")),
    "other types": (True, "does not fit the model", lambda f: edit_planner(f / S, types=[{"num_concepts": 3}])),
    "full": (False, "lacks unified_head.table", lambda f: edit_head(f / M, lambda t, n: t.pop(n))),
    "full nan": (False, "holds NaN", lambda f: edit_head(f / M, lambda t, n: t[n].view(-1)[:1].fill_(torch.nan))),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_a_folder_is_named(tmp_path, wrong):
    lora, message, spoil = WRONG[wrong]
    _, folder = saved(tmp_path, lora)
    PlannerExecutorModel.from_pretrained(str(folder))
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        PlannerExecutorModel.from_pretrained(str(folder))
    assert str(folder) in str(error.value)


def test_a_text_behind_the_models_positions_is_named():
    net = model("qwen3")
    with pytest.raises(ValueError, match="text 1 has 300 tokens: more than the model's 256 positions"):
        PlannerExecutorModel(net, tiny.tokenizer(())).generate(["1", "1" * 300])


def test_a_base_that_was_saved_in_training_keeps_its_plan_in_the_cache():
    net = tiny.model()
    net.generation_config.use_cache = False  # as of a config.json from a run with gradient checkpointing
    assert attach_planner(net).generation_config.use_cache
