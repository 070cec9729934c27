"""Synthetic pairs: views that agree with their cameras, sets that go on where they stopped, teachers that stay."""
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.config import preset
from nofa_nb.core.errors import InputError
from nofa_nb.core.repro import hash_tensors
from nofa_nb.data import synthetic3d as S
from nofa_nb.data.parts import in_parts, read_made
from nofa_nb.geometry.cameras import Camera
from nofa_nb.models.generator import build_generator
from nofa_nb.world.bust import sample_person
from nofa_nb.world.latent import latent
from nofa_nb.world.motion import sample_expression

CONFIG = preset("smoke").generator
PLAN = S.SyntheticPlan("world", count=5)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher():
    return build_generator(CONFIG, seed=1).eval()


def flat(teacher):
    "The same generator without super-resolution."
    config = replace(CONFIG, super_resolution="none", raw_resolution=32)
    return build_generator(config, seed=1).eval()


def test_codes_are_the_worlds(teacher):
    z, alpha, beta = S.sample_codes(replace(PLAN, first=7), [0, 2], S.LATENT)
    for row, seed in enumerate((7, 9)):
        person, expression = sample_person(seed), sample_expression(seed)[0]
        assert torch.equal(alpha[row], person.alpha) and torch.equal(beta[row], expression)
        alone = latent(torch.cat([person.code, expression])[None])
        torch.testing.assert_close(z[row:row + 1], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="z_dim"):
        S.sample_codes(PLAN, [0], 512)


def test_normal_codes_have_unit_spread_and_no_labels():
    z, alpha, beta = S.sample_codes(S.SyntheticPlan(), list(range(40)), 512)
    assert abs(z.mean()) < .03 and abs(z.std() - 1) < .03 and alpha.numel() == beta.numel() == 0


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.floats(1, 80), st.floats(1, 60))
def test_cameras_stay_in_their_range_and_look_at_the_pivot(first, yaw, pitch):
    plan = S.SyntheticPlan(first=first, yaw=yaw, pitch=pitch)
    label = S.sample_cameras(plan, list(range(20)))
    camera = Camera.from_label(label.flatten(0, 1))
    a, b = (math.degrees(x.abs().max()) for x in camera.yaw_pitch())
    assert a <= yaw + 1e-3 and b <= pitch + 1e-3
    uv, _ = camera.project(torch.tensor([0., 0, .2]).expand(40, 1, 3))
    assert (uv - .5).abs().max() < 1e-4
    assert not torch.equal(label[:, 0], label[:, 1])
    assert torch.equal(label[3:4], S.sample_cameras(plan, [3]))


def test_frontal_views_are_the_likeliest():
    yaw = Camera.from_label(S.sample_cameras(S.SyntheticPlan(yaw=60), list(range(1500))).flatten(0, 1)).yaw_pitch()[0]
    inner = (yaw.abs().rad2deg() < 20).float().mean()
    assert abs(inner - 5 / 9) < .04  # of a triangle; a uniform draw has 1/3


def test_each_view_is_what_its_camera_sees(teacher):
    made = S.make_pairs(teacher, PLAN, [0, 3])
    for row in (0, 1):
        for view in (0, 1):
            camera = Camera.from_label(made.camera[row:row + 1, view])
            frame = teacher.synthesis(made.ws[row:row + 1], camera)
            torch.testing.assert_close(made.image[row, view], frame.image[0], atol=1e-5, rtol=1e-3)
            torch.testing.assert_close(made.depth[row, view], frame.depth[0], atol=1e-5, rtol=0)
            mask = (frame.features[0, 3:4] / 2 + .5).clamp(0, 1)
            torch.testing.assert_close(made.mask[row, view], mask, atol=1e-5, rtol=0)
    assert not made.image.requires_grad


def test_a_set_is_the_same_in_any_parts_and_comes_back(teacher, tmp_path):
    whole = S.collect_synthetic(teacher, PLAN, chunk=5, at_once=5, progress=False)
    pieces = S.collect_synthetic(teacher, PLAN, tmp_path / "a.safetensors", chunk=2, at_once=1, progress=False)
    a, b = whole.at(torch.arange(5)), pieces.at(torch.arange(5))  # sums in another order: one byte off at most
    assert all(torch.allclose(x, y, atol=1.01 / 127.5, rtol=0) for x, y in zip(a, b)) and torch.equal(a.beta, b.beta)
    assert (a.ws - b.ws).abs().max() < 1e-5 and (a.depth - b.depth).abs().max() < 5e-4
    loaded = S.collect_synthetic(teacher, PLAN, tmp_path / "a.safetensors", progress=False)
    assert loaded.data_hash == pieces.data_hash == hash_tensors(pieces.tensors()) and loaded.source == pieces.source
    assert torch.equal(loaded.batch(range(4), 1).image, pieces.batch(range(4), 1).image)


def test_a_cache_of_another_teacher_or_plan_is_not_taken(teacher, tmp_path):
    path = tmp_path / "a.safetensors"
    first = S.collect_synthetic(teacher, PLAN, path, progress=False)
    other = S.collect_synthetic(build_generator(CONFIG, seed=2).eval(), PLAN, path, progress=False)
    third = S.collect_synthetic(teacher, replace(PLAN, yaw=5.), path, progress=False)
    assert len({first.data_hash, other.data_hash, third.data_hash}) == 3
    assert third.source["plan"]["yaw"] == 5 and not torch.equal(first.ws, other.ws)


def test_going_on_makes_only_what_is_missing(tmp_path):
    calls = []

    def make(items):
        calls.append(items.start)
        if calls == [0, 2, 4]:
            raise RuntimeError
        return {"x": torch.arange(items.start, items.stop)}

    path = tmp_path / "x.safetensors"
    with pytest.raises(RuntimeError):
        in_parts(make, 6, 2, "source", path, progress=False)
    (next(tmp_path.rglob("00000000.safetensors"))).write_bytes(b"damaged")
    tensors, _ = in_parts(make, 6, 2, "source", path, progress=False)
    assert tensors["x"].tolist() == list(range(6)) and calls == [0, 2, 4, 0, 4]  # the second was there
    assert not (tmp_path / "x.safetensors.parts").exists()
    assert read_made(path, "source") and not read_made(path, "other")


def test_bytes_lose_little_and_raw_is_not_held_twice(teacher):
    made = S.make_pairs(teacher, PLAN, [0, 1])
    back = S.SyntheticSet.pack(made).at(torch.tensor([1]))
    assert (back.image[0] - made.image[1].clamp(-1, 1)).abs().max() < .5 / 127.5 + 1e-5
    assert (back.depth[0] - made.depth[1]).abs().max() < 4e-4
    plain = S.SyntheticSet.pack(S.make_pairs(flat(teacher), PLAN, [0]))
    assert plain.raw.numel() == 0 and torch.equal(plain.at(torch.tensor([0])).raw, plain.at(torch.tensor([0])).image)


def test_a_stream_keeps_its_own_teacher(teacher):
    student = build_generator(CONFIG, seed=1).eval()
    stream = S.SyntheticStream(student, PLAN)
    before = stream.batch(range(2), 0)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(.5)
    after = stream.batch(range(2), 0)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in stream.teacher.parameters())
    torch.testing.assert_close(stream.batch(range(6, 7), 0).ws, S.make_pairs(teacher, PLAN, [1]).ws)
