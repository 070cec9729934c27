"""The whole model: what it equals before training, readings, ablations, gradients, avatar files, weights, faults."""
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from nofa_nb.core.config import override, preset
from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.io import load_tensors, save_tensors
from nofa_nb.core.repro import generator
from nofa_nb.core.weights import save_weights
from nofa_nb.geometry.cameras import Camera
from nofa_nb.layers.stylegan import initial_weights
from nofa_nb.models.avatar import Avatar, AvatarModel, build_avatar_model, load_avatar_model, save_avatar_model
from nofa_nb.models.deformation import LATTICE, bake, deformed
from nofa_nb.models.generator import build_generator
from nofa_nb.ops.plane_sample import plane_sample

pytestmark = pytest.mark.usefixtures("one_thread")
SMOKE = preset("smoke")
SOURCE = Camera.orbit(torch.tensor([.2, -.3]), torch.tensor([0., .1]))


def draw(*names):
    return generator(0, *names)


IMAGE = torch.rand(2, 3, 32, 32, generator=draw("image")) * 2 - 1
ALPHA, BETA = torch.randn(2, 100, generator=draw("alpha")), torch.rand(2, 52, generator=draw("beta"))


def enliven(model, fusion=True):
    "As if it had learned something: density that is seen, offsets of about 0.1, details that matter."
    with initial_weights(7):
        for module in (model.encoder.readout, model.detail):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=.1)
        nn.init.normal_(model.deformation.d_net.last.weight, std=.03)
        if fusion:
            for cnn in (model.fusion.gamma, model.fusion.eta):
                nn.init.normal_(cnn[-1].weight, std=.05)
    G = model.generator
    points = torch.rand(2, 1000, 3, generator=draw("points")) - .5
    out = G.decoder.net(plane_sample(G.planes(model.encode(IMAGE)), points, 1., mean=True)).flatten(0, 1)
    spread, last = torch.tensor([12., 2, 2, 2, 2]) / out.std(0), G.decoder.net[-1]
    last.bias.copy_((last.bias - out.mean(0)) * spread + torch.tensor([2., 0, 0, 0, 0]))
    last.weight.mul_(spread[:, None])
    return model


def model_of(*changes, lively=True, fusion=True, **options):
    model = build_avatar_model(override(SMOKE, *changes), **options).requires_grad_(False).eval()
    model.generator.backbone.mapping.w_avg.copy_(torch.randn(32, generator=draw("average")))
    return enliven(model, fusion) if lively else model


@pytest.fixture(scope="module")
def fresh():
    return model_of(lively=False)


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def avatar(model):
    return model.reconstruct(IMAGE, SOURCE, ALPHA, BETA)


def close(got, want, limit):
    torch.testing.assert_close(got, want, rtol=0, atol=limit)


# --- before training --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change", ["fusion=64", "fusion=128", "fusion=planes", "residual=deformed", "residual=aligned",
                                    "encoder=map2style"])
def test_fine_is_coarse_at_first(change):
    model = model_of(f"readings.{change}", fusion=False)
    made = model.reconstruct(IMAGE, SOURCE, ALPHA, BETA)
    assert torch.equal(made.planes, made.coarse_planes) and torch.equal(made.planes, model.generator.planes(made.ws))
    assert made.planes.std() > .1


def test_canonical_is_the_generator_and_driven_is_canonical_at_first(fresh):
    made = fresh.reconstruct(IMAGE, SOURCE, ALPHA, BETA)
    canonical = fresh.render(made, None, SOURCE)
    assert torch.equal(canonical.image, fresh.generator.synthesis(made.ws, SOURCE).image)
    for got, want in zip(fresh.render(made, BETA, SOURCE)[:4], canonical):
        close(got, want, 2e-4)


# --- Eq. 1 to 3, step by step -----------------------------------------------------------------------------------------
def test_codes_start_from_the_average(model):
    average = model.generator.backbone.mapping.w_avg
    assert average.abs().min() > 0 and model.encoder(IMAGE).std() > .01
    close(model.encode(IMAGE), model.encoder(IMAGE) + average, 1e-6)


def test_reconstruction_is_its_steps(model, avatar):
    ws = model.encode(IMAGE)
    coarse = model.coarse(ws)
    lack = IMAGE - model.generator.image_of(model.generator.field(coarse.planes), ws, SOURCE).image
    close(model.residual(IMAGE, coarse, ws, SOURCE), lack, 1e-5)
    gamma, eta = model.fusion.maps(model.detail(lack))
    close(avatar.feature, gamma * coarse.feature + eta, 1e-4)
    run = model.generator.backbone.synthesis.run
    feature, drawn = run(ws, last=8)
    close(coarse.feature, feature, 1e-5)
    close(avatar.planes.flatten(1, 2), run(ws, x=avatar.feature, image=drawn, first=16)[1], 1e-5)
    close(avatar.coarse_planes, model.generator.planes(ws), 1e-5)
    assert (avatar.planes - avatar.coarse_planes).abs().mean() > .01


@pytest.mark.parametrize("fusion", ["64", "128", "planes"])
def test_refining_goes_on_from_the_feature(fusion):
    model = model_of(f"readings.fusion={fusion}")
    made = model.reconstruct(IMAGE, SOURCE, ALPHA)
    assert made.feature.shape[2] == dict(zip(("64", "128", "planes"), (8, 16, 32)))[fusion]
    assert torch.equal(model.refit(made, made.feature).planes, made.planes)
    other = model.refit(made, made.feature + 1.)
    assert (other.planes - made.planes).abs().mean() > .05 and torch.equal(other.coarse_planes, made.coarse_planes)


def test_noise_goes_through_both_passes():
    model = model_of(fusion=False)
    for block in (8, 16, 32):
        nn.init.constant_(model.generator.backbone.synthesis.block(block).conv1.noise_strength, .5)
    quiet, noisy = (model.reconstruct(IMAGE, SOURCE, ALPHA, noise=n) for n in ("none", "const"))
    assert torch.equal(noisy.planes, noisy.coarse_planes) and torch.equal(quiet.planes, quiet.coarse_planes)
    assert (noisy.planes - quiet.planes).abs().mean() > .05


# --- reading 4 --------------------------------------------------------------------------------------------------------
def test_residual_through_the_deformation():
    model = model_of("readings.residual=deformed")
    ws = model.encode(IMAGE)
    coarse = model.coarse(ws)
    field = deformed(model.generator.field(coarse.planes), model.deformation, ALPHA, BETA)
    lack = model.residual(IMAGE, coarse, ws, SOURCE, ALPHA, BETA)
    close(lack, IMAGE - model.generator.image_of(field, ws, SOURCE).image, 1e-5)
    canonical = IMAGE - model.generator.image_of(model.generator.field(coarse.planes), ws, SOURCE).image
    assert (lack - canonical).abs().mean() > .01


def test_aligned_residual_starts_where_it_is():
    model = model_of("readings.residual=aligned")
    ws = model.encode(IMAGE)
    coarse = model.coarse(ws)
    drawn = model.generator.image_of(model.generator.field(coarse.planes), ws, SOURCE).image
    close(model.residual(IMAGE, coarse, ws, SOURCE), IMAGE - drawn, 1e-3)
    nn.init.constant_(model.alignment.unet.last.bias, .5)
    assert (model.residual(IMAGE, coarse, ws, SOURCE) - (IMAGE - drawn)).abs().mean() > .01


# --- driving ----------------------------------------------------------------------------------------------------------
def test_render_bends_the_volume(model, avatar):
    field = deformed(model.generator.field(avatar.planes), model.deformation, ALPHA, BETA)
    want = model.generator.image_of(field, avatar.ws, SOURCE)
    for got, wanted in zip(model.render(avatar, BETA, SOURCE), want):
        assert torch.equal(got, wanted)
    for other in (model.render(avatar, None, SOURCE), model.render(avatar, BETA.flip(0), SOURCE),
                  model.render(avatar, BETA, SOURCE, alpha=ALPHA.flip(0)),
                  model.render(avatar, BETA, SOURCE, coarse=True), model.render(avatar, BETA, SOURCE[0])):
        assert (other.raw - want.raw).abs().max() > .02
    assert torch.equal(model.render(avatar, BETA, SOURCE, alpha=ALPHA).raw, want.raw)


@torch.no_grad()
def test_a_baked_deformation_is_near_the_exact_one(model, avatar):
    exact = model.render(avatar, BETA, SOURCE, lattice=0).raw
    errors = [(model.render(avatar, BETA, SOURCE, lattice=k).raw - exact).square().mean().item() for k in (4, 12, 40)]
    assert errors[1] < .8 * errors[0] and errors[2] < .5 * errors[1]  # random octaves: a rough field
    field = model.field(avatar, BETA, lattice=4)
    torch.testing.assert_close(field.offsets, bake(model.deformation, ALPHA, BETA, 4))
    assert torch.equal(model.render(avatar, None, SOURCE, lattice=4).raw, model.render(avatar, None, SOURCE).raw)
    assert torch.equal(model.render(avatar, BETA, SOURCE).raw, exact)  # so few rays: the exact field is less work


def test_frames_are_drawn_with_a_lattice_where_it_pays(model, monkeypatch):
    small = build_avatar_model(preset("small"), seed=1).requires_grad_(False)
    assert small.lattice() == 0  # gradients may be wanted
    with torch.no_grad():
        assert small.lattice() == LATTICE and small.lattice(raw_resolution=8) == 0 and model.lattice() == 0
        asked = []
        monkeypatch.setattr(small.generator, "image_of", lambda field, *rest: asked.append(field))
        sizes = (3, 32, 64, 64), (3, 32, 64, 64), (1, 1, 1), (small.generator.num_ws, 256), (100,)
        face = Avatar(*(torch.zeros(1, *s) for s in sizes), SOURCE[0], torch.zeros(1, 3, 64, 64))
        for lattice in (None, 0):
            small.render(face, BETA[:1], SOURCE[0], lattice=lattice)
    small.render(face, BETA[:1], SOURCE[0])
    assert [getattr(field, "offsets", None) is not None for field in asked] == [True, False, False]


def test_faces_do_not_see_each_other(model, avatar):
    alone = model.reconstruct(IMAGE[1:], SOURCE[1], ALPHA[1:], BETA[1:])
    for name, t in avatar[1].tensors().items():
        close(alone.tensors()[name], t, 1e-4)
    close(model.render(alone, BETA[1:], SOURCE[1]).raw, model.render(avatar, BETA, SOURCE).raw[1:], 2e-3)


def test_one_goes_with_many(model, avatar):
    ring = Camera.orbit(torch.linspace(-.4, .4, 3), torch.zeros(3))
    many = torch.rand(3, 52, generator=draw("many"))
    both = model.render(avatar[0], many, ring)
    for i in range(3):
        close(both.raw[i], model.render(avatar[0], many[i:i + 1], ring[i], chunk=37).raw[0], 2e-3)
    assert len(model.render(avatar, many[:1], ring[0], raw_resolution=4).raw) == 2
    with pytest.raises(InputError, match="avatar, beta, camera, alpha must be 1 of each, or 3"):
        model.render(avatar, many, SOURCE)


def slope(model, wanted):
    leaves = dict(alpha=ALPHA.clone().requires_grad_(), beta=BETA.clone().requires_grad_())
    made = replace(model.reconstruct(IMAGE, SOURCE, ALPHA), alpha=leaves["alpha"])
    loss = model.render(made, leaves["beta"], SOURCE).raw.square().sum()
    return torch.autograd.grad(loss, leaves[wanted], allow_unused=True, materialize_grads=True)[0]


def test_ablations_reach_the_picture(model):
    without = model_of(use_identity=False)
    assert (slope(model, "alpha") != 0).any() and (slope(model, "beta") != 0).any()
    assert (slope(without, "alpha") == 0).all() and (slope(without, "beta") != 0).any()
    names = build_avatar_model(SMOKE, use_weights=False).state_dict()
    assert not [name for name in names if "w_net" in name] and [n for n in model.state_dict() if "w_net" in n]


# --- training ---------------------------------------------------------------------------------------------------------
def test_gradients_reach_every_part():
    model = model_of("readings.residual=aligned").requires_grad_(True)
    made = model.reconstruct(IMAGE, SOURCE, ALPHA, BETA)
    (model.render(made, BETA, SOURCE).image - IMAGE).square().mean().backward()
    G = model.generator
    parts = [model.encoder, G.backbone.synthesis, G.decoder, G.superresolution, model.detail,
             model.fusion, model.deformation.d_net, model.deformation.w_net, model.alignment.unet.last]
    for part in parts:
        largest = max(float(p.grad.abs().max()) for p in part.parameters() if p.grad is not None)
        assert math.isfinite(largest) and largest > 0
    assert model.generator.backbone.mapping.fc0.weight.grad is None  # the encoder stands in for it
    assert not made.detach().planes.requires_grad and made.planes.requires_grad


# --- building ---------------------------------------------------------------------------------------------------------
def test_seeds_and_the_global_generator():
    before = torch.random.get_rng_state()
    first, same, other = (build_avatar_model("smoke", seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), same.state_dict().values(), strict=True))
    for part in ("generator", "encoder", "detail", "fusion", "deformation"):
        states = [list(getattr(m, part).parameters()) for m in (first, other)]
        assert not all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_a_generator_may_be_handed_in():
    G = build_generator(SMOKE.generator, 9, plane_axes="distinct", mapping_width=20)
    assert build_avatar_model("smoke", generator=G).generator is G
    with pytest.raises(InputError, match="generator must be of the sizes of preset small"):
        build_avatar_model("small", generator=G)


def test_alignment_goes_with_its_reading(fresh):
    parts = fresh.generator, fresh.encoder, fresh.detail, fresh.fusion, fresh.deformation
    with pytest.raises(InputError, match="alignment must be given exactly where"):
        AvatarModel(*parts, override(SMOKE, "readings.residual=aligned"))


# --- avatar files -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fusion,beta", [("64", BETA), ("planes", None)], ids=["feature", "planes"])
def test_saved_and_loaded_is_the_same(tmp_path, fusion, beta):
    model = model_of(f"readings.fusion={fusion}")
    made = model.reconstruct(IMAGE, SOURCE, ALPHA, beta)
    made.save(tmp_path / "a.safetensors", model)
    back = Avatar.load(tmp_path / "a.safetensors", model)
    names = set(made.tensors())
    assert names == set(back.tensors())
    assert ("drawn" in names) == (fusion == "64") and ("beta" in names) == (beta is not None)
    assert all(torch.equal(t, back.tensors()[name]) for name, t in made.tensors().items())
    drawn = model.render(back, BETA, SOURCE).image  # other strides, other order of sums
    torch.testing.assert_close(drawn, model.render(made, BETA, SOURCE).image, rtol=1e-5, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    about = load_tensors(tmp_path / "a.safetensors")[1]
    assert about == {"kind": "nofa_nb avatar", "format": "1", "preset": "smoke", "generator": model.generator_hash()}


def test_sixteen_bits(tmp_path, model, avatar):
    for name, half in (("a", False), ("b", True)):
        avatar.save(tmp_path / name, model, half)
    assert (tmp_path / "b").stat().st_size < .6 * (tmp_path / "a").stat().st_size
    back = Avatar.load(tmp_path / "b", model)
    for name in ("ws", "alpha", "beta", "camera"):
        assert torch.equal(avatar.tensors()[name], back.tensors()[name])
    assert back.planes.dtype == torch.float32 and torch.equal(back.planes, avatar.planes.half().float())
    with pytest.raises(InputError, match="within"):
        replace(avatar, planes=avatar.planes * 1e6).save(tmp_path / "c", model, half=True)
    assert not (tmp_path / "c").exists()


@pytest.fixture(scope="module")
def file(tmp_path_factory, model, avatar):
    path = tmp_path_factory.mktemp("avatars") / "a.safetensors"
    avatar.save(path, model)
    return path


def changed(file, path, drop=(), tensors=None, **about):
    "A copy of an avatar file with other contents."
    stored, record = load_tensors(file)
    save_tensors(path, {k: t for k, t in (stored | (tensors or {})).items() if k not in drop}, record | about)
    return path


@pytest.mark.parametrize("damage,said", [
    (lambda f, p: p.write_bytes(f.read_bytes()[:-100]), "cannot read the tensors .* damaged, cut off"),
    (lambda f, p: p.write_bytes(f.read_bytes()[:5]), "cannot read the tensors"),
    (lambda f, p: p.write_bytes(b"\x89PNG\r\n" + bytes(100)), "cannot read the tensors"),
    (lambda f, p: save_tensors(p, {"x": torch.zeros(2)}, {"kind": "nofa_nb motion"}), "of kind 'nofa_nb motion'"),
    (lambda f, p: save_tensors(p, {"x": torch.zeros(2)}), "of kind 'unknown'"),
    (lambda f, p: changed(f, p, format="2"), "format of .* must be 1, got 2: update nofa_nb"),
    (lambda f, p: changed(f, p, drop=["ws"]), "tensors of .* the file is damaged"),
    (lambda f, p: changed(f, p, tensors={"more": torch.zeros(1)}), "tensors of .* the file is damaged"),
    (lambda f, p: changed(f, p, tensors={"alpha": torch.zeros(3, 100)}), r"alpha must be \(2, a\), got \(3, 100\)"),
    (lambda f, p: changed(f, p, tensors={"camera": torch.zeros(2, 25)}), "label must be a matrix"),
    (lambda f, p: changed(f, p, generator="0" * 64), "generator of .* must be the one that is loaded"),
], ids=["truncated", "stump", "picture", "other kind", "no kind", "other format", "part missing", "part too many",
        "other count", "no camera", "other generator"])
def test_file_faults(tmp_path, file, model, damage, said):
    path = tmp_path / "bad.safetensors"
    damage(file, path)
    with pytest.raises(InputError, match=said):
        Avatar.load(path, model)


def test_a_file_of_another_generator_can_be_looked_into(tmp_path, file):
    path = changed(file, tmp_path / "other", generator="0" * 64)
    assert len(Avatar.load(path)) == 2
    with pytest.raises(MissingResource):
        Avatar.load(tmp_path / "none")


def test_indexing(avatar):
    assert len(avatar[1:]) == len(avatar[-1]) == 1 and torch.equal(avatar[-1].ws, avatar.ws[1:])
    assert torch.equal(avatar[torch.tensor([1, 0])].camera.label, avatar.camera.label.flip(0))
    with pytest.raises(IndexError, match="face 2 of 2"):
        avatar[2]
    with pytest.raises(InputError, match="avatar must be 1 face, or 3, got 2"):
        avatar.expand(3)


# --- weights ----------------------------------------------------------------------------------------------------------
def test_weights_there_and_back(tmp_path, monkeypatch):
    G = build_generator(SMOKE.generator, 9, plane_axes="distinct", mapping_width=20)
    changes = ["readings.fusion=128", "generator.depth_coarse=7"]
    model = build_avatar_model(override(SMOKE, *changes), generator=G, use_weights=False, use_identity=False)
    save_avatar_model(tmp_path / "smoke" / "avatar", model, {"licence": "Apache-2.0"})
    monkeypatch.setenv("NOFA_WEIGHTS", str(tmp_path))
    back = load_avatar_model("smoke")
    assert back.preset == model.preset and back.generator.plane_axes == "distinct" and not back.training
    assert not back.deformation.use_weights and not back.deformation.use_identity
    assert not any(p.requires_grad for p in back.parameters())
    for name, t in model.state_dict().items():
        close(back.state_dict()[name], t, 1e-3 * float(t.abs().max()) + 6e-8 if t.is_floating_point() else 0)
    again = load_avatar_model(tmp_path / "smoke" / "avatar")
    assert again.generator_hash() == back.generator_hash() != model.generator_hash()


def test_weights_faults(tmp_path, monkeypatch, fresh):
    monkeypatch.setenv("NOFA_WEIGHTS", str(tmp_path))
    with pytest.raises(MissingResource, match="smoke/avatar"):
        load_avatar_model("smoke")
    record = {"licence": "Apache-2.0", "kind": "3D generator", "preset": "smoke", "config": {"x": 1}}
    save_weights(tmp_path / "prior", fresh.generator.state_dict(), record)
    with pytest.raises(InputError, match="must be of an avatar model, got of kind '3D generator'"):
        load_avatar_model(tmp_path / "prior")
    larger = build_avatar_model(SMOKE)
    larger.fusion = build_avatar_model(override(SMOKE, "readings.fusion=128")).fusion
    save_avatar_model(tmp_path / "odd", larger, {"licence": "Apache-2.0"})
    with pytest.raises(InputError, match="others for fusion"):
        load_avatar_model(tmp_path / "odd")


# --- faults -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call,said", [
    (lambda m: m.reconstruct(IMAGE[..., :16], SOURCE, ALPHA), r"image must be \(b, 3, 32, 32\), got \(2, 3, 32, 16\)"),
    (lambda m: m.reconstruct(IMAGE[0], SOURCE, ALPHA), r"image must be \(b, 3, 32, 32\)"),
    (lambda m: m.reconstruct(IMAGE, SOURCE, ALPHA[:1]), r"alpha must be \(2, 100\), got \(1, 100\)"),
    (lambda m: m.reconstruct(IMAGE, SOURCE, ALPHA, BETA[:, :5]), r"beta must be \(2, 52\), got \(2, 5\)"),
    (lambda m: m.reconstruct(IMAGE, Camera.orbit(torch.zeros(3), 0), ALPHA), "camera must be one camera, or 2"),
    (lambda m: m.render(m.reconstruct(IMAGE, SOURCE, ALPHA), BETA[:, :5], SOURCE), r"beta must be \(2, 52\)"),
    (lambda m: model_of("readings.fusion=32"), "readings.fusion must be a feature of the generator"),
    (lambda m: model_of("readings.residual=deformed").reconstruct(IMAGE, SOURCE, ALPHA), "beta must be the expression"),
])
def test_faults_name_the_argument(model, call, said):
    with pytest.raises(InputError, match=said):
        call(model)
