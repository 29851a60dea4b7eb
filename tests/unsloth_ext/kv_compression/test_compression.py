"""Scores and choices against the official R-KV code and brute-force KaVa (golden tensors), and their invariants."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.golden.load import GOLDEN, load
from unsloth_ext.kv_compression.compression import SCORERS, KVScoring, compress_kv
from unsloth_ext.kv_compression.scores import (
    kava_importance,
    kava_redundancy,
    normalized,
    rkv_importance,
    rkv_redundancy,
)


RKV = sorted(file.stem for file in GOLDEN.glob("rkv_*.safetensors"))


def rkv_case(name):
    case, config = load(name)
    scoring = KVScoring(
        "rkv", config["mix_lambda"], "none", config["W"], config["kernel_size"], config["retain_direction"]
    )
    return case, config["budget"], scoring


@pytest.mark.parametrize("name", RKV)
def test_rkv_is_the_official_code(name):
    """The same keys, bit for bit. Scores to 1e-6 relative: the golden ones were made on another processor, whose matrix
    products round otherwise."""
    case, budget, scoring = rkv_case(name)
    q, k, v = case["q"], case["k"], case["v"]
    real = torch.ones(len(k), k.shape[2], dtype=torch.bool)
    if "score" in case:
        importance = rkv_importance(
            q, k, real, torch.ones(q.shape[0], q.shape[2], dtype=torch.bool), scoring.window, scoring.kernel_size
        )
        redundancy = rkv_redundancy(k, real, retain=scoring.retain)
        torch.testing.assert_close(importance, case["importance_pooled"], rtol=1e-6, atol=0)
        torch.testing.assert_close(redundancy, case["redundancy"], rtol=1e-6, atol=0)
    ours = compress_kv(k, v, q, budget, scoring)
    # The official code returns them by score with the window last, ours by position
    length = k.shape[2]
    if "indices" in case:
        window = torch.arange(length - scoring.window, length).expand(*k.shape[:2], -1)
        wanted = torch.cat([case["indices"], window], dim=-1)
        order = wanted.argsort(-1)
    else:
        wanted = torch.arange(length).expand(*k.shape[:2], -1)
        order = wanted
    kept = wanted.shape[-1]
    assert ours.valid.sum(-1).tolist() == [kept] * len(k)
    assert torch.equal(ours.indices[..., :kept], wanted.gather(-1, order))
    order = order[..., None].expand(*order.shape, k.shape[-1])
    assert torch.equal(ours.keys[:, :, :kept], case["k_out"].gather(2, order))
    assert torch.equal(ours.values[:, :, :kept], case["v_out"].gather(2, order))


def rkv_positions(queries, keys, budget, mix, window=8):
    """What R-KV's code at d15c976 keeps of one sample, (Hkv, budget): its operations in its order and dtype."""
    heads, kv_heads, length, dim = queries.shape[1], keys.shape[1], keys.shape[2], keys.shape[3]
    grouped = queries[:, :, -window:].view(1, kv_heads, heads // kv_heads, window, dim)
    logits = (grouped @ keys.unsqueeze(2).transpose(3, 4) / dim**0.5).amax(2)
    attention = logits[..., :-window].softmax(-1, dtype=torch.float32).mean(-2).to(queries.dtype)
    importance = F.max_pool1d(attention, 7, stride=1, padding=3)
    unit = keys[0] / (keys[0].norm(dim=-1, keepdim=True) + 1e-8)
    cosine = unit @ unit.transpose(-1, -2)
    for head in range(kv_heads):
        cosine[head].fill_diagonal_(0)
        for row in range(length):
            similar = (cosine[head, row] > 0.5).nonzero().flatten().tolist()
            cosine[head, row, similar[-1] if similar else 0] = 0
    redundancy = cosine.mean(1).softmax(-1)[:, :-window]
    best = (importance[0] * mix - redundancy * (1 - mix)).topk(budget - window, dim=-1).indices
    recent = torch.arange(length - window, length).expand(kv_heads, -1)
    return torch.cat([best, recent], dim=-1).sort(-1).values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("queries", [8, 13])
def test_rkv_chooses_as_the_official_code_where_scores_tie(mix, dtype, queries):
    """Pooling makes plateaus (all of the score at mix 1); of more queries than the window the last count. Rows of several
    lengths in one batch, each against itself alone. Exact."""
    lengths, width = (40, 33, 40, 25), 47
    torch.manual_seed(5)
    keys, values = torch.randn(2, 4, 2, width, 8).to(dtype)
    asking = torch.randn(4, 4, queries + 3, 8).to(dtype)
    real, asked = torch.zeros(4, width, dtype=torch.bool), torch.zeros(4, queries + 3, dtype=torch.bool)
    asked[:, :queries] = True
    for row, length in enumerate(lengths):
        real[row, row : row + length] = True
        keys[row, :, row + 3 : row + 9] = keys[row, :, row + 2 : row + 3]  # exact copies
    found = compress_kv(keys, values, asking, 20, KVScoring("rkv", mix), key_mask=real, query_mask=asked)
    for row, length in enumerate(lengths):
        alone = slice(row, row + 1)
        wanted = rkv_positions(asking[alone, :, :queries], keys[alone, :, row : row + length], 20, mix)
        assert torch.equal(found.indices[row], wanted + row)


@pytest.mark.parametrize("mix", [0.0, 0.1, 1.0])
def test_kava_scores_and_choices(mix):
    """Against brute force, ragged and short rows: scores to 1e-6, choices equal."""
    case = load_file(GOLDEN / "kava_scores.safetensors")
    real, asked = case["cot_mask"].bool(), case["ans_mask"].bool()
    score = mix * kava_importance(case["q"], case["k"], real, asked) + (1 - mix) * kava_redundancy(case["k"], real)
    where = real[:, None].expand_as(score)
    assert (score - case[f"score_{mix}"])[where].abs().max() <= 1e-6
    assert (score[~where] == 0).all()
    ours = compress_kv(case["k"], case["v"], case["q"], 12, KVScoring("kava", mix), key_mask=real, query_mask=asked)
    assert torch.equal(ours.indices, case[f"idx_{mix}"])


def a_trace(batch=3, heads=4, kv_heads=2, length=40, queries=6, dim=8):
    torch.manual_seed(3)
    keys, values = torch.randn(2, batch, kv_heads, length, dim)
    keys[:, :, 10:14] = keys[:, :, 9:10]  # something redundant
    return keys, values, torch.randn(batch, heads, queries, dim)


@pytest.mark.parametrize("nonsense", [1e4, torch.nan, torch.inf])
@pytest.mark.parametrize("scorer", SCORERS)
def test_pads_change_nothing_wherever_they_stand(scorer, nonsense):
    """A row with pads on its left, right and inside, holding nonsense, chooses what the row alone does (fp32, exact)."""
    keys, values, queries = a_trace(batch=1)
    scoring = KVScoring(scorer)
    alone = compress_kv(keys, values, queries, 16, scoring)
    real = torch.ones(3, 60, dtype=torch.bool)
    real[0, 40:] = False
    real[1, :20] = False
    real[2, 10:30] = False
    wide_k, wide_v = torch.full((2, 3, 2, 60, 8), nonsense)
    for row in range(3):
        wide_k[row, :, real[row]], wide_v[row, :, real[row]] = keys[0], values[0]
    asked = torch.ones(3, 9, dtype=torch.bool)
    asked[:, 6:] = False
    wide_q = torch.cat([queries.expand(3, -1, -1, -1), torch.full((3, 4, 3, 8), -nonsense)], dim=2)
    ours = compress_kv(wide_k, wide_v, wide_q, 16, scoring, key_mask=real, query_mask=asked)
    assert ours.valid.all()
    if scorer == "random":  # the draw depends on the shape; what is drawn must be real
        assert real[:, None].expand(-1, 2, -1).gather(-1, ours.indices).all()
        return
    for row in range(3):
        assert torch.equal(ours.keys[row], alone.keys[0]) and torch.equal(ours.values[row], alone.values[0])
        assert torch.equal(real[row].nonzero().squeeze(1)[alone.indices[0]], ours.indices[row])


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("length", [0, 1, 5, 12, 13])
def test_short_traces_are_kept_whole(scorer, length):
    keys, values, queries = a_trace(length=40)
    keys, values = keys[:, :, :length], values[:, :, :length]
    kept = compress_kv(keys, values, queries, 12, KVScoring(scorer))
    count = min(length, 12)
    assert kept.keys.shape == (3, 2, 12, 8)
    assert kept.valid.sum(-1).tolist() == [count] * 3 and kept.valid[:, :count].all()
    assert (kept.keys[:, :, count:] == 0).all() and (kept.indices[:, :, count:] == -1).all()
    if length <= 12:
        assert torch.equal(kept.keys[:, :, :length], keys) and torch.equal(kept.values[:, :, :length], values)


def test_controls_choose_what_they_are_called():
    keys, values, queries = a_trace(length=40)

    def chosen(scorer, budget=10, **options):
        return compress_kv(keys, values, queries, budget, KVScoring(scorer, **options)).indices

    assert (chosen("crop") == torch.arange(10)).all()
    gaps = chosen("uniform").diff(dim=-1)
    assert gaps.min() == gaps.max() == 4
    assert (chosen("uniform", budget=7).diff(dim=-1).unique() == torch.tensor([5, 6])).all()
    assert torch.equal(chosen("random", seed=1), chosen("random", seed=1))
    assert not torch.equal(chosen("random", seed=1), chosen("random", seed=2))
    assert torch.equal(chosen("attention_only"), chosen("kava", mix_lambda=1.0))
    assert torch.equal(chosen("cosine_only"), chosen("kava", mix_lambda=0.0))
    copies = (chosen("cosine_only") >= 9) & (chosen("cosine_only") <= 13)
    assert copies.sum() == 0, "five equal keys are the most redundant of all"


def test_redundancy_needs_no_square_matrix_to_equal_it():
    """fp64, 1e-12."""
    keys = a_trace()[0].double()
    real = torch.ones(3, 40, dtype=torch.bool)
    real[1, 30:] = False
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    cosine = unit @ unit.transpose(-1, -2)
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    cosine = cosine.masked_fill(~real[:, None, None], 0).sum(-1) / real.sum(-1)[:, None, None]
    wanted = (-cosine).masked_fill(~real[:, None], -torch.inf).softmax(-1)
    assert (kava_redundancy(keys, real) - wanted).abs().max() <= 1e-7  # softmax and sums are fp32


def test_score_norms():
    real = torch.tensor([[True, True, False, True]])
    scores = torch.tensor([[[1.0, 5.0, 99.0, 3.0]]])
    assert normalized(scores, real, "rank")[0, 0, [0, 1, 3]].tolist() == [0.0, 1.0, 0.5]
    scaled = normalized(scores, real, "zscore")[0, 0, [0, 1, 3]]
    assert scaled.mean().abs() <= 1e-6 and (scaled.std(correction=0) - 1).abs() <= 1e-6
    assert normalized(scores, real, "none") is scores


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: KVScoring("snapkv"), "scorer='snapkv'"),
        (lambda: KVScoring(mix_lambda=1.5), "mix_lambda=1.5"),
        (lambda: KVScoring(score_norm="l2"), "score_norm='l2'"),
        (lambda: KVScoring(kernel_size=4), "kernel_size=4"),
        (lambda: KVScoring(window=0), "window=0"),
        (lambda: compress_kv(*a_trace(), 8, KVScoring("rkv")), "budget=8: must be at least 9"),
        (lambda: compress_kv(*a_trace(), 0), "budget=0"),
        (lambda: compress_kv(*a_trace(heads=3), 8), "3 query heads"),
    ],
)
def test_bad_settings_are_named(make, message):
    assert KVScoring(window=1).window == 1
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
