"""M and what trains it: cameras of crops, labels that follow the picture, checkpoints, measures, learning."""
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.config import preset
from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.repro import generator
from nofa_nb.core.weights import save_weights
from nofa_nb.data import augment as A
from nofa_nb.data.rays import collect
from nofa_nb.experts import face3d as M
from nofa_nb.geometry.alignment import apply
from nofa_nb.geometry.cameras import Camera
from nofa_nb.training import face3d as T
from nofa_nb.training.loop import make_fabric, train
from nofa_nb.world.head import load_head
from nofa_nb.world.motion import UNIT
from nofa_nb.world.sets import PortraitSet, SetConfig

pytestmark = pytest.mark.usefixtures("one_thread")
small = st.floats(-1, 1, allow_nan=False, width=32)


@pytest.fixture(scope="module")
def data():
    return collect(PortraitSet(SetConfig(replace(preset("smoke").world, views=2)), count=5), progress=False)


@pytest.fixture(scope="module")
def faces(data):
    return A.faces_of(data, torch.arange(len(data)))


# cameras

@settings(max_examples=15, deadline=None)
@given(st.lists(small, min_size=6, max_size=6))
def test_six_numbers_and_cameras_are_inverse(numbers):
    pose = torch.tensor([numbers]) * torch.tensor([.5, 1.2, 1., .3, .3, .5])
    camera = M.pose_camera(pose)
    torch.testing.assert_close(M.camera_pose(camera), pose, atol=5e-5, rtol=0)
    torch.testing.assert_close(camera.position.norm(dim=-1), torch.tensor([2.7]))
    angles, translation = camera.pose()
    again = Camera.from_pose(angles, translation, radius=None)
    torch.testing.assert_close(again.cam_to_world, camera.cam_to_world, atol=1e-5, rtol=0)


@settings(max_examples=15, deadline=None)
@given(small, small, small, small, small, small)
def test_a_crop_of_the_world_is_read_exactly(yaw, pitch, right, down, size, turn):
    camera = Camera.orbit(yaw, .4 * pitch)
    move = A.similarity(.3 * torch.tensor([[right, down]]), torch.tensor([math.exp(.5 * size)]), torch.tensor([turn]))
    moved = A.move_camera(camera, move)
    points = torch.randn(1, 20, 3, generator=generator(0)) * .2
    there = apply(move, camera.project(points)[0])
    torch.testing.assert_close(moved.project(points)[0], there, atol=2e-5, rtol=0)  # the label follows the picture
    again = M.pose_camera(M.camera_pose(moved))
    torch.testing.assert_close(again.project(points)[0], there, atol=5e-5, rtol=0)  # and six numbers say it all
    upright, back = M.usual_crop(moved)
    torch.testing.assert_close(upright.label, camera.label, atol=1e-4, rtol=0)
    torch.testing.assert_close(back, move, atol=1e-4, rtol=0)


def test_gradients_reach_all_six_numbers():
    pose = torch.tensor([[.1, -.3, .2, .05, -.05, .1]], requires_grad=True)
    M.pose_camera(pose).project(torch.tensor([[[.1, .05, .2], [-.1, 0., .1]]]))[0].square().sum().backward()
    assert (pose.grad.abs() > 1e-4).all()


# augmentation

def test_the_picture_moves_with_the_labels(faces):
    at = (torch.arange(32) + .5) / 32
    nose = A.marks(faces)[:, 30]
    dots = torch.exp(-((at - nose[:, :1])**2)[:, None] / .004 - ((at - nose[:, 1:])**2)[:, :, None] / .004)
    config = replace(A.NONE, shift=.04, scale=.1, turn=.3, mirror=.5)
    changed = A.augment(faces._replace(image=dots[:, None].expand(-1, 3, -1, -1)), config, generator(3))
    w = changed.image[:, 0] / changed.image[:, 0].sum((1, 2), keepdim=True)
    found = torch.stack([(w.sum(1) * at).sum(1), (w.sum(2) * at).sum(1)], -1)
    off = (found - A.marks(changed)[:, 30]).norm(dim=-1)
    assert off.max() < .6 / 32 and (A.marks(changed)[:, 30] - nose).norm(dim=-1).max() > .03


def test_mirrored_labels_are_the_mirrored_surface(faces):
    model, flip = load_head().model, torch.tensor([-1., 1., 1.])
    some = torch.arange(0, len(model.mean), 40)
    distance, partner = torch.cdist(model.mean[some] * flip, model.mean).min(1)
    some, partner = some[distance < 1e-3], partner[distance < 1e-3]
    turned = A.mirror(faces)
    a, b = model(faces.alpha, faces.beta)[:, some] * flip, model(turned.alpha, turned.beta)[:, partner]
    assert (a - b).norm(dim=-1).max() < .004  # 2 mm
    uv = Camera.from_label(turned.camera).project(b)[0]
    expected = Camera.from_label(faces.camera).project(a * flip)[0] * torch.tensor([-1., 1.]) + torch.tensor([1., 0.])
    assert (uv - expected).norm(dim=-1).max() < .01
    assert turned.beta[:, UNIT["eyeBlinkLeft"]].equal(faces.beta[:, UNIT["eyeBlinkRight"]])


def test_people_stay_when_the_background_changes(faces):
    everyone = torch.ones(len(faces.image), dtype=torch.bool)
    new = A.on_background(faces, A.backgrounds(generator(1), faces.image), everyone)
    person = (faces.mask == 1).expand_as(faces.image)
    assert new.image[person].equal(faces.image[person])
    assert (new.image - faces.image)[(faces.mask == 0).expand_as(faces.image)].abs().mean() > .2


def test_augmentation_is_a_function_of_its_generator(faces):
    before = torch.get_rng_state()
    a, b = (A.augment(faces, A.Augmentation(), generator(5)) for _ in range(2))
    c = A.augment(faces, A.Augmentation(), generator(6))
    assert all(x.equal(y) for x, y in zip(a, b)) and not a.image.equal(c.image) and torch.get_rng_state().equal(before)
    assert a.image.isfinite().all() and a.image.abs().max() <= 1
    with pytest.raises(InputError, match="augmentation.shift"):
        A.Augmentation(shift=-1.)


# the network and its files

def test_beta_stays_in_its_range_and_pictures_do_not_mix():
    model = M.FaceRegressor(M.FACES["smoke"])
    with torch.no_grad():
        for head in model.heads.values():
            head.weight.normal_(0, 3., generator=generator(2))
    image = torch.rand(4, 3, 40, 40, generator=generator(1)) * 2 - 1
    said = model(image)
    assert said.beta.min() == 0 and said.beta.max() == 1 and model.raw(image)[1].max() > 1
    torch.testing.assert_close(model(image[1:2]).alpha, said.alpha[1:2], atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="square"):
        model(torch.zeros(1, 3, 32, 40))


def tiny_deep3d():
    torch.manual_seed(0)
    return M.Deep3DRegressor((1, 1, 1, 1), 4, 32).eval()


@pytest.mark.parametrize("flat", [False, True], ids=["as published", "flat names"])
def test_deep3d_checkpoint(tmp_path, flat):
    model, path = tiny_deep3d(), tmp_path / "epoch_20.pth"
    weights = model.state_dict()
    published = {"net_recon": weights, "opt_00": {"state": {}}}
    torch.save({f"net_recon.{k}": t for k, t in weights.items()} if flat else published, path)
    image = torch.rand(2, 3, 32, 32, generator=generator(4)) * 2 - 1
    found = M.load_face3d(path, "deep3d")
    found.size = 32
    torch.testing.assert_close(found(image).alpha, model(image).alpha)
    numbers = model.coefficients(image)
    camera = Camera.from_pose(numbers[:, 224:227], numbers[:, 254:])
    torch.testing.assert_close(found(image).camera.label, camera.label)
    assert not any(p.requires_grad for p in found.parameters())


def test_deep3d_refuses_other_files(tmp_path, monkeypatch):
    weights = tiny_deep3d().state_dict()
    name = "final_layers.0.weight"
    torch.save({"net_recon": {**weights, name: weights[name][:3]}}, tmp_path / "shape.pth")
    torch.save({"net_recon": {k: t for k, t in weights.items() if "layer2" not in k}}, tmp_path / "less.pth")
    torch.save({"other": weights}, tmp_path / "other.pth")
    torch.save({"net_recon": M.Deep3DRegressor}, tmp_path / "code.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:1000])
    for file, said in (("shape", name), ("less", "missing"), ("other", "net_recon"), ("code", "cannot be read"),
                       ("cut", "cannot be read")):
        with pytest.raises(InputError, match=said):
            M.load_deep3d(tmp_path / f"{file}.pth")
    monkeypatch.setenv("NOFA_WEIGHTS", str(tmp_path))
    with pytest.raises(MissingResource, match="epoch_20.pth.*sicxu/Deep3DFaceRecon_pytorch.*non-commercial"):
        M.load_face3d("paper", "deep3d")
    with pytest.raises(InputError, match="'world' or 'deep3d'"):
        M.load_face3d("small", "flame")


def test_own_weights_come_back(tmp_path, monkeypatch):
    model = M.FaceRegressor(M.FACES["smoke"], seed=3)
    with torch.no_grad():
        model.heads["alpha"].weight.normal_(0, .1, generator=generator(1))
    monkeypatch.setenv("NOFA_WEIGHTS", str(tmp_path))
    with pytest.raises(MissingResource):
        M.load_face3d("smoke")
    record = dict(kind="M", preset="smoke", licence="Apache-2.0", config=model.config)
    save_weights(tmp_path / "smoke" / "face3d", model.state_dict(), record)
    image = torch.rand(2, 3, 32, 32, generator=generator(4), requires_grad=True)
    found = M.load_face3d("smoke")
    assert found.config == model.config and not found.training
    torch.testing.assert_close(found(image).alpha, model(image).alpha, atol=5e-3, rtol=0)
    found(image).alpha.sum().backward()
    assert image.grad.abs().sum() > 0


# training and measures

def truth_of(faces):
    return T.Truth(faces.alpha, faces.beta, M.camera_pose(Camera.from_label(faces.camera)))


@pytest.mark.parametrize("part,terms", [
    ("alpha", {"alpha", "landmarks", "surface"}), ("beta", {"beta", "landmarks", "surface"}),
    ("pose", {"pose", "landmarks"})])
def test_each_error_costs_where_it_should(faces, part, terms):
    points, stage, truth = T.Points(load_head()), T.STAGES["small"], truth_of(faces)
    wrong = truth._replace(**{part: getattr(truth, part) + .1})
    right, costs = (T.face_losses(said, truth, points, stage) for said in (truth, wrong))
    assert {k for k in costs if costs[k] > right[k] + 1e-3} == terms


def test_landmark_error_is_in_eye_distances():
    head = load_head()
    camera = Camera.orbit(torch.tensor([0., 1.]), torch.zeros(2))
    truth = M.FaceParameters(torch.zeros(2, 100), torch.zeros(2, 52), camera)
    eyes = (head.model.mean[head.model.landmarks68[[36, 45]]]).diff(dim=0).norm()
    depth = truth.camera.project(head.model.mean[head.model.landmarks68[[36, 45]]].mean(0).expand(2, 1, 3))[1][:, 0]
    width = eyes * 4.2647 / depth
    shift = Camera(camera.cam_to_world, camera.intrinsics + F.pad(torch.tensor([[.01], [0.]]), (2, 0, 0, 1)))
    off = T.errors(truth._replace(camera=shift), truth, head)["landmarks"]
    torch.testing.assert_close(torch.tensor(off).float(), 100 * .01 / width, rtol=1e-3, atol=0)


def test_correlation_by_hand():
    a = torch.tensor([[0., 1.], [1., 1.], [2., 1.]])
    b = torch.tensor([[0., 0.], [2., 1.], [4., 2.]])
    assert T.correlation(a, b).tolist() == pytest.approx([1., 0.]) and T.correlation(-a, b)[0] == pytest.approx(-1.)


def test_smoke_training_learns(data, tmp_path):
    config = replace(T.STAGES["smoke"], steps=24, lr=4e-3, warm_up=4, augmentation=replace(A.NONE, shift=.02))
    stage = T.FaceTraining(config, M.FACES["smoke"], data, data)
    rhythm = stage.training(log_every=4, save_every=24, sample_every=24, evaluate_every=24)
    done = train(stage, rhythm, tmp_path, make_fabric(accelerator="cpu"), progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    terms = [f"face3d/{k}" for k in ("alpha", "beta", "pose", "landmarks", "surface")]
    total = [sum(line[k] for k in terms) for line in lines if "face3d/pose" in line]
    assert done.finished and total[-1] < .9 * total[0] and (tmp_path / "samples" / "00000024.png").exists()
    batch = stage.data(range(6, 14), 3)
    assert all(x.equal(y) for x, y in zip(batch, stage.data(range(6, 14), 3)))  # so a run can go on
    assert not batch.image.equal(stage.data(range(6, 14), 4).image)
    evaluation = next(line["evaluation"] for line in lines if "evaluation" in line)
    assert {"degrees", "jaw", "blink", "landmarks", "alpha", "moved_degrees"} <= set(evaluation)
