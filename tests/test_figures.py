"""Figures 4 to 13: captions have their provenance, what was not run says so, other weights are refused; the runs."""
import ast
import json
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import planned
from matplotlib import pyplot

from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.io import read_json, write_json
from nofa_nb.core.repro import hash_tensors
from nofa_nb.core.weights import save_weights
from nofa_nb.evaluation import figures as G
from nofa_nb.evaluation.avatar import weights_on_planes
from nofa_nb.evaluation.figures import FIGURES, NOT_RUN, About, Figure, panel
from nofa_nb.evaluation.protocols import cross_trials
from nofa_nb.evaluation.tables import PARTS
from nofa_nb.models.avatar import build_avatar_model, save_avatar_model

ROOT = Path(__file__).resolve().parents[1]
DRAWN = [n for n, s in FIGURES.items() if not s.missing]
TEXT = {"licence": "Apache-2.0"}


def about(number, **changes):
    weights = {run: f"{k + 1}" * 64 for k, run in enumerate(FIGURES[number].runs)}
    found = dict(preset="toy", what="the first 2 people of a list", n=2, seed=7, weights=weights,
                 data_hash=G.lists_hash(number), settings={"rows": 2}, commit="c0ffee", date="2026-01-31T12:00:00Z",
                 device="cpu", seconds=1.)
    return About(**{**found, **changes})


def made(number, cells=None, **changes):
    g = torch.Generator().manual_seed(number)
    cells = cells or [[torch.rand(3, 8, 8, generator=g), torch.rand(3, 8, 8, generator=g), NOT_RUN] for _ in range(2)]
    return Figure(number, (panel("Toy", ("source", "ours", "other"), ("1", "2"), cells),), about(number, **changes))


def words_of(plot):
    return [t.get_text() for axes in plot.axes for t in axes.texts]


# captions, files, refusals

@pytest.mark.parametrize("number", DRAWN)
def test_a_caption_has_its_provenance(number):
    told = G.caption(number, made(number))
    wanted = ["Preset toy", "seed 7", "n = 2", "the first 2 people of a list", FIGURES[number].shows, "c0ffee",
              *(f"{run} {str(k + 1) * 12}" for k, run in enumerate(FIGURES[number].runs))]
    assert [w for w in wanted if w not in told] == [] and "RANDOM" not in told and "Not run" not in told
    assert "RANDOM WEIGHTS" in G.caption(number, made(number, trained=False))


def test_a_caption_says_whose_labels_were_given():
    for number in DRAWN:
        told = G.caption(number, made(number))
        assert "are the true labels of the synthetic world, not M's estimates" in told and "photo are M's" not in told
    (toy,) = made(10).panels
    told = G.caption(10, Figure(10, (replace(toy, rows=(G.PHOTO, "make-up 1")),), about(10)))
    assert "not M's estimates; those of the real photo are M's." in told
    told = G.caption(10, Figure(10, (replace(toy, rows=(G.PHOTO, G.PHOTO)),), about(10)))
    assert "cameras are M's estimates." in told and "true labels" not in told


def test_a_missing_run_is_named_and_drawn_as_not_run():
    weights = {"ours": "1" * 64, "full": "2" * 64, "no-identity": NOT_RUN, "no-weights": "3" * 64}
    figure = made(7, weights=weights)
    assert "Not run, as their weights do not exist: no-identity." in G.caption(7, figure)
    plot = G.draw(figure)
    assert words_of(plot) == [NOT_RUN, NOT_RUN] and len(plot.axes[0].images) == 4
    boxes = [t.get_position() for t in plot.axes[0].texts]
    assert boxes == [(2.5, .5), (2.5, 1.5)]  # where the tiles would be


@pytest.mark.parametrize("number", [6, 11])
def test_figures_that_cannot_be_run_say_why(number, tmp_path):
    shown = G.figure(number, "toy", tmp_path)
    assert shown.figure is None and FIGURES[number].missing in shown.caption and "not run" in shown.caption
    assert words_of(shown.plot()) == [NOT_RUN]
    assert [p.exists() for p in shown.write(tmp_path / "out" / "fig")] == [True] * 3


def test_tiles_survive_and_changed_ones_are_refused(tmp_path):
    figure = made(9)
    record, tiles = G.write_figure(tmp_path, figure)
    found = G.read_figure(9, "toy", tmp_path)
    assert found.about == figure.about and (found.panels[0].tiles == figure.panels[0].tiles).all()
    assert found.panels[0].words == figure.panels[0].words and found.panels[0].tiles.std() > 10
    G.write_figure(tmp_path / "other", made(9, [[torch.zeros(3, 8, 8)] * 3] * 2))
    shutil.copy(G.figure_path(tmp_path / "other", "toy", 9).with_suffix(".png"), tiles)
    with pytest.raises(InputError, match="the tiles as they were drawn, got a changed file"):
        G.read_figure(9, "toy", tmp_path)
    tiles.unlink()
    with pytest.raises(MissingResource, match="fig09.png.*make figures PRESET=toy"):
        G.read_figure(9, "toy", tmp_path)
    write_json(record, {**read_json(record), "format": "another"})
    G.write_figure(tmp_path, replace(figure, number=8, about=about(8)))
    with pytest.raises(MissingResource):
        G.figure(9, "toy", tmp_path)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    "Weights of a preset called toy: the model's and those of one ablation."
    place = tmp_path / "weights"
    monkeypatch.setenv("NOFA_WEIGHTS", str(place))
    hashes = {}
    for k, run in enumerate(("ours", "no-weights")):
        tensors = {"x": torch.full((3,), float(k))}
        record = {"kind": "toy", "preset": "toy", "config": {"x": 3}, **TEXT}
        save_weights(place / "toy" / PARTS[run], tensors, record)
        hashes[run] = hash_tensors(tensors)
    return hashes


def test_other_weights_are_refused_with_a_sentence(weights, tmp_path):
    fine = {"ours": weights["ours"], "full": NOT_RUN, "no-identity": NOT_RUN, "no-weights": weights["no-weights"]}
    for given, said in ((fine, ""), ({**fine, "ours": "2" * 64}, "weights of ours in fig07 of toy must be"),
                        ({**fine, "no-weights": NOT_RUN}, "it was trained since"),
                        ({k: v for k, v in fine.items() if k != "no-identity"}, "runs of fig07 of toy must be")):
        G.write_figure(tmp_path, made(7, weights=given))
        if not said:
            assert G.figure(7, "toy", tmp_path).figure.about.weights == fine
            continue
        with pytest.raises(InputError, match=said) as told:
            G.figure(7, "toy", tmp_path)
        assert "remove its files" in str(told.value) and "\n" not in str(told.value)


def test_other_lists_are_refused(tmp_path):
    G.write_figure(tmp_path, made(8, data_hash="5" * 64))
    with pytest.raises(InputError, match="lists of fig08 of toy must be"):
        G.figure(8, "toy", tmp_path)


def test_panels_refuse_what_does_not_fit():
    tile = torch.zeros(3, 8, 8)
    with pytest.raises(InputError, match="2 rows of 1"):
        panel("Toy", ("a",), ("1", "2"), [[tile]])
    with pytest.raises(InputError, match="pictures of one size"):
        panel("Toy", ("a", "b"), ("1",), [[tile, torch.zeros(3, 4, 4)]])
    with pytest.raises(InputError, match="at least one"):
        panel("Toy", ("a",), ("1",), [[NOT_RUN]])


def test_grey_that_means_something_gets_a_bar():
    cells = [[torch.rand(3, 8, 8), torch.linspace(0, 1, 64).reshape(8, 8)]]
    grey = panel("Weights", ("face", "z"), ("1",), cells, "w")
    plot = G.draw(Figure(7, (grey,), about(7)))
    picture, heat = plot.axes[0].images
    assert picture.get_array().shape == (8, 8, 3) and heat.get_array().shape == (8, 8)
    assert len(plot.axes) == 2 and plot.axes[1].get_ylabel() == "w" and heat.get_clim() == (0, 255)


def test_what_is_written_shows_picture_caption_and_provenance(tmp_path):
    G.write_figure(tmp_path, made(10, seconds=12.5))
    shown = G.figure(10, "toy", tmp_path)
    png, pdf, text = shown.write(tmp_path / "out" / "fig10")
    told = text.read_text("utf-8")
    wanted = (shown.caption, "fig10.png", "| weights of face3d | 2222", "| setting rows | 2 |")
    assert [w for w in wanted if w not in told] == []
    picture = pyplot.imread(png)
    assert picture.shape[1] > 1000 and pdf.read_bytes()[:4] == b"%PDF"
    assert shown.caption.split(". ")[0] in "\n".join(t.get_text() for t in shown.plot(words=True).texts)


# what is committed

COMMITTED = [(p.parts[-3], int(p.stem[3:])) for p in sorted((ROOT / "results").glob("*/figures/fig*.json"))]


@pytest.mark.parametrize("preset, number", COMMITTED)
def test_committed_figures_belong_to_these_weights_and_lists(preset, number, monkeypatch):
    monkeypatch.delenv("NOFA_WEIGHTS", raising=False)
    shown = G.figure(number, preset, ROOT / "results")  # a refusal says what changed since, and what to do
    assert shown.figure.about.trained and shown.figure.about.preset == preset


# notebooks and workflow

def code_of(path):
    cells = json.loads((ROOT / path).read_text("utf-8"))["cells"]
    return cells, ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def parameters(path):
    cells, _ = code_of(path)
    text = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    return {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(text).body}


@pytest.mark.parametrize("number", FIGURES)
def test_figure_notebooks_only_draw(number):
    path = f"paper_figures/fig{number:02d}.ipynb"
    cells, code = code_of(path)
    imports = {line for text in code for line in text.splitlines() if re.match(r"\s*(from|import) ", line)}
    assert {i for i in imports if "nofa_nb" in i} == {"from nofa_nb.evaluation.figures import figure"}
    assert list(parameters(path)) == ["preset", "results", "out"] and f"figure({number}," in "".join(code)
    assert FIGURES[number].shows in "".join(cells[0]["source"])


def test_the_workflow_and_the_plans_know_the_figures():
    text = (ROOT / "workflow/figures.smk").read_text("utf-8")
    lists = {k: ast.literal_eval(re.search(rf"^{k} = (\[.*?\])", text, re.M)[1]) for k in ("F_DRAWN", "F_NOT_RUN")}
    assert [int(n) for n in lists["F_DRAWN"]] == DRAWN
    assert {int(n) for n in lists["F_NOT_RUN"]} == set(FIGURES) - set(DRAWN)
    known = parameters("nbs/runs/figures.ipynb")
    assert [int(k) for k in known["figures"].split()] == DRAWN
    plans = sorted((ROOT / "configs/figures").glob("*.yaml"))
    assert {p.stem for p in plans} == {"smoke", "small", "base"}
    for path in plans:
        plan = yaml.safe_load(path.read_text("utf-8"))
        assert set(plan) <= {"every", *(f"fig{n:02d}" for n in DRAWN)}
        assert all(set(v) <= set(known) - {"figures", "preset", "results", "out"} for v in plan.values())
        assert path.stem == "smoke" or plan["every"]["weights"] == ""  # no random weights under a trained preset's name


def test_what_is_missing_is_planned_and_nothing_else(tmp_path):
    results, out = tmp_path / "results/smoke/figures", tmp_path / "out/smoke"
    for folder in (results, out):
        folder.mkdir(parents=True)
    for n in FIGURES:
        for ending in ("json", "png"):
            (results / f"fig{n:02d}.{ending}").write_text("")
        for ending in ("ipynb", "png", "pdf", "md"):
            (out / f"fig{n:02d}.{ending}").write_text("")
    (results / "fig08.json").unlink()
    (out / "fig11.png").unlink()
    text = planned("figures", "figures", results=tmp_path / "results", out=tmp_path / "out")
    counts = dict(re.findall(r"^(tiles|figure|figures) +(\d+)$", text, re.M))
    assert counts == {"tiles": "1", "figure": "2", "figures": "1"}, text[-2000:]


def test_the_check_of_a_whole_preset_says_how_long_the_tiles_took(tmp_path, monkeypatch, capsys):
    for number in DRAWN:
        G.write_figure(tmp_path, made(number, seconds=float(number)))
    monkeypatch.setattr(sys, "argv", ["check_figures.py", "toy", str(tmp_path)])
    runpy.run_path(str(ROOT / "workflow/check_figures.py"))
    took = f"their tiles took {sum(DRAWN)} s, the longest (Fig. {DRAWN[-1]}) {DRAWN[-1]} s, on cpu\n"
    told = capsys.readouterr().out
    assert told.endswith(took) and f"{len(DRAWN)} figures belong to what is here, 2 are not run" in told
    G.write_figure(tmp_path, made(9, data_hash="5" * 64))
    with pytest.raises(SystemExit, match="figures: lists of fig09 of toy must be"):
        runpy.run_path(str(ROOT / "workflow/check_figures.py"))


def run(tmp_path, monkeypatch, path, **given):
    import papermill
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    target = tmp_path / f"{Path(path).stem}-done.ipynb"
    papermill.execute_notebook(str(ROOT / path), str(target), given, cwd=str(tmp_path), kernel_name="python3",
                               progress_bar=False)
    return "".join("".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/markdown", ""))
                   for c in json.loads(target.read_text("utf-8"))["cells"] for o in c.get("outputs", []))


def test_from_weights_to_a_figure_without_the_ablations(tmp_path, monkeypatch):
    "The model has weights, its ablations have none: a run, then its drawing, then the weights change."
    place = tmp_path / "weights"
    model = build_avatar_model("smoke", 3)
    save_avatar_model(place / "smoke" / "avatar", model, TEXT)
    monkeypatch.setenv("NOFA_WEIGHTS", str(place))
    given = dict(preset="smoke", results=str(tmp_path / "results"))
    told = run(tmp_path, monkeypatch, "nbs/runs/figures.ipynb", figures="7", weights="", rows=1, **given)
    assert all(f"{name}: not run" in told for name in ("full", "no-identity", "no-weights"))
    figure = G.read_figure(7, "smoke", tmp_path / "results")
    assert figure.about.trained and figure.about.weights["ours"] == G.present_weights("smoke", "ours")
    assert figure.panels[0].words == (("", "", *[NOT_RUN] * 3),) and np.ptp(figure.panels[1].tiles[0, 0]) > 0
    shown = run(tmp_path, monkeypatch, "paper_figures/fig07.ipynb", **given)
    assert "Not run, as their weights do not exist: full, no-identity, no-weights." in shown and "Preset smoke" in shown
    source = cross_trials(figure.size, 75, 1)[0].source()
    most = weights_on_planes(model.eval().deformation, source.alpha, size=figure.size).max()
    assert f"In (b) the largest weight, drawn as 1, is {most:.3f} (1)." in shown
    save_avatar_model(place / "smoke" / "avatar", build_avatar_model("smoke", 4), TEXT)
    with pytest.raises(InputError, match="weights of ours in fig07 of smoke"):
        G.figure(7, "smoke", tmp_path / "results")
