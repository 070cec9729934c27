#!/usr/bin/env python3
"""The documentation site: `make docs` runs this file, and mkdocs loads it as its hook.

Pages follow the floors of the house (core first), inside a folder the imports: what a notebook needs comes before it.
Equations are set by MathJax, copied from the installed jupyter-server-mathjax, so the site works without a network.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("core", "ops", "geometry", "world", "layers", "models", "experts", "data", "training", "baselines",
          "evaluation", "apps", "runs")
MATHJAX = "mathjax"  # folder inside the site


def source(notebook):
    return "\n".join("".join(c["source"]) for c in json.loads(notebook.read_text("utf-8"))["cells"])


def reading_order(folder):
    "The notebooks of a folder: alphabetical, but each after those of the same folder that it imports."
    paths = {p.stem: p for p in sorted(folder.glob("*.ipynb")) if p.name[0] not in "._"}
    pattern = rf"(?:from|import) nofa_nb\.{folder.name}\.(\w+)|from nofa_nb\.{folder.name} import (\w+)"
    needs = {s: {a or b for a, b in re.findall(pattern, source(p))} & set(paths) - {s} for s, p in paths.items()}
    order = []
    while len(order) < len(paths):
        left = [s for s in paths if s not in order]
        order.append(next((s for s in left if needs[s] <= set(order)), left[0]))
    return [paths[s] for s in order]


def navigation(nbs):
    "The menu: the front page, then a section for each folder that has notebooks."
    menu = [{"Home": "index.ipynb" if (nbs / "index.ipynb").exists() else "index.md"}]
    present = {p.parent.name for p in nbs.glob("*/*.ipynb") if p.parent.name[0] not in "._"}
    for name in [f for f in FLOORS if f in present] + sorted(present - set(FLOORS)):
        pages = [str(p.relative_to(nbs)) for p in reading_order(nbs / name)]
        if pages:
            menu.append({name: pages})
    return menu


def mathjax_source():
    "The folder of MathJax inside the installed package, or a sentence."
    try:
        import jupyter_server_mathjax
    except ImportError:
        raise SystemExit("docs: jupyter-server-mathjax is not installed: run make setup.") from None
    return Path(jupyter_server_mathjax.__file__).parent / "static"


# --- what mkdocs calls ------------------------------------------------------------------------------------------------
def on_config(config):
    config["nav"] = navigation(Path(config["docs_dir"]))
    return config


def on_files(files, config):
    "Without a tour notebook, the README is the front page; its links into the repository point to the site."
    from mkdocs.structure.files import File

    if not (Path(config["docs_dir"]) / "index.ipynb").exists():
        text = (ROOT / "README.md").read_text("utf-8").replace("](nbs/", "](").replace('src="nbs/', 'src="')
        inside = r"\]\((?!https?:|[\w/]+\.(?:ipynb|png|jpg))([\w./-]+)\)"
        text = re.sub(inside, rf"]({config['repo_url']}/blob/main/\1)", text)
        files.append(File.generated(config, "index.md", content=text))
    return files


def on_post_page(output, page, config):
    "Each page finds MathJax by a path relative to itself, and the font that comes with it."
    font = "'HTML-CSS': {webFont: 'STIX-Web', availableFonts: [], imageFont: null},"
    output = output.replace("displayAlign: 'center',", f"displayAlign: 'center', {font}")
    return output.replace("MATHJAX_HERE", "../" * page.url.count("/") + MATHJAX)


def on_post_build(config):
    "Copy what of MathJax the pages use."
    target, found = Path(config["site_dir"]) / MATHJAX, mathjax_source()
    shutil.rmtree(target, ignore_errors=True)
    ignore = shutil.ignore_patterns("unpacked", "docs", "test", "*.map")
    shutil.copytree(found, target, ignore=ignore)


def main(site=ROOT / "site"):
    began = time.time()
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--clean", "--site-dir", str(site)]
    status = subprocess.run(command, cwd=ROOT, env=dict(os.environ, NO_MKDOCS_2_WARNING="1")).returncode
    if status == 0:
        pages = len(list(Path(site).rglob("*.html")))
        print(f"{pages} pages in {time.time() - began:.0f} s: open {Path(site) / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
