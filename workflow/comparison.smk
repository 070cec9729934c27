# What Tables 1, 3 and 5 need beside the full model: its ablations, and the baselines.
#
# The usual call is `make comparison PRESET=small`, after `make train PRESET=small`.
#
# Starts from the training campaign in out/train/<preset> (config entry root): its data, its prior, its F, and the
# checkpoints that the ablations go on from; the parameters of notebooks are those of configs/<preset>.yaml. Ablations are
# configs/ablations/*.yaml. A training goes on where it was killed; weights are written when it is over, to
# nofa_nb/weights/<preset>/<part> (config entry weights).
import sys
from pathlib import Path

import yaml

C_PRESET, C_ROOT = config.get("preset", "small"), config.get("root", "out/train")
C_HERE, C_WEIGHTS = f"{C_ROOT}/{C_PRESET}", config.get("weights", f"nofa_nb/weights/{C_PRESET}")
C_ABLATIONS = [yaml.safe_load(p.read_text("utf-8")) for p in sorted(Path("configs/ablations").glob("*.yaml"))]
C_PAPERMILL = f"{sys.executable} -m papermill --kernel python3 --no-progress-bar"
C_TOP = Path.cwd()


def given(step, *without):
    "Parameters of a step of the campaign."
    steps = yaml.safe_load(Path(f"configs/{C_PRESET}.yaml").read_text("utf-8"))["steps"]
    return " ".join(f"-p {k} '{v}'" for k, v in (steps[step].get("parameters") or {}).items() if k not in without)


def own(part):
    return f"{C_WEIGHTS}/{part}/weights.json"


rule comparison:
    input:
        [own(a["part"]) for a in C_ABLATIONS if a["part"] != "avatar"],
        [own(method) for method in ("nofa", "facevid2vid")],


for a in C_ABLATIONS:
    if a["stages"]:
        for before, stage in zip([a["before"], *a["stages"]], a["stages"]):
            first, last = stage == a["stages"][0], stage == a["stages"][-1]
            rule:
                name: f"{a['run']}_{stage}".replace("-", "_")
                input: ancient(f"{C_HERE}/{before}/done.json") if first else f"{C_HERE}/{a['run']}/{before}/done"
                output: touch(f"{C_HERE}/{a['run']}/{stage}/done"), *([own(a["part"])] if last else [])
                params:
                    folder=f"{C_HERE}/{a['run']}/{stage}", stage=stage, before=("../../" if first else "../") + before,
                    given=given(stage), other=" ".join(f"-p {k} {v}" for k, v in a["parameters"].items()),
                    save=f"-p save '{C_TOP / C_WEIGHTS / a['part']}'" if last else "",
                threads: 2
                shell:
                    "mkdir -p {params.folder} && env OMP_NUM_THREADS={threads} {C_PAPERMILL} nbs/runs/train_stage.ipynb"
                    " {params.folder}/train_stage.ipynb --cwd {params.folder} -p stage {params.stage} -p preset {C_PRESET} -p out ."
                    " -p data ../../data -p prior ../../weights/{C_PRESET}/prior -p identity ../../weights/{C_PRESET}/identity -p before {params.before}"
                    " {params.given} {params.other} {params.save}"
    elif a["part"] != "avatar":
        rule:
            name: a["run"].replace("-", "_")
            input: ancient(f"{C_HERE}/{a['before']}/done.json")
            output: own(a["part"])
            params: run=f"{C_HERE}/{a['before']}", folder=f"{C_WEIGHTS}/{a['part']}"
            shell:
                "{sys.executable} -c \"from nofa_nb.apps.weights import avatar_weights, read_run; avatar_weights(read_run('{params.run}'), '{params.folder}', last=True)\""


rule baseline:
    input: ancient(f"{C_HERE}/hybrid/done.json")  # the data, the prior and F are there
    output: f"{C_WEIGHTS}/{{method}}/weights.json"
    wildcard_constraints: method="nofa|facevid2vid"
    params: given=given("hybrid", "steps"), folder=f"{C_HERE}/{{method}}", save=f"{C_TOP / C_WEIGHTS}/{{method}}"
    threads: 2
    shell:
        "mkdir -p {params.folder} && env OMP_NUM_THREADS={threads} {C_PAPERMILL} nbs/runs/train_baseline.ipynb"
        " {params.folder}/train_baseline.ipynb --cwd {params.folder} -p method {wildcards.method} -p preset {C_PRESET} -p out ."
        " -p data ../data -p prior ../weights/{C_PRESET}/prior -p identity ../weights/{C_PRESET}/identity {params.given} -p save '{params.save}'"
