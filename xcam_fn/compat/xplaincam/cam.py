"""XplainCAM's classes: an object remembers its arguments, and each call runs a function of `xcam_fn`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from inspect import Signature
from typing import Any, ClassVar

from torch import Tensor, nn

from xcam_fn.compat.common import Remembers, signature, unit
from xcam_fn.maps import resize
from xcam_fn.methods import METHODS, Method, find_method
from xcam_fn.network.copies import private_copy, unwrap
from xcam_fn.network.target_layer import find

_SHAPE = (3, 224, 224)
_OURS = {
    "batch_size": "chunk_size", "num_samples": "num_samples", "std": "std", "theta": "theta",
    "groups": "num_groups", "cluster_method": "cluster", "N": "num_masks", "s": "grid", "p1": "keep",
    "n_steps": "steps", "x_baseline": "baseline", "grad_cam": "gradient", "region_cam": "region",
}  # fmt: skip
_DIMMED = ("gradcam", "xgradcam", "groupcam", "scorecam")
_CLUSTERS = {"k_means": "kmeans", "agglomerate": "agglomerative"}


class BaseCAM(Remembers):
    """A method of XplainCAM; `cam(x, class_idx)` returns detached maps (B, 1, h, w).

    It registers no hooks, and its context manager does nothing.

    Args:
        model: the network, in evaluation mode; it is never modified.
        target_layer: a name, a module of the model, or None for the convolution registered last.
        input_shape: (C, h, w), the size of Grad-CAM's maps; other methods' maps have the images' size.

    Raises:
        ValueError: a value is out of range, or the layer is not in the model.
        TypeError: an argument has the wrong type.
    """

    _method: ClassVar[str] = ""
    _call: ClassVar[Signature] = signature("x", class_idx=None, retain_graph=False)
    __signature__ = signature("model", target_layer=None, input_shape=_SHAPE)
    layered: ClassVar[bool] = True
    model: nn.Module
    target_layer_name: str

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")
        if self.layered:
            self.target_layer_name = _layer_name(self.model, vars(self)["target_layer"])

    def method(self, **options: Any) -> Method[...]:
        """Return the function of `xcam_fn` that a call runs, with the object's arguments as options."""
        if not self._method:
            raise NotImplementedError(
                f"{type(self).__name__} is a base class and has no method; use a subclass such as GradCAM, "
                "or xcam_fn.from_gradients(weighting) for your own weights"
            )
        given = {name: value for name, value in {**vars(self), **options}.items() if name in _OURS}
        for name in given.keys() & {"grad_cam", "region_cam"}:
            part = given[name](self.model, target_layer=self.target_layer_name, **vars(self)["cam_kwargs"])
            given[name] = part.method()
        if "cluster_method" in given:
            given["cluster_method"] = _CLUSTERS.get(given["cluster_method"], given["cluster_method"])
        ours = {_OURS[name]: value for name, value in given.items() if value is not None}
        return find_method(self._method, variant="xplaincam", **ours)

    def forward(self, *args: Any, **arguments: Any) -> Tensor:
        """Return the maps of images x, (B, 1, h, w)."""
        asked = self._call.bind(*args, **arguments).arguments
        x: Tensor = asked.pop("x").detach()
        cls: Any = asked.pop("class_idx", None)
        method, listed = self.method(**asked), self._method == "layercam" and isinstance(cls, list)
        if self._method in _DIMMED:
            shape = vars(self)["input_shape"][1:] if self._method == "gradcam" else None
            method = method.with_options(postprocess=lambda maps, size: _dimmed(maps, shape or size))
        elif self._method == "rise":
            method = method.with_options(postprocess=None)
        elif self._method == "integrated_gradients" and cls is None:
            cls = lambda output: output.amax(1)  # noqa: E731, the class predicted at each point of the path
        layer = self.target_layer_name if self.layered else None
        model = at_hook(self.model, layer) if layer else self.model
        classes: Any = [cls] if listed else cls  # one image, with a map for each class
        maps = method(model, layer, x, classes)
        if not listed:
            return maps[:, None]
        return maps[0, :, None, None] if maps.shape[1] > 1 else maps

    def __call__(self, *args: Any, **arguments: Any) -> Tensor:
        return self.forward(*args, **arguments)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}: it stores no features, gradients or masks; "
            "xcam_fn.feature_and_grad(model, layer, x, cls) returns features and gradients"
        )


def _dimmed(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize and scale heatmaps as XplainCAM does: 1e-8 is added to the range, which lowers faint maps."""
    return unit(resize(maps.relu(), size))


def _layer_name(model: nn.Module, layer: Any) -> str:
    if layer is not None:
        name, _ = find(unwrap(model), layer)
        return layer if isinstance(layer, str) else name
    names = [name for name, module in unwrap(model).named_modules() if isinstance(module, nn.Conv2d)]
    if not names:
        raise ValueError(f"target_layer=None finds no Conv2d in {type(model).__name__}; name a layer")
    return names[-1]


def at_hook(model: nn.Module, layer: str) -> nn.Module:
    """Return a network whose layer returns what a hook on it would see.

    The two differ if an in-place ReLU follows: the hook then sees the features after the ReLU, but the
    gradient before it. A ReLU inside the layer gives both: the ReLU that follows changes nothing, and stops
    the same gradients.
    """
    home, _, name = find(unwrap(model), layer)[0].rpartition(".")
    parent = unwrap(model).get_submodule(home)
    siblings = list(parent._modules.items()) if isinstance(parent, nn.Sequential) else []
    for (key, module), (_, relu) in itertools.pairwise(siblings):
        if key == name and isinstance(relu, (nn.ReLU, nn.ReLU6)) and relu.inplace and module is not None:
            model = private_copy(model, clone_buffers=False)
            both = nn.Sequential(module, type(relu)()).train(module.training)
            model.get_submodule(home)._modules[key] = both
    return model


def _made(
    name: str, method: str, call: Signature = BaseCAM._call, *, layered: bool = True, **arguments: Any
) -> type[BaseCAM]:
    first: Any = {"target_layer": None} if layered else {}
    about: dict[str, Any] = {"_method": method, "_call": call, "layered": layered, "__module__": __name__}
    about["__signature__"] = signature("model", **first, **arguments)
    about["__doc__"] = f"{METHODS[method].title}, computed by `xcam_fn.{method}`; see `BaseCAM`."
    return type(name, (BaseCAM,), about)


_WITH_THETA = signature("x", class_idx=None, theta=10.0)

GradCAM = _made("GradCAM", "gradcam", input_shape=_SHAPE)
GradCAMpp = _made("GradCAMpp", "gradcam_pp", input_shape=_SHAPE)
XGradCAM = _made("XGradCAM", "xgradcam", input_shape=_SHAPE)
LayerCAM = _made("LayerCAM", "layercam", input_shape=_SHAPE, gamma=2.0)
ScoreCAM = _made("ScoreCAM", "scorecam", input_shape=_SHAPE, batch_size=32)
SSCAM = _made("SSCAM", "sscam", num_samples=35, std=2.0, batch_size=32)
ISCAM = _made("ISCAM", "iscam", num_samples=10, batch_size=32)
GroupCAM = _made("GroupCAM", "groupcam", input_shape=_SHAPE, groups=32, cluster_method=None)
AblationCAM = _made(
    "AblationCAM", "ablationcam", signature("x", class_idx=None, retain_graph=False, batch_size=32),
    input_shape=_SHAPE,
)  # fmt: skip
RISE = _made(
    "RISE", "rise", signature("x", class_idx=None), layered=False, input_shape=_SHAPE, batch_size=100,
    N=8000, s=7, p1=0.1, device=None,
)  # fmt: skip
IntegratedGradients = _made(
    "IntegratedGradients", "integrated_gradients", signature("x", x_baseline=None, class_idx=None),
    layered=False, n_steps=50,
)  # fmt: skip
UnionCAM = _made("UnionCAM", "unioncam", _WITH_THETA, input_shape=_SHAPE, device=None)
FusionCAM = _made(
    "FusionCAM", "fusioncam", _WITH_THETA, input_shape=_SHAPE, grad_cam=GradCAM, region_cam=ScoreCAM,
    device=None, rest="cam_kwargs",
)  # fmt: skip

__all__ = [
    "ISCAM", "RISE", "SSCAM", "AblationCAM", "BaseCAM", "FusionCAM", "GradCAM", "GradCAMpp", "GroupCAM",
    "IntegratedGradients", "LayerCAM", "ScoreCAM", "UnionCAM", "XGradCAM",
]  # fmt: skip
