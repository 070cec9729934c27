"""The prior: losses by hand, rays that agree with pictures, a training that learns, plays, and goes on where it was."""
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.apps.cli import execute, run_notebook
from nofa_nb.core.config import preset
from nofa_nb.core.errors import InputError
from nofa_nb.core.repro import generator
from nofa_nb.core.weights import load_weights
from nofa_nb.data.rays import RaySet, RayWeights, background_distance, collect, ray_directions
from nofa_nb.geometry.cameras import Camera
from nofa_nb.training import prior as P
from nofa_nb.training.loop import Moment, make_fabric, train
from nofa_nb.world.latent import latent
from nofa_nb.world.sets import PortraitSet, SetConfig, person_views

SMOKE = preset("smoke")
CONFIG = SetConfig(replace(SMOKE.world, views=4))
SHORT = dict(log_every=1, sample_every=0)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return collect(PortraitSet(CONFIG, count=6), progress=False)


def log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "/" in k} for line in lines if "evaluation" not in line]


def run(prior, folder, **changes):
    return train(prior, prior.training(**{**SHORT, **changes}), folder, make_fabric(accelerator="cpu"), progress=False)


def play(**changes):
    base = dict(objective="gan", steps=3, batch=2, density_every=2, r1_every=2, raw_first=16)
    return P.PriorStage(**{**base, **changes})


# rays

def test_rays_agree_with_the_pictures_at_their_pixels(data):
    samples, size = range(3, 9), data.size
    batch, index = data.batch(samples, 5, rays=80), data.pick(samples, 5)
    column, row = (batch.uv * size - .5).round().long().unbind(-1)
    camera = Camera.from_label(batch.camera)
    points = camera.position[:, None] + batch.distance.nan_to_num(posinf=1.) * ray_directions(camera, batch.uv)[0]
    depth, pivot = camera.project(points)[1], torch.tensor([0., 0., .2])
    for b, k in enumerate(index):
        p = person_views(int(data.identity[k]), [k % 4], CONFIG)[0]
        at = (slice(None), row[b], column[b])
        torch.testing.assert_close((batch.rgb[b] + 1) * 127.5, p.rgb[at].T.float(), atol=1e-3, rtol=0)
        torch.testing.assert_close(batch.mask[b] * 255, p.mask[at].T.float(), atol=1e-3, rtol=0)
        truth, face, back = p.depth[at][0].float(), batch.mask[b, :, 0] == 1, batch.mask[b, :, 0] == 0
        assert face.sum() > 20 and torch.equal(face, truth.isfinite())
        torch.testing.assert_close(depth[b][face], truth[face], atol=1e-5, rtol=0)  # along the axis, as the world says
        assert ((points[b][back] - pivot).norm(dim=-1) - .5).abs().max() < 1e-4
        assert torch.equal(batch.distance[b, :, 0].isinf(), ~(face | back))
        torch.testing.assert_close(batch.z[b], latent(torch.cat([p.code, p.beta])[None])[0])
        assert torch.equal(batch.camera[b], p.camera)


def test_distance_is_longer_than_depth_away_from_the_middle():
    camera = Camera.orbit(.3, .1)
    stretch = ray_directions(camera, torch.tensor([[[.5, .5], [0., .5], [1., 1.]]]))[1][0, :, 0]
    expected = [1, math.hypot(1, .5 / 4.2647), math.sqrt(1 + 2 * (.5 / 4.2647)**2)]
    torch.testing.assert_close(stretch, torch.tensor(expected))
    assert abs(background_distance(Camera.orbit(0., 0.), torch.tensor([[[.5, .5]]])).item() - 3.) < 1e-5


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 50), st.integers(0, 3), st.sampled_from([0, 8]))
def test_a_sample_is_the_same_in_any_batch(first, seed, patch):
    n = 3
    ids = torch.arange(n)
    g = generator(9)
    rgb, mask = torch.randint(0, 256, (n, 16, 16, 3), generator=g).byte(), torch.full((n, 16, 16), 255).byte()
    images = RaySet(rgb, mask,
                    torch.full((n, 16, 16), 2.7).half(), torch.zeros(n, 5, 4), torch.randn(n, 198, generator=g),
                    Camera.orbit(torch.zeros(n), torch.zeros(n)).label, ids)
    whole = images.batch(range(first, first + 4), seed, 20, patch=patch)
    alone = images.batch(range(first + 2, first + 3), seed, 20, patch=patch)
    assert all(torch.equal(a[2:3], b) for a, b in zip(whole, alone))
    assert sorted(images.pick(range(first * n, first * n + n), seed)) == [0, 1, 2]
    if patch:
        at = (whole.uv[0] * 16 - .5).round().long()
        assert (at.amax(0) - at.amin(0)).tolist() == [7, 7] and len(set(map(tuple, at.tolist()))) == 64
    else:
        assert all(len({tuple(p) for p in uv.tolist()}) == 20 for uv in whole.uv)  # no pixel twice


def test_face_and_its_parts_are_oversampled(data):
    of = lambda *pair: data.weights(torch.tensor([0]), RayWeights(*pair))[0]
    weights, plain = of(3., 4.), of(1., 1.)
    assert set(weights.unique().tolist()) <= {1., 3., 4., 12.} and plain.unique().tolist() == [1.]
    counts = torch.zeros(32, 32)
    k = 0
    for i in (i for i in range(24 * 20) if data.pick(range(i, i + 1), 0) == [k]):
        at = (data.batch(range(i, i + 1), 0, 30).uv[0] * 32).long()
        counts[at[:, 1], at[:, 0]] += 1
    w = data.weights(torch.tensor([k]))[0]
    assert counts[w > 3].mean() > 2 * counts[w == 1].mean() and counts[w == 3].mean() > 1.5 * counts[w == 1].mean()


def test_cache_is_taken_for_its_own_set_only(data, tmp_path):
    data.save(tmp_path / "set.safetensors")
    same = collect(PortraitSet(CONFIG, count=6), tmp_path / "set.safetensors", progress=False)
    assert same.data_hash == data.data_hash and torch.equal(same.rgb, data.rgb) and same.source == data.source
    other = collect(PortraitSet(CONFIG, first=7, count=2), tmp_path / "set.safetensors", progress=False)
    assert other.identity.unique().tolist() == [7, 8]
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "set.safetensors").read_bytes()[:500])
    with pytest.raises(InputError):
        RaySet.load(tmp_path / "cut.safetensors")


class Killed(PortraitSet):
    "Ends at a person."
    def __init__(self, last, **plan):
        super().__init__(CONFIG, **plan)
        self.last, self.rendered = last, []

    def identity(self, index):
        if index == self.last:
            raise KeyboardInterrupt
        self.rendered.append(index)
        return super().identity(index)


def test_rendering_goes_on_where_it_was_killed(data, tmp_path):
    first, second = Killed(5, count=6), Killed(None, count=6)
    with pytest.raises(KeyboardInterrupt):
        collect(first, tmp_path / "set.safetensors", progress=False, chunk=2)
    assert not (tmp_path / "set.safetensors").exists()
    whole = collect(second, tmp_path / "set.safetensors", progress=False, chunk=2)
    assert first.rendered == [0, 1, 2, 3, 4] and second.rendered == [4, 5]
    assert whole.data_hash == data.data_hash and [p.name for p in tmp_path.iterdir()] == ["set.safetensors"]


# losses

def test_losses_by_hand():
    zero = torch.zeros(3, 1)
    for loss in (P.real_loss, P.fake_loss):
        assert loss(zero).item() == pytest.approx(math.log(2))
    assert P.real_loss(zero + 9) < 1e-3 < 8 < P.fake_loss(zero + 9)
    x, w = torch.randn(5, 3, generator=generator(0), requires_grad=True), torch.tensor([[1.], [2], [2]])
    assert P.r1_loss(x @ w, [x], 1.).item() == pytest.approx(4.5)  # |w|^2 / 2
    assert P.r1_loss((x @ w) * 2, [x], 3.).item() == pytest.approx(54.)
    y = torch.zeros(5, 3, requires_grad=True)
    assert P.r1_loss(x @ w + y @ w, [x, y], 1.).item() == pytest.approx(9.)  # both halves of a pair
    assert P.swap_probability(0) == 1 and P.swap_probability(10**6) == .5 and P.swap_probability(5 * 10**5) == .75
    assert [P.blur_sigma(k * 1000) for k in (0, 50, 200, 300)] == [10, 7.5, 0, 0]
    constant = P.density_loss(lambda p, d: (p, torch.full_like(p[..., :1], -3.)), 2, generator(0))
    assert constant == 0 < P.density_loss(lambda p, d: (p, p[..., :1]), 2, generator(0)) < .004
    assert P.lazy(.0025, (0., .99), 16) == dict(lr=.0025 * 16 / 17, betas=(0., .99**(16 / 17)))


def test_blur_keeps_flat_images_and_halves_at_one_sigma():
    flat = torch.ones(1, 3, 40, 40)
    torch.testing.assert_close(P.blur(flat, 2.)[..., 8:-8, 8:-8], flat[..., 8:-8, 8:-8])
    dot = torch.zeros(1, 1, 21, 21)
    dot[0, 0, 10, 10] = 1
    soft = P.blur(dot, 3.)[0, 0]
    assert (soft[10, 13] / soft[10, 10]).item() == pytest.approx(.5)
    assert (soft[7, 13] / soft[10, 10]).item() == pytest.approx(.25)
    assert P.blur(dot, 0.) is dot


def test_samples_near_the_known_distance_sharpen_what_is_seen():
    def slab(p, d):
        return torch.full_like(p, .5), torch.where(p[..., 2:] < 0, 1e5, -20.)
    o, d = torch.tensor([0., 0, 2.7]).expand(1, 100, 3), torch.tensor([0., 0, -1]).expand(1, 100, 3)
    known = torch.full((1, 100, 1), 2.7)
    renderer = replace(P.build_generator(SMOKE.generator).renderer, depth_coarse=6)
    both = known, known * torch.inf
    near, blind = (P.trace_known(slab, renderer, o, d, k, generator(0), 4, .02).depth for k in both)
    assert (near - 2.7).abs().mean() < .5 * (blind - 2.7).abs().mean()


def test_scores_of_truth_are_perfect(data, monkeypatch):
    model = P.build_generator(P.with_mask(SMOKE.generator))
    truth = P.truth_of(data)
    monkeypatch.setattr(P, "draw", lambda *a: P.Views(truth.image, truth.mask, truth.distance.nan_to_num(posinf=3.)))
    scores = P.score(model, data)
    assert (scores["psnr"] > 99).all() and (scores["mask_iou"] == 1).all() and (scores["depth_l1"] == 0).all()
    assert abs(scores["ssim"] - 1).max() < 1e-5
    away = truth.distance.nan_to_num(posinf=3.) + .1
    monkeypatch.setattr(P, "draw", lambda *a: P.Views(1 - truth.image, 1 - truth.mask, away))
    worse = P.score(model, data)
    assert (worse["psnr"] < 20).all() and (worse["mask_iou"] < .1).all() and abs(worse["depth_l1"] - .1).max() < 1e-3


# training

def test_it_learns(data, tmp_path):
    stage = replace(P.STAGES["smoke"], steps=120, warm_up=5)
    done = run(P.Prior(stage, SMOKE.generator, data, data), tmp_path, evaluate_every=120)
    lines = log(tmp_path)
    def colour(part):
        return sum(r["generator/l1"] + r["generator/l2"] for r in part) / len(part)
    assert colour(lines[-10:]) < .7 * colour(lines[:5])
    assert all(lines[-1][k] < lines[0][k] for k in ("generator/mask", "generator/image"))
    assert done.modules["generator"].backbone.mapping.w_avg.abs().max() > 0  # the path of the average code
    found = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][-1]["evaluation"]
    assert set(found) == {"psnr", "psnr_mask", "ssim", "depth_l1", "mask_iou", "psnr_eyes_mouth"}
    assert found["psnr"] > 8


def test_resumed_is_the_same_curve(data, tmp_path):
    stage = play(objective="warm+gan", steps=4, rays=24, near=2, adversarial_from=.5)
    run(P.Prior(stage, SMOKE.generator, data), tmp_path / "whole")
    fabric, slices, finished = make_fabric(accelerator="cpu"), 0, False
    while not finished:  # each call does one step, with new networks
        prior = P.Prior(stage, SMOKE.generator, data)
        training = prior.training(**SHORT)
        finished = train(prior, training, tmp_path / "slices", fabric, max_seconds=0, progress=False).finished
        slices += 1
    assert slices == 4
    for a, b in zip(log(tmp_path / "whole"), log(tmp_path / "slices"), strict=True):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], abs=1e-6) for k in a)


EG3D = replace(SMOKE.generator, label_dim=25, z_dim=12)  # conditioned on the camera, dual discrimination
PLAIN = replace(SMOKE.generator, super_resolution="none", raw_resolution=32)


@pytest.mark.parametrize("config", [EG3D, PLAIN])
def test_the_game_is_played(config, data, tmp_path):
    prior = P.Prior(play(style_mixing=.9), config, data)
    before = {name: {k: p.clone() for k, p in m.named_parameters()} for name, m in prior.modules().items()}
    run(prior, tmp_path)
    lines = log(tmp_path)
    assert [("generator/density" in r) + ("discriminator/r1" in r) for r in lines] == [2, 0, 2]
    assert all({"generator/fool", "discriminator/fake", "discriminator/real"} <= set(r) for r in lines)
    assert all(math.isfinite(v) for r in lines for v in r.values()) and lines[0]["discriminator/r1"] > 0
    for name, module in prior.modules().items():
        moved = [k for k, p in module.named_parameters() if not torch.equal(p, before[name][k])]
        assert len(moved) > .8 * len(before[name]), name


def test_each_update_moves_its_own_network_only(data):
    prior = P.Prior(play(), SMOKE.generator, data)
    optimisers, moment = prior.optimisers(), Moment(0, 0, generator(0))
    held = {name: {p for group in o.param_groups for p in group["params"]} for name, o in optimisers.items()}
    assert not held["generator"] & held["discriminator"]
    assert len(held["generator"]) == len(list(prior.generator.parameters()))
    kept = {k: b.clone() for k, b in prior.generator.named_buffers() if not k.endswith("w_avg")}
    seen = []
    for name, losses in prior.step(prior.data(range(2), 0), moment):
        seen.append((name, *losses))
        if name == "discriminator":  # fakes come without the generator's graph
            total, theirs = sum(losses.values()), list(prior.generator.parameters())
            grads = torch.autograd.grad(total, theirs, allow_unused=True, retain_graph=True)
            assert all(g is None for g in grads)
    d = "discriminator"
    assert seen == [("generator", "fool"), ("generator", "density"), (d, "fake", "real"), (d, "r1")]
    fixed = [torch.equal(b, kept[k]) for k, b in prior.generator.named_buffers() if k in kept]
    assert fixed and all(fixed)  # filters and stored noise
    assert "discriminator" not in P.Prior(P.STAGES["smoke"], SMOKE.generator, data).modules()


def test_low_precision_planes_are_close_and_have_gradients():
    model = P.build_generator(preset("small").generator)
    ws = model.map(latent(torch.randn(2, 198, generator=generator(0))))
    low, exact = P.low_planes(model, ws), model.planes(ws)
    assert 0 < (low - exact).std() < .02 * exact.std()
    low.square().mean().backward()
    grads = [p.grad for k, p in model.backbone.named_parameters() if not k.endswith("noise_strength")]
    assert all(g is not None and g.isfinite().all() for g in grads)


def test_refusals(data):
    for bad in (dict(objective="gans"), dict(steps=0), dict(swap_end=2.)):
        with pytest.raises(InputError):
            P.PriorStage(**bad)
    with pytest.raises(InputError, match="276"):
        P.Prior(P.STAGES["smoke"], replace(SMOKE.generator, z_dim=64), data)
    with pytest.raises(InputError, match="64 px"):
        P.Prior(P.STAGES["small"], preset("small").generator, data)
    with pytest.raises(InputError, match="rays"):
        data.batch(range(2), 0, rays=5000)


def test_the_notebook_goes_on_from_weights(tmp_path):
    notebook, tiny = run_notebook("train_prior"), dict(images=2, views=1, validation=2, steps=1, out=".")
    execute(notebook, tmp_path / "first", dict(tiny, save="../weights"), progress=False)
    still = dict(tiny, before="../weights", recipe="warm_lr=0 matrix_lr=0 grow=", seed=1, save="../same")
    execute(notebook, tmp_path / "then", still, progress=False)
    (first, card), (then, told) = (load_weights(tmp_path / name) for name in ("weights", "same"))
    assert {k for k, t in first.items() if not torch.equal(t, then[k])} <= {"backbone.mapping.w_avg"}
    assert told["recipe"] == {"at first": card["recipe"], "then": {**card["recipe"], "warm_lr": 0.}}
    with pytest.raises(Exception, match="before must be weights of a generator of small's sizes"):
        execute(notebook, tmp_path / "other", dict(tiny, preset="small", before="../weights"), progress=False)
