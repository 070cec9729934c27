# The training campaign: from nothing to the weights of a preset.
#
#   portraits ─┬─ prior ────── reconstruction ── detail ─┬─ deformation ── hybrid = avatar
#              ├─ identity (F) ──────────────────────────┤
#              └─ face3d (M)                      clips ─┘
#
# The usual call is `make train PRESET=small`, which runs  snakemake --cores 2 --config preset=small  with a few more
# words (nofa_nb/apps/campaign.py). Steps, and what each starts from, are `GRAPH` there; what each is given and how many
# threads it gets stands in configs/<preset>.yaml. Config entries: preset (small), root (out/train).
#
# A job executes its notebook of nbs/runs in out/train/<preset>/<step>. Its declared output is one small file,
# done.json, so that Snakemake, which removes the outputs of jobs that fail, never touches a checkpoint: a job that was
# killed goes on from its own. GPU: the notebooks use one where there is one.
#
# Slurm, with the plugin snakemake-executor-plugin-slurm and this folder on a file system that all nodes share:
#   snakemake --executor slurm --jobs 3 --config preset=base \
#       --default-resources slurm_account=ME slurm_partition=gpu "slurm_extra='--gpus=1'"
# Kubernetes, with snakemake-executor-plugin-kubernetes: checkpoints are not declared outputs, so they do not travel
# through a storage provider; `root` has to be on a volume that all pods mount (--kubernetes-persistent-volumes
# CLAIM:/data --config root=/data/train), in an image where this repository is installed in place.
# Threads, memory and time of a job are those of the plan. Neither cluster is part of the project's tests.
import sys

from nofa_nb.apps.campaign import GRAPH, place, read_plan

PRESET, ROOT = config.get("preset", "small"), config.get("root", "out/train")
PLAN = read_plan(PRESET)
NOFA = f"{sys.executable} -c 'import sys; from nofa_nb.apps.cli import main; sys.exit(main())'"


def done(step):
    return str(place(ROOT, PRESET, step) / "done.json")


rule all:
    input: [done(step) for step in PLAN.steps]


for step, share in PLAN.steps.items():
    rule:
        name: step
        input: [done(n) for n in GRAPH[step].needs]
        output: done(step)
        params: step=step, plan=PLAN.hash(step)  # another plan: the step is called again, and says what does not fit
        threads: share.threads
        priority: GRAPH[step].priority
        resources: mem_mb=share.memory, runtime=max(10, round(2 * share.minutes))
        shell: "exec env OMP_NUM_THREADS={threads} MKL_NUM_THREADS={threads} {NOFA} train {params.step} --preset {PRESET} --root '{ROOT}' --job"
