"""Cameras and rays: parity with EG3D's numbers, round trips, faults."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.errors import InputError
from nofa_nb.geometry.cameras import (
    FOCAL,
    Camera,
    eg3d_fov_to_focal,
    focal_to_fov,
    fov_to_focal,
    pose_angles,
    pose_rotation,
)
from nofa_nb.geometry.rays import pixel_centres, ray_box, ray_sphere, rays

yaws, pitches = st.floats(-3.1, 3.1), st.floats(-1.4, 1.4)
few = settings(max_examples=30, deadline=None)


@pytest.fixture(scope="module")
def eg3d():
    with np.load(Path(__file__).parent / "fixtures" / "eg3d_cameras.npz", allow_pickle=False) as f:
        return {k: torch.from_numpy(f[k]) for k in f.files}


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---- parity with EG3D

def test_parity_of_the_pose_samplers(eg3d):
    args = eg3d["lookat_args"]
    made = Camera.eg3d(args[:, 0], args[:, 1], radius=args[:, 5], pivot=args[:, 2:5])
    close(made.cam_to_world, eg3d["lookat"])
    close(Camera.eg3d(0.3, -0.1, radius=2, pivot=(0, 0, 0)).cam_to_world, eg3d["gaussian_zero_std"])


def test_parity_of_look_at(eg3d):
    close(Camera.look_at(eg3d["orig"], eg3d["orig"] + eg3d["fwd"]).cam_to_world, eg3d["create_cam2world"])


def test_parity_of_labels(eg3d):
    close(Camera.orbit([0, 0], 0).label, eg3d["c_cond"])
    assert torch.equal(Camera.from_label(eg3d["c_render"]).label, eg3d["c_render"])
    # the labels' positions lie on the sphere, so orbit angles rebuild them up to their pivot
    camera = Camera.from_label(eg3d["c_render"])
    close(Camera.orbit(*camera.yaw_pitch()).label, eg3d["c_render"], atol=3e-6)


def test_parity_of_the_field_of_view(eg3d):
    assert eg3d_fov_to_focal(18.837) == pytest.approx(eg3d["fov18.837"][0, 0].item(), abs=2e-5)  # 3.14159 for pi there


def test_parity_of_rays(eg3d):
    origins, directions = rays(Camera.from_label(eg3d["c_render"]), 16, 16)
    close(origins, eg3d["ray_origins"])
    close(directions, eg3d["ray_dirs"])


def test_parity_of_rays_with_skew(eg3d):
    origins, directions = rays(Camera(eg3d["lookat"][1:2], eg3d["skew_K"]), 5, 5)
    close(origins, eg3d["skew_ray_origins"])
    close(directions, eg3d["skew_ray_dirs"])


# ---- properties

@few
@given(yaws, pitches, st.floats(0.5, 5))
def test_orbit_round_trip(yaw, pitch, radius):
    camera = Camera.orbit(yaw, pitch, radius, pivot=(0, 0, 0.0))
    got_yaw, got_pitch = camera.yaw_pitch()
    assert math.isclose(got_yaw.item(), yaw, abs_tol=2e-6) and math.isclose(got_pitch.item(), pitch, abs_tol=2e-6)
    close(camera.position.norm(dim=-1), torch.tensor([radius]), atol=1e-5)
    close(Camera.from_label(camera.label).label, camera.label, atol=0)


def test_orbit_signs():
    right, up = Camera.orbit(0.3, 0), Camera.orbit(0, 0.3)
    assert right.position[0, 0] > 0 and up.position[0, 1] > 0
    # a point in front of the origin appears to the left when the camera moves right, lower when it moves up
    nose = torch.tensor([[[0, 0, 0.5]]])
    assert Camera.orbit(0.3, 0, pivot=(0, 0, 0)).project(nose)[0][0, 0, 0] < 0.5
    assert Camera.orbit(0, 0.3, pivot=(0, 0, 0)).project(nose)[0][0, 0, 1] > 0.5
    # world up is up in the image
    assert Camera.orbit(0.3, 0.1).project(torch.tensor([[[0, 0.2, 0.2]]]))[0][0, 0, 1] < 0.5


@few
@given(yaws, pitches, st.integers(0, 10**6))
def test_project_round_trip(yaw, pitch, seed):
    camera = Camera.orbit(torch.tensor(yaw, dtype=torch.float64), pitch)
    camera.intrinsics[:, 0, 1] = 0.1  # skew
    points = torch.rand(1, 20, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    uv, depth = camera.project(points)
    close(camera.unproject(uv, depth), points, atol=1e-9)
    assert (depth > 0).all()


@few
@given(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5), st.floats(-3, 3), st.integers(0, 10**6))
def test_pose_round_trip(pitch, yaw, roll, seed):
    angles = torch.tensor([[pitch, yaw, roll]], dtype=torch.float64)
    translation = torch.rand(1, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    close(pose_angles(pose_rotation(angles)), angles, atol=1e-9)
    kept = Camera.from_pose(angles, translation, radius=None)
    for got, want in zip(kept.pose(), (angles, translation)):
        close(got, want, atol=1e-9)
    normalised = Camera.from_pose(angles, translation)
    close(normalised.pose()[0], angles, atol=1e-9)
    close(normalised.position.norm(dim=-1), torch.tensor([2.7], dtype=torch.float64), atol=1e-9)
    close(Camera.from_pose(*normalised.pose()).label, normalised.label, atol=1e-9)


def test_pose_sees_what_the_estimator_saw():
    "The camera shows a face point where Deep3DFaceRecon's own projection puts it."
    angles, t = torch.tensor([[0.2, -0.5, 0.3]]), torch.tensor([[0.1, 0.2, -0.4]])
    point = torch.tensor([[[0.3, -0.6, 0.9]]])                      # units of 100 mm, face's own axes
    x, y, z = (pose_rotation(angles) @ point[0, 0] + t[0])[0]       # y up, camera at z = 10 looking along -z
    expected = torch.stack([0.5 + FOCAL * x / (10 - z), 0.5 - FOCAL * y / (10 - z)])
    world = 0.27 * point + torch.tensor([0, 0.006, 0.161])
    close(Camera.from_pose(angles, t, radius=None).project(world)[0][0, 0], expected, atol=1e-5)


def test_pose_without_rotation_is_frontal():
    assert Camera.from_pose((0, 0, 0)).yaw_pitch()[0].item() == pytest.approx(0, abs=1e-7)
    close(Camera.from_pose((0, 0, 0)).rotation[0], torch.diag(torch.tensor([1.0, -1, -1])))


def test_project_has_gradients():
    def run(pose, points):
        return Camera(pose, k).project(points)[0]

    k = Camera.orbit(0, 0).intrinsics.double()
    pose = Camera.orbit(0.3, 0.2).cam_to_world.double().requires_grad_()
    points = torch.rand(1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(run, (pose, points))


def test_mirror_is_the_mirrored_picture():
    skewed = torch.tensor([[[3, 0.1, 0.4], [0, 2.5, 0.6], [0, 0, 1]]])
    camera = Camera(Camera.orbit(0.4, -0.2).cam_to_world, skewed)
    points = torch.rand(1, 9, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    uv, depth = camera.project(points)
    flipped, same = camera.mirror().project(points * torch.tensor([-1, 1, 1]))
    close(flipped, torch.stack([1 - uv[..., 0], uv[..., 1]], -1))
    close(same, depth)


def test_batches():
    ring = Camera.orbit(torch.linspace(-1, 1, 5), 0.1)
    assert len(ring) == 5 and len(ring[2]) == 1 and len(ring[1:4]) == 3 and len(ring[-1]) == 1
    assert torch.equal(Camera.cat(list(ring)).label, ring.label)
    assert torch.equal(ring[torch.tensor([4, 0])].label, ring.label[[4, 0]])
    assert ring.to(torch.float64).label.dtype == torch.float64
    with pytest.raises(IndexError):
        ring[5]


@pytest.mark.parametrize("degrees", [13.37, 60, 120])
def test_field_of_view_round_trip(degrees):
    assert focal_to_fov(fov_to_focal(degrees)) == pytest.approx(degrees)
    # the edge of the image is half the field of view away from its middle
    camera = Camera.orbit(0, 0, focal=fov_to_focal(degrees))
    edge = camera.directions(torch.tensor([[[0, 0.5]]]))[0, 0]
    assert math.degrees(math.atan2(-edge[0], -edge[2])) == pytest.approx(degrees / 2, rel=1e-5)


# ---- rays

def test_rays_pass_their_pixels():
    camera = Camera.orbit([0.4, -0.9], [0.1, 0.3])
    origins, directions = rays(camera, 3, 7)
    close(directions.norm(dim=-1), torch.ones(2, 21))
    uv, _ = camera.project(origins + 2.5 * directions)
    close(uv, pixel_centres(3, 7).expand(2, -1, -1), atol=1e-5)


@few
@given(st.integers(0, 10**6))
def test_spans_end_on_the_surface(seed):
    g = torch.Generator().manual_seed(seed)
    origins = torch.randn(64, 3, generator=g, dtype=torch.float64)
    towards = torch.randn(64, 3, generator=g, dtype=torch.float64) - 0.8 * origins
    directions = torch.nn.functional.normalize(towards, dim=-1)
    centre = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    for body, size, norm in ((ray_sphere, 0.8, lambda p: p.norm(dim=-1)), (ray_box, 1.6, lambda p: p.abs().amax(-1))):
        span = body(origins, directions, size, centre.tolist())
        outside = norm(origins - centre) > 0.8
        for distance, picked in ((span.near, span.hit & outside), (span.far, span.hit)):
            ends = norm(origins + distance[:, None] * directions - centre)[picked]
            close(ends, torch.full_like(ends, 0.8))
        # brute force along the ray agrees on who hits
        steps = torch.linspace(0, 8, 2001, dtype=torch.float64)
        depth = 0.8 - norm(origins[:, None] + steps[:, None] * directions[:, None] - centre).amin(1)
        clear = depth.abs() > 0.01
        assert torch.equal(span.hit[clear], (depth > 0)[clear])
        assert (span.near[~span.hit] == 0).all() and (span.far[~span.hit] == 0).all()


def test_spans_have_finite_values_and_gradients():
    # hit, graze, miss, corner
    origins = torch.tensor([[0.0, 0, 2], [0.5, 0, 2], [3, 0, 2], [0.5, 0.5, 0.5]]).requires_grad_()
    directions = torch.tensor([[0.0, 0, -1]]).repeat(4, 1).requires_grad_()
    for body, size in ((ray_sphere, 0.5), (ray_box, 1.0)):
        span = body(origins, directions, size)
        grads = torch.autograd.grad(span.near.sum() + span.far.sum(), (origins, directions))
        assert all(torch.isfinite(x).all() for x in (span.near, span.far, *grads))


# ---- faults

def spoiled(index, value):
    label = Camera.orbit(0.2, 0.1).label.clone()
    label[0, index] = value
    return label


@pytest.mark.parametrize("call, word", [
    (lambda: Camera.from_label(torch.zeros(2, 24)), "label"),
    (lambda: Camera.from_label(spoiled(0, float("nan"))), "finite"),
    (lambda: Camera.from_label(spoiled(0, 3.0)), "rotation"),
    (lambda: Camera.from_label(spoiled(16, -1.0)), "focal"),
    (lambda: Camera.from_label(Camera.orbit(0.2, 0.1).cam_to_world.mT.flatten(1).repeat(1, 2)[:, :25]), "row by row"),
    (lambda: Camera(torch.eye(4)[None], torch.eye(3)), "intrinsics"),
    (lambda: Camera(torch.eye(4)[None], torch.eye(3).expand(2, 3, 3)), "intrinsics"),
    (lambda: Camera.look_at((0, 2, 0), (0, 0, 0)), "straight up"),
    (lambda: Camera.look_at((1, 1, 1), (1, 1, 1)), "zero"),
    (lambda: Camera.look_at((1, 1), (0, 0, 0)), "position"),
    (lambda: Camera.orbit([0.1, 0.2], [0.1, 0.2, 0.3]), "rows"),
    (lambda: Camera.orbit("front", 0), "yaw"),
    (lambda: Camera.orbit(float("inf"), 0), "yaw"),
    (lambda: Camera.orbit(0, 0, radius=0), "radius"),
    (lambda: Camera.orbit(0, 0, focal=0), "focal"),
    (lambda: Camera.eg3d(0, 1.6), "pitch_offset"),
    (lambda: Camera.from_pose((0, 0)), "angles"),
    (lambda: Camera.cat([]), "cameras"),
    (lambda: Camera.orbit(0, 0).project(torch.zeros(1, 3)), "points"),
    (lambda: fov_to_focal(180), "degrees"),
    (lambda: focal_to_fov(-1), "focal"),
    (lambda: rays(Camera.orbit(0, 0), 0, 4), "height"),
    (lambda: ray_sphere(torch.zeros(2, 3), torch.zeros(3, 3), 1), "directions"),
    (lambda: ray_box(torch.zeros(2, 3), torch.zeros(2, 3), -1), "side"),
])
def test_faults_are_named(call, word):
    with pytest.raises(InputError, match=word):
        call()
