"""Photos and videos made ready: geometry against painted coordinates, smoothing, streaming, bad input, folders."""

import json
import math
import weakref

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data
from skimage.measure import label, regionprops

from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.io import VideoWriter, load_tensors
from nofa_nb.data.preprocess import (
    SMALLEST,
    Tracker,
    camera_row,
    cut,
    find_faces,
    frame_face,
    mean_points,
    motion_of,
    outcome_table,
    prepare_folder,
    preprocess_image,
    preprocess_video,
    read_clip_folder,
    recut,
    row_camera,
    search,
    turn_back,
)
from nofa_nb.data.smoothing import Moment, Smoothing, Steady, beta_widths, jitter, local_line, smooth
from nofa_nb.experts.face3d import FaceParameters, pose_camera
from nofa_nb.experts.landmarks import Detection
from nofa_nb.geometry.alignment import apply, compose, invert, warp
from nofa_nb.geometry.cameras import Camera

pytestmark = pytest.mark.usefixtures("one_thread")
few = settings(max_examples=8, deadline=None)
ASTRONAUT = data.astronaut()
FRACTIONS = torch.tensor([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]])


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def blank_m(image):
    n = len(image)
    return FaceParameters(image.new_zeros(n, 100), image.new_zeros(n, 52), Camera.orbit(torch.zeros(n)))


def grey_m(image):
    "Expression and identity are the brightness of the crop."
    mean = image.mean((1, 2, 3))[:, None]
    return blank_m(image)._replace(beta=mean.expand(-1, 52) / 2 + 0.5, alpha=mean.expand(-1, 100) / 2 + 0.5)


def square_detector(image):
    "Every bright square is a face."
    found = []
    for r in regionprops(label(image[..., 0] > 120)):
        box = torch.tensor([r.bbox[1], r.bbox[0], r.bbox[3], r.bbox[2]]).float()
        found.append(Detection(box, box[:2] + FRACTIONS * (box[2:] - box[:2]), 0.99))
    return sorted(found, key=lambda d: -d.size)


def scene(*middles, side=60, size=(300, 400), grey=255):
    frame = np.zeros((*size, 3), np.uint8)
    for x, y in middles:
        frame[max(y - side // 2, 0) : y + side // 2, max(x - side // 2, 0) : x + side // 2] = grey
    return frame


class Film:
    "A video that is made while it is read."

    def __init__(self, frames, fps=25.0, times=None):
        self.made, self.fps, self.frames = frames, fps, len(frames)
        self.times = [k / fps for k in range(len(frames))] if times is None else times

    def timed(self):
        return ((t, f()) for t, f in zip(self.times, self.made))

    def audio(self):
        return None


def walk(n, nobody=(), step=2):
    return Film([lambda k=k: scene(*([] if k in nobody else [(100 + step * k, 150)])) for k in range(n)])


def prepared(film, m=grey_m, size=32, **kwargs):
    video = preprocess_video(film, square_detector, m, size, progress=False, **kwargs)
    return list(video), video.report


# ---- geometry against the truth: red and green of a photo say where a pixel comes from


def coordinates(height, width):
    "A photo whose red is x and green y, in [0, 1]."
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    return np.stack(
        [np.broadcast_to(x, (height, width)), np.broadcast_to(y[:, None], (height, width)), np.zeros((height, width))],
        2,
    )


def seen_places(image, height, width):
    "Places in the photo that the pixels of a crop of `coordinates` show."
    return (image[0, :2] / 2 + 0.5).permute(1, 2, 0) * torch.tensor([width, height])


def fit(image, height, width):
    "The transform from the photo to a crop, read off the crop's pixels."
    s = image.shape[-1]
    v, u = torch.meshgrid(*[torch.arange(s) + 0.5] * 2, indexing="ij")
    rows = torch.stack([u, v, torch.ones_like(u)], -1).reshape(-1, 3).double()
    return invert(
        torch.linalg.lstsq(rows, seen_places(image, height, width).reshape(-1, 2).double()).solution.T.float()
    )


class TrueM:
    "M that knows the camera of a world's picture which lies at `place` in a photo of coordinates."

    def __init__(self, camera, place, size, photo):
        self.camera, self.place, self.size, self.photo = camera, place, size, photo

    def __call__(self, image):
        from nofa_nb.experts.face3d import camera_pose

        rows = []
        for one in image:
            similar = compose(self.place, fit(one[None], *self.photo))  # from the world's picture to the crop, pixels
            linear, s = similar[:, :2], image.shape[-1]
            scale, roll = linear.det().sqrt(), torch.atan2(linear[1, 0], linear[0, 0])
            pivot = apply(similar, self.camera.project(torch.tensor([[[0.0, 0, 0.2]]]))[0][0] * self.size)[0] / s - 0.5
            rows.append(camera_pose(self.camera)[0].clone())
            rows[-1][2] -= roll  # y points down: a roll to the right lowers the angle
            rows[-1][3:5], rows[-1][5] = pivot, torch.log(scale * self.size / s)
        n = len(image)
        return FaceParameters(torch.zeros(n, 100), torch.zeros(n, 52), pose_camera(torch.stack(rows)))


def placed(scale, roll, x, y):
    c, s = scale * math.cos(roll), scale * math.sin(roll)
    return torch.tensor([[c, -s, x], [s, c, y]])


@few
@given(st.floats(-0.7, 0.7), st.floats(-0.25, 0.25), st.floats(0.8, 2), st.floats(-0.5, 0.5), st.integers(0, 10**6))
def test_m_leads_to_the_worlds_picture(yaw, pitch, scale, roll, seed):
    "A world's picture anywhere in a photo, with points off by some pixels, is cut out as it is."
    size, camera, place = 64, Camera.orbit(yaw, pitch), placed(scale, roll, 120.0, 110.0)
    points = apply(place, size * camera.project(mean_points()[None])[0][0])
    points = points + torch.randn(5, 2, generator=torch.Generator().manual_seed(seed))
    box = torch.cat([points.amin(0) - 9, points.amax(0) + 9])
    photo = torch.from_numpy(coordinates(360, 400)).permute(2, 0, 1).float()
    found = preprocess_image(
        photo, lambda image: [Detection(box, points, 0.99)], TrueM(camera, place, size, (360, 400)), size
    )
    whole = compose(place, found.transform)
    close(
        apply(whole, torch.tensor([[0.0, 0], [64, 0], [64, 64]])), torch.tensor([[0.0, 0], [64, 0], [64, 64]]), atol=0.7
    )
    close(found.camera.label, camera.label, atol=0.02)
    close(found.transform[:, :2] @ found.inverse[:, :2], torch.eye(2), atol=1e-4)


def test_the_crop_shows_what_its_transform_says():
    photo = (coordinates(300, 400) * 255).round().astype(np.uint8)
    found = preprocess_image(
        photo,
        lambda i: [Detection(torch.tensor([150.0, 100, 210, 160]), torch.tensor([150.0, 100]) + 60 * FRACTIONS, 1)],
        blank_m,
        48,
    )
    u = (torch.stack(torch.meshgrid(torch.arange(48), torch.arange(48), indexing="xy"), -1) + 0.5).reshape(-1, 2)
    close(
        seen_places(found.image, 300, 400).reshape(-1, 2), apply(found.inverse, u), atol=1.2
    )  # 400 / 255 px is one step
    close(found.crop_points, apply(found.transform, found.points))
    inside = apply(found.transform, torch.tensor([[150.0, 100], [210, 160]]))
    assert (found.boxes[:, :2] >= inside[0] - 9).all() and (found.boxes[:, 2:] <= inside[1] + 9).all()


@pytest.mark.parametrize("x, y", [(180, 130), (20, 20), (390, 290), (0, 150), (-10, 40)])
def test_cut_is_warp_also_across_the_border(x, y):
    photo = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    floats = torch.from_numpy(photo).permute(2, 0, 1) / 127.5 - 1
    for side in (30.0, 90.0, 500.0):
        transform = frame_face(torch.tensor([x, y]) + side * (FRACTIONS - 0.5), 40)
        close(cut(photo, transform, 40)[0], warp(floats, transform, 40), atol=1e-3)


def test_pasting_back_is_the_way_back():
    photo = torch.from_numpy(coordinates(300, 400)).permute(2, 0, 1).float()
    points = torch.tensor([150.0, 100]) + 60 * FRACTIONS
    found = preprocess_image(
        photo, lambda i: [Detection(torch.tensor([150.0, 100, 210, 160]), points, 1)], blank_m, 128
    )
    close(found.paste(photo, found.image), photo, atol=2 / 255)
    white = found.paste(photo, torch.ones(1, 3, 32, 32))
    x, y = points[2].long().tolist()
    assert (white[:, y, x] == 1).all() and torch.equal(white[:, :20], photo[:, :20])


def test_recut_believes_the_points_when_m_is_far_off():
    transform = frame_face(torch.tensor([90.0, 80]) + 60 * FRACTIONS, 64)
    for pose in ([0, 0, 0, 0.4, 0, 0], [0, 0, 0, 0, 0, 0.9], [0, 0, 0, 0, 0, -0.9]):
        camera = pose_camera(torch.tensor([pose]))
        kept, same = recut(transform, camera, 64)
        assert kept is transform and same is camera
    moved, upright = recut(transform, pose_camera(torch.tensor([[0.1, 0.2, 0.3, 0.1, 0, 0.2]])), 64)
    assert not torch.equal(moved, transform)
    assert abs(float(moved[:, :2].det().sqrt() / transform[:, :2].det().sqrt()) - math.exp(-0.2)) < 1e-4
    close(upright.label, Camera.orbit(*upright.yaw_pitch()).label, atol=1e-5)


@few
@given(st.integers(0, 3), st.integers(1, 90), st.integers(1, 90))
def test_turning_back(turns, height, width):
    picture = np.arange(height * width).reshape(height, width)
    turned = np.rot90(picture, turns)
    i, j = np.indices(turned.shape)
    back = (
        turn_back(torch.from_numpy(np.stack([j + 0.5, i + 0.5], -1).reshape(-1, 2)), turns, (height, width))
        .long()
        .numpy()
    )
    assert np.array_equal(picture[back[:, 1], back[:, 0]], turned.ravel())


# ---- bad photos


def portrait(tmp_path, name="a.png", image=None, **options):
    Image.fromarray(ASTRONAUT[:256, 96:352] if image is None else image).save(tmp_path / name, **options)
    return tmp_path / name


@pytest.fixture(scope="module")
def usual():
    return preprocess_image(ASTRONAUT[:256, 96:352], face3d=blank_m, size=64)


def as_kind(tmp_path, kind):
    "The same portrait in another format."
    image = Image.fromarray(ASTRONAUT[:256, 96:352])
    if kind == "grey":
        image.convert("L").save(tmp_path / "a.png")
    elif kind == "rgba":
        image.putalpha(255)
        image.save(tmp_path / "a.png")
    elif kind == "cmyk":
        image.convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    elif kind == "16 bit":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(tmp_path / "a.png")
    else:  # stored lying on its side, with a note
        exif = Image.Exif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=exif, quality=95)
    return next(tmp_path.glob("a.*"))


@pytest.mark.parametrize("kind", ["grey", "rgba", "cmyk", "16 bit", "exif"])
def test_formats_come_through(tmp_path, kind, usual):
    found = preprocess_image(as_kind(tmp_path, kind), face3d=blank_m, size=64)
    assert (found.points - usual.points).norm(dim=-1).max() < 3 and found.warnings == ()
    other = usual.image.mean(1, keepdim=True) if kind in ("grey", "16 bit") else usual.image
    assert (found.image.mean(1) - other.mean(1)).abs().mean() < 0.05


def test_broken_files_are_named(tmp_path):
    whole = portrait(tmp_path).read_bytes()
    for name, content in {
        "cut.png": whole[: len(whole) // 2],
        "text.jpg": b"no picture",
        "empty.png": b"",
        "damaged.png": whole[:3000] + bytes(9000) + whole[12000:],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"cannot read the image.*{name}"):
            preprocess_image(tmp_path / name, face3d=blank_m)
    with pytest.raises(MissingResource, match="nobody.png"):
        preprocess_image(tmp_path / "nobody.png", face3d=blank_m)
    with pytest.raises(InputError, match="folder"):
        preprocess_image(tmp_path, face3d=blank_m)


def test_no_face():
    with pytest.raises(
        InputError, match="no face in a photo of 600 x 400 pixels, neither as it is nor enlarged nor turned"
    ):
        preprocess_image(data.coffee(), face3d=blank_m)
    with pytest.raises(InputError, match="no face in"):
        preprocess_image(np.zeros((1, 1, 3), np.uint8), face3d=blank_m)


def test_several_faces_take_the_largest_and_say_so():
    photo = scene((100, 150), side=60)
    photo[50:150, 250:350] = 255  # 100 px
    found = preprocess_image(photo, square_detector, blank_m, 32)
    close(found.points, torch.tensor([250.0, 50]) + 100 * FRACTIONS)
    assert "2 faces: took the largest, 100 x 100 px around (300, 100)" in found.warnings


def test_a_face_cut_by_the_frame():
    box = torch.tensor([-30.0, 40, 30, 100])
    found = preprocess_image(scene(), lambda i: [Detection(box, box[:2] + 60 * FRACTIONS, 1.0)], blank_m, 32)
    assert any("the frame cuts the face: 50% of it" in w for w in found.warnings)
    assert any("of the crop lie outside the picture" in w for w in found.warnings)
    assert bool(torch.isfinite(found.image).all())
    box = torch.tensor([-12.0, 40, 48, 100])  # a cheek is cut, the five points are inside
    found = preprocess_image(scene(), lambda i: [Detection(box, box[:2] + 60 * FRACTIONS, 1.0)], blank_m, 32)
    assert any("the frame cuts the face: 20% of it" in w for w in found.warnings)
    real = preprocess_image(ASTRONAUT[80:], face3d=blank_m, size=64)  # the forehead is gone
    assert any("cuts the face" in w or "outside the picture" in w for w in real.warnings)


def test_small_faces():
    found = preprocess_image(scene((100, 100), side=SMALLEST), square_detector, blank_m, 64)
    assert any("enlarges it 2.4 times" in w for w in found.warnings)
    with pytest.raises(InputError, match="at least 16 pixels"):
        preprocess_image(scene((100, 100), side=SMALLEST - 2), square_detector, blank_m, 64)


def test_a_small_face_is_found_by_enlarging():
    "A detector that sees no face under 40 pixels, and a real face of 17 x 22."
    short = lambda image: [d for d in square_detector(image) if d.size >= 40]
    found = preprocess_image(scene((100, 100), side=24), short, blank_m, 32)
    assert "the face was found only after enlarging it" in found.warnings
    close(found.points, torch.tensor([88.0, 88]) + 24 * FRACTIONS, atol=1)
    fifth = np.asarray(Image.fromarray(ASTRONAUT).resize((102, 102), Image.Resampling.BOX))
    found = preprocess_image(fifth, face3d=blank_m, size=64)
    assert any("enlarges it" in w for w in found.warnings)
    assert (found.points * 512 / 102 - find_faces(ASTRONAUT)[0].points).norm(dim=-1).max() < 8
    with pytest.raises(InputError, match="no face"):
        preprocess_image(fifth[::2, ::2], face3d=blank_m, size=64)


def test_a_photo_on_its_side():
    faces, how = search(np.ascontiguousarray(np.rot90(ASTRONAUT)))
    assert "quarter turn to the right" in how
    assert (turn_back(faces[0].points, 1, (512, 512)) - find_faces(ASTRONAUT)[0].points).norm(dim=-1).max() < 4


def test_a_bad_m_or_detector_is_named():
    face = lambda i: [Detection(torch.tensor([90.0, 90, 150, 150]), 90 + 60 * FRACTIONS, 1.0)]
    for wrong, word in (
        (lambda x: None, "face3d must be something that returns alpha"),
        (lambda x: blank_m(x)._replace(beta=torch.zeros(52)), "beta of face3d"),
        (lambda x: blank_m(x)._replace(alpha=torch.full((1, 100), torch.nan)), "finite"),
    ):
        with pytest.raises(InputError, match=word):
            preprocess_image(scene(), face, wrong, 32)
    junk = [
        Detection(torch.tensor([0.0, 0, 50, 50]), torch.full((5, 2), torch.nan), 1.0),
        Detection(torch.tensor([0.0, 0, 50, 50]), torch.ones(5, 2), 1.0),
    ]
    assert find_faces(scene(), lambda i: junk) == []


# ---- the steady clock


@few
@given(st.integers(1, 80), st.sampled_from([10.0, 24.0, 25.0, 30000 / 1001, 60.0]), st.integers(0, 10**6))
def test_constant_rate_is_left_alone(n, fps, seed):
    "Also with times that tremble by a fifth of a frame."
    times = (np.arange(n) + np.random.default_rng(seed).uniform(-0.2, 0.2, n) * (np.arange(n) > 0)) / fps + 7
    assert list(Steady(zip(times, range(n)), fps)) == [(k, k) for k in range(n)]


@few
@given(st.lists(st.floats(0.001, 2), min_size=1, max_size=40), st.sampled_from([5.0, 25.0]))
def test_each_tick_shows_the_newest_frame(steps, fps):
    times = np.concatenate([[0], np.cumsum(steps)])
    steady = Steady(zip(times, range(len(times))), fps)
    for tick, frame in steady:
        came = np.floor(times * fps + 0.5) <= tick
        assert frame == np.flatnonzero(came)[-1]
    ticks = int(np.floor(times[-1] * fps + 0.5)) + 1
    assert tick == ticks - 1 and len(times) - steady.dropped + steady.repeated == ticks


def test_a_jumping_clock_does_not_make_hours_of_frames():
    steady = Steady([(0, "a"), (0.1, "b"), (9000, "c"), (9000.1, "d"), (5, "e"), (5.1, "f")], 10)
    assert [f for _, f in steady] == list("abcdef") and steady.jumps == 2


# ---- smoothing


@few
@given(st.integers(3, 40), st.floats(-5, 5), st.floats(-3, 3), st.integers(0, 10**6))
def test_lines_pass_unchanged_through_gaps(n, start, slope, seed):
    random = np.random.default_rng(seed)
    there = random.uniform(size=n) < 0.7
    there[[0, -1]] = True
    line = start + slope * np.arange(n)
    came = [
        v[0]
        for v, _ in smooth(
            (Moment(k / 25, line[k : k + 1] if there[k] else None, 0, None) for k in range(n)),
            np.array([9.0]),
            np.zeros(1),
        )
    ]
    np.testing.assert_allclose(came, line, atol=1e-6)


def test_noise_is_halved_and_a_blink_kept():
    t, random = np.arange(500) / 25, np.random.default_rng(0)
    noise = random.normal(0, 1, (500, 2))
    out = np.array(
        [v for v, _ in smooth((Moment(a, y, 0, None) for a, y in zip(t, noise)), np.array([0.025, 0.15]), np.zeros(2))]
    )
    assert (
        0.5 < out[:, 0].std() < 0.75
        and out[:, 1].std() < 0.4
        and jitter(out[:, 1:]) < 0.1
        and abs(jitter(noise) - 1) < 0.1
    )
    blink = np.zeros(50)
    blink[24:27] = 0.5, 1, 0.5
    out = np.array(
        [
            v[0]
            for v, _ in smooth(
                (Moment(a, np.array([y]), 0, None) for a, y in zip(t, blink)), beta_widths(52)[8:9], np.zeros(1)
            )
        ]
    )
    assert out.max() > 0.75 and out.argmax() == 25
    assert local_line(0.0, np.array([0.0]), np.array([[3.0]]), np.ones(1)) == 3


def test_stretches_do_not_mix_and_the_last_motion_is_held():
    values = [0.0] * 10 + [None] * 30 + [5.0] * 10
    moments = (Moment(k / 25, None if y is None else np.array([y]), int(k >= 40), k) for k, y in enumerate(values))
    out = {k: float(v[0]) for v, k in smooth(moments, np.array([0.1]), np.array([7.0]))}
    assert [out[k] for k in range(50)] == [0.0] * 40 + [5.0] * 10
    hill = [0.0, 1, 2, 3, 4, 3, 2] + [None] * 20  # falling when it is lost: it does not fall on
    lost = (Moment(k / 25, None if y is None else np.array([y]), 0, k) for k, y in enumerate(hill))
    out = [float(v[0]) for v, _ in smooth(lost, np.array([0.1]), np.zeros(1))]
    assert set(out[7:]) == {out[6]} and out[6] > 1.5
    cut_at_20 = (Moment(k / 25, np.array([0.0 if k < 20 else 5.0]), int(k >= 20), k) for k in range(40))
    assert [float(v[0]) for v, _ in smooth(cut_at_20, np.array([0.1]), np.zeros(1))] == [0.0] * 20 + [5.0] * 20
    assert [float(v[0]) for v, _ in smooth([Moment(0, None, 0, 0)], np.ones(1), np.array([7.0]))] == [7.0]


@few
@given(st.floats(-0.8, 0.8), st.floats(-0.4, 0.4), st.floats(-0.4, 0.4), st.floats(-0.2, 0.2), st.floats(-0.3, 0.3))
def test_cameras_as_numbers(yaw, pitch, roll, place, size):
    camera = pose_camera(torch.tensor([[pitch, yaw, roll, place, -place, size]]))
    close(row_camera(camera_row(camera)[0]).label, camera.label, atol=2e-5)
    near = Camera.orbit(yaw, pitch, radius=2.0)
    close(row_camera(camera_row(near)[0]).label, near.label, atol=2e-5)


def test_smoothing_settings_are_checked():
    with pytest.raises(InputError, match="smoothing.pose"):
        Smoothing(pose=-1.0)


# ---- following


def test_the_tracker_keeps_to_one_face():
    tracker = Tracker(square_detector, 25.0)
    for k in range(20):
        frame = scene((60 + 3 * k, 150), *[(300, 80)] * (k > 2), side=50)
        frame[150:270, 270:] = 255 if k > 5 else 0  # a larger face comes in
        assert tracker(frame).points.mean(0)[0] < 140
    assert tracker.stretch == 0


def test_the_tracker_sees_cuts_and_gives_up_slowly():
    calls = []
    tracker = Tracker(lambda image: calls.append(image.size) or square_detector(image), 25.0)
    tracker(scene((100, 150)))
    assert tracker(scene((300, 150))).box[0] > 200 and tracker.stretch == 1
    calls.clear()
    for _ in range(50):
        assert tracker(scene()) is None
    assert 10 <= len(calls) <= 20
    assert tracker(scene((100, 150))) is not None and tracker.stretch == 2


def test_following_looks_at_windows():
    calls = []
    film = Film([lambda k=k: scene((900 + k, 500), side=200, size=(1080, 1920)) for k in range(8)])
    list(
        preprocess_video(
            film, lambda image: calls.append(image.shape) or square_detector(image), blank_m, 32, progress=False
        )
    )
    whole = [s for s in calls if max(s) > 200]
    assert len(whole) == 2 and max(map(max, whole)) == 960  # once to find the first face, once to begin


# ---- videos


def test_a_video_without_a_face_is_refused_before_its_first_frame():
    video = preprocess_video(walk(30, range(30)), square_detector, grey_m, 32, progress=False)
    with pytest.raises(InputError, match="none in the 30 frames of the video"):
        next(iter(video))


def test_missing_faces_hold_the_motion_and_are_reported():
    nobody = set(range(4)) | set(range(20, 60)) | {70}
    film = Film([lambda k=k: scene(*([] if k in nobody else [(150, 150)]), grey=120 + k + 1) for k in range(90)])
    frames, report = prepared(film)
    assert [f.index for f in frames] == list(range(90)) and {f.index for f in frames if not f.found} == nobody
    assert report.missing == 45 and abs(report.longest - 40 / 25) < 1e-9 and report.stretches == 2
    assert any("no face in 45 of 90 frames, for up to 1.60 s" in w for w in report.warnings)
    for k in range(25, 55):  # held
        assert torch.equal(frames[k].beta, frames[24].beta) and torch.equal(
            frames[k].camera.label, frames[24].camera.label
        )
    assert all(torch.equal(frames[k].beta, frames[0].beta) for k in range(3))  # before the first: the first
    assert frames[69].beta[0, 0] <= frames[70].beta[0, 0] <= frames[71].beta[0, 0]  # one lost frame is bridged
    assert frames[70].score == 0 and frames[69].score > 0.9


def test_the_square_hardly_trembles_and_follows():
    random = np.random.default_rng(0)
    shake = random.normal(0, 1.5, (60, 2))

    def trembling(image):
        return [
            d._replace(points=d.points + torch.from_numpy(shake[count.pop(0) % 60]).float())
            for d in square_detector(image)
        ]

    count = list(range(200))
    video = preprocess_video(walk(60), trembling, blank_m, 32, progress=False)
    frames = list(video)
    middles = torch.stack([apply(f.inverse, torch.tensor([[16.0, 16]]))[0] for f in frames]).numpy()
    assert jitter(middles) < 0.15 and np.abs(np.diff(middles[:, 0])[5:-5] - 2).max() < 0.5  # two pixels a frame


def test_identity_is_the_mean_and_loops_repeat():
    film = Film([lambda k=k: scene((150, 150), grey=130 + k) for k in range(20)])
    video = preprocess_video(film, square_detector, grey_m, 32, progress=False)
    a, b = list(video), list(video)
    assert all(
        torch.equal(x.image, y.image) and torch.equal(x.beta, y.beta) and torch.equal(x.alpha, y.alpha)
        for x, y in zip(a, b)
    )
    raw = [grey_m(cut(f(), frame_face(square_detector(f())[0].points, 32), 32)).alpha for f in film.made]
    close(video.report.alpha, torch.stack(raw).mean(0), atol=6e-3)
    assert (video.report.alpha - raw[-1]).abs().min() > 8e-3
    close(a[-1].alpha, video.report.alpha)


def test_other_settings_of_a_video():
    frames, report = prepared(walk(40), every=3)
    assert report.missing == 0
    for k in (10, 20, 30):
        assert (frames[k].points.mean(0) - torch.tensor([100.0 + 2 * k, 156])).abs().max() < 1.5
    assert len(prepared(walk(39), fps=12.5)[0]) == 20
    frames, _ = prepared(walk(10), framing="eg3d")
    side = float(1 / frames[5].transform[:, :2].det().sqrt()) * 32
    assert abs(side / (4 * 24 * 0.939) - 1) < 0.05  # four eye distances
    for wrong in (dict(fps=0.0), dict(fps=90.0), dict(every=0), dict(framing="x"), dict(size=4)):
        with pytest.raises(InputError, match=next(iter(wrong))):
            preprocess_video(walk(3), square_detector, grey_m, **wrong)


def test_variable_frame_rate_keeps_time():
    times = [0, 0.04, 0.5, 0.51, 0.54, 1.0]
    frames, report = prepared(Film([lambda k=k: scene((100 + 30 * k, 150)) for k in range(6)], times=times))
    assert len(frames) == 26 and [f.time for f in frames] == [k / 25 for k in range(26)]
    assert report.repeated == 21 and report.dropped == 1 and any("variable frame rate" in w for w in report.warnings)
    assert abs(frames[11].points.mean(0)[0] - 130) < 8  # still the second frame


def test_no_sound_and_motion_files(tmp_path):
    video = preprocess_video(walk(12), square_detector, grey_m, 32, progress=False)
    motion = motion_of(video)
    assert motion.wave is None and len(motion) == 12 and motion.fps == 25
    motion.save(tmp_path / "m.safetensors")
    assert load_tensors(tmp_path / "m.safetensors")[0].keys() == {"beta", "camera"}


def film_file(path, frames, fps=25, audio=None):
    with VideoWriter(path, fps, frames[0].shape[:2], audio) as out:
        for f in frames:
            out.write(f)
    return path


def test_bad_video_files(tmp_path):
    noise = np.random.default_rng(0).integers(0, 60, (12, 300, 400, 3), dtype=np.uint8)
    whole = film_file(tmp_path / "a.mp4", [np.maximum(n, scene((150, 150))) for n in noise]).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "text.mp4").write_bytes(b"no video")
    for name in ("cut.mp4", "text.mp4"):
        with pytest.raises(InputError, match=name):
            preprocess_video(tmp_path / name, square_detector, grey_m)
    with av.open(str(tmp_path / "none.mkv"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        out.start_encoding()
    with pytest.raises(InputError):
        preprocess_video(tmp_path / "none.mkv", square_detector, grey_m)
    with pytest.raises(MissingResource, match="gone.mp4"):
        preprocess_video(tmp_path / "gone.mp4", square_detector, grey_m)


def test_a_video_that_breaks_in_the_middle():
    "The frames before the fault may come; the fault comes through as it is."

    def broken():
        raise InputError("cannot read the video a.mp4 after frame 30")

    video = preprocess_video(Film([*walk(30).made, broken]), square_detector, grey_m, 32, progress=False)
    came = []
    with pytest.raises(InputError, match="after frame 30"):
        for frame in video:
            came.append(frame.index)
    assert came == list(range(len(came))) and 10 < len(came) <= 30 and video.report is None


def test_an_empty_reader():
    with pytest.raises(InputError, match="none in the 0 frames"):
        list(preprocess_video(Film([]), square_detector, grey_m, 32, progress=False))


def test_memory_does_not_grow_with_length():
    "Frames are let go: no more are alive than the two windows of the smoothing hold. 26 of 4K are 0.65 GB."
    alive, most = weakref.WeakValueDictionary(), []

    def make(k):
        alive[k] = frame = scene((200 + k, 200), side=80)
        most.append(len(alive))
        return frame

    count = 0
    for frame in preprocess_video(
        Film([lambda k=k: make(k) for k in range(80)]), square_detector, blank_m, 16, progress=False
    ):
        count += 1
        assert frame.image.shape == (1, 3, 16, 16)
    del frame
    assert count == 80 and max(most) <= 26 and not len(alive)


# ---- folders


def test_prepare_folder_goes_on_and_reports(tmp_path):
    rate = 8000
    sound = np.sin(np.arange(rate) / 5).astype(np.float32) * 0.3, rate
    film_file(tmp_path / "a.mp4", [scene((150 + k, 150)) for k in range(10)], audio=sound)
    film_file(tmp_path / "b.mp4", [scene() for _ in range(3)])
    film_file(tmp_path / "c.mp4", [scene((150, 150))] * 5)
    videos, out = [tmp_path / f"{n}.mp4" for n in "abcd"], tmp_path / "out"
    run = lambda **kw: prepare_folder(videos, out, square_detector, grey_m, 32, progress=False, **kw)
    first = run()
    assert [o.status for o in first] == ["done", "failed", "done", "failed"]
    assert "none in the 3 frames of b.mp4" in first[1].message and "d.mp4" in first[3].message
    assert sorted(p.name for p in out.iterdir()) == ["a", "c", "report.json"]
    assert [r["status"] for r in json.loads((out / "report.json").read_text())] == ["done", "failed", "done", "failed"]
    assert outcome_table(first).count("\n") == 5
    before = (out / "a" / "labels.safetensors").stat().st_mtime_ns
    assert [o.status for o in run()] == ["skipped", "failed", "skipped", "failed"]
    assert (out / "a" / "labels.safetensors").stat().st_mtime_ns == before
    assert "another framing" in run(framing="ffhq")[0].message
    film_file(tmp_path / "c.mp4", [scene((100, 100))] * 5)
    assert "another sha256" in run()[2].message
    clip = read_clip_folder(out / "a")
    assert (
        len(clip) == 10 == len(clip.motion())
        and clip.motion().rate == rate
        and clip.record["sha256"]
        and clip.image(-1).shape == (3, 32, 32)
    )
    frames = list(preprocess_video(tmp_path / "a.mp4", square_detector, grey_m, 32, progress=False))
    for k in (0, 5, 9):
        assert torch.equal(clip.beta[k], frames[k].beta[0]) and torch.equal(clip.camera[k], frames[k].camera.label[0])
        assert torch.equal(clip.points[k], frames[k].crop_points) and torch.equal(clip.boxes[k], frames[k].boxes)
        assert (clip.image(k) - frames[k].image[0] / 2 - 0.5).abs().mean() < 0.03
    assert torch.equal(clip.alpha[0], frames[-1].alpha[0])


def test_a_killed_run_leaves_nothing_under_the_final_name(tmp_path):
    film_file(tmp_path / "a.mp4", [scene((150, 150))] * 30)
    calls = []

    def dies(image):
        calls.append(0)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return grey_m(image)

    run = lambda m: prepare_folder([tmp_path / "a.mp4"], tmp_path / "out", square_detector, m, 32, progress=False)
    with pytest.raises(KeyboardInterrupt):
        run(dies)
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "out" / ".a.part" / "frames").mkdir(parents=True)  # what kill -9 leaves
    (tmp_path / "out" / ".a.part" / "frames" / "000099.jpg").write_bytes(b"")
    assert run(grey_m)[0].status == "done"
    assert (
        len(list((tmp_path / "out" / "a" / "frames").iterdir())) == 30 and not (tmp_path / "out" / ".a.part").exists()
    )


def test_a_picture_that_was_changed_is_refused(tmp_path):
    film_file(tmp_path / "a.mp4", [scene((150 + k, 150)) for k in range(4)])
    prepare_folder([tmp_path / "a.mp4"], tmp_path / "out", square_detector, grey_m, 32, progress=False)
    clip = read_clip_folder(tmp_path / "out" / "a")
    before, path = clip.sha256, clip.folder / "frames" / "000002.jpg"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    for index in (2, -2):
        with pytest.raises(InputError, match="the picture that was prepared"):
            clip.image(index)
    assert clip.image(1).shape == clip.image(-1).shape == (3, 32, 32)
    assert read_clip_folder(clip.folder).sha256 == before  # of what was prepared; a frame is checked when it is read
    hashes = json.loads((clip.folder / "pictures.json").read_text())
    (clip.folder / "pictures.json").write_text(json.dumps(hashes[::-1]))
    assert read_clip_folder(clip.folder).sha256 != before
    (clip.folder / "pictures.json").write_text(json.dumps(hashes[1:]))
    with pytest.raises(InputError, match="of 4 frames"):
        read_clip_folder(clip.folder)
    (clip.folder / "pictures.json").unlink()  # as older folders are: for training, not for a list of test clips
    assert read_clip_folder(clip.folder).image(2).max() < 0.1
    with pytest.raises(InputError, match="prepare it again"):
        _ = read_clip_folder(clip.folder).sha256


def test_folders_of_pictures_are_videos(tmp_path):
    for k in range(6):
        (tmp_path / "in" / "Clip+x.y").mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene((150 + 4 * k, 150))).save(tmp_path / "in" / "Clip+x.y" / f"{k:08d}.png")
    (tmp_path / "in" / "empty").mkdir()
    videos, out = [tmp_path / "in" / "Clip+x.y", tmp_path / "in" / "empty"], tmp_path / "out"
    run = lambda **kw: prepare_folder(videos, out, square_detector, grey_m, 32, progress=False, **kw)
    first = run()
    assert [o.status for o in first] == ["done", "failed"] and "folder of PNG or JPEG" in first[1].message
    clip = read_clip_folder(out / "Clip+x.y")
    frames = list(
        preprocess_video(Film([lambda k=k: scene((150 + 4 * k, 150)) for k in range(6)]), square_detector, grey_m, 32)
    )
    assert clip.record["fps"] == 25 and len(clip) == 6 and torch.equal(clip.beta[5], frames[5].beta[0])
    assert [o.status for o in run()] == ["skipped", "failed"]
    (videos[0] / "00000005.png").write_bytes((videos[0] / "00000004.png").read_bytes())
    assert "another sha256" in run()[0].message
    assert run(names=["other", "none"], fps=10.0)[0] == first[0].__class__("other", "done", 6)
    assert read_clip_folder(out / "other").record["fps"] == 10
    with pytest.raises(InputError, match="names must be 2"):
        run(names=["other"])


def test_bad_folders(tmp_path):
    film_file(tmp_path / "a.mp4", [scene((150, 150))] * 3)
    (tmp_path / "file").write_text("")
    for videos, out, word in (
        ([], "out", "none"),
        ([tmp_path / "a.mp4", tmp_path / "x" / "a.mkv"], "out", "a more than once"),
        ([tmp_path / "a.mp4"], "file/out", "cannot make the folder"),
    ):
        with pytest.raises(InputError, match=word):
            prepare_folder(videos, tmp_path / out, square_detector, grey_m, 32, progress=False)
    with pytest.raises((InputError, MissingResource)):
        read_clip_folder(tmp_path)


def test_the_training_set_reads_the_folders(tmp_path):
    videos = pytest.importorskip("nofa_nb.data.videos")
    for name in "ab":
        film_file(tmp_path / f"{name}.mp4", [scene((150 + 2 * k, 150)) for k in range(6)])
    prepare_folder(
        [tmp_path / "a.mp4", tmp_path / "b.mp4"], tmp_path / "out", square_detector, grey_m, 32, progress=False
    )
    found = videos.load_clips(tmp_path / "out", 32, progress=False)
    clip = read_clip_folder(tmp_path / "out" / "b")
    assert found.clips == 2 and len(found) == 12
    close(found.points[6:] * 32, clip.points)
    close(found.pairs(range(2), 0).boxes[0], found.pairs(range(2), 0).boxes[0])
    close(found.at([0], [6]).boxes[0] * 32, clip.boxes[0], atol=1e-3)
