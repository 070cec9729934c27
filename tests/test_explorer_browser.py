"""The explorer from end to end: Voila and JupyterLab in headless Chromium. Screenshots stay in out/test/screenshots."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from nofa_nb.apps.explorer import face_of_seed, load_explorer
from nofa_nb.apps.explorer_serve import (
    Console,
    app_notebook,
    browser,
    browser_program,
    descendants,
    free_port,
    listening,
    opened,
)
from nofa_nb.apps.explorer_serve import served as serve
from nofa_nb.apps.explorer_serve import stop as stop_server
from nofa_nb.core.errors import MissingResource
from nofa_nb.core.io import VideoReader, read_image, write_image
from nofa_nb.core.weights import find_weights
from nofa_nb.geometry.cameras import FOCAL, Camera
from nofa_nb.geometry.rays import rays
from nofa_nb.models.avatar import Avatar
from nofa_nb.world.motion import UNIT, sample_motion

pytest.importorskip("anywidget", reason="the explorer's page needs the package anywidget")
try:
    browser_program()
except MissingResource as missing:
    pytest.skip(str(missing), allow_module_level=True)

from nofa_nb.apps.explorer_app import gallery_photo  # noqa: E402 needs anywidget

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "out/test/screenshots"
SECONDS = 240  # of patience: other tests and trainings may be running


@pytest.fixture(scope="module")
def chromium():
    SHOTS.mkdir(parents=True, exist_ok=True)
    with browser() as b:
        yield b


@pytest.fixture(scope="module")
def address():
    "The app, with random weights."
    with serve(preset="smoke", log=SHOTS.parent / "voila.log" if SHOTS.exists() else None) as at:
        yield at


class Opened:
    "A tab with the explorer."

    def __init__(self, chromium, address, width=1280, height=900):
        self.context = chromium.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.console = Console(self.page)
        self.root = opened(self.page, address, SECONDS)
        self.settle()

    def asked(self):
        return self.root.evaluate("r => r.nofa.sent")

    def settle(self):
        "Wait until the picture of the last request is a finished one."
        js = """r => { const c = r.querySelector('canvas');
                       return +c.dataset.id === r.nofa.sent && ['full', 'still'].includes(c.dataset.quality) }"""
        end = time.monotonic() + SECONDS
        while not self.root.evaluate(js):
            assert time.monotonic() < end, "no picture came"
            time.sleep(0.05)

    def pixels(self):
        "What the canvas shows, (h, w, 3) bytes."
        self.settle()
        js = """r => { const c = r.querySelector('canvas');
                       const d = c.getContext('2d').getImageData(0, 0, c.width, c.height);
                       return [c.width, c.height, Array.from(d.data)] }"""
        width, height, data = self.root.evaluate(js)
        return np.array(data, np.uint8).reshape(height, width, 4)[..., :3]

    def set(self, name, value):
        "Move a slider as its keyboard or a drag would, and wait for the picture."
        before = self.asked()
        js = "(i, v) => { i.value = v; i.dispatchEvent(new Event('input', { bubbles: true })) }"
        self.root.locator(f'input[data-name="{name}"]').evaluate(js, value)
        while self.asked() == before:
            time.sleep(0.02)
        self.settle()

    def alert(self):
        box = self.root.locator('[role="alert"]')
        box.wait_for(state="visible")
        return box.inner_text()

    def shot(self, name):
        self.page.screenshot(path=SHOTS / f"{name}.png")


@pytest.fixture(scope="module")
def tab(chromium, address):
    found = Opened(chromium, address)
    yield found
    found.context.close()


@pytest.fixture(scope="module")
def model():
    return load_explorer("smoke").studio.model


def rendered(model, units=None, seed=7, yaw=0.0, zoom=1.0, avatar=None, coarse=False, canonical=False):
    "The API's own frame with its camera and expression, not by way of the explorer."
    beta = torch.zeros(1, 52)
    for name, value in (units or {}).items():
        beta[0, UNIT[name]] = value
    camera = Camera.orbit(np.radians(yaw), 0.0, focal=FOCAL * zoom)
    face = face_of_seed(model, seed).avatar if avatar is None else avatar
    with torch.no_grad():
        return model.render(face, None if canonical else beta, camera, coarse), face, beta, camera


def told(model, *args, **kwargs):
    "Its picture as bytes (h, w, 3)."
    image = rendered(model, *args, **kwargs)[0].image[0]
    return ((image / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def in_colours(values, low, high, name):
    from matplotlib import colormaps

    part = np.clip((values - low) / (high - low), 0, 1)
    return np.round(255 * colormaps[name](np.round(part * 255).astype(int))[..., :3]).astype(np.uint8)


def close(found, expected, background=None):
    "Colours of a map: an entry of the table more or less, along an edge of the background whatever."
    away = np.abs(found.astype(int) - expected.astype(int)).max(-1)
    return (away if background is None else away[~background]).max() <= 6 and found.std() > 0.5


def same(found, expected):
    return np.abs(found.astype(int) - expected.astype(int)).max() <= 2


def choose(tab, group, text):
    "One of several choices."
    field = tab.root.locator("fieldset").filter(has=tab.page.locator("legend", has_text=group))
    before, wanted = tab.asked(), field.get_by_label(text, exact=True)
    if wanted.is_checked():
        return
    wanted.check(force=True)
    while tab.asked() == before:
        time.sleep(0.02)
    tab.settle()


FIGURES = {"volume": "Volume and a ray", "planes": "Tri-planes", "weights": "W-Net's weights", "walk": "Latent walk"}
NAMELESS = """r => [...r.querySelectorAll('input, button, summary, a, [tabindex]')].filter(e => {
      const label = e.labels && [...e.labels].map(l => l.textContent).join('')
      return !(e.getAttribute('aria-label') || label || e.textContent).trim() }).map(e => e.outerHTML)"""


# --- the app ----------------------------------------------------------------------------------------------------------
def test_a_moved_slider_changes_the_picture_as_the_api_says(tab, model):
    choose(tab, "Expression by", "deformation")
    neutral = tab.pixels()
    assert same(neutral, told(model))
    tab.set("jaw open", 0.8)
    moved = tab.pixels()
    assert same(moved, told(model, {"jawOpen": 0.8})) and not same(moved, neutral)
    slider = tab.root.get_by_label("jaw open", exact=True)
    slider.focus()
    slider.press("Home")  # by keyboard
    assert same(tab.pixels(), neutral)
    tab.set("turn", 30)
    assert same(tab.pixels(), told(model, yaw=30.0)) and not same(tab.pixels(), neutral)
    tab.root.get_by_text("Reset view").click()
    assert same(tab.pixels(), neutral)


def test_layers_show_the_models_own_numbers(tab, model):
    choose(tab, "Expression by", "deformation")
    tab.set("mouth funnel", 1.0)
    frame, face, beta, camera = rendered(model, {"mouthFunnel": 1.0})
    depth = frame.depth[0, 0]
    side = len(depth)
    origins, directions = rays(camera, side, side)
    points = origins + directions * depth.flatten()[None, :, None]
    box = model.generator.renderer.box_warp / 2
    background = (frame.weight[0, 0] < 0.5) | (points[0].abs().amax(-1).reshape(side, side) > 0.86 * box)
    with torch.no_grad():
        weights = model.deformation.weight(points, face.alpha)[0, :, 0].reshape(side, side).numpy()
        offsets = model.deformation.displacement(points, face.alpha, beta)[0].norm(dim=-1).reshape(side, side).numpy()

    choose(tab, "Show", "depth")
    assert close(tab.pixels(), in_colours(-depth.numpy(), -3.0, -2.3, "viridis"))
    choose(tab, "Show", "normals")
    at = points.reshape(side, side, 3).numpy()
    normals = np.cross(np.gradient(at, axis=1), np.gradient(at, axis=0))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals *= np.sign((normals * (origins[0, 0].numpy() - at)).sum(-1, keepdims=True))
    seen = tab.pixels()[1:-1, 1:-1] / 127.5 - 1
    assert np.abs(seen - normals[1:-1, 1:-1]).max() < 0.03
    background = background.numpy()
    for name, values in (("W-Net weights", weights), ("offsets", offsets)):
        choose(tab, "Show", name)
        found, most = tab.pixels(), values[~background].max()
        high = float(tab.root.locator(".legend span").last.inner_text())
        assert most <= high * 1.001 and high <= 2.51 * most
        assert close(found, in_colours(values, 0.0, high, "magma"), background)
        if background.any():
            assert (found[background] == found[background][0]).all()
    choose(tab, "Show", "picture")
    tab.set("mouth funnel", 0.0)


def test_offsets_are_offered_only_where_something_is_deformed(tab):
    choose(tab, "Expression by", "deformation")
    tab.set("mouth funnel", 1.0)
    offsets = tab.root.get_by_label("offsets", exact=True)
    choose(tab, "Show", "offsets")
    choose(tab, "Space", "canonical")
    assert offsets.is_disabled() and tab.root.get_by_label("picture", exact=True).is_checked()
    assert "not deformed" in offsets.evaluate("i => i.parentNode.title")
    choose(tab, "Space", "deformed")
    assert offsets.is_enabled() and offsets.evaluate("i => i.parentNode.title") == ""
    choose(tab, "Expression by", "prior's code")
    assert offsets.is_disabled() and "prior" in offsets.evaluate("i => i.parentNode.title")
    choose(tab, "Expression by", "deformation")
    tab.set("mouth funnel", 0.0)


def test_every_layer_and_both_spaces_are_drawn(tab, model):
    choose(tab, "Expression by", "deformation")
    tab.set("mouth funnel", 1.0)
    seen = {}
    for name in ("depth", "normals", "W-Net weights", "offsets", "picture"):
        choose(tab, "Show", name)
        seen[name] = tab.pixels().tobytes()
        tab.shot(f"layer-{name.split()[0]}")
        assert tab.root.locator(".legend").is_visible() == (name in ("depth", "W-Net weights", "offsets"))
    assert len(set(seen.values())) == 5
    choose(tab, "Space", "canonical")
    canonical = tab.pixels()
    tab.set("mouth funnel", 0.0)
    assert (tab.pixels() == canonical).all()  # the canonical face knows no expression
    choose(tab, "Space", "deformed")


def test_search_random_reset(tab):
    tab.root.get_by_label("search expression units").fill("smile")
    visible = [s for s in tab.root.locator(".scroll input").all() if s.is_visible()]
    assert {s.get_attribute("data-name") for s in visible if "identity" not in s.get_attribute("data-name")} == {
        "mouth smile left", "mouth smile right"}
    opened = "r => [...r.querySelectorAll('details')].map(d => d.open)"
    assert tab.root.evaluate(opened) == [True, False, False, False]
    tab.root.get_by_label("search expression units").fill("brow")
    assert tab.root.evaluate(opened) == [False, False, True, False]
    tab.root.get_by_label("search expression units").fill("")
    assert tab.root.evaluate(opened) == [True, False, False, False]  # as before the search
    before = tab.pixels()
    tab.root.get_by_role("button", name="Random", exact=True).click()
    assert not (tab.pixels() == before).all()
    tab.root.get_by_role("button", name="Reset", exact=True).click()
    assert (tab.pixels() == before).all()


def test_orbit_by_hand_and_by_keys(tab):
    front = tab.pixels()
    picture = tab.root.locator(".picture")
    box = picture.bounding_box()
    tab.page.mouse.move(box["x"] + 100, box["y"] + 100)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + 200, box["y"] + 100, steps=4)
    tab.page.mouse.up()
    assert not (tab.pixels() == front).all()
    assert float(tab.root.locator('input[data-name="turn"]').input_value()) < -5
    picture.focus()
    picture.press("0")
    assert (tab.pixels() == front).all()
    picture.press("ArrowRight")
    assert tab.root.locator('input[data-name="turn"]').input_value() == "5"
    picture.press("ArrowUp")
    assert tab.root.locator('input[data-name="tilt"]').input_value() == "5"
    picture.press("0")


def zoom_of(tab):
    return float(tab.root.locator('input[data-name="zoom"]').input_value())


def test_zoom_by_wheel_keys_and_slider(tab, model):
    choose(tab, "Expression by", "deformation")
    front = tab.pixels()
    picture = tab.root.locator(".picture")
    tab.set("zoom", 0.5)
    assert same(tab.pixels(), told(model, zoom=2**0.5)) and not same(tab.pixels(), front)
    picture.press("0")
    assert same(tab.pixels(), front)
    picture.press("+")
    assert zoom_of(tab) == 0.1 and same(tab.pixels(), told(model, zoom=2**0.1))
    picture.press("-")
    assert zoom_of(tab) == 0 and same(tab.pixels(), front)
    picture.hover()
    tab.page.mouse.wheel(0, -300)
    end = time.monotonic() + 20
    while zoom_of(tab) == 0 and time.monotonic() < end:
        time.sleep(0.02)
    assert zoom_of(tab) == 0.5 and same(tab.pixels(), told(model, zoom=2**0.5))  # and the page was not scrolled
    picture.press("0")


def test_keys_are_told_and_do_what_is_told(tab, tmp_path):
    hint = tab.root.locator(".hint", has_text="Keys:").inner_text()
    for words in ("drag", "arrow keys", "wheel", "/ searches", "r random", "n neutral", "p plays"):
        assert words in hint
    picture = tab.root.locator(".picture")
    before = tab.pixels()
    picture.press("r")
    assert not (tab.pixels() == before).all()
    picture.press("n")
    assert (tab.pixels() == before).all()
    picture.press("/")
    assert tab.root.get_by_label("search expression units").evaluate("i => i === document.activeElement")
    tab.page.keyboard.type("nr/p")  # words, not keys
    assert tab.root.get_by_label("search expression units").input_value() == "nr/p"
    tab.root.get_by_label("search expression units").fill("")
    sample_motion(3, 30.0).save(tmp_path / "long.safetensors")
    tab.root.get_by_label("Open motion …").set_input_files(tmp_path / "long.safetensors")
    stop, play = (tab.root.get_by_role("button", name=n, exact=True) for n in ("Stop", "Play"))
    stop.wait_for()
    time.sleep(0.3)
    stop.click()  # in the middle of it
    play.wait_for()
    asked = tab.asked()
    assert (tab.pixels() == before).all()
    time.sleep(0.3)
    assert tab.asked() == asked  # it has stopped indeed
    picture.press("p")
    stop.wait_for()
    picture.press("p")
    play.wait_for()
    tab.root.get_by_role("button", name="Unload").click()
    assert play.is_disabled() and tab.root.get_by_text("no motion loaded").is_visible()
    assert (tab.pixels() == before).all()


def in_view(tab):
    "Can the error's sentence be seen as it is?"
    js = """a => { const b = a.getBoundingClientRect(), x = (b.left + b.right) / 2, y = (b.top + b.bottom) / 2
                   return a.contains(document.elementFromPoint(x, y)) }"""
    return tab.root.locator('[role="alert"]').evaluate(js)


def test_errors_are_seen_wherever_the_page_is(tab, tmp_path):
    (tmp_path / "cat.png").write_text("no picture at all")
    tab.page.set_viewport_size({"width": 1280, "height": 420})
    tab.page.locator("body").evaluate("b => b.scrollTo(0, 10000)")
    tab.root.get_by_role("button", name="Tri-planes").scroll_into_view_if_needed()
    tab.root.get_by_label("Photo …").set_input_files(tmp_path / "cat.png")
    tab.alert()
    assert in_view(tab)
    tab.root.get_by_label("close the message").click()
    tab.page.set_viewport_size({"width": 1280, "height": 900})


def test_bad_files_are_answered_with_a_sentence(tab, tmp_path):
    (tmp_path / "cat.png").write_text("no picture at all")
    (tmp_path / "walk.safetensors").write_text("no motion")
    (tmp_path / "empty.png").write_text("")
    (tmp_path / "aunt.safetensors").write_text("no avatar")
    before = tab.pixels()
    tab.root.get_by_label("Photo …").set_input_files(tmp_path / "cat.png")
    assert "cat.png" in tab.alert() and "Traceback" not in tab.alert()
    tab.shot("bad-photo")
    tab.root.get_by_label("Open motion …").set_input_files(tmp_path / "walk.safetensors")
    tab.root.get_by_text("walk.safetensors").wait_for()
    tab.root.get_by_label("Avatar file …").set_input_files(tmp_path / "aunt.safetensors")
    tab.root.locator('[role="alert"]', has_text="aunt.safetensors").wait_for()
    assert "Traceback" not in tab.alert() and in_view(tab)
    with open(tmp_path / "huge.png", "wb") as huge:
        huge.truncate(2**28 + 1)  # all holes
    sent = tab.root.evaluate("r => { r.nofa.before = r.nofa.errors.length; return r.nofa.before }")
    tab.root.get_by_label("Photo …").set_input_files(tmp_path / "huge.png")
    tab.root.get_by_text("huge.png must be at most 256 MB").wait_for()
    assert tab.root.evaluate("r => r.nofa.errors.length") == sent + 1  # and nothing else comes of it
    tab.root.get_by_label("Photo …").set_input_files(tmp_path / "empty.png")
    tab.root.get_by_text("empty.png is empty").wait_for()
    tab.set("jaw open", 0.3)  # the page goes on
    tab.set("jaw open", 0.0)
    assert (tab.pixels() == before).all()
    tab.root.get_by_label("close the message").click()


def test_a_photo_becomes_a_face_and_an_avatar_file(tab, model, tmp_path):
    choose(tab, "Expression by", "deformation")
    only = tab.root.get_by_text("identity reaches only the deformation")
    assert only.is_hidden()  # of a face of the prior, it reaches all
    tab.root.get_by_label("photo: astronaut").click()
    tab.root.locator(".who", has_text="astronaut").first.wait_for()
    tab.settle()
    assert only.is_visible()
    with tab.page.expect_download() as kept:
        tab.root.get_by_role("button", name="Save avatar").click()
    kept.value.save_as(tmp_path / "astronaut.safetensors")
    avatar = Avatar.load(tmp_path / "astronaut.safetensors", model)
    with torch.no_grad():
        expected = model.render(avatar, None, Camera.orbit(0.0, 0.0)).image[0]
    choose(tab, "Space", "canonical")
    fine = tab.pixels()
    assert same(fine, ((expected / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
    tab.set("identity 1", 3.0)
    assert (tab.pixels() == fine).all()  # as the page says
    choose(tab, "Volume", "coarse")
    assert same(tab.pixels(), told(model, avatar=avatar, coarse=True, canonical=True))  # random weights add no details
    choose(tab, "Volume", "fine")
    choose(tab, "Space", "deformed")
    with tab.page.expect_download() as kept:
        tab.root.get_by_role("button", name="Save avatar").click()
    kept.value.save_as(tmp_path / "other.safetensors")
    moved = Avatar.load(tmp_path / "other.safetensors", model)
    assert float(moved.alpha[0, 0] - avatar.alpha[0, 0]) == pytest.approx(3.0, abs=1e-4)
    tab.root.get_by_label("Avatar file …").set_input_files(tmp_path / "other.safetensors")  # opened again
    tab.root.locator(".who", has_text="other.safetensors").first.wait_for()
    tab.set("jaw open", 0.5)
    assert only.is_visible()
    again = tab.pixels()

    write_image(tmp_path / "aunt.png", torch.from_numpy(gallery_photo("astronaut")).permute(2, 0, 1) / 255)
    tab.root.get_by_label("Photo …").set_input_files(tmp_path / "aunt.png")
    tab.root.locator(".who", has_text="aunt.png").first.wait_for()
    choose(tab, "Space", "canonical")
    assert same(tab.pixels(), fine) and not same(again, fine)  # the same photo, uploaded
    choose(tab, "Space", "deformed")
    tab.root.get_by_label("seed of a face").fill("7")
    tab.root.get_by_text("Show seed").click()
    tab.root.locator(".who", has_text="seed 7").first.wait_for()
    choose(tab, "Expression by", "deformation")


def test_saving_a_picture(tab, model, tmp_path):
    choose(tab, "Expression by", "deformation")
    with tab.page.expect_download() as kept:
        tab.root.get_by_role("button", name="Save picture").click()
    kept.value.save_as(tmp_path / "a.png")
    found = (read_image(tmp_path / "a.png") * 255).round().byte().permute(1, 2, 0).numpy()
    assert kept.value.suggested_filename == "seed-7.png" and same(found, told(model))


def test_a_motion_is_played_to_its_end(tab, tmp_path):
    sample_motion(3, 0.6).save(tmp_path / "nod.safetensors")
    before, asked = tab.pixels(), tab.asked()
    tab.root.get_by_label("Open motion …").set_input_files(tmp_path / "nod.safetensors")
    tab.root.get_by_text("nod.safetensors, 0.6 s").wait_for()
    tab.root.get_by_role("button", name="Play", exact=True).wait_for()  # it says Stop while it plays
    assert tab.asked() > asked + 2
    assert (tab.pixels() == before).all()  # and the sliders rule again


def test_a_film_is_saved(tab, tmp_path):
    sample_motion(3, 0.4).save(tmp_path / "nod.safetensors")
    tab.root.get_by_label("Open motion …").set_input_files(tmp_path / "nod.safetensors")
    tab.root.get_by_text("nod.safetensors, 0.4 s").wait_for()
    tab.root.get_by_role("button", name="Play", exact=True).wait_for()
    with tab.page.expect_download() as kept:
        tab.root.get_by_role("button", name="Save film").click()
    kept.value.save_as(tmp_path / "a.mp4")
    frames = list(VideoReader(tmp_path / "a.mp4"))
    assert kept.value.suggested_filename == "seed-7.mp4" and len(frames) == 10
    tab.root.get_by_role("button", name="Unload").click()
    tab.settle()


def test_a_figure_that_fails_leaves_no_promise(tab):
    tab.root.evaluate("r => r.nofa.figure('nothing')")
    assert "figure" in tab.alert() and tab.root.locator(".caption").inner_text() == ""
    tab.root.get_by_label("close the message").click()


def test_figures_are_drawn_without_a_network(tab):
    for name, text in FIGURES.items():
        tab.root.get_by_role("button", name=text).click()
        tab.root.locator(f'.plot[data-name="{name}"].js-plotly-plot').wait_for()
        tab.root.locator(".plot").scroll_into_view_if_needed()
        assert len(tab.root.locator(".caption").inner_text()) > 40
        assert tab.root.evaluate(NAMELESS) == []  # plotly's buttons, too
        assert tab.root.locator(".modebar-btn").count() > 1
        tab.shot(f"figure-{name}")


def test_every_control_has_a_name(tab):
    assert tab.root.evaluate(NAMELESS) == []
    assert tab.root.locator(".picture").get_attribute("role") == "application"
    assert tab.root.locator('[role="img"][tabindex], [role="img"] a').count() == 0
    cut = """r => [...r.querySelectorAll('.slider label')].filter(l => l.scrollWidth > l.clientWidth)
                  .map(l => l.textContent)"""
    js = "(r, all) => r.querySelectorAll('details').forEach((d, k) => { d.open = all || k === 0 })"
    tab.root.evaluate(js, True)
    assert tab.root.evaluate(cut) == []
    tab.root.evaluate(js, False)
    assert tab.root.evaluate("r => r.querySelectorAll('input[type=range]').length") == 52 + 20 + 3


def kernels():
    "Memory of the kernels that this process's servers run, bytes by process."
    found = {}
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if "ipykernel" in Path(f"/proc/{pid}/cmdline").read_text():
                status = Path(f"/proc/{pid}/status").read_text()
                found[pid] = 1024 * int(status.split("VmRSS:")[1].split()[0])
    return found


def heap(tab):
    "Bytes of the page's objects after a collection."
    session = tab.context.new_cdp_session(tab.page)
    session.send("HeapProfiler.collectGarbage")
    used = session.send("Runtime.getHeapUsage")["usedSize"]
    session.detach()
    return used


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_thousand_moves_cost_no_memory(tab):
    def moves(count):
        js = """async (r, n) => { const all = ['jaw open', 'identity 1', 'turn'].map(s =>
            r.querySelector(`input[data-name="${s}"]`))
          for (let k = 0; k < n; k++) { const s = all[k % 3]
                                        s.value = +s.min + (k % 50) / 50 * (s.max - s.min)
                                        s.dispatchEvent(new Event('input', { bubbles: true }))
                                        await new Promise(requestAnimationFrame) } }"""
        tab.root.evaluate(js, count)
        tab.settle()

    moves(200)  # caches are filled once
    before, used = kernels(), heap(tab)
    moves(1000)
    after = kernels()
    grown = {pid: after[pid] - before[pid] for pid in before if pid in after}
    print({p: f"{g / 2**20:.1f} MB" for p, g in grown.items()})
    assert grown and max(grown.values()) < 50 * 2**20
    assert 0 < used and heap(tab) - used < 20 * 2**20
    for name in ("Reset", "reset identity", "Reset view"):
        tab.root.get_by_role("button", name=name, exact=True).click()
    tab.settle()


def test_two_tabs_do_not_mix(chromium, address, tab, model):
    choose(tab, "Expression by", "deformation")  # tests before this one may have run in another process
    tab.set("jaw open", 0.0)
    other = Opened(chromium, address, 1920, 1080)
    other.root.get_by_label("seed of a face").fill("3")
    other.root.get_by_text("Show seed").click()
    other.root.locator(".who", has_text="seed 3").first.wait_for()
    choose(other, "Expression by", "deformation")
    other.set("jaw open", 1.0)
    tab.set("mouth pucker", 1.0)
    assert same(other.pixels(), told(model, {"jawOpen": 1.0}, seed=3))
    assert same(tab.pixels(), told(model, {"mouthPucker": 1.0}))
    assert float(tab.root.locator('input[data-name="jaw open"]').input_value()) == 0
    tab.set("mouth pucker", 0.0)
    assert list(other.console) == []
    other.context.close()


def test_the_page_has_complained_of_nothing(tab):
    assert list(tab.console) == []


def test_the_command_prints_its_address_and_stops(tmp_path):
    code = "import sys; from nofa_nb.apps.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-W", "ignore", "-c", code, "explore", "--preset", "smoke"]
    for sign in (signal.SIGTERM, signal.SIGINT):
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = running.stdout.readline()
        assert line.startswith("http://127.0.0.1:")
        assert urllib.request.urlopen(f"{line.split()[0]}voila/static/voila.js").status == 200
        kin = descendants(running.pid)
        running.send_signal(sign)
        said, complained = running.communicate(timeout=60)
        assert (running.returncode, said, complained) == (0, "stopped\n", "") and kin
        time.sleep(0.5)
        assert not [p for p in kin if Path(f"/proc/{p}").exists()]
    (tmp_path / "a.safetensors").write_text("nothing")
    done = subprocess.run([*command, "--avatar", tmp_path / "a.safetensors"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("nofa: ") and done.stderr.count("\n") == 1


# --- JupyterLab -------------------------------------------------------------------------------------------------------
LAB = ("--no-browser", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True",
       "--allow-root", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate")


OF_LAB = ()  # what JupyterLab itself complains of


@pytest.fixture
def lab(tmp_path):
    "JupyterLab with the app's notebook."
    app_notebook(tmp_path, preset="smoke")
    port = free_port()
    env = dict(os.environ, JUPYTER_PREFER_ENV_PATH="1", JUPYTERLAB_SETTINGS_DIR=str(tmp_path / "settings"),
               JUPYTERLAB_WORKSPACES_DIR=str(tmp_path / "workspaces"), PYDEVD_DISABLE_FILE_VALIDATION="1")
    with open(tmp_path / "lab.log", "w") as log:
        command = [sys.executable, "-m", "jupyterlab", f"--port={port}", f"--ServerApp.root_dir={tmp_path}", *LAB]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            listening(process, port, SECONDS)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop_server(process)


def test_jupyterlab_shows_it_and_says_when_its_kernel_was_restarted(chromium, lab, model):
    context = chromium.new_context(viewport={"width": 1600, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(1000 * SECONDS)
    console = Console(page)
    page.goto(f"{lab}/lab/tree/explorer.ipynb", wait_until="commit")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()

    def run_all():
        page.get_by_text("| Idle").wait_for()  # a kernel that is not there yet forgets what it is asked
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    run_all()
    tab = object.__new__(Opened)
    tab.page, tab.root, tab.console = page, page.locator(".nofa").last, console
    tab.root.locator("canvas[data-quality]").wait_for(state="attached")
    choose(tab, "Expression by", "deformation")
    tab.set("jaw open", 0.8)
    assert same(tab.pixels(), told(model, {"jawOpen": 0.8}))
    tab.shot("jupyterlab")
    assert [e for e in console if not any(re.search(known, e) for known in OF_LAB)] == []

    # by the menu, as a user does: a page that is not told of a restart goes on asking a subshell that is no more
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Restart Kernel…")).click()
    page.locator(".jp-Dialog .jp-mod-accept").click()
    page.locator(".jp-Dialog").wait_for(state="detached")
    js = "(i, v) => { i.value = v; i.dispatchEvent(new Event('input', { bubbles: true })) }"
    for value in np.linspace(0.1, 0.7, 4 * SECONDS):  # the old kernel may yet answer the first ones
        tab.root.locator('input[data-name="jaw open"]').evaluate(js, float(value))
        if tab.root.locator('[role="alert"]').is_visible():
            break
        time.sleep(0.25)
    assert "was restarted" in tab.alert() and "run the cell again" in tab.alert().lower()
    assert not any("Cannot send" in said for said in console) and in_view(tab)
    tab.shot("jupyterlab-restarted")
    tab.root.get_by_label("close the message").click()
    tab.root.locator('input[data-name="jaw open"]').evaluate(js, 0.33)
    assert "was restarted" in tab.alert()  # said again
    tab.root.evaluate("r => r.classList.add('old')")
    run_all()
    tab.root = page.locator(".nofa:not(.old)").last
    tab.root.locator("canvas[data-quality]").wait_for(state="attached")
    tab.settle()
    assert tab.root.locator('[role="alert"]').is_hidden()
    context.close()


# --- with weights -----------------------------------------------------------------------------------------------------
def test_the_page_with_trained_weights(chromium, tmp_path):
    "Pictures for people, from the top of the page; the silence of a busy kernel."
    try:
        find_weights("small", "avatar")
    except MissingResource as missing:
        pytest.skip(str(missing))
    with serve(preset="small") as at:
        tab = Opened(chromium, at)
        assert tab.root.locator(".note").is_hidden()  # nothing is random here
        tab.root.locator(".thumbs img").nth(3).wait_for()
        for width, height in ((1280, 900), (1920, 1080)):
            tab.page.set_viewport_size({"width": width, "height": height})
            tab.page.evaluate("scrollTo(0, 0)")
            tab.shot(f"voila-{width}")
        tab.set("jaw open", 1.0)
        choose(tab, "Show", "W-Net weights")
        seen = tab.pixels()
        assert np.percentile(seen.max(-1), 95) > 60  # W-Net's weights are small, and seen all the same
        tab.shot("trained-weights")
        choose(tab, "Show", "offsets")
        tab.shot("trained-offsets")
        choose(tab, "Show", "picture")
        for name, text in FIGURES.items():
            tab.root.get_by_role("button", name=text).click()
            tab.root.locator(f'.plot[data-name="{name}"].js-plotly-plot').wait_for()
            for width, height in ((1280, 900), (1920, 1080)):
                tab.page.set_viewport_size({"width": width, "height": height})
                tab.root.locator(".plot").scroll_into_view_if_needed()
                fits = "p => p.querySelector('.main-svg').getBoundingClientRect().width === p.clientWidth"
                end = time.monotonic() + SECONDS
                while not tab.root.locator(".plot").evaluate(fits):  # it follows the window
                    assert time.monotonic() < end
                    time.sleep(0.05)
                tab.shot(f"trained-{name}-{width}")
        tab.root.get_by_label("photo: person 3").click()
        tab.root.locator(".who", has_text="person 3").first.wait_for()
        with tab.page.expect_download() as kept:
            tab.root.get_by_role("button", name="Save avatar").click()
        kept.value.save_as(tmp_path / "person.safetensors")
        model = load_explorer("small").studio.model
        avatar = Avatar.load(tmp_path / "person.safetensors", model)
        choose(tab, "Space", "canonical")
        seen = {}
        for volume in ("fine", "coarse"):
            choose(tab, "Volume", volume)
            seen[volume] = tab.pixels()
            with torch.no_grad():  # at twice the rays, if the page had the time
                camera, rays_ = Camera.orbit(0.0, 0.0), len(seen[volume])
                image = model.render(avatar, None, camera, volume == "coarse", raw_resolution=rays_).image[0]
            expected = ((image / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            assert same(seen[volume], expected)
            means = {v: s.reshape(8, len(s) // 8, 8, -1, 3).mean((1, 3)) for v, s in seen.items()}  # of any size
        assert np.abs(means["fine"] - means["coarse"]).max() > 2  # details of the photo
        assert list(tab.console) == []
        tab.context.close()
