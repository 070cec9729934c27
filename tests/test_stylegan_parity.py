"""StyleGAN2's layers, super-resolution and discriminator against numbers of the official EG3D code (see fixtures)."""
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nofa_nb.core.errors import InputError
from nofa_nb.core.repro import generator
from nofa_nb.layers.stylegan import (
    FullyConnected,
    MappingNetwork,
    SynthesisLayer,
    SynthesisNetwork,
    initial_weights,
    modulated_conv2d,
)
from nofa_nb.models.discriminator import Discriminator, minibatch_spread
from nofa_nb.models.superresolution import SuperResolutionNetwork
from nofa_nb.ops.bias_act import bias_act, bias_act_ref
from nofa_nb.ops.upfirdn2d import (
    conv2d_resample,
    downsample2d,
    filter2d,
    resize,
    setup_filter,
    upfirdn2d,
    upfirdn2d_ref,
    upsample2d,
)

FIXTURES = Path(__file__).parent / "fixtures"
WAYS = ["weights", "activations"]


def arrays(name):
    with np.load(FIXTURES / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.fixture(scope="module")
def tiny():
    return arrays("eg3d_tiny_parity.npz")


@pytest.fixture(scope="module")
def disc():
    return arrays("eg3d_disc_parity.npz")


def state(numbers, part=""):
    start = "state/" + part
    return {key.removeprefix(start): value for key, value in numbers.items() if key.startswith(start)}


def close(got, want, limit):
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=limit)


# --- ops --------------------------------------------------------------------------------------------------------------
def test_resampling(tiny):
    x, kernel = tiny["ops/x"], setup_filter([1, 3, 3, 1])
    close(kernel, tiny["ops/filter"], 0)
    close(upsample2d(x, kernel), tiny["ops/upsample2d"], 1e-6)
    close(downsample2d(x, kernel), tiny["ops/downsample2d"], 1e-6)
    close(filter2d(x, kernel), tiny["ops/filter2d"], 1e-6)
    close(conv2d_resample(x, tiny["ops/w"], kernel, down=2), tiny["ops/conv_down2"], 5e-6)


def test_bias_act(tiny):
    close(bias_act(tiny["ops/x"], torch.tensor([.1, -.2, .3]), "lrelu", clamp=.9), tiny["ops/bias_act_lrelu"], 1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_modulated_convolution(tiny, way):
    x, w, styles, kernel = (tiny["ops/" + k] for k in ("x", "w", "styles", "filter"))
    close(modulated_conv2d(x, w, styles, modulation=way), tiny["ops/modconv_up1"], 5e-6)
    close(modulated_conv2d(x, w, styles, kernel, up=2, modulation=way), tiny["ops/modconv_up2"], 5e-6)


def four_steps(x, kernel, up, down, padding, gain):
    "Insert zeros, pad, filter, drop samples; nothing clever."
    b, c, h, w = x.shape
    wide = x.new_zeros(b, c, h, up, w, up)
    wide[:, :, :, 0, :, 0] = x
    wide = F.pad(wide.reshape(b, c, h * up, w * up), padding)
    windows = wide.unfold(2, len(kernel), 1).unfold(3, len(kernel), 1)
    return gain * (windows * kernel.flip(0, 1)).sum((-1, -2))[:, :, ::down, ::down]


@settings(max_examples=30, deadline=None)
@given(up=st.integers(1, 3), down=st.integers(1, 3), taps=st.lists(st.integers(1, 5), min_size=1, max_size=5),
       padding=st.tuples(*[st.integers(-1, 5)] * 4), size=st.tuples(st.integers(6, 9), st.integers(6, 9)))
def test_upfirdn_is_its_four_steps(up, down, taps, padding, size):
    (high, wide), (left, right, top, bottom) = size, padding
    assume(min(wide * up + left + right, high * up + top + bottom) >= len(taps))  # the filter fits into the picture
    x = torch.randn(2, 3, *size, generator=generator(0), dtype=torch.float64)
    kernel = setup_filter(taps).double()
    torch.testing.assert_close(upfirdn2d(x, kernel, up, down, padding, 1.5),
                               four_steps(x, kernel, up, down, padding, 1.5))
    assert torch.equal(upfirdn2d(x, kernel, up, down, padding), upfirdn2d_ref(x, kernel, up, down, padding))


@pytest.mark.parametrize("call", [
    lambda x: upsample2d(x, setup_filter().double()), lambda x: downsample2d(x, setup_filter([1, 2, 1]).double()),
    lambda x: bias_act_ref(x, torch.ones(2).double(), "lrelu", .5, .4), lambda x: resize(x, 4),
])
def test_gradients_once_and_twice(call):
    x = torch.randn(1, 2, 6, 6, generator=generator(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)


# --- the two ways to modulate -----------------------------------------------------------------------------------------
@settings(max_examples=15, deadline=None)
@given(b=st.integers(1, 3), i=st.integers(1, 4), o=st.integers(1, 4), up=st.integers(1, 2), k=st.sampled_from([1, 3]),
       demodulate=st.booleans())
def test_both_ways_agree_with_gradients(b, i, o, up, k, demodulate):
    draw = generator(2, b, i, o, up, k)
    kernel = setup_filter().double()
    parts = [torch.randn(s, generator=draw, dtype=torch.float64, requires_grad=True)
             for s in ((b, i, 5, 6), (o, i, k, k), (b, i))]
    got = [modulated_conv2d(*parts, kernel, up, demodulate, way) for way in WAYS]
    assert got[0].shape == (b, o, 5 * up, 6 * up)
    torch.testing.assert_close(*got)
    probe = torch.randn(got[0].shape, generator=draw, dtype=torch.float64)
    for p, q in zip(*(torch.autograd.grad((y * probe).sum(), parts) for y in got)):
        torch.testing.assert_close(p, q)


# --- mapping and backbone ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def mapping(tiny):
    network = MappingNetwork(32, 25, 512, 14, layers=2, width=32, embed=32).requires_grad_(False)
    network.load_state_dict(state(tiny, "backbone.mapping."))
    return network


@pytest.fixture(scope="module", params=WAYS)
def backbone(tiny, request):
    network = SynthesisNetwork(512, (16,) * 7, 96, modulation=request.param).requires_grad_(False)
    network.load_state_dict(state(tiny, "backbone.synthesis."))
    return network


def test_mapping(tiny, mapping):
    z, label = tiny["in/z"], tiny["in/c_cond"]
    close(mapping(z, label), tiny["out/ws"], 5e-6)
    close(mapping(z, label, .7), tiny["out/ws_psi0.7"], 5e-6)
    close(mapping(z, label, .7, 5), tiny["out/ws_psi0.7_cut5"], 5e-6)


def test_every_block(tiny, backbone):
    x = image = None
    for size in (4, 8, 16, 32):
        x, image = backbone.run(tiny["out/ws"], x=x, image=image, first=size, last=size)
        close(x, tiny[f"out/backbone_b{size}_x"], 5e-6)
        close(image[:, ::8], tiny[f"out/backbone_b{size}_img"], 5e-6)


def test_planes(tiny, backbone):
    planes = backbone(tiny["out/ws"])
    close(planes[:, :, 7::16, 7::16], tiny["out/planes_lattice"], 1e-5)
    close(planes[:, ::4, :12, 244:], tiny["out/planes_crop"], 1e-5)
    close(planes.mean((2, 3)), tiny["out/planes_mean"], 1e-5)
    close(planes.std((2, 3)), tiny["out/planes_std"], 1e-5)
    close(backbone(tiny["out/ws"], "none")[:, :, 7::16, 7::16], tiny["out/planes_lattice_noise_none"], 1e-5)


def test_batch_of_one_and_strided_codes(tiny, backbone):
    ws = tiny["out/ws"].mT.contiguous().mT
    assert not ws.is_contiguous()
    close(backbone(ws[1:])[:, :, 7::16, 7::16], tiny["out/planes_lattice"][1:], 1e-5)


def test_noise_given_as_tensors_is_the_stored_noise(tiny, backbone):
    layers = [m for m in backbone.modules() if isinstance(m, SynthesisLayer)]
    stored = [m.noise_const.expand(2, 1, -1, -1) for m in layers]
    assert torch.equal(backbone.run(tiny["out/ws"], stored, last=64)[1], backbone.run(tiny["out/ws"], last=64)[1])
    drawn = [backbone.run(tiny["out/ws"], generator(s), last=64)[1] for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_nothing_touches_the_global_generator(tiny, backbone):
    before = torch.random.get_rng_state()
    with initial_weights(5):
        FullyConnected(4, 4)
    backbone.run(tiny["out/ws"], generator(3), last=16)
    assert torch.equal(before, torch.random.get_rng_state())


def test_which_code_steers_which_layer():
    "Neighbouring blocks share one code: that of a block's image and of the next block's first layer."
    network, used = SynthesisNetwork(6, (2, 2, 2), 3), {}
    for name, module in network.named_modules():
        if name.endswith("affine"):
            module.register_forward_hook(lambda m, x, out, name=name: used.update({name[:-7]: x[0][0].argmax().item()}))
    network(torch.eye(6)[None])
    assert used == {"b4.conv1": 0, "b4.torgb": 1, "b8.conv0": 1, "b8.conv1": 2, "b8.torgb": 3,
                    "b16.conv0": 3, "b16.conv1": 4, "b16.torgb": 5}


def test_average_code():
    mapping = MappingNetwork(4, 0, 3, 6, average_decay=.9)
    ws = torch.arange(6.).reshape(2, 1, 3).expand(2, 6, 3)
    mapping.track(ws)
    torch.testing.assert_close(mapping.w_avg, .1 * torch.tensor([1.5, 2.5, 3.5]))
    assert not mapping.w_avg.requires_grad


# --- super-resolution -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", WAYS)
def test_superresolution(tiny, way):
    network = SuperResolutionNetwork("2X", 32, 512, 128, modulation=way)
    network.load_state_dict(state(tiny, "superresolution."))
    features = tiny["out/feature"].mT.unflatten(2, (16, 16))  # not contiguous
    image = network(features[:, :3], features, tiny["out/ws"])
    close(image, tiny["out/image"], 1e-4)
    close(network(features[1:, :3], features[1:], tiny["out/ws"][1:]), tiny["out/image"][1:], 1e-4)
    assert (network(features[:, :3], features, tiny["out/ws"], "const") - image).abs().max() > 1e-3


@pytest.mark.parametrize("kind,inner", [("2X", 16), ("4X", 16), ("8X", 8), ("8XDC", 8)])
def test_sizes_inside_superresolution_and_its_code(kind, inner):
    network, sizes = SuperResolutionNetwork(kind, 4, 8, 32), []
    for name in ("block0.conv0", "block1.conv0"):
        network.get_submodule(name).register_forward_hook(lambda m, x, out: sizes.append((x[0].shape[2], out.shape[2])))
    features, ws = torch.randn(1, 4, 8, 8, generator=generator(8)), torch.randn(1, 3, 8, generator=generator(9))
    image = network(features[:, :3], features, ws)
    assert image.shape[2:] == (32, 32) and sizes == [(inner, 16), (16, 32)]
    assert torch.equal(network(features[:, :3], features, ws[:, 2:]), image)
    assert not torch.equal(network(features[:, :3], features, ws[:, :2]), image)


def test_clamp_limits_every_layer():
    network = SuperResolutionNetwork("8XDC", 3, 8, 32, clamp=.25)
    seen = []
    for module in network.modules():
        if isinstance(module, SynthesisLayer):
            module.register_forward_hook(lambda m, i, out: seen.append(out.abs().max().item()))
    network(torch.full((1, 3, 8, 8), 9.), torch.full((1, 3, 8, 8), 9.), torch.ones(1, 1, 8))
    assert len(seen) == 4 and max(seen) == .25


# --- discriminator ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def judge(disc):
    network = Discriminator(32, 512, 32, mapping_layers=2)
    network.load_state_dict(state(disc))
    return network


def test_discriminator_stages(disc, judge):
    close(resize(disc["in/image_raw"], 32), disc["out/raw_resized"], 1e-6)
    close(resize(disc["in/image"], 16), disc["out/down_resized"], 1e-6)
    close(judge.mapping(None, disc["in/c"]), disc["out/cmap"], 1e-5)
    close(judge.b32(torch.cat([disc["in/image"], disc["out/raw_resized"]], 1)), disc["out/b32_x"], 5e-6)


def test_logits(disc, judge):
    parts = disc["in/image"], disc["in/image_raw"], disc["in/c"]
    close(judge(*parts), disc["out/logits"], 1e-5)
    close(judge(*(p[:2] for p in parts)), disc["out/logits_first2"], 1e-5)
    turned = [p.transpose(2, 3).contiguous().transpose(2, 3) for p in parts[:2]]
    close(judge(*turned, parts[2]), disc["out/logits"], 1e-5)
    assert judge(*(p[:1] for p in parts)).shape == (1, 1)


def test_r1_reaches_both_halves(disc, judge):
    images = [disc[k].clone().requires_grad_() for k in ("in/image", "in/image_raw")]
    slopes = torch.autograd.grad(judge(*images, disc["in/c"]).sum(), images, create_graph=True)
    penalty = sum(s.square().sum() for s in slopes)
    weight = judge.b32.fromrgb.weight
    grad, = torch.autograd.grad(penalty, weight)
    assert grad[:, :3].abs().sum() > 0 and grad[:, 3:].abs().sum() > 0


@pytest.mark.parametrize("b,size", [(1, 1), (2, 2), (3, 3), (4, 4), (6, 3), (8, 4)])
def test_groups_of_the_spread(b, size):
    x = torch.randn(b, 5, 4, 4, generator=generator(7, b))
    spread = minibatch_spread(x)[:, 5]
    groups = b // size
    for i in range(b):
        expected = (x[i % groups::groups].var(0, correction=0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(spread[i], expected.expand(4, 4))


# --- faults -----------------------------------------------------------------------------------------------------------
NET = SynthesisNetwork(8, (4, 4), 3)
X = torch.zeros(1, 4, 8, 8)


@pytest.mark.parametrize("call,said", [
    (lambda: setup_filter([1, -1]), "taps must be"),
    (lambda: upfirdn2d(X[0], setup_filter()), "x must be"),
    (lambda: upfirdn2d(X, setup_filter(), up=0), "up, down must be"),
    (lambda: conv2d_resample(X, torch.zeros(4, 4, 3, 3), down=2), "kernel must be a filter"),
    (lambda: bias_act(X, torch.zeros(3)), r"bias must be \(4,\)"),
    (lambda: bias_act(X, act="relu6"), "act must be one of"),
    (lambda: modulated_conv2d(X, torch.zeros(4, 4, 3, 3), torch.zeros(1, 4), modulation="both"), "modulation must be"),
    (lambda: MappingNetwork(0, 0, 4, 2), "not both 0"),
    (lambda: MappingNetwork(4, 3, 4, 2)(torch.zeros(1, 4)), r"label must be \(b, 3\), got NoneType"),
    (lambda: MappingNetwork(4, 0, 4, 2)(torch.zeros(1, 5)), r"z must be \(b, 4\)"),
    (lambda: MappingNetwork(4, 0, 4, 2, average_decay=None)(torch.zeros(1, 4), psi=.5), "psi must be 1"),
    (lambda: NET(torch.zeros(1, 3, 8)), r"ws must be \(b, 4, 8\)"),
    (lambda: NET(torch.zeros(1, 4, 8), "loud"), "noise must be"),
    (lambda: NET(torch.zeros(1, 4, 8), [torch.zeros(1, 1, 5, 5)] * 3), r"noise must be \(b, 1, 4, 4\)"),
    (lambda: NET.run(torch.zeros(1, 4, 8), last=64), "resolution must be one of"),
    (lambda: NET.run(torch.zeros(1, 4, 8), first=8), "x must be given"),
    (lambda: SuperResolutionNetwork("3X", 3, 8, 32), "kind must be one of 2X, 4X, 8X, 8XDC"),
    (lambda: SuperResolutionNetwork("2X", 5, 8, 32)(X[:, :3], X, torch.zeros(1, 1, 8)), r"features must be \(b, 5"),
    (lambda: Discriminator(24), "resolution must be a power of two"),
    (lambda: Discriminator(8, 64, 8)(X[:, :3]), "raw must be an image"),
    (lambda: Discriminator(8, 64, 8, dual=False)(X[:, :3]), "label must be"),
    (lambda: initial_weights(-1).__enter__(), "seed must be"),
])
def test_faults_name_the_argument(call, said):
    with pytest.raises(InputError, match=said):
        call()
