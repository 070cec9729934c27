"""Multi-view sets: pure functions of the seed, one stream for any workers and batch, splits that cannot leak."""
import contextlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import nofa_nb.world.sets as sets
from nofa_nb.core.config import WorldConfig, preset
from nofa_nb.core.errors import InputError
from nofa_nb.core.repro import hash_tensors
from nofa_nb.geometry.cameras import Camera
from nofa_nb.world.appearance import LOOK, decode_look
from nofa_nb.world.bust import dress, person_from_code, sample_person
from nofa_nb.world.head import load_head
from nofa_nb.world.portraits import render
from nofa_nb.world.sets import (
    SHORT,
    Portraits,
    PortraitSet,
    SetConfig,
    collate,
    loader,
    person_views,
    reduced,
    sample_view,
    split_seeds,
)

SMOKE = SetConfig(replace(preset("smoke").world, views=3))


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def digest(portraits):
    "One hash per portrait, in order."
    return [hash_tensors(p.tensors()) for p in portraits]


def stream(portraits, **options):
    return [h for batch in loader(portraits, **options) for h in digest(batch)]


@pytest.fixture(scope="module")
def five():
    portraits = PortraitSet(SMOKE, "validation", count=5)
    return portraits, digest(portraits)


# --- the same bits ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_stream_is_the_same_for_any_workers_and_batch(five, workers, batch):
    portraits, expected = five
    assert len(set(expected)) == 15
    assert stream(portraits, batch=batch, workers=workers) == expected


def test_mixed_stream_is_a_permutation_within_stretches(five):
    portraits, expected = five
    mixed = stream(portraits, batch=4, mix=2)
    assert mixed == stream(portraits, batch=7, mix=2, workers=2) != expected
    assert [sorted(mixed[i:i + 6]) for i in (0, 6, 12)] == [sorted(expected[i:i + 6]) for i in (0, 6, 12)]
    assert stream(portraits, mix=2, seed=1) != mixed


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_plain_dataloader_brings_each_portrait_once(five, workers):
    portraits, expected = five
    batches = DataLoader(portraits, batch_size=4, num_workers=workers, collate_fn=collate)
    found = [h for b in batches for h in digest(b)]
    assert sorted(found) == sorted(expected) and (workers == 2 or found == expected)


def test_bits_do_not_depend_on_threads_or_company():
    config = replace(SMOKE, sizes=replace(SMOKE.sizes, resolution=48, texture=96))
    with threads(2):
        both = person_views(5, 3, config)
        assert torch.get_num_threads() == 2  # put back
    with threads(1):
        assert digest(person_views(5, [2], config)) == digest(both)[2:]
        assert digest(person_views(5, [2, 0], config)) == [digest(both)[2], digest(both)[0]]


def test_rendering_uses_one_thread_and_one_view_at_a_time(monkeypatch):
    "At 128 px more threads or views do change last bits, though bytes rarely show it: so the rule itself is tested."
    seen = []
    monkeypatch.setattr(sets, "dress", lambda *a: seen.append((torch.get_num_threads(), 1)) or dress(*a))
    monkeypatch.setattr(sets, "render", lambda *a: seen.append((torch.get_num_threads(), len(a[1]))) or render(*a))
    with threads(2):
        person_views(5, 3, SMOKE)
    assert seen == [(1, 1)] * 4


def test_global_random_state_is_left_alone(five):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    next(loader(five[0], batch=2, mix=2))
    assert torch.equal(before, torch.get_rng_state())


# --- what a portrait holds --------------------------------------------------------------------------------------------
def test_portrait_is_what_its_labels_say():
    p = person_views(7, [1], SMOKE)[0]
    bust = dress(person_from_code(p.code), SMOKE.sizes.texture)
    v = render(bust, p.beta[None], Camera.from_label(p.camera), 32)
    assert ((v.rgb[0] - p.floats().rgb).abs() <= .5 / 255 + 1e-6).all()
    inside = v.depth[0].isfinite()
    assert torch.equal(inside, p.depth.isfinite()) and torch.equal(inside, p.mask == 255) and inside.float().mean() > .2
    assert (v.depth[0] - p.floats().depth)[inside].abs().max() <= 1 / 1024
    assert torch.equal(v.landmarks[0], p.landmarks) and torch.equal(v.visible[0], p.visible)
    assert int(p.identity) == 7 and int(p.view) == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(["uniform", "frontal"]))
def test_cameras_stay_in_range_and_keep_their_distance(seed, view, sampling):
    config = replace(SMOKE, sampling=sampling)
    camera, beta = sample_view(seed, view, config)
    yaw, pitch = camera.yaw_pitch()
    assert yaw.abs() <= math.radians(60) + 1e-5 and pitch.abs() <= math.radians(25) + 1e-5
    assert abs(float(camera.position.norm()) - 2.7) < 1e-5
    assert beta.shape == (1, 52) and 0 <= beta.min() and beta.max() <= 1


def test_frontal_is_narrower():
    def spread(sampling):
        config = replace(SMOKE, sampling=sampling)
        return torch.stack([sample_view(s, 0, config)[0].yaw_pitch()[0] for s in range(300)]).std()
    assert .6 < spread("frontal") / spread("uniform") < .82  # 1/sqrt(2) = .707


# --- the reduced world ------------------------------------------------------------------------------------------------
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_reduced_people(seed):
    before = sample_person(seed)
    after = reduced(before)
    look = decode_look(load_head(), after.alpha, after.look)
    assert look.hair_length <= SHORT and look.glasses == 0 and look.earrings == 0
    kept = [i for i, name in enumerate(LOOK) if name not in ("hair_length", "glasses", "earrings", "tied")]
    assert torch.equal(after.alpha, before.alpha) and torch.equal(after.look[kept], before.look[kept])
    assert torch.equal(reduced(after).code, after.code)  # nothing left to reduce
    at = LOOK.index("hair_length")
    if after.look[at] != before.look[at]:  # cut no more than needed
        longer = after.look.clone()
        longer[at] += .25
        assert decode_look(load_head(), after.alpha, longer).hair_length > SHORT


def test_reduced_pictures_share_one_plain_background():
    config = replace(SMOKE, world="reduced")
    corners = torch.cat([person_views(s, 2, config).rgb[..., :4, :3].flatten(2) for s in (24, 9)])
    empty = corners.float().permute(0, 2, 1)  # top left corner
    assert empty.std((0, 1)).max() < 2 and (empty.amax(-1) - empty.amin(-1)).max() <= 2  # one colour, and grey
    full = torch.cat([person_views(s, 2, SMOKE).rgb[..., :4, :3].flatten(2) for s in (24, 9)]).float().permute(0, 2, 1)
    assert full.std((0, 1)).max() > 5
    assert torch.equal(person_views(24, 1, config).code[0], reduced(sample_person(24)).code)


# --- splits -----------------------------------------------------------------------------------------------------------
def test_splits_share_no_identity():
    ranges = [split_seeds(WorldConfig(), s) for s in ("train", "validation", "test")]
    assert sum(map(len, ranges)) == 1_020_000
    for i, a in enumerate(ranges):
        for b in ranges[i + 1:]:
            assert a.stop <= b.start or b.stop <= a.start


@pytest.mark.parametrize("options,word", [
    (dict(split="exam"), "split"), (dict(first=-1), "first"), (dict(first=1_000_000), "first"),
    (dict(first=2.5), "first"),
    (dict(split="test", first=5), "first"), (dict(split="validation", first=1_009_999, count=2), "count"),
    (dict(count=0), "count"), (dict(count=1_000_001), "count"),
])
def test_bad_splits(options, word):
    with pytest.raises(InputError, match=f"^{word} must be"):
        PortraitSet(SMOKE, **options)


@pytest.mark.parametrize("call,word", [
    (lambda: person_views(-1, 2, SMOKE), "seed"), (lambda: person_views(0, 0, SMOKE), "views"),
    (lambda: person_views(0, [-1], SMOKE), "view"), (lambda: SetConfig(WorldConfig(resolution=8)), "size"),
    (lambda: SetConfig(world="flat"), "world"), (lambda: SetConfig(sampling="none"), "sampling"),
    (lambda: SetConfig(WorldConfig(supersample=1)), "world.supersample"), (lambda: WorldConfig(views=0), "world.views"),
    (lambda: loader(PortraitSet(SMOKE), batch=0), "batch"), (lambda: loader(PortraitSet(SMOKE), workers=-1), "workers"),
    (lambda: loader(PortraitSet(SMOKE), mix=0), "mix"), (lambda: collate([]), "portraits"),
    (lambda: PortraitSet(SMOKE, count=2).identity(2), "index"),
])
def test_bad_input(call, word):
    with pytest.raises(InputError, match=f"^{word} must be"):
        call()


def test_collate_refuses_two_sizes():
    large = replace(SMOKE, sizes=replace(SMOKE.sizes, resolution=48))
    with pytest.raises(InputError, match="of one size"):
        collate([person_views(0, 1, SMOKE)[0], person_views(0, 1, large)[0]])


def test_an_error_in_a_worker_arrives():
    class Broken(Portraits):
        identities, views = 2, 1

        def identity(self, index):
            raise InputError("a shard is damaged")
    with pytest.raises(InputError, match="a shard is damaged"):
        list(loader(Broken(), workers=1))
