"""The explorer without a browser: faces, scenes, the thread, and the messages of a page."""

import threading
import time
from itertools import count

import pytest
import torch

import nofa_nb.apps.explorer as X
from nofa_nb.apps import reenact
from nofa_nb.apps.explorer import Pace, Painter, Scene, Worker, face_of_seed, film_steps, load_explorer, passes
from nofa_nb.apps.explorer_serve import Measured
from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.models.avatar import Avatar
from nofa_nb.models.generator import build_generator
from nofa_nb.world.motion import UNIT, sample_motion

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def painter():
    return Painter(load_explorer("smoke").studio.model)


@pytest.fixture(scope="module")
def face(painter):
    return face_of_seed(painter.model, 7)


def units(**values):
    beta = [0.0] * 52
    for name, value in values.items():
        beta[UNIT[name]] = value
    return tuple(beta)


def test_without_trained_avatars_the_prior_is_shown_and_it_is_said(monkeypatch):
    def missing(*args):
        raise MissingResource("the folder of weights smoke/avatar")

    monkeypatch.setattr(X.Studio, "load", missing)
    monkeypatch.setattr(X, "load_generator", lambda preset: build_generator(X.load_explorer.preset.generator).eval())
    monkeypatch.setattr(X.load_explorer, "preset", X.Studio.untrained("smoke").preset, raising=False)
    monkeypatch.setattr(X, "build_avatar_model", lambda preset, seed, g: X.Studio.untrained("smoke", seed).model)
    loaded = load_explorer("small")
    assert not loaded.trained and "Untrained deformation" in loaded.notes[0] and "smoke/avatar" in loaded.notes[0]


def test_the_planes_of_a_code_are_drawn_once_for_an_expression(painter, face, monkeypatch):
    calls = []
    drawn = X.drawn_avatar
    monkeypatch.setattr(X, "drawn_avatar", lambda *a: calls.append(1) or drawn(*a))
    smile = units(mouthSmileLeft=1.0, mouthSmileRight=1.0)
    first = painter.draw(face, Scene(smile, by_code=True)).pixels
    painter.draw(face, Scene(smile, yaw=20.0, by_code=True))
    painter.draw(face, Scene(smile, by_code=True, layer="depth"))
    assert len(calls) == 1
    painter.draw(face, Scene(units(), by_code=True))
    assert len(calls) == 2
    assert torch.equal(painter.draw(face, Scene(smile, by_code=True)).pixels, first)


def test_a_motion_rules_over_the_sliders(painter, face):
    motion = sample_motion(3, 0.4)
    scene = Scene(units(jawOpen=1.0), frame=4)
    expected = Scene(tuple(motion.beta[4].tolist()), yaw=0.0)
    still = painter.draw(face, Scene(units(jawOpen=1.0), frame=4, head=False), motion).pixels
    torch.testing.assert_close(still, painter.draw(face, expected).pixels, atol=1e-4, rtol=0)
    assert torch.equal(painter.asked(face, scene, motion).camera.label, motion.camera[4].label)
    assert torch.equal(painter.asked(face, Scene(frame=10**6), motion).beta, motion.beta[-1:])  # held at its end
    with pytest.raises(InputError, match="no motion"):
        painter.draw(face, scene)


def test_the_thread_never_draws_what_is_stale(painter, face):
    started, release, seen = threading.Event(), threading.Event(), []

    def slow():
        started.set()
        release.wait(10)
        yield 0.0
        seen.append("stale")
        yield 0.0

    worker = Worker()
    worker.ask("a", slow())
    assert started.wait(10)
    for k in range(20):
        worker.ask("a", passes(painter, face, Scene(yaw=float(k)), lambda p, k=k: seen.append(k), Pace()))
    release.set()
    end = time.monotonic() + 20
    while 19 not in seen and time.monotonic() < end:
        time.sleep(0.01)
    worker.close()
    assert set(seen) == {19} and worker.dropped == 20


def test_films_stop_when_they_are_left(painter, face, tmp_path):
    steps = film_steps(painter, face, Scene(), tmp_path / "a.mp4", sample_motion(1, 0.4), 32)
    next(steps)
    steps.close()
    assert not (tmp_path / "a.mp4").exists()  # no half films


def test_jobs_get_their_turn_while_pictures_are_asked_for(monkeypatch):
    monkeypatch.setattr(X, "AGED", 0.05)
    worker, said, going = Worker(), [], True

    def picture():
        time.sleep(0.01)
        said.append("picture")
        if going:
            worker.ask("a", picture())  # a motion that plays on a slow machine: there is always a newer request
        yield 0.0

    worker.ask("a", picture())
    worker.do("a", (said.append(f"job {k}") or 0.0 for k in range(3)))
    end = time.monotonic() + 20
    while "job 2" not in said and time.monotonic() < end:
        time.sleep(0.01)
    going = False
    worker.close()
    assert "job 2" in said
    jobs = [k for k, s in enumerate(said) if s.startswith("job")]
    assert said[jobs[0]:jobs[-1]].count("picture") >= 2  # and pictures theirs


def test_what_takes_long_is_done_in_steps(painter, face, monkeypatch):
    views = pytest.importorskip("nofa_nb.apps.explorer_views", reason="figures need plotly")
    steps = views.VIEWS["volume"](painter, face, Scene(), size=40)
    assert sum(1 for _ in steps) >= 4  # 64000 nodes
    assert sum(1 for _ in views.VIEWS["walk"](painter, face, Scene())) == views.WALK
    asked = []

    def faceless(*args):
        asked.append(args)
        raise InputError("no face")

    monkeypatch.setattr(reenact, "preprocess_image", faceless)
    steps = X.face_steps(load_explorer("smoke").studio, torch.zeros(3, 9, 9), "nobody")
    next(steps)
    assert not asked  # the networks are loaded first
    with pytest.raises(InputError, match="no face"):
        next(steps)


def test_a_scale_fits_what_is_shown_and_is_held_for_a_moment(painter, face, monkeypatch):
    now = count(100.0, 0.5)
    monkeypatch.setattr(X.time, "monotonic", lambda: next(now))
    painter._ends.clear()
    field = painter.model.deformation
    monkeypatch.setattr(field, "weight", lambda p, a: torch.full((*p.shape[:2], 1), painter.told))
    scales = []
    for painter.told in (0.03, 0.07, 0.03):
        drawn = painter.draw(face, Scene(layer="weights"))
        scales.append(drawn.high)
    assert scales == [0.05, 0.1, 0.1]
    for _ in range(8):
        next(now)  # a rest
    assert painter.draw(face, Scene(layer="weights")).high == 0.05
    monkeypatch.setattr(X, "INSIDE", 0.0)  # all is background
    drawn = painter.draw(face, Scene(layer="weights"))
    assert torch.equal(drawn.pixels, X.GROUND.expand_as(drawn.pixels))


@pytest.fixture
def page():
    "The widget without a browser; what it sends is a list."
    app = pytest.importorskip("nofa_nb.apps.explorer_app", reason="the explorer's page needs the package anywidget")

    class Told(app.Explorer):
        def send(self, content, buffers=None):
            self.__dict__.setdefault("got", []).append((content, buffers))

        def say(self, kind, view="a", buffers=(), **content):
            self._heard(self, dict(view=view, kind=kind, **content), list(buffers))

        def wait(self, kind, view="a"):
            end = time.monotonic() + 60
            while time.monotonic() < end:
                for found in self.__dict__.get("got", []):
                    if found[0]["kind"] == kind and found[0]["view"] == view:
                        self.got.remove(found)
                        return found
                time.sleep(0.01)
            raise TimeoutError(kind)

    smoke = load_explorer("smoke")
    made = Told(smoke, lambda: face_of_seed(smoke.studio.model, 7))
    made._loop = None
    made.say("hello")
    made.wait("face")
    yield made
    made.close()


def test_a_saved_avatar_has_the_identity_of_the_sliders(page, tmp_path):
    face = page.pages["a"].face
    for known in (True, False):  # a face of a code, and one as of a photo
        page.pages["a"].face = face if known else X.replace(face, code=None)
        page.say("scene", id=1, scene=dict(alpha=[1.5, -0.5]))
        page.say("save", what="avatar")
        said, (saved,) = page.wait("file")
        (tmp_path / said["name"]).write_bytes(saved)
        alpha = Avatar.load(tmp_path / said["name"], page.studio.model).alpha
        moved = torch.zeros_like(alpha)
        moved[0, 0], moved[0, 1] = 1.5, -0.5
        torch.testing.assert_close(alpha - face.avatar.alpha, moved)


def test_a_view_that_was_put_away_begins_anew(page):
    for k in range(16):
        page.say("ping", f"view {k}")
    page.say("scene", id=9, scene={})
    assert "begins anew" in page.wait("error")[0]["sentence"]
    assert page.wait("face")[0]["name"] == "seed 7"
    page.say("scene", id=10, scene={})
    assert page.wait("frame")[0]["id"] == 10


def test_what_comes_of_a_refused_upload_is_thrown_away(page, monkeypatch):
    import nofa_nb.apps.explorer_app as app

    monkeypatch.setattr(app, "MOST_BYTES", 10)
    for k in range(5):
        page.say("upload", buffers=[b"12345678"], what="photo", name="wide.png", last=k == 4)
    assert page.wait("error")[0]["sentence"].startswith("file must be at most")
    page.say("ping")
    page.wait("pong")
    assert [c for c, _ in page.got if c["kind"] == "error"] == [] and page.pages["a"].uploads == {}
    assert page.pages["a"].receive("photo", b"abc", True) == b"abc"


def test_a_motion_is_unloaded(page):
    page.say("clip", seed=1)
    page.wait("motion")
    page.say("unload")
    page.say("scene", id=2, scene=dict(frame=3))
    assert "no motion" in page.wait("error")[0]["sentence"] and page.pages["a"].motion is None


def test_sixteen_pictures_in_a_second_are_fifteen_steps():
    assert Measured(16, 0, 1.0, (0.05,) * 16, 64, 0.02, 0.0).speed == 15
    assert Measured(1, 9, 1.0, (0.05,) * 10, 64, 0.02, 0.0).speed == 0
