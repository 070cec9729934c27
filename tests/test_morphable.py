"""Eq. 4, its inverse, normals, and the loader of the Basel Face Model's file."""

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.geometry.morphable import MorphableModel, load_bfm09, split_coefficients, vertex_normals


def arrays(v=90, k=6, e=4, seed=0):
    rng = np.random.default_rng(seed)
    return dict(mean=rng.normal(size=(v, 3)), id_basis=rng.normal(size=(k, v, 3)), exp_basis=rng.normal(size=(e, v, 3)),
                faces=rng.integers(0, v, (40, 3)), landmarks68=rng.permutation(v)[:68], landmarks5=np.arange(5),
                exp_names=[f"unit{i}" for i in range(e)])


def sphere(rings=16, spokes=24):
    "Vertices and faces of a unit sphere, counter-clockwise from outside."
    theta = np.linspace(0.1, np.pi - 0.1, rings)
    phi = np.arange(spokes) * 2 * np.pi / spokes
    theta, phi = np.meshgrid(theta, phi, indexing="ij")
    points = np.stack([np.sin(theta) * np.sin(phi), np.cos(theta), np.sin(theta) * np.cos(phi)], -1).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(rings - 1), np.arange(spokes), indexing="ij")
    a, b = (i * spokes + j).ravel(), (i * spokes + (j + 1) % spokes).ravel()
    faces = np.concatenate([np.stack([a, a + spokes, b], -1), np.stack([b, a + spokes, b + spokes], -1)])
    return torch.from_numpy(points).float(), torch.from_numpy(faces)


# ---- Eq. 4

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_equation_4(seed, batch):
    raw = arrays(seed=seed)
    model = MorphableModel.from_arrays(raw)
    rng = np.random.default_rng(seed)
    alpha, beta = rng.normal(size=(batch, 6)), rng.normal(size=(batch, 4))
    identity = np.einsum("bk,kvc->bvc", alpha, raw["id_basis"])
    expected = raw["mean"] + identity + np.einsum("be,evc->bvc", beta, raw["exp_basis"])
    got = model(torch.from_numpy(alpha).float(), torch.from_numpy(beta).float())
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(model(torch.zeros(1, 6), torch.zeros(1, 4))[0], model.mean)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_fit_is_the_inverse(seed):
    model = MorphableModel.from_arrays(arrays(seed=seed))
    g = torch.Generator().manual_seed(seed)
    alpha, beta = torch.randn(3, 6, generator=g), torch.randn(3, 4, generator=g)
    torch.testing.assert_close(model.fit(model(alpha, beta), beta), alpha, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.fit(model(alpha, 0 * beta)), alpha, atol=1e-4, rtol=0)
    assert model.fit(model(alpha, beta), beta, ridge=10.0).norm() < 0.5 * alpha.norm()


def test_fit_of_a_rank_deficient_basis_is_finite():
    raw = arrays()
    raw["id_basis"][1] = raw["id_basis"][0]
    model = MorphableModel.from_arrays(raw)
    alpha = torch.tensor([[1.0, 0, 0, 0, 0, 0]])
    found = model.fit(model(alpha, torch.zeros(1, 4)))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5, 0, 0, 0, 0]]), atol=1e-3, rtol=0)  # the shortest


def test_model_is_frozen_moves_and_survives_saving():
    model = MorphableModel.from_arrays(arrays())
    assert not list(model.parameters()) and model.faces.dtype == torch.int64 and model.mean.dtype == torch.float32
    assert {"mean", "id_basis", "exp_basis", "faces", "landmarks68", "landmarks5"} == set(model.state_dict())
    other = MorphableModel.from_arrays(arrays(seed=1))
    other.load_state_dict(model.state_dict())
    alpha, beta = torch.ones(1, 6), torch.ones(1, 4)
    assert torch.equal(other(alpha, beta), model(alpha, beta))
    assert model.double()(alpha.double(), beta.double()).dtype == torch.float64


def test_landmarks():
    model = MorphableModel.from_arrays(arrays())
    vertices = model(torch.ones(2, 6), torch.ones(2, 4))
    assert torch.equal(model.landmarks(vertices)[:, 7], vertices[:, model.landmarks68[7]])
    assert torch.equal(model.landmarks(vertices, "5"), vertices[:, :5])


# ---- normals

def test_normals_of_a_sphere_point_outwards():
    points, faces = sphere()
    both = torch.stack([points, 3 * points + 5])
    normals = vertex_normals(both, faces)
    interior = slice(24, -24)  # the outermost rings have faces on one side only
    assert ((normals[0] * points).sum(-1)[interior] > 0.995).all()
    torch.testing.assert_close(normals[0], normals[1], atol=1e-4, rtol=0)


def test_normals_follow_their_definition():
    g = torch.Generator().manual_seed(0)
    vertices, faces = torch.randn(2, 12, 3, generator=g), torch.randint(0, 11, (20, 3), generator=g)
    expected = torch.zeros_like(vertices)
    for b in range(2):
        for i, j, k in faces.tolist():
            normal = torch.linalg.cross(vertices[b, j] - vertices[b, i], vertices[b, k] - vertices[b, i])
            for corner in (i, j, k):
                expected[b, corner] += normal
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(vertex_normals(vertices, faces), expected, atol=1e-5, rtol=0)
    assert (vertex_normals(vertices, faces)[:, 11] == 0).all()  # a vertex of no triangle


def test_normals_have_gradients():
    points, faces = sphere(5, 6)
    points = points[None].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: vertex_normals(p, faces), (points,))


# ---- faults of the model

@pytest.mark.parametrize("change, word", [
    (dict(mean=np.zeros((90, 2))), "mean"),
    (dict(mean=np.full((90, 3), np.nan)), "finite"),
    (dict(id_basis=np.zeros((6, 89, 3))), "id_basis"),
    (dict(exp_basis=np.zeros((4, 90))), "exp_basis"),
    (dict(faces=np.array([[0, 1, 90]])), "faces"),
    (dict(faces=np.array([[0, -1, 3]])), "faces"),
    (dict(landmarks68=np.arange(67)), "landmarks68"),
    (dict(landmarks5=np.array([0, 1, 2, 3, 400])), "landmarks5"),
    (dict(exp_names=["one"]), "exp_names"),
    (dict(mean=np.array(["a", "b"])), "numbers"),
    (dict(mean=np.array([{}], dtype=object)), "numbers"),
])
def test_bad_arrays_are_named(change, word):
    with pytest.raises(InputError, match=word):
        MorphableModel.from_arrays({**arrays(), **change})


@pytest.mark.parametrize("call, word", [
    (lambda m: m(torch.zeros(1, 5), torch.zeros(1, 4)), "alpha"),
    (lambda m: m(torch.zeros(6), torch.zeros(4)), "alpha"),
    (lambda m: m(torch.zeros(1, 6), torch.zeros(2, 4)), "beta"),
    (lambda m: m.landmarks(torch.zeros(1, 90, 3), "106"), "which"),
    (lambda m: m.landmarks(torch.zeros(1, 91, 3)), "vertices"),
    (lambda m: m.fit(torch.zeros(1, 91, 3)), "vertices"),
    (lambda m: m.fit(torch.zeros(1, 90, 3), ridge=-1), "ridge"),
    (lambda m: vertex_normals(torch.zeros(90, 3), m.faces), "vertices"),
])
def test_bad_calls_are_named(call, word):
    with pytest.raises(InputError, match=word):
        call(MorphableModel.from_arrays(arrays()))


def test_missing_arrays_are_named():
    raw = arrays()
    del raw["faces"]
    with pytest.raises(InputError, match="faces"):
        MorphableModel.from_arrays(raw)


# ---- Basel Face Model

def bfm(n=100, f=60, seed=0):
    "Entries of a made-up BFM_model_front.mat."
    rng = np.random.default_rng(seed)
    return dict(
        meanshape=rng.normal(3, 1, (1, 3 * n)), meantex=rng.uniform(0, 255, (1, 3 * n)),
        tri=rng.integers(1, n + 1, (f, 3)), point_buf=rng.integers(1, f + 2, (n, 8)),
        keypoints=rng.permutation(n)[None, :68] + 1, idBase=rng.normal(size=(3 * n, 80)),
        exBase=rng.normal(size=(3 * n, 64)), texBase=rng.normal(size=(3 * n, 80)))


def saved(folder, entries):
    path = folder / "BFM_model_front.mat"
    scipy.io.savemat(path, entries)
    return path


def test_bfm_reads_as_deep3dfacerecon_does(tmp_path):
    raw = bfm()
    model = load_bfm09(saved(tmp_path, raw))
    assert (model.n_id, model.n_exp) == (80, 64)
    rng = np.random.default_rng(1)
    alpha, beta, tau = rng.normal(size=(2, 80)), rng.normal(size=(2, 64)), rng.normal(size=(2, 80))
    # its own order of things: long vectors, then (n, 3), then the mean's centroid taken off
    flat = raw["meanshape"] + alpha @ raw["idBase"].T + beta @ raw["exBase"].T
    expected = flat.reshape(2, -1, 3) - raw["meanshape"].reshape(-1, 3).mean(0)
    got = model(torch.from_numpy(alpha).float(), torch.from_numpy(beta).float())
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), atol=1e-4, rtol=1e-5)
    colours = (raw["meantex"] + tau @ raw["texBase"].T).reshape(2, -1, 3)
    textured = model.texture(torch.from_numpy(tau).float())
    torch.testing.assert_close(textured, torch.from_numpy(colours).float(), atol=1e-3, rtol=1e-5)
    assert torch.equal(model.faces, torch.from_numpy(raw["tri"] - 1))
    assert torch.equal(model.landmarks(got), got[:, raw["keypoints"][0] - 1])
    five = model.landmarks(got, "5")
    points = got[:, raw["keypoints"][0] - 1]
    torch.testing.assert_close(five[:, 1], (points[:, 42] + points[:, 45]) / 2)
    torch.testing.assert_close(five[:, 4], points[:, 54])
    assert torch.equal(load_bfm09(tmp_path).mean, model.mean)  # the folder will do


def test_bfm_with_matlabs_own_number_types(tmp_path):
    raw = bfm()
    types = dict(tri=float, keypoints=np.uint16, idBase=np.float32)
    raw.update({name: raw[name].astype(kind) for name, kind in types.items()})
    assert load_bfm09(saved(tmp_path, raw)).faces.dtype == torch.int64


def test_missing_bfm_says_what_to_fetch(tmp_path):
    for path in (tmp_path / "nothing.mat", tmp_path):
        with pytest.raises(MissingResource, match="Basel") as caught:
            load_bfm09(path)
        message = str(caught.value)
        assert "faces.dmi.unibas.ch" in message and "non-commercial" in message and str(path) in message


@pytest.mark.parametrize("spoil, word", [
    (lambda e: e.pop("exBase"), "exBase"),
    (lambda e: e.pop("keypoints"), "keypoints"),
    (lambda e: e.update(idBase=e["idBase"][:, :79]), "idBase"),
    (lambda e: e.update(texBase=e["texBase"][:-1]), "texBase"),
    (lambda e: e.update(meanshape=e["meanshape"][:, :-3]), "meanshape"),
    (lambda e: e.update(tri=e["tri"] - 1), "tri"),
    (lambda e: e.update(tri=e["tri"][:, :2]), "tri"),
    (lambda e: e.update(keypoints=e["keypoints"] + 100), "keypoints"),
    (lambda e: e.update(point_buf=e["point_buf"][:, :7]), "point_buf"),
    (lambda e: e.update(meanshape=e["meanshape"] * np.nan), "meanshape"),
    (lambda e: e.update(meanshape="hello"), "meanshape"),
    (lambda e: e.update(tri=e["tri"] + 0.5), "tri"),
    (lambda e: e.update(exBase=np.array([[1, "x"]], dtype=object)), "exBase"),
    (lambda e: e.update(point_buf=np.zeros((0, 8))), "point_buf|meanshape"),
])
def test_broken_bfm_is_refused_by_name(tmp_path, spoil, word):
    entries = bfm()
    spoil(entries)
    with pytest.raises(InputError, match=word):
        load_bfm09(saved(tmp_path, entries))


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1, -1000])
def test_truncated_bfm_is_refused(tmp_path, keep):
    path = saved(tmp_path, bfm())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError):
        load_bfm09(path)


@settings(max_examples=15, deadline=None)
@given(st.binary(max_size=400))
def test_noise_is_no_bfm(tmp_path_factory, noise):
    path = tmp_path_factory.mktemp("noise") / "x.mat"
    path.write_bytes(noise)
    with pytest.raises(InputError):
        load_bfm09(path)


def test_coefficients():
    parts = split_coefficients(torch.arange(257.0).expand(2, 3, 257))
    assert list(parts) == ["identity", "expression", "texture", "angles", "lighting", "translation"]
    first = {k: int(v[0, 0, 0]) for k, v in parts.items()}
    assert first == dict(identity=0, expression=80, texture=144, angles=224, lighting=227, translation=254)
    assert torch.equal(torch.cat(list(parts.values()), -1)[0, 0], torch.arange(257.0))
    with pytest.raises(InputError, match="coefficients"):
        split_coefficients(torch.zeros(2, 256))
