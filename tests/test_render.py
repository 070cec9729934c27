"""The fused renderer: parity with its twin, with the Renderer and with EG3D's numbers; gradients; threads; faults."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.errors import InputError
from nofa_nb.geometry.cameras import Camera
from nofa_nb.geometry.rays import rays
from nofa_nb.geometry.sampling import draw_numbers, ray_bounds, stratified_depths
from nofa_nb.layers.stylegan import initial_weights
from nofa_nb.models.renderer import Renderer, Rendering, composite, query
from nofa_nb.models.triplane import Decoder, TriplaneField
from nofa_nb.ops import extension as module
from nofa_nb.ops.render import pack_planes, render_triplane, render_triplane_ref

ROOT = Path(__file__).resolve().parents[1]
FEATURES, DEPTH = 5e-6, 1e-5  # the largest difference that parity allows
EXAMPLES = int(os.environ.get("NOFA_EXAMPLES", "1000"))  # random configurations, of both kinds


@pytest.fixture(scope="module")
def fused():
    "The instruction sets of this processor; skips where nothing can be compiled."
    reason = module.extension()
    if reason:
        pytest.skip(f"no compiled operators: {reason}")
    return module.instruction_sets()


# ---- scenes

def layers(decoder):
    "Weights and biases with their gains folded in."
    linear = [m for m in decoder.net if hasattr(m, "weight")]
    return ([m.weight * (m.lr_multiplier / m.weight.shape[1] ** 0.5) for m in linear],
            [m.bias * m.lr_multiplier for m in linear])


def through(renderer, field, origins, directions, random=None, **options):
    "What Renderer.render does, with the fused operator."
    near, far = ray_bounds(origins, directions, renderer.ray_start, renderer.ray_end, renderer.box_warp)
    first, second = draw_numbers(random, *origins.shape[:2], renderer.depth_coarse, renderer.depth_fine, origins)
    depths = stratified_depths(near, far, first, renderer.disparity)
    seen = render_triplane(field.planes, *layers(field.decoder), origins, directions, depths,
                           second if renderer.depth_fine else None, field.box_warp, field.plane_axes,
                           renderer.white_back, **options)
    return Rendering(seen.features, seen.depth.clamp(depths.min(), depths.max()), seen.weight)


def scene(seed, batch=2, number=9, channels=8, size=(6, 7), widths=(16, 4), samples=6, fine=5, lattice=0, box=1.0):
    "Arguments of render_triplane, in float64; rays from all sides, some of them past the box."
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    sizes = [channels, *widths]
    directions = F.normalize(draw(batch, number, 3), dim=-1)
    origins = 0.3 * box * draw(batch, number, 3) - 2.7 * directions
    depths = 2.1 + 1.2 * torch.rand(batch, number, samples, generator=g, dtype=torch.float64)
    numbers = torch.rand(batch, number, fine, generator=g, dtype=torch.float64) if fine else None
    made = dict(planes=draw(batch, 3, channels, *size), origins=origins, directions=directions,
                depths=depths.sort(-1)[0] if fine else depths, numbers=numbers, box_warp=box,
                weights=[draw(o, i) / i**0.5 for i, o in zip(sizes, sizes[1:])], biases=[draw(o) for o in sizes[1:]],
                offsets=0.1 * draw(batch, lattice, lattice, lattice, 3) if lattice else None)
    return each(made, lambda t: t.float().double())  # numbers that float32 can hold


def each(value, change):
    if isinstance(value, dict):
        return {k: each(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [each(v, change) for v in value]
    return change(value) if isinstance(value, torch.Tensor) else value


def single(arguments):
    return each(arguments, torch.Tensor.float)


def apart(a, b):
    "Largest differences of features, depth and weight. On rays with hardly any weight a depth is mostly rounding."
    found = [(x.double() - y.double()).nan_to_num(0, 0, 0).abs() for x, y in zip(a, b)]
    found[1] = found[1] * (b[2].double() / 0.01).clamp(max=1)
    assert torch.equal(a[1].isinf() & (b[2] > 1e-6), b[1].isinf() & (b[2] > 1e-6))
    return [t.max().item() for t in found]


def close(a, b):
    errors = apart(a, b)
    assert errors[0] <= FEATURES and errors[1] <= DEPTH and errors[2] <= FEATURES, errors


# ---- the twin is the Renderer

@pytest.mark.parametrize("white,axes,fine", [(False, "eg3d", 5), (True, "distinct", 0)])
def test_the_twin_is_the_renderer(white, axes, fine):
    with initial_weights(0):
        decoder = Decoder(8, 3, 16, 2).double().requires_grad_(False)
    planes = scene(1)["planes"]
    o, d = (t.double() for t in rays(Camera.orbit(torch.tensor([-0.3, 0.4]), 0.1), 4, 4))
    field, renderer = TriplaneField(planes, decoder, 1.2, axes), Renderer(6, fine, white_back=white, box_warp=1.2)
    numbers = draw_numbers(torch.Generator().manual_seed(2), 2, 16, 6, fine, o)
    plain = lambda points, directions: field(points, directions)  # noqa: E731, hides what the renderer would hand on
    for a, b in zip(through(renderer, field, o, d, numbers, backend="torch"), renderer.render(plain, o, d, numbers)):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


# ---- parity

@pytest.fixture(scope="module")
def eg3d():
    with np.load(Path(__file__).parent / "fixtures" / "eg3d_tiny_parity.npz", allow_pickle=False) as f:
        return {k: torch.from_numpy(f[k]) for k in f.files
                if k.startswith(("render_", "in/small", "state/decoder"))}


@pytest.mark.parametrize("name,options", [
    ("base", {}), ("white_back", {"white_back": True}), ("auto", {"ray_start": "auto", "ray_end": "auto"}),
    ("disparity", {"disparity": True}), ("no_importance", {"depth_fine": 0}),
    ("boxwarp1.6_12_20", dict(depth_coarse=12, depth_fine=20, ray_start=0.1, ray_end=2.6, box_warp=1.6)),
])
def test_parity_with_eg3d(eg3d, fused, name, options):
    decoder = Decoder(32)
    decoder.load_state_dict({k.removeprefix("state/decoder."): v for k, v in eg3d.items() if k.startswith("state/")})
    renderer = Renderer(**{"depth_coarse": 8, "depth_fine": 8} | options)
    field = TriplaneField(eg3d["in/small_planes"], decoder, renderer.box_warp)
    first = eg3d[f"render_{name}/rand_coarse"][..., 0]
    second = eg3d.get(f"render_{name}/rand_fine", torch.zeros(128, 0)).reshape(1, 128, -1)
    expected = [eg3d[f"render_{name}/{k}"] for k in ("feature", "depth", "weights_sum")]
    for instructions in fused:
        with torch.no_grad():
            seen = through(renderer, field, eg3d["in/small_ray_origins"], eg3d["in/small_ray_dirs"], (first, second),
                           backend="fused", instructions=instructions)
        close(seen, expected)


@settings(max_examples=EXAMPLES * 7 // 10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 2), number=st.integers(1, 25), channels=st.integers(1, 40),
       size=st.tuples(st.integers(1, 20), st.integers(1, 20)), hidden=st.lists(st.integers(1, 70), max_size=2),
       features=st.integers(1, 35), samples=st.integers(1, 50), fine=st.integers(0, 50),
       lattice=st.sampled_from([0, 0, 2, 5]), box=st.sampled_from([0.5, 1.0, 1.6]),
       axes=st.sampled_from(["eg3d", "distinct"]), white=st.booleans(), which=st.integers(0, 2))
def test_parity_of_any_configuration(fused, which, white, axes, samples, fine, hidden, features, **options):
    fine = fine if samples >= 4 else 0
    arguments = scene(samples=samples, fine=fine, widths=(*hidden, 1 + features), **options)
    options = dict(white_back=white, plane_axes=axes)
    truth = render_triplane_ref(**arguments, **options)
    seen = render_triplane(**single(arguments), **options, backend="fused", instructions=fused[which % len(fused)])
    twin = render_triplane_ref(**single(arguments), **options)
    own = apart(twin, truth)  # float32 alone is that far off; with samples close together a depth can jump
    for error, mine, limit in zip(apart(seen, truth), own, (FEATURES, DEPTH, FEATURES)):
        assert error <= limit + 3 * mine


def test_one_ray_one_sample_and_ties(fused):
    for instructions in fused:
        one = single(scene(3, batch=1, number=1, samples=1, fine=0))
        seen = render_triplane(**one, backend="fused", instructions=instructions)
        assert (seen.features == -1).all() and seen.weight.item() == 0 and seen.depth.isinf().all()
        tied = single(scene(4, samples=20, fine=0))
        tied["depths"] = tied["depths"][..., :5].repeat(1, 1, 4)
        close(render_triplane(**tied, backend="fused", instructions=instructions), render_triplane_ref(**tied))


def test_rays_that_miss_the_box_see_the_decoder_at_zero(fused):
    arguments = single(scene(5))
    arguments["origins"] = arguments["origins"] + torch.tensor([1e6, 0, 0])
    for instructions in fused:
        seen = render_triplane(**arguments, backend="fused", instructions=instructions)
        close(seen, render_triplane_ref(**arguments))


def test_steep_densities(fused):
    arguments = scene(6, widths=(4,), samples=30, fine=20)
    arguments["weights"][0][0] *= 1e4
    for instructions in fused:
        seen = render_triplane(**single(arguments), backend="fused", instructions=instructions)
        assert seen.features.isfinite().all() and seen.weight.max() <= 1 + 1e-6
        assert (seen.weight - render_triplane_ref(**arguments).weight).abs().median() < 1e-4


def test_strides_and_packed_planes_change_nothing(fused):
    arguments = single(scene(7, channels=16))
    whole = render_triplane(**arguments, backend="fused")
    turned = lambda t: t.mT.contiguous().mT  # noqa: E731
    changes = dict(planes=pack_planes(arguments["planes"]), **{k: turned(arguments[k]) for k in ("origins", "depths")})
    assert not changes["origins"].is_contiguous() and changes["planes"].movedim(2, 4).is_contiguous()
    for name, value in changes.items():
        for a, b in zip(whole, render_triplane(**arguments | {name: value}, backend="fused")):
            assert torch.equal(a, b)


def test_planes_through_the_first_layer_are_the_same(fused):
    "With many samples the planes go through the decoder's first matrix, with few the samples do."
    arguments = single(scene(17, batch=1, number=150, channels=16, size=(24, 24), widths=(32, 5), samples=20, fine=20))
    rays = ("origins", "directions", "depths", "numbers")
    for instructions in fused:
        options = dict(backend="fused", instructions=instructions)
        whole = render_triplane(**arguments, **options)
        parts = zip(*(render_triplane(**arguments | {k: arguments[k][:, i:i + 15] for k in rays}, **options)
                      for i in range(0, 150, 15)))
        parts = [torch.cat(p, 1) for p in parts]
        assert not torch.equal(whole.features, parts[0])  # the order of the sums differs
        close(whole, parts)


@pytest.mark.parametrize("white", [False, True])
def test_what_a_surface_hides_changes_nothing(fused, white):
    arguments = scene(18, number=40, channels=16, widths=(32, 20), samples=30, fine=20, box=2.0)
    arguments["weights"][-1][0] *= 40
    truth = render_triplane_ref(**arguments, white_back=white)
    own = apart(render_triplane_ref(**single(arguments), white_back=white), truth)
    for instructions in fused:
        seen = render_triplane(**single(arguments), white_back=white, backend="fused", instructions=instructions)
        for error, mine, limit in zip(apart(seen, truth), own, (FEATURES, DEPTH, FEATURES)):
            assert error <= limit + 3 * mine


# ---- gradients

def gradients(arguments, **options):
    names = [k for k in ("planes", "weights", "biases", "origins", "directions", "offsets") if arguments[k] is not None]
    leaves = each({k: arguments[k] for k in names}, lambda t: t.clone().requires_grad_())
    seen = render_triplane(**arguments | leaves, **options)
    g = torch.Generator().manual_seed(0)
    loss = sum((t.where(t.isfinite(), 0) * torch.randn(t.shape, generator=g).to(t.device)).sum() for t in seen)
    flat = [t for v in leaves.values() for t in (v if isinstance(v, list) else [v])]
    return torch.autograd.grad(loss, flat)


@settings(max_examples=EXAMPLES * 3 // 10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 2), number=st.integers(1, 20), channels=st.integers(1, 40),
       size=st.tuples(st.integers(2, 20), st.integers(2, 20)), hidden=st.lists(st.integers(1, 70), max_size=2),
       features=st.integers(1, 35), samples=st.integers(2, 40), lattice=st.sampled_from([0, 0, 2, 5]),
       white=st.booleans(), which=st.integers(0, 2))
def test_gradients_are_those_of_the_twin(fused, which, white, hidden, features, samples, **options):
    arguments = scene(samples=samples, fine=0, widths=(*hidden, 1 + features), **options)
    truth = gradients(arguments, white_back=white, backend="torch")
    twin = gradients(single(arguments), white_back=white, backend="torch")
    seen = gradients(single(arguments), white_back=white, backend="fused", instructions=fused[which % len(fused)])
    largest = max(t.abs().max().item() for t in truth)  # a small gradient may be what is left of large ones
    for exact, own, found in zip(truth, twin, seen):
        scale = exact.abs().max().item()
        allowed = 2e-5 * scale + 2e-6 * largest + 3 * (own - exact).abs().max().item() + 1e-9
        assert found.shape == exact.shape and (found - exact).abs().max().item() <= allowed


def test_gradients_with_a_fine_pass(fused):
    arguments = scene(8, number=60, samples=16, fine=16, widths=(32, 9), channels=16, size=(16, 16))
    truth = gradients(arguments, backend="torch")
    for instructions in fused:
        for exact, found in zip(truth, gradients(single(arguments), backend="fused", instructions=instructions)):
            assert (found - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_the_twins_gradients_are_finite_differences():
    tiny = scene(9, batch=1, number=2, channels=2, size=(3, 4), widths=(3, 3), samples=4, fine=0, lattice=2)
    for name in ("planes", "offsets", "origins"):
        def run(t, name=name):
            return tuple(render_triplane(**tiny | {name: t}, backend="torch"))[::2]

        assert torch.autograd.gradcheck(run, (tiny[name].clone().requires_grad_(),))


def test_only_what_is_wanted_and_never_twice(fused):
    arguments = single(scene(10))
    planes = arguments["planes"].clone().requires_grad_()
    seen = render_triplane(**arguments | dict(planes=planes), backend="fused")
    (gradient,) = torch.autograd.grad(seen.features.square().sum(), planes, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    assert not render_triplane(**arguments, backend="fused").features.requires_grad
    with torch.no_grad():
        assert not render_triplane(**arguments | dict(planes=planes), backend="fused").features.requires_grad


def test_the_prior_s_way_through(fused):
    "Samples in any order, as training.prior.trace has them."
    with initial_weights(1):
        decoder = Decoder(8, 4, 16, 2)
    arguments = single(scene(11, samples=20, fine=0))
    field = TriplaneField(arguments["planes"].requires_grad_(), decoder)
    where = arguments["origins"], arguments["directions"], arguments["depths"]
    plain = composite(*query(field, *where), where[2])
    quick = render_triplane(field.planes, *layers(decoder), *where, backend="fused")
    close(quick, plain)
    leaves = [field.planes, *decoder.parameters()]
    for a, b in zip(*(torch.autograd.grad(s.features.square().sum() + s.weight.sum(), leaves) for s in (quick, plain))):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-7


# ---- threads and processes

def everything(arguments):
    return [*render_triplane(**arguments, backend="fused"), *gradients(arguments, backend="fused")]


def large():
    return single(scene(12, batch=3, number=81, channels=32, size=(20, 20), widths=(32, 32, 5), samples=24, fine=0,
                        lattice=4))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_results_do_not_depend_on_threads(fused):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(everything(large()))
    finally:
        torch.set_num_threads(before)
    assert all(same(found[0], other) for other in found[1:])


def test_several_python_threads(fused):
    arguments = large()
    expected = everything(arguments)
    with ThreadPoolExecutor(4) as pool:
        assert all(same(expected, found) for found in pool.map(lambda _: everything(arguments), range(8)))


def _child(pipe, arguments, threads):
    torch.set_num_threads(threads)
    with torch.no_grad():
        pipe.send([t.numpy() for t in render_triplane(**arguments, backend="fused")])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
def test_a_forked_process_renders(fused):
    arguments = large()
    expected = render_triplane(**arguments, backend="fused")  # the parent has had threads
    context = multiprocessing.get_context("fork")
    for threads in (1, 3):
        here, there = context.Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            child = context.Process(target=_child, args=(there, arguments, threads), daemon=True)
            child.start()
        assert here.poll(60), "the child hangs"
        assert same(expected, [torch.from_numpy(a) for a in here.recv()])
        child.join(10)
        assert child.exitcode == 0


# ---- faults

@pytest.mark.parametrize("name", ["planes", "origins", "directions", "depths", "numbers", "offsets", "weights",
                                  "biases"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused(name, value):
    arguments = single(scene(13, lattice=2))
    target = arguments[name][0] if isinstance(arguments[name], list) else arguments[name]
    target.view(-1)[-1] = value
    for backend in ["torch"] if module.extension() else ["torch", "fused"]:
        with pytest.raises(InputError, match=f"{name}|ascending"):
            render_triplane(**arguments, backend=backend)


@pytest.mark.parametrize("change,word", [
    (dict(planes=torch.zeros(2, 2, 8, 6, 7)), "planes"), (dict(origins=torch.zeros(2, 8, 3)), "directions"),
    (dict(depths=torch.zeros(2, 9)), "depths"), (dict(numbers=torch.zeros(2, 8, 5)), "numbers"),
    (dict(depths=torch.zeros(2, 9, 3)), "at least 4"), (dict(weights=[torch.zeros(4, 8)]), "weights"),
    (dict(offsets=torch.zeros(2, 3, 3, 4, 3)), "offsets"), (dict(offsets=torch.zeros(2, 1, 1, 1, 3)), "offsets"),
    (dict(box_warp=0.0), "box_warp"), (dict(plane_axes="xyz"), "plane_axes"), (dict(backend="cuda"), "backend"),
    (dict(depths=torch.linspace(3, 2, 6).expand(2, 9, 6)), "ascending"),
    (dict(origins=torch.zeros(2, 0, 3), directions=torch.zeros(2, 0, 3), depths=torch.zeros(2, 0, 6),
          numbers=torch.zeros(2, 0, 5)), "at least one"),
])
def test_bad_arguments_are_refused(change, word):
    with pytest.raises(InputError, match=word):
        render_triplane(**single(scene(14)) | change)


def test_what_the_operator_cannot_do_goes_to_the_twin(fused):
    deep = single(scene(15, widths=(4, 4, 4, 3)))
    moving = single(scene(15))
    moving["depths"].requires_grad_()
    for arguments, word in ((scene(15), "float64"), (deep, "hidden layers"), (moving, "gradient")):
        with torch.no_grad():
            assert same(render_triplane(**arguments), render_triplane_ref(**arguments))
        with pytest.raises(InputError, match=word):
            render_triplane(**arguments, backend="fused")


# ---- the extension

def unloaded(monkeypatch):
    "As if nothing had been asked for yet."
    monkeypatch.setattr(module, "_answer", [])
    monkeypatch.setattr(module, "_loaded", lambda: False)


def test_without_a_compiler_there_is_one_warning(monkeypatch, tmp_path):
    unloaded(monkeypatch)
    for name, value in (("NOFA_CACHE", str(tmp_path)), ("CXX", "no-such-compiler"), ("NOFA_BUILD", "1")):
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match="plain PyTorch.*install g") as said:
        assert "install g" in module.extension()
        seen = render_triplane(**single(scene(16)))
    assert len(said) == 1 and same(seen, render_triplane_ref(**single(scene(16))))


def test_a_build_that_fails_says_so_and_leaves_nothing(monkeypatch, tmp_path):
    def breaks(folder):
        raise RuntimeError("error: expected ';'")

    unloaded(monkeypatch)
    monkeypatch.setattr(module, "_compile", breaks)
    monkeypatch.setattr(module, "build_fault", lambda: "")
    monkeypatch.setenv("NOFA_CACHE", str(tmp_path))
    monkeypatch.setenv("NOFA_BUILD", "1")
    with pytest.warns(UserWarning, match="expected ';'"):
        assert module.extension()
    assert [p.name for p in module.library_path().parent.iterdir()] == ["lock"]


def test_no_build_when_told_so(monkeypatch, tmp_path):
    unloaded(monkeypatch)
    monkeypatch.setenv("NOFA_CACHE", str(tmp_path))
    monkeypatch.setenv("NOFA_BUILD", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.extension() == "NOFA_BUILD is 0"


def test_a_broken_library_is_named(monkeypatch, tmp_path):
    unloaded(monkeypatch)
    monkeypatch.setenv("NOFA_CACHE", str(tmp_path))
    module.library_path().parent.mkdir(parents=True)
    module.library_path().write_bytes(b"no library")
    with pytest.warns(UserWarning, match="delete it"):
        assert str(module.library_path()) in module.extension()


STAND_IN = """
from pathlib import Path
import os
def extension():
    Path(os.environ["MARK"]).write_text("asked")
    return os.environ["ANSWER"]
"""


@pytest.mark.parametrize("build,answer,said", [
    ("0", "", ""), ("1", "", "are compiled"), ("1", "no compiler", "first use"),
])
def test_installing_compiles_unless_told_not_to(tmp_path, build, answer, said):
    "A compiler that is missing never breaks an installation."
    for name in ("setup.py", "settings.ini", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "nofa_nb" / "ops").mkdir(parents=True)
    for name, text in (("__init__.py", ""), ("ops/__init__.py", ""), ("ops/extension.py", STAND_IN)):
        (tmp_path / "nofa_nb" / name).write_text(text)
    environment = os.environ | {"NOFA_BUILD": build, "ANSWER": answer, "MARK": str(tmp_path / "mark")}
    command = [sys.executable, "setup.py", "-q", "build_py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert said in done.stdout and (tmp_path / "mark").exists() == (build == "1")
