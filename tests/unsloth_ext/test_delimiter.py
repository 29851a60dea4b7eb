"""The automaton against the definition: decode everything, look for the text."""

import pytest
import torch

from tests import tiny
from unsloth_ext import DelimiterMatcher


def reference(tokenizer, ids: torch.Tensor, delimiter: str) -> torch.Tensor:
    out = torch.zeros_like(ids, dtype=torch.bool)
    for b in range(len(ids)):
        for t in range(ids.shape[1]):
            out[b, t] = delimiter in tokenizer.decode(ids[b, : t + 1], skip_special_tokens=True)
    return out


@pytest.mark.parametrize("delimiter", ["####", "#", "1##2", "ab"])
def test_equals_decoding_the_whole_text(delimiter):
    tok = tiny.tokenizer(merges=("##", "1#", "###", "####5", "a#b"))
    matcher = DelimiterMatcher(tok, delimiter)
    hashes = [i for i in range(len(tok)) if set("#12ab") & set(tok.decode([i]))] + [0, 1]
    ids = torch.tensor(hashes)[torch.randint(len(hashes), (200, 12))]
    assert torch.equal(matcher.complete(ids), reference(tok, ids, delimiter))
    assert matcher.complete(ids).any() and not matcher.complete(ids).all()


def test_split_over_tokens_and_inside_one():
    tok = tiny.tokenizer(merges=("##", "7####8"))
    matcher = DelimiterMatcher(tok, "####")
    split = tok.convert_tokens_to_ids(["##", "#", "#", "1"])
    inside = tok.convert_tokens_to_ids(["1", "7####8", "1", "1"])
    assert matcher.complete(torch.tensor([split, inside])).tolist() == [
        [False, False, True, True],
        [False, True, True, True],
    ]


def test_byte_level_bpe_and_a_delimiter_of_several_bytes():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "Ġ#", "##"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "#"), ("#", "#")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=backend)
    matcher = DelimiterMatcher(tok, "####")
    ids = torch.tensor([tok.encode("a ### # ####b", add_special_tokens=False)])
    assert torch.equal(matcher.complete(ids), reference(tok, ids, "####"))
    assert matcher.complete(ids)[0, -1]


@pytest.mark.parametrize("delimiter, message", [("", "empty"), ("§§", "cannot produce")])
def test_impossible_delimiters_are_errors(delimiter, message):
    with pytest.raises(ValueError, match=message):
        DelimiterMatcher(tiny.tokenizer(), delimiter)


def test_ids_beyond_the_tokenizer_change_nothing():
    matcher = DelimiterMatcher(tiny.tokenizer(), "##", vocab_size=64)
    state = torch.tensor([0, 1, 2])
    assert matcher.step(state, torch.tensor([63, 63, 63])).tolist() == [0, 1, 2]
