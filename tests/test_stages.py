"""Stages: windows of pictures, losses that fall, parts that stay and parts that move, weights handed on, adaptation."""
import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nofa_nb.core.config import override, preset
from nofa_nb.core.errors import InputError
from nofa_nb.core.repro import generator
from nofa_nb.data.synthetic3d import SyntheticPlan, SyntheticSet, collect_synthetic
from nofa_nb.data.videos import collect_clips
from nofa_nb.geometry.cameras import Camera
from nofa_nb.geometry.rays import rays
from nofa_nb.layers.stylegan import initial_weights
from nofa_nb.models.avatar import build_avatar_model
from nofa_nb.training import adaptation, common, deformation, detail, hybrid, reconstruction
from nofa_nb.training.loop import Moment, make_fabric, train
from nofa_nb.world.clips import ClipSet
from nofa_nb.world.head import load_head

TINY = [f"generator.{x}" for x in ("image_resolution=16", "raw_resolution=16", "depth_coarse=4", "depth_fine=0")]
FLAT = override(preset("smoke"), "generator.super_resolution=none", *TINY)
SHORT = dict(steps=2, batch=2, lr=1e-3)
pytestmark = pytest.mark.usefixtures("one_thread")


def absolute(a, b):
    return (a - b).abs().flatten(1).mean(1)


class Recogniser(nn.Module):
    def __init__(self):
        super().__init__()
        with initial_weights(4):
            self.layer = nn.Linear(3, 5)

    def forward(self, crop):
        return self.layer(crop.mean((2, 3)))


@pytest.fixture(scope="module")
def pairs():
    teacher = build_avatar_model(FLAT, seed=2).generator
    return collect_synthetic(teacher, SyntheticPlan("world", count=4), progress=False)


@pytest.fixture(scope="module")
def videos():
    return collect_clips(ClipSet("train", identities=2, clips=1, frames=4, size=16), stride=8, progress=False)


def run(stage, folder, **changes):
    return train(stage, stage.training(**{**dict(log_every=1, sample_every=0), **changes}), folder,
                 make_fabric(accelerator="cpu"), progress=False)


def adapt(model, avatar, *args, steps, **changes):
    settings = adaptation.AdaptationStage(**{**dict(steps=steps), **changes})
    return adaptation.adapt(model, avatar, *args, perceptual=absolute, stage=settings, progress=False)


def lines(folder):
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in found if "evaluation" not in line]


def changed(before, after):
    "Names of parameters and buffers that are not bit-equal."
    after = after.state_dict()
    return {k for k, t in before.state_dict().items() if not torch.equal(t, after[k])}


def parts(names):
    return {name.split(".")[0] for name in names}


def stages(name, model, pairs, videos, **changes):
    s = {**SHORT, **changes}
    if name == "reconstruction":
        return reconstruction.Reconstruction(reconstruction.ReconstructionStage(**s), model, pairs, absolute, pairs)
    if name == "detail":
        return detail.Detail(detail.DetailStage(**s), model, pairs, absolute, pairs)
    F = Recogniser()
    if name == "deformation":
        s = {**dict(w_shape=1., apart=1), **s}
        face, s = load_head(), deformation.DeformationStage(**s)
        return deformation.Deformation(s, model, videos, absolute, F, face, videos, measured=2)
    s = hybrid.HybridStage(**{**dict(apart=1), **s})
    return hybrid.Hybrid(s, model, pairs, videos, absolute, F, videos, measured=2)


# windows

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.integers(1, 16), st.integers(0, 9))
def test_a_window_is_a_part_of_the_picture(first, side, seed):
    window = common.random_window(range(first, first + 3), seed, 16, side)
    camera = Camera.orbit(torch.tensor([0., .5, -.4]), torch.tensor([0., -.2, .1]))
    whole = rays(camera, 16, 16)[1].mT.unflatten(2, (16, 16))
    there = rays(window.look(camera), side, side)[1].mT.unflatten(2, (side, side))
    torch.testing.assert_close(window.cut(whole), there, atol=2e-6, rtol=0)
    again = common.random_window(range(first + 1, first + 2), seed, 16, side)
    assert torch.equal(again.corner, window.corner[1:2])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(.05, .6), min_size=2, max_size=2), st.integers(0, 99))
def test_a_window_on_a_part_holds_its_box(low, first):
    boxes = torch.tensor(low + [x + .3 for x in low]).expand(4, 3, 4)
    window, part = common.window_on_part(range(first, first + 4), 1, boxes, 64, 32)
    assert (window.corner >= 0).all() and (window.corner <= 32).all()
    inside = window.boxes(boxes)[torch.arange(4), part]
    size = (inside[:, 2:] - inside[:, :2]) / 64
    torch.testing.assert_close(size, torch.full((4, 2), .3), atol=1e-5, rtol=0)  # nothing is cut off


def test_windows_and_whole_pictures_take_turns(pairs, videos):
    model = build_avatar_model(FLAT)
    for name in ("reconstruction", "detail", "deformation"):
        stage = stages(name, model, pairs, videos, window=8, whole_every=3)
        sides = [stage.data(range(2 * k, 2 * k + 2), 0)[1].side for k in range(7)]
        assert sides == [16, 8, 8, 16, 8, 8, 16]
    stage = stages("hybrid", model, pairs, videos, window=8, whole_every=2)
    sides = [stage.data(range(2 * k, 2 * k + 2), 0)[1].side for k in range(9)]
    assert sides == [16, 8, 16, 16, 8, 8, 16, 8, 16]  # v v s, v v s, v v s: every second of its kind


# the baked deformation

@pytest.mark.parametrize("name, step", [("deformation", 0), ("hybrid", 0), ("hybrid", 2)])  # hybrid: a video, a pair
def test_a_fine_lattice_costs_what_the_exact_deformation_does(name, step, pairs, videos):
    model, g = build_avatar_model(FLAT), generator(3)
    with torch.no_grad():
        for p in model.deformation.parameters():
            p.add_(.1 * torch.randn(p.shape, generator=g))

    def cost(lattice):
        stage = stages(name, model, pairs, videos, lattice=lattice)
        _, losses = next(stage.step(stage.data(range(2 * step, 2 * step + 2), 0), Moment(step, 2 * step, generator(0))))
        return sum(v for k, v in losses.items() if k.endswith("l2"))

    exact, coarse, fine = cost(0), cost(2), cost(24)
    assert 0 < (fine - exact).abs() < .02 * exact and (fine - exact).abs() < (coarse - exact).abs()
    fine.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.deformation.d_net.parameters())


# what trains

FIXED = {"reconstruction": {"generator", "detail", "fusion", "deformation"},
         "detail": {"generator", "encoder", "deformation"}, "deformation": set(), "hybrid": set()}


@pytest.mark.parametrize("name", FIXED)
def test_frozen_parts_are_bit_equal_and_the_others_move(name, pairs, videos, tmp_path):
    model = build_avatar_model(FLAT, seed=1)
    before, steps = copy.deepcopy(model), 6 if name == "hybrid" else 3
    stage = stages(name, model, pairs, videos, steps=steps)
    judges = copy.deepcopy(nn.ModuleList(stage.helpers()))
    outcome = run(stage, tmp_path)
    moved = changed(before, model)
    assert parts(moved) == set(common.parts_of(model)) - FIXED[name] == set(stage.parts)
    assert not changed(judges, nn.ModuleList(stage.helpers()))
    still = {k for k in dict(model.named_parameters()) if k.split(".")[0] in stage.parts} - moved
    assert all("mapping" in k or "noise_strength" in k for k in still), still
    assert all("w_avg" not in k and "noise_const" not in k and "filter" not in k for k in moved)
    averages = common.assembled(model, outcome.modules)
    for part in stage.parts:
        assert getattr(averages, part) is not getattr(model, part)
    for part in FIXED[name]:
        assert getattr(averages, part) is getattr(model, part)


@pytest.mark.parametrize("name", ["reconstruction", "detail", "deformation"])
@pytest.mark.parametrize("window", [0, 8])
def test_the_loss_falls_on_one_batch(name, window, pairs, videos):
    model = build_avatar_model(FLAT, seed=1)
    more = dict(lr=1e-3, w_shape=0.) if name == "deformation" else dict(lr=3e-3)
    stage = stages(name, model, pairs, videos, window=window, **more)
    batch = stage.data(range(2), 0)
    optimiser, totals = stage.optimisers()["model"], []
    for _ in range(8):
        (_, losses), = stage.step(batch, Moment(5, 10, generator(0)))  # the same samples along the rays each time
        total = sum(v for v in losses.values() if v.requires_grad)
        totals.append(float(total.detach()))
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    assert all(map(math.isfinite, totals)) and min(totals[-2:]) < .9 * totals[0], totals


def test_reconstruction_starts_with_codes(pairs, videos, tmp_path):
    stage = stages("reconstruction", build_avatar_model(FLAT, seed=1), pairs, videos, steps=6, regress=.5)
    run(stage, tmp_path)
    told = [{k for k in line if k.startswith("model/")} for line in lines(tmp_path)]
    assert all("model/codes" in t and "model/l2" not in t for t in told[:3])
    assert all("model/codes" not in t and {"model/l2", "model/lpips", "model/depth"} <= t for t in told[3:])
    batch = stage.data(range(2), 0)
    (_, losses), = stage.step(batch, Moment(0, 0, generator(0)))
    found, truth = stage.model.encode(batch[0].image[:, 0]), batch[0].ws
    torch.testing.assert_close(losses["codes"], (found - truth).square().mean())


def test_a_teacher_scores_perfectly_on_its_own_pairs():
    model = build_avatar_model(FLAT, seed=1)
    own = collect_synthetic(model.generator, SyntheticPlan("world", count=2), progress=False)
    stage = stages("reconstruction", model, own, None)
    model.encode = lambda image: own.ws[[k for k in (0, 1) if torch.equal(image[0], stage.held_out.image[k, 0])]]
    with torch.no_grad():
        found = stage.scores(model)
    assert min(found["psnr_source"], found["psnr_target"]) > 45 and found["codes"] == 0 and found["depth_l1"] < 1e-3


def test_shape_alone_leaves_all_but_the_deformation(pairs, videos, tmp_path):
    model = build_avatar_model(FLAT, seed=1)
    before = copy.deepcopy(model)
    run(stages("deformation", model, pairs, videos, steps=4, shape_only=1.), tmp_path)
    assert parts(changed(before, model)) == {"deformation"}
    assert all(set(line) & {"model/shape"} and "model/rec_l2" not in line for line in lines(tmp_path))


def test_gain_is_the_deformations_alone(pairs, videos):
    stage = stages("deformation", build_avatar_model(FLAT), pairs, videos, deformation_gain=5.)
    others, mine = stage.optimisers()["model"].param_groups
    assert {*mine["params"]} == {*stage.model.deformation.parameters()} and mine["lr"] == 5 * others["lr"]


def test_muons_rate_has_the_deformations_gain_too(pairs, videos):
    wide = override(FLAT, "deformation.deform_width=32")
    groups = {}
    for gain in (1., 5.):
        stage = stages("deformation", build_avatar_model(wide), pairs, videos, matrix_lr=.01, deformation_gain=gain)
        groups[gain] = stage.optimisers()["model"].param_groups
    mine = {*stages("deformation", build_avatar_model(wide), pairs, videos).model.deformation.parameters()}
    of_field = len([*mine])
    for one, five in zip(groups[1.], groups[5.]):
        assert one["matrices"] == five["matrices"] and five["lr"] / one["lr"] in (pytest.approx(1), pytest.approx(5))
    grown = [g for one, g in zip(groups[1.], groups[5.]) if g["lr"] > 2 * one["lr"]]
    assert sum(len(g["params"]) for g in grown) == of_field and any(g["matrices"] for g in grown)


def test_shape_alone_has_a_cosine_of_its_own(pairs, videos):
    lengths = dict(steps=40, shape_only=.5, end=.1, warm_up=0)
    stage = stages("deformation", build_avatar_model(FLAT), pairs, videos, **lengths)
    rates = [stage.rate("model", k) for k in range(40)]
    assert rates[:20] == rates[20:] and rates[0] == 1 and rates[19] < .12
    assert sorted(rates[:20], reverse=True) == rates[:20]


def test_the_whole_picture_has_all_terms_and_a_window_one_part(pairs, videos):
    stage = stages("deformation", build_avatar_model(FLAT, seed=1), pairs, videos, window=8, whole_every=2, w_shape=0.)
    told = []
    for k in (0, 1):
        (_, losses), = stage.step(stage.data(range(2 * k, 2 * k + 2), 0), Moment(k, 2 * k, generator(0)))
        told.append(set(losses) - {"psnr"})
    images = {"rec_l2", "rec_lpips", "bbox_l2", "bbox_lpips"}
    assert told == [images | {"id"}, images]


# hybrid

@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(1, 60))
def test_turns_count_each_kind_on_its_own(every, steps):
    turns = [hybrid.turn(k, every) for k in range(steps)]
    for kind in ("video", "synthetic"):
        assert [n for t, n in turns if t == kind] == list(range(sum(t == kind for t, _ in turns)))
    assert sum(t == "synthetic" for t, _ in turns) == steps // (every + 1)


def test_hybrid_moves_what_the_paper_says(pairs, videos, tmp_path):
    model = build_avatar_model(FLAT, seed=1)
    stage = stages("hybrid", model, pairs, videos, steps=9)
    seen = [copy.deepcopy(model)]
    step = stage.step

    def watched(batch, moment):
        yield from step(batch, moment)
        seen.append(copy.deepcopy(model))

    stage.step = watched
    run(stage, tmp_path)
    moves = [parts(changed(a, b)) for a, b in zip(seen, seen[1:])]
    for k, moved in enumerate(moves):
        assert moved == {"deformation"} if k % 3 != 2 else {"generator", "encoder", "fusion"} <= moved, (k, moved)
    kinds = [{k.split("/")[0] for k in line if "/" in k} for line in lines(tmp_path)]
    assert kinds == [{"video"}, {"video"}, {"synthetic"}] * 3
    others = ("rate", "gradient", "psnr")
    terms = [{k for k in line if "/" in k and k.split("/")[1] not in others} for line in lines(tmp_path)[:3]]
    assert terms[0] == {"video/bbox_l2", "video/bbox_lpips", "video/id"}
    assert terms[2] == {"synthetic/l2", "synthetic/lpips", "synthetic/depth"}


def test_hybrid_reads_its_readings(pairs, videos, tmp_path):
    readings = "readings.hybrid_trains=all_but_generator", "readings.synthetic_render=canonical"
    model = build_avatar_model(override(FLAT, *readings), seed=1)
    before, stage = copy.deepcopy(model), stages("hybrid", model, pairs, videos, steps=3)
    run(stage, tmp_path)
    assert "generator" not in parts(changed(before, model)) and "encoder" in parts(changed(before, model))
    alone = copy.deepcopy(model)
    batch = stage.data(range(4, 6), 0)
    sum(v for v in stage.synthetic_step(*batch, Moment(2, 4, generator(0))).values() if v.requires_grad).backward()
    assert all(p.grad is None for p in model.deformation.parameters()) and not changed(alone, model)
    unknown = SyntheticSet(**{**pairs.tensors(), "beta": pairs.beta[:, :0]})
    with pytest.raises(InputError, match="synthetic"):
        stages("hybrid", build_avatar_model(FLAT), unknown, videos)


# weights handed on

def test_stages_hand_on_their_averages_and_go_on(pairs, videos, tmp_path):
    model = build_avatar_model(FLAT, seed=1)
    first = stages("reconstruction", model, pairs, videos, steps=3, ema_half_life=.004)
    outcome = run(first, tmp_path / "a")
    second = build_avatar_model(FLAT, seed=7)
    common.read_parts(second, tmp_path / "a")
    assert not changed(outcome.modules["encoder"], second.encoder) and changed(model.encoder, second.encoder)
    assert not changed(model.generator, second.generator)
    stage = stages("detail", second, pairs, videos)
    assert run(stage, tmp_path / "b").finished
    third = build_avatar_model(FLAT, seed=8)
    common.read_parts(third, tmp_path / "b", only=["fusion"])
    assert changed(third.encoder, second.encoder) and changed(third.fusion, build_avatar_model(FLAT, seed=8).fusion)
    with pytest.raises(InputError, match="earlier stage"):
        common.read_parts(third, tmp_path / "c")
    with pytest.raises(InputError, match="only"):
        common.read_parts(third, tmp_path / "b", only=["nose"])


def test_a_killed_stage_goes_on_as_if_it_had_not_been(pairs, videos, tmp_path):
    models = [build_avatar_model(FLAT, seed=1) for _ in range(2)]
    run(stages("hybrid", models[0], pairs, videos, steps=5), tmp_path / "whole")
    for seconds in (1e-4, None):
        stage = stages("hybrid", build_avatar_model(FLAT, seed=1), pairs, videos, steps=5)
        rhythm, fabric = stage.training(log_every=1, sample_every=0), make_fabric(accelerator="cpu")
        train(stage, rhythm, tmp_path / "cut", fabric, seconds, progress=False)
    assert not changed(models[0], stage.model)


# adaptation

@pytest.fixture(scope="module")
def fitted(videos):
    sizes = override(preset("smoke"), "generator.image_resolution=16", "generator.raw_resolution=8")
    model = build_avatar_model(sizes, seed=1)
    p = videos.pairs(range(1), 0, 1)
    with torch.no_grad():
        avatar = model.reconstruct(p.source, Camera.from_label(p.source_camera), p.alpha, p.source_beta)
    return model, avatar


def test_adaptation_changes_the_feature_alone_and_helps(fitted):
    model, avatar = fitted
    before = copy.deepcopy(model)
    done = adapt(model, avatar, steps=8, lr=.1)
    totals = [line["total"] for line in done.losses]
    assert totals[done.best] == min(totals) < .95 * totals[0] and not changed(before, model)
    same = {k for k, t in avatar.tensors().items() if torch.equal(t, done.avatar.tensors()[k])}
    assert same == set(avatar.tensors()) - {"planes", "feature"}
    assert torch.equal(model.refit(avatar, done.avatar.feature).planes, done.avatar.planes)


@settings(max_examples=5, deadline=None)
@given(st.sampled_from([1e-4, 1e2, 1e6]), st.integers(1, 3))
def test_adaptation_never_ends_worse(fitted, lr, steps):
    model, avatar = fitted
    done = adapt(model, avatar, steps=steps, lr=lr)
    with torch.no_grad():
        frame = model.render(done.avatar, avatar.beta, avatar.camera)
        first = model.render(avatar, avatar.beta, avatar.camera)
    cost = lambda f: float((f.image - avatar.image).square().mean() + absolute(f.image, avatar.image)
                           + (f.depth - first.depth).square().mean())
    assert cost(frame) <= cost(first) + 1e-6
    assert cost(frame) == pytest.approx(done.losses[done.best]["total"], rel=1e-4)


def test_depth_is_held(fitted):
    model, avatar = fitted
    drift = []
    for w in (0., 100.):
        done = adapt(model, avatar, steps=8, lr=.3, loss=adaptation.AdaptationLoss(w_reg=w))
        with torch.no_grad():
            one = model.render(done.avatar, avatar.beta, avatar.camera).depth
            drift.append(float((one - model.render(avatar, avatar.beta, avatar.camera).depth).square().mean()))
    assert drift[1] < .7 * drift[0]


def test_adaptation_stops_in_time_and_can_be_driven_elsewhere(fitted):
    model, avatar = fitted
    one = adaptation.adapt(model, avatar, perceptual=absolute, seconds=1e-3, progress=False)
    assert len(one.losses) == 1 and one.best == 0 and torch.equal(one.avatar.planes, avatar.planes)
    camera, image = Camera.orbit(torch.tensor([.3]), torch.zeros(1)), avatar.image.flip(3)
    other = adapt(model, avatar, image, camera, torch.ones(1, 100), torch.zeros(1, 52), steps=2)
    with torch.no_grad():
        frame = model.render(avatar, torch.zeros(1, 52), camera, alpha=torch.ones(1, 100))
    assert torch.equal(other.avatar.alpha, torch.ones(1, 100))
    assert other.losses[0]["rec_l2"] == pytest.approx(float((frame.image - image).square().mean()), rel=1e-4)
