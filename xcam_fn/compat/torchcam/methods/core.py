"""What TorchCAM's extractors are made of: the arguments as theirs, the maps from our methods, their scaling."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from xcam_fn.arguments import Count, Length, check
from xcam_fn.maps import last_axes, resize
from xcam_fn.methods import METHODS
from xcam_fn.methods.method import Method
from xcam_fn.network.calls import module_calls
from xcam_fn.network.copies import private_copy
from xcam_fn.network.target_layer import find
from xcam_fn.targets import class_index, contrast, describe, per_image, resolve
from xcam_fn.torch_state import is_readable

OutputTarget = Callable[[Any], Tensor]
logger = logging.getLogger(__name__)

_OURS = {"batch_size": "chunk_size", "fc_layer": None}  # what is named otherwise, or found by itself
_UNSEEN = (
    "the forward that is explained is not known, as no hook was registered to see it: pass "
    "extractor(class_idx, scores, input_tensor=x), or make the extractor of a model that remembers its last "
    "forward, model = xcam_fn.compat.torchcam.remember(model), and run that"
)


class Remembering(nn.Module):
    """A model that remembers the input and output of its last forward in each thread; `remember` makes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training, self.here = model, model.training, threading.local()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.model(x, *args, **kwargs)
        self.here.last = (x.detach().clone(), output)
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "here"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "here": threading.local()})


def remember(model: nn.Module) -> Remembering:
    """The model as one that remembers its last forward, for an extractor to explain.

    Args:
        model: the network; it is not copied, its layers go by the names that they have in it.

    Returns:
        A module that computes what the model does, with the model's attributes. Input and output (with the
        graph that is recorded for it) stay in memory until the next forward of the same thread.
    """
    return Remembering(model)


def last_call(model: nn.Module) -> tuple[Tensor, Any] | None:
    """The last input and output of a model that remembers them, else None."""
    return getattr(model.here, "last", None) if isinstance(model, Remembering) else None


def _network(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, Remembering) else model


def locate_candidate_layer(mod: nn.Module, input_shape: tuple[int, ...] = (3, 224, 224)) -> str | None:
    """The name of the last module whose output has more than one position, found on zeros; None without one.

    Args:
        mod: the network.
        input_shape: of one image, (C, *size).
    """
    own = next(mod.parameters())
    calls = module_calls(private_copy(_network(mod)).eval(), own.new_zeros(1, *input_shape))
    axes = len(input_shape) + 1
    spatial = [call.name for call in calls if len(call.shape) == axes and set(call.shape[2:]) != {1}]
    return next((name for name in reversed(spatial) if name), None)


def _scaled(cams: Tensor) -> Tensor:
    """Each map from 0 up to nearly 1: 1e-8 is added to what it is divided by, as TorchCAM does."""
    over = last_axes(cams, cams.ndim - 1)
    above = cams - cams.amin(over, keepdim=True)
    return above / (above.amax(over, keepdim=True) + 1e-8)


def _stacked(cams: Any, shape: Sequence[int] | None, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Maps (B, *spatial) of several layers, changed and then resized to one shape, (L, B, *shape)."""
    if not isinstance(cams, list) or not all(isinstance(cam, Tensor) for cam in cams):
        raise TypeError(f"cams is {describe(cams)}; expected a list of tensors, one for each layer")
    if not cams:
        raise ValueError("cams is an empty list; expected the maps of one or more layers")
    largest = tuple(map(max, zip(*(cam.shape[1:] for cam in cams), strict=True)))
    return torch.stack([resize(change(cam), shape or largest) for cam in cams])


class _Extractor:
    """What extractors do with hooks in TorchCAM: nothing, as there are none."""

    model: nn.Module
    target_names: list[str]

    @property
    def hook_handles(self) -> list[Any]:
        """None."""
        return []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def enable_hooks(self) -> None:
        """Do nothing."""

    disable_hooks = remove_hooks = reset_hooks = enable_hooks

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self._shown().items())})"

    def _shown(self) -> dict[str, Any]:
        return {"target_layer": self.target_names}


class _CAM(_Extractor):
    """An extractor: it remembers its arguments, and is called as TorchCAM's are.

    Args:
        model: the network, in evaluation mode, or what `remember` made of it.
        target_layer: a name, a module of the model, or a list of them; None for the last layer whose output
            has more than one position.
        input_shape: of one image, (C, *size), where target_layer is None.
        enable_hooks: accepted; there are no hooks.
        reshape_transform: what arranges the layer's output as (B, K, *spatial).

    Raises:
        ValueError: the layer is not in the model.
        TypeError: an argument is of the wrong kind.
    """

    method: ClassVar[Any] = None
    own: ClassVar[dict[str, Any]] = {}
    needs_scores: ClassVar[bool] = False
    gamma: ClassVar[float | None] = None  # what a map is multiplied by before its tanh is fused

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        found = _signature(self.own).bind(*args, **kwargs)
        found.apply_defaults()
        given = found.arguments
        self.model, layer, place = given["model"], given["target_layer"], given["reshape_transform"]
        if place is not None and not callable(place):
            raise TypeError(f"reshape_transform is a {type(place).__name__}; expected a function")
        if place is not None and layer is None:
            raise ValueError("reshape_transform without target_layer; expected the layer that it is for")
        self.reshape_transform = place
        for name in self.own:
            setattr(self, name, given[name])
        self.target_names = self._names(layer, given["input_shape"])
        if given.get("fc_layer") is not None:
            find(_network(self.model), given["fc_layer"])  # which is found by itself, and need only be there
        if type(self) is CAM and len(self.target_names) > 1:
            raise ValueError(f"target_layer={self.target_names}; CAM expects one layer")

    def _names(self, layer: Any, input_shape: tuple[int, ...]) -> list[str]:
        if layer is None:
            name = locate_candidate_layer(self.model, input_shape)
            if name is None:
                raise ValueError("target_layer=None, and no layer has maps; expected a name or a module")
            logger.warning(f"target_layer=None: {name!r} is explained")
            return [name]
        network, layers = _network(self.model), layer if isinstance(layer, list) else [layer]
        found = [find(network, one)[0] for one in layers]
        return [one if isinstance(one, str) else name for one, name in zip(layers, found, strict=True)]

    def __call__(
        self,
        class_idx: int | list[int] | None = None,
        scores: Any = None,
        normalized: bool = True,
        *,
        targets: OutputTarget | list[OutputTarget] | None = None,
        input_tensor: Tensor | tuple[Tensor, Any] | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """The maps of a class, (B, *spatial) for each layer.

        Args:
            class_idx: a class, or one for each image.
            scores: the model's output (B, classes), or what was computed of it, such as its softmax, which is
                then explained where gradients are.
            normalized: scale each map to [0, 1].
            targets: in place of class_idx, a function from an image's output to a score, or one for each image.
            input_tensor: (B, C, *size), what the model was run on, or (input, output) of that; None where the
                model remembers it.
            **options: `retain_graph`, which is accepted, and the method's own, such as `eps`.

        Raises:
            ValueError: a value is out of range, or the forward is not known.
            TypeError: an argument is of the wrong kind.
        """
        if (class_idx is None) == (targets is None):
            raise ValueError("expected exactly one of class_idx and targets")
        if targets is not None and self.method.name in ("cam", "legrad"):
            raise ValueError(f"{type(self).__name__} does not support targets; expected class_idx")
        x, output = self._seen(input_tensor)
        if targets is not None:
            cls: Any = per_image(targets if isinstance(targets, list) else [targets] * len(x))
        elif isinstance(scores, Tensor):
            cls = class_index(class_idx, scores, "class_idx")
        else:
            cls = class_idx
        return self.maps(cls, scores, normalized, (x, output), **options)

    compute_cams = __call__

    def _seen(self, given: Any) -> tuple[Tensor, Any]:
        seen = last_call(self.model) if given is None else given if isinstance(given, tuple) else (given, None)
        if seen is None:
            raise ValueError(_UNSEEN)
        return seen[0].detach(), seen[1]

    def maps(
        self, cls: Any, scores: Any, normalized: bool, seen: tuple[Tensor, Any], **options: Any
    ) -> list[Tensor]:
        """The maps of a class or a target as the library takes it."""
        x, output = seen
        if self.needs_scores and scores is None:
            raise ValueError("scores is required: expected what the model returned")
        if self.needs_scores and scores is not output:
            cls = _explained(cls, scores, output)
        options.pop("retain_graph", None)
        own = {_OURS.get(name, name): getattr(self, name) for name in self.own}
        own.pop(None, None)
        cams = [
            self.method(_network(self.model), layer, x, cls, postprocess=None, **place, **own, **options).detach()
            for layer, place in self._places()
        ]
        cams = [cam if self.method.name in ("cam", "legrad") else cam.relu() for cam in cams]
        return [_scaled(cam) for cam in cams] if normalized else cams

    def _places(self) -> list[tuple[Any, dict[str, Any]]]:
        return [(name, {"to_spatial": self.reshape_transform}) for name in self.target_names]

    @classmethod
    def fuse_cams(cls, cams: list[Tensor], target_shape: tuple[int, ...] | None = None) -> Tensor:
        """The largest value of several layers' maps at each position, (B, *target_shape).

        Args:
            cams: the maps, (B, *spatial) for each layer.
            target_shape: of the result; None for the largest of the maps.
        """
        gamma = cls.gamma
        stacked = _stacked(cams, target_shape, lambda cam: cam if gamma is None else (gamma * cam).tanh())
        return cams[0] if len(cams) == 1 else stacked.amax(0)

    def _shown(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.own if _OURS.get(name, name)}
        return own if "batch_size" in own else super()._shown() | own


def _explained(cls: Any, scores: Any, output: Any) -> Callable[[Any], Tensor]:
    """The target that is the class's score in `scores`, which were computed of the output, or are its values."""
    score = resolve(cls)
    if isinstance(scores, Tensor) and scores.requires_grad and isinstance(output, Tensor):
        try:
            (G,) = torch.autograd.grad(score(scores).sum(), output, retain_graph=True)
        except RuntimeError as error:
            raise ValueError("scores is not computed of what the model returned last") from error
        return lambda y: (G * y).flatten(1).sum(1)

    def checked(y: Any) -> Tensor:
        if isinstance(scores, Tensor) and isinstance(y, Tensor) and is_readable(y):
            far = scores.shape != y.shape or not torch.allclose(
                scores.detach().float(), y.detach().float(), 1e-2, 1e-2 * float(y.abs().max())
            )
            if far:
                raise ValueError(
                    "scores is not what the model returns for the input; expected its output, or, for what is "
                    "computed of it, input_tensor=(input, output) or a model that remembers both (remember)"
                )
        return score(y)

    return checked


def _signature(own: dict[str, Any]) -> Signature:
    """The parameters of an extractor's constructor, its own after the layer."""
    every = {"target_layer": None, **own, "input_shape": (3, 224, 224)}
    every |= {"enable_hooks": True, "reshape_transform": None}
    kind = Parameter.POSITIONAL_OR_KEYWORD
    parameters = [Parameter(name, kind, default=default) for name, default in every.items()]
    return Signature([Parameter("model", kind), *parameters])


def _extractor(name: str, method: str, scores: bool = False, gamma: float | None = None, **own: Any) -> Any:
    """One of TorchCAM's classes: our method as TorchCAM defines it, whether it needs scores, its arguments."""
    found: Method[...] = METHODS[method].variant("torchcam")
    about = {"method": found, "own": own, "needs_scores": scores, "gamma": gamma}
    about |= {"__signature__": _signature(own), "__module__": __name__}
    return type(name, (_CAM,), {"__doc__": f"{found.title}: {found.summary}.", **about})


CAM = _extractor("CAM", "cam", fc_layer=None)
ScoreCAM = _extractor("ScoreCAM", "scorecam", batch_size=32)
SSCAM = _extractor("SSCAM", "sscam", batch_size=32, num_samples=35, std=2.0)
ISCAM = _extractor("ISCAM", "iscam", batch_size=32, num_samples=10)
GradCAM = _extractor("GradCAM", "gradcam", scores=True)
GradCAMpp = _extractor("GradCAMpp", "gradcam_pp", scores=True)
SmoothGradCAMpp = _extractor("SmoothGradCAMpp", "smoothgradcam_pp", num_samples=4, std=0.3)
XGradCAM = _extractor("XGradCAM", "xgradcam", scores=True)
LayerCAM = _extractor("LayerCAM", "layercam", scores=True, gamma=2.0)


class LeGrad(_CAM):
    """LeGrad of chosen blocks of a transformer, one map of all of them.

    Args:
        model: the network, in evaluation mode, or what `remember` made of it.
        target_layer: blocks, names or modules, one or more.
        score_projection: what makes logits (B, classes) of a block's tokens; None for torchvision's
            VisionTransformer, whose head is given the mean of the tokens, as TorchCAM does.
        prefix_tokens: how many tokens are of no patch, ≥ 0.
        grid_shape: of the patches, (height, width); None where they are a square.
        enable_hooks: accepted; there are no hooks.

    Raises:
        ValueError: the blocks are not in the model, or a value is out of range.
        TypeError: an argument is of the wrong kind.
    """

    method = METHODS["legrad"].variant("torchcam")

    def __init__(
        self,
        model: nn.Module,
        target_layer: Any,
        *,
        score_projection: Callable[[Tensor], Tensor] | None = None,
        prefix_tokens: int = 1,
        grid_shape: tuple[int, int] | None = None,
        enable_hooks: bool = True,  # noqa: ARG002
    ) -> None:
        if target_layer is None or target_layer == []:
            raise ValueError(f"target_layer={target_layer}; LeGrad has no default: expected one explicit target block or more")
        check("score_projection", score_projection, Callable | None)
        check("prefix_tokens", prefix_tokens, Length)
        if not (grid_shape is None or (isinstance(grid_shape, tuple) and len(grid_shape) == 2)):
            raise TypeError(f"grid_shape={grid_shape!r}; expected a tuple of two integers, or None")
        for side in grid_shape or ():
            check("grid_shape", side, Count)
        network: Any = _network(model)
        if score_projection is None and not (hasattr(network, "heads") and hasattr(network, "encoder")):
            raise ValueError("score_projection=None is for torchvision's VisionTransformer; expected a function")
        self.score_projection = score_projection or (lambda t: network.heads(network.encoder.ln(t.mean(1))))
        self.prefix_tokens, self.grid_shape = prefix_tokens, grid_shape
        super().__init__(model, target_layer)

    def _places(self) -> list[tuple[Any, dict[str, Any]]]:
        options = {"blocks": self.target_names, "head": self.score_projection, "to_spatial": self._patches}
        return [(None, options)]

    def _patches(self, tokens: Tensor) -> Tensor:
        """The values of patches, tokens (B, T, K) to (B, K, *grid)."""
        patches = tokens[:, self.prefix_tokens :].movedim(1, -1)
        side = math.isqrt(patches.shape[-1])
        grid = self.grid_shape or (side, side)
        if math.prod(grid) != patches.shape[-1] or not math.prod(grid):
            has = f"{tokens.shape[1]} tokens, of which prefix_tokens={self.prefix_tokens} are of no patch"
            raise ValueError(f"{has}, do not make a grid of {grid}; expected another grid_shape or prefix_tokens")
        return patches.unflatten(-1, grid)


class _Around(_Extractor):
    """An extractor that asks another one, its `base_cam`."""

    def __init__(self, base_cam: _CAM) -> None:
        self.base_cam, self.model, self.target_names = base_cam, base_cam.model, base_cam.target_names

    def _shown(self) -> dict[str, Any]:
        return {"base_method": type(self.base_cam).__name__} | super()._shown()


class RefineCAM(_Around):
    """RefineCAM: the product of another extractor's maps of several layers.

    Args:
        model: the network, in evaluation mode, or what `remember` made of it.
        target_layer: two layers or more, names or modules.
        input_shape: of one image, (C, *size).
        base_method: the class of the extractor.
        **base_kwargs: its other arguments.

    Raises:
        ValueError: there are fewer than two layers.
        TypeError: base_method is no class of an extractor.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: list[nn.Module | str],
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        base_method: type[_CAM] = GradCAMpp,
        **base_kwargs: Any,
    ) -> None:
        if not isinstance(target_layer, list) or len(target_layer) < 2:
            raise ValueError(f"target_layer={target_layer!r}; RefineCAM expects a list of at least two target layers")
        if not isinstance(base_method, type) or not issubclass(base_method, _CAM):
            raise TypeError(f"base_method={base_method!r}; expected a CAM extractor class")
        super().__init__(base_method(model, target_layer, input_shape=input_shape, **base_kwargs))

    def __call__(
        self,
        class_idx: int | list[int] | None = None,
        scores: Any = None,
        normalized: bool = True,
        target_shape: tuple[int, ...] | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """The product, a list of one, at target_shape or the largest layer's; else as the extractor's."""
        cams = self.base_cam(class_idx, scores, **options)
        return [self.fuse_cams(cams, target_shape, normalized)]

    compute_cams = __call__

    @staticmethod
    def fuse_cams(
        cams: list[Tensor], target_shape: tuple[int, ...] | None = None, normalized: bool = True
    ) -> Tensor:
        """The product of several layers' maps, each scaled to [0, 1] before it is resized."""
        product = _stacked(cams, target_shape, _scaled).prod(0)
        return _scaled(product) if normalized else product


class FinerCAM(_Around):
    """Finer-CAM: another extractor's maps of what tells the class from those most like it.

    Args:
        model: the network, in evaluation mode, or what `remember` made of it.
        target_layer: as for the extractor.
        input_shape: of one image, (C, *size).
        base_method: GradCAM, GradCAMpp or LayerCAM.
        gamma: how much of the others is taken away, ≥ 0.
        num_references: how many classes it is set off against, ≥ 1.
        **base_kwargs: the extractor's other arguments.

    Raises:
        ValueError: a value is out of range.
        TypeError: an argument is of the wrong kind.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: nn.Module | str | list[nn.Module | str] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        base_method: type[_CAM] = GradCAM,
        gamma: float = 0.6,
        num_references: int = 3,
        **base_kwargs: Any,
    ) -> None:
        if base_method not in (GradCAM, GradCAMpp, LayerCAM):
            raise TypeError(f"base_method={base_method!r}; expected GradCAM, GradCAMpp, or LayerCAM")
        real = "a real number, finite and non-negative"
        for name, value, kind, expected in (
            ("gamma", gamma, (int, float), real),
            ("num_references", num_references, int, "a positive integer"),
        ):
            if isinstance(value, bool) or not isinstance(value, kind):
                raise TypeError(f"{name}={value!r}; expected {expected}")
            if not (expected != real) <= value < math.inf:
                raise ValueError(f"{name}={value}; expected {expected}")
        self.gamma, self.num_references = float(gamma), num_references
        super().__init__(base_method(model, target_layer, input_shape=input_shape, **base_kwargs))

    def __call__(
        self,
        class_idx: int | list[int],
        scores: Tensor | None = None,
        comparison_idx: int | list[int] | list[list[int]] | None = None,
        normalized: bool = True,
        *,
        input_tensor: Tensor | tuple[Tensor, Any] | None = None,
        targets: None = None,
        **options: Any,
    ) -> list[Tensor]:
        """The maps as the extractor's; comparison_idx are the other classes, None for those most like it."""
        if targets is not None:
            raise ValueError("FinerCAM does not support targets; expected class_idx")
        if not isinstance(scores, Tensor):
            raise (ValueError if scores is None else TypeError)("scores must be a tensor, what the model returned")
        cls = contrast(class_idx, comparison_idx, self.gamma, count=self.num_references)
        seen = self.base_cam._seen(input_tensor)
        return self.base_cam.maps(cls, scores, normalized, seen, **options)

    compute_cams = __call__

    def fuse_cams(self, cams: list[Tensor], target_shape: tuple[int, ...] | None = None) -> Tensor:
        """As the extractor does."""
        return self.base_cam.fuse_cams(cams, target_shape)

    def _shown(self) -> dict[str, Any]:
        return super()._shown() | {"gamma": self.gamma, "num_references": self.num_references}
