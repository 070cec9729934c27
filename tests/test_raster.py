"The rasteriser against a float64 oracle, its back-ends against each other, and its errors."
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nofa_nb.world.raster as raster
from nofa_nb.core.errors import InputError
from nofa_nb.world.raster import camera_to_raster, interpolate, rasterize, visible_faces

WARP = pytest.param("warp", marks=pytest.mark.skipif(raster.load_warp() is None, reason="warp-lang is not installed"))
both = pytest.mark.parametrize("backend", ["torch", WARP])
NEAR, MARGIN = 1e-3, 1e-4


def oracle(vertices, faces, height, width):
    """All triangles at all pixels in float64: face, depth, barycentrics, and where the answer is beyond doubt.

    In doubt: pixels within MARGIN pixels of an edge, and those where two depths differ by less than a part of MARGIN.
    """
    x, y = np.meshgrid(np.arange(width) + .5, np.arange(height) + .5)
    face, best = np.full((height, width), -1), np.full((height, width), np.inf)
    second, bary, sure = best.copy(), np.zeros((height, width, 3)), np.ones((height, width), bool)
    for number, corners in enumerate(vertices[faces].astype(np.float64)):
        if not np.isfinite(corners).all() or corners[:, 2].min() <= np.float32(NEAR):
            continue
        (ax, ay, za), (bx, by, zb), (cx, cy, zc) = corners
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if area == 0:
            continue
        distance, weight = [], []
        for px, py, qx, qy in ((bx, by, cx, cy), (cx, cy, ax, ay), (ax, ay, bx, by)):
            e = ((qx - px) * (y - py) - (qy - py) * (x - px)) * np.sign(area)
            distance.append(e / np.hypot(qx - px, qy - py))
            weight.append(e / abs(area))
        inside = np.min(distance, 0) >= 0
        sure &= abs(np.min(distance, 0)) > MARGIN
        inverse = weight[0] / za + weight[1] / zb + weight[2] / zc
        depth = np.where(inside, 1 / np.where(inside, inverse, 1), np.inf)
        closer = depth < best
        second = np.where(closer, best, np.minimum(second, depth))
        face, best = np.where(closer, number, face), np.where(closer, depth, best)
        correct = np.stack(weight, -1) / np.array([za, zb, zc]) * np.where(inside, depth, 0)[..., None]
        bary = np.where(closer[..., None], correct, bary)
    with np.errstate(invalid="ignore"):
        sure &= ~(second - best < MARGIN * best)
    return face, best, bary, sure


def mesh(seed, triangles, size, spoil):
    "Random triangles from smaller than a pixel to larger than the raster, some of them spoilt."
    rng = np.random.default_rng(seed)
    middle, reach = rng.uniform(-2, size + 2, (triangles, 1, 2)), size * 10 ** rng.uniform(-2, .5, (triangles, 1, 1))
    corners = np.concatenate([middle + reach * rng.normal(size=(triangles, 3, 2)),
                              rng.uniform(1, 5, (triangles, 3, 1))], -1).astype(np.float32)
    if spoil:
        for row, bad in zip(corners, rng.integers(0, 8, triangles)):
            if bad == 0:
                row[rng.integers(3), rng.integers(3)] = rng.choice([np.nan, np.inf, -np.inf])
            elif bad == 1:
                row[rng.integers(3), 2] = rng.choice([NEAR, 0, -1])
            elif bad == 2:
                row[1] = row[0]
            elif bad == 3:
                row[:, 0] = 3.5 # a vertical line through pixel centres
    return corners.reshape(-1, 3), np.arange(3 * triangles).reshape(-1, 3)


def sphere(segments, size):
    "A displaced sphere in perspective, with a fan of thin slivers in front of it."
    u, v = torch.linspace(0, torch.pi, segments + 1)[:, None], torch.linspace(0, 2 * torch.pi, segments + 1)
    r = 1 + .06 * torch.sin(7 * u) * torch.cos(9 * v)
    x, y, z = r * u.sin() * v.cos(), r * u.cos().expand_as(r), 4 + r * u.sin() * v.sin()
    uv = torch.stack([.5 + 1.6 * x / z, .5 + 1.6 * y / z], -1).reshape(1, -1, 2)
    points = camera_to_raster(uv, z.reshape(1, -1), size, size)
    i = torch.arange((segments + 1) ** 2).view(segments + 1, segments + 1)
    a, b, c, d = i[:-1, :-1].flatten(), i[1:, :-1].flatten(), i[1:, 1:].flatten(), i[:-1, 1:].flatten()
    angle = torch.linspace(0, 3, 60)
    rim = torch.stack([size * (.5 + .6 * angle.cos()), size * (.1 + .9 * angle.sin()), 2 + angle], -1)[None]
    sliver = torch.stack([rim, rim + torch.tensor([.05, 0, 0]), torch.tensor([size / 3, 1., 2.]).expand_as(rim)], 2)
    first = points.shape[1] + 3 * torch.arange(60)[:, None]
    faces = torch.cat([torch.stack([a, b, c], 1), torch.stack([a, c, d], 1), first + torch.arange(3)])
    return torch.cat([points, sliver.flatten(1, 2)], 1), faces


@both
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), triangles=st.integers(1, 30),
       height=st.integers(1, 24), width=st.integers(1, 24), spoil=st.booleans())
def test_oracle(backend, seed, triangles, height, width, spoil):
    vertices, faces = mesh(seed, triangles, max(height, width), spoil)
    got = rasterize(torch.from_numpy(vertices)[None], torch.from_numpy(faces), height, width, backend, NEAR)
    face, depth, bary, sure = oracle(vertices, faces, height, width)
    assert (got.face[0].numpy() == face)[sure].all()
    same = sure & (face >= 0)
    np.testing.assert_allclose(got.depth[0].numpy()[sure], depth[sure], rtol=1e-3)
    thick = same & (np.abs(got.bary[0].numpy() - bary).max(-1) < 1e-2) # a sliver's weights are ill-conditioned
    assert thick.sum() >= .98 * same.sum() - 1
    np.testing.assert_allclose(got.bary[0].sum(-1).numpy()[same], 1, atol=1e-5)


def test_oracle_leaves_little_in_doubt():
    "The comparison above looks at nearly all pixels, of which many are covered."
    results = [oracle(*mesh(seed, 20, 20, True), 20, 20) for seed in range(10)]
    assert np.mean([sure for *_, sure in results]) > .99
    assert .3 < np.mean([face >= 0 for face, *_ in results]) < .99


@pytest.mark.skipif(raster.load_warp() is None, reason="warp-lang is not installed")
def test_backends_agree_on_a_dense_mesh():
    vertices, faces = sphere(100, 128)
    a, b = rasterize(vertices, faces, 128, 128, "torch"), rasterize(vertices, faces, 128, 128, "warp")
    same = a.face == b.face
    assert (~same).float().mean() <= 1e-3
    assert (a.depth == b.depth)[same].all() and (a.bary == b.bary)[same].all()
    assert .4 < (a.face >= 0).float().mean() < .9 and (a.face >= len(faces) - 60).sum() > 50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu():
    vertices, faces = sphere(100, 128)
    batch = torch.cat([vertices, vertices + 1.3])
    a, b = rasterize(batch, faces, 128, 128, "torch"), rasterize(batch.cuda(), faces.cuda(), 128, 128)
    assert (a.face != b.face.cpu()).float().mean() <= 1e-3
    values = interpolate(vertices[0].cuda(), faces.cuda(), b)
    torch.testing.assert_close(values[..., 2][b.face >= 0], b.depth[b.face >= 0], rtol=1e-4, atol=1e-4)


@both
@pytest.mark.parametrize("step", [.37, 1., 3., 50.])
@pytest.mark.parametrize("jitter", [0., .3])
def test_plane_has_no_holes(backend, step, jitter):
    "Also where corners and edges lie exactly on pixel centres (whole steps, no jitter)."
    size, n = 33, int(33 / step) + 4
    generator = torch.Generator().manual_seed(0)
    grid = torch.stack(torch.meshgrid(torch.arange(n), torch.arange(n), indexing="xy"), -1).float()
    points = (grid + jitter * torch.rand(n, n, 2, generator=generator) - 1) * step - .5
    points = torch.cat([points, 2 + torch.rand(n, n, 1, generator=generator)], -1)
    i = torch.arange(n * n).view(n, n)
    a, b, c, d = i[:-1, :-1].flatten(), i[1:, :-1].flatten(), i[1:, 1:].flatten(), i[:-1, 1:].flatten()
    faces = torch.cat([torch.stack([a, b, c], 1), torch.stack([c, a, d], 1)])
    for turned in (faces, faces.flip(1), torch.cat([faces[::2], faces[1::2].flip(1)])):
        assert (visible_faces(points.view(1, -1, 3), turned, size, size, backend) >= 0).all()


@both
def test_attributes_are_correct_in_perspective(backend):
    "On the plane z = 3 + x / 2, seen with focal length 20, position is known at every pixel."
    space = torch.tensor([[-2., -2.], [2., -2.], [2., 2.], [-2., 2.]])
    z = 3 + space[:, :1] / 2
    vertices, faces = torch.cat([16 + 20 * space / z, z], -1)[None], torch.tensor([[0, 1, 2], [0, 2, 3]])
    got = rasterize(vertices, faces, 32, 32, backend)
    value = interpolate(torch.cat([space, z], -1), faces, got, backend)[0]
    u = (torch.arange(32) + .5 - 16) / 20
    true_z = (3 / (1 - u / 2)).expand(32, 32)
    true = torch.stack([u * true_z, u[:, None] * true_z, true_z], -1)
    seen = got.face[0] >= 0
    assert .3 < seen.float().mean() < .9
    torch.testing.assert_close(value[seen], true[seen], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.depth[0][seen], true_z[seen], rtol=1e-5, atol=1e-5)


@both
def test_images_do_not_depend_on_each_other(backend):
    vertices, faces = sphere(30, 48)
    batch = vertices + torch.tensor([[0., 0, 0], [3.3, 1.7, .2], [-9, 4, 1]])[:, None]
    attributes = torch.randn(3, vertices.shape[1], 5, generator=torch.Generator().manual_seed(0))
    whole = rasterize(batch, faces, 40, 48, backend)
    values = interpolate(attributes, faces, whole, backend)
    for i in range(3):
        one = rasterize(batch[i:i + 1], faces, 40, 48, backend)
        assert all(torch.equal(getattr(whole, name)[i:i + 1], getattr(one, name)) for name in ("face", "bary", "depth"))
        assert torch.equal(values[i:i + 1], interpolate(attributes[i:i + 1], faces, one, backend))
    assert torch.equal(visible_faces(batch, faces, 40, 48, backend), whole.face)


@both
def test_threads_do_not_change_the_result(backend):
    vertices, faces = sphere(30, 48)
    batch, before, results = vertices + torch.arange(5.)[:, None, None], torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            fragments = rasterize(batch, faces, 48, 48, backend)
            values = interpolate(vertices[0], faces, fragments, backend)
            results.append((fragments.face, fragments.bary, fragments.depth, values))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@both
def test_order_of_triangles_does_not_matter(backend):
    "Except among equals, where the first wins."
    vertices, faces = sphere(20, 48)
    order = torch.randperm(len(faces), generator=torch.Generator().manual_seed(0))
    a, b = visible_faces(vertices, faces, 48, 48, backend), visible_faces(vertices, faces[order], 48, 48, backend)
    back = torch.where(b >= 0, order[b.clamp_min(0).long()].int(), -1)
    assert (a != back).float().mean() < .01 # pixels on shared edges
    twice = visible_faces(vertices, torch.cat([faces, faces]), 48, 48, backend)
    assert torch.equal(a, twice)


@both
def test_coordinates_far_outside(backend):
    face, big = torch.tensor([[0, 1, 2]]), torch.tensor([[[-1e6, -1e6, 2.], [2e6, -1e6, 2.], [-1e6, 2e6, 2.]]])
    assert (visible_faces(big, face, 9, 7, backend) == 0).all()
    assert (visible_faces(big * torch.tensor([100., 100, 1]), face, 9, 7, backend) == -1).all() # beyond LIMIT
    assert (visible_faces(big + torch.tensor([1e7, 0, 0]) / 2, face, 9, 7, backend) == -1).all()
    assert (visible_faces(big, face, 9, 7, backend, near=2.) == -1).all()


@both
def test_any_layout_and_type(backend):
    vertices, faces = sphere(12, 32)
    want = rasterize(vertices, faces, 32, 32, backend)
    strided = vertices.transpose(1, 2).contiguous().transpose(1, 2)
    for v, f in ((vertices.double(), faces.int()), (strided, faces.short()),
                 (vertices.clone().requires_grad_(), faces.T.contiguous().T)):
        got = rasterize(v, f, 32, 32, backend)
        assert torch.equal(got.face, want.face) and torch.equal(got.bary, want.bary) and not got.bary.requires_grad


@both
def test_nothing_to_draw(backend):
    vertices, faces = torch.zeros(2, 4, 3), torch.zeros(0, 3, dtype=torch.int64)
    got = rasterize(vertices, faces, 3, 5, backend)
    assert got.face.shape == (2, 3, 5) and (got.face == -1).all()
    assert torch.isinf(got.depth).all() and (got.bary == 0).all()
    assert torch.equal(interpolate(torch.ones(4, 6), faces, got, backend), torch.zeros(2, 3, 5, 6))
    assert rasterize(vertices[:0], torch.tensor([[0, 1, 2]]), 3, 5, backend).bary.shape == (0, 3, 5, 3)


@pytest.mark.parametrize("channels", [1, 3, 40])
@pytest.mark.parametrize("shared", [True, False])
def test_interpolate(channels, shared):
    "Against a loop over corners, for both back-ends; empty pixels are 0 even beside values that are not finite."
    vertices, faces = sphere(16, 24)
    fragments = rasterize(torch.cat([vertices, vertices + 3]), faces, 24, 24)
    generator = torch.Generator().manual_seed(0)
    attributes = torch.randn(*(() if shared else (2,)), vertices.shape[1], channels, generator=generator)
    attributes[..., -1, :] = torch.nan # a corner of the last sliver
    per_image = attributes.expand(2, -1, -1)
    want = torch.zeros(2, 24, 24, channels)
    for n, row, column in (fragments.face >= 0).nonzero().tolist():
        corners = faces[fragments.face[n, row, column]]
        want[n, row, column] = fragments.bary[n, row, column] @ per_image[n, corners]
    for backend in ("torch", "auto"):
        torch.testing.assert_close(interpolate(attributes, faces, fragments, backend), want, equal_nan=True)


def test_interpolate_is_differentiable():
    vertices, faces = sphere(8, 12)
    fragments = rasterize(vertices, faces, 12, 12)
    attributes = torch.randn(vertices.shape[1], 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    interpolate(attributes, faces, fragments)[..., 0].sum().backward()
    torch.testing.assert_close(attributes.grad[:, 0].sum(), (fragments.face >= 0).sum().float())
    assert (attributes.grad[:, 1] == 0).all()


def test_memory_is_bounded(monkeypatch):
    cells, original = [], raster.window_keys
    def spy(*args):
        out = original(*args)
        cells.append(out[2].numel())
        return out
    monkeypatch.setattr(raster, "window_keys", spy)
    vertices, faces = mesh(0, 400, 40, False)
    visible_faces(torch.from_numpy(vertices * np.float32([3, 3, 1]))[None], torch.from_numpy(faces), 64, 64, "torch")
    assert max(cells) <= 1 << 17 and sum(cells) > 2 << 17


GOOD = torch.zeros(1, 4, 3), torch.tensor([[0, 1, 2]])


@both
@pytest.mark.parametrize("faces", [[[0, 1, 4]], [[-1, 0, 1]]])
def test_faces_out_of_range(backend, faces):
    with pytest.raises(InputError, match=r"faces must be indices from 0 to 3 \(.* 4 vertices\), got (0 to 4|-1 to 1)"):
        rasterize(GOOD[0], torch.tensor(faces), 4, 4, backend)


@pytest.mark.parametrize("arguments, sentence", [
    ((GOOD[0][0], GOOD[1], 4, 4), r"vertices must be \(b, v, 3\), got \(4, 3\)"),
    ((GOOD[0][..., :2], GOOD[1], 4, 4), r"vertices must be \(b, v, 3\), got \(1, 4, 2\)"),
    ((GOOD[0].int(), GOOD[1], 4, 4), "vertices must be a floating-point tensor, got torch.int32"),
    ((GOOD[0].numpy(), GOOD[1], 4, 4), "vertices must be a floating-point tensor, got float32"),
    ((GOOD[0], GOOD[1].T, 4, 4), r"faces must be \(f, 3\), got \(3, 1\)"),
    ((GOOD[0], GOOD[1].float(), 4, 4), "faces must be an integer tensor, got torch.float32"),
    ((GOOD[0], GOOD[1], 0, 4), "height must be a positive whole number of pixels, got 0"),
    ((GOOD[0], GOOD[1], 4, 4.5), "width must be a positive whole number of pixels, got 4.5"),
    ((GOOD[0], GOOD[1], 4, 4, "opengl"), "backend must be .*, got 'opengl'"),
    ((GOOD[0], GOOD[1], 4, 4, "torch", -1.), "near must be a depth from 0 to 1e[+]07, got -1.0"),
])
def test_bad_input(arguments, sentence):
    for door in (rasterize, visible_faces):
        with pytest.raises(InputError, match=sentence):
            door(*arguments)


@both
def test_interpolate_bad_input(backend):
    vertices, faces = sphere(8, 12)
    fragments = rasterize(torch.cat([vertices, vertices]), faces, 12, 12)
    for attributes, wrong, sentence in (
            (torch.zeros(5), faces, r"attributes must be \(b, v, c\)"),
            (torch.zeros(3, vertices.shape[1], 2), faces, "attributes must be for 1 or 2 images, got 3"),
            (torch.zeros(7, 2), faces, r"faces must be indices from 0 to 6 \(there are 7 vertices\)"),
            (torch.zeros(vertices.shape[1], 2), faces[:5], "faces must be the ones given to rasterize, got only 5")):
        with pytest.raises(InputError, match=sentence):
            interpolate(attributes, wrong, fragments, backend)


def test_without_warp(monkeypatch):
    "Everything works through PyTorch, after one warning."
    monkeypatch.setitem(sys.modules, "warp", None)
    monkeypatch.setattr(raster, "load_warp", raster.load_warp.__wrapped__)
    raster._warn_without_warp.cache_clear()
    vertices, faces = sphere(8, 12)
    with pytest.warns(UserWarning, match="pip install warp-lang") as record:
        fragments = rasterize(vertices, faces, 12, 12)
        interpolate(vertices[0], faces, fragments)
    assert len(record) == 1 and torch.equal(fragments.face, visible_faces(vertices, faces, 12, 12, "torch"))
    with pytest.raises(InputError, match="pip install warp-lang"):
        rasterize(vertices, faces, 12, 12, "warp")


def test_import_is_light_and_first_use_is_silent():
    code = ("import sys, torch, nofa_nb.world.raster as r\n"
            "assert 'warp' not in sys.modules\n"
            "r.rasterize(torch.rand(1, 3, 3), torch.tensor([[0, 1, 2]]), 4, 4)\n"
            "assert r.load_warp() is None or 'warp' in sys.modules")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
