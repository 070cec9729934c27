"""The tour: links lead somewhere, every notebook of the world is on it, every equation is executed and explained."""
import copy
import json
import re
from pathlib import Path

NBS = Path(__file__).resolve().parents[1] / "nbs"


def links(notebook):
    return re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", prose(notebook["cells"]))


def test_links_of_the_tour():
    found = links(json.loads((NBS / "index.ipynb").read_text("utf-8")))
    assert len(found) > 10 and [x for x in found if not (NBS / x).is_file()] == []


def test_the_tour_names_every_notebook_of_the_world():
    found = set(links(json.loads((NBS / "index.ipynb").read_text("utf-8"))))
    present = {p.relative_to(NBS).as_posix() for p in (NBS / "world").glob("[!._]*.ipynb")}
    assert len(present) > 5 and sorted(present - found) == []


EQUATIONS = range(1, 15)


def equations(text):
    "Numbers of the equations that a text names: Eq. 3, Eq. 11 and 12, Eq. 5 to 9."
    found = set()
    for first, word, last in re.findall(r"Eq\. (\d+)(?:(?:,| (to|and)) (\d+))?", text):
        found |= {int(first)} | ({int(last)} if last else set())
        found |= set(range(int(first), int(last))) if word == "to" else set()
    return found


def prose(cells):
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def sections(notebook):
    "Cells from each heading to the next."
    found = [[]]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown" and "".join(cell["source"]).startswith("## "):
            found.append([])
        found[-1].append(cell)
    return found


def untreated(notebook):
    "What is missing of equations: heading, formula, number, executed code, a notebook that treats it."
    missing, parts = [], sections(notebook)
    for n in EQUATIONS:
        cells = [c for part in parts if n in equations("".join(part[0]["source"]).split("\n")[0]) for c in part]
        text, only = prose(cells), len(equations("".join(cells[0]["source"]).split("\n")[0])) == 1 if cells else False
        outputs = [o for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
        read = [json.loads((NBS / x).read_text("utf-8")) for x in links({"cells": cells}) if (NBS / x).is_file()]
        faults = {"no section": not cells, "no formula": "$$" not in text,
                  "not numbered": not only and not re.search(rf"\({n}\b", text),
                  "not executed": not any(o["output_type"] in ("display_data", "stream") for o in outputs),
                  "an error": any(o["output_type"] == "error" for o in outputs),
                  "no notebook": not any(n in equations(prose(x["cells"])) for x in read)}
        missing += [f"Eq. {n}: {fault}" for fault, is_so in faults.items() if is_so]
    return missing


def test_every_equation_is_on_the_tour_executed_and_explained():
    assert untreated(json.loads((NBS / "index.ipynb").read_text("utf-8"))) == []


def test_an_equation_that_is_missing_is_found():
    tour = json.loads((NBS / "index.ipynb").read_text("utf-8"))
    start = next(i for i, c in enumerate(tour["cells"]) if "".join(c["source"]).startswith("## 10. Eq. 14"))
    bare, gone, unlinked = (copy.deepcopy(tour) for _ in range(3))
    bare["cells"][start + 1]["outputs"] = []
    del gone["cells"][start]
    text = "".join(unlinked["cells"][start]["source"])
    unlinked["cells"][start]["source"] = text.replace("training/adaptation.ipynb", "world/bust.ipynb")
    assert untreated(bare) == ["Eq. 14: not executed"] and untreated(unlinked) == ["Eq. 14: no notebook"]
    assert "Eq. 14: no section" in untreated(gone)
    assert equations("Eq. 5 to 7, Eq. 11 and 12; Eq. 4") == {4, 5, 6, 7, 11, 12}


def test_the_tour_follows_the_photo_and_leads_to_the_explorer():
    tour = json.loads((NBS / "index.ipynb").read_text("utf-8"))
    code = {"".join(part[0]["source"])[:6]: "\n".join("".join(c["source"]) for c in part if c["cell_type"] == "code")
            for part in sections(tour)}
    assert "torch.cat([getattr(x, name) for x in (real, known)])" in code["## 1. "]
    assert "adapted = adapt(model, avatar[0]" in code["## 10."] and "adapted.avatar.save(" in code["## 11."]
    assert "true labels" in prose(tour["cells"]) and "runs/explorer.ipynb" in links(tour)


def test_a_dead_link_is_found():
    text = {"cell_type": "markdown", "source": ["see [a](world/none.ipynb) and [b](https://x.org)"]}
    assert links({"cells": [text]}) == ["world/none.ipynb"]
