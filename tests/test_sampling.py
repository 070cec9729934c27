"""Samples along rays and lookups on planes: order, bounds, distribution, randomness, faults."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.errors import InputError
from nofa_nb.geometry.sampling import (
    centres,
    draw_numbers,
    importance_depths,
    inverse_cdf,
    ray_bounds,
    smooth_weights,
    stratified_depths,
)
from nofa_nb.ops.plane_sample import AXES, plane_sample, plane_sample_ref

few = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 9999)


def uniform(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- stratified

@few
@given(seeds, st.integers(2, 60), st.floats(0.5, 3), st.floats(0.1, 3))
def test_one_sample_in_each_stratum(seed, count, near, length):
    start, end = torch.full((2, 3), near).double(), torch.full((2, 3), near + length).double()
    depths = stratified_depths(start, end, uniform((2, 3, count), seed))
    step = length / (count - 1)
    grid = near + step * torch.arange(count + 1, dtype=torch.float64)
    assert (depths >= grid[:-1] - 1e-9).all() and (depths <= grid[1:] + 1e-9).all()  # the last ends one step behind far
    assert (depths.diff(dim=-1) >= 0).all()


@few
@given(seeds, st.integers(4, 60), st.floats(0.5, 3), st.floats(1.05, 3.5))
def test_disparity_steps_are_even_in_one_over_depth(seed, count, near, ratio):
    start, end = torch.full((1, 2), near).double(), torch.full((1, 2), near * ratio).double()
    depths = stratified_depths(start, end, uniform((1, 2, count), seed), disparity=True)
    assert (depths >= near - 1e-9).all() and (depths.diff(dim=-1) >= -1e-9).all()
    grid = 1 / stratified_depths(start, end, torch.zeros(1, 2, count).double(), disparity=True)
    even = (grid[..., -1:] - grid[..., :1]) / (count - 1)
    torch.testing.assert_close(grid.diff(dim=-1), even.expand(1, 2, count - 1))
    torch.testing.assert_close(1 / grid[..., [0, -1]], torch.stack([start, end], -1))


def test_disparity_that_would_cross_infinity_is_refused():
    near, far, last = torch.tensor([0.5]), torch.tensor([2.0]), torch.full((1, 4), 0.999)
    with pytest.raises(InputError, match="below the 4 samples"):
        stratified_depths(near, far, last, disparity=True)
    assert (stratified_depths(near, far - 0.1, last, disparity=True) > 0).all()
    with pytest.raises(InputError, match="above 0"):
        stratified_depths(0 * near, far, last, disparity=True)


# ---- bounds

def test_bounds_from_the_box():
    origins = torch.tensor([[[0.0, 0, 2.7], [0, 0, 0], [9, 0, 2.7], [0, 0, 2.7]]])
    directions = torch.tensor([[[0.0, 0, -1], [0, 0, -1], [0, 0, -1], [0, 0, 1]]])
    near, far = ray_bounds(origins, directions, "auto", "auto", 1.6)
    expected = torch.tensor([[1.9, 0, 2.7, 0]]), torch.tensor([[3.5, 0.8, 2.7, 0]])  # hit, from inside, beside, behind
    torch.testing.assert_close((near, far), expected)
    depths = stratified_depths(near, far, torch.full((1, 4, 5), 0.5))
    assert (depths[0, 2] == 2.7).all() and (depths[0, 3] == 0).all()  # an empty span stays empty


@pytest.mark.parametrize("start,end", [("auto", 3.0), (2.0, "auto"), (3.0, 2.0), (-1.0, 2.0)])
def test_bad_bounds_are_refused(start, end):
    with pytest.raises(InputError, match="ray_start"):
        ray_bounds(torch.zeros(1, 1, 3), torch.ones(1, 1, 3), start, end, 1.0)


# ---- importance

@few
@given(seeds, st.integers(4, 40), st.integers(1, 40), st.sampled_from([0.0, 1e-6, 1.0]))
def test_importance_samples_stay_between_the_outer_middles(seed, coarse, fine, scale):
    depths = 2 + uniform((2, 3, coarse), seed).sort(-1)[0]
    weights = uniform((2, 3, coarse - 1), seed + 1).pow(8) * scale
    found = importance_depths(depths, weights, uniform((2, 3, fine), seed + 2))
    middles = (depths[..., 1:] + depths[..., :-1]) / 2
    assert (found >= middles[..., :1] - 1e-9).all() and (found <= middles[..., -2:-1] + 1e-9).all()


@few
@given(seeds, st.integers(1, 12))
def test_inverse_cdf_gives_each_bin_its_share(seed, bins):
    edges = uniform((bins + 1,), seed).add(0.05).cumsum(0)
    weights = uniform((bins,), seed + 1) + 0.05
    found = inverse_cdf(edges[None], weights[None], centres(4000, edges)[None])[0]
    assert (found.diff() >= 0).all()  # rising numbers give rising positions
    counted = torch.histogram(found.cpu(), edges.cpu())[0] / 4000
    torch.testing.assert_close(counted, weights / weights.sum(), atol=2e-3, rtol=0)


def test_inverse_cdf_reaches_both_ends_and_skips_empty_bins():
    edges, weights = torch.tensor([[0.0, 1, 2, 3]]), torch.tensor([[1.0, 0, 1]])
    found = inverse_cdf(edges, weights, torch.tensor([[0.0, 0.25, 0.75, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([[0, 0.5, 2.5, 3]]), atol=1e-4, rtol=0)
    drawn = inverse_cdf(edges, weights, centres(1000, edges)[None])
    assert ((drawn > 1) & (drawn < 2)).sum() <= 1


def test_smoothing_by_hand():
    got = smooth_weights(torch.tensor([[[4.0, 0, 0, 2]]]))
    torch.testing.assert_close(got, torch.tensor([[[4.0, 2, 1, 2]]]) + 0.01)


def test_too_few_coarse_samples_are_refused():
    with pytest.raises(InputError, match="at least 4"):
        importance_depths(torch.rand(1, 1, 3), torch.rand(1, 1, 2), torch.rand(1, 1, 2))


# ---- numbers

def test_numbers_are_those_of_the_seed_in_any_precision():
    single, double = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    a, b = (draw_numbers(torch.Generator().manual_seed(3), 2, 4, 5, 6, like) for like in (single, double))
    assert b[0].dtype == torch.float64 and all(torch.equal(x.double(), y) for x, y in zip(a, b))
    assert not torch.equal(a[0][..., :5], a[1][..., :5])
    first, second = draw_numbers(None, 2, 4, 5, 2, single)
    assert (first == 0.5).all() and second[1, 3].tolist() == [0.25, 0.75]


# ---- planes

@few
@given(seeds, st.sampled_from(sorted(AXES)), st.floats(0.5, 2))
def test_lookup_is_linear_in_planes_and_mean_is_the_mean(seed, axes, box_warp):
    planes, points = uniform((2, 2, 3, 2, 5, 7), seed), (uniform((2, 9, 3), seed + 1) - 0.5) * box_warp
    read = lambda p, **options: plane_sample(p, points, box_warp, axes, **options)
    torch.testing.assert_close(read(planes[0] + 2 * planes[1]), read(planes[0]) + 2 * read(planes[1]))
    torch.testing.assert_close(read(planes[0], mean=True), read(planes[0]).mean(1))
    torch.testing.assert_close(read(planes[0].mT.contiguous().mT), read(planes[0]))
    assert torch.equal(read(planes[0]), plane_sample_ref(planes[0], points, box_warp, axes))


@pytest.mark.parametrize("axes", sorted(AXES))
def test_each_plane_sees_its_own_axes(axes):
    planes = uniform((1, 3, 1, 8, 8), 5)
    base = torch.tensor([[[0.11, -0.23, 0.31]]], dtype=torch.float64)
    for axis in range(3):
        moved = base.clone()
        moved[..., axis] += 0.07
        changed = (plane_sample(planes, moved, 1.0, axes) != plane_sample(planes, base, 1.0, axes))[0, :, 0, 0]
        assert changed.tolist() == [axis in pair for pair in AXES[axes]]


def test_outside_the_box_is_zero_and_each_batch_has_its_own_planes():
    planes = torch.ones(2, 3, 1, 4, 4)
    planes[1] *= 2
    points = torch.tensor([[[0.0, 0, 0], [0.7, 0.7, 0.7]]]).expand(2, 2, 3)
    assert plane_sample(planes, points, 1.0, mean=True)[..., 0].tolist() == [[1, 0], [2, 0]]
