"""The loss against a plain one, SFT where it is off, what learns, and resuming."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests import families, tiny
from tests.marks import slow
from trl_ext import ConceptConfig
from unsloth_ext import ConceptModel, backbone_of

from . import setups


def batch_of(trainer, indices=range(4)):
    rows = [trainer.train_dataset[i] for i in indices]
    return trainer.data_collator([{k: row[k] for k in ("input_ids", "labels")} for row in rows])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("case", setups.CASES)
def test_the_loss_is_cross_entropy_and_the_weighted_terms(tmp_path, case, family, mode):
    """1e-5, written out from the model's own choice under the same noise; and what is logged."""
    trainer = setups.trainer(tmp_path, family=family, **setups.CASES[case])
    args, batch = trainer.args, batch_of(trainer)
    trainer.state.max_steps, trainer.state.global_step = 4, 3  # behind the warm start
    trainer._calibrated = True
    trainer.model.train(mode == "train")
    torch.manual_seed(5)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    backbone = backbone_of(trainer.model)
    if mode == "train" and args.temperature_end:
        backbone.concept_gate.temperature = args.temperature_end**0.75
    torch.manual_seed(5)
    out = backbone(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits = trainer.model.lm_head(out.last_hidden_state)
    ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    real, choice = batch["attention_mask"].bool(), out.choice
    p, made = choice.probability[real].mean(), choice.concept[real].float().mean()
    target = args.target_ratio
    ratio = target / (target - 1) * ((target - 1) * made * p + (1 - made) * (1 - p))
    use = choice.logits[choice.concept][:, :-1].view(-1, args.num_codebooks, 16).softmax(-1).mean(0)
    usage = (math.log(16) + (use * use.log()).sum(-1)).mean()
    wanted = ce + args.ratio_weight * ratio + args.usage_weight * usage
    assert abs(loss - wanted) <= 1e-5 * max(1, wanted)
    counts = [choice.ids[choice.concept][:, k].bincount(minlength=16).float() for k in range(args.num_codebooks)]
    entropy = torch.stack([-torch.special.xlogy(c / c.sum(), c / c.sum()).sum() for c in counts]).mean()
    trainer._log(mode)
    logged = trainer._metrics[mode]
    for name, value in {
        "loss/ce": ce,
        "loss/ratio": ratio,
        "loss/usage": usage,
        "concept/ratio": 1 / made,
        "concept/probability": p,
        "concept/perplexity": entropy.exp(),
    }.items():
        assert logged[name][-1] == pytest.approx(float(value), rel=1e-4), name


@pytest.mark.parametrize("peft", [True, slow(False)])
@pytest.mark.parametrize("case", [c if c in ("literal", "stable") else slow(c) for c in setups.CASES])
def test_it_trains_what_it_should_and_resumes_exactly(tmp_path, case, peft):
    """Resumed at step 2 of 4: every parameter equal, bit for bit; loaded again, the same choices."""
    changes = {**setups.CASES[case], "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    setups.base().save_pretrained(tmp_path / "base")
    base = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # noqa: E731 - an adapter looks for it there
    whole = setups.trainer(tmp_path, peft, model=base(), per_device_train_batch_size=2, **changes)
    before = {n: p.detach().clone() for n, p in whole.model.named_parameters()}
    after = setups.trained(whole)
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    learning = {n for n, p in whole.model.named_parameters() if p.requires_grad}
    assert moved == learning and any("concept_head" in n for n in moved)
    if peft:
        assert all("lora" in n or "concept_" in n for n in learning)
    again = setups.trainer(tmp_path, peft, model=base(), per_device_train_batch_size=2, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, after[name]), name
    loaded = ConceptModel.from_pretrained(str(tmp_path / "checkpoint-4"))
    ids = batch_of(whole)["input_ids"]
    found, wanted = (backbone_of(m.eval())(ids, use_cache=False) for m in (loaded.model, whole.model))
    assert found.choice.ids.equal(wanted.choice.ids)
    assert (found.last_hidden_state - wanted.last_hidden_state).abs().max() <= 1e-6


@pytest.mark.parametrize("peft", [True, slow(False)])
@pytest.mark.parametrize("case", ["literal", "stable", "autoregressive"])
def test_gradient_checkpointing_changes_nothing(tmp_path, peft, case):
    """1e-5 after four steps (fp32), the same noise drawn."""
    runs = (
        setups.trained(setups.trainer(tmp_path, peft, gradient_checkpointing=on, **setups.CASES[case]))
        for on in (False, True)
    )
    plain, saving = runs
    assert all((plain[n] - saving[n]).abs().max() <= 1e-5 for n in plain)


def test_accumulated_steps_are_one_batch(tmp_path):
    """Cross-entropy: every token weighs the same, wherever it falls; SGD, 1e-6. One codeword leaves nothing to be drawn."""
    changes = {"segmenter": "fixed", "num_concepts": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    one, many = (
        setups.trainer(
            tmp_path, per_device_train_batch_size=n, gradient_accumulation_steps=8 // n, max_steps=2, **changes
        )
        for n in (8, 2)
    )
    weights = [setups.trained(trainer) for trainer in (one, many)]
    assert all((weights[0][n] - weights[1][n]).abs().max() <= 1e-6 for n in weights[0])
    for together, apart in zip(*([e for e in t.state.log_history if "loss/ce" in e] for t in (one, many)), strict=True):
        assert apart["loss/ce"] == pytest.approx(together["loss/ce"], rel=1e-5)


def test_figures_are_of_all_a_steps_tokens_and_of_a_whole_evaluation(tmp_path, monkeypatch):
    """1e-5: micro-batches of 2 and batches of 3 log what one of 8 does; without noise, so that choices are the same."""
    monkeypatch.setattr("unsloth_ext.concept.gate.gumbel_noise", torch.zeros_like)
    changes = {
        **setups.CASES["stable"],
        "warm_start_share": 0.0,
        "codebook_init": "random",
        "calibrate_null": False,
        "ratio_weight": 1.0,
        "usage_weight": 0.0,
        "num_concepts": 16,
        "max_steps": 1,
    }
    one, many = (
        setups.trainer(
            tmp_path,
            per_device_train_batch_size=n,
            gradient_accumulation_steps=8 // n,
            per_device_eval_batch_size=m,
            **changes,
        )
        for n, m in ((8, 8), (2, 3))
    )
    names = ("concept/ratio", "concept/probability", "concept/perplexity", "loss/ce")
    before = [trainer.evaluate() for trainer in (one, many)]
    for name in (*names, "loss/ratio", "loss/usage"):
        assert before[1][f"eval_{name}"] == pytest.approx(before[0][f"eval_{name}"], rel=1e-5), name
    assert before[0]["eval_concept/perplexity"] > 1.5, "the case has no teeth"
    for trainer in (one, many):
        trainer.train()
    together, apart = (next(e for e in t.state.log_history if "loss/ce" in e) for t in (one, many))
    for name in names:
        assert apart[name] == pytest.approx(together[name], rel=1e-5), name
    parts = apart["loss/ce"] + apart["loss/ratio"]
    assert apart["loss"] == pytest.approx(parts, rel=1e-4)


def test_packed_rows_are_the_rows_alone(tmp_path):
    """TRL's own packing: one long row of several texts, whose cross-entropy is theirs, 1e-5."""
    changes = {"segmenter": "fixed", "num_concepts": 1, "stride": 3}
    packed = setups.trainer(tmp_path, packing=True, max_length=128, **changes)
    alone = setups.trainer(tmp_path, **changes)
    for trainer in (packed, alone):
        trainer.model.eval()
    batch = packed.data_collator([packed.train_dataset[i] for i in range(2)])
    assert "attention_mask" not in batch and (batch["position_ids"] == 0).sum() > 4
    found = packed.compute_loss(packed.model, dict(batch))
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    ends = [*starts[1:], batch["input_ids"].shape[1]]
    total, count = 0.0, 0
    for begin, end in zip(starts, ends):
        ids, labels = (batch[k][:, begin:end] for k in ("input_ids", "labels"))
        logits = alone.model(ids, use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
        count += (labels[:, 1:] != -100).sum().item()
    assert found.item() == pytest.approx(total / count, rel=1e-5)
    setups.trained(packed)


def test_the_gate_follows_its_schedule(tmp_path):
    """Stride 3 for half of the steps, calibrated before them and after; temperature from 1 to 0.3; evaluation always by the
    head."""
    from transformers import TrainerCallback

    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            seen.append(backbone_of(trainer.model).concept_head.bias[-1].item())

    trainer = setups.trainer(
        tmp_path,
        callbacks=[Watch()],
        eval_strategy="steps",
        eval_steps=2,
        max_steps=8,
        learning_rate=0.0,
        **{**setups.CASES["stable"], "codebook_init": "random"},  # four rows say little about lumps of states
    )
    trainer.train()
    log = [e for e in trainer.state.log_history if "concept/temperature" in e]
    assert [e["concept/temperature"] for e in log] == pytest.approx([0.3 ** (i / 8) for i in range(8)])
    assert seen[1] != seen[0] and seen[5] != seen[4] and len(set(seen[1:5])) == len(set(seen[5:])) == 1
    lengths = [len(r["input_ids"]) for r in trainer.train_dataset]
    by_stride = sum(lengths) / sum(n // 3 for n in lengths)
    assert all(e["concept/ratio"] == pytest.approx(by_stride, rel=0.1) for e in log[:4])
    evals = [e for e in trainer.state.log_history if "eval_concept/ratio" in e]
    for found in evals:  # of 8 rows, calibrated on 4 others; the head's own decision, not the stride
        assert found["eval_concept/ratio"] == pytest.approx(3, rel=0.35) and found["eval_concept/ratio"] != by_stride
    gate = backbone_of(trainer.model).concept_gate
    assert gate.temperature == 1.0 and gate.segment_as is None


@pytest.mark.parametrize("segmenter", ["null", "threshold"])
def test_a_head_that_is_sure_is_calibrated_too(tmp_path, segmenter):
    """As one with 4,096 codewords is from the start: where p is 1 in fp32, its logit still tells tokens apart."""
    case = {**setups.CASES["stable"], "segmenter": segmenter, "codebook_init": "random"}
    trainer = setups.trainer(tmp_path, learning_rate=0.0, **case)
    backbone = backbone_of(trainer.model)
    with torch.no_grad():
        backbone.concept_head.bias[:-1] += 50
    trainer.train()
    assert backbone.concept_head.bias.isfinite().all()
    log = [e["concept/ratio"] for e in trainer.state.log_history if "concept/ratio" in e]
    assert all(1.5 < ratio < 6 for ratio in log[2:])  # at R = 3, of 4 rows


@pytest.mark.parametrize("peft", [True, False])
def test_codewords_out_of_the_training_texts(tmp_path, peft):
    """They explain most of the shallow states' variance, random ones none; a model that has its concepts keeps them."""

    def explained(trainer):
        backbone, batch = backbone_of(trainer.model.eval()), batch_of(trainer, range(20))
        with torch.no_grad():
            out = backbone(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            states = out.shallow[out.valid]
            codes = backbone.concept_embedding(backbone.concept_head(states)[:, None, :-1].argmax(-1))
        return 1 - (states - codes).square().sum() / (states - states.mean(0)).square().sum()

    still = {"learning_rate": 0.0, "segmenter": "fixed", "stride": 3}
    drawn = setups.trainer(tmp_path / "a", peft, **still)
    drawn.train()
    made = setups.trainer(tmp_path / "b", peft, **still, codebook_init="kmeans")
    made.train()
    assert explained(drawn) < 0 and explained(made) > 0.5
    kept = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    on = setups.trainer(tmp_path / "c", model=made.model, **still, codebook_init="kmeans")
    assert all(torch.equal(p, kept[n]) for n, p in setups.trained(on).items())


def test_too_few_texts_for_the_codewords_are_refused_before_the_first_step(tmp_path):
    trainer = setups.trainer(tmp_path, codebook_init="kmeans", num_concepts=4096)
    with pytest.raises(ValueError, match=r"num_concepts=4096: .* the training texts have only"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_concepts_have_a_learning_rate_of_their_own(tmp_path):
    trainer = setups.trainer(tmp_path, peft=True, concept_learning_rate=0.25)
    trainer.create_optimizer()
    rates = {p: g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert rates[parameter] == (0.25 if "concept_" in name else 3e-3), name


def test_a_model_by_its_folder_and_one_that_goes_on(tmp_path, caplog):
    """Loaded by the trainer; then its own adapter trained further, which keeps its settings and says so."""
    setups.base().save_pretrained(tmp_path / "base")
    first = setups.trainer(tmp_path / "a", True, model=str(tmp_path / "base"))
    first.train()
    first.save_model(str(tmp_path / "saved"))
    loaded = ConceptModel.from_pretrained(str(tmp_path / "saved"))
    second = setups.trainer(tmp_path / "b", model=loaded.model, tokenizer=loaded.tokenizer, max_tail=7)
    assert "keeps it; asked for: 7" in caplog.text
    before = {n: p.detach().clone() for n, p in second.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, dict(first.model.named_parameters())[n]) for n, p in before.items())
    after = setups.trained(second)
    assert all(not torch.equal(after[n], p) for n, p in before.items())


def test_what_is_given_beside_a_preset_wins_also_where_it_is_the_default(tmp_path):
    made = ConceptConfig.preset("stable", **setups.settings(tmp_path), calibrate_null=False, gate="literal")
    assert (made.calibrate_null, made.gate) == (False, "literal")
    assert (made.codebook_init, made.ratio_weight, made.usage_weight) == ("kmeans", 1.0, 0.1)
    assert ConceptConfig.preset("literal", **setups.settings(tmp_path)).gate == "literal"
    with pytest.raises(ValueError, match="ConceptConfig has no preset 'best'; it has literal, stable"):
        ConceptConfig.preset("best")


REFUSED = [
    ({"n_shallow": 3}, "n_shallow=3, n_deep=1: they leave no layer of the model's 4"),
    ({"n_middle": 7}, "together 9, the model has 4"),
    ({"n_shallow": 0}, "n_shallow=0: must be at least 1"),
    ({"segmenter": "words"}, "segmenter='words'"),
    ({"gate": "both"}, "gate='both'"),
    ({"codebook_init": "pca"}, "codebook_init='pca': choose one of random, kmeans"),
    ({"ratio_weight": 1.0, "max_tail": 4}, "max_tail=4, target_ratio=4.0: concepts forced that often"),
    ({"ratio_weight": -1.0}, "ratio_weight=-1.0"),
    ({"usage_weight": math.nan}, "usage_weight=nan"),
    ({"target_ratio": 1.0}, "target_ratio=1.0"),
    ({"temperature": 0.0}, "temperature=0.0"),
    ({"temperature_end": -1.0}, "temperature_end=-1.0"),
    ({"warm_start_share": 1.5}, "warm_start_share=1.5"),
    ({"concept_learning_rate": -1.0}, "concept_learning_rate=-1.0"),
    ({"segmenter": "fixed", "ratio_weight": 1.0}, "segmenter='fixed' uses a stride"),
    ({"use_liger_kernel": True}, "use_liger_kernel=True"),
    ({"concepts_per_stride": 9}, "concepts_per_stride=9: must be at most stride=4"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_what_cannot_be_is_said_before_training(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        setups.trainer(tmp_path, **changes)


def test_adapters_that_would_not_learn_concepts_are_refused(tmp_path):
    from peft import get_peft_model

    from unsloth_ext import OnlineConceptConfig, attach_concepts

    with pytest.raises(ValueError, match="wrapped by PEFT and has no concepts"):
        setups.trainer(tmp_path, model=get_peft_model(setups.base(), setups.lora()))
    made = attach_concepts(setups.base(), OnlineConceptConfig(1, 2, 1, num_concepts=16))
    with pytest.raises(ValueError, match="modules_to_save would leave"):
        setups.trainer(tmp_path, model=get_peft_model(made, setups.lora()))
    gpt2 = tiny.config("gpt2")
    gpt2.n_layer = 3
    with pytest.raises(ValueError, match="not built like llama"):
        setups.trainer(tmp_path, model=AutoModelForCausalLM.from_config(gpt2))


def test_experts_train_without_a_loss_of_their_own(tmp_path):
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0.001: .*set router_aux_loss_coef=0\.0"):
        setups.trainer(tmp_path, model=families.model("mixtral", vocab_size=64))
    setups.trainer(
        tmp_path, model=families.model("mixtral", vocab_size=64), router_aux_loss_coef=0.0, max_steps=1
    ).train()
