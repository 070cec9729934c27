"Streams that cannot collide, hashes that notice, results that refuse to lose their provenance."

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nofa_nb
from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.io import read_json, write_json
from nofa_nb.core.repro import (
    Result,
    RunManifest,
    bootstrap_interval,
    code_version,
    describe_device,
    generator,
    hash_config,
    hash_file,
    hash_tensors,
    package_versions,
    read_results,
    rng,
    write_results,
)

GOOD = dict(
    name="Ours",
    value=0.5,
    interval=(0.4, 0.6),
    n=40,
    metric="AED",
    variant="mean absolute",
    weights_hash="a" * 64,
    data_hash="none",
    seed=0,
    device="cpu",
    date="2026-01-31T12:00:00Z",
    commit="0123abc",
    preset="small",
    config_hash="0" * 64,
)


# --- streams


def test_streams_are_the_same_in_every_process():
    "Fixed values: a change here changes every data set and every result."
    code = (
        "from nofa_nb.core.repro import generator, rng; import torch;"
        "print(torch.randint(1 << 30, (2,), generator=generator(7, 'identity', 12)).tolist(),"
        "rng(7, 'identity', 12).integers(1 << 30))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONHASHSEED": "5"},
    ).stdout
    here = torch.randint(1 << 30, (2,), generator=generator(7, "identity", 12)).tolist()
    assert out.strip() == f"{here} {rng(7, 'identity', 12).integers(1 << 30)}" == FIXED


FIXED = "[389118852, 379819305] 186704353"


def test_no_stream_of_many_collides():
    "PyTorch alone would keep 32 bits of the seed: here the whole state differs."
    states = {generator(0, "x", i).get_state()[24:].numpy().tobytes() for i in range(500)}
    assert len(states) == 500
    key = generator(0, "x", 1).initial_seed() % 2**32
    plain = torch.rand(4, generator=torch.Generator().manual_seed(key))
    assert not torch.equal(plain, torch.rand(4, generator=generator(0, "x", 1)))


def test_moments_and_independence():
    draws = torch.stack([torch.randn(20_000, generator=generator(3, "s", i)) for i in range(4)])
    assert draws.mean(1).abs().max() < 0.03 and (draws.std(1) - 1).abs().max() < 0.03
    assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.03
    uniform = torch.rand(20_000, generator=generator(3, "u"))
    counts = torch.histc(uniform, 10, 0, 1)
    assert ((counts - 2000).abs() < 5 * (2000 * 0.9) ** 0.5).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.text(max_size=3), st.integers(0, 5)), max_size=3),
    st.lists(st.one_of(st.text(max_size=3), st.integers(0, 5)), max_size=3),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_streams_agree_exactly_when_names_do(a, b, s, t):
    same = (s, a) == (t, b) and list(map(type, a)) == list(map(type, b))
    assert (rng(s, *a).integers(1 << 62) == rng(t, *b).integers(1 << 62)) == same
    assert (generator(s, *a).get_state().equal(generator(t, *b).get_state())) == same


def test_numpy_whole_numbers_are_whole_numbers():
    assert rng(np.int64(3), np.int32(4)).random() == rng(3, 4).random()


def test_global_state_is_untouched():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    torch.rand(3, generator=generator(0, "a"))
    rng(0, "a").random()
    bootstrap_interval([1.0, 2.0])
    assert torch.equal(before, torch.get_rng_state()) and np.array_equal(numpy_before, np.random.get_state()[1])


@pytest.mark.parametrize("args", [(-1,), (1.0,), ("7",), (0, 1.5), (0, None), (0, ("a",))])
def test_bad_seeds_and_names(args):
    for f in (rng, generator):
        with pytest.raises(InputError, match="seed|names"):
            f(*args)


# --- hashes


def test_hash_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4
    with pytest.raises(MissingResource):
        hash_file(tmp_path / "b")


def test_hash_tensors_notices_everything_but_order():
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)}
    assert hash_tensors(base) == hash_tensors({"b": base["b"], "a": base["a"].numpy()})
    assert hash_tensors({"a": base["a"].T.contiguous().T, "b": base["b"]}) == hash_tensors(base)
    changes = [
        {"a": base["a"].T},
        {"a": base["a"].double()},
        {"a": base["a"] + 1e-6},
        {"a": base["a"].reshape(3, 2)},
        {"c": base["b"]},
    ]
    assert len({hash_tensors(base), *(hash_tensors({**base, **c}) for c in changes)}) == 1 + len(changes)
    assert hash_tensors({}) != hash_tensors({"a": torch.zeros(0)}) != hash_tensors({"a": torch.zeros(0, 2)})


def test_hash_config_is_stable():
    @dataclasses.dataclass(frozen=True)
    class A:
        x: int = 1
        y: tuple = (1.0, 2.0)

    @dataclasses.dataclass(frozen=True)
    class B:
        y: tuple = (1.0, 2.0)
        x: int = 1

    assert hash_config(A()) == hash_config(B()) == hash_config({"x": 1, "y": [1.0, 2.0]}) != hash_config(A(2))
    assert hash_config({"x": 1}) == hashlib.sha256(b'{"x": 1}').hexdigest()
    assert hash_config({"x": 1}) != hash_config({"x": 1.0}) != hash_config({"x": "1"})


# --- code version and manifest


def git(folder, *args):
    subprocess.run(
        ["git", "-C", folder, "-c", "user.name=t", "-c", "user.email=t@t", *args], check=True, capture_output=True
    )


def test_code_version(tmp_path, monkeypatch, capfd):
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("")
    version = f"nofa_nb {nofa_nb.__version__}"
    assert code_version(package) == version  # no repository
    git(tmp_path, "init")
    assert code_version(package) == version  # no commit
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    commit = code_version(package)
    assert len(commit) == 40 and set(commit) <= set("0123456789abcdef")
    (tmp_path / "notes.txt").write_text("outside the package")
    assert code_version(package) == commit
    (package / "b.py").write_text("new")
    assert code_version(package) == commit + "-dirty"
    inner = package / "site" / "nofa_nb"
    inner.mkdir(parents=True)
    assert code_version(inner) == version  # a foreign repository around it
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version(package) == version  # no git
    assert capfd.readouterr() == ("", "")


def test_manifest(tmp_path):
    with RunManifest(tmp_path / "run", {"steps": 3}, command="nofa train") as run:
        first = read_json(tmp_path / "run" / "run.json")
        assert first["status"] == "running" and first["ended"] is None
    done = read_json(run.path)
    assert done["status"] == "done" and done["ended"] >= done["started"] and done["command"] == "nofa train"
    assert (
        done["packages"]["torch"] == torch.__version__.split("+")[0]
        and done["packages"]["python"] == sys.version.split()[0]
    )
    assert done["code"] == code_version() and done["device"] == describe_device() and done["parameters"] == {"steps": 3}
    with pytest.raises(ZeroDivisionError), RunManifest(tmp_path / "run", {"steps": 3}):
        raise ZeroDivisionError("division by zero")
    failed = read_json(run.path)
    assert (failed["status"], failed["attempt"], failed["error"]) == (
        "failed",
        2,
        "ZeroDivisionError: division by zero",
    )


def test_manifest_of_another_run_is_kept(tmp_path):
    with RunManifest(tmp_path, {"steps": 3}):
        pass
    before = read_json(tmp_path / "run.json")
    with pytest.raises(InputError, match="choose another folder"), RunManifest(tmp_path, {"steps": 4}):
        pass
    assert read_json(tmp_path / "run.json") == before


def test_killed_run_is_left_running(tmp_path):
    code = f"import os; from nofa_nb.core.repro import RunManifest\nwith RunManifest({str(tmp_path)!r}, 1): os._exit(9)"
    subprocess.run([sys.executable, "-c", code], timeout=60)
    assert read_json(tmp_path / "run.json")["status"] == "running"


def test_package_versions_skip_what_is_absent():
    assert package_versions(["numpy", "surely-not-installed"]).keys() == {"python", "numpy"}


# --- intervals


def test_bootstrap_agrees_with_the_normal_interval():
    values = rng(0, "values").normal(3, 2, 400)
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose(
        bootstrap_interval(values, n=2000), (values.mean() - half, values.mean() + half), atol=0.03
    )
    low, high = bootstrap_interval(values, n=2000, level=0.5)
    np.testing.assert_allclose((high - low) / 2, 0.674 * values.std() / 20, rtol=0.1)


def test_bootstrap_resamples_units_not_frames():
    clips = rng(0, "clips").normal(size=30)
    frames, units = np.repeat(clips, 75), np.repeat(np.arange(30), 75)
    order = rng(0, "order").permutation(len(frames))
    np.testing.assert_allclose(bootstrap_interval(frames[order], units=units[order]), bootstrap_interval(clips))
    narrow = np.diff(bootstrap_interval(frames))[0]
    assert np.diff(bootstrap_interval(clips))[0] > 6 * narrow
    assert bootstrap_interval(clips, seed=1) != bootstrap_interval(clips, seed=2)


@pytest.mark.parametrize(
    "values, options, told",
    [
        ([], {}, "2 units"),
        ([1.0], {}, "2 units"),
        ([1.0, np.nan], {}, "finite"),
        ([[1.0, 2.0]], {}, "values"),
        ([1.0, 2.0], dict(n=0), "n, level"),
        ([1.0, 2.0], dict(level=1.0), "n, level"),
        ([1.0, 2.0], dict(units=[1]), "units"),
        ([1.0, 2.0], dict(units=[1, 1]), "2 units"),
    ],
)
def test_bad_bootstrap(values, options, told):
    with pytest.raises(InputError, match=told):
        bootstrap_interval(values, **options)


# --- results


def test_results_round_trip(tmp_path):
    results = [Result(**GOOD), Result(**{**GOOD, "value": 1, "interval": [0, 2], "commit": "x-dirty"})]
    write_results(tmp_path / "a.json", results)
    assert read_results(tmp_path / "a.json") == results
    assert read_json(tmp_path / "a.json")["results"][0].keys() == GOOD.keys()


@pytest.mark.parametrize("name", GOOD)
def test_missing_provenance_is_named(tmp_path, name):
    write_json(tmp_path / "a.json", {"results": [{k: v for k, v in GOOD.items() if k != name}]})
    with pytest.raises(InputError, match=f"'{name}'"):
        read_results(tmp_path / "a.json")
    for empty in (None, "", "  ", True):
        with pytest.raises(InputError, match=rf"Result\.{name}"):
            Result(**{**GOOD, name: empty})


@pytest.mark.parametrize(
    "change",
    [
        dict(value=float("nan")),
        dict(value="0.5"),
        dict(interval=(0.6, 0.4)),
        dict(interval=(0, float("inf"))),
        dict(interval=(1,)),
        dict(interval=0.5),
        dict(n=0),
        dict(n=1.0),
        dict(seed=-1),
        dict(weights_hash="final.safetensors"),
        dict(config_hash="A" * 64),
        dict(date="yesterday"),
        dict(commit=3),
    ],
)
def test_wrong_provenance_is_refused(change):
    (name,) = change
    with pytest.raises(InputError, match=rf"Result\.{name}"):
        Result(**{**GOOD, **change})


@pytest.mark.parametrize(
    "content",
    [[], {"results": 3}, {"results": [3]}, 5, {"results": [{**GOOD, "interval": list(GOOD["interval"]), "note": "x"}]}],
)
def test_other_files_are_no_results(tmp_path, content):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(InputError):
        read_results(tmp_path / "a.json")
    with pytest.raises(InputError, match="Result objects"):
        write_results(tmp_path / "b.json", [GOOD])
