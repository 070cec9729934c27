"""python workflow/check.py small results out/tables/small: do the results of Tables 1 to 5 belong to these weights,
manifests and plans, and to one code? Then the tables, as drawn, are gathered in results/<preset>/tables.md."""
import sys
from pathlib import Path

import yaml

from nofa_nb.core.errors import NofaError, need
from nofa_nb.core.io import atomic_path
from nofa_nb.evaluation.claims import verdict
from nofa_nb.evaluation.tables import TABLES, check_provenance, measured

preset, results, drawn = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
plan = yaml.safe_load(Path(f"configs/tables/{preset}.yaml").read_text("utf-8"))


def planned(key, settings):
    "Was it measured as the plan says now?"
    for name in ("clips", "stride", "labels", "judge_every"):
        wanted, said = str(plan[key[0]][name]), str(settings.get(name))
        where = f"{name} of {preset}/{key[0]}-{key[1]}.json"
        need(said == wanted, where, f"{wanted}, as in configs/tables/{preset}.yaml", said, "measure again: remove it")


try:
    found, about = {}, {}
    for number in TABLES:
        m = measured(number, preset, results)
        verdict(m, results)  # the numbers by unit are there and belong to the results
        found, about = found | m.found, about | m.about
    check_provenance(found, preset, about=about)
    for key, kept in about.items():
        if "settings" in kept:
            planned(key, kept["settings"])
    with atomic_path(results / preset / "tables.md") as temporary:
        text = [(drawn / f"table{n}.md").read_text("utf-8") for n in TABLES]
        temporary.write_text("\n".join(text), encoding="utf-8")
    seconds = sum(a.get("seconds", 0) for a in about.values())
    print(f"{len(found)} files of results belong together; they took {seconds / 60:.0f} minutes of a core to measure")
except NofaError as error:
    sys.exit(f"tables: {error}")
