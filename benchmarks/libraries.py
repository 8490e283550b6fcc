"""The libraries to measure: ours, a plain loop, and the other libraries.

A library is a function of a `Setting` and an `ExitStack` that returns a `Job`, or None for an unsupported
case. Its setup is not timed; hooks on its copy of the network are removed with the stack.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_grad_cam as peer_grad_cam
import torch
from captum.attr import LayerGradCam
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.nn import functional as F
from torchcam import methods as peer_torchcam

import xcam_fn as xf
from benchmarks import cases, networks
from benchmarks.cases import CURVES, STEPS, TABLE, TABLE_FORWARDS, TABLE_SCALES, Setting
from benchmarks.timing import Call
from xcam_fn.methods.catalog import own_name

BARE = "bare forward"
LOOP = "plain loop"
OURS = "ours"
COMPILED = "ours, compiled"
BFLOAT16 = "ours, bfloat16"
XPLAINCAM = "XplainCAM"


class Job(NamedTuple):
    """A function to run, and the share of the case's work that it does."""

    call: Call
    share: float = 1.0


Library = Callable[[Setting, contextlib.ExitStack], "Job | None"]


# -- the limit, and ours ------------------------------------------------------------------------------------


def bare(setting: Setting, _: contextlib.ExitStack) -> Job:
    """One forward of the batch without gradients."""

    @torch.no_grad()
    def run() -> Tensor:
        return setting.network.model(setting.x)

    return Job(run)


def ours(setting: Setting, _: contextlib.ExitStack, **options: Any) -> Job | None:
    """This library."""
    case, x = setting.case, setting.x
    model, layer = networks.fresh(setting.network).model, setting.network.layer
    if case.task == CURVES:
        heatmap = setting.heatmap
        assert heatmap is not None
        return Job(
            lambda: torch.stack([f(model, x, heatmap, **options).auc for f in (xf.insertion, xf.deletion)], 1)
        )
    if case.task == TABLE:
        return Job(lambda: _table(setting, model, options))
    if "," in case.task:
        names = case.task.split(",")
        return Job(lambda: xf.explain_all(model, layer, x, setting.cls, names, **options))
    method = functools.partial(xf.find_method(case.task), **cases.OPTIONS.get(case.task, {}))
    if options and case.task not in ("scorecam", "sscam", "iscam"):
        return None
    return Job(lambda: method(model, layer, x, setting.cls, **options))


def _table(setting: Setting, model: nn.Module, options: dict[str, Any]) -> Tensor:
    names = list(TABLE_FORWARDS)
    maps = xf.explain_all(
        model, setting.network.layer, setting.x, None, names, num_samples=TABLE_SCALES, **options
    )
    found = xf.evaluate.judged(model, setting.x, maps, **options)
    scores = [score for row in found.values() for score in row.values()]
    return torch.stack([s.auc if isinstance(s, xf.Curve) else s for s in scores], 1)


# -- the loop as it is usually written ----------------------------------------------------------------------


def loop(setting: Setting, stack: contextlib.ExitStack) -> Job | None:
    """One image per forward in float32, for the sampled maps."""
    if len(setting.x) > 1:
        return None
    task = setting.case.task
    if task in (CURVES, TABLE):
        return Job(_deletion_loop(setting), setting.sample / setting.forwards)
    share = len(setting.channels) / setting.maps
    if task == "scorecam":
        return Job(_masked_loop(setting), share)
    if task == "ablationcam":
        return Job(_ablated_loop(setting, stack), share)
    return None


def _masked_loop(setting: Setting) -> Call:
    """Score-CAM: one forward of the image masked with each map."""
    x, model = setting.x, setting.network.model
    every = xf.features(networks.fresh(setting.network).model, setting.network.layer, x)
    features = every[:, setting.channels]

    @torch.no_grad()
    def run() -> Tensor:
        first, nothing = (model(image).softmax(1)[0] for image in (x, torch.zeros_like(x)))
        cls = int(first.argmax())
        weights = []
        for k in range(features.shape[1]):
            mask = F.interpolate(features[:, k : k + 1], x.shape[2:], mode="bilinear", align_corners=False)
            span = mask.max() - mask.min()
            mask = (mask - mask.min()) / span if span > 0 else torch.zeros_like(mask)
            weights.append(model(x * mask).softmax(1)[0, cls] - nothing[cls])
        return _weighted(features, weights, x)

    return run


def _ablated_loop(setting: Setting, stack: contextlib.ExitStack) -> Call:
    """Ablation-CAM by its definition: for each channel, the whole network with that channel set to 0."""
    x = setting.x
    model, layer = networks.for_peer(setting.network)
    features = xf.features(networks.fresh(setting.network).model, setting.network.layer, x)
    ablated: int | None = None

    def ablate(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        if ablated is not None:
            changed[:, ablated] = 0
        return changed

    stack.callback(model.get_submodule(layer).register_forward_hook(ablate).remove)

    @torch.no_grad()
    def run() -> Tensor:
        nonlocal ablated
        ablated = None
        logits = model(x)[0]
        cls = int(logits.argmax())
        weights = []
        for channel in setting.channels:
            ablated = channel
            weights.append((logits[cls] - model(x)[0, cls]) / logits[cls])
        return _weighted(features[:, setting.channels], weights, x)

    return run


def _deletion_loop(setting: Setting) -> Call:
    """Some steps of a deletion curve."""
    x, model = setting.x, setting.network.model
    assert setting.heatmap is not None
    order = setting.heatmap[0].flatten().argsort(descending=True)
    pixels = -(-order.numel() // (STEPS - 1))

    @torch.no_grad()
    def run() -> Tensor:
        cls = int(model(x).argmax())
        image, scores = x.clone(), []
        for step in range(setting.sample):
            at = order[step * pixels : (step + 1) * pixels]
            image.flatten(2)[:, :, at] = 0
            scores.append(model(image).softmax(1)[0, cls])
        return torch.stack(scores)

    return run


def _weighted(features: Tensor, weights: list[Tensor], x: Tensor) -> Tensor:
    cam = (features * torch.stack(weights)[None, :, None, None]).sum(1).relu()
    return networks.normalized(cam, x.shape[2:])


# -- other libraries ----------------------------------------------------------------------------------------

_GRAD_CAM = {
    "gradcam": "GradCAM",
    "gradcam_pp": "GradCAMPlusPlus",
    "xgradcam": "XGradCAM",
    "layercam": "LayerCAM",
    "hirescam": "HiResCAM",
    "gradcam_elementwise": "GradCAMElementWise",
    "shapleycam": "ShapleyCAM",
    "finercam": "FinerCAM",
    "eigencam": "EigenCAM",
    "eigengradcam": "EigenGradCAM",
    "segeigencam": "SegEigenCAM",
    "kpcacam": "KPCA_CAM",
    "fem": "FEM",
    "fullgrad": "FullGrad",
    "smooth(gradcam)": "GradCAM",
    "eigen_smooth(gradcam)": "GradCAM",
    "scorecam": "ScoreCAM",
    "ablationcam": "AblationCAM",
}
_SMOOTHING = {"smooth(gradcam)": {"aug_smooth": True}, "eigen_smooth(gradcam)": {"eigen_smooth": True}}
_TORCHCAM = {
    "gradcam": "GradCAM",
    "gradcam_pp": "GradCAMpp",
    "smoothgradcam_pp": "SmoothGradCAMpp",
    "xgradcam": "XGradCAM",
    "layercam": "LayerCAM",
    "scorecam": "ScoreCAM",
    "sscam": "SSCAM",
    "iscam": "ISCAM",
}


_XPLAINCAM = {
    own_name(name): name
    for name in (
        "GradCAM", "GradCAMpp", "XGradCAM", "LayerCAM", "GroupCAM", "ScoreCAM", "SSCAM", "ISCAM",
        "AblationCAM", "UnionCAM", "FusionCAM",
    )
}  # fmt: skip


def _several(one: Library, setting: Setting, stack: contextlib.ExitStack) -> Job | None:
    """Several methods, one call each."""
    names = setting.case.task.split(",")
    parts = [one(setting._replace(case=setting.case._replace(task=name)), stack) for name in names]
    jobs = [part for part in parts if part is not None]
    if len(jobs) < len(names):
        return None
    return Job(
        lambda: {name: job.call() for name, job in zip(names, jobs, strict=True)},
        sum(job.share for job in jobs) / len(jobs),
    )


def grad_cam(setting: Setting, stack: contextlib.ExitStack) -> Job | None:
    """pytorch-grad-cam, with its own batch sizes."""
    task, x, cls = setting.case.task, setting.x, setting.cls
    if "," in task:
        return _several(grad_cam, setting, stack)
    if task not in _GRAD_CAM:
        return None
    model, layer = networks.for_peer(setting.network)
    options: dict[str, Any] = {}
    share = 1.0
    if task in cases.PERTURBATION:
        channels = setting.peer_channels
        options["reshape_transform"] = lambda maps: maps[:, channels]
        share = len(channels) / setting.maps
    cam = stack.enter_context(
        _quiet(
            lambda: getattr(peer_grad_cam, _GRAD_CAM[task])(model, [model.get_submodule(layer)], **options)
        )()
    )
    if cls is None:
        return Job(_quiet(lambda: cam(x, None, **_SMOOTHING.get(task, {}))), share)
    columns = [[ClassifierOutputTarget(label) for label in column] for column in zip(*cls, strict=True)]
    return Job(
        lambda: torch.stack([torch.as_tensor(cam(x, targets)) for targets in columns], 1).flatten(0, 1)
    )


def torchcam(setting: Setting, stack: contextlib.ExitStack) -> Job | None:
    """TorchCAM, with its own batch sizes."""
    task, x, cls = setting.case.task, setting.x, setting.cls
    if "," in task:
        return _several(torchcam, setting, stack)
    if task not in _TORCHCAM:
        return None
    model, layer = networks.for_peer(setting.network)
    gradient = task not in cases.PERTURBATION
    options: dict[str, Any] = {}
    share = 1.0
    if not gradient:
        channels = setting.peer_channels
        options["reshape_transform"] = lambda maps: maps[:, channels]
        share = len(channels) / setting.maps
    cam = stack.enter_context(
        getattr(peer_torchcam, _TORCHCAM[task])(model, layer, **options, **cases.OPTIONS.get(task, {}))
    )

    def run() -> Tensor:
        with contextlib.nullcontext() if gradient else torch.no_grad():
            scores = model(x)
            columns = [scores.argmax(1).tolist()] if cls is None else list(zip(*cls, strict=True))
            maps = []
            for number, column in enumerate(columns, 1):
                again = {"retain_graph": True} if number < len(columns) else {}
                raw = cam(list(column), scores if gradient else None, normalized=False, **again)[0]
                maps.append(networks.normalized(raw.detach(), x.shape[2:]))
        return torch.stack(maps, 1).flatten(0, 1)

    return Job(_quiet(run), share)


def xplaincam(checkout: Path) -> Library:
    """XplainCAM from a checkout, with its own batch sizes; it takes one image of 224 x 224 per call."""
    if not (checkout / "xplaincam" / "cam").is_dir():
        raise ValueError(
            f"--xplaincam {str(checkout)!r} holds no xplaincam/cam; expected a checkout of Xplain-CAM"
        )
    sys.path.insert(0, str(checkout.resolve()))
    cams = importlib.import_module("xplaincam.cam")

    def library(setting: Setting, stack: contextlib.ExitStack) -> Job | None:
        task, x = setting.case.task, setting.x
        if task not in _XPLAINCAM or x.shape[0] > 1 or setting.cls is not None or x.shape[2:] != (224, 224):
            return None
        if task in cases.PERTURBATION and setting.case.network != "lite0":
            return None  # it cannot run a sample of the maps, and running all takes minutes
        model, layer = networks.for_peer(setting.network)
        make = getattr(cams, _XPLAINCAM[task])
        cam = stack.enter_context(make(model, target_layer=layer, **cases.OPTIONS.get(task, {})))
        return Job(_quiet(lambda: cam(x).detach().reshape(1, 224, 224)))

    return library


def captum(setting: Setting, _: contextlib.ExitStack) -> Job | None:
    """Captum's Grad-CAM, upsampled; it explains the largest logit, so no forward is needed to find it."""
    x, cls = setting.x, setting.cls
    if setting.case.task != "gradcam":
        return None
    model, layer = networks.for_peer(setting.network)
    module = model.get_submodule(layer)
    largest, by_class = LayerGradCam(lambda x: model(x).amax(1), module), LayerGradCam(model, module)

    def run() -> Tensor:
        if cls is None:
            found = [largest.attribute(x, relu_attributions=True)]
        else:
            columns = [torch.tensor(column) for column in zip(*cls, strict=True)]
            found = [by_class.attribute(x, column, relu_attributions=True) for column in columns]
        maps = [
            networks.normalized(part.detach()[:, 0], x.shape[2:])
            for part in found
            if isinstance(part, Tensor)
        ]
        return torch.stack(maps, 1).flatten(0, 1)

    return Job(run)


def _quiet(call: Call) -> Call:
    """The call without its output to stderr, such as a progress bar."""

    def silent() -> Any:
        with contextlib.redirect_stderr(io.StringIO()):
            return call()

    return silent


# ---------------------------------------------------------------------------------------------------------

LIBRARIES: dict[str, Library] = {
    BARE: bare,
    LOOP: loop,
    OURS: ours,
    COMPILED: functools.partial(ours, compile=True),
    BFLOAT16: functools.partial(ours, precision="bfloat16", compile=True),
    "grad-cam": grad_cam,
    "torchcam": torchcam,
    "Captum": captum,
}
VARIANT_OF = {"grad-cam": "pytorch-grad-cam", "torchcam": "torchcam", XPLAINCAM: "xplaincam"}


def from_file(path: Path) -> tuple[str, Library]:
    """Load your own library: a file with a NAME and a function

    build(task, model, layer, x, cls) -> call or None

    where `model` is a copy, `layer` a module's name in it, `cls` a list of classes for each image or None for
    the predicted class, and `call()` returns heatmaps (B, H, W), or (B · classes, H, W).
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"--library {str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def library(setting: Setting, _: contextlib.ExitStack) -> Job | None:
        model, layer = networks.for_peer(setting.network)
        call = module.build(setting.case.task, model, layer, setting.x, setting.cls)
        return None if call is None else Job(call)

    return str(module.NAME), library


def expected(name: str, setting: Setting, exact: Any) -> Any:
    """The map that a library should return: ours, by the library's definition if that is cheap to compute."""
    variant = VARIANT_OF.get(name)
    task = setting.case.task
    if variant is None or "," in task or task not in xf.VARIANTS[variant]:
        return exact
    if not xf.VARIANTS[variant][task]:
        return exact
    if task not in cases.GRADIENT and setting.network.name != "lite0":
        return exact
    method = functools.partial(xf.find_method(task, variant=variant), **cases.OPTIONS.get(task, {}))
    return method(networks.fresh(setting.network).model, setting.network.layer, setting.x, setting.cls)
