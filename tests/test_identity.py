"""F and what it is trained with: the margin, pairs, verification, ArcFace's files, a training that learns."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.config import preset
from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.core.repro import generator
from nofa_nb.core.weights import save_weights
from nofa_nb.data.augment import NONE
from nofa_nb.data.rays import collect
from nofa_nb.experts import identity as I
from nofa_nb.training import identity as T
from nofa_nb.training.loop import make_fabric, train
from nofa_nb.world.sets import PortraitSet, SetConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return collect(PortraitSet(SetConfig(replace(preset("smoke").world, views=2)), count=6), progress=False)


def pictures(n=3, size=32, seed=0):
    return torch.rand(n, 3, size, size, generator=generator(seed)) * 2 - 1


# the margin

@settings(max_examples=30, deadline=None)
@given(st.floats(.01, math.pi - .01), st.floats(0., .6), st.floats(1., 64.))
def test_margin_is_added_to_the_angle(angle, margin, scale):
    cosines = torch.tensor([[.1, math.cos(angle), -.4]])
    logits = T.arcface_logits(cosines, torch.tensor([1]), margin, scale)
    expected = math.cos(angle + margin) if angle + margin < math.pi else math.cos(angle) - margin * math.sin(margin)
    assert logits[0, 1].item() == pytest.approx(scale * expected, abs=2e-3 * scale)
    assert logits[0, [0, 2]].tolist() == pytest.approx([scale * .1, scale * -.4], rel=1e-5)


def test_margin_makes_the_loss_larger_and_keeps_a_gradient():
    cosines = torch.tensor([[1., .2], [-1., .5]], requires_grad=True)  # at both ends, where the root has no slope
    right = torch.tensor([0, 0])
    plain, hard = (F.cross_entropy(T.arcface_logits(cosines, right, m, 8.), right) for m in (0., .4))
    hard.backward()
    assert hard > plain and cosines.grad.isfinite().all() and (cosines.grad[:, 0] < 0).all()


def test_margin_grows():
    stage = T.IdentityStage(margin=.4, margin_from=.2, margin_full=.6)
    assert [T.margin_at(p, stage) for p in (0., .2, .4, .6, 1.)] == pytest.approx([0, 0, .2, .4, .4])
    assert T.margin_at(.1, T.IdentityStage(margin=.4, margin_from=.2, margin_full=.2)) == 0
    for bad in (dict(margin_from=.5, margin_full=.2), dict(batch=9), dict(steps=0)):
        with pytest.raises(InputError):
            T.IdentityStage(**bad)


# verification

def test_pairs_are_counted_once():
    e, who = torch.eye(4), torch.tensor([5, 5, 9, 9])
    e[1] = e[0]
    same, other = T.pairs(e, who)
    assert sorted(same.tolist()) == [0., 1.] and other.tolist() == [0.] * 4


def test_verification_by_hand():
    # cosines of pairs: one person .8 (three people), two people 0, except two strangers that are .9
    e = torch.zeros(6, 9)
    for k in range(3):
        e[2 * k, k], e[2 * k + 1, k], e[2 * k + 1, 3 + k] = 1, .8, .6
    who = torch.tensor([0, 0, 1, 1, 2, 2])
    clean = T.verify(e, who)
    assert clean["auc"] == 1 and clean["same"] == pytest.approx(.8) and clean["other"] == 0
    e[4] = F.normalize(torch.tensor([.9, 0, 0, 0, 0, 0, 0, 0, .435889894]), dim=0)
    spoiled = T.verify(e, who)
    same, other = T.pairs(e, who)
    by_hand = np.mean([(s > o) + .5 * (s == o) for s in same for o in other])
    assert spoiled["auc"] == pytest.approx(by_hand) and spoiled["auc"] < 1


def test_equal_error_rate_and_threshold():
    same, other = np.array([.2, .6, .7, .8]), np.array([0., .1, .15, .65])
    assert .15 < T.best_threshold(same, other) <= .2  # all pairs of one person, all but one stranger
    who = torch.arange(40).repeat_interleave(3)
    e = F.normalize(F.one_hot(who, 40) + .25 * torch.randn(120, 40, generator=generator(0)), dim=-1)
    found = T.verify(e, who)
    same, other = T.pairs(e, who)
    threshold = np.quantile(other, 1 - found["eer"])
    assert 0 < found["eer"] < .2 and abs((same < threshold).mean() - found["eer"]) < .02
    with pytest.raises(InputError, match="several people"):
        T.verify(e[:3], who[:3])


# networks and files

def test_embeddings_are_unit_and_differentiable_when_frozen():
    model = I.frozen(I.IdentityNetwork(I.IDENTITIES["smoke"], seed=2))
    x = pictures().requires_grad_()
    e = model(x)
    torch.testing.assert_close(e.norm(dim=-1), torch.ones(3))
    (e * model(pictures(seed=1))).sum().backward()
    assert (x.grad.flatten(1).norm(dim=1) > 0).all() and all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(model(x[1:2]), e[1:2], atol=1e-4, rtol=0)  # neighbours do not matter


def tiny_arcface():
    torch.manual_seed(0)
    model = I.ArcFaceNetwork((1, 2, 1, 1), (8, 8, 16, 16, 24), 12, 48)
    for m in model.modules():
        if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d)):
            m.running_mean.normal_(0, .1)
            m.running_var.uniform_(.5, 2)
    return model.eval()


@pytest.mark.parametrize("prefix,nested", [("", False), ("module.", False), ("", True)],
                         ids=["as published", "module.", "state_dict"])
def test_arcface_weights(tmp_path, prefix, nested):
    model, path = tiny_arcface(), tmp_path / "backbone.pth"
    weights = {prefix + k: t for k, t in model.state_dict().items()}
    torch.save({"state_dict": weights} if nested else weights, path)
    found = I.load_identity(path, "arcface")
    assert found.size == 48 and not found.training and not any(p.requires_grad for p in found.parameters())
    torch.testing.assert_close(found(pictures(size=48)), model(pictures(size=48)))
    assert (found(pictures(size=48)) * found(pictures(size=48, seed=1))).sum(-1).max() < .999


def test_the_last_normalisation_of_arcface_by_hand():
    model, seen = tiny_arcface(), {}
    model.fc.register_forward_hook(lambda module, given, out: seen.update(given=given[0], out=out))
    model.bn2.register_forward_hook(lambda module, given, out: seen.update(places=out))
    e, last = model(pictures(size=48)), model.features
    assert seen["given"].equal(seen["places"].flatten(1)) and seen["places"].shape == (3, 24, 3, 3)  # a sixteenth
    by_hand = (seen["out"] - last.running_mean) / (last.running_var + 1e-5).sqrt() * last.weight + last.bias
    torch.testing.assert_close(e, by_hand / by_hand.norm(dim=-1, keepdim=True))


def test_a_block_by_hand():
    block = I.ImprovedBlock(2, 2).eval()
    with torch.no_grad():
        for conv in (block.conv1, block.conv2):  # each passes its input on
            conv.weight.zero_()
            conv.weight[0, 0, 1, 1] = conv.weight[1, 1, 1, 1] = 1
    x = torch.tensor([1., -2.])[None, :, None, None].expand(1, 2, 3, 3)
    scale = 1 / math.sqrt(1 + 1e-5)  # of a fresh normalisation
    expected = torch.tensor([1 + scale**3, -2 - .25 * 2 * scale**3])  # PReLU: a quarter below 0
    expected = expected[None, :, None, None].expand(1, 2, 3, 3)
    torch.testing.assert_close(block(x), expected)


def test_arcface_refuses_other_files(tmp_path, monkeypatch):
    weights = tiny_arcface().state_dict()
    torch.save({k: t for k, t in weights.items() if k != "bn2.weight"}, tmp_path / "less.pth")
    torch.save({**weights, "extra": torch.zeros(1)}, tmp_path / "more.pth")
    torch.save({"fc.weight": weights["fc.weight"]}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    for name, said in (("less", "bn2.weight"), ("more", "extra"), ("other", "conv1"), ("list", "dictionary")):
        with pytest.raises(InputError, match=said):
            I.load_arcface(tmp_path / f"{name}.pth")
    monkeypatch.setenv("NOFA_WEIGHTS", str(tmp_path))
    with pytest.raises(MissingResource, match="deepinsight/insightface.*non-commercial.*backbone.pth"):
        I.load_identity("paper", "arcface")
    with pytest.raises(InputError, match="'world' or 'arcface'"):
        I.load_identity("small", "dlib")


def test_own_weights_come_back(tmp_path, monkeypatch):
    model = I.IdentityNetwork(I.IDENTITIES["smoke"], seed=3)
    monkeypatch.setenv("NOFA_WEIGHTS", str(tmp_path))
    with pytest.raises(MissingResource):
        I.load_identity("smoke")
    record = dict(kind="F", preset="smoke", licence="Apache-2.0", config=model.config)
    save_weights(tmp_path / "smoke" / "identity", model.state_dict(), record)
    found = I.load_identity("smoke")
    assert found.config == model.config and (found(pictures()) * model(pictures())).sum(-1).min() > .9999


# training

def test_batches_hold_pairs_and_every_person_once(data):
    config = replace(T.STAGES["smoke"], augmentation=NONE)  # so that pictures differ only if they are two
    stage = T.IdentityTraining(config, I.IDENTITIES["smoke"], data)
    image, classes = stage.data(range(12, 24), 5)  # the second epoch of six people
    assert classes[::2].equal(classes[1::2]) and sorted(classes[::2].tolist()) == list(range(6))
    assert all(a.equal(b) for a, b in zip((image, classes), stage.data(range(12, 24), 5)))
    assert not any(image[i].equal(image[i + 1]) for i in range(0, 12, 2))


def test_relit_pictures_have_the_same_people_in_other_light(data):
    few = data[torch.arange(3)]
    changed = T.relit(few, 32)
    truth = T.faces_of(few, torch.arange(3))
    assert (changed.mask - truth.mask).abs().mean() < .01 and changed.identity.equal(truth.identity)
    face = (truth.mask == 1).expand_as(truth.image)
    assert .03 < (changed.image - truth.image)[face].abs().mean() < .6
    assert (changed.image - truth.image)[~face].abs().mean() > .1


def test_smoke_training_learns(data, tmp_path):
    config = replace(T.STAGES["smoke"], steps=20, batch=12)
    stage = T.IdentityTraining(config, I.IDENTITIES["smoke"], data, data, light=False)
    before = stage.centres.weight.detach().clone()
    rhythm = stage.training(log_every=4, save_every=20, evaluate_every=20)
    done = train(stage, rhythm, tmp_path, make_fabric(accelerator="cpu"), progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["identity/arcface"] for line in lines if "identity/arcface" in line]
    assert done.finished and losses[-1] < .9 * losses[0] and not stage.centres.weight.equal(before)
    evaluation = next(line["evaluation"] for line in lines if "evaluation" in line)
    assert {"auc", "eer", "accuracy", "moved_auc"} <= set(evaluation)
