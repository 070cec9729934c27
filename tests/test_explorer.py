"""The explorer without a browser: faces, scenes, the thread, and the messages of a page."""

import threading
import time

import pytest
import torch

import nofa_nb.apps.explorer as X
from nofa_nb.apps.explorer import Pace, Painter, Scene, Worker, face_of_seed, film_steps, load_explorer, passes
from nofa_nb.core.errors import InputError, MissingResource
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
