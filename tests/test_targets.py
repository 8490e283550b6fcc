"""Targets: closed forms, batches, choices that stay fixed, networks with a known answer, errors."""

import copy
import dataclasses
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import xcam_fn as xf
from networks import Residual, seeded
from xcam_fn.maps import resized_minmax

T = xf.targets


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Planted(nn.Module):
    """How bright the picture is in each quadrant: a dense network with a known answer, and heads on top.

    Channel q of the layer `quadrants` is the brightness within quadrant q (row by row), zero elsewhere.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.quadrants = Quadrants()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        maps = self.quadrants(x)
        match self.kind:
            case "dense":
                return {"out": maps, "aux": maps}
            case "detector":
                size = x.shape[-1]
                return [found(image, size) for image in maps]
            case "embedding":
                return {"image_embeds": maps.mean((2, 3))}
            case _:
                return maps.mean((2, 3))


class Quadrants(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        below = torch.arange(2 * h) >= h
        right = torch.arange(2 * w) >= w
        masks = [a[:, None] & b for a in (~below, below) for b in (~right, right)]
        return x.mean(1, keepdim=True) * torch.stack(masks).to(x)


def found(maps: Tensor, size: int) -> dict[str, Tensor]:
    """A detection for each quadrant whose brightness is above 0.2: its box, its number, its brightness."""
    half = size / 2
    boxes = torch.tensor([[c, r, c + half, r + half] for r in (0, half) for c in (0, half)]).to(maps)
    scores = maps.sum((1, 2)) / half**2
    kept = torch.where(scores.detach() > 0.2)[0]
    return {"boxes": boxes[kept], "labels": kept + 1, "scores": scores[kept]}


class TwoInputs(nn.Module):
    """A picture and a number: the quadrant that the number names counts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer4 = Quadrants()

    def forward(self, image: Tensor, number: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        chosen = F.one_hot(number, 4).to(image)
        return {"score": scale * (self.layer4(image).mean((2, 3)) * chosen).sum(1), "other": image}


def share_in(heatmap: Tensor, quadrant: int) -> Tensor:
    """How much of a heatmap's mass is in a quadrant."""
    h, w = heatmap.shape[-2] // 2, heatmap.shape[-1] // 2
    r, c = divmod(quadrant, 2)
    return heatmap[..., r * h : (r + 1) * h, c * w : (c + 1) * w].sum((-2, -1)) / heatmap.sum((-2, -1))


# ---------------------------------------------------------------------------------------------------------
# Closed forms
# ---------------------------------------------------------------------------------------------------------


def test_targets_of_classes_have_their_closed_forms():
    y = made(3, 6) * 3
    p = y.softmax(-1)
    torch.testing.assert_close(T.logit([0, 2, 5])(y), torch.stack([y[0, 0], y[1, 2], y[2, 5]]))
    torch.testing.assert_close(T.probability(2)(y), p[:, 2])
    torch.testing.assert_close(T.sigmoid()(y), y.sigmoid().amax(-1))
    torch.testing.assert_close(T.log_odds(4)(y), (p[:, 4] / (1 - p[:, 4])).log(), rtol=1e-4, atol=1e-4)
    many = T.log_odds([[0, 1], [2, 3], [4, 5]])(y)
    assert many.shape == (3, 2)
    torch.testing.assert_close(many[:, 0], T.log_odds([0, 2, 4])(y))


def test_log_odds_are_finite_and_have_a_gradient_where_the_probability_has_none():
    y = torch.tensor([[200.0, 0.0, -1.0]], requires_grad=True)
    scores = T.log_odds(0)(y)
    (gradient,) = torch.autograd.grad(scores.sum(), y)
    expected = 200 - torch.logaddexp(torch.tensor(0.0), torch.tensor(-1.0))
    torch.testing.assert_close(scores, expected[None])
    torch.testing.assert_close(gradient[0, 0], torch.tensor(1.0))
    assert torch.isfinite(gradient).all()


def test_contrast_takes_away_the_mean_of_the_nearest_classes():
    y = torch.tensor([[1.5, 4.0, -2.0, 3.1, 3.6], [9.0, 0.0, 8.0, 7.0, 1.0]])
    expected = torch.tensor([4.0 - 0.6 * (1.5 + 3.1 + 3.6) / 3, 9.0 - 0.6 * (8.0 + 7.0 + 1.0) / 3])
    torch.testing.assert_close(T.contrast()(y), expected)
    torch.testing.assert_close(T.contrast(1, 4, 1.0)(y), y[:, 1] - y[:, 4])
    torch.testing.assert_close(T.contrast(1, [0, 4], 1.0)(y), y[:, 1] - (y[:, 0] + y[:, 4]) / 2)
    torch.testing.assert_close(
        T.contrast([1, 0], torch.tensor([[0], [2]]), 0.5)(y), torch.tensor([3.25, 5.0])
    )
    torch.testing.assert_close(T.contrast(weight=1, count=99)(y)[0], 4.0 - y[0, [0, 2, 3, 4]].mean())
    p = y[:, [3, 4]].softmax(-1)
    by_probability = T.contrast(0, [3, 4], 1.0, weighting="probability")(y)
    torch.testing.assert_close(by_probability, y[:, 0] - (p * y[:, [3, 4]]).sum(-1))
    many = T.contrast([[1, 3], [0, 2]], weight=1.0)(y)
    torch.testing.assert_close(many[:, 1], T.contrast([3, 2], weight=1.0)(y))


def test_segment_is_the_mean_over_the_mask():
    y = made(2, 3, 4, 5)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1:3, 2:] = True
    expected = y[:, 1, 1:3, 2:].mean((1, 2))
    for output in (y, {"out": y, "aux": -y}, {"logits": y}):
        torch.testing.assert_close(T.segment(1, mask)(output), expected)
    torch.testing.assert_close(T.segment(1, mask.numpy())(y), expected)
    own = torch.stack([y[i, c][y[i].argmax(0) == c].mean() for i, c in enumerate((2, 0))])
    torch.testing.assert_close(T.segment([2, 0])(y), own)
    per_image = torch.stack([mask, ~mask])
    torch.testing.assert_close(T.segment(0, per_image)(y)[1], y[1, 0][~mask].mean())


def test_detection_is_the_best_product_of_score_and_overlap():
    detected = {
        "boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0], [2.0, 0.0, 6.0, 4.0], [8.0, 8.0, 9.0, 9.0]]),
        "labels": torch.tensor([1, 2, 1]),
        "scores": torch.tensor([0.9, 0.5, 1.0]),
    }
    box = [2, 0, 6, 4]
    torch.testing.assert_close(T.detection(box)([detected]), torch.tensor([0.5]))
    torch.testing.assert_close(T.detection(box, 1, min_iou=0.3)([detected]), torch.tensor([0.9 * 8 / 24]))
    both = T.detection(torch.tensor([box, [8, 8, 9, 9]]), [2, 1])([detected, detected])
    torch.testing.assert_close(both, torch.tensor([0.5, 1.0]))


def test_detection_is_differentiable_in_score_and_box():
    box = torch.tensor([0.0, 0.0, 4.0, 4.0])

    def score(scores: Tensor, boxes: Tensor) -> Tensor:
        return T.detection(box, min_iou=0.4)(
            [{"boxes": boxes, "labels": torch.tensor([3]), "scores": scores}]
        )

    scores = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[1.0, 1.0, 5.0, 4.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(score, (scores, boxes))


def test_similarity_is_the_cosine():
    y = made(2, 7)
    wanted = made(2, 7, seed=1)
    cosine = (y * wanted).sum(1) / y.norm(dim=1) / wanted.norm(dim=1)
    torch.testing.assert_close(T.similarity(wanted)(y), cosine)
    torch.testing.assert_close(T.similarity(wanted[1].numpy() * 5)({"image_embeds": y})[1], cosine[1])
    torch.testing.assert_close(T.similarity(wanted)({"pooler_output": y[..., None, None]}), cosine)
    torch.testing.assert_close(T.similarity(wanted[:1])(y)[0], cosine[0])
    several = torch.stack([T.similarity(one)(y) for one in wanted], 1)
    torch.testing.assert_close(T.similarity(wanted[None])(y), several)
    torch.testing.assert_close(T.similarity(torch.stack([wanted, -wanted]))(y)[1], -several[1])


def test_regression_is_the_number_itself():
    y = made(3, 2)
    torch.testing.assert_close(T.regression(1)(y), y[:, 1])
    torch.testing.assert_close(T.regression()(y[:, 0]), y[:, 0])
    torch.testing.assert_close((-T.regression())({"logits": y}), -y[:, 0])


def test_the_probability_of_one_logit_is_its_sigmoid():
    y = made(4, 1).requires_grad_(True)
    for cls in (None, 0, [[0]] * 4):
        expected = y.sigmoid() if isinstance(cls, list) else y.sigmoid()[:, 0]
        torch.testing.assert_close(T.probability(cls)(y), expected)
    (gradient,) = torch.autograd.grad(T.probability()(y).sum(), y)
    torch.testing.assert_close(gradient, y.sigmoid() * (1 - y.sigmoid()))


def test_a_network_of_one_logit_is_explained_and_judged_by_its_sigmoid():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)
    )
    model, x, heatmap = seeded(model).eval(), made(2, 3, 10, 9), torch.rand(2, 10, 9)
    for run in (xf.scorecam, xf.iscam, xf.unioncam):
        torch.testing.assert_close(run(model, "0", x), run(model, "0", x, T.sigmoid(0)))
    scored = xf.insertion(model, x, heatmap, steps=5)
    torch.testing.assert_close(scored.scores, xf.insertion(model, x, heatmap, T.sigmoid(0), steps=5).scores)
    torch.testing.assert_close(scored.scores[:, -1], model(x).sigmoid()[:, 0].detach())


def test_in_one_channel_the_pixels_with_a_positive_logit_are_the_class():
    y = made(2, 1, 4, 5)
    expected = torch.stack([y[i][y[i] > 0].mean() for i in range(2)])
    torch.testing.assert_close(T.segment(0)(y), expected)
    torch.testing.assert_close(T.segment(0, y[:, 0] > 0)(y), expected)


# ---------------------------------------------------------------------------------------------------------
# Outputs that hold more than logits
# ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Out:
    loss: Any
    logits: Any = None
    out: Any = None


class Parts(NamedTuple):
    step: Any
    y: Any


class Tagged(torch.Tensor):
    """A tensor that says what it is, as MONAI's and torchvision's do."""


@pytest.mark.parametrize("one", [None, 3, "a word", 0.5, Out(1)])
def test_what_is_no_tensor_is_passed_over(one):
    y = made(2, 5)
    outputs = [
        {"logits": one, "out": y}, {"loss": one, "logits": y}, Out(one, y), Out(one, one, y), (y, one), [one, y],
        (one, y, torch.tensor(3.0), y.argmax(1), y.long(), y[:, :, None]), Parts(one, y), y[:, :, None, None],
        (y[:, :, None, None], one), y.as_subclass(Tagged),
    ]  # fmt: skip
    for output in outputs:
        torch.testing.assert_close(T.logits(output).as_subclass(Tensor), y)
        torch.testing.assert_close(T.logit(1)(output).as_subclass(Tensor), y[:, 1])


junk = st.sampled_from(
    [None, 7, "seven", 0.5, torch.tensor(1.0), torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4), torch.ones(2).long(), torch.ones(2, 4).long(), torch.ones(0)]
)  # fmt: skip


@given(st.lists(junk, max_size=4), st.lists(junk, max_size=4), st.booleans(), st.integers(1, 2))
def test_one_batch_of_logits_among_other_parts_is_read_and_two_are_refused(before, after, is_list, count):
    y = made(2, 5)
    output = [*before, *[y] * count, *after] if is_list else (*before, *[y] * count, *after)
    if count == 1:
        assert T.logits(output) is y
    else:
        with pytest.raises(ValueError, match=r"2 parts have this shape.*Pass cls=a callable"):
            T.logits(output)


def test_targets_are_added_subtracted_and_multiplied():
    y = made(3, 6)
    found = 2 * T.logit(1) - T.logit([0, 2, 5]) * 0.5 + (lambda y: y[:, 3]) - T.probability(4)
    own = torch.stack([y[0, 0], y[1, 2], y[2, 5]])
    torch.testing.assert_close(found(y), 2 * y[:, 1] - 0.5 * own + y[:, 3] - y.softmax(-1)[:, 4])
    torch.testing.assert_close(sum([T.logit(1), T.logit(2)])(y), y[:, 1] + y[:, 2])
    torch.testing.assert_close(((lambda y: y[:, 3]) - T.logit(1))(y), y[:, 3] - y[:, 1])
    many = T.logit([[0, 1]] * 3) - T.logit(2)
    torch.testing.assert_close(many(y), y[:, :2] - y[:, 2:3])
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = T.logit() * T.logit()
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = T.logit() + 1


# ---------------------------------------------------------------------------------------------------------
# Batches, and choices that stay as they were
# ---------------------------------------------------------------------------------------------------------

COMPOSED = {
    "contrast": T.contrast(),
    "contrast by probability": T.contrast(weight=1, weighting="probability"),
    "log_odds": T.log_odds(),
    "difference": T.logit() - T.logit(3),
    "with a callable": T.probability() + (lambda y: y[:, 1]),
    "regression": T.regression(2),
    "similarity": T.similarity(made(5, seed=4)),
}


@pytest.fixture(scope="module")
def residual() -> nn.Module:
    return seeded(Residual(), 8)


@pytest.mark.parametrize("target", COMPOSED.values(), ids=COMPOSED)
@pytest.mark.parametrize("method", ["gradcam", "scorecam", "ablationcam", "integrated_gradients"])
def test_a_batch_is_its_images(residual, method, target):
    x = made(3, 3, 8, 9)
    run = xf.find_method(method, postprocess=None)
    singles = torch.cat([run(residual, "conv2", x[i : i + 1], target) for i in range(3)])
    torch.testing.assert_close(run(residual, "conv2", x, target), singles, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["gradcam", "scorecam", "ablationcam", "integrated_gradients"])
def test_a_function_for_each_image_scores_its_own_image(residual, method):
    x, run = made(3, 3, 8, 9), xf.find_method(method, postprocess=None)
    expected = run(residual, "conv2", x, [1, 0, 3])
    found = run(residual, "conv2", x, T.per_image([itemgetter(i) for i in (1, 0, 3)]))
    if method == "scorecam":  # which explains the probability of a class, and of a function what it returns
        expected = run(residual, "conv2", x, T.logit([1, 0, 3]))
    torch.testing.assert_close(found, expected)
    rows = [{"score": row} for row in residual(x)[:, 2:3]]
    torch.testing.assert_close(T.per_image([itemgetter("score")] * 3)(rows), residual(x)[:, 2])


def test_what_a_contrast_compares_stays_that_of_the_image_as_it_is(residual):
    x = made(2, 3, 8, 9)
    found = xf.scorecam(residual, "conv2", x, T.contrast(), postprocess=None, baseline=0.0)
    with torch.no_grad():
        y = residual(x)
        A = xf.features(residual, "conv2", x)
        for i in range(2):
            cls = int(y[i].argmax())
            others = (y[i] - y[i, cls]).abs().argsort()[1:4]
            score = lambda z, c=cls, o=others: residual(z[None])[0, c] - 0.6 * residual(z[None])[0, o].mean()  # noqa: E731
            zero = score(torch.zeros_like(x[i]))
            expected = torch.zeros(A.shape[2:])
            for k in range(A.shape[1]):
                mask = resized_minmax(A[i, k], x.shape[2:])
                expected += (score(x[i] * mask) - zero) * A[i, k]
            torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=1e-3)


def test_a_difference_keeps_the_predicted_class_of_each_image(residual):
    x = made(3, 3, 8, 9)
    predicted = residual(x).argmax(1).tolist()
    assert len(set(predicted)) > 1
    floating, explicit = T.logit() - T.logit(3), T.logit(predicted) - T.logit(3)
    for run in (xf.scorecam, xf.ablationcam, xf.groupcam):
        kwargs = {"num_groups": 2} if run is xf.groupcam else {}
        torch.testing.assert_close(
            run(residual, "conv2", x, floating, **kwargs), run(residual, "conv2", x, explicit, **kwargs)
        )
    heat = xf.gradcam(residual, "conv2", x)
    torch.testing.assert_close(
        xf.deletion(residual, x, heat, floating, steps=4).scores,
        xf.deletion(residual, x, heat, explicit, steps=4).scores,
    )
    together = xf.explain_all(residual, "conv2", x, floating, ["gradcam", "scorecam"])
    torch.testing.assert_close(together["scorecam"], xf.scorecam(residual, "conv2", x, explicit))
    torch.testing.assert_close(together["gradcam"], xf.gradcam(residual, "conv2", x, explicit))


def test_targets_go_through_transforms(residual):
    x = made(2, 3, 8, 9)
    for target in (T.contrast(), T.log_odds(), T.logit() - T.logit(3)):
        run = lambda x, t=target: xf.gradcam(residual, "conv2", x, t, postprocess=None)  # noqa: E731
        mapped = torch.vmap(lambda one: run(one[None])[0])(x)  # noqa: B023
        torch.testing.assert_close(mapped, run(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_contrast_is_finer_cam_of_the_peers(lite0, photographs, weight):
    import pytorch_grad_cam as peer
    import torchcam.methods as torchcam

    layer = "_blocks.15"
    model = copy.deepcopy(lite0)
    with peer.FinerCAM(model, [model.get_submodule(layer)]) as cam:
        theirs = torch.as_tensor(cam(photographs, alpha=weight))
    target = T.contrast(weight=weight, weighting="probability")
    torch.testing.assert_close(xf.gradcam(lite0, layer, photographs, target), theirs, atol=1e-4, rtol=0)

    model = copy.deepcopy(lite0).requires_grad_(True)
    with torchcam.FinerCAM(model, layer, gamma=weight) as cam:
        scores = model(photographs)
        (theirs,) = cam(scores.argmax(1).tolist(), scores)
    ours = xf.gradcam(
        lite0,
        layer,
        photographs,
        T.contrast(weight=weight),
        postprocess=lambda c, _: xf.heatmap(c, c.shape[1:]),
    )
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------
# Torchvision's networks
# ---------------------------------------------------------------------------------------------------------


def test_segmentation_of_torchvision():
    from torchvision.models import segmentation

    torch.manual_seed(0)
    model = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).eval()
    x = made(2, 3, 48, 64)
    mask = torch.zeros(48, 64)
    mask[8:24, 8:40] = 1
    target = T.segment(1, mask)
    found = xf.gradcam(model, "backbone.16", x, target, postprocess=None)

    A, y = [], []
    handle = model.backbone["16"].register_forward_hook(lambda *args: A.append(args[-1]))
    y = model(x)["out"]
    handle.remove()
    (G,) = torch.autograd.grad(y[:, 1, 8:24, 8:40].mean((1, 2)).sum(), A)
    torch.testing.assert_close(found, torch.einsum("bk,bkhw->bhw", G.mean((2, 3)), A[0]).detach())
    own = int(y[0].argmax(0).mode().values.mode().values)
    heat = xf.scorecam(model, "backbone.16", x[:1], T.segment(own), chunk_size=64)
    assert heat.shape == (1, 48, 64)


def detector(name: str) -> tuple[nn.Module, str]:
    from torchvision.models import detection

    torch.manual_seed(0)
    small: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 4}
    match name:
        case "fasterrcnn":
            model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
                **small, box_score_thresh=0.0, min_size=64, max_size=64
            )
            return model.eval(), "backbone.body.16"
        case "ssdlite":
            return detection.ssdlite320_mobilenet_v3_large(
                **small, score_thresh=0.0
            ).eval(), "backbone.features.0"
        case _:
            model = detection.fcos_resnet50_fpn(**small, score_thresh=0.0, min_size=64, max_size=64)
            return model.eval(), "backbone.body.layer4"


@pytest.mark.parametrize("name", ["fasterrcnn", "ssdlite", "fcos"])
def test_detectors_of_torchvision(name):
    model, layer = detector(name)
    x = made(2, 3, 64, 64)
    with torch.no_grad():
        label = int(model(x[:1])[0]["labels"][0])
    target = T.detection([8, 8, 48, 40], label, min_score=0.0, min_iou=0.0)
    found = xf.gradcam(model, layer, x, target, postprocess=None)
    assert not found.requires_grad
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(found[:1], xf.gradcam(model, layer, x[:1], target, postprocess=None))

    A: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *args: A.append(args[-1]))
    score = target(model(x[:1]))
    handle.remove()
    (G,) = torch.autograd.grad(score.sum(), A)
    expected = torch.einsum("bk,bkhw->bhw", G.mean((2, 3)), A[0]).detach()
    torch.testing.assert_close(found[:1], expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-3)


def test_perturbation_and_metrics_of_a_detector():
    model, layer = detector("fasterrcnn")
    x = made(1, 3, 64, 64)
    target = T.detection([0, 0, 64, 56], min_iou=0.0)
    heat = xf.rise(model, layer, x, target, num_masks=4)
    assert heat.shape == (1, 64, 64)
    assert torch.isfinite(heat).all()
    curve = xf.deletion(model, x, heat, target, steps=2)
    torch.testing.assert_close(curve.scores[0, 0], target(model(x))[0].detach(), atol=1e-4, rtol=1e-3)
    attribution = xf.integrated_gradients(model, None, x, target, steps=2)
    assert torch.isfinite(attribution).all()


# ---------------------------------------------------------------------------------------------------------
# Known answers
# ---------------------------------------------------------------------------------------------------------

METHODS = ["gradcam", "hirescam", "scorecam", "ablationcam", "integrated_gradients"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quadrant", [0, 3])
def test_the_map_finds_what_the_score_depends_on(method, quadrant):
    x = 0.5 + 0.5 * made(2, 3, 12, 12).sigmoid()
    half = 6 * (quadrant % 2), 6 * (quadrant // 2)
    box = torch.tensor([*half, half[0] + 6, half[1] + 6])
    direction = F.one_hot(torch.tensor(quadrant), 4).float()
    net = xf.bind(TwoInputs(), lambda net, x: net(x, torch.full((len(x),), quadrant), scale=2.0)["score"])
    cases = {
        "dense": (Planted("dense"), "quadrants", T.segment(quadrant)),
        "detector": (Planted("detector"), "quadrants", T.detection(box, quadrant + 1)),
        "embedding": (Planted("embedding"), "quadrants", T.similarity(direction)),
        "two inputs": (net, "layer4", T.regression()),
    }
    run = xf.METHODS[method]
    for name, (model, layer, target) in cases.items():
        share = share_in(run(model.eval(), layer, x, target), quadrant)
        least = 0.4 if name == "embedding" and method == "integrated_gradients" else 0.95
        assert (share >= least).all(), (name, share)


def test_a_perturbed_image_without_detections_scores_zero():
    model = Planted("detector").eval()
    x = torch.ones(1, 3, 12, 12)
    target = T.detection([0, 0, 6, 6])
    curve = xf.deletion(model, x, torch.ones(1, 12, 12), target, steps=2)
    torch.testing.assert_close(curve.scores[0, [0, -1]], torch.tensor([1.0, 0.0]))


# ---------------------------------------------------------------------------------------------------------
# bind
# ---------------------------------------------------------------------------------------------------------


class TakesADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Residual()

    def forward(self, batch: dict[str, Tensor], *, shift: float) -> dict[str, dict[str, Tensor]]:
        return {"nested": {"y": self.body(batch["image"]) + batch["bias"] + shift}}


def test_a_bound_model_is_explained_like_its_model(residual):
    inner = TakesADict().eval()
    inner.body = residual
    bias = made(5, seed=3)
    bound = xf.bind(inner, lambda net, x: net({"image": x, "bias": bias}, shift=1.0)["nested"]["y"])
    assert [child for _, child in bound.named_children()] == [inner]
    x = made(2, 3, 8, 9)
    torch.testing.assert_close(bound(x), residual(x) + bias + 1.0)
    assert xf.default_layer(bound, x) == f"model.body.{xf.default_layer(residual, x)}"
    for method in ("gradcam", "layercam", "scorecam", "ablationcam", "integrated_gradients"):
        run = xf.METHODS[method]
        expected = run(residual, "conv2", x, T.logit(1) - T.logit(2))
        for layer in ("body.conv2", "model.body.conv2", residual.conv2):
            found = run(bound, layer, x, T.logit(1) - T.logit(2))
            loose = (
                method == "integrated_gradients"
            )  # whose shares of a jump feel the rounding of shifted logits
            torch.testing.assert_close(found, expected, atol=1e-2 if loose else 1e-4, rtol=1e-3)


def test_a_bound_model_reads_what_fn_reads_now(residual):
    """Nothing of an earlier call is kept: what fn finds around it may have changed since."""
    x = made(1, 3, 8, 9)
    scale = torch.ones(5)
    bound = xf.bind(residual, lambda net, x: net(x) * scale)
    before = xf.gradcam(bound, "conv2", x, 1, postprocess=None)
    scale = torch.full((5,), -3.0)
    torch.testing.assert_close(xf.gradcam(bound, "conv2", x, 1, postprocess=None), -3 * before)


class Scaled:
    """A function of the model and x that remembers something, which can be changed."""

    def __init__(self) -> None:
        self.scale = 1.0

    def __call__(self, net: nn.Module, x: Tensor) -> Tensor:
        return net(x) * self.scale


def test_a_bound_model_that_is_copied_for_scoring_reads_it_too(residual):
    x, fn = made(1, 3, 8, 9), Scaled()
    bound = xf.bind(residual, fn)
    run = lambda: xf.scorecam(bound, "conv2", x, T.logit(1), postprocess=None)  # noqa: E731
    before = run()
    fn.scale = -3.0
    torch.testing.assert_close(run(), -3 * before, atol=1e-5, rtol=1e-4)


def test_a_bound_model_goes_through_transforms(residual):
    x = made(2, 3, 8, 9)
    bound = xf.bind(residual, lambda net, x: {"y": net(x)}["y"])
    run = lambda model, x: xf.gradcam(model, "conv2", x, 1, postprocess=None)  # noqa: E731
    mapped = torch.vmap(lambda one: run(bound, one[None])[0])(x)
    torch.testing.assert_close(mapped, run(residual, x), atol=1e-5, rtol=1e-4)
    moved = torch.func.grad(lambda x: run(bound, x).square().sum())(x)
    torch.testing.assert_close(
        moved, torch.func.grad(lambda x: run(residual, x).square().sum())(x), atol=1e-5, rtol=1e-3
    )


def test_a_network_of_several_inputs_is_sent_to_bind(unchecked):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Residual()

        def forward(self, x: Tensor, age: Tensor) -> Tensor:
            return self.inner(x) + age.expand(len(x), 1)

    with pytest.raises(
        ValueError, match=r"missing 1 required .*'age'; .*bind them with xcam_fn\.bind\(model, fn\)"
    ):
        xf.gradcam(seeded(Two()), None, made(1, 3, 8, 9))
    bound = xf.bind(seeded(Two()), lambda net, x: net(x, torch.ones(1, 1)))
    assert xf.gradcam(bound, "inner.conv2", made(1, 3, 8, 9)).shape == (1, 8, 9)


def test_errors_of_bind(residual, unchecked):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        xf.bind(3, lambda net, x: net(x))
    with pytest.raises(TypeError, match="fn must be a function of the model and x"):
        xf.bind(residual, "logits")
    closed = xf.bind(residual, lambda _, x: seeded(Residual())(x))
    with pytest.raises(
        ValueError, match=r"'model\.conv2' .* never runs it.*must call the model passed to it"
    ):
        xf.gradcam(closed, "conv2", made(1, 3, 8, 9))
    per_image = xf.bind(residual, lambda net, x: net(x) + made(3, 5))
    assert xf.gradcam(per_image, "conv2", made(3, 3, 8, 9)).shape == (3, 8, 9)  # no other number is run
    with pytest.raises(ValueError, match=r"fn returned shape \(3, 5\) for 1 image.*one row each; expand"):
        xf.rise(per_image, None, made(3, 3, 8, 9), num_masks=4, chunk_size=1)
    bound = xf.bind(residual, lambda net, x: net(x))
    with pytest.raises(ValueError, match=r"layer 'conv9' is not in Bound; did you mean 'model\.conv"):
        xf.gradcam(bound, "conv9", made(1, 3, 8, 9))


# ---------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------

DETECTED = {"boxes": torch.rand(2, 4).cumsum(-1), "labels": torch.tensor([1, 7]), "scores": torch.rand(2)}
NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
DENSE = torch.zeros(2, 3, 4, 5)
LOGITS = torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("target", "output", "message"),
    [
        (T.logit(1), [DETECTED, DETECTED], r"a list of 2 dicts with keys 'boxes', 'labels', 'scores'.*detection\("),
        (T.logit(1), [DETECTED], r"a list of 1 dict with keys"),
        (T.logit(1), {"out": DENSE}, r"a dict with keys 'out' \(a tensor of shape \(2, 3, 4, 5\)\).*segment\("),
        (T.logit(1), LOGITS[:, 0], r"a tensor of shape \(2,\).*regression\("),
        (T.logit(1), {"image_embeds": LOGITS}, r"similarity\("),
        (T.contrast(), [DETECTED], r"a list of 1 dict"),
        (T.segment(1), LOGITS, r"segment: .*shape \(2, 6\); expected logits of shape \(B, classes, H, W\)"),
        (T.segment(1), [DETECTED], r"segment: .*a list of 1 dict.*detection\("),
        (T.segment(1, torch.ones(8, 8)), DENSE, r"mask has shape \(8, 8\), .* has \(4, 5\) pixels .*resize"),
        (T.segment(1, torch.zeros(4, 5)), DENSE, r"mask selects no pixel of image 0"),
        (T.segment(2), DENSE, r"class 2 is predicted at no pixel of image 0; .* classes \[0\]"),
        (T.segment(0), -torch.ones(1, 1, 4, 5), r"the logit of the only class is positive at no pixel of image 0; pass mask="),
        (T.logit(0), (LOGITS, LOGITS), r"a tuple of 2: .*\(2 parts have this shape\)\. Pass cls=a callable"),
        (T.logit(0), (None, DENSE), r"a tuple of 2: None, a tensor of shape \(2, 3, 4, 5\)"),
        (T.segment(3), DENSE, r"cls=3 is out of range: the model has 3 classes"),
        (T.segment(torch.tensor([[1, 2]] * 2)), DENSE, r"segment: cls has shape \(2, 2\); expected one class"),
        (T.detection([0, 0, 1, 1]), LOGITS, r"detection: .*shape \(2, 6\); expected a list of one dict"),
        (T.detection([0, 0, 4, 4], min_iou=0.0), [DETECTED, NOTHING], r"image 1 has no detections; .*box_score_thresh"),
        (T.detection([0, 0, 1, 1], 3), [DETECTED], r"image 0 has no detection with label 3; its labels are \[1, 7\]"),
        (T.detection([[0, 0, 1, 1]] * 3), [DETECTED], r"box has shape \(3, 4\) for a batch of 1; .*\(1, 4\)"),
        (T.detection([0, 0, 1, 1], [1, 7]), [DETECTED], r"label has shape \(2,\) for a batch of 1"),
        (T.similarity(torch.ones(4)), LOGITS, r"embedding has shape \(4,\), .*shape \(2, 6\); expected an embedding of .* 6 numbers"),
        (T.similarity(torch.ones(3, 6)), LOGITS, r"embedding has shape \(3, 6\) for a batch of 2.*or embedding\[None\]"),
        (T.similarity(torch.ones(4)), DENSE, r"similarity: .*expected embeddings of shape \(B, D\).*segment"),
        (T.regression(6), LOGITS, r"index=6 is out of range: .*shape \(2, 6\); expected 0 to 5"),
        (T.regression(), DENSE, r"regression: .*expected shape \(B,\) or \(B, n\).*segment"),
        (T.contrast(1, [0, 1]), LOGITS, r"others=\[0, 1\] holds the explained class, \[1\] for image 0"),
        (T.contrast(1, 9), LOGITS, r"others=9 is out of range: the model has 6 classes"),
        (T.logit([1, 2**80]), LOGITS, r"cls=1208925819614629174706176 is out of range"),
        (T.contrast(), LOGITS[:, :1], r"contrast: the model has 1 class"),
        (T.log_odds(), LOGITS[:, :1], r"log_odds: the model has 1 class; .*regression\(\)"),
        (T.logit([[0, 1]] * 2) + T.logit([[0, 1, 2]] * 2), LOGITS, r"summed targets return shapes \(2, 2\), \(2, 3\)"),
        (T.per_image([len, len]), LOGITS[:1], r"per_image: functions holds 2 function\(s\) for a batch of 1"),
        (T.per_image([torch.exp] * 2), LOGITS, r"per_image: .*shape \(6,\); expected a scalar tensor"),
        (T.logit() + (lambda y: y), LOGITS, r"the target returned shape \(2, 6\); expected \(2,\)"),
    ],
)  # fmt: skip
def test_a_target_that_does_not_fit_says_what_the_output_is(target, output, message):
    with pytest.raises(ValueError, match=message):
        target(output)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: T.segment(None), TypeError, "segment: cls is None"),
        (lambda: T.similarity(torch.ones(5) * 1j), TypeError, "embedding is a tensor of torch.complex64"),
        (lambda: T.segment(1, [[1, -1]]), ValueError, "segment: mask holds negative values"),
        (lambda: T.segment(1, "mask"), TypeError, "mask must be a tensor or an array"),
        (lambda: T.detection([0, 0, 1]), ValueError, r"box has shape \(3,\); expected \(4,\) or \(B, 4\)"),
        (lambda: T.detection([4, 0, 1, 1]), ValueError, "expected x1, y1, x2, y2 with x1 < x2"),
        (lambda: T.detection([0, 0, np.nan, 1]), ValueError, "box holds NaN"),
        (lambda: T.detection([0, 0, 1, 1], "cat"), TypeError, "label='cat'; expected None, an integer"),
        (lambda: T.similarity(torch.zeros(5)), ValueError, "embedding is zero everywhere"),
        (lambda: T.similarity(torch.ones(2, 2, 2, 2)), ValueError, r"embedding has shape \(2, 2, 2, 2\)"),
        (lambda: T.contrast(weight=np.inf), ValueError, "weight=inf is out of range"),
        (lambda: T.contrast(count=0), ValueError, "count=0 is out of range"),
        (lambda: T.contrast(weighting="max"), ValueError, "weighting='max'; expected one of 'mean'"),
        (lambda: T.regression(-1), ValueError, "index=-1 is out of range"),
        (lambda: T.per_image([3]), TypeError, "functions holds 3; expected one function for each image"),
        (
            lambda: T.per_image([len] * 2)(LOGITS[0, 0]),
            TypeError,
            "expected a tensor with one row for each image",
        ),
        (lambda: T.per_image([len] * 2)(LOGITS), TypeError, "a function returned an int; expected a scalar"),
        (lambda: np.nan * T.logit(), ValueError, "factor=nan is out of range"),
    ],
)
def test_a_target_that_cannot_be_made_says_why(make, kind, message, unchecked):
    with pytest.raises(kind, match=message):
        make()


def test_classes_may_be_arrays_of_no_axes(unchecked):
    assert T.logit([torch.tensor(1), np.array(5)])(LOGITS).shape == (2,)
    with pytest.raises(ValueError, match="cls=6 is out of range"):
        T.logit([torch.tensor(1), np.array(6)])(LOGITS)


def test_errors_reach_the_caller_of_a_method(residual):
    with pytest.raises(ValueError, match=r"similarity: embedding has shape \(4,\)"):
        xf.gradcam(residual, "conv2", made(1, 3, 8, 9), T.similarity(torch.ones(4)))
    with pytest.raises(ValueError, match=r"image 0 has no detections"):
        xf.gradcam(
            Planted("detector").eval(), "quadrants", torch.zeros(1, 3, 8, 8), T.detection([0, 0, 4, 4])
        )
