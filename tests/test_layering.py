"""The floors of the house: imports run downward only. Read from the imports of the generated modules by ast."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "core": 1, "ops": 2, "geometry": 3, "layers": 4, "world": 4, "models": 5, "experts": 5, "data": 6,
    "training": 7, "baselines": 7, "evaluation": 8, "apps": 9,
}
# In models only these compose siblings. A pretrained generator is one network under one set of weights, so `generator`
# puts its own parts together; `avatar` puts everything together.
COMPOSERS = {"avatar": None, "generator": {"triplane", "renderer", "superresolution"}}  # None: any sibling
STAGES = {"face3d", "identity", "prior", "reconstruction", "detail", "deformation", "hybrid", "audio", "adaptation"}


def imported(source, module):
    "The modules of nofa_nb that a module imports, also inside functions, also relative; dotted, without `nofa_nb.`."
    package = ["nofa_nb", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            head = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{head}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("nofa_nb."):
                yield node.lineno, name.removeprefix("nofa_nb.")


def fault(module, target):
    "Why `module` must not import `target`, or None. Both are dotted: folder.name, the target perhaps with a member."
    folder, name = (module.split(".") + [""])[:2]
    other, part = (target.split(".") + [""])[:2]
    if other not in FLOORS:
        return None  # a member of the package itself, such as __version__
    if folder not in FLOORS:
        return f"{folder} is on no floor: add it to FLOORS"
    if folder == "evaluation" and other == "training":
        return "a checkpoint is the only contract of evaluation with training"
    if FLOORS[other] > FLOORS[folder]:
        return f"floor {FLOORS[folder]} looks up to floor {FLOORS[other]}"
    if FLOORS[other] == FLOORS[folder] and other != folder:
        return f"{folder} and {other} share a floor and are blind to each other"
    if folder == other == "models" and part != name:
        allowed = COMPOSERS.get(name, set())
        if allowed is not None and part not in allowed:
            return "siblings in models do not import each other; avatar, and generator of its own parts, compose them"
    if folder == other == "training" and name in STAGES and part in STAGES - {name}:
        return "training stages share loop, never each other"
    return None


def faults(sources):
    "All breaches in {module: source}."
    found = []
    for module, source in sources.items():
        for line, target in imported(source, module):
            why = fault(module, target)
            if why:
                found.append(f"{module}:{line} imports {target}: {why}")
    return found


def package_sources():
    files = [p for p in (ROOT / "nofa_nb").rglob("*.py") if p.parent != ROOT / "nofa_nb"]
    return {".".join(p.relative_to(ROOT / "nofa_nb").with_suffix("").parts): p.read_text("utf-8") for p in files}


def test_imports_run_downward():
    sources = package_sources()
    assert len(sources) > 5, "the generated modules were not found"
    assert not faults(sources), "\n".join(faults(sources))


@pytest.mark.parametrize("module,line", [
    ("core.io", "from nofa_nb.world.head import load_head"),
    ("core.io", "import nofa_nb.geometry.cameras as c"),
    ("core.io", "def f():\n    from nofa_nb.ops import render"),
    ("geometry.rays", "from ..models.avatar import Avatar"),
    ("geometry.rays", "from .. import apps"),
    ("world.head", "from nofa_nb.layers.stylegan import Mapping"),
    ("experts.identity", "from nofa_nb.models.encoder import Encoder"),
    ("models.encoder", "from nofa_nb.models.generator import Generator"),
    ("models.encoder", "from .generator import Generator"),
    ("models.encoder", "from nofa_nb.models import generator"),
    ("models.renderer", "from nofa_nb.models.avatar import Avatar"),
    ("models.generator", "from nofa_nb.models.avatar import Avatar"),
    ("models.generator", "from nofa_nb.models.encoder import Encoder"),
    ("training.detail", "from nofa_nb.training.prior import train"),
    ("training.detail", "from nofa_nb.baselines.protocol import run"),
    # Baselines are trained by the same loop, but runs hand it to them: a lesson has a stage's shape (test_baselines).
    ("baselines.facevid2vid", "from nofa_nb.training.loop import train"),
    ("baselines.nofa", "from nofa_nb.training.losses import video_losses"),
    ("evaluation.metrics", "from nofa_nb.training.loop import fit"),
    ("mystery.box", "from nofa_nb.core.io import read_image"),
])
def test_a_bad_import_is_caught(module, line):
    assert len(faults({module: line})) == 1


@pytest.mark.parametrize("module,line", [
    ("apps.cli", "from nofa_nb import __version__"),
    ("world.portraits", "from nofa_nb.world.head import load_head"),
    ("world.portraits", "from .head import load_head\nimport torch"),
    ("models.avatar", "from nofa_nb.models.encoder import Encoder"),
    ("models.generator", "from nofa_nb.models.renderer import Renderer"),
    ("training.detail", "from nofa_nb.training.loop import fit\nfrom nofa_nb.training.losses import rec"),
    ("evaluation.report", "from nofa_nb.core.repro import Result"),
    ("evaluation.protocols", "from nofa_nb.baselines.protocol import load_baseline"),
    ("baselines.nofa", "from nofa_nb.models.avatar import AvatarModel\nfrom .protocol import Baseline"),
])
def test_a_good_import_is_let_through(module, line):
    assert faults({module: line}) == []
