"""The 3D half of EG3D: parity with the numbers of its released code, stage by stage, and properties of the renderer."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.errors import InputError
from nofa_nb.geometry.cameras import Camera
from nofa_nb.geometry.rays import rays
from nofa_nb.geometry.sampling import draw_numbers, importance_depths, stratified_depths
from nofa_nb.models.renderer import Renderer, composite, interval_weights, query
from nofa_nb.models.triplane import Decoder, TriplaneField, split_planes
from nofa_nb.ops.plane_sample import plane_sample

few = settings(max_examples=25, deadline=None, derandomize=True)
FEATURES, DEPTH = 5e-6, 1e-5  # the largest difference that parity allows in float32
CASES = {
    "base": {},
    "white_back": {"white_back": True},
    "auto": {"ray_start": "auto", "ray_end": "auto"},
    "disparity": {"disparity": True},
    "no_importance": {"depth_fine": 0},
    "boxwarp1.6_12_20": {"depth_coarse": 12, "depth_fine": 20, "ray_start": 0.1, "ray_end": 2.6, "box_warp": 1.6},
}


@pytest.fixture(scope="module")
def eg3d():
    with np.load(Path(__file__).parent / "fixtures" / "eg3d_tiny_parity.npz", allow_pickle=False) as f:
        wanted = [k for k in f.files if not k.startswith(("state/backbone", "state/superresolution", "ops/"))]
        return {k: torch.from_numpy(f[k]) for k in wanted}


@pytest.fixture(scope="module")
def decoder(eg3d):
    made = Decoder(32)
    made.load_state_dict({k.removeprefix("state/decoder."): v for k, v in eg3d.items() if k.startswith("state/decoder")})
    return made.requires_grad_(False)


def close(a, b, atol):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def trio(seen):
    return {"feature": seen.features, "depth": seen.depth, "weights_sum": seen.weight}


# ---- parity with EG3D

@pytest.fixture(scope="module")
def planes(eg3d):
    """The whole planes of the tiny generator, where another part of the package can already make them."""
    generator = pytest.importorskip("nofa_nb.models.generator", reason="the backbone is not there")
    del generator
    pytest.skip("replaced below")


@pytest.mark.parametrize("name", CASES)
def test_parity_of_the_renderer(eg3d, decoder, name):
    options = {"depth_coarse": 8, "depth_fine": 8} | CASES[name]
    field = TriplaneField(eg3d["in/small_planes"], decoder, options.get("box_warp", 1.0))
    first = eg3d[f"render_{name}/rand_coarse"][..., 0]
    second = eg3d.get(f"render_{name}/rand_fine", torch.zeros(128, 0)).reshape(1, 128, -1)
    seen = Renderer(**options).render(field, eg3d["in/small_ray_origins"], eg3d["in/small_ray_dirs"], (first, second))
    for key, value in trio(seen).items():
        close(value, eg3d[f"render_{name}/{key}"], DEPTH if key == "depth" else FEATURES)


def test_parity_of_stratified_depths(eg3d):
    near, far = torch.full((2, 256), 2.25), torch.full((2, 256), 3.3)
    close(stratified_depths(near, far, eg3d["in/rand_coarse"][..., 0]), eg3d["out/depths_coarse"][..., 0], 1e-6)


def test_parity_of_coarse_weights(eg3d):
    weights = interval_weights(eg3d["out/sigma_coarse"][..., 0], eg3d["out/depths_coarse"][..., 0])
    close(weights, eg3d["out/weights_coarse"][..., 0], 1e-6)


def test_parity_of_importance_depths(eg3d):
    coarse, weights = eg3d["out/depths_coarse"][..., 0], eg3d["out/weights_coarse"][..., 0]
    fine = importance_depths(coarse, weights, eg3d["in/rand_fine"].reshape(2, 256, 8))
    close(fine, eg3d["out/depths_fine"][..., 0], DEPTH)
