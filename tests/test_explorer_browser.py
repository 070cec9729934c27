"""The explorer from end to end: Voila and JupyterLab in headless Chromium. Screenshots stay in out/test/screenshots."""

import contextlib
import os
import re
import shutil
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
from nofa_nb.apps.explorer_serve import Console, browser, browser_program, descendants, free_port, listening, opened
from nofa_nb.apps.explorer_serve import served as serve
from nofa_nb.apps.explorer_serve import stop as stop_server
from nofa_nb.core.errors import MissingResource
from nofa_nb.core.io import read_image
from nofa_nb.geometry.cameras import Camera
from nofa_nb.models.avatar import Avatar
from nofa_nb.world.motion import UNIT, sample_motion

pytest.importorskip("anywidget", reason="the explorer's page needs the package anywidget")
try:
    browser_program()
except MissingResource as missing:
    pytest.skip(str(missing), allow_module_level=True)

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


def told(model, units=None, seed=7, yaw=0.0):
    "The API's own picture as bytes (h, w, 3), not by way of the explorer."
    beta = torch.zeros(1, 52)
    for name, value in (units or {}).items():
        beta[0, UNIT[name]] = value
    with torch.no_grad():
        face = face_of_seed(model, seed).avatar
        image = model.render(face, beta, Camera.orbit(np.radians(yaw), 0.0)).image[0]
    return ((image / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


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


def test_every_layer_and_both_spaces_are_drawn(tab, model):
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
    tab.root.get_by_label("search expression units").fill("")
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
    picture.press("0")


def test_bad_files_are_answered_with_a_sentence(tab, tmp_path):
    (tmp_path / "cat.png").write_text("no picture at all")
    (tmp_path / "walk.safetensors").write_text("no motion")
    (tmp_path / "empty.png").write_text("")
    before = tab.pixels()
    tab.root.get_by_label("Photo …").set_input_files(tmp_path / "cat.png")
    assert "cat.png" in tab.alert() and "Traceback" not in tab.alert()
    tab.shot("bad-photo")
    tab.root.get_by_label("Open motion …").set_input_files(tmp_path / "walk.safetensors")
    tab.root.get_by_text("walk.safetensors").wait_for()
    tab.root.get_by_label("Photo …").set_input_files(tmp_path / "empty.png")
    tab.root.get_by_text("empty.png is empty").wait_for()
    tab.set("jaw open", 0.3)  # the page goes on
    tab.set("jaw open", 0.0)
    assert (tab.pixels() == before).all()
    tab.root.get_by_label("close the message").click()


def test_a_photo_becomes_a_face_and_an_avatar_file(tab, model, tmp_path):
    tab.root.get_by_label("photo: astronaut").click()
    tab.root.locator(".who", has_text="astronaut").first.wait_for()
    tab.settle()
    with tab.page.expect_download() as kept:
        tab.root.get_by_role("button", name="Save avatar").click()
    kept.value.save_as(tmp_path / "astronaut.safetensors")
    avatar = Avatar.load(tmp_path / "astronaut.safetensors", model)
    with torch.no_grad():
        expected = model.render(avatar, None, Camera.orbit(0.0, 0.0)).image[0]
    choose(tab, "Space", "canonical")
    assert same(tab.pixels(), ((expected / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
    choose(tab, "Volume", "coarse")
    choose(tab, "Volume", "fine")
    choose(tab, "Space", "deformed")
    tab.root.get_by_label("seed of a face").fill("7")
    tab.root.get_by_text("Show seed").click()
    tab.root.locator(".who", has_text="seed 7").first.wait_for()
    choose(tab, "Expression by", "deformation")


def test_saving_a_picture(tab, model, tmp_path):
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


def test_figures_are_drawn_without_a_network(tab):
    names = {"volume": "Volume and a ray", "planes": "Tri-planes", "weights": "W-Net's weights", "walk": "Latent walk"}
    for name, text in names.items():
        tab.root.get_by_role("button", name=text).click()
        tab.root.locator(f'.plot[data-name="{name}"].js-plotly-plot').wait_for()
        tab.root.locator(".plot").scroll_into_view_if_needed()
        assert len(tab.root.locator(".caption").inner_text()) > 40
        tab.shot(f"figure-{name}")


def test_every_control_has_a_name(tab):
    js = """r => [...r.querySelectorAll('input, button, summary, [tabindex]')].filter(e => {
      const label = e.labels && [...e.labels].map(l => l.textContent).join('')
      return !(e.getAttribute('aria-label') || label || e.textContent).trim() }).map(e => e.outerHTML)"""
    assert tab.root.evaluate(js) == []
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_thousand_moves_cost_no_memory(tab):
    def moves(count):
        js = """async (r, n) => { const s = r.querySelector('input[data-name="jaw open"]')
          for (let k = 0; k < n; k++) { s.value = (k % 50) / 50; s.dispatchEvent(new Event('input', { bubbles: true }))
                                        await new Promise(requestAnimationFrame) } }"""
        tab.root.evaluate(js, count)
        tab.settle()

    moves(200)  # caches are filled once
    before, heap = kernels(), tab.page.evaluate("performance.memory?.usedJSHeapSize ?? 0")
    moves(1000)
    after = kernels()
    grown = {pid: after[pid] - before[pid] for pid in before if pid in after}
    print({p: f"{g / 2**20:.1f} MB" for p, g in grown.items()})
    assert grown and max(grown.values()) < 50 * 2**20
    assert tab.page.evaluate("performance.memory?.usedJSHeapSize ?? 0") - heap < 50 * 2**20


def test_two_tabs_do_not_mix(chromium, address, tab, model):
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
    other.shot("voila-1920")
    tab.set("mouth pucker", 0.0)
    tab.shot("voila-1280")
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


@pytest.fixture
def lab(tmp_path):
    "JupyterLab with the app's notebook."
    shutil.copy(ROOT / "nbs/runs/explorer.ipynb", tmp_path)
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
    assert [e for e in console if "nofa" in e or "anywidget" in e or e.startswith("asked")] == []

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
    assert tab.alert().startswith("The kernel does not answer: it was restarted")
    assert "run the cell again" in tab.alert() and "Cannot send" not in console
    tab.shot("jupyterlab-restarted")
    tab.root.evaluate("r => r.classList.add('old')")
    run_all()
    tab.root = page.locator(".nofa:not(.old)").last
    tab.root.locator("canvas[data-quality]").wait_for(state="attached")
    tab.settle()
    assert tab.root.locator('[role="alert"]').is_hidden()
    context.close()
