"""Protocols: the same clips for everybody, any method, one pass, a run that is killed and goes on, numbers by hand."""
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.io import read_image, write_image
from nofa_nb.core.repro import generator, hash_tensors, read_results
from nofa_nb.evaluation import avatar as A
from nofa_nb.evaluation import protocols as P
from nofa_nb.evaluation.metrics import csim
from nofa_nb.experts.face3d import FACES, FaceParameters, FaceRegressor
from nofa_nb.experts.judge import Judged
from nofa_nb.geometry.cameras import Camera
from nofa_nb.models.avatar import build_avatar_model, save_avatar_model
from nofa_nb.world.clips import load_manifest
from nofa_nb.world.motion import UNIT

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]


def frames_of(seed, index, size=32):
    "Random pictures with labels."
    g, b = generator(seed, "frames"), len(index)
    points = torch.tensor([[.35, .4], [.65, .4], [.5, .55], [.4, .7], [.6, .7]]).expand(b, 5, 2)
    camera = Camera.orbit(torch.full((b,), .1), torch.zeros(b)).label
    picture = torch.rand(b, 3, size, size, generator=g) * 2 - 1
    return P.Frames(picture, torch.zeros(b, 100), torch.rand(b, 52, generator=g), camera, points, tuple(index),
                    torch.ones(b, 1, size, size))


def trial(k, n=4, same=True):
    "A trial of random pictures, in batches of three."
    def drive():
        whole = frames_of(k + 100, range(n))
        for i in range(0, n, 3):
            yield whole.at(range(i, min(i + 3, n)))
    return P.Trial(f"clip-{k}", f"person {k // 2}", lambda: frames_of(k, [9]), drive, same)


def noisy(amount, name="ours"):
    "A method that adds noise to the truth."
    def method(trial, source):
        def draw(frames):
            g = generator(0, trial.name, frames.index[0])
            return {name: frames.image + amount * torch.randn(frames.image.shape, generator=g)}
        return draw
    return method


class Mean:
    "Judges by mean colours; knows every face."
    name, source_hash = "mean colour", "0" * 64

    def __call__(self, image, points=None):
        return Judged(image.mean((2, 3)).double().numpy() + 1, np.ones(len(image), bool))


def m_of(image):
    "An M that reads brightness."
    light, none = image.mean((1, 2, 3)), torch.zeros(len(image))
    beta = (light[:, None] + torch.linspace(0, .1, 52)).clamp(0, 1)
    return FaceParameters(torch.zeros(len(image), 100), beta, Camera.orbit(light, none))


SCORER = P.Scorer(m_of, None, {"colour": Mean()}, judge_every=2)


# --- the clips --------------------------------------------------------------------------------------------------------
def test_the_worlds_clips_are_those_of_the_manifests():
    own, other = P.self_trials(32, 10), P.cross_trials(32, 10)
    people = [e.identity for e in load_manifest("self").entries]
    assert [t.unit for t in own] == [str(p) for p in people] and len({t.name for t in own}) == 40
    assert len(other) == 200 and not {t.unit for t in other} & {t.unit for t in own} and not any(t.same for t in other)
    assert [t.name for t in P.self_trials(32, 10, 3)] == [t.name for t in own[:3]]
    for e in load_manifest("self").entries:
        for stride in (1, 12, 1000):
            found = P.chosen(e.frames, stride, e.source)
            assert found and e.source not in found and max(found) < e.frames
            assert len(found) <= math.ceil(e.frames / stride)


def test_a_trial_is_the_same_every_time():
    a, b = P.self_trials(32, 40, 1)[0], P.self_trials(32, 40, 1, at_once=1)[0]
    first, again = next(a.drive()), next(a.drive())
    assert torch.equal(first.image, again.image) and torch.equal(a.source().image, b.source().image)
    single = torch.cat([f.image for f in b.drive()])
    assert torch.equal(single, torch.cat([f.image for f in a.drive()])) and len(single) > 1
    assert first.image.min() >= -1 and first.image.max() <= 1 and first.mask.mean() > .1


def test_estimates_replace_labels_only():
    seen = P.estimated(trial(0), m_of)
    source, frames = seen.source(), next(seen.drive())
    assert torch.equal(source.image, trial(0).source().image) and source.index == (9,)
    assert torch.equal(frames.beta, m_of(frames.image).beta)
    assert torch.equal(frames.points, next(trial(0).drive()).points)
    assert torch.equal(frames.camera, m_of(frames.image).camera.label)


# --- scores -----------------------------------------------------------------------------------------------------------
def test_scores_by_hand():
    shift = lambda trial, source: lambda frames: {"ours": frames.image.clamp(-.7, .7) + .2}  # noqa: E731
    done = P.score_trial(trial(0), shift, SCORER).record["scores"]["ours"]
    whole = torch.cat([f.image for f in trial(0).drive()])
    told = m_of((whole.clamp(-.7, .7) + .2).clamp(-1, 1))
    assert done["aed"] == pytest.approx((told.beta - m_of(whole).beta).abs().mean(1).tolist(), abs=1e-5)
    error = ((whole.clamp(-.7, .7) + .2 - whole) / 2).square().mean((1, 2, 3))
    assert done["psnr"] == pytest.approx((-10 * error.log10()).tolist(), abs=1e-3) and done["psnr"] == done["psnr_mask"]
    d, s = Mean()(whole.clamp(-.7, .7) + .2).descriptor, Mean()(trial(0).source().image).descriptor
    assert [v is None for v in done["csim_colour"]] == [False, True, False, True]
    assert done["csim_colour"][2] == pytest.approx(csim(d, s)[2], abs=1e-5) and done["undetected_colour"][0] == 0
    assert done["distance_colour"][0] == pytest.approx(np.linalg.norm(d[0] - s[0]), abs=1e-5)


def test_without_truth_there_are_no_pixel_scores():
    done = P.score_trial(trial(0, same=False), noisy(.1), SCORER)
    assert set(done.record["scores"]) == {"ours"} and not {"psnr", "ssim"} & set(done.record["scores"]["ours"])
    assert done.tensors["features/truth"].shape[0] == 1  # the source
    blind = replace(SCORER, face3d=None, judges={})
    with pytest.raises(InputError, match="true frames"):
        P.score_trial(trial(0), lambda t, s: lambda f: {"x": f.image[..., :16, :16]}, blind)
    assert set(P.score_trial(trial(0), noisy(.1), blind).record["scores"]["ours"]) == set(P.PIXELS)
    no_mask = replace(trial(0), drive=lambda: (replace(f, mask=None) for f in trial(0).drive()))
    assert "psnr_mask" not in P.score_trial(no_mask, noisy(.1), blind).record["scores"]["ours"]


# --- methods ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model():
    found = build_avatar_model("smoke", 3).requires_grad_(False).eval()
    torch.nn.init.normal_(found.deformation.d_net.last.weight, std=.05, generator=generator(0))
    torch.nn.init.normal_(found.fusion.eta[-1].weight, std=.5, generator=generator(1))
    return found


def test_the_avatar_is_driven_by_the_frames(model):
    t = trial(0)
    source, frames = t.source(), next(t.drive())
    draw = P.AvatarMethod(model)(t, source)
    drawn = draw(frames)
    avatar = model.reconstruct(source.image, Camera.from_label(source.camera), source.alpha, source.beta)
    second = frames.at([1])
    wanted = ("fine", False, second.beta), ("coarse", True, second.beta), ("held", False, source.beta)
    for name, coarse, beta in wanted:
        told = model.render(avatar, beta, Camera.from_label(second.camera), coarse).image
        torch.testing.assert_close(drawn[name][1:2], told, atol=1e-5, rtol=0)
    assert not torch.equal(drawn["fine"], drawn["coarse"]) and not torch.equal(drawn["fine"], drawn["held"])
    assert list(P.AvatarMethod(model, ("coarse",))(t, source)(frames)) == ["coarse"]
    with pytest.raises(InputError):
        P.AvatarMethod(model, ("best",))


def test_frames_of_other_programs(tmp_path):
    trials = [trial(0), trial(2)]
    P.write_trials(trials, tmp_path / "given", progress=False)
    for t in trials:
        for path in (tmp_path / "given" / t.name / "driving").iterdir():
            write_image(tmp_path / "their" / t.name / f"out_{int(path.stem)}.png", read_image(path))
    method = P.FolderMethod(tmp_path / "their", "theirs")
    found = P.run_protocol(trials, method, P.Scorer(), tmp_path / "run", {"frames": P.picture_hash(tmp_path / "their")},
                           progress=False)
    assert found.mean("theirs", "psnr").value > 50  # eight bits
    t, frames = trials[0], next(trials[0].drive())
    write_image(tmp_path / "their" / t.name / "out_1.png", torch.zeros(3, 64, 64))  # resampled
    assert (method(t, t.source())(frames)["theirs"][1] == -1).all()
    write_image(tmp_path / "their" / t.name / "out_1.png", torch.zeros(3, 64, 32))
    with pytest.raises(InputError, match="square"):
        method(t, t.source())(frames)
    (tmp_path / "their" / t.name / "out_2.png").unlink()
    with pytest.raises(MissingResource, match="frame 2 of clip-0"):
        method(t, t.source())(frames.at([0, 2]))
    with pytest.raises(MissingResource):
        P.FolderMethod(tmp_path / "nowhere")


# --- runs -------------------------------------------------------------------------------------------------------------
ABOUT = {"manifest": "a" * 64, "weights": "b" * 64, "stride": 1}


def test_a_run_goes_on_where_it_stopped(tmp_path):
    trials, seen = [trial(k) for k in range(4)], []

    def killed(t, source):
        seen.append(t.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return noisy(.1)(t, source)

    with pytest.raises(KeyboardInterrupt):
        P.run_protocol(trials, killed, SCORER, tmp_path / "a", ABOUT, progress=False)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "clip-0.json", "clip-0.safetensors", "clip-1.json", "clip-1.safetensors", "run.json"]
    scores = P.run_protocol(trials, killed, SCORER, tmp_path / "a", ABOUT, progress=False)
    assert seen == ["clip-0", "clip-1", "clip-2", "clip-2", "clip-3"]
    whole = P.run_protocol(trials, noisy(.1), SCORER, tmp_path / "b", ABOUT, progress=False)
    assert scores.records == whole.records
    (tmp_path / "a" / "clip-1.json").unlink()
    assert P.run_protocol(trials, killed, SCORER, tmp_path / "a", ABOUT, progress=False).records == whole.records
    assert seen[5:] == ["clip-1"]
    some = P.run_protocol(trials[:2], killed, SCORER, tmp_path / "a", ABOUT, progress=False)
    assert len(some.records) == 2 and len(P.read_scores(tmp_path / "a").records) == 4


@pytest.mark.parametrize("change,said", [
    (dict(about={**ABOUT, "weights": "c" * 64}), "weights"),
    (dict(about={**ABOUT, "manifest": "c" * 64}), "manifest"),
    (dict(scorer=replace(SCORER, judge_every=1)), "judge_every"),
    (dict(scorer=replace(SCORER, judges={})), "judge colour"),
    (dict(code="another commit"), "code"),
])
def test_a_run_of_anything_else_is_refused(tmp_path, monkeypatch, change, said):
    P.run_protocol([trial(0)], noisy(.1), SCORER, tmp_path, ABOUT, progress=False)
    if "code" in change:
        monkeypatch.setattr(P, "code_version", lambda: change["code"])
    with pytest.raises(InputError, match=said) as e:
        scorer, about = change.get("scorer", SCORER), change.get("about", ABOUT)
        P.run_protocol([trial(0)], noisy(.1), scorer, tmp_path, about, progress=False)
    assert "stride" not in str(e.value).split(", got")[0]


def test_foreign_and_missing_trials_are_refused(tmp_path):
    P.run_protocol([trial(0), trial(1)], noisy(.1), SCORER, tmp_path / "a", ABOUT, progress=False)
    P.run_protocol([trial(1)], noisy(.3), SCORER, tmp_path / "b", {**ABOUT, "stride": 2}, progress=False)
    (tmp_path / "a" / "clip-1.json").write_bytes((tmp_path / "b" / "clip-1.json").read_bytes())
    with pytest.raises(InputError, match="clip-1"):
        P.read_scores(tmp_path / "a")
    (tmp_path / "a" / "clip-1.json").unlink()
    with pytest.raises(MissingResource, match="clip-1"):
        P.read_scores(tmp_path / "a", ["clip-0", "clip-1"])
    with pytest.raises(MissingResource, match="the run"):
        P.read_scores(tmp_path / "none")
    with pytest.raises(InputError, match="different names"):
        P.run_protocol([trial(0), trial(0)], noisy(.1), SCORER, tmp_path / "c", ABOUT, progress=False)


def test_intervals_are_over_people(tmp_path):
    both = lambda t, s: lambda f: noisy(.1, "fine")(t, s)(f) | noisy(.2, "coarse")(t, s)(f)  # noqa: E731
    scores = P.run_protocol([trial(k) for k in range(8)], both, SCORER, tmp_path, ABOUT, progress=False)
    values, units = scores.values("fine", "psnr")
    assert len(values) == 32 and set(units) == {f"person {k}" for k in range(4)} and scores.mean("fine", "psnr").n == 4
    gain = scores.difference("fine", "coarse", "psnr")
    assert 5 < gain.value < 6.1 and gain.interval[0] > 5  # about 20 log 2, less what is clipped
    less = scores.ratio("fine", "coarse", "distance_colour")
    a, b = (np.nanmean(scores.values(v, "distance_colour")[0]) for v in ("fine", "coarse"))
    assert less.value == pytest.approx(a / b) and less.n == 4
    assert scores.frechet("coarse").value > scores.frechet("fine").value > 0
    with pytest.raises(InputError, match="measured"):
        scores.values("fine", "lpips")


def test_strangers_and_centred_descriptors(tmp_path):
    scores = P.run_protocol([trial(k) for k in range(8)], noisy(.1), SCORER, tmp_path, ABOUT, progress=False)
    d = np.stack([Mean()(trial(k).source().image).descriptor[0] for k in range(8)])
    raw = [csim(d[[j for j in range(8) if j // 2 != k // 2]], d[k:k + 1]).mean() for k in range(8)]
    assert scores.strangers("colour")["csim_colour"].value == pytest.approx(np.mean(raw), abs=1e-5)
    centre = d.mean(0)
    told, units = scores.centred("truth", "colour")
    frames = torch.cat([f.image for f in trial(5).drive()])
    assert told[5 * 4 + 2] == pytest.approx(csim(Mean()(frames).descriptor[2:3] - centre, d[5:6] - centre)[0], abs=1e-3)
    assert np.isnan(told).sum() == 16 and units[5 * 4] == "person 2"


def test_results_carry_what_they_are(tmp_path):
    both = lambda t, s: lambda f: {"fine": f.image * .9, "coarse": f.image * .7, "held": f.image * .5}  # noqa: E731
    scores = P.run_protocol([trial(k) for k in range(8)], both, SCORER, tmp_path, ABOUT, progress=False)
    provenance = dict(weights_hash="b" * 64, data_hash="a" * 64, seed=3, device="cpu", date="2026-01-31T12:00:00Z",
                      commit="x", preset="smoke", config_hash="none")
    found = {(r.name, r.metric): r for r in P.protocol_results(scores, SCORER, "X", provenance)}
    assert found["X, fine - coarse", "psnr"].value > 0 and found["X, fine / held", "aed"].value < 1
    assert found["X, truth", "csim_colour"].n == 4 and "mean colour" in found["X, truth", "csim_colour"].variant
    assert ("X, held", "csim_colour") not in found and ("X, strangers", "csim_centred_colour") in found
    assert ("X, fine", "frechet_DCT-104") in found and not any(m.startswith("fid") for _, m in found)
    assert all(r.seed == 3 and r.n == 4 and r.weights_hash == "b" * 64 for r in found.values())


# --- the parts --------------------------------------------------------------------------------------------------------
def test_canonical_spread_by_hand():
    faces = A.expressions_of(2_000_017, 3, 32)
    assert torch.equal(faces.alpha[0], faces.alpha[2]) and not torch.equal(faces.image[0], faces.image[1])
    told = A.canonical_spread(faces, faces.image * .5)
    assert told.ratio == pytest.approx(.5, rel=1e-5)
    left = torch.zeros(1, 1, 32, 32)
    left[..., :16] = 1
    two = torch.stack([torch.zeros(3, 32, 32), torch.where(left[0] > 0, .4, 9.).expand(3, -1, -1)])
    assert A.spread(two, left) == pytest.approx(.2)


def test_canonical_faces_are_those_of_the_model(model):
    faces = A.expressions_of(2_000_017, 2, 32)
    found = A.canonical_faces(model, faces)
    one = faces.at([1])
    avatar = model.reconstruct(one.image, Camera.from_label(one.camera), one.alpha, one.beta)
    torch.testing.assert_close(found[1:], model.render(avatar, None, Camera.orbit(0., 0.)).image.clamp(-1, 1))
    coarse = A.canonical_faces(model, faces, coarse=True)
    assert not torch.equal(found, coarse)


def test_weights_by_a_formula(model):
    class Knows(type(model.deformation)):
        def weight(self, points, alpha):
            return (points[..., 2:] > 0).float() * .8 + .1  # the front half

    alpha = torch.zeros(1, 100)
    new = A.weights_in_volume(model.deformation, alpha)
    assert .5 < new.ratio < 2
    knows = build_avatar_model("smoke", 0).requires_grad_(False).eval().deformation
    knows.__class__ = Knows
    told = A.weights_in_volume(knows, alpha)
    assert told.inside > .8 and .3 < told.outside < .6  # faces are in front; half of the air is
    planes = A.weights_on_planes(knows, alpha, (.4, -.4), 8)
    torch.testing.assert_close(planes[0], torch.full((8, 8), .9))
    torch.testing.assert_close(planes[1], torch.full((8, 8), .1))


def test_moves_are_read_back(model):
    faces = A.expressions_of(2_000_017, 2, 32).at([0])
    avatar = model.reconstruct(faces.image, Camera.from_label(faces.camera), faces.alpha, faces.beta)
    seen = []

    def still(image):
        seen.append(image)
        front = Camera.orbit(torch.zeros(6), torch.zeros(6))
        return FaceParameters(torch.zeros(6, 100), torch.full((6, 52), .2), front)

    gains = A.put_through(model, avatar, still).gains()
    assert set(gains.values()) == {0.} and seen[0].shape == (6, 3, 32, 32)
    beta = torch.zeros(1, 52)
    beta[0, UNIT["jawOpen"]] = .7
    torch.testing.assert_close(seen[0][1:2], model.render(avatar, beta, Camera.orbit(0., 0.)).image.clamp(-1, 1))
    aside = model.render(avatar, 0 * beta, Camera.orbit(math.pi / 6, 0.)).image.clamp(-1, 1)
    torch.testing.assert_close(seen[0][5:], aside)


def test_points_apart_by_hand():
    faces = A.expressions_of(2_000_017, 3, 32)
    truth = FaceParameters(faces.alpha, faces.beta, Camera.from_label(faces.camera))
    there = A.detected_points(A.landmarks(truth, A.load_head().model))  # where MTCNN would find them
    assert A.points_apart(truth, there).max() < 1e-6
    off = there.clone()
    off[:, 2, 1] += .05  # the nose
    eyes = (off[:, 1] - off[:, 0]).norm(dim=-1)
    found = A.points_apart(truth, off)
    torch.testing.assert_close(found[:, 2], .05 / eyes, atol=1e-4, rtol=0)
    assert found[:, [0, 1, 3, 4]].max() < 1e-4


# --- the notebook -----------------------------------------------------------------------------------------------------
def test_run_notebook_takes_any_weights(tmp_path, model):
    "Some parts, from a folder of weights, in this process; twice: another row is kept, the same is replaced."
    import matplotlib
    matplotlib.use("Agg")
    from nofa_nb.core.weights import save_weights
    licence = dict(licence="Apache-2.0")
    save_avatar_model(tmp_path / "w" / "avatar", model, licence)
    M = FaceRegressor(FACES["smoke"])
    record = dict(kind="face3d", preset="smoke", config=M.config, **licence)
    save_weights(tmp_path / "w" / "face3d", M.state_dict(), record)
    notebook = json.loads((ROOT / "nbs" / "runs" / "evaluate_avatar.ipynb").read_text("utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    for labels in ("truth", "estimated", "truth"):
        changes = dict(weights=str(tmp_path / "w"), parts="self wnet", clips=2, stride=40, people=2, judge="none",
                       shown=1, labels=labels, out=str(tmp_path / "o"), results=str(tmp_path / "r"))
        parameters = cells[0] + "\n" + "\n".join(f"{k} = {v!r}" for k, v in changes.items())
        exec("\n".join([parameters, *cells[1:]]), {"__name__": "run"})
        matplotlib.pyplot.close("all")
    rows = read_results(tmp_path / "r" / "self_reenactment.json")
    assert {r.name for r in rows} == {f"NOFA++{m}, {v}" for m in ("", ", driven by M") for v in (
        "fine", "coarse", "held", "fine - coarse", "fine / coarse", "fine - held", "fine / held")}
    assert len({(r.name, r.metric) for r in rows}) == len(rows)
    loaded = {r.weights_hash for r in rows}
    assert len(loaded) == 1 and loaded != {hash_tensors(model.state_dict())}  # as they are after 16 bits
    assert {r.data_hash for r in rows} == {load_manifest("self").sha256} and all(r.n == 2 for r in rows)
    assert len(list((tmp_path / "o" / "self").iterdir())) == 2  # a folder for each kind of labels
    assert {r.metric for r in read_results(tmp_path / "r" / "wnet.json")} >= {"ratio_seen", "ratio_volume"}


def test_the_command_knows_the_notebook():
    from nofa_nb.apps.cli import main
    for wrong in (["--clips", "1"], ["--parts", "everything"], ["--labels", "guessed"]):
        assert main(["evaluate", "avatar", *wrong]) == 2


def test_dlib_scores_a_trial(tmp_path):
    if importlib.util.find_spec("dlib") is None:
        pytest.skip("the extra `judge` is not installed")
    from nofa_nb.experts.judge import load_judge
    scorer = P.Scorer(judges={"dlib": load_judge()}, judge_every=2)
    same = lambda t, s: lambda f: {"fine": f.image}  # noqa: E731
    done = P.score_trial(P.self_trials(64, 40, 1)[0], same, scorer).record["scores"]
    assert done["fine"]["csim_dlib"] == done["truth"]["csim_dlib"] and done["fine"]["csim_dlib"][0] > .95
    assert done["fine"]["undetected_dlib"][0] == 0
