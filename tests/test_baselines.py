"""Baselines: the loop's shape, NOFA++'s steps, the mechanism of each, weights that come back."""
import copy
import inspect
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nofa_nb.baselines import facevid2vid, nofa
from nofa_nb.baselines.protocol import (
    BUDGETS,
    METHODS,
    Budget,
    Driving,
    Lesson,
    Pair,
    build_baseline,
    load_baseline,
    save_baseline,
)
from nofa_nb.core.config import override, preset
from nofa_nb.core.errors import InputError
from nofa_nb.core.repro import generator
from nofa_nb.data.videos import collect_clips
from nofa_nb.geometry.cameras import Camera
from nofa_nb.layers.stylegan import initial_weights
from nofa_nb.models.avatar import build_avatar_model
from nofa_nb.training import deformation, detail, hybrid, reconstruction
from nofa_nb.training.loop import Stage, Training, make_fabric, train
from nofa_nb.world.clips import ClipSet

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = [f"generator.{x}" for x in ("image_resolution=16", "raw_resolution=16", "depth_coarse=4", "depth_fine=0")]
FLAT = override(preset("smoke"), "generator.super_resolution=none", *TINY)


def absolute(a, b):
    return (a - b).abs().flatten(1).mean(1)


def photos(n, size, seed=0):
    return torch.rand(n, 3, size, size, generator=generator(seed)) * 2 - 1


def driving(image, seed=1):
    beta = torch.rand(len(image), 52, generator=generator(seed)) * .3
    return Driving(image, beta, Camera.orbit(torch.linspace(-.2, .2, len(image))))


@pytest.fixture(scope="module")
def videos():
    return collect_clips(ClipSet("train", identities=2, clips=1, frames=4, size=32), stride=8, progress=False)


# the contract with training, which baselines do not import

def test_a_lesson_has_the_shape_of_a_stage():
    "What `training.loop.train` calls, with the same arguments; but `training`, which names a class of the loop."
    def public(kind):
        found = {n: f for n, f in inspect.getmembers(kind, inspect.isfunction) if n[0] != "_"}
        return {n: [*inspect.signature(f).parameters] for n, f in found.items()}
    wanted, there = public(Stage), public(Lesson)
    assert wanted.pop("training")
    assert {n: there.get(n) for n in wanted} == wanted
    assert {"stage", "config", "data_hash"} <= set(vars(Lesson(Budget(1, 1), facevid2vid.build("smoke"), None, "none")))


@pytest.mark.parametrize("name", BUDGETS)
def test_a_baseline_has_as_many_steps_as_nofa_plus_plus(name):
    r, d, m, h = (stage.STAGES[name] for stage in (reconstruction, detail, deformation, hybrid))
    synthetic, video = BUDGETS[name]["synthetic"], BUDGETS[name]["video"]
    assert (synthetic.steps, video.steps) == (r.steps + d.steps, m.steps + h.steps)
    assert (synthetic.batch, video.batch) == (r.batch, m.batch) and (video.apart, video.far) == (m.apart, m.far)
    for mine, theirs in ((synthetic, r), (video, m)):
        assert (mine.warm_up, mine.end, mine.ema_half_life) == (theirs.warm_up, theirs.end, theirs.ema_half_life)


def test_the_rate_is_the_stages(videos):
    budget = Budget(40, 2, 8, .1)
    settings = deformation.DeformationStage(steps=40, warm_up=8, end=.1, w_shape=0)
    stage = deformation.Deformation(settings, build_avatar_model(FLAT), videos, absolute, object())
    for step in (0, 3, 7, 20, 39):
        assert budget.rate(step) == pytest.approx(stage.rate("model", step))


# doors and files

@pytest.mark.parametrize("method", METHODS)
def test_one_photo_many_drivers_and_files(method, tmp_path):
    model = build_baseline(method, "smoke", seed=3).eval()
    image, drive = photos(1, 32), driving(photos(3, 32, 1))
    alpha = torch.randn(1, 100, generator=generator(2))

    def driven(m):
        with torch.no_grad():
            state = m.reconstruct(image, Camera.orbit(.1), alpha)
            one = m.drive(state, Driving(drive.image[1:2], drive.beta[1:2], drive.camera[1]))
            return m.drive(state, drive), one
    many, one = driven(model)
    assert many.shape == (3, 3, 32, 32)
    torch.testing.assert_close(many[1:2], one, atol=1e-4, rtol=1e-4)
    record = {"licence": "Apache-2.0"}
    save_baseline(tmp_path / "w", model, record)
    again = load_baseline(method, tmp_path / "w")
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    torch.testing.assert_close(driven(again)[0], many, atol=.02, rtol=0)  # 16 bits
    other = METHODS[1 - METHODS.index(method)]
    with pytest.raises(InputError, match=f"baseline {other}, got baseline {method}"):
        load_baseline(other, tmp_path / "w")


# NOFA

def test_compensation_is_zero_at_the_start_and_is_added(tmp_path):
    model = nofa.build(FLAT, seed=1).eval()
    image, alpha = photos(2, 16), torch.zeros(2, 100)
    with torch.no_grad():
        start = model.reconstruct(image, Camera.orbit(torch.zeros(2)), alpha)
        assert torch.equal(start.planes, start.coarse_planes)
        nn.init.normal_(model.fusion.last.weight, std=.1, generator=generator(0))
        later = model.reconstruct(image, Camera.orbit(torch.zeros(2)), alpha)
        added = later.planes - start.planes
    assert torch.equal(later.coarse_planes, start.coarse_planes) and added.abs().mean() > 1e-3
    torch.testing.assert_close(added, model.compensation(later.feature).detach(), atol=1e-5, rtol=1e-4)


def test_nofa_shares_generator_and_deformation_with_nofa_plus_plus():
    ours, theirs = build_avatar_model(FLAT, seed=4), nofa.build(FLAT, seed=4)
    for part in ("generator", "deformation"):
        a, b = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    ws = torch.randn(1, 6, 32, generator=generator(0))
    torch.testing.assert_close(ours.coarse(ws).planes, theirs.coarse(ws).planes)


def test_fine_tuning_fits_the_photo_and_leaves_the_model():
    model = nofa.build(FLAT, seed=2).eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        avatar = model.reconstruct(photos(2, 16), Camera.orbit(torch.zeros(2)), torch.zeros(2, 100), torch.zeros(2, 52))
    tuned = nofa.fine_tune(model, avatar[0], absolute, nofa.Tuning(12, 0., 3e-3), progress=False)
    again = nofa.fine_tune(model, avatar[0], absolute, nofa.Tuning(12, 0., 3e-3), progress=False)
    assert len(tuned.losses) == 13 and tuned.losses[-1] < tuned.losses[0] - .01
    assert tuned.losses == again.losses and torch.equal(tuned.avatar.planes, again.avatar.planes)
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    assert torch.equal(tuned.avatar.alpha, avatar[0].alpha) and not torch.equal(tuned.avatar.planes, avatar[0].planes)
    with pytest.raises(InputError, match="one face"):
        nofa.fine_tune(model, avatar, absolute)
    with pytest.raises(InputError, match="0 for a generator with super-resolution"):
        nofa.fine_tune(nofa.build("smoke"), avatar[0], absolute, nofa.Tuning(2, window=8))
    both = model.tune(avatar, absolute, progress=False)
    assert len(both) == 2 and not torch.equal(both.planes[1], avatar.planes[1])


def test_the_papers_fine_tuning_takes_about_twenty_minutes():
    assert nofa.TUNINGS["paper"].seconds == 20 * 60
    assert all(t.seconds == 0 for name, t in nofa.TUNINGS.items() if name != "paper")  # steps alone: repeatable


# Face-vid2vid

ANGLES = st.lists(st.floats(-1.2, 1.2), min_size=3, max_size=3)


def motion(angles, shift=(0., 0., 0.), k=7):
    return facevid2vid.Motion(torch.tensor([angles]), torch.tensor([shift]), torch.zeros(1, k, 3))


@settings(max_examples=25, deadline=None)
@given(ANGLES, ANGLES)
def test_keypoints_follow_the_rotation(angles, shift):
    points = torch.randn(1, 7, 3, generator=generator(0))
    found = facevid2vid.moved(points, motion(angles, shift))
    R = facevid2vid.turn(torch.tensor([angles]))[0]
    torch.testing.assert_close(found[0], points[0] @ R.T + torch.tensor(shift), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(points, points), atol=2e-3, rtol=0)  # rigid
    assert abs(float(torch.linalg.det(R)) - 1) < 1e-4


@settings(max_examples=25, deadline=None)
@given(st.floats(-1, 1), st.floats(-.4, .4))
def test_the_head_turns_as_the_camera_says(yaw, pitch):
    camera = Camera.orbit(yaw, pitch)
    points = torch.randn(1, 7, 3, generator=generator(1))
    seen = (points - camera.position[:, None]) @ camera.rotation
    angles = facevid2vid.head_angles(camera.label)
    said = facevid2vid.moved(points * torch.tensor(facevid2vid.FLIP), motion(angles[0].tolist()))
    rest = seen - said
    torch.testing.assert_close(rest, rest.mean(1, keepdim=True).expand_as(rest), atol=1e-4, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(0, 99))
def test_identity_keypoints_return_the_source(k, seed):
    g = generator(seed)
    volume, points = torch.randn(2, 3, 4, 6, 6, generator=g), torch.rand(2, k, 3, generator=g) - .5
    where = facevid2vid.proposals(points, points, torch.eye(3).expand(2, 3, 3), 4, 6)
    weights = torch.randn(2, k + 1, 4, 6, 6, 1, generator=g).softmax(1)
    torch.testing.assert_close(facevid2vid.warp(volume, (weights * where).sum(1)), volume, atol=1e-4, rtol=0)
    pushed = facevid2vid.proposals(points, points + .3, torch.eye(3).expand(2, 3, 3), 4, 6)
    assert (facevid2vid.warp(volume, pushed[:, 1]) - volume).abs().mean() > .1
    torch.testing.assert_close(facevid2vid.warp(volume, pushed[:, 0]), volume, atol=1e-4, rtol=0)  # background


def test_a_turned_head_fetches_from_where_it_was():
    "A quarter turn about the view axis: the proposal of a keypoint at the centre is the grid, turned back."
    centre = torch.zeros(1, 1, 3)
    quarter = facevid2vid.turn(torch.tensor([[0., 0., torch.pi / 2]]))
    where = facevid2vid.proposals(centre, centre, quarter.mT, 2, 4)[0, 1]
    volume = torch.arange(16.).reshape(1, 1, 1, 4, 4).expand(1, 1, 2, 4, 4).contiguous()
    found = facevid2vid.warp(volume, where[None])[0, 0, 0]
    assert any(torch.allclose(found, volume[0, 0, 0].rot90(k), atol=1e-4) for k in (1, 3))


def test_driving_reads_the_frame_and_nothing_else():
    model = facevid2vid.build("smoke").eval()
    image = photos(2, 32)
    with torch.no_grad():
        face = model.reconstruct(image[:1])
        one = model.drive(face, driving(image, 1))
        two = model.drive(face, driving(image, 2)._replace(camera=Camera.orbit(torch.ones(2))))
        other = model.drive(face, driving(image.flip(0)))
    assert torch.equal(one, two) and not torch.equal(one, other)
    with pytest.raises(InputError, match="driving frames"):
        model.drive(face, driving(image)._replace(image=None))
    with pytest.raises(InputError, match="sizes of this compact version"):
        facevid2vid.build("paper")


def test_a_lesson_goes_on_where_it_was_killed(videos, tmp_path):
    def batch(samples, seed):
        return Pair.frames(videos.pairs(samples, seed, 1))

    def lesson():
        model = facevid2vid.build("smoke", seed=5)
        return facevid2vid.Vid2VidLesson(Budget(5, 2, ema_half_life=.01), model, batch, videos.data_hash, absolute,
                                         batch(range(2), 1))
    def run(stage, folder, **more):
        t = Training(**stage.rhythm(), log_every=1, sample_every=0, save_every=1)
        return train(stage, t, folder, make_fabric(accelerator="cpu"), progress=False, **more)
    whole = run(lesson(), tmp_path / "a")
    while not (cut := run(lesson(), tmp_path / "b", max_seconds=.01)).finished:
        pass
    for name in ("baseline", "adversary"):
        a, b = whole.modules[name].state_dict(), cut.modules[name].state_dict()
        assert all(torch.equal(a[k], b[k]) for k in a)
    text = (tmp_path / "a" / "log.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in text]
    assert "adversary/hinge" not in lines[0] and "adversary/hinge" in lines[-1]


def test_the_adversary_does_not_teach_the_method_to_be_judged(videos):
    "The adversary's own step leaves no gradient in the method, the method's none in the adversary's optimiser."
    pair = Pair.frames(videos.pairs(range(2), 0, 1))
    with initial_weights(0):
        lesson = facevid2vid.Vid2VidLesson(Budget(4, 2), facevid2vid.build("smoke"), None, "none", absolute)
    moment = type("Moment", (), {"step": 3, "generator": generator(0)})
    phases = dict(lesson.step(pair, moment))
    held = [*lesson.baseline.parameters()]
    grads = torch.autograd.grad(sum(phases["adversary"].values()), held, allow_unused=True)
    assert all(g is None for g in grads)
    grads = torch.autograd.grad(sum(phases["baseline"].values()), held, allow_unused=True)
    assert sum(g is not None and bool(g.any()) for g in grads) > .9 * len(held)
