"""The training campaign: its plans, its graph, and the whole of it at `smoke` size, killed and gone on with."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nofa_nb.apps import campaign
from nofa_nb.apps.campaign import GRAPH, Unfinished, begin, inputs, place, read_plan, run_step
from nofa_nb.apps.cli import main
from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.io import load_tensors
from nofa_nb.core.weights import load_weights
from nofa_nb.experts.face3d import load_face3d
from nofa_nb.experts.identity import load_identity
from nofa_nb.models.avatar import load_avatar_model
from nofa_nb.models.generator import load_generator

ROOT = Path(__file__).resolve().parents[1]
NOFA = [sys.executable, "-c", "import sys; from nofa_nb.apps.cli import main; sys.exit(main())"]
HERE = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
ENV = dict(os.environ, PYTHONPATH=HERE, OMP_NUM_THREADS="1", MPLBACKEND="Agg", PYDEVD_DISABLE_FILE_VALIDATION="1")


# --- plans ------------------------------------------------------------------------------------------------------------
def length(plan, cores):
    "Minutes of a campaign: whenever cores are free, the most urgent step that can start and fits does."
    clock, free, running, done = 0., cores, [], set()
    while len(done) < len(plan.steps):
        begun = done | {step for _, step, _ in running}
        ready = [s for s in plan.steps if s not in begun and set(GRAPH[s].needs) <= done]
        for step in sorted(ready, key=lambda s: -GRAPH[s].priority):
            threads = min(plan.steps[step].threads, cores)
            if threads <= free:
                free -= threads
                running.append((clock + plan.steps[step].minutes, step, threads))
        clock, step, threads = running.pop(running.index(min(running)))
        free, done = free + threads, done | {step}
    return clock


def test_length_by_hand():
    plan = campaign.Plan("small", "", 0, {s: campaign.Share(2, 10., 1) for s in GRAPH})
    assert length(plan, 2) == 90.
    plan = campaign.Plan("small", "", 0, {s: campaign.Share(1, 10., 1) for s in GRAPH})
    assert length(plan, 9) == 60.  # portraits, prior, four stages


def test_small_takes_at_most_four_hours_on_two_cores():
    assert 60 < length(read_plan("small"), 2) <= 240


def test_data_of_small_fits_a_small_machine():
    pairs, clips = (read_plan("small").steps[s].parameters for s in ("reconstruction", "clips"))
    frames = clips["people"] * clips["clips"] * clips["frames"]
    assert pairs["pairs"] * 58_152 < 1.5e9 and frames * 17_140 < 1e9  # bytes


@pytest.mark.parametrize("preset", ["smoke", "small", "base"])
def test_stages_agree_on_their_data(preset):
    plan = read_plan(preset)
    stages = [plan.given(s) for s in ("reconstruction", "detail", "deformation", "hybrid")]
    for name in ("pairs", "held_out", "perceptual", "layers", "prior", "data"):
        assert len({s[name] for s in stages}) == 1, name
    for name in ("people", "clips", "frames", "stride", "held_out"):
        assert plan.given("clips")[name] == stages[2][name] == stages[3][name], name


def test_readme_tells_the_plan():
    text = (ROOT / "README.md").read_text("utf-8")
    names = re.search(r"^\| minutes \|(.*)\|$", text, re.M)[1].split("|")
    told = re.search(r"^\| `small`, 2 cores \|(.*)\|$", text, re.M)[1].split("|")
    shares = read_plan("small").steps
    assert [n.strip() for n in names] == list(shares)
    assert [t.strip() for t in told] == [f"{s.minutes:g}{' (measured)' * s.measured}" for s in shares.values()]


# --- one step ---------------------------------------------------------------------------------------------------------
def test_a_step_waits_for_those_before_it(tmp_path):
    said = "step detail .*deformation starts from.*nofa train detail --preset smoke"
    with pytest.raises(MissingResource, match=said):
        run_step("smoke", "deformation", tmp_path)
    assert main(["train", "deformation", "--preset", "smoke", "--root", str(tmp_path)]) == 3
    with pytest.raises(InputError, match="step must be one of portraits, prior"):
        run_step("smoke", "audio", tmp_path)


def test_nothing_starts_when_the_time_is_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(campaign.UNTIL, str(time.time() - 1))
    assert main(["train", "portraits", "--preset", "smoke", "--root", str(tmp_path)]) == Unfinished.exit_code == 4
    assert "the same call goes on" in capsys.readouterr().err and not list(tmp_path.iterdir())
    monkeypatch.setenv(campaign.UNTIL, str(time.time() + 50))
    assert campaign.seconds_left(20.) == 20.
    assert 40 < campaign.seconds_left(70.) <= 50 and 40 < campaign.seconds_left(None) <= 50


def test_a_step_does_not_go_on_from_other_weights(tmp_path):
    plan, folder = read_plan("smoke"), place(tmp_path, "smoke", "detail")
    for step, number in (("reconstruction", "aa"), ("reconstruction", "bb")):
        (place(tmp_path, "smoke", step)).mkdir(parents=True, exist_ok=True)
        (place(tmp_path, "smoke", step) / "done.json").write_text(json.dumps({"hash": number}))
        folder.mkdir(parents=True, exist_ok=True)
        if number == "aa":
            begin(folder, plan.given("detail"), inputs(plan, "detail", tmp_path))
    with pytest.raises(InputError, match="reconstruction .'aa', now 'bb'.*remove that folder"):
        begin(folder, plan.given("detail"), inputs(plan, "detail", tmp_path))


# --- the graph --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset,target,steps", [
    ("small", (), set(GRAPH)), ("base", ("detail",), {"portraits", "prior", "reconstruction", "detail"})])
def test_snakemake_calls_each_step_as_planned(tmp_path, preset, target, steps):
    files = (f"out/train/{preset}/{t}/done.json" for t in target)
    command = campaign.snakemake(preset, "out/train", 64, ("--dry-run", "--printshellcmds", *files))
    command = [c for c in command if c not in ("--quiet", "rules", "host", "reason")]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pattern = r"exec env OMP_NUM_THREADS=(\d+) .* train (\w+) --preset (\w+) --root 'out/train' --job"
    called, plan = re.findall(pattern, done.stdout + done.stderr), read_plan(preset)
    threads = {s: (plan.steps[s].threads, preset) for s in steps}
    assert {step: (int(n), name) for n, step, name in called} == threads
    assert not (tmp_path / "out").exists()


def test_a_slice_that_is_over_at_once_says_how_to_go_on(tmp_path):
    command = [*NOFA, "train", "all", "--preset", "smoke", "--cores", "2", "--max-seconds", "0.01"]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == "nofa: the time of this call is over, the same call goes on\n"


# --- all of it --------------------------------------------------------------------------------------------------------
def start(folder, *more):
    command = [*NOFA, "train", "all", "--preset", "smoke", "--cores", "2", *more]
    return subprocess.Popen(command, cwd=folder, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True)


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "A campaign that was killed while the prior trained, called again: its folder, and what was logged before the kill."
    folder = tmp_path_factory.mktemp("campaign")
    prior = place(folder / "out/train", "smoke", "prior")
    first, began = start(folder), time.monotonic()
    while not list(prior.glob("checkpoints/0*/checkpoint.json")):
        assert first.poll() is None and time.monotonic() - began < 900, first.communicate()[0]
        time.sleep(.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    kept = max(int(p.parent.name) for p in prior.glob("checkpoints/0*/checkpoint.json"))
    before = [r for r in records(prior) if r["step"] <= kept]
    second = start(folder)
    said, _ = second.communicate()
    log = place(folder / "out/train", "smoke", "snakemake.log")
    assert second.returncode == 0, said + log.read_text("utf-8")[-3000:]
    return folder, before, said


@pytest.mark.slow
def test_killed_it_goes_on_where_it_was(smoke):
    folder, before, said = smoke
    prior = place(folder / "out/train", "smoke", "prior")
    steps = read_plan("smoke").given("prior")["steps"]
    assert 0 < before[-1]["step"] < steps, "the kill came too late to show anything"
    assert records(prior)[:len(before)] == before and records(prior)[-1]["step"] == steps
    assert json.loads((prior / "run.json").read_text())["attempt"] == 2
    done = json.loads((prior.parent / "portraits/run.json").read_text())
    assert done["attempt"] == 1  # and not done again
    for step in GRAPH:
        told = json.loads((prior.parent / step / "done.json").read_text())
        assert told["step"] == step and (prior.parent / step / told["report"]).stat().st_size > 2000
        assert f"{prior.parent.relative_to(folder) / step}/report.html" in said


@pytest.mark.slow
def test_its_data_are_rendered_once(smoke):
    data = place(smoke[0] / "out/train", "smoke", "data")
    names = [f"{what}-{split}.safetensors" for what in ("clips", "pairs") for split in ("train", "validation")]
    assert sorted(p.name for p in data.iterdir()) == names
    began = (data.parent / "deformation/begun.json").stat().st_mtime
    assert all(p.stat().st_mtime < began for p in data.iterdir())
    assert [p.parent.name for p in data.parent.glob("*/train.safetensors*")] == ["portraits"]


def drives_best(folder):
    "The stage on videos with the best fine pictures of held-out pairs: frame, foreground, eyes and mouth alike."
    after = {s: json.loads((folder / s / "scores.json").read_text("utf-8"))["after"] for s in ("deformation", "hybrid")}
    return max(("hybrid", "deformation"), key=lambda s: sum(after[s][f"psnr_fine{w}"] for w in ("", "_mask", "_parts")))


@pytest.mark.slow
def test_its_weights_are_those_of_its_checkpoints(smoke, monkeypatch):
    root = place(smoke[0] / "out/train", "smoke", "weights")
    monkeypatch.setenv("NOFA_WEIGHTS", str(root))
    loaded = {"prior": load_generator("smoke"), "face3d": load_face3d("smoke"), "identity": load_identity("smoke"),
              "avatar": load_avatar_model("smoke")}
    for step, s in GRAPH.items():
        if not s.part:
            continue
        step = drives_best(root.parent) if s.part == "avatar" else step
        last = max((root.parent / step / "checkpoints").glob("0*/weights.safetensors"))
        kept, state = load_tensors(last)[0], loaded[s.part].state_dict()
        prefix = {"avatar": "", "prior": "generator."}.get(s.part, f"{s.part}.")
        assert state and all(torch.equal(t, kept[prefix + k].half().float()) for k, t in state.items()), s.part
        card = (root / "smoke" / s.part / "README.md").read_text("utf-8")
        assert "not recorded" not in card and re.search(r"## Time\n\n.*\d+ s", card, re.S), card
    assert loaded["prior"].backbone.mapping.w_avg.norm() > 0
    stages = ["reconstruction", "detail", "deformation", "hybrid"]
    assert list(load_weights(root / "smoke/avatar")[1]["time"]) == stages[: stages.index(drives_best(root.parent)) + 1]


@pytest.mark.slow
def test_called_again_it_has_nothing_to_do(smoke):
    done = place(smoke[0] / "out/train", "smoke", "hybrid") / "done.json"
    before, again = done.stat().st_mtime_ns, start(smoke[0])
    assert again.communicate()[0].count("report.html") == len(GRAPH) and again.returncode == 0
    assert done.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_training_made_by_hand_is_taken_as_it_is(smoke, tmp_path):
    "Its folder, without anything that the campaign has put there, and from another path."
    there, here = smoke[0] / "out/train/smoke", tmp_path / "smoke"
    for step in ("prior", "face3d"):
        ignore = shutil.ignore_patterns("done.json", "begun.json", "wall.json", "report.html", ".lock", "sets.json")
        shutil.copytree(there / step, here / step, ignore=ignore)
        run = json.loads((here / step / "run.json").read_text())
        run["parameters"]["data"] = "elsewhere/train.safetensors"
        (here / step / "run.json").write_text(json.dumps(run))
    shutil.copytree(there / "portraits", here / "portraits")
    for step in ("prior", "face3d"):
        told = run_step("smoke", step, tmp_path)
        assert told["hash"] == json.loads((there / step / "done.json").read_text())["hash"]
        assert not (here / step / "report.html").exists() and told["report"].endswith(".ipynb")  # none was run
        a, b = (load_weights(root / "weights/smoke" / step)[1] for root in (here, there))
        assert a["tensors_hash"] == b["tensors_hash"]
    assert load_weights(here / "weights/smoke/prior")[1] == load_weights(there / "weights/smoke/prior")[1]


@pytest.mark.slow
def test_weights_are_written_elsewhere_on_demand(smoke, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(smoke[0])
    assert main(["train", "weights", "--preset", "smoke", "--to", str(tmp_path / "kept")]) == 0
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["avatar", "face3d", "identity", "prior"]
    assert capsys.readouterr().out.count(" MB") == 4
    theirs = smoke[0] / "out/train/smoke/weights/smoke"
    assert load_weights(tmp_path / "kept/avatar")[1] == load_weights(theirs / "avatar")[1]
    assert main(["train", "weights", "gan", "--preset", "smoke"]) == 2
    assert main(["train", "weights", "--preset", "smoke", "--root", str(tmp_path)]) == 3
