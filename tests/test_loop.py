"Killed anywhere, it goes on as if it had not been; what it cannot do, it says, and keeps what it has."

import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nofa_nb.core.errors import InputError
from nofa_nb.core.io import load_tensors, read_json, save_tensors
from nofa_nb.core.repro import generator
from nofa_nb.training import checkpoint, loop
from nofa_nb.training.checkpoint import (
    checkpoints,
    latest_checkpoint,
    pack_optimisers,
    parameter_names,
    read_checkpoint,
    read_log,
    save_checkpoint,
    unpack_optimisers,
)
from nofa_nb.training.loop import (
    Batches,
    Diverged,
    Stage,
    Training,
    average,
    cosine,
    ema_weight,
    make_fabric,
    seeded,
    train,
    update,
    warm_up,
)

pytestmark = pytest.mark.usefixtures("one_thread")  # runs are compared to the bit, some of them made in other processes


@pytest.fixture(scope="module")
def fabric():
    return make_fabric(accelerator="cpu")


def run(stage, training, directory, fabric=None, **options):
    fabric = fabric or make_fabric(training.precision, "cpu")
    return train(stage, training, directory, fabric, progress=False, **options)


def curve(directory):
    "The log without times."
    lines = read_log(Path(directory) / "log.jsonl")
    return [{k: v for k, v in line.items() if k not in ("seconds", "pace")} for line in lines]


def tensors(path):
    found = read_checkpoint(path)
    return {**found.weights, **{f"rest {k}": v for k, v in found.training.items()}}


def same(a, b):
    assert a.keys() == b.keys()
    assert not [k for k in a if not torch.equal(a[k], b[k])]


# --- stages -----------------------------------------------------------------------------------------------------------
class Pair(Stage):
    "All that could go wrong on the way: every kind of randomness, buffers, two optimisers, lazy terms, averages."

    def __init__(self, lr=1e-2, at=None):
        self.config, self.at = {"lr": lr}, at or (lambda step: None)
        with seeded(1, "pair"):
            self.g = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
            self.d = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Dropout(0.1), nn.Linear(8, 1))
            self.frozen = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
            self.helper = nn.BatchNorm1d(3)

    def modules(self):
        return {"g": self.g, "d": self.d, "frozen": self.frozen}

    def optimisers(self):
        lr = self.config["lr"]
        return {
            "g": torch.optim.Adam(self.g.parameters(), lr, betas=(0.0, 0.99)),
            "d": torch.optim.SGD(self.d.parameters(), lr, momentum=0.9),
        }

    def helpers(self):
        return [self.helper]

    def averaged(self):
        return ["g"]

    def rate(self, optimiser, step):
        return warm_up(step, 5) * cosine(step, 40) if optimiser == "g" else 1.0

    def data(self, samples, seed):
        return torch.stack([torch.randn(3, generator=generator(seed, "sample", i)) for i in samples])

    def step(self, real, moment):
        self.at(moment.step)
        z = torch.randn(real.shape, generator=moment.generator) + random.random() + float(np.random.rand())
        fake = self.g(z)
        yield "g", {"fool": nn.functional.softplus(-self.d(fake)).mean(), "near": self.frozen(fake).square().mean()}
        logits = torch.cat([self.d(self.helper(real)), -self.d(fake.detach())])
        yield "d", {"tell": nn.functional.softplus(-logits).mean(), "seen": logits.detach().mean()}
        if moment.step % 3 == 0:
            real = real.requires_grad_()
            (slope,) = torch.autograd.grad(self.d(real).sum(), real, create_graph=True)
            yield "d", {"r1": slope.square().sum(1).mean()}

    def sample(self, modules, generator):
        return modules["g"](torch.randn(6, 3, generator=generator)).sigmoid()[None]

    def evaluate(self, modules, generator):
        z = torch.randn(6, 3, generator=generator) + torch.rand(())
        return {"size": modules["g"](z).square().mean()}


PAIR = Training(steps=25, batch=4, seed=5, log_every=3, save_every=4, sample_every=10, evaluate_every=5, best="-size",
                ema_half_life=0.05, ema_ramp_up=0.2, clip=0.7)


class Fit(Stage):
    "A small regression without chance, so that two processes can be held against one."

    def __init__(self, lr=0.02, uneven=False, broken=math.inf):
        self.config, self.uneven, self.broken = {"lr": lr}, uneven, broken
        with seeded(2, "fit"):
            self.net = nn.ModuleDict({"a": nn.Linear(2, 6), "b": nn.Linear(6, 1), "extra": nn.Linear(1, 1)})
        self.net.register_buffer("newest", torch.zeros(()))

    def modules(self):
        return {"net": self.net}

    def optimisers(self):
        return {"adam": torch.optim.Adam(self.net.parameters(), self.config["lr"])}

    def averaged(self):
        return ["net"]

    def data(self, samples, seed):
        return torch.tensor([[i * 0.618034 % 1, i * 0.414214 % 1, float(i)] for i in samples])

    def step(self, batch, moment):
        x, index = batch[:, :2], batch[:, 2]
        self.net.newest.copy_(index[-1])
        y = self.net["b"](self.net["a"](x).tanh())
        if not self.uneven or index[0] % 8 == 0:  # uneven: in process 0 only
            y = self.net["extra"](y)
        error = y - torch.sin(4 * x.sum(1, keepdim=True))
        yield "adam", {"mse": (error / (index[:, None] != self.broken)).square().mean()}


FIT = Training(steps=20, batch=8, log_every=1, save_every=5, ema_half_life=0.1, ema_ramp_up=0)


# --- killed -----------------------------------------------------------------------------------------------------------
TRACED = {loop.__file__, checkpoint.__file__, sys.modules["nofa_nb.core.io"].__file__}


def pair_until(directory, kill_at):
    "Train; SIGKILL at the `kill_at`-th line of the loop's own code (0: never). Writes how many lines there were."
    torch.set_num_threads(1)
    count = 0

    def line(frame, event, _):
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return line

    sys.settrace(lambda frame, event, _: line if frame.f_code.co_filename in TRACED else None)
    run(Pair(), PAIR, directory)
    sys.settrace(None)
    Path(directory, "lines").write_text(str(count))


@pytest.fixture(scope="module")
def fork():
    "Calls a function in a process of its own, forked from one that has imported everything; gives its exit code."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_loop"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])

    def call(f, *args):
        process = context.Process(target=f, args=args, daemon=True)
        process.start()
        process.join(50)
        code = process.exitcode  # None: it hangs
        process.kill()
        return code

    yield call
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def undisturbed(fork, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    assert fork(pair_until, str(directory), 0) == 0
    return directory


def assert_as_undisturbed(directory, undisturbed):
    assert curve(directory) == curve(undisturbed) and len(curve(directory)) > 10
    for best in (False, True):
        ours, theirs = checkpoints(directory, best), checkpoints(undisturbed, best)
        assert [p.name for p in ours] == [p.name for p in theirs]
        for a, b in zip(ours, theirs):
            same(tensors(a), tensors(b))
    pictures = sorted((undisturbed / "samples").iterdir())
    assert [p.name for p in pictures] == ["00000010.png", "00000020.png", "00000025.png"]
    assert all(p.read_bytes() == (directory / "samples" / p.name).read_bytes() for p in pictures)


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_line(seed, fork, undisturbed, tmp_path):
    draw, kills = random.Random(seed), 0
    lines = int((undisturbed / "lines").read_text())
    for _ in range(7):
        code = fork(pair_until, str(tmp_path), draw.randrange(1, lines // 2))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        if kills % 2 and (tmp_path / "log.jsonl").exists():
            with open(tmp_path / "log.jsonl", "a") as file:
                file.write('{"step": 9, "g/fo')  # torn in the middle of a write
    assert kills >= 2
    assert code == 0 or fork(pair_until, str(tmp_path), 0) == 0
    assert_as_undisturbed(tmp_path, undisturbed)
    assert not list(tmp_path.rglob(".*.tmp-*"))


def test_killed_inside_a_checkpoint(fork, undisturbed, tmp_path):
    "At lines from the beginning to the end of a checkpoint: some files are there, and others not."
    done = 0
    for skip in (*range(1, 20, 3), 30, 40):
        assert fork(killed_in_save, str(tmp_path), skip) == -signal.SIGKILL
        done += 1
        if checkpoints(tmp_path):
            latest_checkpoint(tmp_path)  # what is there is whole
    assert done == 9 and checkpoints(tmp_path)
    assert fork(pair_until, str(tmp_path), 0) == 0
    assert_as_undisturbed(tmp_path, undisturbed)


def killed_in_save(directory, skip):
    torch.set_num_threads(1)
    count, inside = 0, save_checkpoint.__code__

    def line(frame, event, _):
        nonlocal count
        count += event == "line"
        if count == skip:
            os.kill(os.getpid(), signal.SIGKILL)
        return line

    sys.settrace(lambda frame, event, _: line if frame.f_code is inside else None)
    run(Pair(), PAIR, directory)


def test_slices_of_time_make_the_same_run(undisturbed, tmp_path, fabric):
    ends = [run(Pair(), PAIR, tmp_path, fabric, max_seconds=0) for _ in range(25)]
    assert [e.step for e in ends] == list(range(1, 26)) and [e.finished for e in ends] == [False] * 24 + [True]
    assert curve(tmp_path) == curve(undisturbed)
    same(tensors(checkpoints(tmp_path)[-1]), tensors(checkpoints(undisturbed)[-1]))


def test_a_damaged_newest_checkpoint_is_passed_over(undisturbed, tmp_path, fabric):
    stopped = Pair(at=lambda step: 1 / 0 if step == 14 else None)
    with pytest.raises(ZeroDivisionError):
        run(stopped, PAIR, tmp_path, fabric)
    newest = checkpoints(tmp_path)[-1] / "training.safetensors"
    data = bytearray(newest.read_bytes())
    data[-3] ^= 4
    newest.unlink()  # the best may share the file
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged"):
        run(Pair(), PAIR, tmp_path, fabric)
    assert_as_undisturbed(tmp_path, undisturbed)


def test_nothing_readable_left_is_refused(tmp_path, fabric):
    run(Fit(), FIT, tmp_path, fabric)
    for path in checkpoints(tmp_path):
        (path / "weights.safetensors").write_bytes(b"no")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="remove .*checkpoints to start again"):
            run(Fit(), FIT, tmp_path, fabric)


# --- disks ------------------------------------------------------------------------------------------------------------
def full_disk(directory, room, at):
    "From step `at` on no file can grow beyond `room` bytes (0: beyond what the log has, and ten)."
    torch.set_num_threads(1)

    def fill(step):
        if step == at:
            size = room or os.path.getsize(os.path.join(directory, "log.jsonl")) + 10
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    try:
        run(Pair(at=fill), PAIR, directory)
    except InputError as e:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        Path(directory, "said").write_text(str(e))
        raise SystemExit(7) from None


@pytest.mark.parametrize("room,said", [(3000, "training stopped after step 16: cannot write .*00000016"),
                                       (0, "training stopped after step 15: cannot write .*log.jsonl")])
def test_a_full_disk(room, said, fork, undisturbed, tmp_path):
    assert fork(full_disk, str(tmp_path), room, 14) == 7
    sentence = (tmp_path / "said").read_text()
    (tmp_path / "said").unlink()
    assert re.search(said, sentence, re.S) and "the checkpoint of step 12 is kept in" in sentence
    assert latest_checkpoint(tmp_path).record["step"] == 12
    assert fork(pair_until, str(tmp_path), 0) == 0
    assert_as_undisturbed(tmp_path, undisturbed)


def test_a_read_only_disk(tmp_path, fabric, monkeypatch):
    def refuse(*args):
        raise OSError(30, "Read-only file system")

    stage = Pair(at=lambda step: monkeypatch.setattr(os, "rename", refuse) if step == 14 else None)
    with pytest.raises(InputError, match="stopped after step 16: .*Read-only.*the checkpoint of step 12 is kept"):
        run(stage, PAIR, tmp_path, fabric)


# --- two processes ----------------------------------------------------------------------------------------------------
def two_processes(directory):
    "Runs under torchrun."
    torch.set_num_threads(1)
    directory, fabric = Path(directory), make_fabric(accelerator="cpu")
    rank = fabric.global_rank
    assert fabric.world_size == 2 and fabric.device.type == "cpu"
    for name, uneven in (("whole", False), ("uneven", True)):
        stage = Fit(uneven=uneven)
        if rank:
            nn.init.zeros_(stage.net["a"].weight)  # another start, which must not matter
        end = run(stage, FIT, directory / name, fabric)
        save_tensors(directory / f"{name}{rank}.safetensors", {**stage.net.state_dict(), **{
            f"ema.{k}": v for k, v in end.modules["net"].state_dict().items()}})
    stop = [run(Fit(), FIT, directory / "slices", fabric, max_seconds=0 if i < 3 else None).step for i in range(4)]
    assert stop == [1, 2, 3, 20]
    try:
        run(Fit(broken=14), FIT, directory / "broken", fabric)  # sample 14 goes to process 1
    except Diverged as e:
        (directory / f"said{rank}").write_text(str(e))
    try:
        run(Fit(), Training(steps=2, batch=3), directory / "odd", fabric)
    except InputError as e:
        (directory / f"odd{rank}").write_text(str(e))


def test_two_processes_are_one(tmp_path, fabric):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("whole", "uneven"):
        ranks = [load_tensors(tmp_path / f"{name}{r}.safetensors")[0] for r in (0, 1)]
        same(*ranks)
    stage = Fit()
    run(stage, FIT, tmp_path / "one", fabric)
    one, two, slices = (curve(tmp_path / name) for name in ("one", "whole", "slices"))
    assert slices == two and [a["step"] for a in one] == [b["step"] for b in two] == list(range(1, 21))
    for key in ("adam/mse", "adam/gradient"):
        np.testing.assert_allclose([a[key] for a in two], [a[key] for a in one], rtol=2e-6)
    for k, v in stage.net.state_dict().items():
        if k != "newest":
            torch.testing.assert_close(load_tensors(tmp_path / "whole0.safetensors")[0][k], v, rtol=1e-4, atol=1e-6)
    for r in (0, 1):
        assert "at step 2: the loss 'mse' of 'adam' became inf" in (tmp_path / f"said{r}").read_text()
        assert "a multiple of 2 processes, got 3" in (tmp_path / f"odd{r}").read_text()
    assert read_json(checkpoints(tmp_path / "whole")[-1] / "checkpoint.json")["processes"] == 2


# --- what a step is ---------------------------------------------------------------------------------------------------
def test_the_loop_is_what_one_would_write_by_hand(tmp_path, fabric):
    a, b = Pair(), Pair()
    run(a, PAIR, tmp_path, fabric)
    b.g.train(), b.d.train(), b.frozen.eval(), b.helper.eval()
    optimisers, rates = b.optimisers(), {"g": 1e-2, "d": 1e-2}
    ema = {k: v.clone() for k, v in b.g.state_dict().items()}
    for step in range(25):
        real = b.data(range(4 * step, 4 * step + 4), 5)
        for name, o in optimisers.items():
            o.param_groups[0]["lr"] = rates[name] * b.rate(name, step)

        class Now:
            generator = generator(5, "step", step, 0)

        Now.step = step
        with seeded(5, "step", step, 0):
            for name, losses in b.step(real, Now):
                for m in (b.g, b.d, b.frozen):
                    m.zero_grad()
                sum(v for v in losses.values() if v.requires_grad).backward()
                nn.utils.clip_grad_norm_({"g": b.g, "d": b.d}[name].parameters(), 0.7)
                optimisers[name].step()
        beta = 0.5 ** (4 / min(50, 4 * step * 0.2)) if step else 0
        for k, p in b.g.named_parameters():
            ema[k] = beta * ema[k] + (1 - beta) * p.detach()
    for name in ("g", "d", "frozen"):
        for k, v in a.modules()[name].state_dict().items():
            torch.testing.assert_close(v, b.modules()[name].state_dict()[k], rtol=1e-5, atol=1e-6)
    saved = load_tensors(checkpoints(tmp_path)[-1] / "weights.safetensors")[0]
    for k, _ in b.g.named_parameters():
        torch.testing.assert_close(saved[f"g.{k}"], ema[k], rtol=1e-5, atol=1e-6)
        assert not torch.equal(saved[f"g.{k}"], a.g.state_dict()[k])


def test_what_no_optimiser_holds_is_frozen(tmp_path, fabric):
    stage, before = Pair(), Pair()
    run(stage, PAIR, tmp_path, fabric)
    same(stage.frozen.state_dict(), before.frozen.state_dict())
    same(stage.helper.state_dict(), before.helper.state_dict())
    still = [*stage.frozen.parameters(), *stage.helper.parameters()]
    assert not any(p.requires_grad or p.grad is not None for p in still)
    assert not torch.equal(stage.g[1].running_mean, before.g[1].running_mean)
    saved = load_tensors(checkpoints(tmp_path)[-1] / "weights.safetensors")[0]
    assert {name.split(".")[0] for name in saved} == {"g", "d", "frozen"}


def test_training_leaves_the_global_random_numbers_alone(tmp_path, fabric):
    random.seed(3), np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    run(Pair(), PAIR, tmp_path, fabric)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_looking_more_often_changes_nothing(undisturbed, tmp_path, fabric):
    often = Training(**{**PAIR.__dict__, "sample_every": 1, "evaluate_every": 1, "best": "", "save_every": 25})
    run(Pair(), often, tmp_path, fabric)
    same(tensors(checkpoints(tmp_path)[-1]), tensors(checkpoints(undisturbed)[-1]))


def test_workers_change_nothing(tmp_path, fabric):
    for workers in (0, 2):
        run(Fit(), Training(steps=6, batch=4, log_every=1), tmp_path / str(workers), fabric, workers=workers)
    assert curve(tmp_path / "0") == curve(tmp_path / "2") and len(curve(tmp_path / "0")) == 6


def test_bf16(tmp_path):
    seen = []

    class Half(Fit):
        def step(self, batch, moment):
            seen.append(self.net["a"](batch[:, :2]).dtype)
            yield from super().step(batch, moment)

    stage = Half(lr=0.1)
    end = run(stage, Training(steps=100, batch=16, precision="bf16-mixed", log_every=10), tmp_path)
    losses = [line["adam/mse"] for line in curve(tmp_path)]
    assert set(seen) == {torch.bfloat16} and stage.net["a"].weight.dtype == torch.float32
    assert losses[-1] < 0.5 * losses[0] and end.modules["net"]["a"].weight.dtype == torch.float32


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=5), st.floats(0.01, 10))
@settings(max_examples=30, deadline=None)
def test_clipping(fabric, slopes, clip):
    w, slopes = nn.Parameter(torch.zeros(len(slopes))), torch.tensor(slopes)
    told = update(fabric, "sgd", torch.optim.SGD([w], 1.0), {"w": w}, {"line": (w * slopes).sum()}, clip)
    assert math.isclose(told["gradient"], slopes.norm().item(), rel_tol=1e-4, abs_tol=1e-6)
    wanted = -slopes * min(1, clip / max(slopes.norm().item(), 1e-12))
    torch.testing.assert_close(w.detach(), wanted, rtol=1e-4, atol=1e-6)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_every_sample_comes_once(processes, part, step):
    training = Training(steps=10, batch=processes * part)
    parts = [Batches(lambda samples, seed: list(samples), training, r, processes)[step] for r in range(processes)]
    assert sum(parts, []) == list(range(step * training.batch, (step + 1) * training.batch))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(1, 100), st.sampled_from([0, 0.05, 0.5]))
@settings(max_examples=30, deadline=None)
def test_average_is_the_recurrence(values, half_life, ramp):
    old, new, wanted, images = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), 0.0, 0
    nn.init.zeros_(old.weight)
    for v in values:
        nn.init.constant_(new.weight, v)
        weight = ema_weight(images, 4, half_life, ramp)
        average(old, new, weight)
        span = min(half_life, ramp * images) if ramp else half_life
        wanted, images = (v if span == 0 else v + (wanted - v) * 2 ** (-4 / span)), images + 4
        assert 0 <= weight < 1
    assert math.isclose(old.weight.item(), wanted, rel_tol=1e-4, abs_tol=1e-4)


# --- stopping and refusing --------------------------------------------------------------------------------------------
def test_a_nan_stops_with_the_last_good_checkpoint(tmp_path, fabric):
    stage = Fit(broken=100)  # sample 100 is in step 13
    with pytest.raises(Diverged, match="at step 13: the loss 'mse' of 'adam' became inf.* step 10 is kept"):
        run(stage, FIT, tmp_path, fabric)
    assert all(p.isfinite().all() for p in stage.net.parameters())
    assert latest_checkpoint(tmp_path).record["step"] == 10 and len(curve(tmp_path)) == 12
    whole = tmp_path / "whole"
    run(Fit(), FIT, whole, fabric)
    run(Fit(), FIT, tmp_path, fabric)  # mended
    assert curve(tmp_path) == curve(whole)


def test_a_bad_gradient_under_a_good_loss(fabric):
    w = nn.Parameter(torch.zeros(2))
    with pytest.raises(Diverged, match="gradient of net.w became nan or infinite under 'sgd'"):
        update(fabric, "sgd", torch.optim.SGD([w], 1.0), {"net.w": w}, {"root": w.sqrt().sum()})
    assert torch.equal(w.detach(), torch.zeros(2))


def test_bad_weights_are_never_saved(tmp_path, fabric):
    stage = Fit()
    stage.rate = lambda optimiser, step: math.inf if step == 14 else 1.0
    with pytest.raises(Diverged, match="after step 15: the weight net.a.weight .* step 10 is kept"):
        run(stage, FIT, tmp_path, fabric)


def test_another_config_is_refused(tmp_path, fabric):
    run(Fit(), FIT, tmp_path, fabric)
    longer = Training(**{**FIT.__dict__, "steps": 22, "clip": 1.0})
    with pytest.raises(InputError, match="training.steps must be 20, as .*, got 22.*allow=.'training.steps'."):
        run(Fit(), longer, tmp_path, fabric)
    with pytest.raises(InputError, match="training.clip must be 0.0"):
        run(Fit(), longer, tmp_path, fabric, allow=["training.steps"])
    assert run(Fit(), longer, tmp_path, fabric, allow=["training.steps", "training.clip"]).step == 22
    with pytest.raises(InputError, match="stage.lr must be 0.02"):
        run(Fit(lr=0.3), longer, tmp_path, fabric)
    other = Fit()
    other.data_hash = "0" * 64
    with pytest.raises(InputError, match="data_hash must be 'none'"):
        run(other, longer, tmp_path, fabric)


def stage_with(**methods):
    return type("Odd", (Fit,), methods)()


@pytest.mark.parametrize("stage,said", [
    (stage_with(optimisers=lambda s: {"o": torch.optim.SGD([nn.Parameter(torch.ones(1))])}), "made of parameters"),
    (stage_with(step=lambda s, b, m: iter([("sdg", {})])), "yielding one of adam, got 'sdg'"),
    (stage_with(step=lambda s, b, m: iter([])), "at least one optimiser and its losses"),
    (stage_with(step=lambda s, b, m: iter([("adam", {"x": torch.ones(())})])), "at least one with a gradient"),
    (stage_with(step=lambda s, b, m: iter([("adam", {"x": torch.ones((), requires_grad=True)})])), "which are not"),
    (stage_with(step=lambda s, b, m: iter([("adam", {"x": s.net["a"].weight})])), "must be one number"),
    (stage_with(averaged=lambda s: ["ent"]), "stage.averaged.. must be among net"),
    (stage_with(modules=lambda s: {"a.b": s.net}), "plain names"),
    (stage_with(evaluate=lambda s, m, g: {"a": 1.0}), "training.best must be one of a, got 'psnr'"),
])
def test_a_stage_that_does_not_fit(stage, said, tmp_path, fabric):
    with pytest.raises(InputError, match=said):
        run(stage, Training(steps=2, evaluate_every=1, best="psnr"), tmp_path, fabric)


@pytest.mark.parametrize("best,wanted", [("size", max), ("-size", min)])
def test_the_best_is_kept(best, wanted, tmp_path, fabric):
    run(Pair(), Training(**{**PAIR.__dict__, "best": best, "evaluate_every": 2}), tmp_path, fabric)
    sizes = {line["step"]: line["evaluation"]["size"] for line in curve(tmp_path) if "evaluation" in line}
    (path,) = checkpoints(tmp_path, best=True)
    record = read_checkpoint(path).record
    assert sizes[record["step"]] == wanted(sizes.values()) == record["best"]["value"] and len(sizes) == 13


# --- files ------------------------------------------------------------------------------------------------------------
def test_nothing_is_pickled(tmp_path, fabric, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickled")

    for module, names in ((torch, ("save", "load")), (pickle, ("dump", "dumps", "load", "loads"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    for seconds in (0, None):
        run(Pair(), PAIR, tmp_path, fabric, max_seconds=seconds)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".jsonl", ".safetensors", ".png"}


def test_the_record(tmp_path, fabric):
    end = run(Pair(), PAIR, tmp_path, fabric)
    record = json.loads((end.checkpoint / "checkpoint.json").read_text())
    assert record["step"] == 25 and record["images"] == 100 and record["seed"] == 5 and record["processes"] == 1
    assert record["config"]["training"]["clip"] == 0.7 and record["config"]["stage"] == {"lr": 1e-2}
    assert record["code"] and record["data_hash"] == "none" and record["metrics"] == end.metrics
    assert set(record["hashes"]) == {"weights", "training"}


OPTIMISERS = {
    "Adam": {"amsgrad": True}, "AdamW": {}, "SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.5, "centered": True},
    "Adagrad": {}, "Adadelta": {}, "NAdam": {}, "RAdam": {}, "Adamax": {}, "ASGD": {}, "Rprop": {}, "Adafactor": {},
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_comes_back(name, tmp_path):
    def two():
        with seeded(0, name):
            net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.01}]
        return net, getattr(torch.optim, name)(groups, lr=0.1, **OPTIMISERS[name])

    def steps(net, optimiser, first, last):
        for i in range(first, last):
            optimiser.zero_grad()
            net(torch.randn(5, 3, generator=generator(0, i))).square().mean().backward()
            optimiser.step()

    (net, o), (net2, o2) = two(), two()
    steps(net, o, 0, 3)
    stored, numbers = pack_optimisers({"o": o}, parameter_names({"net": net}))
    save_tensors(tmp_path / "o.safetensors", stored)
    net2.load_state_dict(net.state_dict())
    found = load_tensors(tmp_path / "o.safetensors")[0]
    unpack_optimisers(found, json.loads(json.dumps(numbers)), {"o": o2}, parameter_names({"net": net2}))
    assert stored and all("/net." in k for k in stored)
    steps(net, o, 3, 6), steps(net2, o2, 3, 6)
    same(net.state_dict(), net2.state_dict())


def test_an_optimiser_that_cannot_be_stored_is_refused():
    w = nn.Parameter(torch.ones(2))
    o = torch.optim.LBFGS([w])
    o.step(lambda: (o.zero_grad(), loss := w.square().sum(), loss.backward())[1])
    with pytest.raises(InputError, match="a tensor or a number, got list: use another optimiser"):
        pack_optimisers({"o": o}, {w: "net.w"})


if __name__ == "__main__":
    two_processes(sys.argv[1])
