"""The encoder: sizes of all presets, Eq. 1 at initialisation, gradients, precision, weights from a file, faults."""
from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nofa_nb.core.config import PRESETS, override, preset
from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.repro import generator
from nofa_nb.models.encoder import (
    ENCODERS,
    Encoder,
    EncoderConfig,
    build_encoder,
    build_swin,
    count_parameters,
    style_codes,
    style_groups,
)

READINGS = ("swin", "map2style")
TINY = EncoderConfig(32, 2, 4, 8, (1, 1, 2, 1), (1, 2, 2, 2), 2., 16, 2, "swin_tiny_patch4_window7_224.ms_in1k")
pytestmark = pytest.mark.usefixtures("one_thread")


def images(n, side=32, seed=0):
    return torch.rand(n, 3, side, side, generator=generator(seed, "images")) * 2 - 1


@pytest.fixture(scope="module", params=READINGS)
def encoder(request):
    return build_encoder(override(preset("smoke"), f"readings.encoder={request.param}"))


# --- sizes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name, reading):
    p = override(preset(name), f"readings.encoder={reading}")
    with torch.device("meta"):
        network = build_encoder(p)
    assert network.num_ws == 2 * len(p.generator.channels) and network.w_dim == p.generator.w_dim
    kind = {"swin": "StyleReadout", "map2style": "MapToStyles"}[reading]
    assert type(network.readout).__name__ == kind and network.readout.groups == style_groups(network.num_ws)
    counts = count_parameters(network)
    assert counts["all"] == sum(n for key, n in counts.items() if key != "all") > 0
    windows = [b.attn.window_size for stage in network.swin.layers for b in stage.blocks]
    assert {w for w, _ in windows} == set(ENCODERS[name].windows)
    if name in ("smoke", "small"):  # the larger ones are counted only
        network = build_encoder(p)
        assert network(images(2, p.generator.image_resolution)).shape == (2, network.num_ws, network.w_dim)


def test_the_small_one_is_small_and_the_paper_one_is_swin_base():
    with torch.device("meta"):
        small, paper = (build_encoder(preset(n)) for n in ("small", "paper"))
        swin_base = timm.create_model("swin_base_patch4_window7_224", num_classes=0)
    assert 3e6 < count_parameters(small)["all"] < 4e6
    tables = sum(p.numel() for n, p in swin_base.named_parameters() if "bias_table" in n)
    wider = sum(p.numel() for n, p in paper.swin.named_parameters() if "bias_table" in n)
    swin_base = sum(p.numel() for p in swin_base.parameters())
    assert count_parameters(paper.swin)["all"] == swin_base - tables + wider and wider * 13**2 == tables * 15**2


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 40))
def test_groups_cover_all_codes(n):
    groups = style_groups(n)
    assert sum(groups) == n and min(groups) >= 1 and groups[0] == groups[1]
    assert abs(groups[0] - n * 3 / 14) <= .5 or groups[0] == 1


def test_a_window_larger_than_the_map_is_the_whole_map():
    "Then nothing is shifted, and every token of the last map feels every other one after a single block."
    network = build_encoder(preset("smoke")).eval()
    block = network.swin.layers[3].blocks[0]
    assert tuple(block.window_size) == (2, 2) and not any(block.shift_size)
    assert block.attn.relative_position_bias_table.shape[0] == 9
    x = torch.randn(1, 2, 2, 128, generator=generator(0))
    y = x.clone()
    y[:, 0, 0] = torch.randn(128, generator=generator(1))
    assert ((block(y) - block(x)).abs().amax((0, 3)) > 1e-6).all()


# --- Eq. 1 ------------------------------------------------------------------------------------------------------------
def test_starts_at_the_average_face(encoder):
    average = torch.randn(encoder.w_dim, generator=generator(0)).requires_grad_()
    ws = style_codes(encoder, images(4), average)
    away = ws - average
    assert ws.dtype == torch.float32 and away.square().mean().sqrt() < .03 < average.std()
    assert away.abs().max() > 1e-4 and (away[0] - away[1]).abs().max() > 1e-4
    torch.testing.assert_close(away, encoder(images(4)), rtol=0, atol=1e-6)
    ws.sum().backward()
    assert average.grad is None  # the average code is fixed during training


def test_base_code_is_repeated_and_deltas_come_from_their_levels():
    readout = build_encoder(preset("small")).readout
    levels = [torch.randn(2, s, s, 128, generator=generator(s)) for s in (2, 4, 8, 16)]
    with torch.no_grad():
        readout.delta[1].weight.zero_()
        ws = readout(levels)
        assert torch.equal(ws, ws[:, :1].expand_as(ws)) and ws.abs().max() > 0
        readout.delta[1].weight.normal_(generator=generator(1))
        ws = readout(levels)
        for k, (first, last) in enumerate(((0, 2), (2, 4), (4, 8)), 1):
            other = readout([-m if i == k else m for i, m in enumerate(levels)])
            changed = ((other - ws).abs().amax((0, 2)) > 1e-5).nonzero().flatten().tolist()
            assert changed == list(range(first, last))


def test_gradient_reaches_every_parameter(encoder):
    encoder.zero_grad()
    target = torch.randn(4, encoder.num_ws, encoder.w_dim, generator=generator(0))
    (encoder(images(4)) - target).square().mean().backward()
    unreached = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # A shift of all keys alike changes no softmax: what is left of these gradients is rounding.
    assert not [n for n in unreached if not n.endswith("keys.bias")]


def test_faces_of_a_batch_do_not_mix(encoder):
    x = images(3)
    with torch.no_grad():
        together, alone = encoder(x), encoder(x[1:2])
        changed = encoder(torch.cat([images(1, seed=1), x[1:2], images(1, seed=2)]))
    torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(together[1], changed[1], rtol=1e-3, atol=1e-6)
    assert (together[0] - changed[0]).abs().max() > 1e-4


def test_training_mode_draws_nothing(encoder):
    state = torch.get_rng_state()
    assert torch.equal(encoder.train()(images(2)), encoder.eval()(images(2)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reading", READINGS)
def test_seed(reading):
    p, state = override(preset("smoke"), f"readings.encoder={reading}"), torch.get_rng_state()
    a, b, c = (build_encoder(p, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)
    assert torch.equal(torch.get_rng_state(), state)


def test_resizing_is_antialiased(encoder):
    "Fine stripes are grey from afar; picking every fourth pixel, or two of four, would make them white."
    stripes = torch.tensor([-1., 1, 1, -1]).repeat(32).expand(1, 3, 128, 128)
    with torch.no_grad():
        grey, white, got = (encoder(x) for x in (torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32), stripes))
    assert (got - grey).square().mean() < .25 * (got - white).square().mean()


@pytest.mark.parametrize("way", ["autocast", "cast"])
def test_bfloat16_keeps_the_codes(encoder, way):
    "Eight bits of mantissa: a few percent of the codes."
    with torch.no_grad():
        want = encoder(images(2))
        if way == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                got = encoder(images(2))
        else:
            other = Encoder(encoder.config, encoder.num_ws, encoder.w_dim,
                            "swin" if hasattr(encoder.readout, "base") else "map2style")
            other.load_state_dict(encoder.state_dict())
            got = other.bfloat16()(images(2))
    assert got.dtype == torch.float32
    assert (got - want).square().mean().sqrt() < .1 * want.square().mean().sqrt()


def test_it_learns():
    "Eight pictures, told their codes: the read-out lets through what tells them apart."
    network, x = build_encoder(preset("smoke")), images(8, 8)
    target = torch.randn(8, 1, network.w_dim, generator=generator(3)).expand(-1, network.num_ws, -1)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(40):
        loss = (network(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < .3 * target.square().mean()


# --- pretrained weights -----------------------------------------------------------------------------------------------
def test_weights_from_a_file(tmp_path):
    "Of other image and window sizes: the tables of relative positions are resized, all else is taken as it is."
    source = build_swin(replace(TINY, resolution=64, window=8))
    path = tmp_path / "swin.safetensors"
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, path)
    got, want = build_swin(TINY, path).state_dict(), source.state_dict()
    assert got.keys() == want.keys()
    resized = {k for k in got if got[k].shape != want[k].shape}
    assert resized and all(k.endswith("relative_position_bias_table") for k in resized)
    assert all(torch.equal(got[k], want[k]) for k in got.keys() - resized)


def test_absent_weights_are_explained(monkeypatch, tmp_path):
    def offline(*args, pretrained=False, **kwargs):
        assert pretrained
        raise ConnectionError("cannot reach huggingface.co\nand more")
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(MissingResource) as caught:
        build_swin(ENCODERS["paper"], True)
    said = str(caught.value)
    assert all(w in said for w in ("swin_base", "cannot reach", "huggingface.co/timm", "MIT", "pretrained=<path>"))
    assert "and more" not in said
    with pytest.raises(MissingResource, match="no file"):
        build_swin(ENCODERS["paper"], tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match="no weights exist"):
        build_swin(ENCODERS["small"], True)


# --- faults -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("picture", [
    torch.zeros(3, 32, 32), torch.zeros(1, 4, 32, 32), torch.zeros(1, 3, 32, 16), None,
    torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
], ids=["no batch", "RGBA", "not square", "None", "bytes"])
def test_odd_pictures(encoder, picture):
    with pytest.raises(InputError, match="image must be"):
        encoder(picture)


@pytest.mark.parametrize("change,said", [
    (dict(resolution=100), "resolution"), (dict(window=6), "window"), (dict(heads=(4, 8, 16, 30)), "heads"),
    (dict(depths=(2, 2, 2)), "four numbers"), (dict(embed=0), "at least 1"), (dict(read_heads=7), "read_heads"),
])
def test_odd_sizes(change, said):
    with pytest.raises(InputError, match=said):
        replace(EncoderConfig(), **change)


def test_odd_readings():
    with pytest.raises(InputError, match="readout"):
        Encoder(ENCODERS["smoke"], 6, 32, "linear")
    with pytest.raises(InputError, match="num_ws"):
        Encoder(ENCODERS["smoke"], 2, 32)
    with pytest.raises(InputError, match="preset"):
        build_encoder(replace(preset("smoke"), name="own"))
