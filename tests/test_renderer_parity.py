"""The 3D half of EG3D: parity with the numbers of its released code, stage by stage, and properties of the renderer."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.errors import InputError
from nofa_nb.geometry.cameras import Camera
from nofa_nb.geometry.rays import rays
from nofa_nb.geometry.sampling import draw_numbers, importance_depths, stratified_depths
from nofa_nb.layers.stylegan import SynthesisNetwork, initial_weights
from nofa_nb.models.renderer import Renderer, composite, interval_weights, query
from nofa_nb.models.triplane import Decoder, TriplaneField, split_planes
from nofa_nb.ops.plane_sample import plane_sample

few = settings(max_examples=25, deadline=None, derandomize=True)
FEATURES, DEPTH = 5e-6, 1e-5  # the largest difference that parity allows in float32
CASES = {
    "base": {},
    "white_back": {"white_back": True},
    "auto": {"ray_start": "auto", "ray_end": "auto"},
    "disparity": {"disparity": True},
    "no_importance": {"depth_fine": 0},
    "boxwarp1.6_12_20": {"depth_coarse": 12, "depth_fine": 20, "ray_start": 0.1, "ray_end": 2.6, "box_warp": 1.6},
}


@pytest.fixture(scope="module")
def eg3d():
    with np.load(Path(__file__).parent / "fixtures" / "eg3d_tiny_parity.npz", allow_pickle=False) as f:
        return {k: torch.from_numpy(f[k]) for k in f.files if not k.startswith(("state/superresolution", "ops/"))}


def entries(eg3d, prefix):
    return {k.removeprefix(prefix): v for k, v in eg3d.items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def decoder(eg3d):
    made = Decoder(32)
    made.load_state_dict(entries(eg3d, "state/decoder."))
    return made.requires_grad_(False)


def close(a, b, atol):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def agree(seen, eg3d, prefix, features=FEATURES):
    close(seen.features, eg3d[prefix + "feature"].to(seen.features), features)
    close(seen.weight, eg3d[prefix + "weights_sum"].to(seen.weight), features)
    close_depth(seen.depth, eg3d[prefix + "depth"].to(seen.depth), eg3d[prefix + "weights_sum"])


# ---- parity with EG3D

def close_depth(a, b, weight):
    """A depth is a quotient by the ray's weight. 1 - exp(-x) rounds every weight to 6e-8, so on rays with a weight
    below 0.01 the quotient's last digits are noise: EG3D's own depths are up to 1.7e-5 away from float64 there."""
    excess = (a - b).abs() * (weight / 0.01).clamp(max=1)
    assert excess.max() <= DEPTH, f"depth off by {(a - b).abs().max().item():.2g}"


@pytest.mark.parametrize("name", CASES)
def test_parity_of_the_renderer(eg3d, decoder, name):
    options = {"depth_coarse": 8, "depth_fine": 8} | CASES[name]
    field = TriplaneField(eg3d["in/small_planes"], decoder, options.get("box_warp", 1.0))
    first = eg3d[f"render_{name}/rand_coarse"][..., 0]
    second = eg3d.get(f"render_{name}/rand_fine", torch.zeros(128, 0)).reshape(1, 128, -1)
    seen = Renderer(**options).render(field, eg3d["in/small_ray_origins"], eg3d["in/small_ray_dirs"], (first, second))
    agree(seen, eg3d, f"render_{name}/")


def test_parity_of_stratified_depths(eg3d):
    numbers, expected = eg3d["in/rand_coarse"][..., 0], eg3d["out/depths_coarse"][..., 0]
    close(stratified_depths(2.25, 3.3, numbers), expected, 3e-7)
    close(stratified_depths(torch.full((2, 256), 2.25), torch.full((2, 256), 3.3), numbers), expected, 5e-7)


def test_parity_of_coarse_weights(eg3d):
    weights = interval_weights(eg3d["out/sigma_coarse"][..., 0], eg3d["out/depths_coarse"][..., 0])
    close(weights, eg3d["out/weights_coarse"][..., 0], 1e-6)


def test_parity_of_importance_depths(eg3d):
    coarse, weights = eg3d["out/depths_coarse"][..., 0], eg3d["out/weights_coarse"][..., 0]
    fine = importance_depths(coarse, weights, eg3d["in/rand_fine"].reshape(2, 256, 8))
    close(fine, eg3d["out/depths_fine"][..., 0], DEPTH)


def test_parity_of_the_decoder(eg3d, decoder):
    features, density = decoder(eg3d["out/sampled_features"].mean(1))
    close(features, eg3d["out/decoder_rgb"], FEATURES)
    close(density, eg3d["out/decoder_sigma"], FEATURES)


# EG3D's whole planes are not among its numbers: they are computed anew, in float64, so that what is left is the
# rounding of EG3D's own backbone, 7e-6 at values up to 8.5.
@pytest.fixture(scope="module")
def planes(eg3d):
    backbone = SynthesisNetwork(512, [16] * 7, 96).double().requires_grad_(False)
    backbone.load_state_dict(entries(eg3d, "state/backbone.synthesis."))
    image = backbone(eg3d["out/ws"].double())
    close(image[:, :, 7::16, 7::16].float(), eg3d["out/planes_lattice"], 1e-5)
    return split_planes(image)


def test_parity_of_the_lookup(eg3d, planes):
    read = plane_sample(planes.float(), eg3d["in/coords"], 1.0)
    close(read, eg3d["out/sampled_features"], FEATURES)
    other = plane_sample(planes.float(), eg3d["in/coords"], 1.0, "distinct")
    close(other[:, :2], eg3d["out/sampled_features"][:, :2], FEATURES)
    assert (other[:, 2] - eg3d["out/sampled_features"][:, 2]).abs().max() > 0.1  # the option is seen


@pytest.mark.parametrize("dtype,limit", [(torch.float64, FEATURES), (torch.float32, 1.3e-5)])
def test_parity_from_planes_to_rays(eg3d, planes, decoder, dtype, limit):
    # in float32 the planes' rounding comes on top of the renderer's, with a density twelve times as steep as usual:
    # EG3D's own float32 numbers are 1.3e-5 from float64
    decoder = Decoder(32).to(dtype).requires_grad_(False)
    decoder.load_state_dict(entries(eg3d, "state/decoder."))
    origins, directions = eg3d["out/ray_origins"].to(dtype), eg3d["out/ray_dirs"].to(dtype)
    field = TriplaneField(planes.to(dtype), decoder)
    numbers = eg3d["in/rand_coarse"][..., 0], eg3d["in/rand_fine"].reshape(2, 256, 8)
    density = query(field, origins, directions, eg3d["out/depths_coarse"][..., 0].to(dtype))[1]
    close(density, eg3d["out/sigma_coarse"][..., 0].to(dtype), 5e-5)
    agree(Renderer(8, 8).render(field, origins, directions, numbers), eg3d, "out/", limit)


# ---- properties

def even(b, n, s, near=2.0, far=3.0):
    return torch.linspace(near, far, s, dtype=torch.float64).expand(b, n, s)


def draw(shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@few
@given(st.integers(0, 999), st.integers(2, 40), st.sampled_from([0.1, 3.0, 1e3, 1e6]))
def test_weights_are_shares_of_one(seed, samples, scale):
    depths = 2 + draw((2, 3, samples), seed).abs().cumsum(-1)
    weights = interval_weights(draw((2, 3, samples), seed + 1, scale), depths)
    assert (weights >= 0).all() and weights.sum(-1).max() <= 1 + 1e-8


@few
@given(st.floats(-8, 8), st.floats(0.2, 5), st.integers(2, 30), st.integers(0, 99))
def test_constant_density_has_the_closed_form(density, length, samples, seed):
    inner = torch.rand(1, 1, samples - 2, generator=torch.Generator().manual_seed(seed)).double().sort(-1)[0]
    depths = 2 + length * F.pad(F.pad(inner, (1, 0)), (0, 1), value=1.0)  # both ends, anything between
    weights = interval_weights(torch.full_like(depths, density), depths)
    passed = math.exp(-math.log1p(math.exp(density - 1)) * length)
    assert 1 - weights.sum().item() == pytest.approx(passed, abs=1e-7)


@few
@given(st.floats(2.35, 3.15), st.integers(8, 64), st.integers(0, 32), st.integers(0, 99))
def test_an_opaque_wall_gives_its_depth(wall, coarse, fine, seed):
    def field(points, directions):
        return torch.full_like(points, 0.25), torch.where(points[..., 2:] < -wall, 1e9, -1e3)

    origins, directions = torch.zeros(1, 2, 3).double(), torch.tensor([0, 0, -1.0]).double().expand(1, 2, 3)
    random = torch.Generator().manual_seed(seed)
    seen = Renderer(coarse, fine).render(field, origins, directions, random)
    step = 1.05 / (coarse - 1)  # samples are at most two steps apart, so half of that
    assert (seen.depth - wall).abs().max() <= step
    close(seen.weight, torch.ones_like(seen.weight), 1e-6)
    close(seen.features, torch.full_like(seen.features, -0.5), 1e-6)


def cloud(points, directions):
    return torch.sigmoid(3 * points + directions), 6 - 40 * points.square().sum(-1, keepdim=True)


def scene(batch=2, side=5, dtype=torch.float64):
    return tuple(t.to(dtype) for t in rays(Camera.orbit(torch.linspace(-0.4, 0.4, batch), 0.1), side, side))


def test_fine_samples_come_closer_to_the_truth():
    o, d = scene()
    truth = Renderer(3000, 0).render(cloud, o, d)
    errors = [(Renderer(8, fine).render(cloud, o, d).features - truth.features).abs().mean() for fine in (0, 32)]
    assert errors[1] < 0.3 * errors[0]


def test_white_back_fills_what_is_left():
    o, d = scene()
    black, white = (Renderer(8, 8, white_back=back).render(cloud, o, d) for back in (False, True))
    close(white.features - black.features, (2 * (1 - black.weight)).expand_as(white.features), 1e-12)


@few
@given(st.integers(1, 30), st.sampled_from([0, 6]), st.booleans())
def test_chunks_change_nothing(chunk, fine, auto):
    o, d = scene()
    bounds = ("auto", "auto") if auto else (2.25, 3.3)
    renderer = Renderer(6, fine, *bounds)
    whole = renderer.render(cloud, o, d, torch.Generator().manual_seed(3))
    pieces = renderer.render(cloud, o, d, torch.Generator().manual_seed(3), chunk=chunk)
    for a, b in zip(whole, pieces):
        close(a, b, 1e-12)


def test_strided_inputs_single_rays_and_single_pictures():
    o, d = scene()
    numbers = draw_numbers(torch.Generator().manual_seed(4), 2, 25, 8, 6, o)
    renderer = Renderer(8, 6)
    whole = renderer.render(cloud, o, d, numbers)
    assert not (strided := o.mT.contiguous().mT).is_contiguous()
    for a, b in zip(whole, renderer.render(cloud, strided, d.mT.contiguous().mT, numbers)):
        assert torch.equal(a, b)
    one = renderer.render(cloud, o[1:, 12:13], d[1:, 12:13], tuple(n[1:, 12:13] for n in numbers))
    assert one.features.shape == (1, 1, 3) and one.depth.shape == one.weight.shape == (1, 1, 1)
    for a, b in zip(whole, one):
        close(a[1:, 12:13], b, 1e-12)


def test_randomness_comes_from_outside():
    o, d = scene()
    before = torch.random.get_rng_state()
    make = lambda random: Renderer(6, 6).render(cloud, o, d, random).features
    first, again, other = (make(torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(make(None), make(None)) and torch.equal(before, torch.random.get_rng_state())


def test_rays_that_see_nothing():
    o, d = scene(side=2)
    beside = o + torch.tensor([5.0, 0, 0], dtype=o.dtype)
    mixed = torch.cat([o, beside], 1), torch.cat([d, d], 1)
    seen = Renderer(8, 8, "auto", "auto").render(cloud, *mixed)
    assert (seen.weight[:, 4:] == 0).all() and (seen.features[:, 4:] == -1).all() and (seen.weight[:, :4] > 0.1).all()
    assert all(x.isfinite().all() for x in seen)
    void = lambda p, d: (p.sigmoid(), torch.full_like(p[..., :1], -1e5))
    seen = Renderer(8, 8, white_back=True).render(void, o, d)
    assert (seen.weight == 0).all() and (seen.features == 1).all()
    assert (seen.depth == seen.depth.max()).all() and seen.depth.max() > 3.2  # the largest depth of the batch


# ---- gradients

def test_gradients_of_planes_and_decoder():
    planes = draw((2, 3, 3, 4, 4), 1).requires_grad_()
    with initial_weights(0):
        decoder = Decoder(3, features=3, width=4).double()
    names, weights = zip(*decoder.named_parameters())
    o, d = scene(side=2)

    def render(planes, *weights):
        run = lambda x: torch.func.functional_call(decoder, dict(zip(names, weights)), (x,))
        return tuple(Renderer(6, 0).render(TriplaneField(planes, run, 1.3), o, d))

    assert torch.autograd.gradcheck(render, (planes, *weights), nondet_tol=1e-12)


def test_gradients_with_fine_samples_are_those_at_fixed_depths():
    planes = draw((2, 3, 3, 4, 4), 2).requires_grad_()
    with initial_weights(0):
        decoder = Decoder(3, features=3, width=4).double()
    field, (o, d) = TriplaneField(planes, decoder), scene(side=3)
    renderer = Renderer(6, 6)
    numbers = draw_numbers(torch.Generator().manual_seed(5), 2, 9, 6, 6, o)
    seen = renderer.render(field, o, d, numbers)
    coarse = stratified_depths(2.25, 3.3, numbers[0])
    fine = importance_depths(coarse, interval_weights(query(field, o, d, coarse)[1], coarse), numbers[1]).detach()
    depths = torch.cat([coarse, fine], -1)
    fixed = composite(*query(field, o, d, depths), depths)
    for a, b in zip(*([torch.autograd.grad(s.features.square().sum() + s.depth.sum(), [planes, *decoder.parameters()])
                       for s in (seen, fixed)])):
        close(a, b, 1e-10)
        assert a.abs().sum() > 0


def test_gradients_of_empty_rays_are_finite():
    raw = torch.full((1, 2, 6), -1e4, requires_grad=True)
    seen = composite(torch.rand(1, 2, 6, 3, generator=torch.Generator().manual_seed(0)), raw, even(1, 2, 6).float())
    (seen.features.sum() + seen.depth.clamp(max=9).sum() + seen.weight.sum()).backward()
    assert raw.grad.isfinite().all()


# ---- decoder and faults

def test_decoder_sizes_and_names():
    assert sum(p.numel() for p in Decoder(32).parameters()) == 4257
    assert list(Decoder(16, 3, 32, 2).state_dict()) == [f"net.{i}.{n}" for i in (0, 2, 4) for n in ("weight", "bias")]
    features, _ = Decoder(4)(torch.full((1, 1, 4), 1e4))
    assert features.min() >= -0.001 - 1e-6 and features.max() <= 1.001 + 1e-6


@pytest.mark.parametrize("options", [
    {"depth_coarse": 3}, {"depth_coarse": 1, "depth_fine": 0}, {"depth_fine": -1}, {"box_warp": 0}, {"ray_start": 3.3},
    {"ray_start": "auto"}, {"ray_end": "auto"}, {"ray_start": -1},
])
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Renderer(**options)


@pytest.mark.parametrize("change,word", [
    ({"origins": torch.zeros(25, 3)}, "origins"), ({"directions": torch.zeros(2, 24, 3)}, "directions"),
    ({"origins": torch.zeros(2, 0, 3), "directions": torch.zeros(2, 0, 3)}, "at least one ray"),
    ({"random": 7}, "random"), ({"random": (torch.zeros(2, 25, 6), torch.zeros(2, 25, 5))}, r"random\[1\]"),
    ({"chunk": 0}, "chunk"), ({"field": lambda p, d: (p, p)}, "density of the field"),
    ({"field": lambda p, d: (p[0], p[..., :1])}, "features of the field"),
])
def test_bad_arguments_are_refused(change, word):
    o, d = scene()
    with pytest.raises(InputError, match=word):
        Renderer(6, 6).render(**{"field": cloud, "origins": o, "directions": d} | change)


@pytest.mark.parametrize("start,end", [(0.1, 2.0), (0.0, 2.0), ("auto", "auto")])
def test_disparity_across_infinity_is_refused(start, end):
    o, d = scene()
    o = o + 2.6 * d  # inside the box
    with pytest.raises(InputError, match="disparity"):
        Renderer(6, 0, start, end, disparity=True).render(cloud, o, d)
