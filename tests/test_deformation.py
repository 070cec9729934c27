"""Positional encoding and deformation field: parity with concatenation, Fig. 3 by hand, ablations, faults."""
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nofa_nb.core.config import PRESETS, DeformationConfig, preset
from nofa_nb.core.errors import InputError
from nofa_nb.core.repro import generator
from nofa_nb.layers.encoding import encoded_size, positional_encoding
from nofa_nb.layers.stylegan import initial_weights
from nofa_nb.models.deformation import ConditionedMLP, DeformationField, bake, deformed, lattice_points
from nofa_nb.ops.render import offset_points

pytestmark = pytest.mark.usefixtures("one_thread")
SMOKE = preset("smoke").deformation
TINY = DeformationConfig(octaves=2, deform_layers=3, deform_width=6, deform_skip=1, weight_layers=2, weight_width=5,
                         identity_dim=4, expression_dim=3)


def field_of(config=SMOKE, lively=True, seed=0, **options):
    "A field in 64 bits; a lively one moves points by about 0.1."
    with initial_weights(seed):
        field = DeformationField(config, **options).double()
        if lively:
            nn.init.normal_(field.d_net.last.weight, std=.1 / config.unit / math.sqrt(config.deform_width))
            nn.init.normal_(field.d_net.last.bias, std=.02 / config.unit)
    return field


def inputs(config=SMOKE, faces=2, points=40, seed=0, size=.98):
    "Points inside the box, identities, expressions."
    draw = generator(seed, "inputs")
    x = (torch.rand(faces, points, 3, generator=draw, dtype=torch.float64) - .5) * size
    alpha = torch.randn(faces, config.identity_dim, generator=draw, dtype=torch.float64)
    beta = torch.rand(faces, config.expression_dim, generator=draw, dtype=torch.float64)
    return x, alpha, beta


# --- positional encoding ----------------------------------------------------------------------------------------------
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 4), st.integers(0, 8), st.booleans(), st.integers(0, 99))
def test_encoding_is_the_equation(dims, octaves, include, seed):
    octaves = max(octaves, 0 if include else 1)
    x = torch.rand(dims, generator=generator(seed), dtype=torch.float64) * 2 - 1
    want = list(x) if include else []
    for k in range(octaves):
        for wave in (math.sin, math.cos):
            want += [wave(2**k * math.pi * float(v)) for v in x]
    got = positional_encoding(x, octaves, include)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-12)
    assert len(got) == encoded_size(dims, octaves, include)


def test_encoding_repeats_after_two_and_not_before():
    x = torch.rand(100, 3, generator=generator(0), dtype=torch.float64) * 2 - 1
    here, later, sooner = (positional_encoding(x + step, 5, include_input=False) for step in (0, 2, 1))
    torch.testing.assert_close(later, here, rtol=0, atol=1e-12)
    assert (sooner - here).abs().amax(-1).min() > .1


@pytest.mark.parametrize("octaves,include", [(-1, True), (0, False)])
def test_encoding_needs_something_to_say(octaves, include):
    with pytest.raises(InputError, match="octaves must be at least 1"):
        positional_encoding(torch.zeros(3), octaves, include)


# --- parity with the text ---------------------------------------------------------------------------------------------
def stack(net, x, skip):
    "The network on concatenated inputs."
    hidden = x
    for i, layer in enumerate(net.layers):
        hidden = F.relu(layer(torch.cat([hidden, x], -1) if i and i == skip else hidden))
    return net.last(hidden)


def plain(field, x, alpha, beta):
    "Sec. 3.3 point by point: everything concatenated, for points inside the box."
    config, parts = field.config, [positional_encoding(x * 2 / field.box_warp, field.config.octaves)]
    if field.use_identity:
        parts.append(alpha[:, None].expand(-1, x.shape[1], -1) / math.sqrt(config.identity_dim))
    seen = torch.cat([*parts, beta[:, None].expand(-1, x.shape[1], -1)], -1)
    moved = config.unit * stack(field.d_net, seen, config.deform_skip)
    if field.use_weights:
        moved = torch.sigmoid(stack(field.w_net, torch.cat(parts, -1), None)) * moved
    return x + moved


@pytest.mark.parametrize("name,weights,identity", [*product(["smoke"], [True, False], [True, False]),
                                                   ("small", True, True), ("paper", True, True)])
def test_parts_equal_concatenation(name, weights, identity):
    config = PRESETS[name].deformation
    field, given_ = field_of(config, use_weights=weights, use_identity=identity, box_warp=1.3), inputs(config)
    moved = field(*given_)
    torch.testing.assert_close(moved, plain(field, *given_), rtol=0, atol=1e-12)
    assert (moved - given_[0]).norm(dim=-1).mean() > .01  # it is about something


def test_sizes_are_those_of_the_paper_preset():
    field = DeformationField()
    shapes = [tuple(layer.weight.shape) for layer in field.d_net.layers]
    shared = 80 + 64
    assert shapes == [(256, 63 + shared)] + [(256, 256)] * 3 + [(256, 256 + 63 + shared)] + [(256, 256)] * 3
    assert [tuple(layer.weight.shape) for layer in field.w_net.layers] == [(128, 63 + 80)] + [(128, 128)] * 3
    assert field.d_net.last.out_features == 3 and field.w_net.last.out_features == 1


# --- Fig. 3 by hand ---------------------------------------------------------------------------------------------------
def silent(**options):
    "A field of a single expression: all weights are zero."
    field = field_of(TINY, **options)
    with torch.no_grad():
        for weight in field.parameters():
            weight.zero_()
    return field


@torch.no_grad()
def test_offset_times_weight_is_added():
    field, (x, alpha, beta) = silent(), inputs(TINY)
    field.d_net.last.bias.copy_(torch.tensor([.2, -.1, 0.]))
    field.w_net.last.bias.fill_(-math.log(4))  # sigmoid: 1 / 5
    torch.testing.assert_close(field(x, alpha, beta) - x, torch.tensor([.04, -.02, 0.]).double().expand_as(x))
    torch.testing.assert_close(field.offset(x, alpha, beta), torch.tensor([.2, -.1, 0.]).double().expand_as(x))
    torch.testing.assert_close(field.weight(x, alpha), torch.full((2, 40, 1), .2).double())


@torch.no_grad()
def test_one_expression_unit_moves_one_axis():
    "beta_1 through one path of weights one: the offset along y is beta_1 times the last weight."
    field, (x, alpha, beta) = silent(use_weights=False), inputs(TINY)
    encoded = encoded_size(3, TINY.octaves)
    field.d_net.layers[0].weight[2, encoded + TINY.identity_dim + 1] = 1.
    field.d_net.layers[1].weight[3, 2] = field.d_net.layers[2].weight[4, 3] = 1.
    field.d_net.last.weight[1, 4] = .3
    want = x + torch.stack([torch.zeros(2), .3 * beta[:, 1], torch.zeros(2)], -1)[:, None]
    torch.testing.assert_close(field(x, alpha, beta), want)


def test_visible_parts_make_the_whole():
    field, (x, alpha, beta) = field_of(), inputs()
    whole = x + field.weight(x, alpha) * field.offset(x, alpha, beta)
    torch.testing.assert_close(field(x, alpha, beta), whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("box_warp", [1., 2.])
def test_points_outside_the_box_stay(box_warp):
    field, (x, alpha, beta) = field_of(box_warp=box_warp), inputs(size=2 * box_warp)
    out = (x.abs() > box_warp / 2).any(-1)
    moved = field(x, alpha, beta)
    assert 5 < out.sum() < out.numel() - 5 and torch.equal(moved[out], x[out]) and (moved[~out] != x[~out]).all()


# --- first weights ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(PRESETS))
def test_nothing_moves_at_first(name):
    config = PRESETS[name].deformation
    field, (x, alpha, beta) = field_of(config, lively=False), inputs(config, points=300)
    with torch.no_grad():
        moved = (field(x, alpha, beta) - x).abs()
    assert 0 < moved.max() < 1e-4  # a pixel of 512 px is 1.2e-3
    assert (field.weight(x, alpha) - .5).abs().max() < .2


def test_each_input_has_an_equal_say():
    with initial_weights(0):
        net = ConditionedMLP([(60, 30.), (100, 1.), (50, 4.)], 1500, 2, 1, skip=1).double()
    parts = [torch.full((1, 1, n), math.sqrt(s / n)).double() for n, s in ((60, 30.), (100, 1.), (50, 4.))]
    for layer, given_, hidden in ((net.layers[0], parts, 0), (net.layers[1], parts, 1500)):
        columns = layer.weight[:, hidden:].split([60, 100, 50], 1)
        shares = torch.stack([(w @ p[0, 0]).var() for w, p in zip(columns, given_)])
        torch.testing.assert_close(shares, torch.full((3,), 2. / (4 if hidden else 3)).double(), rtol=.15, atol=0)


# --- ablations --------------------------------------------------------------------------------------------------------
def slopes(field, x, alpha, beta):
    leaves = [t.clone().requires_grad_() for t in (x, alpha, beta)]
    return torch.autograd.grad(field(*leaves).sin().sum(), leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("weights", [True, False])
def test_identity_is_cut(weights):
    given_ = inputs()
    _, with_alpha, with_beta = slopes(field_of(use_weights=weights), *given_)
    _, without_alpha, without_beta = slopes(field_of(use_weights=weights, use_identity=False), *given_)
    assert (with_alpha != 0).all() and (with_beta != 0).all() and (without_beta != 0).all()
    assert torch.equal(without_alpha, torch.zeros_like(without_alpha))
    field = field_of(use_weights=weights, use_identity=False)
    assert torch.equal(field(*given_), field(given_[0], None, given_[2]))


def test_weights_are_cut():
    field, (x, alpha, beta) = field_of(use_weights=False), inputs()
    assert torch.equal(field(x, alpha, beta), x + field.offset(x, alpha, beta)) and field.weight(x, alpha).eq(1).all()
    assert {name.split(".")[0] for name in field.state_dict()} == {"d_net"}


def test_w_net_sees_identity_but_no_expression():
    field, (x, alpha, beta) = field_of(), inputs()
    leaf = alpha.clone().requires_grad_()
    assert (torch.autograd.grad(field.weight(x, leaf).sum(), leaf)[0] != 0).any()
    one, other = (field(x, alpha, b) - x for b in (beta, beta.flip(0)))
    ratios = [moved / field.offset(x, alpha, b) for moved, b in ((one, beta), (other, beta.flip(0)))]
    for ratio in ratios:  # w is the same, whatever the expression
        torch.testing.assert_close(ratio, field.weight(x, alpha).expand_as(x), rtol=1e-8, atol=1e-10)


# --- batches, gradients, precision ------------------------------------------------------------------------------------
@settings(max_examples=6, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 99))
def test_faces_and_points_do_not_see_each_other(faces, points, seed):
    field, (x, alpha, beta) = field_of(), inputs(faces=faces, points=points, seed=seed)
    whole = field(x, alpha, beta)
    alone = torch.stack([field(x[i:i + 1], alpha[i:i + 1], beta[i:i + 1])[0] for i in range(faces)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(field(x[:, -1:], alpha, beta), whole[:, -1:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"use_weights": False}, {"use_identity": False}], ids=str)
def test_gradients(options):
    field, leaves = field_of(TINY, **options), [t.requires_grad_() for t in inputs(TINY, points=4, size=.8)]
    weights = [p for name, p in field.named_parameters() if "last" in name or "layers.0" in name]
    names = [name for name, p in field.named_parameters() if "last" in name or "layers.0" in name]

    def run(x, alpha, beta, *values):
        return torch.func.functional_call(field, dict(zip(names, values)), (x, alpha, beta))

    assert torch.autograd.gradcheck(run, (*leaves, *weights), eps=1e-7, atol=1e-5)


def test_single_precision_is_close():
    field, given_ = field_of(preset("paper").deformation), inputs(preset("paper").deformation)
    want = field(*given_)
    assert (field.float()(*(t.float() for t in given_)).double() - want).abs().max() < 1e-4


# --- over a field -----------------------------------------------------------------------------------------------------
def test_deformed_moves_points_and_keeps_directions():
    field, (x, alpha, beta) = field_of(), inputs()
    asked = []

    def canonical(points, directions):
        asked.append((points, directions))
        return points * 2, points[..., :1]

    looking = x.flip(1)  # inside the box, where a deformation would be felt
    features, density = deformed(canonical, field, alpha, beta)(x, looking)
    points, directions = asked[0]
    assert torch.equal(points, field(x, alpha, beta)) and torch.equal(directions, looking) and len(asked) == 1
    assert torch.equal(features, points * 2) and torch.equal(density, points[..., :1])


# --- baked ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("box_warp,dtype", [(1., torch.float64), (1.6, torch.float32), (1.6, torch.float64)])
def test_a_baked_field_is_exact_at_its_nodes(box_warp, dtype):
    field, (_, alpha, beta) = field_of(box_warp=box_warp).to(dtype), (t.to(dtype) for t in inputs())
    offsets = bake(field, alpha, beta, 5, chunk=11)
    nodes = lattice_points(5, box_warp).to(dtype).expand(2, -1, -1)
    torch.testing.assert_close(nodes + offsets.flatten(1, 3), field(nodes, alpha, beta))
    torch.testing.assert_close(offset_points(nodes, offsets, box_warp), field(nodes, alpha, beta))
    assert (offsets != 0).all()  # the corners, too
    z, y, x = 4, 1, 3
    at = (torch.tensor([[[.25, -.25, .5]]], dtype=dtype) * box_warp).expand(2, -1, -1)
    torch.testing.assert_close(offsets[:, z, y, x], (field(at, alpha, beta) - at)[:, 0])


@torch.no_grad()
def test_a_finer_lattice_is_nearer():
    "Two octaves: the shortest wave is half the box long. Outside the box nothing moves, with either."
    field, (x, alpha, beta) = field_of(replace(TINY, octaves=2)), inputs(TINY, size=1.2)
    exact = field(x, alpha, beta)
    baked = [offset_points(x, bake(field, alpha, beta, k), 1.) for k in (3, 6, 12, 24, 48)]
    errors = [(b - exact).abs().mean().item() for b in baked]
    assert all(b < .75 * a for a, b in zip(errors, errors[1:])) and errors[-1] < .03 * (exact - x).abs().mean()
    out = (x.abs() > .5).any(-1)
    assert out.sum() > 5 and torch.equal(offset_points(x, bake(field, alpha, beta, 6), 1.)[out], x[out])


def test_gradients_pass_a_lattice():
    field, (x, alpha, beta) = field_of(), inputs()
    offset_points(x, bake(field, alpha, beta.requires_grad_(), 4), 1.).square().sum().backward()
    assert beta.grad.abs().min() > 0 and all(p.grad.abs().max() > 0 for p in field.parameters())
    with torch.inference_mode():
        bake(field, alpha, beta, 7)
    bake(field, alpha, beta, 7).sum().backward()  # nodes kept from an inference are no inference tensors


# --- faults -----------------------------------------------------------------------------------------------------------
X, ALPHA, BETA = (t.float() for t in inputs())
FIELD = field_of().float()


@pytest.mark.parametrize("call,said", [
    (lambda: FIELD(X[0], ALPHA, BETA), r"points must be \(b, n, 3\)"),
    (lambda: FIELD(X[..., :2], ALPHA, BETA), r"points must be \(b, n, 3\)"),
    (lambda: FIELD(X, ALPHA[:, :80], BETA), r"alpha must be \(2, 100\), got \(2, 80\)"),
    (lambda: FIELD(X, None, BETA), r"alpha must be \(2, 100\), got NoneType"),
    (lambda: FIELD(X, ALPHA[:1], BETA), r"alpha must be \(2, 100\), got \(1, 100\)"),
    (lambda: FIELD(X, ALPHA, BETA[:1]), r"beta must be \(2, 52\), got \(1, 52\)"),
    (lambda: FIELD.offset(X, ALPHA, BETA[:, :3]), r"beta must be \(2, 52\)"),
    (lambda: bake(FIELD, ALPHA, BETA, 1), "size must be at least 2 nodes"),
    (lambda: bake(FIELD, ALPHA, BETA[:1]), r"alpha must be \(1, 100\)"),
    (lambda: FIELD.weight(X, ALPHA[0]), r"alpha must be \(2, 100\)"),
    (lambda: DeformationField(use_weights="false"), "use_weights must be True or False, got 'false'"),
    (lambda: DeformationField(use_identity=0), "use_identity must be True or False, got 0"),
])
def test_faults_name_the_argument(call, said):
    with pytest.raises(InputError, match=said):
        call()
