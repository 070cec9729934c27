"""Contact sheets: the right tiles in the right places, whole files only."""
import numpy as np
import pytest

from nofa_nb.core.errors import InputError
from nofa_nb.core.io import read_image
from nofa_nb.world import sheets
from nofa_nb.world.sheets import grid, identities, label, sheet, units


def tile(value, size=16):
    return np.full((size, size, 3), value, np.uint8)


def test_grid_runs_row_by_row():
    picture = grid([tile(i) for i in range(5)], 3)
    assert picture.shape == (32, 48, 3)
    assert picture[::16, ::16, 0].tolist() == [[0, 1, 2], [3, 4, 255]]


@pytest.mark.parametrize("size", [16, 48, 128, 512])
def test_label_fits(size):
    marked = (label(tile(128, size), "mouthLowerDownRight") > 150).any(-1)
    columns = marked.any(0).nonzero()[0]
    assert marked.any() and not marked[:size // 2].any()
    assert size < 64 or (columns.min() >= 1 and columns.max() <= size - 2)


def test_people_and_units():
    first, second = identities(4, 24, count=2)
    assert np.array_equal(second, next(identities(5, 24))) and not np.array_equal(first, second)
    tiles = list(units(4, 24))
    assert len(tiles) == 52 and len({t[:16].tobytes() for t in tiles}) > 35  # units differ, above their names


def test_sheet_writes_one_whole_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sheets._KINDS, "views", (lambda seed, size: (tile(i, size) for i in range(4)), 4, 2))
    path = sheet("views", tmp_path / "new" / "views.png", size=16)
    assert read_image(path).shape == (3, 32, 32) and [p.name for p in path.parent.iterdir()] == ["views.png"]


@pytest.mark.parametrize("options,word", [
    (dict(kind="faces"), "kind"), (dict(size=8), "size"), (dict(seed=-1), "seed"), (dict(out="a.gif"), "out")])
def test_bad_input(tmp_path, monkeypatch, options, word):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{word} must be"):
        sheet(**(dict(kind="units", out="a.png") | options))
    assert not list(tmp_path.iterdir())
