"""Measures: intervals over people, the Fréchet distance, landmarks found again and carried by depth."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.errors import InputError
from nofa_nb.core.repro import rng
from nofa_nb.evaluation import generator as G
from nofa_nb.evaluation import metrics as M
from nofa_nb.geometry.cameras import Camera

pytestmark = pytest.mark.usefixtures("one_thread")


def test_pictures_of_a_person_are_one_measurement():
    values, people = [0., 0., 0., 0., 4.], [7, 7, 7, 7, 9]
    assert M.summarise(values, people) == (2., (0., 4.), 2)
    assert M.summarise([1., math.nan, 3., math.nan], [1, 1, 2, 3]).n == 2
    for bad in (([1., 2.], [1, 1]), ([1.], [1, 2]), ([1., math.inf], [1, 2]), ([math.nan] * 2, [1, 2])):
        with pytest.raises(InputError):
            M.summarise(*bad)


def test_intervals_cover():
    hits = 0
    for k in range(30):
        x = rng(k, "people").standard_normal(40).repeat(3)  # three pictures each, all alike
        low, high = M.summarise(x, np.arange(120) // 3, k).interval
        jack = M.jackknife_interval(lambda keep, x=x: float(x[keep].mean()), np.arange(120) // 3, seed=k)
        hits += (low < 0 < high) + (jack[0] < 0 < jack[1])
        assert .5 < (jack[1] - jack[0]) / (high - low) < 2
    assert hits >= 50  # of 60; taken over pictures it would be some 42


@settings(max_examples=12, deadline=None)
@given(d=st.integers(2, 6), seed=st.integers(0, 99), shift=st.floats(-3, 3), scale=st.floats(.1, 4))
def test_frechet_in_closed_form(d, seed, shift, scale):
    from pytorch_fid.fid_score import calculate_frechet_distance
    g = rng(seed, "cov")
    a = g.standard_normal((d, d))
    a = a @ a.T + .1 * np.eye(d)
    mean = g.standard_normal(d)
    # (scale^2) a: (1 + s^2 - 2 s) tr a = (1 - s)^2 tr a
    expected = d * shift**2 + (1 - scale)**2 * np.trace(a)
    assert M.frechet_distance(mean, a, mean + shift, scale**2 * a) == pytest.approx(expected, rel=1e-6, abs=1e-8)
    b = g.standard_normal((d, d))
    b = b @ b.T + .1 * np.eye(d)
    ours = M.frechet_distance(mean, a, mean + shift, b)
    assert ours == pytest.approx(calculate_frechet_distance(mean, a, mean + shift, b), rel=1e-5, abs=1e-6)
    assert ours == pytest.approx(M.frechet_distance(mean + shift, b, mean, a), rel=1e-6, abs=1e-8)


def test_frechet_refusals():
    one = np.eye(3)
    for bad in (lambda: M.frechet_distance(np.zeros(3), one, np.zeros(2), one), lambda: M.frechet(one[:1], one),
                lambda: M.frechet_distance(np.zeros(3), one * math.nan, np.zeros(3), one),
                lambda: M.jackknife_interval(lambda keep: 0., [1, 1])):
        with pytest.raises(InputError):
            bad()


def texture(dx=0., dy=0., seed=0, size=64):
    "A smooth random picture, moved by so many pixels."
    g = torch.Generator().manual_seed(seed)
    waves = torch.randint(-7, 8, (2, 3, 9), generator=g).float()
    phase = torch.rand(3, 9, generator=g) * 6.28
    at = (torch.arange(size) + .5) / size
    x, y = (at - dx / 64)[None, None, None], (at - dy / 64)[None, None, :, None]
    waves, phase = waves[..., None, None], phase[..., None, None]
    return .5 + .1 * torch.cos(2 * math.pi * (waves[0] * x + waves[1] * y) + phase).sum(1)[None]


@settings(max_examples=12, deadline=None)
@given(dx=st.floats(-3, 3), dy=st.floats(-3, 3), size=st.sampled_from([64, 96]))
def test_shifts_are_found(dx, dy, size):
    uv = torch.rand(1, 10, 2, generator=torch.Generator().manual_seed(1)) * .6 + .2
    seen = torch.ones(1, 10, dtype=torch.bool)
    seen[0, 3] = False
    found = G.shifts(texture(dx, dy, size=size) * .7 + .1, texture(size=size), uv, seen)
    assert found[0, 3].isnan().all() and found[0, seen[0]].isfinite().all()
    torch.testing.assert_close(found[0, seen[0]], torch.tensor([dx, dy]).expand(9, 2), atol=.15, rtol=0)


def test_flat_patches_are_left_out():
    uv, seen = torch.full((1, 2, 2), .5), torch.ones(1, 2, dtype=torch.bool)
    assert G.shifts(texture(), texture() * .01 + .4, uv, seen).isnan().all()


def test_carried_by_depth():
    camera = Camera.orbit(torch.tensor([.5, -.5]), torch.tensor([.1, 0.]))
    points = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0)) * .2 - .1
    away = (points - camera.position[:, None]).norm(dim=-1)
    seen = torch.ones(2, 5, dtype=torch.bool)
    for k in range(5):  # a map that holds the distance of one landmark
        right = away[:, k, None, None, None].expand(-1, 1, 8, 8)
        assert G.carried(points, seen, camera, right)[:, k].max() < 1e-5
        off = G.carried(points, seen, camera, right + .1)[:, k] * 64
        assert ((off > 3) & (off < 5)).all()  # .1 sin .4 / 2.7 * 4.26 * 64 = 3.9
    assert G.carried(points, ~seen, camera, right).isnan().all()
    u = camera.project(points)[0][:, 0, 0]  # right at the first landmark's place only: the distance grows across
    across = away[:, 0, None, None, None] + ((torch.arange(8) + .5) / 8 - u[:, None])[:, None, None].expand(-1, 1, 8, 8)
    found = G.carried(points, seen, camera, across)
    assert found[:, 0].max() < 1e-5 and found[:, 1:].min() > 1e-3


def test_visibility():
    camera = Camera.orbit(0., 0., pivot=(0., 0., 0.))
    points = torch.tensor([[[0., 0, 0], [0, 0, .1], [0, 0, -.1], [2, 0, 0]]])
    wall = torch.full((1, 1, 9, 9), 2.7)
    assert G.visible(points, camera, wall).tolist() == [[True, False, False, False]]
    assert not G.visible(points, camera, wall * math.inf).any()
    beside = (points - camera.position).norm(dim=-1)[0, 3]  # at the right distance, but outside the picture
    assert not G.visible(points, camera, torch.full_like(wall, beside))[0, 3]


def test_features_see_colour_and_detail():
    flat = G.dct_features(torch.full((1, 3, 32, 32), .5))
    assert flat.shape == (1, 104) and np.allclose(flat[0, :48], 2.)
    torch.testing.assert_close(G._cosines() @ G._cosines().T, torch.eye(8), atol=1e-6, rtol=0)
    corner = torch.zeros(1, 3, 64, 64)
    corner[:, 1, :16, 48:] = 1  # green, in the field at the upper right
    assert np.flatnonzero(G.dct_features(corner)[0, :48] > 2).tolist() == [16 + 3]
    fine = torch.zeros(1, 3, 64, 64)
    fine[..., :32, :32] = ((torch.arange(32) + torch.arange(32)[:, None]) % 2).float()  # chequers, upper left
    detail = G.dct_features(fine)[0, 48:].reshape(14, 4)
    assert detail[13].argmax() == 0 and detail[:, 0].argmax() == 13
    assert np.allclose(detail[:, 1:], math.log(.01), atol=1e-3)
    with pytest.raises(InputError, match="16"):
        G.dct_features(torch.zeros(1, 3, 40, 40))
