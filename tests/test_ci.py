"""The scripts behind the Makefile, tried on a small fake repository and with the faults they promise to explain."""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- set-up -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def setup(tmp_path, monkeypatch):
    module = load("setup")
    for name in module.STAMPED:
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(module, "ROOT", str(tmp_path))
    monkeypatch.setattr(module, "VENV", str(tmp_path / ".venv"))
    monkeypatch.setattr(module, "STAMP", str(tmp_path / ".venv/.nofa-stamp"))
    return module


def script(path, text):
    path.write_text("#!/bin/sh\n" + text + "\n")
    path.chmod(0o755)
    return str(path)


def test_a_shim_that_fails_is_skipped(setup, tmp_path):
    shim = script(tmp_path / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    old = script(tmp_path / "python3", "echo 3 9 1 /usr/bin/python3")
    bare = script(tmp_path / "python3.11", "echo 3 11 0 /usr/bin/python3.11")
    good = script(tmp_path / "other", "echo 3 12 1 /opt/python3.12")
    assert setup.find_python([shim, "no-such-python", old, bare, good]) == ("/opt/python3.12", True)
    assert setup.find_python([shim, old, bare]) == ("/usr/bin/python3.11", False)
    with pytest.raises(setup.Stop, match="no working Python 3.11 or 3.12 was found: .*apt-get.*brew"):
        setup.find_python([shim, old])


def test_a_missing_venv_module_is_explained(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "apt", lambda *packages: False)
    bare = script(tmp_path / "python3.11", "echo 3.11")
    with pytest.raises(setup.Stop, match="lacks the venv module: run 'sudo apt-get install python3.11-venv'"):
        setup.ensure_venv_module(bare)


def test_too_little_disk_is_explained(setup, monkeypatch):
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: SimpleNamespace(free=2.5e9))
    setup.check_disk(2)
    with pytest.raises(setup.Stop, match="9 GB of free disk are needed .* 2.5 GB are there"):
        setup.make_venv()
    assert not os.path.exists(setup.VENV)


@pytest.mark.parametrize("text,said", [
    ("WARNING: Retrying (Retry(total=0)) NewConnectionError: Failed to establish a new connection", "cannot reach"),
    ("ERROR: Could not find a version that satisfies the requirement x (from versions: none)", "cannot reach"),
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
    ("noise\nERROR: Cannot install a and b because they conflict", "they conflict"),
])
def test_pip_failures_are_one_sentence(setup, text, said):
    assert said in setup.explain(text) and "\n" not in setup.explain(text)


def test_stamp_follows_the_requirements(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "healthy", lambda: True)
    assert not setup.up_to_date()
    (tmp_path / ".venv").mkdir()
    Path(setup.STAMP).write_text(setup.fingerprint() + "\n")
    assert setup.up_to_date()
    monkeypatch.setattr(setup, "healthy", lambda: False)
    assert not setup.up_to_date()
    monkeypatch.setattr(setup, "healthy", lambda: True)
    with open(tmp_path / "constraints.txt", "a") as file:
        file.write("one-more==1.0\n")
    assert not setup.up_to_date()


def test_a_broken_environment_is_not_healthy(setup, tmp_path):
    assert not setup.healthy()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    script(tmp_path / ".venv/bin/python", "exit 1")
    assert not setup.healthy()


# --- the checks, on a fake repository ---------------------------------------------------------------------------------
def notebook(*cells, outputs=()):
    made = [{"cell_type": "code", "execution_count": None, "id": f"c{i}", "metadata": {}, "outputs": list(outputs),
             "source": text.splitlines(keepends=True)} for i, text in enumerate(cells)]
    return json.dumps({"cells": made, "metadata": {"kernelspec": {
        "display_name": "python3", "language": "python", "name": "python3"}}, "nbformat": 4, "nbformat_minor": 5},
        indent=1, sort_keys=True, ensure_ascii=False) + "\n"


@pytest.fixture
def repo(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in ("nbs/core", "nbs/runs", "nofa_nb/core", "tests"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "nofa_nb/__init__.py").write_text('__version__ = "0.1.0"\n')
    (tmp_path / "nofa_nb/core/__init__.py").touch()
    (tmp_path / "nbs/core/one.ipynb").write_text(notebook(
        "#| default_exp core.one", "#| export\ndef one(): return 1", "#| eval: false\nraise ValueError"))
    (tmp_path / "nbs/runs/demo.ipynb").write_text(notebook("open('made.txt', 'w').write('x')"))
    (tmp_path / "tests/test_one.py").write_text("def test_one(): assert True\ndef test_two(): assert True\n")
    subprocess.run([sys.executable, "-c", "import nbdev; nbdev.nbdev_export.__wrapped__()"], cwd=tmp_path, check=True)
    return tmp_path


def check(repo, *steps):
    "(exit code, last line, everything) of the checks on a repository."
    done = subprocess.run([sys.executable, ROOT / ".ci/test.py", "--only", ",".join(steps), "--timeout", "60"],
                          env=dict(os.environ, NOFA_ROOT=str(repo)), capture_output=True, text=True)
    return done.returncode, (done.stdout.strip().splitlines() or [""])[-1], done.stdout + done.stderr


def test_a_clean_repository_passes(repo):
    before = {p: p.read_bytes() for p in (repo / "nbs").rglob("*.ipynb")}
    code, last, text = check(repo, "drift", "clean", "ruff", "pytest", "notebooks", "runs")
    assert (code, last) == (0, "9 passed, 0 failed"), text  # 2 modules, 2 notebooks, ruff, 2 tests, 1 + 1 executed
    assert before == {p: p.read_bytes() for p in (repo / "nbs").rglob("*.ipynb")}
    assert (repo / "out/test/runs/demo/made.txt").exists()


def test_drift_is_caught(repo):
    module = repo / "nofa_nb/core/one.py"
    good = module.read_text()
    module.write_text(good.replace("return 1", "return 2"))
    code, last, text = check(repo, "drift")
    assert code == 1 and last == "1 passed, 1 failed" and "core/one.py: differs" in text
    module.write_text(good)
    (repo / "nofa_nb/core/stale.py").write_text(good)
    assert "core/stale.py: no notebook exports it" in check(repo, "drift")[2]
    module.unlink()
    assert "core/one.py: not exported" in check(repo, "drift")[2]


def test_an_unclean_notebook_is_caught(repo):
    stream = {"name": "stdout", "output_type": "stream", "text": ["x\n"]}
    (repo / "nbs/runs/demo.ipynb").write_text(notebook("print('x')", outputs=[stream]))
    code, last, text = check(repo, "clean")
    assert code == 1 and "nbs/runs/demo.ipynb: holds outputs" in text
    counted = (repo / "nbs/core/one.ipynb").read_text().replace('"execution_count": null', '"execution_count": 3')
    (repo / "nbs/core/one.ipynb").write_text(counted)
    assert check(repo, "clean")[1] == "0 passed, 2 failed"


def test_failures_of_ruff_and_pytest_are_counted(repo):
    (repo / "tests/test_one.py").write_text("def test_one(): assert 1 == 2\ndef test_two(): pass\n")
    (repo / "bad.py").write_text("import os\n")
    code, last, text = check(repo, "ruff", "pytest")
    assert (code, last) == (1, "1 passed, 2 failed") and "F401" in text


def test_no_test_is_a_failure(repo):
    (repo / "tests/test_one.py").write_text("")
    assert check(repo, "pytest")[:2] == (1, "0 passed, 1 failed")


def test_a_failing_cell_is_named(repo):
    (repo / "nbs/core/two.ipynb").write_text(notebook("x = 1", "raise ValueError('the reason')"))
    (repo / "nbs/core/three.ipynb").write_text(notebook("open('litter.txt', 'w').write('x')"))
    code, last, text = check(repo, "notebooks")
    assert code == 1 and "nbs/core/two.ipynb: cell 1 of 2" in text and "the reason" in text
    assert "left behind by a notebook: nbs/core/litter.txt" in text


# --- the command and the documentation --------------------------------------------------------------------------------
def test_help_is_quick():
    def once():
        began = time.time()
        done = subprocess.run([sys.executable, "-c", "from nofa_nb.apps.cli import main; main(['--help'])"],
                              capture_output=True, text=True)
        assert done.returncode == 0 and "world" in done.stdout
        return time.time() - began
    assert min(once() for _ in range(5)) < 0.5


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, ROOT / ".ci/docs.py", target], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_docs_show_equations_and_pictures(site):
    page = (site / "geometry/cameras.html").read_text("utf-8")
    assert "$$" in page and 'src="../mathjax/MathJax.js?' in page and "STIX-Web" in page
    assert (site / "mathjax/MathJax.js").stat().st_size > 50_000
    assert list((site / "mathjax/fonts").rglob("*.woff"))
    assert "data:image/png;base64," in page
    for notebook_path in (ROOT / "nbs").glob("*/*.ipynb"):
        assert (site / notebook_path.relative_to(ROOT / "nbs")).with_suffix(".html").exists()


def test_docs_load_nothing_from_elsewhere(site):
    loads = r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)"|<link[^>]+rel="stylesheet"[^>]+href="(https?:[^"]+)"'
    for page in site.rglob("*.html"):
        assert not re.findall(loads, page.read_text("utf-8")), page


def test_docs_follow_the_floors_and_the_imports(tmp_path):
    docs = load("docs")
    for name, text in {"apps/a": "", "core/z": "", "world/b": "from nofa_nb.world.c import x", "world/c": ""}.items():
        path = tmp_path / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        path.write_text(notebook(text))
    assert docs.navigation(tmp_path) == [
        {"Home": "index.md"}, {"core": ["core/z.ipynb"]}, {"world": ["world/c.ipynb", "world/b.ipynb"]},
        {"apps": ["apps/a.ipynb"]}]
