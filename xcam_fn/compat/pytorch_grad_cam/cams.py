"""pytorch-grad-cam's classes: an object remembers its arguments, and each call runs a method of `xcam_fn`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from xcam_fn import methods
from xcam_fn.compat.common import Remembers, evaluated, signature
from xcam_fn.compat.pytorch_grad_cam.utils import image
from xcam_fn.compat.pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget, FinerWeightedTarget
from xcam_fn.methods.call import Call
from xcam_fn.network.copies import unwrap
from xcam_fn.network.target_layer import find
from xcam_fn.targets import Classes, logits, per_image
from xcam_fn.targets.target import Reading

__all__ = [
    "FEM", "KPCA_CAM", "SESS", "AblationCAM", "AblationLayer", "AblationLayerFasterRCNN", "AblationLayerVit",
    "ActivationsAndGradients", "BaseCAM", "DeepFeatureFactorization", "EigenCAM", "EigenGradCAM", "FinerCAM",
    "FullGrad", "GradCAM", "GradCAMElementWise", "GradCAMPlusPlus", "GuidedBackpropReLUModel", "HiResCAM",
    "LayerCAM", "RandomCAM", "RefineCAM", "ScoreCAM", "SegEigenCAM", "ShapleyCAM", "XGradCAM",
    "run_dff_on_image",
]  # fmt: skip

Targets = Sequence[Callable[[Any], Tensor]] | None

_OPTIONS = {"k": "k", "kernel": "kernel", "gamma": "gamma", "batch_size": "chunk_size"}  # their name: ours
_NO_SUM = ("eigencam", "eigengradcam", "fem", "kpcacam", "segeigencam")  # eigen_smooth does not change these


def class_of(targets: Targets, batch: int) -> Classes:
    """Convert their targets, a callable for each image, to `cls`."""
    if targets is None:
        return None
    if not isinstance(targets, Sequence) or len(targets) != batch:
        count = f" of {len(targets)}" if isinstance(targets, Sequence) else ""
        found = f"a {type(targets).__name__}{count}"
        raise ValueError(f"targets is {found}; expected None or a list of {batch}, one for each image")
    classes = [vars(one)["category"] for one in targets if type(one) is ClassifierOutputTarget]
    if len(classes) == batch and all(isinstance(c, (int, np.integer)) and c >= 0 for c in classes):
        return [int(c) for c in classes]
    return per_image(targets)


def _scaled(cam: Tensor, size: Sequence[int]) -> Tensor:
    """Finish a layer's map as they do: keep its positive part, scale, then resize."""
    found = image.scale_cam_image(cam.detach().relu().float().cpu().numpy(), tuple(size)[::-1])
    return torch.from_numpy(found).to(cam)


def _finished(cam: Tensor, size: Sequence[int]) -> Tensor:
    return _scaled(_scaled(cam, size), size)


def _signature(rest: str | None = None, **own: Any) -> inspect.Signature:
    """Return a class's signature: the model, the layers, and its own arguments with their defaults."""
    return signature("model", "target_layers", rest=rest, reshape_transform=None, **own)


class _Called(Remembers):
    """An object that remembers its model and the images of its last call."""

    model: nn.Module
    reshape_transform: Any = None

    def _names(self, layers: Sequence[nn.Module]) -> list[str]:
        """Return the layers' names; for a layer that runs several times, the first run, as they do."""
        named = [find(unwrap(self.model), layer) for layer in layers]
        return [f"{name}#{number or 1}" for name, number in named]

    def _on_device(self, input_tensor: Tensor) -> Tensor:
        self._last = input_tensor.detach().to(next(self.model.parameters(), input_tensor).device)
        return self._last

    @property
    def outputs(self) -> Any:
        """The network's output for the images of the last call."""
        with torch.no_grad():
            return evaluated(self.model)(self._last)


class BaseCAM(_Called):
    """A method as a class; called with images and targets, it returns maps (B, *size), float32 in [0, 1].

    Args:
        model: the network, which is never modified.
        target_layers: a list of its modules; the maps of several are averaged.
        reshape_transform: arranges the layer's output as (B, K, *spatial); None does so automatically.
    """

    __signature__: ClassVar[Any] = _signature()
    _name: ClassVar[str] = ""
    target_layers: Sequence[nn.Module]

    def __init_subclass__(cls) -> None:
        if {"get_cam_weights", "get_cam_image"} & vars(cls).keys():
            remedy = "xcam_fn.from_gradients(weighting) makes a method from your own weights"
            raise TypeError(
                f"{cls.__name__}: get_cam_weights and get_cam_image are not called here; {remedy}"
            )

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if not isinstance(self.target_layers, (list, tuple)):
            found = type(self.target_layers).__name__
            raise TypeError(f"target_layers must be a list of modules, such as [model.layer4], got {found}")
        if vars(self).get("ratio_channels_to_ablate", 1.0) != 1.0:
            raise ValueError("ratio_channels_to_ablate is not 1; this library ablates every channel: omit it")

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Targets = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> np.ndarray:
        if not aug_smooth:
            return self.forward(input_tensor, targets, eigen_smooth)
        maps: list[Any] = []
        turned: Any
        for turned in (lambda x: x, lambda x: np.flip(x, -1) if isinstance(x, np.ndarray) else x.flip(-1)):
            seen = [turned(input_tensor) * factor for factor in (0.9, 1.0, 1.1)]
            maps += [turned(self.forward(x, targets, eigen_smooth)) for x in seen]
        return np.mean(maps, axis=0)

    def forward(
        self, input_tensor: Tensor, targets: Targets = None, eigen_smooth: bool = False
    ) -> np.ndarray:
        """Return the maps of the images, without aug_smooth."""
        return self._map(self.method(eigen_smooth), input_tensor, class_of(targets, len(input_tensor)))

    def _map(self, method: methods.Method[...], input_tensor: Tensor, cls: Classes) -> np.ndarray:
        layer = next(iter(self.layers), None)
        x = self._on_device(input_tensor)
        found = method(evaluated(self.model), layer, x, cls, to_spatial=self.reshape_transform)
        return found.detach().float().cpu().numpy()

    def method(self, eigen_smooth: bool = False) -> methods.Method[...]:
        """Return the method of `xcam_fn` that a call of the object runs."""
        found = methods.find_method(self._name, variant="pytorch-grad-cam")
        own = {ours: vars(self)[theirs] for theirs, ours in _OPTIONS.items() if theirs in vars(self)}
        found = found.with_options(**{name: own[name] for name in own.keys() & found.own_options})
        found = methods.eigen_smooth(found) if eigen_smooth and self._name not in _NO_SUM else found
        found = methods.multi_layer(found, self.layers, each=_scaled) if len(self.layers) > 1 else found
        return found.with_options(postprocess=_finished)

    @property
    def layers(self) -> list[str]:
        """The names of the target layers."""
        if not self.target_layers and self._name != "fullgrad":
            raise ValueError("target_layers is empty; expected a list of modules, such as [model.layer4]")
        return [] if self._name == "fullgrad" else self._names(self.target_layers)


def _cam(title: str, name: str, **own: Any) -> type[BaseCAM]:
    about = {"_name": name, "__signature__": _signature(**own), "__module__": __name__}
    return type(title, (BaseCAM,), about | {"__doc__": f"{methods.METHODS[name].title}, see `BaseCAM`."})


GradCAM = _cam("GradCAM", "gradcam")
HiResCAM = _cam("HiResCAM", "hirescam")
GradCAMElementWise = _cam("GradCAMElementWise", "gradcam_elementwise")
GradCAMPlusPlus = _cam("GradCAMPlusPlus", "gradcam_pp")
XGradCAM = _cam("XGradCAM", "xgradcam")
LayerCAM = _cam("LayerCAM", "layercam")
ShapleyCAM = _cam("ShapleyCAM", "shapleycam")
EigenGradCAM = _cam("EigenGradCAM", "eigengradcam")
SegEigenCAM = _cam("SegEigenCAM", "segeigencam")
EigenCAM = _cam("EigenCAM", "eigencam")
KPCA_CAM = _cam("KPCA_CAM", "kpcacam", kernel="sigmoid", gamma=None)
FEM = _cam("FEM", "fem", k=2.0)
RandomCAM = _cam("RandomCAM", "randomcam")
FullGrad = _cam("FullGrad", "fullgrad")
ScoreCAM = _cam("ScoreCAM", "scorecam")
AblationCAM = _cam(
    "AblationCAM", "ablationcam", ablation_layer=None, batch_size=32, ratio_channels_to_ablate=1.0
)


class _OfMethod(BaseCAM):
    """A class that wraps another, `base_method`; it has no aug_smooth."""

    base_method: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if not (isinstance(self.base_method, type) and issubclass(self.base_method, BaseCAM)):
            raise TypeError(
                f"base_method={self.base_method!r}; expected a class of {__name__}, such as GradCAM"
            )
        more = vars(self).get("kwargs", {})
        self.base_cam = self.base_method(self.model, self.target_layers, self.reshape_transform, **more)

    def __call__(self, *args: Any, **options: Any) -> np.ndarray:
        return self.forward(*args, **options)

    def method(self, eigen_smooth: bool = False) -> methods.Method[...]:
        return self.base_cam.method(eigen_smooth)


class FinerCAM(_OfMethod):
    """A gradient method's map of what separates a class from the most similar ones; see `BaseCAM`."""

    __signature__ = _signature(base_method=GradCAM)

    def forward(
        self,
        input_tensor: Tensor,
        targets: Targets = None,
        eigen_smooth: bool = False,
        alpha: float = 1,
        comparison_categories: Sequence[int] | None = None,
        target_idx: int | None = None,
    ) -> np.ndarray:
        """Return the maps; `comparison_categories` are ranks, 1 for the class most similar to the target."""
        ranks = (1, 2, 3) if comparison_categories is None else comparison_categories

        def choose(y: Tensor) -> tuple[Tensor]:
            own = y.detach().amax(1) if target_idx is None else y.detach()[:, target_idx]
            return ((y.detach() - own[:, None]).abs().argsort(1),)

        def scores(y: Tensor, order: Tensor) -> Tensor:
            others = order[:, [rank for rank in ranks if rank < y.shape[1]]]
            rows = zip(y, order[:, 0], others, strict=True)
            return torch.stack([FinerWeightedTarget(c, more, alpha)(row) for row, c, more in rows])

        cls = Reading(logits, choose, scores) if targets is None else class_of(targets, len(input_tensor))
        return self._map(self.method(eigen_smooth), input_tensor, cls)


class RefineCAM(_OfMethod):
    """The product of a method's maps at several layers; see `BaseCAM`."""

    __signature__ = _signature("kwargs", base_method=GradCAMPlusPlus)

    def method(self, eigen_smooth: bool = False) -> methods.Method[...]:
        self.base_cam.target_layers = self.target_layers[:1]
        one = self.base_cam.method(eigen_smooth)
        return methods.refinecam.with_options(
            method=one, layers=self.layers, each=_finished, postprocess=_finished
        )


class SESS(_OfMethod):
    """A method's maps of windows of the rescaled image, weighted by their scores; see `BaseCAM`."""

    __signature__ = _signature(
        "kwargs", base_method=GradCAM, scales=None, num_scales=12, scale_step_ratio=2 / 7, window_size=None,
        step_size=None, pre_filter_ratio=0.0, theta=0.0, pool="mean", smooth=True, use_softmax_scores=True,
        batch_size=32,
    )  # fmt: skip

    def forward(
        self, input_tensor: Tensor, targets: Targets = None, eigen_smooth: bool = False
    ) -> np.ndarray:
        cls, own = class_of(targets, len(input_tensor)), vars(self)
        if own["scales"] is not None:
            raise ValueError("scales is not supported; pass num_scales and scale_step_ratio instead")
        if callable(cls) and own["use_softmax_scores"]:
            remedy = "for targets other than ClassifierOutputTarget, pass use_softmax_scores=False"
            raise ValueError(f"use_softmax_scores=True weights windows by a class's probability; {remedy}")
        method = methods.sess(
            self.method(eigen_smooth), num_scales=own["num_scales"], growth=own["scale_step_ratio"],
            window=own["window_size"], step=own["step_size"], drop=own["pre_filter_ratio"],
            theta=own["theta"], pool=own["pool"], blur=own["smooth"],
            score="probability" if own["use_softmax_scores"] else "logit",
        )  # fmt: skip
        return self._map(method.with_options(postprocess=_finished), input_tensor, cls)


class GuidedBackpropReLUModel(_Called):
    """Guided backpropagation; called with images and a class, it returns the first image's map (h, w, C)."""

    __signature__ = signature("model", device=None)

    def __call__(self, input_img: Tensor, target_category: int | None = None) -> np.ndarray:
        call = Call(evaluated(self.model), None, self._on_device(input_img)[:1], target_category)
        with call.running():
            return methods.METHODS["guided_backprop"].raw(call)[0, 0].movedim(0, -1).cpu().numpy()


class DeepFeatureFactorization(_Called):
    """Concepts of the features; called with images, it returns these (K, n) and maps (n, h, w) per image."""

    __signature__ = signature("model", "target_layer", reshape_transform=None, computation_on_concepts=None)
    target_layer: nn.Module
    computation_on_concepts: Callable[[Tensor], Tensor] | None

    def __call__(self, input_tensor: Tensor, n_components: int = 16) -> tuple[Any, ...]:
        (layer,), x = self._names([self.target_layer]), self._on_device(input_tensor)
        found = methods.concepts(
            evaluated(self.model), layer, x, num_concepts=n_components, init="random", max_iter=200,
            to_spatial=self.reshape_transform,
        )  # fmt: skip
        concepts = found.vectors + found.offset
        size = tuple(x.shape[2:])[::-1]
        results = concepts.T.cpu().numpy(), [image.scale_cam_image(m, size) for m in found.maps.cpu().numpy()]
        if self.computation_on_concepts is None:
            return results
        with torch.no_grad():
            return *results, self.computation_on_concepts(concepts).cpu().numpy()


class AblationLayer:
    """Unused: AblationCAM here does not replace a layer."""


class AblationLayerVit(AblationLayer):
    """Unused, like `AblationLayer`."""


def _absent(name: str, remedy: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError(f"{name} is not supported; {remedy}")

    return refuse


AblationLayerFasterRCNN = _absent("AblationLayerFasterRCNN", "ablate one layer, model.backbone.body.layer4")
ActivationsAndGradients = _absent(
    "ActivationsAndGradients", "xcam_fn.feature_and_grad returns both at a layer"
)
run_dff_on_image = _absent(
    "run_dff_on_image", "xcam_fn.concepts finds concepts, xcam_fn.plot.concepts draws them"
)
