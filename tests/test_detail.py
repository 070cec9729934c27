"""Detail network, fusion and alignment: sizes of all presets, exact start, gradients, receptive field, faults."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.config import PRESETS, override, preset
from nofa_nb.core.errors import InputError
from nofa_nb.core.repro import generator
from nofa_nb.geometry.cameras import Camera
from nofa_nb.models.detail import (
    DETAILS,
    DetailConfig,
    DetailNetwork,
    Fusion,
    ResidualAlignment,
    build_detail,
    fused_feature,
    residual_image,
)
from nofa_nb.models.generator import build_generator

SMOKE = override(preset("smoke"), "readings.residual=aligned")
pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "detail"))


@pytest.fixture
def parts():
    return build_detail(SMOKE)


# --- sizes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fusion", ["64", "128", "planes"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name, fusion):
    "Shapes, without memory; F_c is compared with what the generator makes."
    p = override(preset(name), f"readings.fusion={fusion}", "readings.residual=aligned")
    feature = fused_feature(p)
    with torch.device("meta"):
        network, fuse, align = build_detail(p)
        side = p.generator.image_resolution
        residual = torch.empty(2, 3, side, side)
        F_res = network(residual)
        F_e = fuse(torch.empty(2, feature.channels, feature.resolution, feature.resolution), F_res)
        assert align(residual, residual).shape == residual.shape
    assert F_res.shape == (2, DETAILS[name].features, *F_e.shape[2:])
    assert F_e.shape == (2, feature.channels, feature.resolution, feature.resolution)
    config = p.generator
    if fusion == "planes":
        assert feature == (3 * config.plane_channels, config.plane_resolution)
    else:
        assert feature.resolution == config.plane_resolution * int(fusion) // 256 == p.fusion_resolution
    if name == "smoke":
        synthesis = build_generator(config).backbone.synthesis
        ws = torch.zeros(1, synthesis.num_ws, config.w_dim)
        made = synthesis(ws) if fusion == "planes" else synthesis.run(ws, last=feature.resolution)[0]
        assert made.shape[1:] == (feature.channels, feature.resolution, feature.resolution)


def test_light():
    "Gamma and eta are light: together less than a third of C, in every preset."
    for name in PRESETS:
        with torch.device("meta"):
            network, fuse, align = build_detail(preset(name))
        count = [sum(p.numel() for p in m.parameters()) for m in (network, fuse)]
        assert count[1] < count[0] / 3 and align is None


# --- the start (reading 3) --------------------------------------------------------------------------------------------
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(-6, 6))
def test_fusion_starts_as_identity(seed, magnitude):
    "Bit for bit, whatever the residual, and for features of any size."
    fuse = Fusion(6, 4)
    coarse, residual = random(2, 6, 5, 5, seed=seed) * 10**magnitude, random(2, 4, 5, 5, seed=seed + 1) * 100
    gamma, eta = fuse.maps(residual)
    assert (gamma == 1).all() and (eta == 0).all() and torch.equal(fuse(coarse, residual), coarse)


def test_coarse_planes_bit_for_bit(parts):
    network, fuse, align = parts
    synthesis = build_generator(SMOKE.generator).backbone.synthesis.requires_grad_(False)
    ws, side = random(2, synthesis.num_ws, SMOKE.generator.w_dim), SMOKE.fusion_resolution
    feature, so_far = synthesis.run(ws, last=side)
    residual = random(2, 3, 32, 32)
    aligned = align(residual, residual)
    torch.testing.assert_close(aligned, residual, rtol=0, atol=1e-5)
    fine = synthesis.run(ws, x=fuse(feature, network(aligned)), image=so_far, first=2 * side)[1]
    assert torch.equal(fine, synthesis(ws))
    with torch.no_grad():
        fuse.eta[2].bias.fill_(.1)
    assert not torch.equal(synthesis.run(ws, x=fuse(feature, network(aligned)), image=so_far, first=2 * side)[1], fine)


def test_equation_3():
    fuse = Fusion(3, 2)
    torch.nn.init.normal_(fuse.gamma[2].weight, generator=generator(1))
    torch.nn.init.normal_(fuse.eta[2].weight, generator=generator(2))
    coarse, residual = random(2, 3, 4, 4), random(2, 2, 4, 4, seed=1)
    want = (1 + fuse.gamma(residual)) * coarse + fuse.eta(residual)
    torch.testing.assert_close(fuse(coarse, residual), want)
    torch.testing.assert_close(fuse(0 * coarse, residual), fuse.eta(residual))
    torch.testing.assert_close(fuse(2 * coarse, residual) - fuse(coarse, residual), fuse.maps(residual)[0] * coarse)


# --- gradients --------------------------------------------------------------------------------------------------------
def test_gradients_from_the_first_step_on():
    "First gamma's and eta's last convolutions; after that one step, every parameter, the camera's included."
    config = replace(DETAILS["smoke"], camera=True)
    network, fuse, align = build_detail(SMOKE, config=config)
    everything = {f"{m}.{n}": p for m, part in zip("cfa", (network, fuse, align)) for n, p in part.named_parameters()}
    optimizer = torch.optim.SGD(everything.values(), .1)
    source, coarse = random(4, 3, 32, 32), random(4, 3, 32, 32, seed=1)
    feature, target = random(4, 32, 8, 8, seed=2), random(4, 32, 8, 8, seed=3)
    camera = Camera.orbit(torch.linspace(-.5, .5, 4), torch.zeros(4))

    def reached():
        optimizer.zero_grad()
        aligned = align(residual_image(source, coarse), coarse)
        (fuse(feature, network(aligned, camera)) - target).square().mean().backward()
        got = {n for n, p in everything.items() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
        return got

    assert reached() == {f"f.{n}.2.{w}" for n in ("gamma", "eta") for w in ("weight", "bias")}
    reached()  # the alignment's last convolution starts at zero too, and moves now
    assert reached() == set(everything)


def test_faces_of_a_batch_do_not_mix(parts):
    network, fuse, align = parts
    for p in (*fuse.parameters(), align.unet.last.weight):
        torch.nn.init.normal_(p, std=.1, generator=generator(1))
    x, y, feature = random(3, 3, 32, 32), random(3, 3, 32, 32, seed=1), random(3, 32, 8, 8)

    def fine(k):
        return fuse(feature[k], network(align(x[k], y[k])))

    torch.testing.assert_close(fine(slice(1, 2)), fine(slice(None))[1:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fine([2, 1])[1], fine(slice(None))[1], rtol=1e-4, atol=1e-5)


# --- C ----------------------------------------------------------------------------------------------------------------
def test_everything_is_seen():
    "Every place of F_res depends noticeably on every pixel; without mixing it does not."
    share = {}
    for mixing in (0, 1):
        torch.manual_seed(0)
        network = DetailNetwork(replace(DETAILS["small"], mixing=mixing), 16)
        picture = random(2, 3, 64, 64).requires_grad_()
        network(picture)[:, :, 15, 0].square().sum().backward()
        seen = picture.grad.abs().sum((0, 1))
        share[mixing] = (seen > seen.max() / 1000).float().mean()
    assert share[1] == 1 and share[0] < .5


def test_mixing_tells_places_apart():
    "The same tokens at other places give other results, not only the results at other places: planes are no picture."
    network = DetailNetwork(DETAILS["smoke"], 8)
    x = random(1, 32, 4, 4)
    with torch.no_grad():
        here, there = network.unet.mix(x), network.unet.mix(x.flip(3)).flip(3)
        assert (here - there).abs().max() > 1e-3
        for block in network.unet.mix:
            block.position.zero_()
        torch.testing.assert_close(network.unet.mix(x), network.unet.mix(x.flip(3)).flip(3))


def test_no_detail_is_invented_from_flat_residuals(parts):
    "The size of the residual is not lost, as normalisation would: a tenth of it moves F_res less than a half."
    network = parts[0]
    x = random(2, 3, 32, 32)
    with torch.no_grad():
        nothing, some, much = (network(x * s) for s in (0., .1, 1.))
    assert 0 < (some - nothing).square().mean() < .25 * (much - nothing).square().mean()


def test_camera():
    network = DetailNetwork(replace(DETAILS["smoke"], camera=True), 8)
    x, pair = random(2, 3, 32, 32), Camera.orbit(torch.tensor([-.5, .5]), torch.zeros(2))
    with torch.no_grad():
        got = network(x, pair)
        assert (network(x, pair[:1]) - got)[1].abs().max() > 1e-3
        torch.testing.assert_close(network(x, pair[:1])[0], got[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="one, or 2"):
        network(x, Camera.orbit(torch.zeros(3), 0))
    with pytest.raises(InputError, match="camera must be given"):
        network(x)


def test_seed():
    state = torch.get_rng_state()
    a, b, c = (build_detail(SMOKE, seed) for seed in (0, 0, 1))
    for part, same, other in zip(a, b, c):
        names = part.state_dict()
        assert all(torch.equal(names[k], same.state_dict()[k]) for k in names)
        assert not all(torch.equal(names[k], other.state_dict()[k]) for k in names)
    assert torch.equal(torch.get_rng_state(), state)


def test_bfloat16(parts):
    "Autocast: F_e keeps F_c's type and, at the start, its bits; a small gamma is not rounded away."
    network, fuse, _ = parts
    coarse, x = random(2, 32, 8, 8), random(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fuse(coarse, network(x)), coarse)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # anew: autocast keeps the weights that it has cast
        fuse.gamma[2].bias.fill_(1e-3)
        torch.testing.assert_close(fuse(coarse, network(x)), 1.001 * coarse, rtol=2e-5, atol=0)
        small = network(x)
    with torch.no_grad():
        full = network(x)
    assert (small - full).square().mean().sqrt() < .05 * full.square().mean().sqrt()


# --- alignment (reading 4) --------------------------------------------------------------------------------------------
@settings(max_examples=10, deadline=None)
@given(st.integers(-2, 2), st.integers(-2, 2))
def test_alignment_moves_whole_pixels(dx, dy):
    align = ResidualAlignment(DETAILS["smoke"], most=.5)
    picture = random(1, 3, 16, 16)
    with torch.no_grad():
        align.unet.last.bias.copy_(torch.atanh(torch.tensor([dx, dy]) / 8.))
        moved = align(picture, picture)
    inner = slice(3, 13)
    torch.testing.assert_close(moved[..., inner, inner], picture.roll((-dy, -dx), (2, 3))[..., inner, inner],
                               rtol=0, atol=1e-4)


def test_alignment_is_bounded(parts):
    align = parts[2]
    torch.nn.init.normal_(align.unet.last.weight, std=100., generator=generator(0))
    moved = align.displacement(random(1, 3, 32, 32), random(1, 3, 32, 32, seed=1))
    assert .05 < moved.abs().max() <= align.most


# --- faults -----------------------------------------------------------------------------------------------------------
def test_residual():
    assert torch.equal(residual_image(torch.ones(1, 3, 4, 4), -torch.ones(1, 3, 4, 4)), torch.full((1, 3, 4, 4), 2.))
    for source, coarse, said in ((torch.ones(1, 3, 4, 4), torch.ones(1, 3, 8, 8), "coarse"),
                                 (torch.ones(1, 3, 4, 4), torch.ones(2, 3, 4, 4), "coarse"),
                                 (torch.ones(1, 3, 4, 5), torch.ones(1, 3, 4, 5), "source")):
        with pytest.raises(InputError, match=said):
            residual_image(source, coarse)


def test_odd_inputs(parts):
    network, fuse, align = parts
    for call, said in ((lambda: network(random(1, 3, 32, 16)), "residual"),
                       (lambda: network(random(1, 1, 32, 32)), "residual"),
                       (lambda: network(random(1, 3, 32, 32), Camera.orbit(0, 0)), "camera must be None"),
                       (lambda: fuse(random(1, 31, 8, 8), random(1, 16, 8, 8)), "coarse"),
                       (lambda: fuse(random(1, 32, 8, 8), random(1, 16, 16, 16)), "residual"),
                       (lambda: fuse(random(1, 32, 8, 8), random(2, 16, 8, 8)), "residual"),
                       (lambda: align(random(1, 3, 32, 32), random(1, 3, 16, 16)), "coarse"),
                       (lambda: DetailNetwork(DETAILS["smoke"], 12), "side"),
                       (lambda: DetailNetwork(DETAILS["smoke"], 64), "side"),
                       (lambda: build_detail(replace(SMOKE, name="own")), "preset"),
                       (lambda: fused_feature(override(SMOKE, "readings.fusion=32")), "readings.fusion")):
        with pytest.raises(InputError, match=said):
            call()


@pytest.mark.parametrize("change,said", [
    (dict(resolution=100), "channels"), (dict(channels=(8,)), "channels"), (dict(heads=3), "heads"),
    (dict(features=0), "at least 1"), (dict(mixing=-1), "at least 1"),
])
def test_odd_sizes(change, said):
    with pytest.raises(InputError, match=said):
        replace(DetailConfig(), **change)
