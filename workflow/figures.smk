# Figures 4 to 13: weights -> tiles -> figures.
#
# The usual call is `make figures PRESET=small`. What is drawn: configs/figures/<preset>.yaml. Config entries: preset
# (small), results (results), out (out/figures).
#
#   nofa_nb/weights/<preset>/<part>  ── tiles ──  results/<preset>/figures/fig08.json, fig08.png
#                                                     └── figure ──  out/figures/<preset>/fig08.{ipynb,png,pdf,md}
#
# Tiles that are there are not drawn again: those that are deleted are, and nothing else. Weights are no inputs (after a
# checkout their times mean nothing): tiles of other weights, of other lists, or from before an ablation was trained are
# refused by workflow/check_figures.py, which runs every time, and by the figures themselves, with a sentence that says
# which. Clusters: as in workflow/tables.smk.
import sys
from pathlib import Path

import yaml

F_PRESET, F_RESULTS, F_OUT = config.get("preset", "small"), config.get("results", "results"), config.get("out", "out/figures")
F_PLAN = yaml.safe_load(Path(f"configs/figures/{F_PRESET}.yaml").read_text("utf-8"))
F_DRAWN = ["04", "05", "07", "08", "09", "10", "12", "13"]  # held against nofa_nb.evaluation.figures by a test
F_NOT_RUN = ["06", "11"]  # have no tiles; the figure says why
F_PAPERMILL = f"env OMP_NUM_THREADS=1 TQDM_MININTERVAL=10 {sys.executable} -m papermill --kernel python3"


def tiles_of(n):
    return [] if n in F_NOT_RUN else [f"{F_RESULTS}/{F_PRESET}/figures/fig{n}.{e}" for e in ("json", "png")]


def given(n):
    return " ".join(f"-p {k} '{v}'" for k, v in {**F_PLAN["every"], **F_PLAN.get(f"fig{n}", {})}.items())


rule figures:  # has no output, so it is done every time: is it all there, and does it still belong together?
    input:
        [path for n in F_DRAWN for path in tiles_of(n)],
        expand(f"{F_OUT}/{F_PRESET}/fig{{n}}.png", n=F_DRAWN + F_NOT_RUN),
    shell: "{sys.executable} workflow/check_figures.py {F_PRESET} '{F_RESULTS}'"


rule tiles:
    output: multiext(f"{F_RESULTS}/{F_PRESET}/figures/fig{{n}}", ".json", ".png")
    params: given=lambda w: given(w.n), number=lambda w: int(w.n), folder=f"{F_OUT}/{F_PRESET}"
    wildcard_constraints: n="|".join(F_DRAWN)
    resources: mem_mb=4000, runtime=30
    shell:
        "mkdir -p {params.folder} && {F_PAPERMILL} nbs/runs/figures.ipynb {params.folder}/tiles{wildcards.n}.ipynb"
        " -r figures {params.number} -p preset {F_PRESET} -p results '{F_RESULTS}' {params.given} --log-output --no-progress-bar"


rule figure:
    input:
        notebook="paper_figures/fig{n}.ipynb",
        tiles=lambda w: tiles_of(w.n),
    output: multiext(f"{F_OUT}/{F_PRESET}/fig{{n}}", ".ipynb", ".png", ".pdf", ".md")
    wildcard_constraints: n="|".join(F_DRAWN + F_NOT_RUN)
    resources: mem_mb=2000, runtime=10
    shell:
        "{F_PAPERMILL} {input.notebook} {output[0]} -p preset {F_PRESET} -p results '{F_RESULTS}'"
        " -p out '{F_OUT}/{F_PRESET}' --no-progress-bar"
