"""`generate` is the parallel forward's greedy loop; saved models come back whole in a fresh process."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.processes import fresh
from unsloth_ext import ConceptModel, OnlineConceptConfig, attach_concepts, backbone_of, with_concept_modules

from .test_decoding import undecided
from .test_forward import FAMILIES, V, model


def prompts():
    ids = torch.randint(3, 48, (3, 9), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :8] = 0, 0
    return ids * mask, mask


PLAIN = {"pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_the_parallel_forwards_greedy_loop(family):
    """Equal tokens, ragged prompts, concepts by the gate; and beams of one more than greedy, scores to 1e-8."""
    net = model(family, gate="factorised", max_tail=6)
    ids, mask = prompts()
    undecided(net, ids)
    out = net.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **PLAIN)
    made = 0
    for row in range(3):
        text = ids[row][mask[row].bool()]
        for token in out[row, 9:]:
            found = backbone_of(net)(text[None], use_cache=False)
            assert net.lm_head(found.last_hidden_state)[0, -1].argmax() == token
            text = torch.cat([text, token[None]])
        made += found.choice.concept.sum()
    assert 5 < made < 50
    beams = net.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        num_beams=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=0.0,
        **PLAIN,
    )
    for row in range(3):
        text = torch.cat([ids[row][mask[row].bool()], beams.sequences[row, 9:]])
        logs = net.lm_head(backbone_of(net)(text[None], use_cache=False).last_hidden_state)[0].float().log_softmax(-1)
        wanted = logs[-7:-1].gather(1, beams.sequences[row, 9:, None]).sum()
        assert (beams.sequences_scores[row] - wanted).abs() <= 1e-4  # generate keeps its scores in fp32


def test_a_conversation_goes_on_from_its_cache():
    """Equal tokens: the second turn on the first one's cache, whose last token it has not seen, and all read anew."""
    net = model("qwen3", gate="factorised", max_tail=6)
    ids = torch.randint(3, 48, (3, 9), generator=torch.Generator().manual_seed(7))
    undecided(net, ids)
    first = net.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, **PLAIN)
    assert first.past_key_values.seen == 13
    asked = torch.cat([first.sequences, ids[:, :6]], dim=1)
    kept = net.generate(asked, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False, **PLAIN)
    assert kept.equal(net.generate(asked, max_new_tokens=5, do_sample=False, **PLAIN))


def test_sampled_sequences_and_what_generate_cannot():
    net = model("qwen3")
    ids, mask = prompts()
    torch.manual_seed(0)
    out = net.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=4, max_new_tokens=6, **PLAIN)
    assert out.shape == (12, 15) and len({tuple(row.tolist()) for row in out[:4]}) > 1
    with pytest.raises(ValueError, match=r"(?i)assisted decoding"):
        net.generate(ids[:1], prompt_lookup_num_tokens=2, max_new_tokens=6, do_sample=False, **PLAIN)
    with pytest.raises(ValueError, match="cannot hold concepts"):
        plain = tiny.model("qwen3")
        net(ids, past_key_values=plain(ids, use_cache=True).past_key_values)
    with pytest.raises(ValueError, match="exactly one"):
        net()
    with pytest.raises(ValueError, match="attention_mask"):
        net(ids, attention_mask=torch.ones(3, 1, 9, 9))


def saved(folder, peft=True, **settings):
    """A `ConceptModel` with weights of its own, in `folder / "saved"`."""
    torch.manual_seed(0)
    config = tiny.config("qwen3")
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": 4, "layer_types": None})
    base, tokenizer = AutoModelForCausalLM.from_config(config), tiny.tokenizer(())
    base.save_pretrained(folder / "base")
    base.name_or_path = base.config._name_or_path = str(folder / "base")
    settings = {"num_concepts": V, "gate": "factorised", "max_tail": 4, **settings}
    net = attach_concepts(base, OnlineConceptConfig(1, 2, 1, **settings))
    if peft:
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        vars(lora).update(with_concept_modules(lora))
        net = get_peft_model(base, lora)
        assert not any("concept" in name and "lora" in name for name, _ in net.named_parameters())
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    ours = ConceptModel(net.eval(), tokenizer)
    ours.save_pretrained(folder / "saved")
    return ours


SCRIPT = """
import sys
from unsloth_ext import ConceptModel
loaded = ConceptModel.from_pretrained(sys.argv[1])
print(*loaded.generate(["1+2+3=", "7-4="], max_new_tokens=9, do_sample=False), sep="|")
print(loaded.segments("11+22+33=66;9"), loaded.config)
"""


@pytest.mark.parametrize(
    "peft, settings",
    [(False, {}), (True, {"segmenter": "autoregressive", "num_codebooks": 2, "boundary_keeps_token": True})],
)
def test_a_saved_model_says_the_same_in_a_fresh_process(tmp_path, peft, settings):
    ours = saved(tmp_path, peft, **settings)
    assert not {f.suffix for f in (tmp_path / "saved").iterdir()} & {".bin", ".pt", ".pkl"}
    wanted = ours.generate(["1+2+3=", "7-4="], max_new_tokens=9, do_sample=False)
    pieces = ours.segments("11+22+33=66;9")
    assert "".join(piece for piece, _ in pieces) == "11+22+33=66;9" and len(pieces) > 2
    assert all(len(codes) == settings.get("num_codebooks", 1) for _, codes in pieces[:-1])
    done = fresh("-c", SCRIPT, tmp_path / "saved")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "UNEXPECTED" not in done.stdout + done.stderr and "Unexpected" not in done.stderr
    assert done.stdout.strip("\n").split("\n")[-2:] == ["|".join(wanted), f"{pieces} {ours.config}"]


def test_a_text_is_without_special_tokens(tmp_path, monkeypatch):
    ours = saved(tmp_path, peft=False)
    answer = torch.tensor([ours.tokenizer("42<eos>")["input_ids"]])
    monkeypatch.setattr(ours.model, "generate", lambda input_ids, **_: torch.cat([input_ids, answer], dim=1))
    assert ours.generate(["1+2="]) == ["42"]


def test_one_text_or_none():
    net, tokenizer = model("qwen3"), tiny.tokenizer(())
    ours = ConceptModel(net, tokenizer)
    assert ours.generate([]) == []
    text = ours.generate("1+2=", max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert isinstance(text, str) and [text] == ours.generate(
        ["1+2="], max_new_tokens=4, do_sample=False, eos_token_id=None
    )


def test_adapters_off_or_merged():
    """A merged adapter says what it did; turned off, the concepts are those it began with."""
    net = model("qwen3")
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    vars(lora).update(with_concept_modules(lora))
    ids, mask = prompts()
    before = net(ids, attention_mask=mask).logits
    net = get_peft_model(net, lora).eval()
    with net.disable_adapter():
        assert (net(ids, attention_mask=mask).logits - before).abs().max() <= 1e-10
    with_adapter = net(ids, attention_mask=mask).logits
    assert (with_adapter - before).abs().max() > 1e-3
    assert (net.merge_and_unload()(ids, attention_mask=mask).logits - with_adapter).abs().max() <= 1e-8


A, S, M = "adapter_model.safetensors", "latent_reasoning.json", "model.safetensors"


def edit_json(file, change):
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def lose(part):
    return lambda tensors: tensors.pop(next(name for name in tensors if part in name))


WRONG = {
    "head": (
        True,
        "adapter_model.safetensors lacks .*concept_head",
        lambda f: edit_tensors(f / A, lose("concept_head")),
    ),
    "settings": (True, "holds .*concept_.* but no latent_reasoning.json", lambda f: (f / S).unlink()),
    "unknown": (
        True,
        "settings are not those.*speed",
        lambda f: edit_json(f / S, lambda c: c["settings"].update(speed=1)),
    ),
    "value": (True, "n_middle=0", lambda f: edit_json(f / S, lambda c: c["settings"].update(n_middle=0))),
    "layers": (
        True,
        "together 5, the model has 4",
        lambda f: edit_json(f / S, lambda c: c["settings"].update(n_deep=2)),
    ),
    "embedding": (False, "lacks concept_embedding", lambda f: edit_tensors(f / M, lose("concept_embedding"))),
    "tokenizer": (False, "no tokenizer_config.json", lambda f: (f / "tokenizer_config.json").unlink()),
    "nan": (
        False,
        "NaN",
        lambda f: edit_tensors(f / M, lambda t: next(iter(t.values())).view(-1)[:1].fill_(torch.nan)),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_damaged_folders_say_what_is_wrong(tmp_path, case):
    peft, message, damage = WRONG[case]
    saved(tmp_path, peft)
    damage(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        ConceptModel.from_pretrained(str(tmp_path / "saved"))


def test_a_model_without_concepts_says_so():
    with pytest.raises(ValueError, match="has no concepts"):
        ConceptModel(tiny.model(), tiny.tokenizer())
