"""The prior in use: generators saved and loaded, new faces as a sheet and a film, the commands, the wheel."""
import json
import math
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nofa_nb.core.weights as W
from nofa_nb.apps import sample as S
from nofa_nb.apps.cli import main
from nofa_nb.core.config import preset
from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.io import VideoReader, read_image
from nofa_nb.core.repro import generator, hash_tensors, read_results
from nofa_nb.geometry.cameras import Camera
from nofa_nb.models.generator import build_generator, load_generator, save_generator
from nofa_nb.world.bust import sample_person
from nofa_nb.world.latent import latent
from nofa_nb.world.motion import sample_expression

ROOT = Path(__file__).resolve().parents[1]
SMOKE = preset("smoke").generator
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    made = build_generator(SMOKE, seed=3).eval().requires_grad_(False)
    z = torch.randn(64, SMOKE.z_dim, generator=generator(1))
    made.backbone.mapping.w_avg.copy_(made.map(z)[:, 0].mean(0))
    return made


@pytest.fixture
def folder(model, tmp_path):
    return save_generator(tmp_path / "w", model, SMOKE, "smoke", data="random numbers")


# generators

def test_a_generator_comes_back(model, folder, monkeypatch):
    z, camera = torch.randn(2, SMOKE.z_dim, generator=generator(0)), Camera.orbit(.3, .1)
    loaded = load_generator(folder)
    for psi in (1., .5):  # the average code is kept
        a, b = (g(z, camera, psi=psi).image for g in (model, loaded))
        assert (a - b).abs().max() < .01 * a.std()
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    record = json.loads((folder / "weights.json").read_text())
    assert record["tensors_hash"] == hash_tensors(loaded.state_dict()) and record["data"] == "random numbers"
    W.save_weights(folder.parent / "own" / "smoke" / "prior", model.state_dict(), record)
    monkeypatch.setenv("NOFA_WEIGHTS", str(folder.parent / "own"))
    assert hash_tensors(load_generator("smoke").state_dict()) == record["tensors_hash"]
    monkeypatch.setenv("NOFA_WEIGHTS", str(folder))
    with pytest.raises(MissingResource, match="smoke/prior"):
        load_generator("smoke")


def test_options_of_the_build_come_back(tmp_path):
    config = replace(SMOKE, z_dim=12, label_dim=25, raw_channels=5)
    made = build_generator(config, plane_axes="distinct", label_scale=.5, mapping_width=20)
    loaded = load_generator(save_generator(tmp_path / "w", made, config, "smoke"))
    assert loaded.plane_axes == "distinct" and loaded.label_scale == .5
    z = torch.randn(1, 12, generator=generator(0))
    a, b = (g(z, Camera.orbit(.3, 0.), Camera.orbit(.6, 0.)) for g in (made, loaded))
    assert a.features.shape == b.features.shape == (1, 5, 16, 16) and (a.image - b.image).abs().max() < .02


def test_a_training_checkpoint_s_names_and_config_are_read(model, folder):
    tensors, record = W.load_weights(folder)
    record["config"] = {"prior": {}, "generator": record["config"], "seed": 0}
    W.save_weights(folder, {f"generator.{k}": t for k, t in tensors.items()}, record)
    assert hash_tensors(load_generator(folder).state_dict()) == hash_tensors(tensors)


@pytest.mark.parametrize("change,said", [
    (lambda t, r: (t, r | {"config": r["config"] | {"decoder_width": 24}}), "by its config"),
    (lambda t, r: (t, r | {"config": r["config"] | {"channels": [32, 24, 24, 16], "plane_resolution": 64}}), "missing"),
    (lambda t, r: (t | {"extra": torch.ones(1)}, r), "'extra'"),
    (lambda t, r: ({k: v for k, v in t.items() if "w_avg" not in k}, r), "w_avg"),
    (lambda t, r: (t, r | {"config": {"depth": 3}}), "'depth'"),
    (lambda t, r: (t, r | {"config": r["config"] | {"z_dim": "many"}}), "config"),
    (lambda t, r: (t, r | {"config": [1]}), "kind '3D generator'"),
    (lambda t, r: (t, r | {"options": {"seed": 3}}), "options"),
    (lambda t, r: (t, r | {"options": {"plane_axes": "xyz"}}), "plane_axes"),
], ids=["width", "blocks", "extra", "missing", "setting", "type", "kind", "option", "axes"])
def test_what_does_not_fit_is_refused(folder, change, said):
    W.save_weights(folder, *change(*W.load_weights(folder)))
    with pytest.raises(InputError, match=said):
        load_generator(folder)


def test_a_config_of_another_generator_is_not_saved(model, tmp_path):
    with pytest.raises(InputError, match="by its config"):
        save_generator(tmp_path / "w", model, replace(SMOKE, raw_channels=5), "smoke")
    assert not list(tmp_path.iterdir())


# faces

def test_codes_are_people(model):
    z = S.codes(model, 5, 3)
    person = torch.cat([sample_person(6).code, sample_expression(6)[0]])
    for alone in (latent(person[None])[0], S.codes(model, 6, 1)[0]):  # a batch rounds in another order
        torch.testing.assert_close(alone, z[1], rtol=1e-5, atol=1e-5)
    other = build_generator(replace(SMOKE, z_dim=512))
    normal = S.codes(other, 0, 50)
    assert normal.shape == (50, 512) and abs(normal.mean()) < .05 and abs(normal.std() - 1) < .05
    assert torch.equal(S.codes(other, 7, 2), normal[7:9])


def test_a_sheet_has_a_row_for_each_code(model):
    z, told = S.codes(model, 0, 3), []
    table = S.sheet(model, z, 2, psi=.8, step=told.append, chunk=2)
    assert table.shape == (3, 96, 64) and sum(told) == 6 and 0 <= table.min() and table.max() <= 1
    for k in range(3):
        for column, yaw in enumerate((-.7, .7)):
            alone = (model(z[k:k + 1], Camera.orbit(yaw, 0.), psi=.8).image[0] / 2 + .5).clamp(0, 1)
            tile = table[:, 32 * k:32 * k + 32, 32 * column:32 * column + 32]
            torch.testing.assert_close(tile, alone, atol=1e-4, rtol=0)


def test_all_of_it(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(S, "SIDES", 7)
    made = S.sample(tmp_path / "out", seed=2, n=3, views=1, weights=folder, progress=False)
    assert made == (tmp_path / "out" / "sheet.png", tmp_path / "out" / "orbit.mp4")
    assert read_image(made[0]).shape == (3, 96, 32)
    video = VideoReader(made[1])
    assert video.size == (256, 768) and video.frames == 3 * 12
    frames = [f.astype(float) for f in video]
    assert abs(frames[0] - frames[6]).mean() > abs(frames[1] - frames[11]).mean() + .5  # there, and back


def test_average_face_is_everybody_s(model):
    z = S.codes(model, 0, 2)
    assert torch.equal(*S.look(model, z, 0.).planes) and not torch.equal(*S.look(model, z, 1.).planes)
    for psi in (-.1, 1.1, math.nan):
        with pytest.raises(InputError, match="psi"):
            S.look(model, z, psi)


def test_swaps():
    a, b = torch.zeros(1, 198), torch.ones(1, 198)
    assert [int(S.swap_parts(a, b, p).sum()) for p in S.PARTS] == [100, 34, 12, 52]
    assert S.swap_parts(a, b, *S.PARTS).min() == 1 and S.swap_parts(a, b).max() == 0 and a.max() == 0
    wa, wb = torch.zeros(1, 6, 4), torch.ones(1, 6, 4)
    assert S.mix_styles(wa, wb, 4)[0, :, 0].tolist() == [0, 0, 0, 0, 1, 1]
    for bad in (lambda: S.swap_parts(a, b, "hair"), lambda: S.swap_parts(a, b[:, :3]), lambda: S.mix_styles(wa, wb, 7)):
        with pytest.raises(InputError):
            bad()


# commands

def test_command(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(S, "SIDES", 3)
    line = ["sample", "--weights", str(folder), "--n", "2", "--views", "1", "--out", str(tmp_path / "o"), "--psi", ".5"]
    assert main(line) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "o" / n) for n in ("sheet.png", "orbit.mp4")]
    assert main(["sample", "--psi", "1.5"]) == 2 and "from 0.0 to 1.0" in capsys.readouterr().err
    assert main(["sample", "--weights", str(tmp_path / "none")]) == 3 and "weights.json" in capsys.readouterr().err
    assert main(["sample", "--n", "0"]) == 2 and main(["evaluate", "prior", "--people", "1"]) == 2


def run_evaluation(tmp_path, folder, **changes):
    "The cells of the notebook, on two people."
    import matplotlib
    matplotlib.use("Agg")
    notebook = json.loads((ROOT / "nbs" / "runs" / "evaluate_prior.ipynb").read_text("utf-8"))
    changes = dict(weights=str(folder), people=2, views=2, samples=2, shown=1, out=str(tmp_path),
                   results=str(tmp_path / "r.json"), **changes)
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    parameters = cells[0] + "\n" + "\n".join(f"{k} = {v!r}" for k, v in changes.items())
    exec("\n".join([parameters, *cells[1:]]), {"__name__": "run"})
    matplotlib.pyplot.close("all")


def test_run_notebook_evaluates(folder, tmp_path):
    "Every cell, on two people, in this process; twice: another world is kept, the same is replaced."
    for world in ("full", "reduced", "full"):
        run_evaluation(tmp_path, folder, world=world)
    rows = read_results(tmp_path / "r.json")
    names = [r.name for r in rows]
    assert names == ["prior, reduced world"] * 13 + ["prior, full world"] * 13
    assert {r.weights_hash for r in rows} == {hash_tensors(load_generator(folder).state_dict())}
    assert {"psnr", "psnr_mask", "ssim", "depth_l1", "mask_iou", "psnr_eyes_mouth", "landmark_shift",
            "landmark_carried", "frechet_DCT-104_samples", "frechet_DCT-104_world_floor"} <= {r.metric for r in rows}
    assert not any(r.metric.lower().startswith("fid") for r in rows)


def test_codes_are_fitted(tmp_path):
    "Where rays are pixels: the bound of each space beside what the mapping network gives, for the same pictures."
    plain = replace(SMOKE, super_resolution="none", raw_resolution=SMOKE.image_resolution)
    folder = save_generator(tmp_path / "w", build_generator(plain, 3), plain, "smoke", data="random numbers")
    run_evaluation(tmp_path, folder, fitted=2)
    found = {r.metric: r for r in read_results(tmp_path / "r.json") if r.variant.endswith("; 2 pictures")}
    assert set(found) == {f"{m}_{s}" for m in ("psnr", "psnr_mask") for s in ("mapped", "w", "w+")}
    assert found["psnr_mapped"].value + .5 < found["psnr_w"].value < found["psnr_w+"].value
    with pytest.raises(InputError, match="fitted must be 0, or at least 2"):
        run_evaluation(tmp_path, folder, fitted=1)


# the wheel

def test_weights_and_sources_are_in_the_wheel(tmp_path):
    for name in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    wanted = ["weights/small/prior/weights.json", "weights/small/prior/weights-00001-of-00001.safetensors",
              "weights/small/prior/README.md", "csrc/render.cpp", "csrc/deep/er.cu", "assets/head.npz"]
    for name in ("__init__.py", *wanted):
        path = tmp_path / "nofa_nb" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    build = [sys.executable, "setup.py", "-q", "sdist", "bdist_wheel"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        assert {f"nofa_nb/{name}" for name in wanted} <= set(wheel.namelist())
    with tarfile.open(next((tmp_path / "dist").glob("*.tar.gz"))) as sdist:
        inside = {name.split("/", 1)[-1] for name in sdist.getnames()}
    assert {f"nofa_nb/{name}" for name in wanted} | {"settings.ini", "setup.py"} <= inside
