"Presets: the paper's sizes, overrides that say what is wrong, seeds that cannot leak."

import dataclasses
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.config import PRESETS, Preset, WorldConfig, describe, override, preset, stylegan_channels, table
from nofa_nb.core.errors import InputError, MissingResource, NofaError, need_shape
from nofa_nb.core.repro import hash_config


def test_errors_are_standard_exceptions_with_exit_codes():
    assert issubclass(InputError, ValueError) and issubclass(MissingResource, FileNotFoundError)
    assert [e.exit_code for e in (NofaError, InputError, MissingResource)] == [1, 2, 3]
    missing = MissingResource("weights w.pkl", "example.org", "CC0", "weights/")
    for copy in (missing, pickle.loads(pickle.dumps(missing))):
        assert str(copy) == "weights w.pkl is missing: get it from example.org (licence: CC0) and put it at weights/"
    assert str(pickle.loads(pickle.dumps(InputError("a sentence")))) == "a sentence"


@pytest.mark.parametrize(
    "shape, pattern, fits",
    [
        ((2, 3), "b 3", True),
        ((2, 4), "b 3", False),
        ((5, 2, 3), "... n 3", True),
        ((3,), "... n 3", False),
        ((4, 4), "n n", True),
        ((4, 5), "n n", False),
        ((2, 3), "b 3 h", False),
        ((0,), "n", True),
    ],
)
def test_need_shape(shape, pattern, fits):
    class Array:
        pass

    array = Array()
    array.shape = shape
    if fits:
        return need_shape("x", array, pattern)
    with pytest.raises(InputError, match="x must be"):
        need_shape("x", array, pattern)


def test_paper_preset_has_the_published_sizes():
    p = preset("paper")
    g = p.generator
    assert (g.plane_channels * 3, g.plane_resolution) == (96, 256)  # Sec. 3.1
    assert (g.z_dim, g.w_dim, g.label_dim, g.mapping_layers) == (512, 512, 25, 2)  # EG3D
    assert (g.raw_resolution, g.image_resolution, g.super_resolution) == (128, 512, "8XDC")  # ffhq512-128
    assert (g.depth_coarse, g.depth_fine, g.ray_start, g.ray_end, g.box_warp) == (48, 48, 2.25, 3.3, 1.0)
    assert g.channels == (512, 512, 512, 512, 512, 256, 128) == stylegan_channels(256)
    assert (p.camera.focal, p.camera.radius, p.camera.pivot) == (4.2647, 2.7, (0.0, 0.0, 0.2))
    d = p.deformation
    assert (d.octaves, d.deform_layers, d.deform_width, d.weight_layers, d.weight_width) == (10, 8, 256, 4, 128)
    assert (d.identity_dim, d.expression_dim) == (80, 64)
    # the mapping network's parameters, which EG3D's checkpoint counts as 800,768
    embed, first, second = 25 * 512 + 512, 1024 * 512 + 512, 512 * 512 + 512
    assert embed + first + second == 800_768 and g.mapping_layers == 2


def test_small_preset_is_the_recipe_with_planes_of_eg3d():
    g = preset("small").generator
    assert (g.image_resolution, g.plane_channels, g.plane_resolution) == (64, 32, 64)
    assert (g.channels, g.start_resolution, g.depth_coarse, g.depth_fine) == ((192, 128, 96, 64), 8, 18, 6)


def test_test_identities_are_the_same_and_disjoint_in_all_presets():
    splits = {(p.world.train, p.world.validation, p.world.test) for p in PRESETS.values()}
    assert len(splits) == 1
    seeds = [set(range(*r)) for r in splits.pop()]
    assert len(set.union(*seeds)) == sum(map(len, seeds))
    for wrong in (dict(test=(999_999, 1_000_001)), dict(train=(5, 5)), dict(validation=(-1, 3))):
        with pytest.raises(InputError, match="world"):
            WorldConfig(**wrong)


def test_presets_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("small").world.views = 3
    with pytest.raises(TypeError):
        PRESETS["small"] = preset("paper")


def test_unknown_preset_lists_the_known():
    with pytest.raises(InputError, match="smoke, small, base, paper, got 'tiny'"):
        preset("tiny")


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([*PRESETS]), st.integers(1, 512), st.floats(0, 90), st.tuples(*[st.floats(-1, 1)] * 3))
def test_override_reads_back(name, views, yaw, pivot):
    p = preset(name)
    q = override(p, f"world.views={views}", f"world.yaw={yaw!r}", f"camera.pivot={pivot}")
    assert (q.world.views, q.world.yaw, q.camera.pivot) == (views, yaw, pivot)
    assert type(q.world.views) is int and type(q.world.yaw) is float
    assert (
        override(q, f"world.views={p.world.views}", f"world.yaw={p.world.yaw}", f"camera.pivot={p.camera.pivot}") == p
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_can_be_written_and_read_back(name):
    p = preset(name)
    rows = describe(p)[1:]
    assert override(p, *(f"{setting}={value}" for setting, value in rows)) == p
    assert len(rows) == sum(len(dataclasses.fields(getattr(p, f.name))) for f in dataclasses.fields(Preset)[1:])


@pytest.mark.parametrize(
    "change, told",
    [
        ("world.vews=8", "did you mean world.views"),
        ("plane_resolution=8", "did you mean generator.plane_resolution"),
        ("qqqq=1", "names begin with world, camera, generator, deformation, readings"),
        ("world.views", "group.field=value"),
        ("world.views=8.0", "world.views must be a whole number, got '8.0'"),
        ("world.views=", "whole number"),
        ("world.yaw=wide", "a number"),
        ("world.yaw=inf", "a number"),
        ("world.train=1", "2 whole numbers"),
        ("world.train=1,2,3", "2 whole numbers"),
        ("readings.norm=l1", "'squared' or 'unsquared'"),
        ("generator.super_resolution=16X", "'8XDC'"),
        ("generator.channels=8,8,8,8,8,8,8,8", "generator.channels"),
        ("generator.channels=", "generator.channels"),
        ("camera.radius=0", "camera.radius"),
        ("world.views=0", "world.views"),
        ("name=paper", "the name of a setting"),
        ("world.test=0,10", "disjoint"),
    ],
)
def test_bad_override_is_one_clear_sentence(change, told):
    with pytest.raises(InputError) as error:
        override(preset("paper"), change)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_every_setting_changes_the_hash():
    p = preset("small")
    changed = {"str": "128", "int": "3", "float": "0.5"}
    seen = {hash_config(p)}
    for name, value in describe(p)[1:]:
        if not isinstance(value, (int, float)):
            continue
        group, last = name.split(".")
        part = getattr(p, group)
        object.__setattr__(part := dataclasses.replace(part), last, type(value)(changed[type(value).__name__]) + value)
        seen.add(hash_config(dataclasses.replace(p, **{group: part})))
    assert len(seen) == 1 + sum(isinstance(v, (int, float)) for _, v in describe(p)[1:])


def test_table_shows_what_differs():
    text = table(describe("small", override(preset("small"), "world.views=8")))
    assert "| world.views | 16 | 8 |" in text and text.splitlines()[1] == "| --- | --- | --- |"


def test_fusion_resolution_follows_the_planes():
    assert [preset(n).fusion_resolution for n in PRESETS] == [8, 64, 128, 64]  # small and base: the planes themselves
    assert override(preset("paper"), "readings.fusion=planes").fusion_resolution == 256
