"""The tour: its links lead somewhere, and every notebook of the world is on it."""
import json
import re
from pathlib import Path

NBS = Path(__file__).resolve().parents[1] / "nbs"


def links(notebook):
    prose = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    return re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", prose)


def test_links_of_the_tour():
    found = links(json.loads((NBS / "index.ipynb").read_text("utf-8")))
    assert len(found) > 10 and [x for x in found if not (NBS / x).is_file()] == []


def test_the_tour_names_every_notebook_of_the_world():
    found = set(links(json.loads((NBS / "index.ipynb").read_text("utf-8"))))
    present = {p.relative_to(NBS).as_posix() for p in (NBS / "world").glob("[!._]*.ipynb")}
    assert len(present) > 5 and sorted(present - found) == []


def test_a_dead_link_is_found():
    prose = {"cell_type": "markdown", "source": ["see [a](world/none.ipynb) and [b](https://x.org)"]}
    assert links({"cells": [prose]}) == ["world/none.ipynb"]
