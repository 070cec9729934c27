"""The face world: labels that agree with each other, determinism, and clear refusals."""

import math

import numpy as np
import pytest
import torch
from conftest import rounded
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.io import load_arrays, save_arrays
from nofa_nb.geometry.cameras import Camera
from nofa_nb.world.appearance import LOOK, SCENE, decode_look
from nofa_nb.world.bust import CODE, LIGHT, dress, person_from_code, sample_person, topology
from nofa_nb.world.head import _asset_path, load_head, millimetres
from nofa_nb.world.motion import sample_expression
from nofa_nb.world.portraits import bend, render, shade_vertices
from nofa_nb.world.raster import load_warp

SEEDS = (0, 7, 16, 19, 42)


@pytest.fixture(scope="module")
def head():
    return load_head()


@pytest.fixture(scope="module")
def busts():
    return {seed: dress(sample_person(seed), 64) for seed in SEEDS}


def neutral(n=1):
    return torch.zeros(n, 52)


def unit(head, **values):
    beta = torch.zeros(1, 52)
    for name, value in values.items():
        beta[0, head.unit(name)] = value
    return beta


# the head -----------------------------------------------------------------------------------------------------------


def test_equation_4_is_exact(head):
    g = torch.Generator().manual_seed(1)
    alpha, beta = torch.randn(2, 100, generator=g), torch.rand(2, 52, generator=g)
    m = head.model.double()
    try:
        codes = zip(alpha.double(), beta.double())
        by_hand = torch.stack([m.mean + sum(a[i] * m.id_basis[i] for i in range(100))
                               + sum(b[i] * m.exp_basis[i] for i in range(52)) for a, b in codes])
        torch.testing.assert_close(m(alpha.double(), beta.double()), by_hand, atol=1e-12, rtol=0)
    finally:
        head.model.float()


def test_the_asset_is_small_and_open():
    arrays, meta = load_arrays(_asset_path())
    assert _asset_path().stat().st_size < 5e6 and meta["licence"] == "CC0-1.0" and meta["measured"]["mean_mm"] <= .5
    assert arrays["id_basis"].shape[0] in range(80, 101) and len(meta["exp_names"]) == 52


@pytest.mark.slow
def test_the_asset_can_be_built_again(tmp_path):
    pytest.importorskip("anny")
    from nofa_nb.world.head_asset import build_head_asset
    measured = build_head_asset(tmp_path / "head.npz")
    assert measured["mean_mm"] <= .5
    built, _ = load_arrays(tmp_path / "head.npz")
    shipped, _ = load_arrays(_asset_path())
    assert np.array_equal(built["landmarks68"], shipped["landmarks68"])
    np.testing.assert_allclose(built["mean"], shipped["mean"], atol=1e-5)


def test_alpha_is_standard_normal(head):
    "The phenotypes of random alphas stay inside their ranges and spread over them."
    alpha = torch.randn(500, 100, generator=torch.Generator().manual_seed(0))
    p = head.phenotypes(alpha)
    ancestry = p["african"] + p["asian"] + p["caucasian"]
    assert abs(float(ancestry.mean()) - 1) < .1 and float(p["gender"].std()) > .2


def test_the_jaw_moves_chin_and_lower_teeth_and_leaves_the_forehead(head):
    jaw = millimetres(head.model.exp_basis[head.unit("jawOpen")].norm(dim=-1))
    teeth = head.in_region("teeth")
    moving = jaw[teeth] > 1
    lower, upper = teeth[moving], teeth[~moving]
    assert len(lower) == len(upper) and head.model.mean[lower, 1].mean() < head.model.mean[upper, 1].mean()
    assert jaw[lower].min() > 5 and jaw[upper].max() < 1e-3 and jaw[head.model.landmarks68[8]] > 10
    assert jaw[head.model.mean[:, 1] > .08].max() < .1


def test_units_move_the_side_they_name(head):
    for name in ("mouthSmile", "eyeBlink", "browOuterUp", "mouthStretch"):
        left, right = (head.model.exp_basis[head.unit(name + s)].norm(dim=-1) for s in ("Left", "Right"))
        x = head.model.mean[:, 0]  # the person's left is the viewer's right: +x
        assert left[x > .02].sum() > 3 * left[x < -.02].sum() and right[x < -.02].sum() > 3 * right[x > .02].sum()


# labels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_landmarks_lie_on_the_pncc_of_their_vertices(head, busts, seed):
    size = 160
    beta = torch.as_tensor(sample_expression(seed, 1))
    view = render(busts[seed], beta, Camera.orbit(.3 * (-1)**seed, .1), size)
    canonical = head.model.mean[head.model.landmarks68]
    centre = torch.stack(torch.meshgrid(torch.arange(size) + .5, torch.arange(size) + .5, indexing="xy"), -1)
    seen = [k for k in range(17, 68) if view.visible[0, k]]
    assert len(seen) > 15
    for k in seen:
        same = ((view.pncc[0] - canonical[k][:, None, None]).norm(dim=0) < .009) & (view.mask[0, 0] == 1)
        assert same.any(), k
        assert float((centre[same] - view.landmarks[0, k] * size).norm(dim=-1).min()) < 1, k


@pytest.mark.parametrize("seed", SEEDS)
def test_depth_of_two_views_agrees(busts, seed):
    "A point of the face seen in one view is not nearer, in the other, than what that sees, and mostly the very point."
    size, cameras = 128, Camera.orbit(torch.tensor([-.25, .25]), torch.tensor([0., .1]))
    views = render(busts[seed], neutral(2), cameras, size)
    depth = views.depth[0, 0]
    face = depth.isfinite() & (views.pncc[0, 2] > .12)  # hair has strands thinner than a pixel
    row, column = face.nonzero().T
    uv = (torch.stack([column, row], -1) + .5)[None] / size
    points = cameras[0].unproject(uv, depth[row, column][None])
    there, z = cameras[1].project(points)
    inside = ((there > 0) & (there < 1)).all(-1)[0]
    pixel = (there[0, inside] * size).long().clamp(0, size - 1)
    seen = views.depth[1].nan_to_num(posinf=9.)
    range_ = torch.nn.functional.max_pool2d(torch.stack([seen, -seen]), 3, 1, 1).sum(0)[0]
    at = (pixel[:, 1], pixel[:, 0])
    known = (range_[at] < .02) & (seen[0][at] < 8)       # away from silhouettes, where a pixel holds two surfaces
    ratio = z[0, inside][known] / seen[0][at][known]
    assert (ratio < .99).float().mean() < .002 and len(ratio) > 1000  # but for single strands nothing floats in front
    assert (ratio < 1.01).float().mean() > .8            # most points are seen by both; the others are hidden there


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_is_one_where_depth_is_finite(busts, seed):
    view = render(busts[seed], neutral(), Camera.orbit(.4, .2), 64)
    assert torch.equal(view.depth.isfinite(), view.mask == 1)
    assert ((view.mask > 0) & (view.mask < 1)).any()    # the border is soft
    assert 0 <= view.rgb.min() and view.rgb.max() <= 1 and view.rgb.isfinite().all()
    outside = (view.mask < 1).expand_as(view.pncc)
    assert (view.pncc[outside] == 0).all() and (view.pncc[~outside] != 0).any()


def test_teeth_stay_dark_behind_closed_lips_and_show_when_open(head, busts):
    teeth, towards = head.in_region("teeth"), torch.tensor([[0., 0., 1.]]).expand(2, -1)
    for bust in busts.values():
        beta = torch.cat([neutral(), unit(head, jawOpen=.5)])
        closed, opened = shade_vertices(bust, bend(bust, beta), towards)[:, teeth, LIGHT].amax((1, 2))
        assert closed < .1 * opened and opened > .1


def test_neutral_mouths_are_not_sad(head):
    "Corners of the mouth are on average not below its middle."
    alpha = torch.stack([sample_person(s).alpha for s in range(64)])
    p = head.model.landmarks(head.model(alpha, neutral(64)), "68")
    droop = (p[:, [60, 64], 1].mean(1) - p[:, [62, 66], 1].mean(1))
    assert float(millimetres(droop).mean()) > 0


# one code, one picture ----------------------------------------------------------------------------------------------


def test_pictures_do_not_depend_on_batch_or_threads(busts):
    beta = torch.as_tensor(sample_expression(3, 4))
    cameras = Camera.orbit(torch.linspace(-.6, .6, 4), torch.zeros(4))
    together = render(busts[7], beta, cameras, 48)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            again = dress(sample_person(7), 64)
            for i in (0, 3):
                alone = render(again, beta[i:i + 1], cameras[i:i + 1], 48)
                for name in ("rgb", "mask", "depth", "pncc", "landmarks", "visible"):
                    found, told = getattr(alone, name)[0], getattr(together, name)[i]
                    # on some processors two threads end their vectors elsewhere, where single numbers round otherwise
                    assert torch.equal(found, told) if threads == 1 else rounded(found, told), (threads, i, name)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(load_warp() is None, reason="warp-lang is not installed")
def test_both_rasterisers_give_the_same_picture(busts):
    for bust in (busts[0], busts[16]):
        fast, plain = (render(bust, neutral(), Camera.orbit(.3, .1), 64, backend=b) for b in ("warp", "torch"))
        differs = ((fast.rgb - plain.rgb).abs().amax(1) > 1 / 255).float().mean()
        assert differs <= .001 and (fast.mask != plain.mask).float().mean() <= .001


def test_code_round_trip_and_priors():
    codes = torch.stack([sample_person(s).code for s in range(300)])
    assert codes.shape == (300, CODE) and CODE == 100 + len(LOOK) + len(SCENE) and len(LOOK) + len(SCENE) >= 10
    assert abs(float(codes[:, 100:].mean())) < .03 and abs(float(codes[:, 100:].std()) - 1) < .05
    assert torch.equal(person_from_code(codes[5]).code, codes[5])


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**31), st.floats(0., 2.5))
def test_any_code_renders(seed, extreme):
    code = torch.randn(CODE, generator=torch.Generator().manual_seed(seed)).sign() * extreme
    code[:100] *= .5
    view = render(dress(person_from_code(code), 32), unit(load_head(), jawOpen=.3), Camera.orbit(.2, 0.), 32)
    assert view.rgb.isfinite().all() and .1 < float(view.mask.mean()) < 1


def test_appearance_follows_shape(head):
    "Grey hair and wrinkles come with age, beards with the male sex, dark skin with African ancestry."
    alphas = torch.randn(400, 100, generator=torch.Generator().manual_seed(2))
    p = head.phenotypes(alphas)
    looks = [decode_look(head, a, torch.zeros(len(LOOK))) for a in alphas]
    value = {k: torch.stack([getattr(look, k) for look in looks]) for k in ("wrinkles", "beard", "melanin", "grey")}
    correlation = lambda a, b: float(torch.corrcoef(torch.stack([a, b]))[0, 1])
    assert correlation(value["wrinkles"], p["age"]) > .8 and correlation(value["grey"], p["age"]) > .7
    assert correlation(value["beard"], p["gender"]) > .6 and correlation(value["melanin"], p["african"]) > .6


# refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call, words", [
    (lambda b: render(b, torch.zeros(1, 51), Camera.orbit(0., 0.)), "beta must be"),
    (lambda b: render(b, torch.zeros(2, 52), Camera.orbit(0., 0.)), "camera must hold one camera per expression"),
    (lambda b: render(b, torch.zeros(1, 52), Camera.orbit(0., 0.), size=0), "size must be"),
    (lambda b: render(b, torch.full((1, 52), math.nan), Camera.orbit(0., 0.)), "beta must be"),
    (lambda b: person_from_code(torch.zeros(5)), "code must have"),
    (lambda b: dress(sample_person(0), texture=3), "size must be at least 32"),
    (lambda b: load_head().unit("smile"), "name must be one of"),
    (lambda b: load_head().in_region("nose"), "names must be among"),
    (lambda b: decode_look(load_head(), torch.zeros(100), torch.zeros(3)), "numbers must have 34"),
])
def test_bad_input_is_named(busts, call, words):
    with pytest.raises(InputError, match=words):
        call(busts[0])


def test_missing_and_broken_assets(tmp_path):
    with pytest.raises(MissingResource, match="nofa world head"):
        load_head(tmp_path / "nowhere.npz")
    broken = tmp_path / "broken.npz"
    broken.write_bytes(_asset_path().read_bytes()[:5000])
    with pytest.raises(InputError, match="damaged"):
        load_head(broken)
    save_arrays(tmp_path / "other.npz", {"mean": np.zeros((3, 3))}, {})
    with pytest.raises(InputError, match="must be a head asset"):
        load_head(tmp_path / "other.npz")


def test_topology_covers_every_vertex():
    faces, kinds = topology()
    bust = dress(sample_person(0), 32)
    assert int(faces.max()) == len(bust.neutral) - 1 and len(faces) == len(kinds)
