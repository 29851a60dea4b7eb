"""Parameters as published, YaRN's frequencies against their definition, the auxiliary loss against MiniMind's own."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
from trl import SFTConfig, SFTTrainer

from patches import fused_lm_head
from tests import moe, tiny
from unsloth_ext import minimind_config
from unsloth_ext.minimind import presets


@pytest.mark.parametrize(
    "name, millions, active",
    [
        ("minimind2-small", 25.83, None),
        ("minimind2", 104.03, None),
        ("minimind2-moe", 145.03, None),
        ("minimind3", 63.91, None),
        ("minimind3-moe", 198.42, 63.94),
        ("tiny", 2.85, None),  # these two are ours
        ("micro", 0.58, None),
    ],
)
def test_parameters_are_as_many_as_published(name, millions, active):
    """To the last digit of docs/minimind.md."""
    config = minimind_config(name)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    assert round(net.num_parameters() / 1e6, 2) == millions
    if active:
        idle = sum(p.numel() for n, p in net.named_parameters() if ".experts." in n) * 3 // 4  # three experts of four
        assert round((net.num_parameters() - idle) / 1e6, 2) == active


@pytest.mark.parametrize("name", ["minimind2-small", "minimind3"])
def test_yarn_stretches_sixteen_times(name):
    """1e-6: frequencies below the ramp as they are, above it a sixteenth, between them mixed."""
    config = minimind_config(name, yarn=True)
    assert config.max_position_embeddings == 16 * 2048
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    width = config.hidden_size // 8
    plain = 1e6 ** (-torch.arange(0, width, 2).float() / width)

    def turns(beta):
        return width * math.log(2048 / (beta * 2 * math.pi)) / (2 * math.log(1e6))

    low, high = max(math.floor(turns(32)), 0), min(math.ceil(turns(1)), width - 1)
    ramp = ((torch.arange(width // 2) - low) / (high - low)).clamp(0, 1)
    assert (rotary.inv_freq / (plain * (1 - ramp) + plain / 16 * ramp) - 1).abs().max() <= 1e-6
    assert rotary.attention_scaling == 1.0


def test_no_such_preset():
    with pytest.raises(ValueError, match="no MiniMind preset 'minimind9'; there are minimind2-small"):
        minimind_config("minimind9")


def second_generations(logits, top_k, alpha):
    """MiniMind2's, of one layer: logits (B, T, E); each text's shares of its T k choices times its mean probabilities."""
    texts, experts = len(logits), logits.shape[-1]
    total = 0.0
    for text in logits:
        chosen = text.topk(top_k).indices.flatten()
        f = torch.stack([(chosen == i).double().mean() for i in range(experts)])
        total += experts * (f * text.softmax(-1).mean(0)).sum()
    return alpha * total / texts


def third_generations(logits, top_k, alpha):
    """MiniMind3's, of one layer: over all tokens, with shares of tokens: of choices where a token has one."""
    rows = logits.flatten(0, 1)
    chosen = rows.topk(top_k).indices
    f = torch.stack([(chosen == i).double().sum(1).mean() for i in range(rows.shape[-1])])
    return alpha * rows.shape[-1] * (f * rows.softmax(-1).mean(0)).sum()


MINIMINDS = {"minimind2-moe": (second_generations, 0.01), "minimind3-moe": (third_generations, 5e-4)}


@pytest.mark.parametrize("kind", MINIMINDS)
def test_auxiliary_loss_of_one_layer_is_minimind_own(kind):
    """1e-6 relative, one text: alpha times its formula is the preset's coefficient, for one layer, times transformers'."""
    theirs, alpha = MINIMINDS[kind]
    top_k = minimind_config(kind).num_experts_per_tok
    net = moe.model(kind, num_hidden_layers=1, router_aux_loss_coef=presets._auxiliary(alpha, 1, top_k))
    ids = torch.randint(3, 64, (1, 40))
    out = net(ids, labels=ids, output_router_logits=True)
    wanted = theirs(out.router_logits[0][None].double(), top_k, alpha).item()
    assert net.router_aux_loss_coef * out.aux_loss.item() == pytest.approx(wanted, rel=1e-6)
    assert abs(wanted / alpha - 1) > 0.01  # it is not balanced, where any formula says 1


@pytest.mark.parametrize("kind", MINIMINDS)
def test_auxiliary_loss_is_as_strong_where_all_is_balanced(kind):
    """1e-6 relative, with the preset's own layers and coefficient: alpha times the layers."""
    theirs, alpha = MINIMINDS[kind]
    config = minimind_config(kind)
    experts, top_k, layers = config.num_experts, config.num_experts_per_tok, config.num_hidden_layers
    # Each expert is first for a quarter of the tokens, second for the next quarter
    rows = torch.stack(
        [torch.eye(experts)[i % experts] + 0.5 * torch.eye(experts)[(i + 1) % experts] for i in range(16)]
    )
    ours = config.router_aux_loss_coef * load_balancing_loss_func((rows,) * layers, experts, top_k)
    summed = sum(theirs(rows[None].double(), top_k, alpha) for _ in range(layers))
    assert ours.item() == pytest.approx(summed.item(), rel=1e-6) == alpha * layers


@pytest.mark.parametrize("normalised", [True, False])
def test_one_expert_with_weight_one_teaches_the_router_nothing(normalised):
    """Why the third generation's preset does not normalise: otherwise the language model's gradient is nought there."""
    net, inputs = moe.model("minimind3-moe", norm_topk_prob=normalised), moe.batch()
    assert minimind_config("minimind3-moe").norm_topk_prob is False
    net(**inputs, labels=inputs["input_ids"]).loss.backward()
    sizes = [weight.grad.abs().max().item() for weight in moe.routers(net).values()]
    assert len(sizes) == 2
    assert max(sizes) <= 1e-7 if normalised else min(sizes) > 1e-3


def test_two_normalised_experts_teach_the_router():
    net, inputs = moe.model("minimind2-moe"), moe.batch()
    net(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(weight.grad.abs().max() > 1e-3 for weight in moe.routers(net).values())


@pytest.mark.parametrize("kind", MINIMINDS)
def test_sft_adds_the_coefficient_times_the_auxiliary_loss(kind, tmp_path):
    """TRL's trainer, padded rows: loss with it less loss without, and so the routers' gradients, 1e-5; it is logged."""
    rows = Dataset.from_list([{"input_ids": list(range(3, 3 + n))} for n in (9, 4, 12, 6)])
    found = {}
    for coefficient in (None, 0.0):
        settings = SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            router_aux_loss_coef=coefficient,
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        net = moe.model(kind, router_aux_loss_coef=0.3)
        fused_lm_head.ensure()
        trainer = SFTTrainer(net, settings, train_dataset=rows, processing_class=tiny.tokenizer())
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(net.train(), dict(batch))
        loss.backward()
        found[coefficient] = loss.item(), {n: p.grad for n, p in moe.routers(net).items()}, trainer._metrics["train"]
    assert (batch["attention_mask"] == 0).any()
    net = moe.model(kind)
    logits = net(batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True).router_logits
    aux = moe.auxiliary(logits, net.config.num_experts_per_tok, batch["attention_mask"])
    aux.backward()
    (loss, grads, metrics), (without, lm_grads, others) = found[None], found[0.0]
    assert loss - without == pytest.approx(0.3 * aux.item(), abs=1e-5)
    assert metrics["aux_loss"] == [pytest.approx(aux.item(), rel=1e-6)] and "aux_loss" not in others
    for name, weight in moe.routers(net).items():
        assert (grads[name] - lm_grads[name] - 0.3 * weight.grad).abs().max() <= 1e-5
        assert (0.3 * weight.grad).abs().max() > 1e-3
