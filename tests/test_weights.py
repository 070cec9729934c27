"""Weights in git: what is saved comes back, nothing damaged is read, nothing half-made stands under a final name."""
import errno
import json
import os

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import nofa_nb.core.weights as W
from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.repro import hash_tensors

RECORD = dict(kind="test", preset="smoke", licence="CC0-1.0", config={"a": 1, "b": [2, 3]}, limits="none")


def numbers(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"b.weight": torch.randn(30, 40, generator=g), "a.weight": torch.randn(900, generator=g).double(),
            "a.count": torch.tensor(2**40 + 1), "c.used": torch.tensor([[True], [False]]), "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(-.125), "turned": torch.randn(20, 9, generator=g).T}


@pytest.fixture
def folder(tmp_path):
    return W.save_weights(tmp_path / "w", numbers(), RECORD, most=4_600)


def test_what_is_saved_comes_back(folder):
    found, record = W.load_weights(folder)
    given_ = numbers()
    assert found.keys() == given_.keys()
    for name, t in given_.items():
        assert found[name].shape == t.shape
        if t.is_floating_point():
            assert found[name].dtype == torch.float32 and torch.equal(found[name], t.half().float())
        else:
            assert found[name].dtype == t.dtype and torch.equal(found[name], t)
    assert {k: record[k] for k in RECORD} == RECORD and record["format"] == 1
    assert record["tensors_hash"] == hash_tensors(found) and record["parameters"] == 1200 + 900 + 1 + 180
    assert len(record["shards"]) == 2 and not list(folder.parent.glob(".*"))
    for entry in record["shards"]:
        assert (folder / entry["file"]).stat().st_size == entry["bytes"] <= 4_600
    again = W.save_weights(folder.parent / "again", found, record)
    assert W.load_weights(again)[1]["tensors_hash"] == record["tensors_hash"]


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 700), min_size=1, max_size=8), most=st.integers(2_700, 6_000))
@example(sizes=[1] * 40, most=2_700)
def test_files_are_as_small_as_promised(sizes, most, tmp_path_factory):
    from nofa_nb.core.io import save_tensors
    tensors = {f"a rather long name of a tensor {i}": torch.ones(n, 1, 1).half() for i, n in enumerate(sizes)}
    parts = W.shards(tensors, most)
    assert sorted(k for p in parts for k in p) == sorted(tensors) and all(parts)
    path = tmp_path_factory.mktemp("s") / "x.safetensors"
    for part in parts:
        save_tensors(path, part)
        assert path.stat().st_size <= most


def test_all_files_can_be_read_by_whom_the_index_can(folder):
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1


def test_default_limit_is_that_of_the_repository(tmp_path):
    big = {f"t{i}": torch.full((3_000_000,), .5) for i in range(3)}  # 6 MB each in 16 bits
    record = json.loads((W.save_weights(tmp_path / "w", big, RECORD) / "weights.json").read_text())
    assert [s["tensors"] for s in record["shards"]] == [2, 1]
    assert max(s["bytes"] for s in record["shards"]) <= 16_000_000


@pytest.mark.parametrize("bad,said", [
    (torch.tensor([1., float("nan")]), "NaN or infinity"), (torch.tensor(float("-inf")), "NaN or infinity"),
    (torch.tensor([0., -65_520.]), "65504"), (torch.ones(2, dtype=torch.complex64), "real"), ([1.], "tensor"),
])
def test_what_cannot_be_stored_is_refused_and_the_old_stays(folder, bad, said):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(InputError, match=said) as error:
        W.save_weights(folder, {"fine": torch.zeros(2), "b.bad": bad}, RECORD)
    assert "b.bad" in str(error.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and not list(folder.parent.glob(".*"))


@pytest.mark.parametrize("key", W.NEEDED)
def test_records_say_what_it_is(tmp_path, key):
    with pytest.raises(InputError, match=key):
        W.save_weights(tmp_path / "w", numbers(), {k: v for k, v in RECORD.items() if k != key})
    assert not list(tmp_path.iterdir())


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="photos"):
        W.save_weights(tmp_path / "photos", numbers(), RECORD)
    assert (tmp_path / "photos" / "cat.jpg").exists()


@pytest.mark.parametrize("when", ["files", "rename"])
def test_a_failure_on_the_way_leaves_the_old_weights(folder, monkeypatch, when):
    old, full = W.load_weights(folder)[1], OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if when == "files":
        monkeypatch.setattr(W, "write_json", lambda *a: (_ for _ in ()).throw(full))
    else:
        real = os.rename
        monkeypatch.setattr(W.os, "rename", lambda a, b: (_ for _ in ()).throw(full) if ".tmp-" in str(a) and
                            "old" not in str(a) else real(a, b))
    with pytest.raises(InputError, match="No space left"):
        W.save_weights(folder, numbers(1), RECORD)
    monkeypatch.undo()
    assert W.load_weights(folder)[1] == old and not list(folder.parent.glob(".*"))


def test_new_weights_replace_old_ones(folder):
    W.save_weights(folder, {"x": torch.ones(3)}, RECORD)
    assert {p.name for p in folder.iterdir()} == {"README.md", "weights-00001-of-00001.safetensors", "weights.json"}
    assert W.load_weights(folder)[0].keys() == {"x"}


def shard(folder, k=1):
    return folder / f"weights-{k:05d}-of-00002.safetensors"


def change(folder, **entries):
    index = json.loads((folder / "weights.json").read_text())
    index.update(entries)
    (folder / "weights.json").write_text(json.dumps(index))
    return index


@settings(max_examples=10, deadline=None)
@given(at=st.integers(0, 2_000), bit=st.integers(0, 7))
def test_any_changed_bit_is_refused(at, bit, tmp_path_factory):
    folder = W.save_weights(tmp_path_factory.mktemp("w"), numbers(), RECORD, most=4_600)
    data = bytearray(shard(folder).read_bytes())
    data[at % len(data)] ^= 1 << bit
    shard(folder).write_bytes(data)
    with pytest.raises(InputError, match="00001-of-00002"):
        W.load_weights(folder)


def test_missing_and_foreign_files_are_refused(folder, tmp_path):
    shard(folder, 2).rename(tmp_path / "away")
    with pytest.raises(MissingResource, match="00002-of-00002"):
        W.load_weights(folder)
    (tmp_path / "away").rename(shard(folder, 2))
    index = change(folder)
    change(folder, shards=index["shards"][:1])
    with pytest.raises(InputError, match="as they were saved"):
        W.load_weights(folder)
    for name in ("../w/weights-00001-of-00002.safetensors", "/etc/passwd", ""):
        change(folder, shards=[{**index["shards"][0], "file": name}])
        with pytest.raises(InputError, match="named files"):
            W.load_weights(folder)
    change(folder, shards=index["shards"], format=2)
    with pytest.raises(InputError, match="format"):
        W.load_weights(folder)
    with pytest.raises(MissingResource, match="weights.json"):
        W.load_weights(tmp_path)
    (folder / "weights.json").write_text("{")
    with pytest.raises(InputError):
        W.load_weights(folder)


def test_finding(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("NOFA_WEIGHTS", raising=False)
    with pytest.raises(MissingResource, match="smoke/nowhere"):
        W.find_weights("smoke", "nowhere")
    own, package = tmp_path / "own", tmp_path / "package" / "nofa_nb"
    monkeypatch.setattr(W.nofa_nb, "__file__", str(package / "__init__.py"))
    W.save_weights(package / "weights" / "smoke" / "tiny", numbers(), RECORD)
    W.save_weights(package / "weights" / "smoke" / "other", numbers(), RECORD)
    W.save_weights(own / "smoke" / "tiny", numbers(), RECORD)
    assert W.find_weights("smoke", "tiny") == package / "weights" / "smoke" / "tiny"
    monkeypatch.setenv("NOFA_WEIGHTS", str(own))
    assert W.find_weights("smoke", "tiny") == own / "smoke" / "tiny"
    assert W.find_weights("smoke", "other") == package / "weights" / "smoke" / "other"
    monkeypatch.setenv("NOFA_WEIGHTS", str(tmp_path / "typo"))
    with pytest.raises(InputError, match="NOFA_WEIGHTS"):
        W.find_weights("smoke", "tiny")
    with pytest.raises(InputError, match="one word"):
        W.find_weights("..", "tiny")


def test_card_tells_and_shows_gaps(folder):
    card, index = (folder / "README.md").read_text(), json.loads((folder / "weights.json").read_text())
    assert "CC0-1.0" in card and "2,281" in card and index["tensors_hash"] in card
    assert all(f"## {title}" in card for title in W.CARD.values())
    assert card.count("not recorded") == len(W.CARD) - 1  # all but the limits
    more = {"measured": {"psnr": [28.1234, 29.5]}, "recipe": ["one", "two"], "seeds": {"train": 0}}
    full = W.model_card({**RECORD, **more})
    assert "| psnr | 28.12 to 29.5 |" in full and "- one\n- two" in full and "| train | 0 |" in full
