"""Head and width projections against plain loops."""

import pytest
import torch

from unsloth_ext import HeadwiseMapProjector, KVDimensionProjector


COUNTS = [(28, 12), (2, 8), (8, 2), (3, 3), (12, 28), (5, 4), (1, 7)]


@pytest.mark.parametrize("into,out", COUNTS)
def test_uniform_rows_sum_to_one_and_columns_share_alike(into, out):
    """1e-6."""
    head_map = HeadwiseMapProjector(into, out, 4, 4).head_map
    assert (head_map.sum(1) - 1).abs().max() <= 1e-6
    assert (head_map.sum(0) - out / into).abs().max() <= 1e-6
    assert (head_map >= 0).all()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("init", ["uniform", "uniform_rms", "identity", "random"])
@pytest.mark.parametrize("heads,widths", [((4, 2), (8, 6)), ((2, 3), (4, 8)), ((3, 3), (5, 5))])
def test_forward_is_a_loop_over_heads(heads, widths, init, share):
    """1e-5."""
    torch.manual_seed(0)
    projector = HeadwiseMapProjector(*heads, *widths, share_dim_proj=share, init=init)
    with torch.no_grad():
        projector.dim_map += torch.randn_like(projector.dim_map)
    x = torch.randn(2, 3, heads[0], 7, widths[0])
    out = projector(x)
    assert out.shape == (2, 3, heads[1], 7, widths[1])
    for s in range(heads[1]):
        width = projector.dim_map if share else projector.dim_map[s]
        mixed = sum(projector.head_map[s, t] * x[:, :, t] for t in range(heads[0]))
        torch.testing.assert_close(out[:, :, s], mixed @ width.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["uniform", "uniform_rms", "identity"])
@pytest.mark.parametrize("share", [True, False])
def test_equal_shapes_are_left_as_they_are(init, share):
    """1e-6."""
    x = torch.randn(2, 2, 4, 5, 8)
    assert (HeadwiseMapProjector(4, 4, 8, 8, share, init=init)(x) - x).abs().max() <= 1e-6


def test_averaging_heads_shrinks_them_and_rms_does_not():
    """Of 16 independent heads into 4: half the standard deviation, or all of it; within 2%."""
    x = torch.randn(4, 4, 16, 64, 16, generator=torch.Generator().manual_seed(0))
    assert abs(HeadwiseMapProjector(16, 4, 16, 16)(x).std() - 0.5) <= 0.02
    assert abs(HeadwiseMapProjector(16, 4, 16, 16, init="uniform_rms")(x).std() - 1) <= 0.02


def test_a_narrower_head_keeps_whole_pairs_of_rotary_embedding():
    x = torch.arange(8.0).expand(1, 1, 1, 1, 8)
    assert HeadwiseMapProjector(1, 1, 8, 4)(x).flatten().tolist() == [0, 1, 4, 5]
    assert HeadwiseMapProjector(1, 1, 8, 12)(x).flatten().tolist() == [0, 1, 2, 3, 0, 0, 4, 5, 6, 7, 0, 0]


@pytest.mark.parametrize("share", [True, False])
def test_the_inverse_goes_back_where_nothing_is_lost(share):
    """1e-4; and carries no gradient."""
    torch.manual_seed(0)
    projector = HeadwiseMapProjector(3, 5, 4, 6, share, init="random")
    with torch.no_grad():
        projector.dim_map += 0.3 * torch.randn_like(projector.dim_map)
    x = torch.randn(2, 2, 3, 7, 4)
    back = projector.inverse(projector(x))
    assert (back - x).abs().max() <= 1e-4 and not back.requires_grad
    flat = KVDimensionProjector(3, 5, 4, 6)
    assert (flat.inverse(flat(x)) - x).abs().max() <= 1e-4


def test_flat_is_one_map_of_all_heads_side_by_side():
    """1e-5."""
    flat = KVDimensionProjector(3, 2, 4, 6)
    x = torch.randn(2, 2, 3, 5, 4)
    out = flat(x)
    for t in range(5):
        both = torch.cat([x[:, :, h, t] for h in range(3)], dim=-1) @ flat.linear.weight.T
        for s in range(2):
            torch.testing.assert_close(out[:, :, s, t], both[..., s * 6 : (s + 1) * 6], atol=1e-5, rtol=1e-5)


def test_procrustes_finds_a_rotation_and_waits_for_its_data():
    """1e-3: heads that mix as `uniform_rms` says, turned by an orthogonal map; pads do not count."""
    torch.manual_seed(0)
    true = HeadwiseMapProjector(4, 2, 8, 8, init="uniform_rms")
    torch.nn.init.orthogonal_(true.dim_map)
    x, mask = torch.randn(3, 2, 4, 20, 8), torch.ones(3, 20, dtype=torch.bool)
    mask[1, 12:] = False
    y = true(x).detach()
    y[1, :, :, 12:] = 1e3
    projector = HeadwiseMapProjector(4, 2, 8, 8, init="procrustes")
    with pytest.raises(RuntimeError, match="fit"):
        projector(x)
    projector.fit(x, y, mask)
    assert (projector(x) - true(x))[[0, 2]].abs().max() <= 1e-3
    assert (projector(x) - true(x))[1, :, :, :12].abs().max() <= 1e-3


@pytest.mark.parametrize("share", [True, False])
def test_procrustes_beats_the_uniform_start_on_unlike_heads(share):
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, 4, 30, 8), torch.randn(2, 2, 3, 30, 6)
    y = y + HeadwiseMapProjector(4, 3, 8, 6, share, init="random")(x).detach()
    fitted, start = (HeadwiseMapProjector(4, 3, 8, 6, share, init=i) for i in ("procrustes", "uniform"))
    fitted.fit(x, y)
    assert (fitted(x) - y).norm() < 0.95 * (start(x) - y).norm()


def test_flat_fit_is_least_squares():
    """1e-3: y is linear in x."""
    torch.manual_seed(0)
    true = KVDimensionProjector(4, 2, 8, 6)
    x = torch.randn(2, 2, 4, 40, 8)
    flat = KVDimensionProjector(4, 2, 8, 6, init="procrustes")
    flat.fit(x, true(x).detach())
    assert (flat(x) - true(x)).abs().max() <= 1e-3


def test_unknown_init_is_named():
    with pytest.raises(ValueError, match="init='best'"):
        HeadwiseMapProjector(2, 2, 4, 4, init="best")
