"""training.losses: Eq. 5 to 14 against the formulas written out, properties of the norms, gradients, bad input."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.config import Readings
from nofa_nb.core.errors import InputError
from nofa_nb.core.repro import generator
from nofa_nb.models.generator import Frame
from nofa_nb.training.losses import (
    AdaptationLoss,
    AudioLoss,
    DeformationLoss,
    HybridLoss,
    SyntheticLoss,
    View,
    adaptation_losses,
    bbox_loss,
    depth_loss,
    identity_loss,
    image_pairs,
    l2_loss,
    synthetic_losses,
    target_boxes,
    video_losses,
)


def normal(seed, *shape):
    return torch.randn(shape, generator=generator(seed, "losses"))


def view(seed, size=8, raw=4, foreground=True):
    mask = (normal(seed + 100, 2, 1, raw, raw) > 0).float() if foreground else None
    image, small = normal(seed, 2, 3, size, size), normal(seed + 1, 2, 3, raw, raw)
    return View(image, small, normal(seed + 2, 2, 1, raw, raw), mask)


def perceptual(a, b):
    return (a - b).abs().flatten(1).sum(1)


def embed(x):
    return torch.stack([x.mean((1, 2, 3)), x.square().mean((1, 2, 3)), x[:, 0, 0, 0]], 1)


FACE = torch.tensor([[[20., 24], [44, 24], [32, 36], [22, 46], [42, 46]]])  # in 64 x 64
ALL = torch.tensor([[[10, 10, 20, 18], [40, 10, 50, 18], [20, 40, 40, 52]]] * 2).float()


# --- the equations, written out ---------------------------------------------------------------------------------------
def test_eq_5_to_9():
    found, truth = [view(0), view(10)], [view(20), view(30)]
    terms = synthetic_losses(found, truth, perceptual)
    lpips = l2 = depth = 0
    for f, t in zip(found, truth):
        for a, b in ((f.image, t.image), (f.raw, t.raw)):
            lpips, l2 = lpips + perceptual(a, b).mean(), l2 + F.mse_loss(a, b)
        for i in range(2):  # the mean over the foreground of each picture
            inside = t.foreground[i] > 0
            depth = depth + (f.depth[i] - t.depth[i])[inside].square().mean() / 2
    torch.testing.assert_close(terms, {"lpips": lpips, "l2": l2, "depth": 2 * depth})


def test_eq_13_and_its_relatives():
    found, truth = normal(0, 2, 3, 64, 64), normal(1, 2, 3, 64, 64)
    a, b = embed(found), embed(truth)
    cosine = ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
    rec = dict(l2=(found - truth).square().mean(), lpips=perceptual(found, truth).mean())

    corners = [(4, 8), (40, 8), (24, 40)]  # of boxes of 16 pixels, the size of the crops at 64 pixels: slices
    boxes = torch.tensor([[[x, y, x + 16, y + 16] for x, y in corners]] * 2).float()

    def bbox(parts):
        pairs = [[i[..., y:y + 16, x:x + 16] for i in (found, truth)] for x, y in (corners[p] for p in parts)]
        return dict(l2=sum((p - q).square().mean() for p, q in pairs) / len(pairs),
                    lpips=sum(perceptual(p, q).mean() for p, q in pairs) / len(pairs))

    for config, w_rec, w_bbox, w_id, parts in ((DeformationLoss(), 1, 1, .1, [0, 1, 2]),
                                               (HybridLoss(), 0, 2, 1, [0, 1, 2]), (AudioLoss(), 0, 1, .2, [2])):
        want = {f"rec_{k}": v for k, v in rec.items()} if w_rec else {}
        want |= {f"bbox_{k}": w_bbox * v for k, v in bbox(parts).items()} | {"id": w_id * (1 - cosine)}
        torch.testing.assert_close(video_losses(found, truth, boxes, perceptual, embed, config), want)


def test_boxes_of_whole_pixels_at_their_size_are_slices():
    found, truth = normal(0, 2, 3, 64, 64), normal(1, 2, 3, 64, 64)
    boxes = torch.tensor([[[4., 8, 20, 24]], [[30., 40, 46, 56]]])
    terms = bbox_loss(found, truth, boxes, perceptual)  # 64 / 4 = 16
    cut = [torch.stack([x[0, :, 8:24, 4:20], x[1, :, 40:56, 30:46]]) for x in (found, truth)]
    torch.testing.assert_close(terms, {"l2": F.mse_loss(*cut), "lpips": perceptual(*cut).mean()})


def test_crops_are_a_quarter_of_the_side_at_least_16_pixels():
    sizes = []

    def watch(a, b):
        sizes.append(a.shape[-2:])
        return perceptual(a, b)

    for side in (32, 64, 256):
        bbox_loss(torch.zeros(2, 3, side, side), torch.ones(2, 3, side, side), ALL / 2, watch)
    video_losses(torch.zeros(2, 3, 64, 64), torch.ones(2, 3, 64, 64), ALL, watch, embed, HybridLoss(crop=20))
    assert sizes == [(16, 16), (16, 16), (64, 64), (20, 20)]


def test_eq_14():
    found, truth, before = view(0), normal(5, 2, 3, 8, 8), normal(6, 2, 1, 4, 4).requires_grad_()
    found = View(found.image, found.raw, found.depth.requires_grad_())
    terms = adaptation_losses(found, truth, before, perceptual, AdaptationLoss(w_rec=3, w_reg=5))
    want = {"rec_l2": 3 * F.mse_loss(found.image, truth), "rec_lpips": 3 * perceptual(found.image, truth).mean(),
            "reg": 5 * F.mse_loss(found.depth, before)}
    torch.testing.assert_close(terms, want)
    terms["reg"].backward()
    assert before.grad is None and found.depth.grad.any()  # the old depth stays as it is
    mask = torch.zeros(2, 1, 4, 4)
    assert adaptation_losses(found, truth, before, perceptual, foreground=mask)["reg"] == 0


def test_the_papers_weights():
    s, a = SyntheticLoss(), AdaptationLoss()
    assert (s.w_lpips, s.w_l2, s.w_depth, a.w_rec, a.w_reg) == (1, 1, 2, 1, 1)
    rows = [(c.w_rec, c.w_bbox, c.w_id) for c in (DeformationLoss(), HybridLoss(), AudioLoss())]
    assert rows == [(1, 1, .1), (0, 2, 1), (0, 1, .2)] and AudioLoss().parts == ("mouth",)


# --- readings ---------------------------------------------------------------------------------------------------------
@settings(max_examples=15, deadline=None)
@given(st.floats(-3, 3), st.integers(0, 9), st.sampled_from(["squared", "unsquared"]))
def test_norms_scale_as_they_should(factor, seed, norm):
    a, b = normal(seed, 2, 3, 5, 4), normal(seed + 50, 2, 3, 5, 4)
    one, more = l2_loss(a, b, norm), l2_loss(factor * a, factor * b, norm)
    torch.testing.assert_close(more, one * (factor**2 if norm == "squared" else abs(factor)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one, l2_loss(a.repeat(3, 1, 1, 1), b.repeat(3, 1, 1, 1), norm))  # batch and size do not
    torch.testing.assert_close(one, l2_loss(a.repeat(1, 1, 2, 2), b.repeat(1, 1, 2, 2), norm))
    mask = torch.ones(2, 1, 5, 4)
    torch.testing.assert_close(one, l2_loss(a, b, norm, mask))
    assert l2_loss(a, a, norm) == 0 < one


def test_unsquared_is_a_mean_of_roots():
    a = torch.zeros(2, 1, 2, 2)
    b = torch.tensor([1., 3]).reshape(2, 1, 1, 1).expand_as(a)
    assert l2_loss(a, b) == 5 and l2_loss(a, b, "unsquared") == 2  # the root of the mean of squares would be 2.24


def test_a_norm_reading_reaches_every_term():
    f, t, odd = [view(0)], [view(20)], Readings(norm="unsquared", depth_region="frame")
    x, y = synthetic_losses(f, t, perceptual), synthetic_losses(f, t, perceptual, readings=odd)
    assert x["lpips"] == y["lpips"] and x["l2"] != y["l2"]
    torch.testing.assert_close(y["depth"], 2 * l2_loss(f[0].depth, t[0].depth, "unsquared"))
    images = normal(0, 2, 3, 64, 64), normal(1, 2, 3, 64, 64)
    x, y = (video_losses(*images, ALL, perceptual, embed, readings=r) for r in (Readings(), odd))
    assert [k for k in x if x[k] != y[k]] == ["rec_l2", "bbox_l2"]
    x, y = (adaptation_losses(f[0], t[0].image, t[0].depth, perceptual, readings=r) for r in (Readings(), odd))
    assert [k for k in x if x[k] != y[k]] == ["rec_l2", "reg"]


def test_images_without_super_resolution_count_once():
    same = [view(0, size=4, raw=4), view(10, size=4, raw=4)]
    same = [v._replace(raw=v.image) for v in same]
    zero = [v._replace(image=0 * v.image, raw=0 * v.raw) for v in same]
    once, twice = (synthetic_losses(same, zero, perceptual, SyntheticLoss(same_raw=s)) for s in ("once", "twice"))
    for name, factor in dict(lpips=2, l2=2, depth=1).items():
        torch.testing.assert_close(twice[name], factor * once[name])
    assert len(list(image_pairs([view(0)], [view(1)], "once"))) == 2  # with super-resolution both count


def test_depth_outside_the_foreground_may_be_anything():
    truth = view(0)
    for bad in (math.inf, math.nan, 1e6):
        wild = truth._replace(depth=torch.where(truth.foreground > 0, truth.depth + 1, bad).requires_grad_())
        loss = depth_loss([wild], [truth])
        torch.testing.assert_close(loss, torch.tensor(1.))
        assert torch.autograd.grad(loss, wild.depth)[0].isfinite().all()
    assert depth_loss([truth._replace(depth=truth.depth + 1)], [truth._replace(foreground=0 * truth.foreground)]) == 0


def test_a_frame_of_the_generator_fits():
    v = view(0)
    frame = Frame(v.image, v.raw, v.depth, torch.ones(2, 1, 4, 4), v.raw)
    assert synthetic_losses([frame], [v], perceptual) == synthetic_losses([v], [v], perceptual)
    assert sum(synthetic_losses([frame], [v], perceptual).values()) == 0


def test_boxes_of_both_readings_hold_eyes_and_mouth():
    dense = torch.zeros(2, 68, 2) + torch.tensor([32., 36])
    eye = torch.tensor([[-4., 0], [-2, -2], [2, -2], [4, 0], [2, 2], [-2, 2]])
    dense[:, 36:42], dense[:, 42:48] = torch.tensor([20., 24]) + eye, torch.tensor([44., 24]) + eye
    dense[:, 48:] = torch.tensor([32., 46])
    for i, point in {48: [22., 46], 54: [42., 46], 51: [32., 43], 66: [32., 52]}.items():
        dense[:, i] = torch.tensor(point)
    points = target_boxes(dense, (64, 64))
    torch.testing.assert_close(points[:1], target_boxes(FACE, (64, 64)))
    hull = target_boxes(dense.clone().requires_grad_(), (64, 64), "hull", margin=.25)  # 6 pixels
    assert not hull.requires_grad
    torch.testing.assert_close(hull[0], torch.tensor([[10., 16, 30, 32], [34, 16, 54, 32], [16, 37, 48, 58]]))
    for boxes in (target_boxes(dense - 30, (64, 64), "hull"), target_boxes(dense + 40, (64, 64), "hull")):
        assert (boxes >= 0).all() and (boxes <= 64).all() and (boxes[..., 2:] - boxes[..., :2] >= 1).all()


# --- gradients --------------------------------------------------------------------------------------------------------
def test_gradients_reach_the_render_alone():
    found, truth = normal(0, 2, 3, 64, 64).requires_grad_(), normal(1, 2, 3, 64, 64).requires_grad_()
    landmarks = FACE.repeat(2, 1, 1).requires_grad_()
    boxes = target_boxes(landmarks, (64, 64))
    assert not boxes.requires_grad
    terms = video_losses(found, truth, boxes, perceptual, embed, HybridLoss())
    terms["id"].backward()
    assert found.grad.any() and truth.grad is None  # the target's identity is a constant
    found.grad = None
    (terms["bbox_l2"] + terms["bbox_lpips"]).backward()
    touched = found.grad.abs().sum((0, 1)) > 0
    x0, y0 = boxes[0, :, :2].amin(0).floor().int().tolist()
    x1, y1 = boxes[0, :, 2:].amax(0).ceil().int().tolist()
    assert touched[24, 20] and touched[24, 44] and touched[46, 32] and not touched[33, 32]  # not the nose
    touched[y0 - 1:y1 + 1, x0 - 1:x1 + 1] = False
    assert not touched.any()


@pytest.mark.parametrize("norm", ["squared", "unsquared"])
def test_gradients_are_finite_where_nothing_is_wrong(norm):
    a = normal(0, 2, 3, 4, 4)
    for mask in (None, torch.zeros(2, 1, 4, 4)):
        b = a.clone().requires_grad_()
        l2_loss(b, a, norm, mask).backward()
        assert (b.grad == 0).all()
    e = normal(1, 2, 8).requires_grad_()
    identity_loss(e, e.detach()).backward()
    assert e.grad.abs().max() < 1e-6


@settings(max_examples=15, deadline=None)
@given(st.floats(.01, 100), st.integers(0, 9))
def test_identity_is_a_matter_of_direction(length, seed):
    a, b = normal(seed, 3, 16), normal(seed + 1, 3, 16)
    torch.testing.assert_close(identity_loss(length * a, b), identity_loss(a, b), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(identity_loss(a, b) + identity_loss(-a, b), torch.tensor(2.))
    assert 0 <= identity_loss(a, b) <= 2


def test_what_has_no_weight_is_not_computed():
    def never(*args):
        raise AssertionError("called")

    images = normal(0, 2, 3, 64, 64), normal(1, 2, 3, 64, 64)
    boxes_only = DeformationLoss(w_id=0, w_rec=0)
    assert list(video_losses(*images, ALL, perceptual, never, boxes_only)) == ["bbox_l2", "bbox_lpips"]
    assert list(video_losses(*images, None, never, embed, DeformationLoss(w_rec=0, w_bbox=0))) == ["id"]
    assert list(synthetic_losses([view(0)], [view(1)], never, SyntheticLoss(w_lpips=0))) == ["l2", "depth"]


# --- bad input --------------------------------------------------------------------------------------------------------
X, Y = torch.zeros(2, 3, 64, 64), torch.ones(2, 3, 64, 64)


@pytest.mark.parametrize("call,said", [
    (lambda: l2_loss(X, Y[:1]), "found"),
    (lambda: l2_loss(X[:0], Y[:0]), "not empty"),
    (lambda: l2_loss(X, Y, "mse"), "norm"),
    (lambda: l2_loss(X, Y, mask=X), "mask"),
    (lambda: synthetic_losses([view(0)], [view(0), view(1)], perceptual), "2 views"),
    (lambda: synthetic_losses([], [], perceptual), "at least one"),
    (lambda: depth_loss([view(0)], [view(0, foreground=False)]), "foreground"),
    (lambda: depth_loss([view(0)], [view(0)], region="face"), "region"),
    (lambda: list(image_pairs([view(0)], [view(0)], "never")), "same_raw"),
    (lambda: target_boxes(FACE[0], (64, 64)), "(b, 5, 2) or (b, 68, 2)"),
    (lambda: target_boxes(FACE, (64, 64), "hull"), "68 for the hull"),
    (lambda: target_boxes(FACE, (64, 64), "box"), "reading"),
    (lambda: target_boxes(FACE[:, [1, 0, 2, 4, 3]], (64, 64)), "left and right"),
    (lambda: bbox_loss(X, Y[..., 1:], ALL, perceptual), "truth"),
    (lambda: video_losses(X, Y, ALL[:, :2], perceptual, embed), "boxes must be (2, 3, 4)"),
    (lambda: video_losses(X, Y, None, perceptual, embed), "boxes"),
    (lambda: video_losses(X, Y, ALL, perceptual, None), "identity"),
    (lambda: identity_loss(torch.zeros(2, 3), torch.zeros(2, 4)), "truth"),
    (lambda: DeformationLoss(parts=()), "parts"),
    (lambda: DeformationLoss(w_rec=math.inf), "w_rec"),
    (lambda: HybridLoss(w_bbox=-1), "w_bbox"),
    (lambda: AdaptationLoss(0, 0), "above 0"),
])
def test_bad_input_is_named(call, said):
    with pytest.raises(InputError) as error:
        call()
    assert said in str(error.value)
