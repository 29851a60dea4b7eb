"""Tags are one token each, have embeddings, and are trained under PEFT."""

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, get_peft_model

from tests import tiny
from trl_ext.distill.config import TAGS
from trl_ext.distill.tags import add_tags, check_tags_are_trained, give_embeddings

from . import setups


def test_pieces_become_tokens_wherever_they_stand():
    """`<think>` is seven tokens before and one after, in any text; "<" stays what it was; a second time adds nothing."""
    tokenizer = tiny.tokenizer(setups.PIECES)
    size, piece = len(tokenizer), tokenizer.convert_tokens_to_ids("<")
    before = tokenizer("a<b", add_special_tokens=False).input_ids
    assert len(tokenizer("<think>", add_special_tokens=False).input_ids) == 7
    ids, added = add_tags(tokenizer, list(TAGS))
    assert ids == added == list(range(size, size + 4))
    assert tokenizer("<think>a</think>", add_special_tokens=False).input_ids[::2] == ids[:2]
    assert tokenizer("1<answer>a", add_special_tokens=False).input_ids[1] == ids[2]
    assert tokenizer("a<b", add_special_tokens=False).input_ids == before and piece in before
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "".join(TAGS)
    assert add_tags(tokenizer, list(TAGS)) == (ids, []) and len(tokenizer) == size + 4


def test_a_tag_of_the_vocabulary_that_texts_split_keeps_its_id():
    """An entry that no text is ever tokenized to, as BPE may have one."""
    tokenizer = tiny.tokenizer((*setups.PIECES, "<think>"))
    size, index = len(tokenizer), tokenizer.convert_tokens_to_ids("<think>")
    assert index not in tokenizer("<think>").input_ids
    ids, added = add_tags(tokenizer, list(TAGS))
    assert ids[0] == index and index in tokenizer("a<think>").input_ids
    assert added == ids[1:] == [size, size + 1, size + 2]


@pytest.mark.parametrize("rows", [50, 52, 64])
@pytest.mark.parametrize("tie", [True, False])
def test_embeddings_grow_to_the_tokenizer_and_never_shrink(rows, tie):
    """Old rows are kept to the bit, new ones are the same each time and leave the generator alone."""
    made = []
    for _ in range(2):
        tokenizer, model = tiny.tokenizer(setups.PIECES), setups.student(vocab_size=rows, tie_word_embeddings=tie)
        before = model.get_input_embeddings().weight.detach().clone()
        torch.manual_seed(len(made))
        state = torch.get_rng_state()
        give_embeddings(model, tokenizer, *add_tags(tokenizer, list(TAGS)), None, 3)
        assert torch.equal(torch.get_rng_state(), state)
        made.append(model.get_input_embeddings().weight.detach())
    assert len(made[0]) == model.get_output_embeddings().weight.shape[0] == model.config.vocab_size == max(rows, 54)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0][:rows], before)


def test_what_a_peft_config_is_given():
    """Rows of the embedding, of an untied head too, beside those that it trains already; nothing where all is trained."""

    def given(tie=True, added=(52, 53), **fields):
        tokenizer, model = tiny.tokenizer(setups.PIECES), setups.student(tie_word_embeddings=tie)
        ids, _ = add_tags(tokenizer, list(TAGS))
        lora = LoraConfig(**{**setups.LORA, **fields})
        give_embeddings(model, tokenizer, ids, list(added), lora, 0)
        return lora.trainable_token_indices

    assert given() == {"embed_tokens": [52, 53]}
    assert given(tie=False) == {"embed_tokens": [52, 53], "lm_head": [52, 53]}
    assert given(trainable_token_indices=[7, 52]) == {"embed_tokens": [7, 52, 53]}
    assert given(trainable_token_indices={"lm_head": [7]}) == {"lm_head": [7], "embed_tokens": [52, 53]}
    assert given(tie=False, modules_to_save=["embed_tokens", "lm_head"]) is None
    assert given(tie=False, modules_to_save=["model.embed_tokens"]) == {"lm_head": [52, 53]}
    assert given(added=()) is None
    for tie, fields, how in (
        (True, {"modules_to_save": ["lm_head"]}, "'lm_head' would be trained as a whole"),
        (False, {"target_modules": ["embed_tokens"]}, "'embed_tokens' would be given an adapter"),
        (False, {"target_modules": ["lm_head"]}, "'lm_head' would be given an adapter"),
    ):
        with pytest.raises(ValueError, match=f"{how}, but the new tokens' rows"):
            given(tie, **fields)


def test_new_tokens_that_peft_would_leave_untrained_are_named():
    tokenizer, model = tiny.tokenizer(setups.PIECES), setups.student()
    ids, added = add_tags(tokenizer, list(TAGS))
    with pytest.raises(ValueError, match="IA3Config would leave the embeddings of the new tokens <think>, </think>"):
        give_embeddings(model, tokenizer, ids, added, IA3Config(task_type="CAUSAL_LM"), 0)
    wrapped = get_peft_model(model, LoraConfig(**setups.LORA))
    with pytest.raises(ValueError, match="<think>, </think>, <answer>, </answer> are new, but PEFT has wrapped"):
        give_embeddings(wrapped, tokenizer, ids, added, None, 0)
    give_embeddings(wrapped, tokenizer, ids, [], None, 0)


def test_rows_without_a_trained_tag_are_named():
    """One tag among the labels is enough; the first token is no target."""
    rows = [{"input_ids": [50, 3, 51], "labels": [50, 3, -100]}, {"input_ids": [3, 51], "labels": [3, 51]}]
    check_tags_are_trained(Dataset.from_list(rows), [50, 51], ["<a>", "<b>"])
    with pytest.raises(ValueError, match="none of <a>, <b> is a trained token"):
        check_tags_are_trained(Dataset.from_list(rows[:1]), [50, 51], ["<a>", "<b>"])
