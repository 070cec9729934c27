"""Videos: pairs of one clip that are apart, labels that are the world's or M's, folders of prepared videos."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.io import save_tensors, write_image, write_json
from nofa_nb.data import videos as V
from nofa_nb.geometry.cameras import Camera
from nofa_nb.world.clips import ClipSet
from nofa_nb.world.motion import sample_motion

pytestmark = pytest.mark.usefixtures("one_thread")
CLIPS = ClipSet("train", identities=2, clips=2, frames=3, size=32)


@pytest.fixture(scope="module")
def videos():
    return V.collect_clips(CLIPS, stride=4, progress=False)


def toy(counts):
    n = sum(counts)
    points = torch.tensor([[.3, .4], [.7, .4], [.5, .6], [.4, .8], [.6, .8]])
    points = points + torch.arange(n)[:, None, None] / 1000
    rgb = torch.arange(n).to(torch.uint8)[:, None, None, None].expand(n, 3, 4, 4)
    number = torch.arange(n)[:, None].float()
    return V.VideoSet(rgb, number, number + .5, Camera.orbit(number[:, 0] / 100, 0.).label, points,
                      torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 5), st.integers(0, 9))
def test_pairs_are_of_one_clip_and_apart(counts, seed, apart):
    held = toy(counts)
    k = len(counts)
    source, target = held.choose(range(3 * k), seed, apart)
    clip = held.clip
    assert torch.equal(clip[source], clip[target])
    for first in range(0, 3 * k, k):
        assert sorted(clip[source[first:first + k]].tolist()) == list(range(k))
    for a, b in zip(source, target):
        assert abs(a - b) >= min(apart, counts[int(clip[a])] // 2)
    assert held.choose(range(1, 2), seed, apart) == (source[1:2], target[1:2])


def test_every_label_belongs_to_its_frame():
    held = toy([6, 5])
    pair = held.pairs(range(8), 3, 2)
    source, target = held.choose(range(8), 3, 2)
    s, t = torch.tensor(source), torch.tensor(target)
    frame = lambda image: ((image[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.equal(frame(pair.source), s) and torch.equal(frame(pair.target), t)
    assert torch.equal(pair.alpha[:, 0], s.float()) and torch.equal(pair.source_beta[:, 0], s + .5)
    assert torch.equal(pair.target_beta[:, 0], t + .5)
    row = lambda points: ((points[:, 0, 0] - .3) * 1000).round().long()
    assert torch.equal(row(pair.points), t) and torch.equal(row(pair.source_points), s)
    yaw = lambda label: (Camera.from_label(label).yaw_pitch()[0] * 100).round().long()
    assert torch.equal(yaw(pair.source_camera), s) and torch.equal(yaw(pair.target_camera), t)


def test_frames_of_the_world_are_every_nth_of_a_motion(videos):
    for k, (seed, first) in enumerate(m for i in CLIPS.identities for m in CLIPS.motions(i)):
        motion = sample_motion(seed, (first + 9) / 25, engine="builtin")
        mine = slice(3 * k, 3 * k + 3)
        assert torch.equal(videos.beta[mine], motion.beta[first::4][:3])
        assert torch.equal(videos.camera[mine], motion.camera.label[first::4][:3])
    assert videos.clips == 4 and videos.mask.shape == (12, 32, 32) and videos.rgb.shape == (12, 3, 32, 32)
    assert videos.alpha[:6].unique(dim=0).shape[0] == 1 and not torch.equal(videos.alpha[0], videos.alpha[6])


def test_boxes_hold_eyes_and_mouth(videos):
    pair = videos.pairs(range(4), 0)
    boxes, (left, right, _, a, b) = pair.boxes, pair.points.unbind(1)
    for place, box in ((left, boxes[:, 0]), (right, boxes[:, 1]), ((a + b) / 2, boxes[:, 2])):
        torch.testing.assert_close((box[:, :2] + box[:, 2:]) / 2, place, atol=1e-4, rtol=0)
    assert (left[:, 0] < right[:, 0]).all() and (a[:, 0] < b[:, 0]).all()  # the viewer's left first
    assert (pair.mask[:, 0, 16, 16] > .9).all() and (pair.mask[:, 0, 0, 0] < .5).all()


def test_cache_is_for_its_own_clips(tmp_path):
    small = ClipSet("train", identities=1, clips=1, frames=2, size=16)
    path = tmp_path / "clips.safetensors"
    a, b = (V.collect_clips(small, 2, path, progress=False) for _ in range(2))
    c = V.collect_clips(small, 3, path, progress=False)
    assert a.data_hash == b.data_hash != c.data_hash and torch.equal(a.rgb, b.rgb) and a.source == b.source


def test_workers_make_the_same(videos):
    again = V.collect_clips(CLIPS, stride=4, workers=1, progress=False)
    assert again.data_hash == videos.data_hash


def test_estimates_replace_labels_and_are_made_once(videos, tmp_path):
    calls = []

    class M:
        def __init__(self, image):
            calls.append(len(image))
            self.alpha, self.beta = image.mean((2, 3)), image[:, :2, 0, 0]
            self.camera = Camera.orbit(image[:, 0, 0, 0], 0.)

    for _ in range(2):
        found = V.estimate(videos, M, "M", tmp_path / "m.safetensors", at_once=5, progress=False)
    assert calls == [5, 5, 2] and found.labels == "estimated" and found.rgb is videos.rgb
    image = videos.rgb.float() / 127.5 - 1
    torch.testing.assert_close(found.alpha, image.mean((2, 3)))
    torch.testing.assert_close(found.camera, Camera.orbit(image[:, 0, 0, 0], 0.).label)
    other = V.estimate(videos, M, "another M", tmp_path / "m.safetensors", progress=False)
    assert len(calls) == 4 and other.data_hash == found.data_hash


def write(folder, videos, rows, size=32, **more):
    for i, image in enumerate(videos.rgb[rows]):
        write_image(folder / "frames" / f"{i:06d}.jpg", image.float() / 255, 100)
    labels = {k: getattr(videos, k)[rows] for k in ("alpha", "beta", "camera")}
    save_tensors(folder / "labels.safetensors", labels | {"points": videos.points[rows] * size, **more})
    write_json(folder / "clip.json", {"size": size})


def test_folders_of_prepared_videos(videos, tmp_path):
    write(tmp_path / "b", videos, slice(0, 3))
    write(tmp_path / "a", videos, slice(3, 8))
    found = V.load_clips(tmp_path, 32)
    order = [3, 4, 5, 6, 7, 0, 1, 2]  # by name
    assert found.clip.tolist() == [0] * 5 + [1] * 3 and torch.equal(found.beta, videos.beta[order])
    torch.testing.assert_close(found.points, videos.points[order])
    pixels = found.rgb[torch.arange(8)].float()
    assert (pixels - videos.rgb[order].float()).abs().mean() < 4
    held = V.load_clips(tmp_path, 32, memory=True, progress=False)
    assert torch.equal(held.rgb, found.rgb[torch.arange(8)])
    assert all(torch.equal(a, b) for a, b in zip(held.pairs(range(3), 0), found.pairs(range(3), 0)))
    assert V.load_clips(tmp_path / "a", 16).pairs(range(2), 0).source.shape == (2, 3, 16, 16)


def test_frames_without_a_face_are_left_out(videos, tmp_path):
    write(tmp_path / "a", videos, slice(0, 3), found=torch.tensor([True, False, True]))
    write(tmp_path / "b", videos, slice(3, 6), found=torch.zeros(3, dtype=torch.bool))
    write(tmp_path / "c", videos, slice(6, 8))
    held = V.load_clips(tmp_path, 32)
    assert held.clip.tolist() == [0, 0, 1, 1] and torch.equal(held.beta, videos.beta[[0, 2, 6, 7]])
    assert (held.rgb[torch.arange(4)].float() - videos.rgb[[0, 2, 6, 7]].float()).abs().mean() < 4


def test_bad_folders_say_what_is_wrong(videos, tmp_path):
    with pytest.raises(MissingResource, match="labels.safetensors"):
        V.load_clips(tmp_path, 32)
    write(tmp_path / "a", videos, slice(0, 3))
    (tmp_path / "a" / "frames" / "000001.jpg").unlink()
    with pytest.raises(MissingResource, match="frames"):
        V.load_clips(tmp_path, 32)
    write(tmp_path / "b", videos, slice(0, 3))
    (tmp_path / "a" / "labels.safetensors").unlink()
    write_json(tmp_path / "b" / "clip.json", {})
    with pytest.raises(InputError, match="size"):
        V.load_clips(tmp_path, 32)
    save_tensors(tmp_path / "b" / "labels.safetensors", {"alpha": videos.alpha[:3], "beta": videos.beta[:3]})
    with pytest.raises(InputError, match="camera"):
        V.load_clips(tmp_path, 32)


def test_labels_must_fit_the_frames():
    held = toy([2, 3])
    gap, mixed = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0, 1, 0, 1, 1])
    for bad in (dict(beta=held.beta[:4]), dict(clip=gap), dict(clip=mixed)):
        with pytest.raises(InputError):
            replace(held, **bad)
