"""The face world on other devices: nothing strays between devices, a GPU shows the same faces, batches change no bit.

Most machines have no GPU, so `PretendDevice` stands in for one: tensors asked for on `cuda:99` are computed on the CPU,
but carry a tag, say that they live there, and refuse to meet others, as on a real one. It knows PyTorch's rules:
scalars (0 dimensions) and indices of the CPU mix with anything, and NumPy reads the CPU only.
"""

import pytest
import torch
from conftest import rounded
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nofa_nb.core.errors import InputError
from nofa_nb.geometry.cameras import Camera
from nofa_nb.world.bust import Bust, dress, sample_person, texture_size
from nofa_nb.world.head import load_head
from nofa_nb.world.motion import sample_expression
from nofa_nb.world.portraits import render

PRETEND = torch.device("cuda:99")
NAMES = ("rgb", "mask", "depth", "pncc", "landmarks", "visible")
READS_CPU = {torch.Tensor.numpy, torch.Tensor.__array__, torch.from_numpy}
LEAVES = {torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__len__, torch.Tensor.__bool__, torch.Tensor.__float__,
          torch.Tensor.__int__, torch.Tensor.__format__, torch.Tensor.__repr__}
GETTERS = {torch.Tensor.shape.__get__, torch.Tensor.ndim.__get__, torch.Tensor.dtype.__get__}


def tagged(x):
    return getattr(x, "_pretends", False)


def tensors_in(x):
    "All tensors of nested lists, tuples and dicts."
    if isinstance(x, torch.Tensor):
        return [x]
    x = x.values() if isinstance(x, dict) else x
    return [t for part in x for t in tensors_in(part)] if isinstance(x, (list, tuple, type({}.values()))) else []


def tag(out):
    for t in tensors_in(out):
        t._pretends = True
    return out


def is_pretend(x):
    return isinstance(x, (str, torch.device)) and torch.device(x) == PRETEND


class PretendDevice(TorchFunctionMode):
    "Tag tensors that are said to live on `PRETEND` and refuse to mix them with the CPU's."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = tensors_in((args, kwargs))
        there = any(tagged(x) for x in tensors)
        if func == torch.Tensor.device.__get__:
            return PRETEND if there else func(*args)
        if func in (torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__):
            return there == (func == torch.Tensor.is_cuda.__get__)
        if func in GETTERS or func in LEAVES:
            return func(*args, **kwargs)
        if there and func in READS_CPU:
            raise TypeError("can't convert a tensor of the pretended device to numpy")
        goals = [x for x in (*args, *kwargs.values()) if isinstance(x, (str, torch.device))]
        if func is torch.Tensor.cpu or func is torch.Tensor.to and goals:
            out = args[0].clone()  # a copy, whose tag is its own
            return tag(out) if any(map(is_pretend, goals)) else out
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
            out = func(args[0].clone(), args[1].dtype)
            return tag(out) if tagged(args[1]) else out
        if "device" in kwargs:
            made_there = is_pretend(kwargs["device"])
            if made_there or torch.device(kwargs["device"]).type == "cpu":
                kwargs["device"] = "cpu"
                return tag(func(*args, **kwargs)) if made_there else func(*args, **kwargs)
        if func is torch.Tensor.__getitem__ and tagged(args[0]):
            tensors = []  # its indices may be the CPU's
        strays = [x.shape for x in tensors if there and not tagged(x) and x.ndim > 0]
        if strays:
            raise RuntimeError(f"{getattr(func, '__name__', func)} mixes devices: {strays} live on the CPU")
        out = func(*args, **kwargs)
        return tag(out) if there else out


class Count(TorchDispatchMode):
    "Count the operations that would start a kernel: all but views and bookkeeping."
    FREE = ("view", "reshape", "expand", "slice", "select", "unsqueeze", "squeeze", "permute", "transpose", "t",
            "detach", "unbind", "split", "alias", "empty", "_local_scalar_dense", "as_strided", "empty_like",
            "empty_strided", "new_empty", "lift_fresh", "unfold", "diagonal", "_unsafe_view",
            "split_with_sizes")

    def __init__(self):
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        self.kernels += name not in self.FREE and any(x.ndim for x in tensors_in(args))
        return func(*args, **(kwargs or {}))


def views(n, seed=0):
    beta = torch.as_tensor(sample_expression(seed, n))
    return beta, Camera.orbit(torch.linspace(-.8, .8, n), torch.linspace(-.3, .3, n))


def test_the_pretended_device_notices_strays():
    with PretendDevice():
        there, here = torch.zeros(3, device=PRETEND), torch.zeros(3)
        assert there.device == PRETEND and (there * 2)[None].is_cuda and here.device.type == "cpu" and not here.is_cuda
        assert (there + torch.tensor(1.)).device == PRETEND and there.new_zeros(2).device == PRETEND
        assert there.cpu().device.type == "cpu" and here.to(PRETEND).device == PRETEND and there[:2].device == PRETEND
        for stray in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there.long()],
                      lambda: torch.where(there > 0, here, 0.), lambda: there.index_select(0, here.long())):
            with pytest.raises(RuntimeError, match="mixes devices"):
                stray()
        with pytest.raises(TypeError):
            there.numpy()


@pytest.mark.parametrize("seed", [7, 19])
def test_nothing_strays_between_devices_and_the_picture_is_the_same(seed):
    beta, camera = views(3, seed)
    expected = render(dress(sample_person(seed), 64), beta, camera, 24, backend="torch")
    with PretendDevice():
        bust = dress(sample_person(seed), 64, device=PRETEND)
        seen = render(bust, beta, camera, 24)
        assert all(getattr(seen, name).device == PRETEND for name in NAMES) and seen.camera.position.device == PRETEND
        fields = {k: v for k, v in vars(bust).items() if isinstance(v, torch.Tensor)}
        assert len(fields) >= 9 and all(v.device == PRETEND for v in fields.values()), fields
        assert load_head(device=PRETEND).model.mean.device == PRETEND and bust.light.key.device == PRETEND
    for name in NAMES:  # the pretended device computes on the CPU, so bits can be compared
        assert torch.equal(getattr(seen, name), getattr(expected, name)), name


def test_a_batch_of_views_needs_few_kernels():
    "What a GPU pays per person does not grow with the views; small pictures, as large ones are rasterised in parts."
    counts = {}
    with PretendDevice():
        dress(sample_person(7), 64, device=PRETEND)  # makes what is the same for everyone
        with Count() as dressing:
            bust = dress(sample_person(7), 64, device=PRETEND)
        for n in (2, 16):
            beta, camera = views(n)
            with Count() as count:
                render(bust, beta[:1].expand(n, -1), camera, 24)
            counts[n] = count.kernels
    assert 500 < counts[16] < 1.05 * counts[2] and dressing.kernels + counts[16] < 250 * 16, (dressing.kernels, counts)


@pytest.mark.parametrize("size", [33, 61])
def test_pictures_do_not_depend_on_chunk_or_threads(size):
    "Odd sizes, so that arrays end in the middle of a vector register."
    beta, camera = views(5)
    before, first = torch.get_num_threads(), None
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            bust = dress(sample_person(19), texture_size(size))
            for chunk in (1, 2, 5)[::threads]:
                seen = render(bust, beta, camera, size, chunk=chunk)
                first = first or seen
                for name in NAMES:
                    found, told = getattr(seen, name), getattr(first, name)
                    assert torch.equal(found, told) if threads == 1 else rounded(found, told), (threads, chunk, name)
            alone = render(bust, beta[3:4], camera[3:4], size)
            assert torch.equal(alone.rgb[0], first.rgb[3]) if threads == 1 else rounded(alone.rgb[0], first.rgb[3])
    finally:
        torch.set_num_threads(before)


def test_a_chunk_has_at_least_one_view():
    with pytest.raises(InputError, match="chunk must be at least 1"):
        render(dress(sample_person(0), 64), *views(2), 16, chunk=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() says that there is no GPU")
def test_a_gpu_shows_the_same_faces():
    beta, camera = views(4)
    for seed in (7, 19):
        here, there = dress(sample_person(seed), 128), dress(sample_person(seed), 128, device="cuda")
        assert isinstance(there, Bust) and there.neutral.is_cuda
        torch.testing.assert_close(there.neutral.cpu(), here.neutral, atol=2e-5, rtol=0, equal_nan=True)
        expected, seen = render(here, beta, camera, 64, backend="torch"), render(there, beta, camera, 64)
        assert seen.rgb.is_cuda
        differs = ((seen.rgb.cpu() - expected.rgb).abs().amax(1) > 2 / 255).float().mean()
        assert differs < .01 and (seen.mask.cpu() != expected.mask).float().mean() < .01
        torch.testing.assert_close(seen.landmarks.cpu(), expected.landmarks, atol=1e-4, rtol=0)
        parts = render(there, beta, camera, 64, chunk=2)
        assert ((parts.rgb - seen.rgb).abs() > 1e-4).float().mean() < .001
