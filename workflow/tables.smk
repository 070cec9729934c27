# Tables 1 to 5: weights -> results -> tables.
#
# The usual call is `make tables PRESET=small`. What is measured: configs/tables/<preset>.yaml. Config entries: preset
# (small), results (results), out (out/tables), kept (out/evaluate/avatar).
#
#   nofa_nb/weights/<preset>/<part>  ── evaluate ──  results/<preset>/<protocol>-<run>.json, units/<protocol>-<run>.json
#                                                        ├── table ──  out/tables/<preset>/table1.{ipynb,md,html,tex}
#   results/<preset>/discussion.json ────────────────────┘                └── check ──  results/<preset>/tables.md
#
# A result that is there is not measured again: one that is deleted is, and nothing else. Scores of trials are kept in
# `kept`/<run>, which is no declared output, so a job that was killed goes on from its last trial; runs of the same
# weights do not share them, as one may draw other kinds of pictures than another. Weights are no inputs either (after
# a checkout their times mean nothing): what belongs to other weights, another manifest or another commit
# is refused by workflow/check.py, which runs every time, and by the tables themselves, with a sentence that says which.
#
# Slurm (snakemake-executor-plugin-slurm, this folder on a file system that all nodes share):
#   snakemake -s workflow/tables.smk --executor slurm --jobs 6 --config preset=base -- tables
# Kubernetes (snakemake-executor-plugin-kubernetes): with this folder on a volume that all pods mount
#   (--kubernetes-persistent-volumes CLAIM:/repo), in an image where the repository is installed in place.
import sys
from pathlib import Path

import yaml

T_PRESET, T_RESULTS, T_OUT = config.get("preset", "small"), config.get("results", "results"), config.get("out", "out/tables")
T_KEPT = config.get("kept", "out/evaluate/avatar")
T_PLAN = yaml.safe_load(Path(f"configs/tables/{T_PRESET}.yaml").read_text("utf-8"))
T_RUNS = {  # table: protocol and run of its rows; held against nofa_nb.evaluation.tables by a test
    1: [("self", "facevid2vid"), ("self", "nofa"), ("self", "ours"), ("cross", "facevid2vid"), ("cross", "nofa"), ("cross", "ours")],
    2: [],
    3: [("self", "no-hybrid"), ("self", "hybrid")],
    4: [("self", "ours")],
    5: [("self", "no-weights"), ("self", "no-identity"), ("self", "full")],
}
T_PAPERMILL = f"env TQDM_MININTERVAL=10 {sys.executable} -m papermill --kernel python3"


def results_of(number):
    return [f"{T_RESULTS}/{T_PRESET}/{p}-{r}.json" for p, r in T_RUNS[number]]


def beside(number):
    "What else is drawn: numbers by unit, words on claims that do not hold, and what is printed."
    words = [p for p in (f"{T_RESULTS}/{T_PRESET}/discussion.json",) if Path(p).exists()]
    units = [f"{T_RESULTS}/{T_PRESET}/units/{p}-{r}.json" for p, r in T_RUNS[number]]
    return [*units, *words, "nofa_nb/assets/published.json"]


def given(protocol):
    return " ".join(f"-p {k} '{v}'" for k, v in T_PLAN[protocol].items())


rule tables:  # has no output, so it is done every time: is it all there, and does it still belong together?
    input:
        sorted({path for n in T_RUNS for path in results_of(n)}),
        expand(f"{T_OUT}/{T_PRESET}/table{{n}}.html", n=list(T_RUNS)),
    shell: "{sys.executable} workflow/check.py {T_PRESET} '{T_RESULTS}' '{T_OUT}/{T_PRESET}'"


rule evaluate:
    output:
        f"{T_RESULTS}/{T_PRESET}/{{protocol}}-{{run}}.json",
        f"{T_RESULTS}/{T_PRESET}/units/{{protocol}}-{{run}}.json",
    params: given=lambda w: given(w.protocol), notebook=f"{T_OUT}/{T_PRESET}/evaluate-{{protocol}}-{{run}}.ipynb"
    wildcard_constraints: protocol="self|cross"
    threads: 1
    resources: mem_mb=4000, runtime=120
    shell:
        "mkdir -p {T_OUT}/{T_PRESET} && env OMP_NUM_THREADS={threads} {T_PAPERMILL} nbs/runs/evaluate.ipynb {params.notebook}"
        " -p run {wildcards.run} -p protocol {wildcards.protocol} -p preset {T_PRESET} -p results '{T_RESULTS}' -p out '{T_KEPT}/{wildcards.run}' {params.given}"
        " --log-output --no-progress-bar"


rule table:
    input:
        notebook="paper_figures/table{n}.ipynb",
        results=lambda w: results_of(int(w.n)) + beside(int(w.n)),
    output: multiext(f"{T_OUT}/{T_PRESET}/table{{n}}", ".ipynb", ".md", ".html", ".tex")
    wildcard_constraints: n="[1-5]"
    resources: mem_mb=2000, runtime=10
    shell:
        "env OMP_NUM_THREADS=1 {T_PAPERMILL} {input.notebook} {output[0]} -p preset {T_PRESET} -p results '{T_RESULTS}'"
        " -p out '{T_OUT}/{T_PRESET}' --no-progress-bar"
