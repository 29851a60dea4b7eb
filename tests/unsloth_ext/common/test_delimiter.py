"""The automaton against the definition: decode everything, look for the text."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests import tiny
from unsloth_ext import DelimiterMatcher


def reference(tokenizer, ids: torch.Tensor, delimiter: str) -> torch.Tensor:
    out = torch.zeros_like(ids, dtype=torch.bool)
    for b in range(len(ids)):
        for t in range(ids.shape[1]):
            out[b, t] = delimiter in tokenizer.decode(ids[b, : t + 1], skip_special_tokens=True)
    return out


@pytest.mark.parametrize("delimiter", ["####", "#", "1##2", "ab", "aabaaaa", "abaab"])
def test_equals_decoding_the_whole_text(delimiter):
    """Delimiters that overlap themselves in more than one way, too."""
    tok = tiny.tokenizer(merges=("##", "1#", "###", "####5", "a#b", "aab", "aaaa", "aabaa", "ba"))
    matcher = DelimiterMatcher(tok, delimiter)
    hashes = [i for i in range(len(tok)) if set("#12ab") & set(tok.decode([i]))] + [0, 1]
    if not set("#12") & set(delimiter):  # few letters, or such a delimiter would never come
        hashes = tok.convert_tokens_to_ids(["a", "b", "aab", "ba", "aaaa", "aabaa"])
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
    from tokenizers import decoders, models, pre_tokenizers

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


@pytest.mark.parametrize(
    "delimiter, message",
    [("", "delimiter='': give the text"), (5, "delimiter=5: give the text"), ("§§", "cannot produce")],
)
def test_impossible_delimiters_are_errors(delimiter, message):
    with pytest.raises(ValueError, match=message):
        DelimiterMatcher(tiny.tokenizer(), delimiter)


def test_ids_beyond_the_tokenizer_change_nothing():
    matcher = DelimiterMatcher(tiny.tokenizer(), "##", vocab_size=64)
    state = torch.tensor([0, 1, 2])
    assert matcher.step(state, torch.tensor([63, 63, 63])).tolist() == [0, 1, 2]


def test_ids_behind_the_tokenizer_need_no_vocabulary_size():
    """Qwen2.5 has 151,936 rows and 151,665 tokens: rows without a token add no text, wherever they stand."""
    tok = tiny.tokenizer()
    matcher = DelimiterMatcher(tok, "##")
    assert matcher.step(torch.tensor([0, 1, 2]), torch.tensor([len(tok), 10**6, len(tok) + 7])).tolist() == [0, 1, 2]
    one = tok.convert_tokens_to_ids("#")
    ids = torch.tensor([[one, len(tok) + 20, one, 5]])
    assert matcher.complete(ids).tolist() == [[False, False, True, True]]


def test_a_tokenizer_that_leaves_ids_out():
    """Tokens may stand behind as many ids as there are tokens; ids without one add no text."""
    tok = tiny.tokenizer()
    backend = json.loads(tok.backend_tokenizer.to_str())
    backend["model"]["vocab"]["#"] = 200
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **tok.special_tokens_map)
    assert len(tok) < 200
    matcher = DelimiterMatcher(tok, "#+#")
    ids = torch.tensor([[*tok.encode("1#+"), 150, 200, 5]])
    assert matcher.complete(ids).tolist() == [[False, False, False, False, True, True]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ids_behind_the_tokenizer_on_a_gpu_without_synchronisation():
    matcher = DelimiterMatcher(tiny.tokenizer(), "##")
    state, tokens = torch.tensor([0, 1], device="cuda"), torch.tensor([10**6, 5], device="cuda")
    matcher.step(state, tokens)  # copies the table
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = matcher.step(state, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.tolist() == [0, 0]


def byte_level(merges=()):
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("delimiter", ["答案", "🧮", "é#"])
def test_a_delimiter_whose_characters_are_split_over_byte_tokens(delimiter):
    tok = byte_level()
    matcher = DelimiterMatcher(tok, delimiter)
    assert matcher.done == len(delimiter.encode())
    ids = torch.tensor([tok.encode(f"a答é# {delimiter[0]}{delimiter} b", add_special_tokens=False)])
    assert torch.equal(matcher.complete(ids), reference(tok, ids, delimiter)) and matcher.complete(ids)[0, -1]


def test_a_delimiter_of_byte_tokens_of_sentencepiece():
    from tokenizers import decoders, models

    vocab = {"<unk>": 0, "a": 1, "#": 2, **{f"<0x{i:02X}>": i + 3 for i in range(256)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    matcher = DelimiterMatcher(tok, "答#")
    ids = torch.tensor([tok.encode("a答答#a", add_special_tokens=False)])
    assert torch.equal(matcher.complete(ids), reference(tok, ids, "答#")) and matcher.complete(ids)[0, -1]


def test_a_delimiter_of_special_tokens_is_told_why():
    with pytest.raises(ValueError, match="it contains the special tokens <eos>, and answers are decoded without these"):
        DelimiterMatcher(tiny.tokenizer(), "<eos>")
