"""Crops, boxes and similarity transforms: round trips, invariances, gradients, faults."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nofa_nb.core.errors import InputError
from nofa_nb.geometry.alignment import (
    ARCFACE,
    apply,
    arcface_transform,
    check_points,
    compose,
    crop_boxes,
    crop_transform,
    eye_mouth_boxes,
    feather_mask,
    head_transform,
    invert,
    paste_back,
    similarity_from_points,
    warp,
)

FACE = torch.tensor([[30.0, 40], [70, 40], [50, 60], [35, 80], [65, 80]])
few = settings(max_examples=30, deadline=None)
similarities = st.tuples(st.floats(0.2, 5), st.floats(-3.1, 3.1), st.floats(-300, 300), st.floats(-300, 300))


def similarity(scale, angle, x, y):
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    return torch.tensor([[c, -s, x], [s, c, y]], dtype=torch.float64)


def smooth_image(height, width, seed=0):
    "A sum of slow waves in [0, 1], one for each channel."
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[:height, :width]
    a, b, start = rng.uniform(25, 60, (3, 1, 1)), rng.uniform(25, 60, (3, 1, 1)), rng.uniform(0, 6, (3, 1, 1))
    return torch.from_numpy(0.5 + 0.45 * np.sin(u / a + v / b + start)).float()


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---- transforms

@few
@given(similarities, st.integers(2, 9), st.integers(0, 10**6))
def test_similarity_is_recovered(parameters, n, seed):
    points = 50 * torch.randn(2, n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    truth = similarity(*parameters).expand(2, 2, 3)
    close(similarity_from_points(points, apply(truth, points)), truth, atol=1e-6)


@few
@given(st.integers(0, 10**6))
def test_similarity_is_the_least_squares_one(seed):
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(6, 2, generator=g, dtype=torch.float64) for _ in "pq")
    found = similarity_from_points(p, q)
    # the same problem, solved as a general linear system in (a, b, x, y)
    x, y = p.unbind(-1)
    one, zero = torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    rows = torch.cat([torch.stack([x, -y, one, zero], -1), torch.stack([y, x, zero, one], -1)])
    a, b, s, t = torch.linalg.lstsq(rows, q.T.flatten()[:, None]).solution[:, 0]
    close(found, torch.stack([torch.stack([a, -b, s]), torch.stack([b, a, t])]), atol=1e-8)


def test_similarity_never_mirrors():
    mirrored = FACE * torch.tensor([-1.0, 1])
    assert torch.linalg.det(similarity_from_points(FACE, mirrored)[:, :2]) >= 0


@few
@given(similarities, similarities)
def test_inverse_and_composition(first, second):
    a, b = similarity(*first), similarity(*second)
    points = FACE.double()
    close(apply(invert(a), apply(a, points)), points, atol=1e-8)
    close(apply(compose(a, b), points), apply(b, apply(a, points)), atol=1e-7)


# ---- crops

@few
@given(similarities, st.sampled_from(["eg3d", "ffhq"]))
def test_crop_does_not_depend_on_the_photo(parameters, style):
    "A face that is moved, turned and scaled lands on the same pixels of its crop."
    moved = apply(similarity(*parameters), FACE.double())
    expected = apply(crop_transform(FACE.double(), 256, style), FACE.double())
    close(apply(crop_transform(moved, 256, style), moved), expected, atol=1e-6)


def test_ffhq_by_hand():
    # eyes 40 apart, mouth 40 below: side 160, middle 4 below the eyes
    corners = apply(invert(crop_transform(FACE, 512, "ffhq")), torch.tensor([[0.0, 0], [512, 512]]))
    close(corners, torch.tensor([[-30.0, -36], [130, 124]]), atol=1e-3)
    # a face with a long chin: half a side is 1.8 times the way to the mouth
    long = FACE.clone()
    long[3:, 1] = 140
    assert crop_transform(long, 360, "ffhq")[0, 0].item() == pytest.approx(1.0)


def test_eg3d_crop_of_the_mean_face():
    "62.1 mm between the eyes, mouth 67.1 mm below: 233.3 mm across, the eyes 19 mm above the middle."
    face = torch.tensor([[-31.05, 0], [31.05, 0], [0, 40], [-25, 67.1], [25, 67.1]])
    corners = apply(invert(crop_transform(face, 512)), torch.tensor([[0.0, 0], [512, 512]]))
    assert (corners[1] - corners[0])[0].item() == pytest.approx(233.3, abs=0.2)
    assert corners.mean(0).tolist() == pytest.approx([0, 19], abs=0.1)


def test_arcface_template():
    moved = apply(similarity(2.5, 0.4, 30, -20).float(), torch.tensor(ARCFACE) + 0.5)
    close(apply(arcface_transform(moved), moved), torch.tensor(ARCFACE) + 0.5, atol=1e-3)
    close(apply(arcface_transform(moved, 224), moved), 2 * (torch.tensor(ARCFACE) + 0.5), atol=2e-3)


# ---- warping and pasting

def test_warp_of_a_linear_picture_is_exact():
    v, u = torch.meshgrid(torch.arange(60) + 0.5, torch.arange(80) + 0.5, indexing="ij")
    transform = similarity(0.4, 0.5, 5, -8).float()
    result = warp(torch.stack([u, v]), transform, (20, 16))
    y, x = torch.meshgrid(torch.arange(20) + 0.5, torch.arange(16) + 0.5, indexing="ij")
    expected = apply(invert(transform), torch.stack([x, y], -1).reshape(-1, 2)).T.reshape(2, 20, 16)
    inside = ((expected > 3) & (expected < torch.tensor([77.0, 57])[:, None, None])).all(0)
    assert inside.sum() > 100
    close(result[:, inside], expected[:, inside], atol=1e-3)


def test_warp_averages_when_it_shrinks():
    checks = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).float()[None]
    small = warp(checks, torch.tensor([[1 / 8, 0, 0], [0, 1 / 8, 0]]), 8)
    close(small, torch.full((1, 8, 8), 0.5), atol=1e-4)


@pytest.mark.parametrize("padding, value", [("edge", 1.0), ("reflect", 1.0), ("black", 0.0)])
def test_padding(padding, value):
    result = warp(torch.ones(1, 8, 8), torch.tensor([[1.0, 0, 20], [0, 1, 0]]), (8, 24), padding)
    close(result[..., :8], torch.full((1, 8, 8), value))


@settings(max_examples=15, deadline=None)
@given(st.floats(0.7, 1.6), st.floats(-0.6, 0.6), st.floats(-60, 60), st.floats(-60, 60), st.integers(0, 99))
def test_crop_and_paste_leave_the_image_unchanged(scale, angle, x, y, seed):
    image = smooth_image(160, 200, seed)
    points = apply(similarity(scale, angle, 50 + x, 20 + y).float(), FACE)
    transform = crop_transform(points, 128)
    again = paste_back(image, warp(image, transform, 128), transform, feather=4)
    change = (again - image).abs()
    # beside the image's border the reflected continuation puts a kink into the crop
    assert change[:, 4:-4, 4:-4].max() < 2 / 255 and change.max() < 6 / 255


def test_paste_shows_the_crop_inside_and_the_image_outside():
    image, transform = smooth_image(160, 200), torch.tensor([[1.0, 0, -40], [0, 1, -30]])
    crop = torch.zeros(3, 64, 64)
    result = paste_back(image, crop, transform, feather=8)
    close(result[:, 30 + 8:94 - 8, 40 + 8:104 - 8], torch.zeros(3, 48, 48))
    untouched = torch.ones(160, 200, dtype=torch.bool)
    untouched[30:94, 40:104] = False
    assert torch.equal(result[:, untouched], image[:, untouched])
    hidden = paste_back(image, crop, transform, mask=torch.zeros(1, 64, 64))
    close(hidden, image)
    assert torch.equal(paste_back(image, crop, torch.tensor([[1.0, 0, 5000], [0, 1, 0]])), image)  # beside the image


def test_feather_mask():
    mask = feather_mask((16, 20), 4)[0]
    close(mask[8, :5], torch.tensor([0.125, 0.375, 0.625, 0.875, 1]))
    assert torch.equal(mask, mask.flip(0)) and torch.equal(mask, mask.flip(1))


# ---- boxes

@few
@given(st.floats(0.3, 3), st.floats(-100, 100))
def test_boxes_scale_with_the_face(scale, shift):
    boxes = eye_mouth_boxes((FACE * scale + shift)[None])
    close(boxes, eye_mouth_boxes(FACE[None]) * scale + shift, atol=1e-3)


def test_boxes_by_hand():
    boxes = eye_mouth_boxes(FACE[None])[0]
    close(boxes, torch.tensor([[18.0, 31, 42, 49], [58, 31, 82, 49], [26, 64, 74, 96]]), atol=1e-4)


@few
@given(st.floats(-300, 300), st.floats(-300, 300))
def test_clamped_boxes_stay_inside_and_keep_a_pixel(x, y):
    boxes = eye_mouth_boxes((FACE + torch.tensor([x, y]))[None], (90, 100))[0]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor([100, 90])).all()
    assert ((boxes[:, 2:] - boxes[:, :2]) >= 1 - 1e-4).all()
    assert torch.isfinite(crop_boxes(torch.zeros(1, 1, 90, 100), boxes[None], 4)).all()


def test_crop_boxes_values_and_gradients():
    images = torch.rand(2, 2, 10, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    boxes = torch.tensor([[[1.0, 2, 5, 6], [3.3, 1.2, 9.1, 8.7]], [[0, 0, 12, 10], [4, 4, 8, 8]]]).requires_grad_()
    crops = crop_boxes(images, boxes, 4)
    assert crops.shape == (2, 2, 2, 4, 4)
    close(crops[0, 0], images[0, :, 2:6, 1:5], atol=1e-12)
    close(crops[1, 1], images[1, :, 4:8, 4:8], atol=1e-12)
    assert torch.autograd.gradcheck(lambda im: crop_boxes(im, boxes, (3, 4)), (images,))
    crops.square().sum().backward()
    assert boxes.grad is None


# ---- faults

def with_point(i, value):
    points = FACE.clone()
    points[i] = torch.tensor(value)
    return points


@pytest.mark.parametrize("points, word", [
    (FACE[:4], "5, 2"),
    (torch.zeros(5, 3), "5, 2"),
    (with_point(2, [float("nan"), 0.0]), "finite"),
    (with_point(0, [float("inf"), 0.0]), "finite"),
    (torch.full((5, 2), 7.0), "one place"),
    (FACE[[1, 0, 2, 4, 3]], "swapped"),
    (None, "landmarks5"),
])
def test_bad_points_are_refused_at_every_door(points, word):
    def boxes(p):
        return eye_mouth_boxes(p if p is None else p[None])

    for door in (check_points, lambda p: crop_transform(p, 64), arcface_transform, boxes):
        with pytest.raises(InputError, match=word):
            door(points)


@pytest.mark.parametrize("call, word", [
    (lambda: crop_transform(FACE, 64, "vgg"), "style"),
    (lambda: crop_transform(FACE, 0), "size"),
    (lambda: similarity_from_points(FACE[:1], FACE[:1]), "at least 2"),
    (lambda: similarity_from_points(torch.ones(5, 2), FACE), "one place"),
    (lambda: similarity_from_points(FACE, FACE[:3]), "target"),
    (lambda: similarity_from_points(FACE, FACE * float("nan")), "finite"),
    (lambda: invert(torch.zeros(2, 3)), "invertible"),
    (lambda: warp(torch.zeros(2, 1, 4, 4), torch.eye(3)[None, :2], 4), "transform"),
    (lambda: warp(torch.zeros(1, 4, 4), torch.eye(3)[:2], 4, "wrap"), "padding"),
    (lambda: warp(torch.zeros(1, 4, 4), torch.eye(3)[:2], 0), "size"),
    (lambda: paste_back(torch.zeros(3, 9, 9), torch.zeros(1, 4, 4), torch.eye(3)[:2]), "crop"),
    (lambda: paste_back(torch.zeros(3, 9, 9), torch.zeros(3, 4, 4), torch.eye(3)[:2], feather=-1), "feather"),
    (lambda: paste_back(torch.zeros(3, 9, 9), torch.zeros(3, 4, 4), torch.eye(3)[:2], mask=torch.ones(4, 4)), "mask"),
    (lambda: crop_boxes(torch.zeros(1, 1, 4, 4), torch.tensor([[[2.0, 2, 2, 3]]]), 4), "boxes"),
    (lambda: crop_boxes(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4), float("nan")), 4), "finite"),
    (lambda: crop_boxes(torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4), 4), "boxes"),
    (lambda: eye_mouth_boxes(with_point(1, [30.0, 40.0])[None]), "eyes"),
])
def test_faults_are_named(call, word):
    with pytest.raises(InputError, match=word):
        call()


@few
@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), min_size=5, max_size=5))
def test_any_five_points_give_a_crop_or_a_message(points):
    points = torch.tensor(points)
    assume(torch.isfinite(points).all())
    try:
        transform = crop_transform(points, 64)
    except InputError:
        return
    assert torch.isfinite(transform).all() and torch.linalg.det(transform[:, :2]) > 0


# ---- the crop of a solid head

HEAD = torch.tensor([[-0.068, 0.02, 0.219], [0.068, 0.02, 0.219], [0, -0.068, 0.285], [-0.051, -0.121, 0.237],
                     [0.051, -0.121, 0.237]], dtype=torch.float64)


@few
@given(st.floats(-0.9, 0.9), st.floats(-0.4, 0.4), similarities)
def test_head_crop_keeps_scale_and_middle_when_the_head_turns(yaw, pitch, parameters):
    "An orthographic camera on an orbit, its picture scaled, rolled and shifted: the crop is always the same view."
    turn_y = torch.tensor([[math.cos(yaw), 0, -math.sin(yaw)], [0, 1, 0], [math.sin(yaw), 0, math.cos(yaw)]])
    turn_x = torch.tensor([[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)], [0, math.sin(pitch), math.cos(pitch)]])
    turn = (turn_x @ turn_y).double()
    centre = torch.tensor([0, 0, 0.2], dtype=torch.float64)
    seen = ((HEAD - centre) @ turn.T)[:, :2] * torch.tensor([100.0, -100])
    photo = similarity(*parameters)
    transform = head_transform(apply(photo, seen), HEAD, 64, (0, 0, 0.2), 0.5)
    whole = compose(photo, transform)  # from 100 pixels a unit to 64 pixels for half a unit, upright
    close(whole, torch.tensor([[1.28, 0, 32], [0, 1.28, 32]], dtype=torch.float64), atol=1e-5)


def test_head_crop_refuses_bad_settings():
    for word, kw in (("size", dict(size=0)), ("span", dict(span=0.0)), ("shape5", dict(shape5=HEAD[:4]))):
        with pytest.raises(InputError, match=word):
            head_transform(FACE, **{**dict(shape5=HEAD, size=8, centre=(0, 0, 0), span=1.0), **kw})
