"""Talking clips: the same every time, one frame in memory, sound as long as the picture, test lists as they shipped."""
import gc
import json
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from setuptools import glob
from torch.utils.data import DataLoader

import nofa_nb
from nofa_nb.core import io
from nofa_nb.core.config import WorldConfig
from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.io import VideoReader
from nofa_nb.geometry.cameras import Camera
from nofa_nb.world import clips
from nofa_nb.world.bust import person_from_code, sample_person
from nofa_nb.world.clips import (
    MANIFESTS,
    ClipSet,
    build_manifests,
    clip,
    clip_frames,
    clip_motion,
    load_manifest,
    render_clip,
    source_view,
    write_clip,
    write_manifests,
)
from nofa_nb.world.motion import UNIT, neutral_motion, sample_motion, still

SIZE = 32
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def manifests():
    return build_manifests()


def talk(frames=4, seed=5):
    return sample_motion(seed, frames / 25, engine="builtin")


# --- frames -----------------------------------------------------------------------------------------------------------
def test_same_seed_same_pixels_and_another_seed_others():
    def pixels(person, seed):
        return torch.cat([v.rgb for v in render_clip(person, talk(3, seed), SIZE)])
    assert torch.equal(pixels(1, 5), pixels(1, 5))
    assert (pixels(1, 5) - pixels(2, 5)).abs().mean() > .02 and (pixels(1, 5) - pixels(1, 6)).abs().max() > .02


def test_a_person_serves_like_its_seed():
    person = person_from_code(sample_person(4).code)
    assert torch.equal(next(render_clip(person, talk(1), SIZE)).rgb, next(render_clip(4, talk(1), SIZE)).rgb)


def test_labels_belong_to_their_frame():
    motion = talk(4)
    for i, v in enumerate(render_clip(1, motion, SIZE)):
        assert len(v) == 1 and torch.equal(v.beta[0], motion.beta[i])
        assert torch.equal(v.camera.label, motion.camera[i].label)


class Watch:
    "Stands in for `render`; counts the calls and how many of its results are alive at once."
    def __init__(self, fail_at=None):
        self.calls, self.most, self.alive, self.fail_at, self.real = 0, 0, weakref.WeakSet(), fail_at, clips.render

    def __call__(self, *args, **kwargs):
        if self.calls == self.fail_at:
            raise RuntimeError("out of memory")
        views = self.real(*args, **kwargs)
        self.calls += 1
        held = views.rgb.untyped_storage()  # weakly referable; what costs memory
        self.alive.add(held)
        gc.collect()
        self.most = max(self.most, len(self.alive))
        return views


def test_frames_are_rendered_when_asked_for(monkeypatch):
    watch = Watch()
    monkeypatch.setattr(clips, "render", watch)
    dressed = []
    monkeypatch.setattr(clips, "dress", lambda *a, real=clips.dress: dressed.append(a) or real(*a))
    frames = render_clip(0, neutral_motion(3600.), SIZE)  # an hour
    assert watch.calls == 0 and not dressed
    next(frames), next(frames)
    assert watch.calls == 2 and len(dressed) == 1


def test_a_frame_takes_one_thread_and_gives_the_others_back(monkeypatch):
    used = []
    monkeypatch.setattr(clips, "render", lambda *a, real=clips.render: used.append(torch.get_num_threads()) or real(*a))
    torch.set_num_threads(2)
    try:
        next(render_clip(0, talk(1), SIZE))
        clip_frames(0, talk(1), SIZE)
        assert used == [1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_film_holds_two_frames_at_most(monkeypatch, tmp_path):
    watch = Watch()
    monkeypatch.setattr(clips, "render", watch)
    write_clip(tmp_path / "a.mp4", 0, talk(12), SIZE)
    assert watch.calls == 12 and watch.most <= 2  # this one and the one that is being written


def test_the_watch_sees_hoarding(monkeypatch):
    watch = Watch()
    monkeypatch.setattr(clips, "render", watch)
    hoard = list(render_clip(0, talk(4), SIZE))
    assert len(hoard) == watch.most == 4


def box(points, grow):
    "Pixel rectangle around normalised points: top, bottom, left, right."
    low, high = points.amin(0), points.amax(0)
    margin = grow * (high - low)
    (x0, y0), (x1, y1) = ((low - margin) * 64).floor().int().tolist(), ((high + margin) * 64).ceil().int().tolist()
    return slice(y0, y1), slice(x0, x1)


@pytest.mark.parametrize("person", [0, 10, 19])
def test_the_mouth_opens_and_the_forehead_rests(person):
    open_jaw = torch.zeros(52)
    open_jaw[UNIT["jawOpen"]] = .8
    shut, opened = (next(render_clip(person, still(b, .04), 64)) for b in (torch.zeros(52), open_jaw))
    change = (opened.rgb - shut.rgb)[0].abs().amax(0)
    points = shut.landmarks[0]
    mouth = change[box(points[48:68], .3)]
    brow_to_nose = points[30, 1] - points[17:27, 1].min()
    forehead = torch.stack([points[19], points[24]]) - torch.tensor([0., .12]) * brow_to_nose / .12
    rows, columns = box(forehead, 0)
    above = change[max(rows.start - 4, 0):rows.start + 2, columns]
    assert mouth.max() > .15 and (mouth > .05).float().mean() > .2
    assert above.numel() > 20 and above.max() < 2 / 255


# --- film -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seconds", [.04, .5, 1.2])
def test_sound_is_as_long_as_the_picture(tmp_path, seconds):
    path = clip(tmp_path / "new folder" / "a.mp4", seed=2, seconds=seconds, size=SIZE, engine="builtin")
    film = VideoReader(path)
    wave, rate = film.audio()
    count = len(list(film))
    assert count == round(seconds * 25) and film.fps == 25 and film.size == (SIZE, SIZE)
    assert abs(len(wave) / rate - count / 25) <= 1 / 25


def test_a_film_shows_its_frames(tmp_path):
    motion = talk(6)
    path = write_clip(tmp_path / "a.mp4", 3, motion, 64)
    for shown, v in zip(VideoReader(path), render_clip(3, motion, 64), strict=True):
        assert np.abs(shown / 255. - v.rgb[0].permute(1, 2, 0).numpy()).mean() < 6 / 255


def test_text_person_and_length(tmp_path):
    path = clip(tmp_path / "a.mp4", seed=1, seconds=None, size=SIZE, person=8, text="Ah.", engine="builtin")
    motion = sample_motion(1, None, text="Ah.", engine="builtin")
    shown = list(VideoReader(path))
    assert len(shown) == len(motion)
    expected = next(render_clip(8, motion, SIZE)).rgb[0].permute(1, 2, 0).numpy()
    assert np.abs(shown[0] / 255. - expected).mean() < 8 / 255


def test_a_silent_motion_makes_a_silent_film(tmp_path):
    assert VideoReader(write_clip(tmp_path / "a.mp4", 0, neutral_motion(.08), SIZE)).audio() is None


# --- faults -----------------------------------------------------------------------------------------------------------
def test_an_error_midway_leaves_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr(clips, "render", Watch(fail_at=5))
    with pytest.raises(RuntimeError, match="out of memory"):
        write_clip(tmp_path / "a.mp4", 0, talk(10), SIZE)
    assert list(tmp_path.iterdir()) == []


def test_an_error_midway_keeps_the_old_file(monkeypatch, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"older")
    monkeypatch.setattr(clips, "render", Watch(fail_at=1))
    with pytest.raises(RuntimeError):
        write_clip(tmp_path / "a.mp4", 0, talk(4), SIZE)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.mp4", b"older")]


def refuse(number):
    def act(*args, **kwargs):
        raise OSError(number, os.strerror(number))
    return act


@pytest.mark.parametrize("number", [13, 30])
def test_a_folder_that_cannot_be_made(monkeypatch, tmp_path, number):
    monkeypatch.setattr(Path, "mkdir", refuse(number))
    with pytest.raises(InputError, match="cannot make the folder for"):
        clip(tmp_path / "deep" / "a.mp4", seconds=.08, size=SIZE, engine="builtin")


@pytest.mark.parametrize("number", [13, 28, 30])
def test_a_place_that_cannot_be_written_costs_no_rendering(monkeypatch, tmp_path, number):
    watch = Watch()
    monkeypatch.setattr(clips, "render", watch)
    monkeypatch.setattr(io.av, "open", refuse(number))
    with pytest.raises(InputError, match="cannot write .*choose another place"):
        clip(tmp_path / "a.mp4", seconds=.08, size=SIZE, engine="builtin")
    assert watch.calls == 0 and list(tmp_path.iterdir()) == []


def test_manifests_on_a_full_disk_leave_nothing(monkeypatch, tmp_path, manifests):
    monkeypatch.setattr(clips, "build_manifests", lambda seed: manifests)
    monkeypatch.setattr(Path, "write_text", refuse(28))
    with pytest.raises(InputError, match="No space left"):
        write_manifests(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call,said", [
    (lambda p: clip(p, seconds=0.), "seconds must be at least one frame"),
    (lambda p: clip(p, seconds=-1.), "seconds must be"),
    (lambda p: clip(p, seconds=float("nan")), "seconds must be"),
    (lambda p: clip(p, seconds=None), "seconds must be"),
    (lambda p: clip(p, seconds=.1, size=8), "size must be at least 16"),
    (lambda p: clip(p, seconds=.1, size=64.5), "size must be at least 16"),
    (lambda p: clip(p, seconds=.1, person=-4), "person must be a seed"),
    (lambda p: clip(p, seconds=.1, person="Ann"), "person must be a seed"),
    (lambda p: clip(p, seed=-1, seconds=.1), "seed must be"),
    (lambda p: clip(p, seconds=.1, text=" "), "text must be"),
    (lambda p: clip(p, seconds=.1, engine="tape"), "engine must be"),
    (lambda p: clip(p.with_suffix(".avi"), seconds=.1, engine="builtin"), "path must be a name in .mp4"),
    (lambda p: render_clip(0, torch.zeros(3, 52)), "motion must be a Motion"),
    (lambda p: clip_frames(0, talk(1), 8), "size must be"),
    (lambda p: ClipSet("dev"), "split must be one of train, validation, test"),
    (lambda p: ClipSet("train", 0), "identities must be at least 1"),
    (lambda p: ClipSet("train", frames=0), "frames must be at least 1"),
    (lambda p: ClipSet("test", 5, start=9_996), "start . identities must be at most 10000"),
    (lambda p: ClipSet("test", 5, start=-1), "start . identities must be"),
    (lambda p: load_manifest("films"), "name must be one of self, cross, audio"),
])
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, call, said):
    with pytest.raises(InputError, match=said) as caught:
        call(tmp_path / "a.mp4")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


# --- data -------------------------------------------------------------------------------------------------------------
def flat(c):
    return c.identity, c.motion, c.first, c.rgb, c.mask, c.beta, c.camera, c.landmarks, c.visible, c.code


def test_clips_as_data_are_the_same_for_any_number_of_workers():
    data = ClipSet("validation", identities=3, clips=1, frames=2, size=SIZE)
    alone = sorted(map(flat, data), key=lambda c: c[:3])
    for workers in (2,):
        several = sorted(map(flat, DataLoader(data, batch_size=None, num_workers=workers)), key=lambda c: c[:3])
        assert len(several) == len(alone) == len(data) == 3
        for a, b in zip(alone, several):
            assert a[:3] == b[:3] and all(torch.equal(x, y) for x, y in zip(a[3:], b[3:]))


def test_labels_of_a_stretch_are_those_of_the_motion():
    got = next(iter(ClipSet("train", 1, 1, 3, SIZE, start=77)))
    motion = sample_motion(got.motion, 5.0, engine="builtin")[got.first:got.first + 3]
    assert torch.equal(got.beta, motion.beta) and torch.equal(got.code, sample_person(77).code) and got.identity == 77
    torch.testing.assert_close(got.camera, motion.camera.label)
    view = next(render_clip(77, motion, SIZE))
    assert torch.equal(got.rgb[0], (view.rgb[0] * 255).round().to(torch.uint8))
    assert torch.equal(got.landmarks[0], view.landmarks[0]) and Camera.from_label(got.camera).label.shape == (3, 25)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_stays_in_its_range(split):
    low, high = getattr(WorldConfig, split)
    data = ClipSet(split, identities=300, clips=3, start=high - low - 300)
    motions = [m for i in data.identities for m, _ in data.motions(i)]
    outside = [s for s in [*data.identities, *motions] if not low <= s < high]
    assert not outside[:5] and data.identities[-1] == high - 1


# --- manifests --------------------------------------------------------------------------------------------------------
def test_built_again_they_are_those_that_ship(manifests):
    for name, count in MANIFESTS.items():
        shipped = load_manifest(name)
        assert shipped.sha256 == manifests[name].sha256 and shipped == manifests[name] and len(shipped) == count
    assert len({m.sha256 for m in manifests.values()}) == 3


def test_another_seed_draws_others():
    assert clips._test_seeds(1, "identities", 260, True) != clips._test_seeds(0, "identities", 260, True)


def test_no_identity_or_motion_of_the_test_can_be_trained_on(manifests):
    train, validation, test = WorldConfig.train, WorldConfig.validation, WorldConfig.test
    entries = [e for name in MANIFESTS for e in load_manifest(name).entries]
    people = [e.identity for e in entries]
    seeds = people + [getattr(e, "motion", None) or e.view for e in entries]
    for low, high in (train, validation):
        assert not [s for s in seeds if low <= s < high]
    assert all(test[0] <= s < test[1] for s in seeds) and len(people) == len(set(people)) == 260


def test_entries_say_what_they_should(manifests):
    assert all(e.frames == 75 and 0 <= e.source < 75 and e.text for e in manifests["self"].entries)
    assert all(20 <= e.frames <= 200 for e in manifests["audio"].entries)
    assert len({e.text for e in manifests["audio"].entries}) == 20
    drivers = [e.driver for e in manifests["cross"].entries]
    assert np.bincount(drivers, minlength=40).tolist() == [5] * 40
    assert all(abs(e.yaw) <= 30 and abs(e.pitch) <= 12 for e in manifests["cross"].entries)


def test_an_entry_gives_its_clip_and_its_source():
    entry = load_manifest("self").entries[0]
    motion = clip_motion(entry)
    assert len(motion) == 75 and motion.text == entry.text and len(motion.wave) == 3 * motion.rate
    view = source_view(entry, SIZE)
    assert torch.equal(view.beta[0], motion.beta[entry.source]) and view.rgb.shape == (1, 3, SIZE, SIZE)
    other = load_manifest("cross").entries[0]
    yaw, pitch = source_view(other, SIZE).camera.yaw_pitch()
    np.testing.assert_allclose(np.degrees([yaw.item(), pitch.item()]), [other.yaw, other.pitch], atol=.01)


def test_changed_motion_code_is_noticed(monkeypatch):
    entry = load_manifest("self").entries[0]
    monkeypatch.setattr(clips, "sample_motion", lambda *a: sample_motion(a[0] + 1, *a[1:]))
    with pytest.raises(InputError, match="has changed since the manifest was written"):
        clip_motion(entry)


def rewritten(change):
    def act(path):
        record = json.loads(path.read_text("utf-8"))
        change(record)
        path.write_text(json.dumps(record), "utf-8")
    return act


@pytest.mark.parametrize("touch", [
    rewritten(lambda r: r["entries"][3].update(identity=5)),
    rewritten(lambda r: r["entries"].pop()),
    rewritten(lambda r: r.update(engine="espeak")),
    rewritten(lambda r: r.pop("sha256")),
    rewritten(lambda r: r.update(sha256="0" * 64)),
    lambda path: path.write_text("[1]"),
    lambda path: path.write_text('{"sha256": null}'),
    lambda path: path.write_bytes(path.read_bytes()[:500]),
    lambda path: path.write_bytes((path.parent / "audio.json").read_bytes()),
])
def test_a_touched_manifest_is_refused(tmp_path, touch):
    shipped = Path(nofa_nb.__file__).parent / "assets" / "manifests"
    for name in MANIFESTS:
        (tmp_path / f"{name}.json").write_bytes((shipped / f"{name}.json").read_bytes())
    assert load_manifest("self", tmp_path) == load_manifest("self")
    touch(tmp_path / "self.json")
    with pytest.raises(InputError) as caught:
        load_manifest("self", tmp_path)
    assert "\n" not in str(caught.value) and "self.json" in str(caught.value)


def test_an_absent_manifest_says_where_to_get_it(tmp_path):
    with pytest.raises(MissingResource, match="test manifest self.json is missing: get it from the repository"):
        load_manifest("self", tmp_path)


def test_manifests_are_package_data():
    root = Path(nofa_nb.__file__).resolve().parents[1]
    if not (root / "setup.py").is_file():
        pytest.skip("installed without its repository")
    pattern = next(p for p in ("assets/**", "assets/*") if f'"{p}"' in (root / "setup.py").read_text("utf-8"))
    found = {Path(f).name for f in glob.glob(str(root / "nofa_nb" / pattern), recursive=True)}
    assert {"self.json", "cross.json", "audio.json", "head.npz"} <= found
