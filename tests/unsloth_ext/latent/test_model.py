"""Answers: `generate` after the latent phase is manual greedy decoding; saved models come back whole in a fresh process."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from tests import tiny
from tests.processes import fresh
from unsloth_ext import LatentConfig, LatentModel, attach_latent, backbone_of, latent_generate, latent_phase
from unsloth_ext.latent.config import remember_latent, with_latent_modules

from .test_phase import FAMILIES, make, questions


@pytest.mark.parametrize("iterations", [None, 0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_manual_greedy_and_batched_is_alone(family, iterations):
    """Equal tokens: against a loop without cache over embeddings, and against each row by itself."""
    model = make(family, iterations=iterations)
    ids, mask = questions()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out, state = latent_generate(model, ids, mask, return_state=True, **settings)
    prompt = ids.shape[1] + 2 + 5
    assert out.shape == (3, prompt + 8) and state.num_forwards == {None: 6, 0: 1, 3: 4}[iterations]
    backbone = backbone_of(model)
    bot, _, eot = backbone.latent_token_ids
    embed = backbone.get_input_embeddings()
    for row in range(3):
        real = mask[row].bool()
        alone = latent_generate(model, ids[row : row + 1, real], **settings)
        assert torch.equal(alone[0, -8:], out[row, -8:])
        question = torch.cat([ids[row, real], torch.tensor([bot])])
        with torch.no_grad():
            front = torch.cat([embed(question), state.latents[row], embed(torch.tensor([eot]))])[None]
            for token in out[row, prompt:]:
                chosen = model(inputs_embeds=front).logits[0, -1].argmax()
                assert chosen == token
                front = torch.cat([front, embed(chosen)[None, None]], dim=1)


def test_several_sequences_a_question_and_interventions():
    model = make()
    ids, mask = questions()
    settings = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(0)
    out = latent_generate(model, ids, mask, num_return_sequences=4, do_sample=True, **settings)
    assert out.shape[0] == 12 and len({tuple(row.tolist()) for row in out[:4]}) > 1
    assert torch.equal(out[::4, : ids.shape[1]], ids)
    plain = latent_generate(
        model, ids, mask, do_sample=False, output_logits=True, return_dict_in_generate=True, **settings
    )
    zero = latent_generate(
        model,
        ids,
        mask,
        intervene=torch.zeros_like,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    assert (plain.logits[0] - zero.logits[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="num_beams"):
        latent_generate(model, ids, mask, num_beams=2, **settings)


def test_a_text_is_what_stands_behind_the_latents(monkeypatch):
    """One latent token, so that a place too far to the left would show a token of the question."""
    tokenizer = tiny.tokenizer(())
    net = attach_latent(tiny.model(), tokenizer, LatentConfig(1, None, projection_dim=16))
    answer, phase = tokenizer("42<eos>")["input_ids"], list(backbone_of(net).latent_token_ids)
    monkeypatch.setattr(
        "unsloth_ext.latent.model.latent_generate",
        lambda _, input_ids, **__: torch.cat([input_ids, torch.tensor([phase + answer])], dim=1),
    )
    assert LatentModel(net, tokenizer).generate("1+2=") == "42"


SCRIPT = """
import sys, torch
from unsloth_ext import LatentModel
loaded = LatentModel.from_pretrained(sys.argv[1])
print(*loaded.generate(["1+2+3=", "7-4="], max_new_tokens=6, do_sample=False), sep="|")
"""


@pytest.mark.parametrize("peft", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_saved_model_says_the_same_in_a_fresh_process(tmp_path, family, peft):
    base, tokenizer = tiny.model(family, std=0.1), tiny.tokenizer(())
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    attach_latent(base, tokenizer, LatentConfig(4, 2, projection_dim=16))
    model = base
    if peft:
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        vars(lora).update(with_latent_modules(lora, base))
        model = get_peft_model(base, lora)
        remember_latent(model)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    ours = LatentModel(model, tokenizer)
    ours.save_pretrained(tmp_path / "saved")
    assert not {f.suffix for f in (tmp_path / "saved").iterdir()} & {".bin", ".pt", ".pkl"}
    wanted = ours.generate(["1+2+3=", "7-4="], max_new_tokens=6, do_sample=False)
    done = fresh("-c", SCRIPT, tmp_path / "saved")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "UNEXPECTED" not in done.stdout + done.stderr
    assert done.stdout.strip("\n").split("\n")[-1] == "|".join(wanted)


def test_a_folder_that_never_had_latent_tokens_says_so(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no settings of the method latent"):
        LatentModel.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="has no latent tokens"):
        LatentModel(tiny.model(), tiny.tokenizer())


def test_the_phase_alone_leaves_the_model_as_it_was():
    model = make().train()
    latent_generate(model, *questions(), max_new_tokens=1, pad_token_id=0)
    assert model.training
    assert latent_phase(model, *questions()).latents.requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_had_to_grow_come_back_with_the_adapter(tmp_path, tied):
    """The base on disk has no rows for the latent tokens; logits equal exactly after loading. Tied, the adapter's own rows
    are all that is saved of the matrix."""
    tokenizer = tiny.tokenizer(())
    config = tiny.config("qwen3", vocab_size=len(tokenizer))
    config.tie_word_embeddings = tied
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    attach_latent(base, tokenizer, LatentConfig(3, 2, projection_dim=16))
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    vars(lora).update(with_latent_modules(lora, base))
    model = get_peft_model(base, lora).eval()
    remember_latent(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    LatentModel(model, tokenizer).save_pretrained(tmp_path / "saved")
    loaded = LatentModel.from_pretrained(str(tmp_path / "saved")).model
    loaded.save_pretrained(tmp_path / "again")
    for folder in ("saved", "again"):
        names = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert any(name.endswith("base_layer.weight") and "token_adapter" in name for name in names) != tied
    ids = torch.tensor([[*range(3, 20), *backbone_of(model).latent_token_ids]])
    assert ids.max() >= config.vocab_size - 3
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_one_question_or_none():
    loaded = LatentModel(make(), tiny.tokenizer(()))
    texts = loaded.generate(["1+2=", "3+4="], max_new_tokens=3, do_sample=False)
    assert [loaded.generate(q, max_new_tokens=3, do_sample=False) for q in ("1+2=", "3+4=")] == texts
    assert loaded.generate([]) == []


def test_settings_inside_a_generation_config_count():
    model = make()
    ids, mask = questions()
    with pytest.raises(ValueError, match="num_beams"):
        latent_generate(model, ids, mask, generation_config=GenerationConfig(num_beams=2, max_new_tokens=2))
    out = latent_generate(
        model,
        ids,
        mask,
        generation_config=GenerationConfig(num_return_sequences=2, do_sample=True, max_new_tokens=2, pad_token_id=0),
    )
    assert len(out) == 2 * len(ids)
