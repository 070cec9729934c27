"""The renderer's CUDA kernels: arithmetic on an emulated GPU, that nvcc takes them, a GPU where there is one."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_render import DEPTH, FEATURES, apart, each, gradients, scene, single

from nofa_nb.core.errors import InputError
from nofa_nb.ops import extension as module
from nofa_nb.ops import render
from nofa_nb.ops.render import render_triplane, render_triplane_ref

HERE = Path(__file__).resolve().parent / "cuda"
THREADS = 32  # of an emulated block: fewer than on a GPU, as changing from one to the next takes time


def compile_emulated(folder):
    from torch.utils.cpp_extension import include_paths, library_paths
    target = folder / "emulated.so"
    flags = ["-std=c++20", "-O2", "-fPIC", "-DNOFA_EMULATED", f"-DNOFA_THREADS={THREADS}"]
    flags += [f"-I{module.CSRC}", f"-I{HERE}"]
    flags += [x for p in include_paths() for x in ("-isystem", p)]
    jobs = [subprocess.Popen([module.compiler(), *flags, "-x", "c++", "-c", str(s), "-o", str(folder / f"{s.name}.o")])
            for s in module.sources(cuda=True)]
    assert not any([job.wait() for job in jobs])
    objects = [str(folder / f"{s.name}.o") for s in module.sources(cuda=True)]
    subprocess.run([module.compiler(), "-shared", *objects, "-o", str(target), f"-L{library_paths()[0]}",
                    "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    torch.ops.load_library(str(target))
    return target


@pytest.fixture(scope="module")
def emulated():
    "The CUDA operators on CPU tensors, through the same door."
    if module.build_fault():
        pytest.skip(f"nothing can be compiled: {module.build_fault()}")
    key = hashlib.sha256((module.build_key(cuda=True) + (HERE / "emulator.h").read_text()).encode()).hexdigest()[:16]
    path = module.library_path().parents[1] / f"emulated-{key}" / "emulated.so"
    if not module.build(path, say=False, make=compile_emulated):
        torch.ops.load_library(str(path))
    patch = pytest.MonkeyPatch()
    patch.setattr(render, "_operators", lambda device: torch.ops.nofa_nb_emulated)
    patch.setattr(render, "extension", lambda: "")
    yield torch.ops.nofa_nb_emulated
    patch.undo()


def agree(arguments, **options):
    truth = render_triplane_ref(**arguments, **options)
    twin = render_triplane_ref(**single(arguments), **options)
    seen = render_triplane(**single(arguments), **options, backend="fused")
    for error, own, limit in zip(apart(seen, truth), apart(twin, truth), (FEATURES, DEPTH, FEATURES)):
        assert error <= limit + 3 * own


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 2), number=st.integers(1, 12), channels=st.integers(1, 36),
       size=st.tuples(st.integers(1, 12), st.integers(1, 12)), hidden=st.lists(st.integers(1, 70), max_size=2),
       features=st.integers(1, 35), samples=st.integers(1, 40), fine=st.integers(0, 40),
       lattice=st.sampled_from([0, 2, 5]), box=st.sampled_from([0.5, 1.0, 1.6]),
       axes=st.sampled_from(["eg3d", "distinct"]), white=st.booleans())
def test_parity_of_any_configuration(emulated, white, axes, samples, fine, hidden, features, **options):
    arguments = scene(samples=samples, fine=fine if samples >= 4 else 0, widths=(*hidden, 1 + features), **options)
    agree(arguments, white_back=white, plane_axes=axes)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 2), number=st.integers(1, 12), channels=st.integers(1, 36),
       size=st.tuples(st.integers(2, 12), st.integers(2, 12)), hidden=st.lists(st.integers(1, 70), max_size=2),
       features=st.integers(1, 35), samples=st.integers(2, 40), lattice=st.sampled_from([0, 2, 5]), white=st.booleans())
def test_gradients_are_those_of_the_twin(emulated, white, hidden, features, samples, **options):
    arguments = scene(samples=samples, fine=0, widths=(*hidden, 1 + features), **options)
    truth = gradients(arguments, white_back=white, backend="torch")
    twin = gradients(single(arguments), white_back=white, backend="torch")
    seen = gradients(single(arguments), white_back=white, backend="fused")
    largest = max(t.abs().max().item() for t in truth)
    for exact, own, found in zip(truth, twin, seen):
        scale = exact.abs().max().item()
        allowed = 2e-5 * scale + 2e-6 * largest + 3 * (own - exact).abs().max().item() + 1e-9
        assert found.shape == exact.shape and (found - exact).abs().max().item() <= allowed


def test_no_barrier_is_missing(emulated, monkeypatch):
    "The threads of a block in the opposite order: the same results, forward bit for bit."
    arguments = single(scene(1, number=20, channels=32, size=(16, 16), widths=(64, 33), samples=24, fine=24, lattice=4))
    first = [*render_triplane(**arguments, backend="fused"), *gradients(arguments, backend="fused")]
    monkeypatch.setenv("NOFA_BACKWARDS", "1")
    second = [*render_triplane(**arguments, backend="fused"), *gradients(arguments, backend="fused")]
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3]))
    for a, b in zip(first[3:], second[3:]):  # sums of several blocks and rays, in another order
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())


def test_sizes_of_the_paper(emulated):
    agree(scene(2, batch=1, number=20, channels=32, size=(64, 64), widths=(64, 33), samples=48, fine=48))


def test_gradients_with_a_fine_pass_and_only_those_wanted(emulated):
    arguments = scene(8, number=10, samples=16, fine=16, widths=(32, 9), channels=16, size=(16, 16))
    truth = gradients(arguments, backend="torch")
    for exact, found in zip(truth, gradients(single(arguments), backend="fused")):
        assert (found - exact).abs().max() <= 1e-4 * exact.abs().max()
    planes = single(arguments)["planes"].requires_grad_()
    seen = render_triplane(**single(arguments) | dict(planes=planes), backend="fused")
    (g,) = torch.autograd.grad(seen.features.square().sum(), planes)
    assert g.abs().max() > 0


def test_numbers_that_are_not_finite_are_found(emulated):
    good = [torch.randn(n) for n in (1, 5000, 33)]
    assert emulated.infinite(good) == -1
    for which in range(3):
        for value in (torch.nan, torch.inf, -torch.inf):
            bad = [t.clone() for t in good]
            bad[which][-1], bad[2][0] = value, torch.nan
            assert emulated.infinite(bad) == which


def test_what_fits(emulated):
    assert emulated.fits([32, 64, 33], 96, False) and emulated.fits([32, 64, 33], 96, True)
    assert not emulated.fits([32, 4096, 33], 96, False)
    huge = single(scene(3, widths=(4096, 5)))
    with pytest.raises(RuntimeError, match="too large"):
        render_triplane(**huge, backend="fused")


# ---- nvcc, and a GPU

COMPILE = """
import sys, torch
from pathlib import Path
from nofa_nb.ops import extension
extension.compile_cuda(Path(sys.argv[1]), "9.0")
assert torch.ops.nofa_nb_cuda.forward and torch.ops.nofa_nb_cuda.backward
"""


def test_nvcc_compiles_it(tmp_path):
    if module.cuda_build_fault():
        pytest.skip(module.cuda_build_fault())
    done = subprocess.run([sys.executable, "-c", COMPILE, str(tmp_path)], capture_output=True, text=True, timeout=550,
                          env=os.environ | {"PYTHONPATH": str(HERE.parents[1])})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def gpu():
    "Skips with its reason where the kernels cannot run."
    if module.device_fault():
        pytest.skip(module.device_fault())
    assert module.cuda_extension() == ""
    return "cuda"


def on(arguments, device):
    return each(arguments, lambda t: t.to(device))


@pytest.mark.gpu
def test_parity_on_the_gpu(gpu):
    paper = dict(channels=32, size=(64, 64), widths=(64, 33), samples=48, fine=48, number=500)
    odd = dict(widths=(20, 30, 6), lattice=5), dict(widths=(3,), samples=1, fine=0)
    for seed, options in enumerate([{}, paper, *odd]):
        arguments = scene(seed, **options)
        truth = render_triplane_ref(**arguments)
        seen = render_triplane(**on(single(arguments), gpu), backend="fused")
        twin = render_triplane_ref(**single(arguments))
        errors = apart([t.cpu() for t in seen], truth)
        for error, own, limit in zip(errors, apart(twin, truth), (FEATURES, DEPTH, FEATURES)):
            assert error <= limit + 3 * own


@pytest.mark.gpu
def test_gradients_on_the_gpu(gpu):
    arguments = scene(8, number=60, samples=16, fine=16, widths=(32, 9), channels=16, size=(16, 16), lattice=4)
    truth = gradients(arguments, backend="torch")
    for exact, found in zip(truth, gradients(on(single(arguments), gpu), backend="fused")):
        assert (found.cpu() - exact).abs().max() <= 1e-4 * exact.abs().max()


@pytest.mark.gpu
def test_the_gpu_refuses_numbers_that_are_not_finite(gpu):
    for name in ("planes", "origins", "depths", "weights"):
        arguments = on(single(scene(13, lattice=2)), gpu)
        target = arguments[name][0] if isinstance(arguments[name], list) else arguments[name]
        target.view(-1)[-1] = torch.nan
        with pytest.raises(InputError, match=f"{name}|ascending"):
            render_triplane(**arguments, backend="fused")
