"""What several test files share."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def one_thread():
    "One PyTorch thread while a module's tests run; as before afterwards."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rounded(found, told):
    "The same but for rounding, and for the few pixels that rounding gives to a neighbour?"
    found, told = (t.float().nan_to_num(posinf=0.) for t in (found, told))
    return ((found - told).abs() > 1e-5).float().mean() <= .001


def snakemake(workflow, target, *options, **config):
    "A call of Snakemake at `smoke`, as a command."
    if shutil.which("snakemake") is None and not (Path(sys.executable).parent / "snakemake").exists():
        pytest.skip("Snakemake is not installed")
    return [sys.executable, "-m", "snakemake", "-s", f"workflow/{workflow}.smk", "--cores", "1", *options, "--nolock",
            "--rerun-triggers", "mtime", "--config", "preset=smoke",
            *(f"{name}={value}" for name, value in config.items()), "--", str(target)]


def planned(workflow, target, *options, **config):
    "What Snakemake would do, in its words."
    command = snakemake(workflow, target, "-n", *options, **config)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr
