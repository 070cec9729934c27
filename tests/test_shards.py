"""Shards: what is read is what was rendered, stopped builds end in the same bytes, damage is told apart from data."""
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset

import nofa_nb.world.shards as shards
from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.io import read_json, write_json
from nofa_nb.core.repro import hash_config, hash_file, hash_tensors
from nofa_nb.world.sets import PortraitSet, SetConfig, WorldConfig, loader, person_views
from nofa_nb.world.shards import ShardSet, build, decode, encode, read_manifest, verify, write_shard

SMOKE = dict(split="test", identities=5, views=2, size=32, per_shard=2)
CONFIG = SetConfig(replace(WorldConfig(), resolution=32, texture=64, views=2))


def contents(folder):
    return {p.name: hash_file(p) for p in sorted(folder.iterdir())}


def stream(portraits, **options):
    return [hash_tensors(p.tensors()) for batch in loader(portraits, **options) for p in batch]


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "whole"
    assert build(folder, **SMOKE) == folder / "manifest.json"
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


# --- round trip -------------------------------------------------------------------------------------------------------
def test_what_is_read_is_what_was_rendered(whole):
    rendered = stream(PortraitSet(CONFIG, "test", count=5))
    assert stream(ShardSet(whole, check=True)) == rendered and len(set(rendered)) == 10
    assert stream(ShardSet(whole), workers=2, batch=3) == rendered
    assert stream(ShardSet(whole), mix=3) == stream(PortraitSet(CONFIG, "test", count=5), mix=3)


def test_webdataset_reads_the_same(whole):
    urls = [str(p) for p in sorted(whole.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"{2_000_000 + i:09d}-{v:02d}" for i in range(5) for v in range(2)]
    assert [hash_tensors(decode(s).tensors()) for s in samples] == stream(ShardSet(whole))


def test_jpeg_keeps_the_labels_and_nearly_the_colour():
    exact = person_views(3, [0], replace(CONFIG, sizes=replace(CONFIG.sizes, resolution=64, texture=128)))[0]
    files = {name.split(".", 1)[1]: data for name, data in encode(exact, "jpg")}
    lossy = decode(files)
    error = (lossy.rgb.float() - exact.rgb.float()).square().mean()
    assert 0 < error < 255**2 / 10**3.5  # above 35 dB
    assert all(torch.equal(getattr(lossy, n), t) for n, t in exact.tensors().items() if n != "rgb")


def test_manifest(whole):
    manifest = read_json(whole / "manifest.json")
    assert [manifest[k] for k in ("licence", "split", "identities", "images")] == ["CC0-1.0", "test", 5, 10]
    assert [(s["name"], s["first"], s["identities"], s["images"]) for s in manifest["shards"]] == [
        ("test-000000.tar", 2_000_000, 2, 4), ("test-000001.tar", 2_000_002, 2, 4),
        ("test-000002.tar", 2_000_004, 1, 2)]
    assert manifest["config_hash"] == hash_config(manifest["plan"]) and manifest["code"]
    assert manifest["bytes"] == sum(p.stat().st_size for p in whole.glob("*.tar"))
    assert all(s["sha256"] == hash_file(whole / s["name"]) for s in manifest["shards"])


def test_tars_carry_nothing_of_the_machine(whole):
    with tarfile.open(whole / "test-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert len(members) == 2 * 2 * 4


# --- going on ---------------------------------------------------------------------------------------------------------
def test_workers_give_the_same_bytes(whole, tmp_path):
    build(tmp_path, **SMOKE, workers=2)
    assert contents(tmp_path) == contents(whole)


def test_killed_build_goes_on_to_the_same_bytes(whole, tmp_path):
    code = ("import sys, time, nofa_nb.world.shards as s; encode = s.encode\n"
            "s.encode = lambda *a: (time.sleep(.15), encode(*a))[1]\n"  # slow enough to be caught in its second shard
            f"s.build(sys.argv[1], **{SMOKE!r})")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    deadline = time.time() + 60
    while not (tmp_path / "test-000000.tar").exists() or not list(tmp_path.glob(".test-000001.tar.tmp-*")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(".test-000001.tar.tmp-*")) and not (tmp_path / "manifest.json").exists()
    with pytest.raises(MissingResource, match="not finished"):
        ShardSet(tmp_path)
    date = (tmp_path / "test-000000.tar").stat().st_mtime_ns
    build(tmp_path, **SMOKE)
    assert contents(tmp_path) == contents(whole)  # the leftover is gone, too
    assert (tmp_path / "test-000000.tar").stat().st_mtime_ns == date  # kept


def test_finished_build_renders_nothing(copy, whole, monkeypatch):
    monkeypatch.setattr(shards, "person_views", lambda *a: pytest.fail("rendered again"))
    build(copy, **SMOKE)
    assert contents(copy) == contents(whole)


def test_full_disk_midway(whole, tmp_path, monkeypatch):
    written = []

    def addfile(self, entry, data, plain=tarfile.TarFile.addfile):
        written.append(entry.name)
        if len(written) == 25:  # in the second shard
            raise OSError(28, "No space left on device")
        plain(self, entry, data)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", addfile)
        with pytest.raises(InputError, match=r"No space left.*1 of 3 shards are done and kept"):
            build(tmp_path, **SMOKE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["journal.json", "test-000000.tar"]
    build(tmp_path, **SMOKE)
    assert contents(tmp_path) == contents(whole)


def test_interrupt_leaves_nothing_half_written(tmp_path, monkeypatch):
    def stop(portrait, image):
        raise KeyboardInterrupt
    monkeypatch.setattr(shards, "_need_room", lambda *a: None)
    monkeypatch.setattr(shards, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, **SMOKE)
    assert [p.name for p in tmp_path.iterdir()] == ["journal.json"]


def test_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="^out must be on a disk with about .* GB free"):
        build(tmp_path / "new", **SMOKE)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("change", [
    dict(views=3), dict(identities=6), dict(world="reduced"), dict(image="jpg"), dict(seed0=2_000_001)])
def test_another_plan_is_refused(copy, change):
    before = contents(copy)
    with pytest.raises(InputError, match="begun with the same arguments"):
        build(copy, **(SMOKE | change))
    assert contents(copy) == before


def test_another_version_is_refused(copy):
    manifest = read_json(copy / "manifest.json")
    write_json(copy / "manifest.json", manifest | {"code": "0123abc"})
    with pytest.raises(InputError, match="begun by 0123abc"):
        build(copy, **SMOKE)


@pytest.mark.parametrize("options,word", [
    (dict(split="exam"), "split"), (dict(identities=0), "identities"), (dict(views=0), "views"),
    (dict(size=8), "size"),
    (dict(workers=-1), "workers"), (dict(per_shard=0), "per_shard"),
    (dict(seed0=-1), "first"), (dict(seed0=5), "first"),
    (dict(image="gif"), "image"), (dict(world="flat"), "world"), (dict(sampling="none"), "sampling"),
    (dict(identities=10_001), "count"),
])
def test_bad_arguments_write_nothing(tmp_path, options, word):
    with pytest.raises(InputError, match=f"^{word} must be"):
        build(tmp_path / "out", **(SMOKE | options))
    assert not (tmp_path / "out").exists()


def test_bad_folders(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="^out must be a folder to write to"):
        build(tmp_path / "file", **SMOKE)
    monkeypatch.setattr(shards.os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="read-only"):
        build(tmp_path, **SMOKE)


# --- damage -----------------------------------------------------------------------------------------------------------
def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)


def test_verify_finds_a_changed_byte_and_build_repairs_it(copy, whole):
    assert verify(copy) == 10
    flip(copy / "test-000001.tar", 3000)
    with pytest.raises(InputError, match="hash.*test-000001.tar"):
        verify(copy)
    with pytest.raises(InputError, match="test-000001.tar"):
        ShardSet(copy, check=True)
    build(copy, **SMOKE)
    assert contents(copy) == contents(whole)


def test_truncated_and_missing_shards(copy):
    path = copy / "test-000002.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(InputError, match="bytes long.*cut off"):
        ShardSet(copy)
    path.unlink()
    with pytest.raises(MissingResource, match="test-000002.tar is missing"):
        ShardSet(copy)


def test_no_manifest(tmp_path):
    with pytest.raises(MissingResource, match="no manifest.json"):
        ShardSet(tmp_path)


OUTSIDE = dict(name="../x.tar", bytes=1, images=2, identities=1, sha256="0" * 64)


@pytest.mark.parametrize("change", [{"shards": []}, {"shards": None}, {"plan": None}, {"shards": [OUTSIDE]}])
def test_a_foreign_manifest_is_refused(copy, change):
    write_json(copy / "manifest.json", read_json(copy / "manifest.json") | change)
    with pytest.raises(InputError, match="manifest that `build` writes"):
        read_manifest(copy)


def replaced(folder, suffix, data):
    "The first shard with one file of its first portrait replaced, and a manifest that knows of it."
    path = folder / "test-000000.tar"
    with tarfile.open(path) as tar:
        files = [(m.name, tar.extractfile(m).read()) for m in tar]
    at = next(i for i, (name, _) in enumerate(files) if name.endswith(suffix))
    files[at:at + 1] = [] if data is None else [(files[at][0], data)]
    write_shard(path, iter([files]))
    manifest = read_json(folder / "manifest.json")
    manifest["shards"][0] |= dict(bytes=path.stat().st_size, sha256=hash_file(path))
    write_json(folder / "manifest.json", manifest)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def arrays(**named):
    file = io.BytesIO()
    np.savez(file, **named)
    return file.getvalue()


@pytest.mark.parametrize("suffix,data", [
    ("json", None), ("json", b"{}"), ("json", b"not JSON"), ("json", json.dumps(dict(identity=1)).encode()),
    ("rgb.png", b"\x89PNG cut off"), ("rgb.png", None), ("mask.png", b""), ("maps.npz", b"PK"), ("maps.npz", None),
    ("maps.npz", arrays(depth=np.zeros((1, 9, 9), np.float16), pncc=np.zeros((3, 32, 32), np.float16))),
    ("maps.npz", arrays(depth=np.array([Bomb()], object), pncc=np.zeros(1))), ("maps.npz", pickle.dumps(Bomb())),
])
def test_damaged_members_are_refused(copy, suffix, data, monkeypatch):
    monkeypatch.chdir(copy)
    replaced(copy, suffix, data)
    with pytest.raises(InputError, match="cannot read the shard.*test-000000.tar"):
        list(ShardSet(copy, check=True))
    assert not (copy / "exploded").exists()


def test_a_portrait_under_a_wrong_name_is_refused(copy):
    with tarfile.open(copy / "test-000001.tar") as tar:
        other = tar.extractfile(tar.getnames()[0]).read()
    replaced(copy, "json", other)
    with pytest.raises(InputError, match="holds another portrait"):
        ShardSet(copy).identity(0)


def test_any_flipped_byte_is_noticed_or_harmless(copy):
    "Without the hashes, a damaged shard is read, perhaps as other numbers, or is an InputError; never another error."
    path = copy / "test-000000.tar"
    data = path.read_bytes()
    for at in range(0, len(data), len(data) // 60):
        flip(path, at)
        try:
            ShardSet(copy).identity(0)
        except InputError:
            pass
        path.write_bytes(data)
