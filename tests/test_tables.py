"""Tables 1 to 5: published numbers in their columns only, measured ones shown or refused, claims, orders, files."""
import ast
import json
import os
import re
import signal
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import planned, snakemake
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from nofa_nb.apps import campaign
from nofa_nb.core import repro
from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.io import read_json, write_json
from nofa_nb.core.repro import Result, bootstrap_interval, hash_config, read_results, write_results
from nofa_nb.core.weights import save_weights
from nofa_nb.evaluation import claims, comparison, report, tables
from nofa_nb.evaluation.comparison import ByUnit, LeftOut
from nofa_nb.evaluation.tables import PARTS, TABLES, Column

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {"psnr": "dB, full frame", "ssim": "Gaussian 11x11", "perceptual": "VGG-HED, full frame",
         "aed": "M's expression; M of the world", "apd": "M's angles; M of the world",
         "csim_dlib": "cosine, dlib ResNet (independent)", "frechet_DCT-104": "DCT-104, 24 pictures"}
RUNS = {"ours": ("coarse", "fine"), "nofa": ("result",), "facevid2vid": ("result",), "no-hybrid": ("fine",),
        "full": ("fine",), "no-weights": ("fine",), "no-identity": ("fine",), "hybrid": ("fine",)}
PEOPLE = [f"p{i}" for i in range(10)]


def about(protocol="self", **changes):
    found = dict(weights_hash="1" * 64, data_hash=tables.manifest_hash(protocol), seed=0, device="cpu", commit="c0ffee",
                 date="2026-01-31T12:00:00Z", preset="toy", config_hash="2" * 64)
    return found | changes


def write(folder, protocol, run, shift=0., told=None, **changes):
    "Results and units of a run; numbers that no paper prints; with `told`, the settings they are said to be of."
    changes |= {"config_hash": hash_config(told)} if told else {}
    g = np.random.default_rng(sorted(RUNS).index(run))
    kept = {}
    for k, kind in enumerate(RUNS[run]):
        names = [m for m in TEXTS if protocol == "self" or m not in ("psnr", "ssim", "perceptual")]
        kept[kind] = {m: ByUnit({u: float(7000 + 100 * i + k + shift + v) for u, v in zip(PEOPLE, g.normal(0, .2, 10))})
                      for i, m in enumerate(names) if m != "frechet_DCT-104"}
        left = tuple(float(9000 + shift + v) for v in g.normal(0, .01, 10))
        kept[kind]["frechet_DCT-104"] = LeftOut(9000. + shift, left, tuple((u,) for u in PEOPLE))
    where = about(protocol, **changes)
    rows = []
    for kind, ms in kept.items():
        for m, k in ms.items():
            value = k.whole if isinstance(k, LeftOut) else float(np.mean([*k.values.values()]))
            rows.append(Result(f"row, {kind}", value, (value - 1, value + 1), 10, m, TEXTS[m], **where))
    write_results(tables.result_path(folder, "toy", protocol, run), rows)
    beside = {k: where[k] for k in ("weights_hash", "data_hash", "commit", "config_hash")}
    beside |= {"settings": told} if told else {}
    comparison.write_units(tables.units_path(folder, "toy", protocol, run), kept, beside)


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    for protocol in ("self", "cross"):
        for run in RUNS:
            write(folder, protocol, run)
    return folder


# published numbers

def test_published_numbers_reach_only_the_published_columns(results, monkeypatch):
    "Every printed number is replaced by one that stands nowhere else; then it is looked for everywhere."
    real = read_json(Path(tables.__file__).parents[1] / "assets" / "published.json")
    marks = iter(range(310_001, 320_000))
    fake = json.loads(json.dumps(real))
    for t in fake["tables"].values():
        t["rows"] = {row: [float(next(marks)) for _ in numbers] for row, numbers in t.get("rows", {}).items()}
    monkeypatch.setattr(tables, "read_json", lambda p: fake if Path(p).name == "published.json" else read_json(p))
    seen = 0
    for number in TABLES:
        r = report.report(number, "toy", results)
        for block in r.tables:
            sides = [group.split(",")[0] for group, _ in block.head]
            for row in block.rows:
                for side, cell in zip(sides, row):
                    found = re.findall(r"31\d{4}", cell)
                    assert side == "published" or not found, (number, cell)
                    seen += len(found)
            assert not re.search(r"31\d{4}", " ".join((block.title, *block.notes, *(t for _, t in block.head))))
        rest = [b.markdown() for b in r.claims + r.provenance] + list(r.words)
        assert not re.search(r"31\d{4}", "\n".join(rest)), number
    assert seen == sum(len(v) for t in real["tables"].values() for v in t.get("rows", {}).values())


def test_no_published_number_stands_in_the_code():
    "Numbers of four digits or more are telling enough; only the data file may hold them."
    long = ("FID", "PSNR")
    printed = {f"{v:.2f}" for n in TABLES for (_, c), v in tables.published(n).values.items() if c.endswith(long)}
    places = ("nofa_nb/evaluation/*.py", "nofa_nb/baselines/*.py", "paper_figures/*.ipynb", "nbs/runs/*.ipynb",
              "configs/**/*.yaml", "workflow/*")
    found = [p for place in places for p in ROOT.glob(place) if p.is_file()]
    assert len(found) > 15
    text = {p.name: p.read_text("utf-8") for p in found}
    seen = [(n, p) for p in sorted(printed) for n, t in text.items()
            if re.search(rf"(?<![\d.]){re.escape(p)}(?!\d)", t)]
    assert len(printed) > 25 and not seen


def test_lost_tables_say_so_and_reading_15_keeps_both(results):
    for number in (4, 5):
        p = tables.published(number)
        assert not p.values and p.missing
        block = report.report(number, "toy", results).tables[0]
        cells = {c for row in block.rows for (group, _), c in zip(block.head, row) if group.startswith("published")}
        assert cells == {p.missing}
    one, three = tables.published(1).values["Ours", "self/CSIM"], tables.published(3).values["w/", "self/CSIM"]
    assert one != three


def test_the_judge_that_no_training_has_looked_at_comes_first():
    judges = {"csim_F": "F of the world (in the losses, not independent)", "csim_dlib": "dlib ResNet (independent)"}
    both = [Result("row, fine", 1., (0., 2.), 10, m, f"cosine, source and result, {j}", **about())
            for m, j in judges.items()]
    assert [r.metric for r in sorted(both, key=lambda r: tables._order(r, "CSIM"))] == ["csim_dlib", "csim_F"]


def test_a_full_model_of_another_training_says_so(results, monkeypatch):
    said = lambda: [n for b in report.report(5, "toy", results).tables for n in b.notes if n.startswith("full:")]
    assert said() == []  # no weights at hand to hold it against
    for there, notes in (("1" * 64, 0), ("2" * 64, 1)):  # its own, then others
        monkeypatch.setattr(report, "present_weights", lambda preset, run, there=there: there)
        assert len(said()) == notes


def test_the_layout_is_the_papers():
    for n in (1, 2, 3):
        assert {(r.name, c.key) for r in TABLES[n].rows for c in TABLES[n].columns} == set(tables.published(n).values)


# results and what they belong to

def test_not_run_is_never_a_number(results):
    r = report.report(1, "toy", results)
    rows = {row[0]: row[1:] for row in r.tables[0].rows}
    measured = [i for i, (group, _) in enumerate(r.tables[0].head[1:]) if group.startswith("measured")]
    for label in ("PIRenderer [59]", "StyleHEAT [1]", "ROME [61]", "HideNeRF [62]", "Real3D [71]", "VOODOO3D [72]"):
        assert {rows[label][i] for i in measured} == {"not run"}
    for label in ("Ours", "NOFA [31]", "Face-vid2vid [3]"):
        assert all(re.match(r"[\d.]+ \[", rows[label][i]) for i in measured)
    two = report.report(2, "toy", results)
    assert "not run" in two.markdown() and not two.provenance


@pytest.mark.parametrize("number", [1, 3, 4, 5])
def test_a_missing_result_is_an_error(results, number):
    protocol, run = sorted(tables.wanted(TABLES[number], results, "toy"))[0]
    path = tables.result_path(results, "toy", protocol, run)
    path.unlink()
    with pytest.raises(MissingResource, match=f"{re.escape(str(path))}.*make tables PRESET=toy"):
        report.report(number, "toy", results)


def test_missing_units_are_an_error(results):
    tables.units_path(results, "toy", "self", "nofa").unlink()
    with pytest.raises(MissingResource, match="numbers by unit"):
        report.report(1, "toy", results)


@pytest.mark.parametrize("change,what", [
    ({"commit": "other"}, "commit"), ({"data_hash": "3" * 64}, "manifest"), ({"data_hash": "none"}, "manifest"),
    ({"config_hash": "4" * 64}, "settings"), ({"preset": "small"}, "preset")])
def test_results_of_something_else_are_refused_by_name(results, change, what):
    write(results, "self", "nofa", **change)
    why = "different ways" if what == "settings" else f"the {what} changed"
    with pytest.raises(InputError, match=rf"{what} of toy/self-nofa.json must be .* got .*{why}"):
        report.report(1, "toy", results)


def test_a_commit_with_changes_is_told_from_the_commit(results):
    long = "5" * 40
    for protocol in ("self", "cross"):
        for run in RUNS:
            write(results, protocol, run, commit=long + "-dirty" * ((protocol, run) == ("self", "nofa")))
    with pytest.raises(InputError, match="self-nofa.json must be 555555555555..., .* got 555555555555...-dirty"):
        report.report(1, "toy", results)


def test_a_commit_that_is_asked_for_is_held(results):
    report.report(3, "toy", results, commit="c0ffee")
    with pytest.raises(InputError, match="commit of toy/self-no-hybrid.json must be other"):
        report.report(3, "toy", results, commit="other")


def test_changed_weights_are_refused(results, tmp_path, monkeypatch):
    record = dict(kind="baseline", preset="toy", config={"a": 1}, licence="Apache-2.0")
    place = save_weights(tmp_path / "w" / "toy" / "nofa", {"x": torch.arange(6.)}, record)
    monkeypatch.setenv("NOFA_WEIGHTS", str(tmp_path / "w"))
    with pytest.raises(InputError, match="weights of toy/.*-nofa.json.*the weights changed"):
        report.report(1, "toy", results)
    own = read_json(place / "weights.json")["tensors_hash"]
    for protocol in ("self", "cross"):
        write(results, protocol, "nofa", weights_hash=own)
    assert any("as here" in row[1] for row in report.report(1, "toy", results).provenance[0].rows)
    (shard,) = place.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    with pytest.raises(InputError, match=re.escape(shard.name) + ".*a changed file"):
        report.report(1, "toy", results)


def test_settings_that_differ_are_named(results):
    told = {"stride": 12, "labels": "truth", "M": "none"}
    for protocol in ("self", "cross"):
        for run in RUNS:
            write(results, protocol, run, told=told)
    report.report(1, "toy", results)
    write(results, "self", "nofa", told=told | {"stride": 25})
    with pytest.raises(InputError, match="settings of toy/self-nofa.json must be stride 12, .* got stride 25"):
        report.report(1, "toy", results)


def test_other_judges_than_those_here_are_refused(results, tmp_path, monkeypatch):
    record = dict(kind="face3d", preset="toy", config={"a": 1}, licence="Apache-2.0")
    place = save_weights(tmp_path / "w" / "toy" / "face3d", {"x": torch.arange(6.)}, record)
    monkeypatch.setenv("NOFA_WEIGHTS", str(tmp_path / "w"))
    for M, fits in ((read_json(place / "weights.json")["tensors_hash"], True), ("f" * 64, False)):
        write(results, "self", "ours", told={"M": M})
        if fits:
            assert report.report(4, "toy", results).provenance
    with pytest.raises(InputError, match="M of toy/self-ours.json .* got ffffffffffff.*who judges changed"):
        report.report(4, "toy", results)


def test_commits_without_a_change_in_what_measures_are_one(tmp_path, monkeypatch):
    "Results are committed, one is deleted and measured again: it carries another commit, of the same code."
    def git(*words):
        done = subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True,
                              capture_output=True, text=True)
        return done.stdout.strip()

    def commit(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        git("add", "-A")
        git("commit", "-qm", "x")
        return git("rev-parse", "HEAD")
    git("init", "-q")
    first = commit(nofa_nb__ops="1", nofa_nb__weights__w="1")
    second = commit(nofa_nb__weights__w="2", results="1")
    third = commit(nofa_nb__ops="2")
    monkeypatch.setattr(repro.nofa_nb, "__file__", str(tmp_path / "nofa_nb" / "__init__.py"))
    assert repro.same_code(first, second, tables.MEASURING) and not repro.same_code(first, second)
    monkeypatch.setattr(tables, "manifest_hash", lambda protocol: "none")
    found = {("self", run): [Result("r", 1., (0., 2.), 2, "psnr", "dB", **about(data_hash="none", commit=c))]
             for run, c in (("ours", first), ("nofa", second), ("facevid2vid", first))}
    tables.check_provenance(found, "toy")
    found["self", "nofa"] = [Result("r", 1., (0., 2.), 2, "psnr", "dB", **about(data_hash="none", commit=third))]
    with pytest.raises(InputError, match="commit of toy/self-nofa.json"):  # and not of the two others
        tables.check_provenance(found, "toy")


def test_units_of_another_measurement_are_refused(results):
    path = tables.units_path(results, "toy", "self", "ours")
    kept, four = comparison.read_units(path)
    comparison.write_units(path, kept, four | {"commit": "other"})
    with pytest.raises(InputError, match="another commit"):
        report.report(4, "toy", results)
    kept["fine"]["psnr"].values["p0"] += 1.
    comparison.write_units(path, kept, four)
    with pytest.raises(InputError, match="psnr in .*as in the result"):
        report.report(4, "toy", results)


def test_a_column_is_measured_in_one_way(results):
    path = tables.result_path(results, "toy", "self", "nofa")
    rows = [json.loads(json.dumps(vars(r))) for r in read_results(path)]
    for r in rows:
        r["variant"] = "LPIPS-VGG, full frame" if r["metric"] == "perceptual" else r["variant"]
    write_results(path, [Result(**r) for r in rows])
    with pytest.raises(InputError, match="self/LPIPS of Table 1 must be of one definition"):
        tables.measured(1, "toy", results)


@pytest.mark.parametrize("metric,variant,name,said", [
    ("fid_Inception_pool-2048", "Inception pool-2048, 99 pictures", "FID", "FID"),
    ("frechet_DCT-104", "DCT-104, 99 pictures", "FID", "Fréchet DCT-104*"),
    ("lpips", "LPIPS-Alex, full frame", "LPIPS", "LPIPS"), ("lpips", "LPIPS-VGG, full frame", "LPIPS", "LPIPS*"),
    ("perceptual", "VGG-HED, full frame", "LPIPS", "VGG-HED distance*"),
    ("csim_ArcFace", "cosine, ArcFace", "CSIM", "CSIM"), ("csim_F", "cosine, F", "CSIM", "CSIM (F)*"),
    ("aed", "M's expression; M of the world", "AED", "AED (M)*"), ("psnr", "dB", "PSNR", "PSNR"),
    ("apd", "angles; Deep3DFaceRecon", "APD", "APD"), ("apd", "angles; SMIRK", "APD", "APD (SMIRK)*")])
def test_a_column_is_named_as_it_is_measured(metric, variant, name, said):
    assert tables.fits(metric, name) and tables.heading(metric, variant, name) == said


# differences, claims, orders

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=9))
def test_kendall_agrees_with_scipy(pairs):
    x, y = zip(*pairs)
    ours, theirs = comparison.kendall(x, y), kendalltau(x, y).statistic
    assert (np.isnan(ours) and np.isnan(theirs)) or ours == pytest.approx(theirs)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.floats(-3, 3))
def test_a_paired_difference_forgets_what_units_share(seed, gap):
    g = np.random.default_rng(seed)
    hard, a, b = g.normal(0, 50, 12), g.normal(0, 1, 12), g.normal(0, 1, 12)
    def by(x):
        return ByUnit({f"p{i}": float(v) for i, v in enumerate(x)})
    plain, mixed = comparison.paired(by(a + gap), by(b)), comparison.paired(by(hard + a + gap), by(hard + b))
    assert mixed.value == pytest.approx(plain.value) and mixed.interval == pytest.approx(plain.interval, abs=1e-9)
    order = sorted(range(12), key=lambda i: f"p{i}")
    assert plain.interval == pytest.approx(bootstrap_interval([a[i] + gap - b[i] for i in order]))
    other = comparison.paired(by(b), by(a + gap))
    assert other.value == pytest.approx(-plain.value) and other.n == 12


def toy(psnr=None, fid=None):
    "Kept numbers of Table 1's measured rows: PSNR by unit, the Fréchet distance of the whole set."
    g, kept = np.random.default_rng(0), {}
    for row, v in (psnr or {}).items():
        kept[row, "self/PSNR"] = ByUnit({u: float(v + e) for u, e in zip(PEOPLE, g.normal(0, .1, 10))})
    for row, v in (fid or {}).items():
        kept[row, "self/FID"] = LeftOut(v, tuple(v + e for e in g.normal(0, .01, 10)), tuple((u,) for u in PEOPLE))
    return kept


@pytest.mark.parametrize("ours,nofa,status", [
    (25., 24., "holds"), (24., 25., "does not hold"), (24., 24., "undecided")])
def test_a_claim_is_judged_by_the_interval(ours, nofa, status):
    up = claims.Claim(1, "Ours", "NOFA", Column("self", "PSNR"), "numbers")
    down = claims.Claim(1, "Ours", "NOFA", Column("self", "FID"), "numbers")
    assert claims.judge(up, toy({"Ours": ours, "NOFA": nofa})).status == status
    assert claims.judge(down, toy(fid={"Ours": nofa, "NOFA": ours})).status == status  # less is better
    assert claims.judge(up, toy({"Ours": ours})).status == "not run"


def test_claims_are_the_papers_directions():
    for n in (1, 2, 3):
        printed = tables.published(n).values
        found = claims.claims_of(n)
        for c in found:
            a, b = printed[c.better, c.column.key], printed[c.worse, c.column.key]
            assert a < b if c.column.lower else a > b
        rows, ties = len(TABLES[n].rows), 0
        for column in TABLES[n].columns:
            v = [printed[r.name, column.key] for r in TABLES[n].rows]
            ties += sum(v[i] == v[j] for i in range(rows) for j in range(i))
        assert len(found) == len(set(found)) == len(TABLES[n].columns) * rows * (rows - 1) // 2 - ties
    assert {(c.better, c.worse, c.column.name) for c in claims.claims_of(5)} == {
        ("full", "w/o weights", "AED"), ("full", "w/o identity", "CSIM")}
    assert {(c.better, c.worse) for c in claims.claims_of(4)} == {("fine", "coarse")} and len(claims.claims_of(4)) == 5


def test_statements_about_most_columns():
    best, fids = {"Ours": 25., "NOFA": 24.}, {"Ours": 1., "NOFA": 2.}
    words = claims.STATEMENTS[0]
    assert claims.weigh(words, toy(best, fids)).status == "holds"
    assert claims.weigh(words, toy(best, {"Ours": 2., "NOFA": 1.})).status == "does not hold"  # one of two is not most
    assert claims.weigh(words, toy(best, {"Ours": 1., "NOFA": 1.})).status == "undecided"
    assert claims.weigh(words, toy({"Ours": 25.})).status == "not run"


@pytest.mark.parametrize("nofa,other,status", [
    (2., 3., "holds"), (2., 2., "undecided"), (1., 3., "does not hold")])
def test_where_the_paper_is_level_not_to_be_beaten_is_enough(nofa, other, status):
    "The paper prints one APD for NOFA and ours, and a greater one for Face-vid2vid; less is better."
    g = np.random.default_rng(0)
    kept = {(row, "self/APD"): ByUnit({u: float(v + e) for u, e in zip(PEOPLE, g.normal(0, .1, 10))})
            for row, v in (("Ours", 2.), ("NOFA", nofa), ("Face-vid2vid", other))}
    found = claims.weigh(claims.STATEMENTS[1], kept)
    assert found.status == status and found.against == ("Face-vid2vid", "NOFA")


def test_orders_agree_or_not():
    kept = toy({"Face-vid2vid": 20., "NOFA": 21., "Ours": 22.}, {"Face-vid2vid": 1., "NOFA": 2., "Ours": 3.})
    found = claims.orders(1, kept)
    assert found["self/PSNR"].tau == 1 and found["self/FID"].tau == -1  # the printed order, and its reverse
    assert found["mean"].tau == 0 and found["mean"].interval == (0., 0.) and found["self/PSNR"].n == 3
    assert claims.orders(5, kept) == {}


def test_measured_numbers_do_not_depend_on_published_ones(results, monkeypatch):
    "Printed values reversed: claims turn round, nothing measured changes."
    before = report.report(1, "toy", results)
    values = tables.published(1)
    turned = values._replace(values={k: -v for k, v in values.values.items()})
    for module in (tables, claims, report):
        monkeypatch.setattr(module, "published", lambda n: turned if n == 1 else tables.published(n))
    after = report.report(1, "toy", results)
    for a, b in zip(before.tables, after.tables):
        keep = [i for i, (group, _) in enumerate(a.head) if not group.startswith("published")]
        assert [[r[i] for i in keep] for r in a.rows] == [[r[i] for i in keep] for r in b.rows] and a.notes == b.notes
    one, two = ({frozenset(r[0].partition(": ")[2].partition(" in ")[0].split(" beats ")): r for r in x.claims[1].rows
                 if "self/PSNR" in r[0]} for x in (before, after))
    turn = {"holds": "does not hold", "does not hold": "holds", "undecided": "undecided"}
    assert one.keys() == two.keys() and all(two[k][3] == turn[one[k][3]] for k in one)


# the three ways of writing

class Tags(HTMLParser):
    VOID = {"meta"}

    def __init__(self):
        super().__init__()
        self.open, self.cells, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=12), min_size=4, max_size=4))
def test_any_text_survives_in_html_and_latex(cells):
    block = report.Block("T", (("", "a"), ("g", "b")), (tuple(cells[:2]), tuple(cells[2:])))
    parser = Tags()
    parser.feed(report.html_of(block))
    assert parser.open == [] and parser.cells == cells
    lines = [line for line in report.latex_of(block).split("\n") if line.startswith("{") and line.endswith(r"\\")]
    assert len(lines) == 3
    for line in lines:
        bare = re.sub(r"\\[&%$#_{}]", "", line)
        assert bare.count("&") == 1 and not re.search(r"[%#_]", bare) and bare.count("{") == bare.count("}")


def test_reports_are_written_whole(results, tmp_path):
    r = report.report(1, "toy", results)
    paths = r.write(tmp_path / "out" / "table1")
    assert [p.name for p in paths] == ["table1.md", "table1.html", "table1.tex"]
    parser = Tags()
    parser.feed(paths[1].read_text("utf-8"))
    assert parser.open == [] and parser.cells == [c for b in r.blocks for row in b.rows for c in row]
    assert report.report(1, "toy", results).markdown() == paths[0].read_text("utf-8")  # twice the same


def test_a_discussion_stands_beside_its_claim(results):
    write(results, "self", "ours", shift=-50.)
    missed = [r[0] for r in report.report(1, "toy", results).claims[1].rows if r[3] == "does not hold"]
    assert missed
    write_json(results / "toy" / "discussion.json", {missed[0]: "Short training."})
    block = report.report(1, "toy", results).claims[3]
    said = dict(block.rows)
    assert all(said[m] == ("Short training." if m == missed[0] else "not discussed yet") for m in missed)
    words = {s.words for s in claims.STATEMENTS}
    assert said.keys() - set(missed) and said.keys() - set(missed) <= words  # statements that fail stand there, too


# runs and notebooks

def draw(number, tmp_path, results):
    import papermill
    target = tmp_path / f"table{number}.ipynb"
    given = dict(preset="toy", results=str(results), out=str(tmp_path / "out"))
    papermill.execute_notebook(str(ROOT / f"paper_figures/table{number}.ipynb"), str(target), given,
                               kernel_name="python3", progress_bar=False)
    return json.loads(target.read_text("utf-8"))


def test_a_table_notebook_draws_what_is_there(results, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = draw(4, tmp_path, results)
    outputs = [o.get("data", {}) for c in done["cells"] for o in c.get("outputs", [])]
    shown = "".join("".join(data.get("text/markdown", [])) for data in outputs)
    assert "not in our copy" in shown and "PSNR" in shown and "fine beats coarse" in shown and "self-ours.json" in shown
    assert (tmp_path / "out" / "table4.html").exists() and (tmp_path / "out" / "table4.tex").exists()


def test_a_table_notebook_stops_where_a_result_is_missing(results, tmp_path, monkeypatch):
    import papermill
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tables.result_path(results, "toy", "self", "no-hybrid").unlink()
    why = "self-no-hybrid.json, the result of w/o hybrid data in Table 3, is missing"
    with pytest.raises(papermill.PapermillExecutionError, match=why):
        draw(3, tmp_path, results)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", TABLES)
def test_table_notebooks_only_draw(number):
    "No model, no GPU: nothing is imported but the report; and the same parameters everywhere."
    cells = json.loads((ROOT / f"paper_figures/table{number}.ipynb").read_text("utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    imports = {line for text in code for line in text.splitlines() if re.match(r"\s*(from|import) ", line)}
    assert {i for i in imports if "nofa_nb" in i} == {"from nofa_nb.evaluation.report import report"}
    assert "torch" not in str(imports)
    first = next(c for c in cells if "parameters" in c["metadata"].get("tags", []))
    names = [n.targets[0].id for n in ast.parse("".join(first["source"])).body]
    assert names == ["preset", "results", "commit", "out", "seed"] and f"report({number}," in "".join(code)


def literal(path, name):
    "A dictionary in a workflow, read without Snakemake."
    text = (ROOT / path).read_text("utf-8")
    start = text.index(f"{name} = {{")
    return ast.literal_eval(text[text.index("{", start):text.index("\n}", start) + 2])


def test_the_workflow_knows_the_rows():
    for number, found in literal("workflow/tables.smk", "T_RUNS").items():
        rows = {(p, r.run) for r in TABLES[number].rows for p in TABLES[number].protocols if r.run and r.required}
        assert set(found) == rows and len(found) == len(rows)


def parameters(name):
    cells = json.loads((ROOT / f"nbs/runs/{name}.ipynb").read_text("utf-8"))["cells"]
    text = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    return {n.targets[0].id for n in ast.parse(text).body}


def test_plans_and_ablations_fit_notebooks_and_tables():
    for path in sorted((ROOT / "configs/tables").glob("*.yaml")):
        plan = yaml.safe_load(path.read_text("utf-8"))
        assert set(plan) == {"self", "cross"} and all(set(v) <= parameters("evaluate") for v in plan.values())
    rows = {}
    for path in sorted((ROOT / "configs/ablations").glob("*.yaml")):
        a = yaml.safe_load(path.read_text("utf-8"))
        assert PARTS[a["run"]] == a["part"] and set(a["parameters"]) <= parameters("train_stage")
        rows |= {(n, row): (a["run"], a.get("kind", "fine")) for n, row in a["rows"].items()}
    wanted = {(n, r.name): (r.run, r.kind) for n in (3, 4, 5) for r in TABLES[n].rows}
    assert rows == {k: v for k, v in wanted.items() if v != ("ours", "fine")}


def test_what_is_missing_is_planned_and_nothing_else(tmp_path):
    "One result is missing: one measurement, one table, and the look over all."
    results, out = tmp_path / "results", tmp_path / "out"
    plan = literal("workflow/tables.smk", "T_RUNS")
    files = {f"{p}-{r}.json" for rows in plan.values() for p, r in rows}
    for name in files:
        for path in (results / "smoke" / name, results / "smoke" / "units" / name):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
    for n in TABLES:
        for ending in ("ipynb", "md", "html", "tex"):
            path = out / "smoke" / f"table{n}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
    (results / "smoke" / "self-no-hybrid.json").unlink()
    text = planned("tables", "tables", results=results, out=out)
    counts = dict(re.findall(r"^(evaluate|table|tables) +(\d+)$", text, re.M))
    assert counts == {"evaluate": "1", "table": "1", "tables": "1"}, text[-2000:]
    assert "self-no-hybrid.json" in text


def make_tables(target, **config):
    command = snakemake("tables", target, "--rerun-incomplete", **config)
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True)


def numbers(path):
    return [(r.name, r.metric, r.value, r.interval, r.n) for r in read_results(path)]


@pytest.mark.slow
def test_killed_deleted_and_called_again(tmp_path):
    "Killed after the first trial it goes on; a deleted result is measured again, alone, and the same."
    where = {name: tmp_path / name for name in ("results", "out", "kept")}
    path = tables.result_path(where["results"], "smoke", "self", "ours")
    first, began = make_tables(path, **where), time.monotonic()
    while not (trials := list(where["kept"].glob("ours/self/*/self-*.json"))):
        assert first.poll() is None and time.monotonic() - began < 300, first.communicate()[0]
        time.sleep(.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert len(trials) == 1 and not path.exists()
    stamp = trials[0].stat().st_mtime_ns
    second = make_tables(path, **where)
    said, _ = second.communicate()
    assert second.returncode == 0, said[-3000:]
    assert trials[0].stat().st_mtime_ns == stamp and len(list(where["kept"].glob("ours/self/*/self-*.json"))) == 2
    before = numbers(path)
    path.unlink()
    third = make_tables(path, **where | {"kept": tmp_path / "anew"})
    said, _ = third.communicate()
    assert third.returncode == 0, said[-3000:]
    assert re.findall(r"^(evaluate|table|tables) +(\d+)$", said, re.M) == [("evaluate", "1")], said[:2000]
    assert before and numbers(path) == before


def test_what_is_committed_is_discussed_and_belongs_together():
    "Tables of results in the repository: nothing is refused, and every claim that does not hold has its words."
    for preset in ("small", "base"):
        if not list((ROOT / "results" / preset).glob("self-*.json")):
            continue
        for number in TABLES:
            found = report.report(number, preset, ROOT / "results")
            assert "not discussed yet" not in found.markdown(), (preset, number)


@pytest.mark.parametrize("preset", ["small", "base"])
def test_weights_are_of_the_ablation_whose_name_they_bear(preset):
    "Of those in the repository: what is left out is left out, and nothing is the full model under another name."
    index = {run: ROOT / "nofa_nb/weights" / preset / part / "weights.json" for run, part in PARTS.items()}
    found = {run: read_json(path) for run, path in index.items() if path.exists()}
    assert "ours" in found
    for run in found.keys() - {"nofa", "facevid2vid"}:
        switches = found[run]["options"]["deformation"]
        assert switches == {"use_weights": run != "no-weights", "use_identity": run != "no-identity"}, run
    for run in found.keys() & {"no-weights", "no-identity", "hybrid"}:
        assert found[run]["tensors_hash"] != found["ours"]["tensors_hash"], run


def test_ablations_and_baselines_start_from_the_campaign(tmp_path):
    "Every command finds prior, F and checkpoints where `nofa train` writes them."
    root, weights, plan = tmp_path / "train", tmp_path / "weights", campaign.read_plan("smoke")
    for step in ("detail", "deformation", "hybrid"):
        (root / "smoke" / step).mkdir(parents=True)
        (root / "smoke" / step / "done.json").write_text("{}")
    text = planned("comparison", "comparison", "-p", root=root, weights=weights)
    for part in PARTS.values():
        assert part == "avatar" or f"{weights}/{part}" in text, part
    trainings = re.findall(r"--cwd (\S+) .*?-p prior (\S+) -p identity (\S+)(?: -p before (\S+))?", text)
    assert len(trainings) == 4  # two ablations and two baselines
    given = plan.given("hybrid")
    there = {name: (root / "smoke" / "hybrid" / given[name]).resolve() for name in ("prior", "identity")}
    for folder, prior, identity, before in trainings:
        assert (Path(folder) / prior).resolve() == there["prior"]
        assert (Path(folder) / identity).resolve() == there["identity"]
        if before:
            assert (Path(folder) / before).resolve().is_relative_to(root / "smoke")
