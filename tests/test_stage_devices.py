"""Training stages on other devices: a step and a look of every stage, with what a GPU would hold on a pretended one.

What autograd does between is out of sight: it is PyTorch's, and stays on the device of what it is given.
"""
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from test_stages import FLAT, pairs, stages, videos  # noqa: F401 (fixtures)
from test_world_device import PRETEND, PretendDevice

from nofa_nb.core.config import preset
from nofa_nb.data.augment import Augmentation
from nofa_nb.data.rays import collect
from nofa_nb.experts.face3d import FACES
from nofa_nb.experts.identity import IDENTITIES
from nofa_nb.models.avatar import build_avatar_model
from nofa_nb.training import face3d, identity, prior
from nofa_nb.training.loop import Moment
from nofa_nb.world.sets import PortraitSet, SetConfig

pytestmark = pytest.mark.usefixtures("one_thread")


class Numbers(torch.Generator):
    "Random numbers that say they are made on the pretended device."
    device = PRETEND


def numbers(seed=0):
    made = Numbers()
    made.manual_seed(seed)
    return made


def send(module):
    for t in (*module.parameters(), *module.buffers()):
        t._pretends = True
    return module


def try_all(stage, steps=(0,)):
    "Every phase of some steps, then what is looked at."
    with PretendDevice():
        modules = {name: send(m) for name, m in stage.modules().items()}
        for helper in stage.helpers():
            send(helper)
        for step in steps:
            samples = range(step * stage.stage.batch, (step + 1) * stage.stage.batch)
            batch = move_data_to_device(stage.data(samples, 0), PRETEND)  # as the loop does
            phases = list(stage.step(batch, Moment(step, samples.start, numbers())))
            assert phases and all(torch.isfinite(t).all() for _, losses in phases for t in losses.values())
            assert any(getattr(t, "_pretends", False) for _, losses in phases for t in losses.values())
        with torch.no_grad():
            scores, picture = stage.evaluate(modules, numbers()), stage.sample(modules, numbers())
    assert all(isinstance(v, float) for v in scores.values())
    assert picture is None or picture.ndim == 3 and not getattr(picture, "_pretends", False)
    return phases


@pytest.mark.parametrize("name", ["reconstruction", "detail", "deformation", "hybrid"])
def test_stages_of_the_avatar(name, pairs, videos):  # noqa: F811
    changes = dict(reconstruction=dict(regress=.5, steps=4, window=8), detail=dict(window=8),
                   deformation=dict(w_shape=1., w_same=1., shape_only=.5, steps=4, window=8, far=.5),
                   hybrid=dict(window=8))
    stage = stages(name, build_avatar_model(FLAT, seed=2), pairs, videos, **changes[name])
    with PretendDevice():
        send(stage.model)
    try_all(stage, range(3))


@pytest.fixture(scope="module")
def faces():
    return collect(PortraitSet(SetConfig(preset("smoke").world), count=4), progress=False)


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("objective", ["warm", "warm+gan"])
def test_the_prior(objective, resident, faces):
    stage = prior.PriorStage(objective, steps=4, batch=2, rays=16, near=2, patch=4, patch_from=.5, adversarial_from=.5,
                             raw_first=16, resident=resident)
    phases = try_all(prior.Prior(stage, preset("smoke").generator, faces, faces), (0, 2))
    assert {name for name, _ in phases} == {"generator"} | ({"discriminator"} if objective == "warm+gan" else set())


def test_the_experts(faces):
    few = dict(steps=2, batch=4)
    try_all(face3d.FaceTraining(face3d.FaceStage(**few, augmentation=Augmentation()), FACES["smoke"], faces, faces))
    try_all(identity.IdentityTraining(identity.IdentityStage(**few), IDENTITIES["smoke"], faces, faces))


def test_a_stray_is_noticed(faces):
    stage = prior.Prior(prior.PriorStage("warm", steps=4, batch=2, rays=16), preset("smoke").generator, faces)
    stage.modules = lambda: {"generator": stage.generator.backbone}  # the decoder is left behind
    with pytest.raises(RuntimeError, match="mixes devices"):
        try_all(stage)
