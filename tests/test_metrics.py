"""Metrics by hand and against others: PSNR, SSIM, AED, APD, CSIM, ratios with intervals, FID's features, dlib."""
import importlib.util
import math
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.repro import generator, rng
from nofa_nb.evaluation import metrics as M
from nofa_nb.experts import inception as I
from nofa_nb.experts import judge as J
from nofa_nb.experts.perceptual import random_distance
from nofa_nb.geometry.cameras import Camera
from nofa_nb.ops.fidelity import box_mask, psnr, ssim
from nofa_nb.training import common, prior

pytestmark = pytest.mark.usefixtures("one_thread")


# --- pixels -----------------------------------------------------------------------------------------------------------
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), noise=st.floats(.01, .5), h=st.integers(11, 30), w=st.integers(11, 30))
def test_psnr_and_ssim_are_those_of_scikit_image(seed, noise, h, w):
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    a = torch.rand(2, 3, h, w, generator=generator(seed))
    b = (a + noise * torch.randn(a.shape, generator=generator(seed, "b"))).clamp(0, 1)
    how = dict(channel_axis=0, data_range=1., gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    for k in range(2):
        x, y = a[k].numpy(), b[k].numpy()
        assert psnr(b, a)[k].item() == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1.), abs=1e-3)
        assert ssim(b, a)[k].item() == pytest.approx(structural_similarity(x, y, **how), abs=1e-4)


def test_psnr_by_hand():
    a = torch.zeros(2, 3, 4, 4)
    half = torch.tensor([1., 1, 0, 0]).expand(2, 1, 4, 4)
    b = a + .1 * half + .5 * (1 - half)
    assert psnr(b, a, half).tolist() == pytest.approx([20, 20])
    assert psnr(b, a).tolist() == pytest.approx([-10 * math.log10((.01 + .25) / 2)] * 2)
    assert psnr(a + 2, a).tolist() == [0, 0] and psnr(a - 1, a).tolist() == [100, 100]  # clipped
    assert psnr(a, a, 0 * half).isnan().all()
    assert psnr(b * 2 - 1, a * 2 - 1, half, (-1, 1)).tolist() == pytest.approx([20, 20])
    narrow = torch.zeros(1, 3, 20, 10)
    for bad in (lambda: psnr(a, a[:1]), lambda: ssim(a, a), lambda: ssim(narrow, narrow)):
        with pytest.raises(InputError):
            bad()


def test_trainings_measure_with_the_same_lines():
    assert prior.psnr is psnr and prior.ssim is ssim and prior.box_mask is box_mask
    a, b = torch.rand(2, 2, 3, 8, 8, generator=generator(0)) * 2 - 1
    torch.testing.assert_close(common.psnr(a, b), psnr(a / 2 + .5, b / 2 + .5), atol=1e-4, rtol=0)


# --- expression, pose, identity ---------------------------------------------------------------------------------------
def test_aed_by_hand():
    a, b = torch.tensor([[0., 0, 0, 0], [1., 1, 1, 1]]), torch.tensor([[.4, -.3, 0, 0], [1., 1, 1, 1]])
    found = M.expression_distances(a, b)
    assert found["aed"].tolist() == pytest.approx([.175, 0]) and found["aed_l2"].tolist() == pytest.approx([.5, 0])
    assert found["aed_rmse"].tolist() == pytest.approx([.25, 0]) and set(found) == set(M.AED)
    with pytest.raises(InputError):
        M.expression_distances(a, b[:1])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-.9, .9), min_size=6, max_size=6))
def test_apd_by_hand(angles):
    a, b = torch.tensor(angles[:3]), torch.tensor(angles[3:])
    found = M.pose_distances(Camera.from_pose(a, radius=None), Camera.from_pose(b, radius=None))
    assert found["apd"].item() == pytest.approx((a - b).abs().mean().item(), abs=1e-5)
    assert found["apd_degrees"].item() == pytest.approx(math.degrees(found["apd"].item()), abs=1e-6)
    assert found["apd_translation"].item() == pytest.approx((a - b).abs().sum().item() / 6, abs=1e-4)
    assert set(found) == set(M.APD)


def test_angles_are_compared_on_the_circle():
    a, b = (Camera.from_pose((s * 3.1, 0., 0.)) for s in (1, -1))
    assert M.pose_distances(a, b)["apd"].item() == pytest.approx((2 * math.pi - 6.2) / 3, abs=1e-4)
    turned = M.pose_distances(Camera.from_pose((0., .2, 0.)), Camera.from_pose((0., -.3, 0.)))
    assert turned["apd_geodesic"].item() == pytest.approx(math.degrees(.5), abs=1e-3)


def test_csim_by_hand():
    a = np.array([[3., 4], [0, 2], [math.nan, 1]])
    assert M.csim(a, np.array([[1., 0]]))[:2].tolist() == pytest.approx([.6, 0]) and np.isnan(M.csim(a, a)[2])
    assert M.csim(a[:2], -a[:2]).tolist() == pytest.approx([-1, -1])
    assert M.descriptor_distance(a[:2], np.array([[0., 0]])).tolist() == pytest.approx([5, 2])
    with pytest.raises(InputError):
        M.csim(a, np.zeros((2, 2)))


# --- intervals --------------------------------------------------------------------------------------------------------
def test_a_ratio_is_of_means_over_people():
    found = M.ratio([2., 2., 2., 9., math.nan], [4., 4., 4., 9., 1.], [0, 0, 0, 1, 1])
    assert found.value == pytest.approx((2 + 9) / (4 + 9)) and found.n == 2 and found.interval == pytest.approx((.5, 1))
    with pytest.raises(InputError):
        M.ratio([1., 2.], [1., 2.], [0, 0])
    with pytest.raises(InputError):
        M.interval_of(lambda i: math.nan, [0, 1])


def test_intervals_of_a_whole_set_are_over_people():
    hits, x = 0, rng(0, "x").standard_normal((30, 60, 2)).repeat(2, 1)  # two pictures each, all alike; uncorrelated
    for k, pairs in enumerate(x):
        over = [M.interval_of(lambda i, p=pairs: float(np.corrcoef(p[i].T)[0, 1]), u, 300, k).interval
                for u in (np.arange(120) // 2, np.arange(120))]
        hits += over[0][0] < 0 < over[0][1]
        wide, narrow = (high - low for low, high in over)
        assert .55 < narrow / wide < .9  # about 1 / sqrt 2
    assert hits >= 25


def test_names_say_what_was_measured():
    assert M.perceptual_name(random_distance(1)) == "perceptual" and M.frechet_name("DCT-104") == "frechet"
    assert M.perceptual_name(types.SimpleNamespace(name="LPIPS-Alex")) == "lpips"
    assert M.perceptual_name(types.SimpleNamespace(name="LPIPS-Alex, blocks 1-3 of 5")) == "perceptual"
    assert M.frechet_name(I.InceptionFeatures.name) == "fid"


# --- FID's network ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return {k: torch.randn(t.shape) * .05 if t.ndim > 1 else torch.ones_like(t) if "var" in k or "weight" in k
            else torch.zeros_like(t) for k, t in I.empty_inception().state_dict().items()}


def test_features_are_those_of_pytorch_fid(state, monkeypatch):
    from pytorch_fid import inception
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: dict(state))
    theirs = inception.InceptionV3().eval()
    bytes_ = torch.randint(256, (2, 3, 40, 40), generator=generator(0))
    with torch.no_grad():
        told = theirs(bytes_.float() / 255)[0].flatten(1)
    found = I.InceptionFeatures(state)(bytes_.float() / 127.5 - 1)
    assert found.shape == (2, 2048) and np.abs(found).max() > 1e-3
    np.testing.assert_allclose(found, told, rtol=1e-3, atol=1e-5)


def test_inception_is_found_by_its_hash(state, tmp_path, monkeypatch):
    monkeypatch.setenv("NOFA_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(MissingResource, match="pytorch-fid"):
        I.load_inception()
    (tmp_path / "perceptual").mkdir()
    torch.save(state, tmp_path / "perceptual" / I.FILE)
    with pytest.raises(InputError, match="other bytes"):
        I.load_inception()
    monkeypatch.setattr(I, "hash_file", lambda path: "6726825d" + "0" * 56)
    assert I.load_inception().source_hash == I.InceptionFeatures(state).source_hash


# --- dlib -------------------------------------------------------------------------------------------------------------
class Box:
    def __init__(self, x0, y0, x1, y1):
        self.corners = (x0, y0, x1, y1)

    def area(self):
        return (self.corners[2] - self.corners[0]) * (self.corners[3] - self.corners[1])


@pytest.fixture
def fake(monkeypatch, tmp_path):
    "A dlib that finds two faces in bright pictures and describes a picture by its size and the box."
    seen = types.SimpleNamespace()
    seen.get_frontal_face_detector = lambda: lambda p, up: [Box(0, 0, 2, 2), Box(1, 1, 9, 9)] if p.mean() > 100 else []
    seen.shape_predictor = lambda path: lambda p, box: box
    described = lambda p, box: [p.shape[0], *box.corners, *[0.] * 123]
    seen.face_recognition_model_v1 = lambda path: types.SimpleNamespace(compute_face_descriptor=described)
    seen.rectangle = Box
    monkeypatch.setitem(sys.modules, "dlib", seen)
    monkeypatch.setattr(J, "find_spec", lambda name: object())
    for file in J.FILES.values():
        (tmp_path / file).write_bytes(b"x")
    return tmp_path


def test_the_judge_takes_the_largest_face_or_the_known_one(fake):
    judge = J.DlibJudge(fake)
    points = torch.tensor([[[.4, .4], [.6, .4], [.5, .5], [.42, .6], [.58, .6]]]).expand(2, 5, 2)
    image = torch.stack([torch.ones(3, 64, 64), -torch.ones(3, 64, 64)])
    said = judge(image, points)
    assert said.found.tolist() == [True, False] and said.descriptor[0, :5].tolist() == [256, 1, 1, 9, 9]
    assert said.descriptor[1, :5].tolist() == [256, 67, 67, 189, 189]  # the middle, 1.2 x .2 x 256 = 61 to each side
    blind = judge(image)
    assert blind.found.tolist() == [True, False] and np.isnan(blind.descriptor[1]).all()
    assert judge(torch.ones(1, 3, 300, 300)).descriptor[0, 0] == 300  # large pictures stay as they are
    with pytest.raises(InputError):
        judge(image, points[:1])


def test_the_judge_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(J, "find_spec", lambda name: None)
    for call in (J.DlibJudge, J.judge_paths):
        with pytest.raises(MissingResource, match="pip install dlib-bin face-recognition-models"):
            call()
    assert not J.judge_installed()
    with pytest.raises(MissingResource, match="shape_predictor_5"):
        J.judge_paths(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("dlib") is None, reason="the extra `judge` is not installed")
def test_dlib_knows_a_person_again():
    from nofa_nb.experts.landmarks import five_points
    from nofa_nb.world.bust import dress, sample_person
    from nofa_nb.world.portraits import render
    rows = []
    for person in (2, 5):
        camera = Camera.orbit(torch.tensor([-.2, .2]), torch.zeros(2))
        view = render(dress(sample_person(person), 128), torch.zeros(2, 52), camera, 64)
        rows.append(J.load_judge()(view.rgb * 2 - 1, five_points(view.landmarks)).descriptor)
    same = np.linalg.norm(rows[0][0] - rows[0][1])
    assert same < J.SAME and same + .1 < np.linalg.norm(rows[0][0] - rows[1][0])
