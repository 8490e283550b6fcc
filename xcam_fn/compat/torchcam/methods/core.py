"""TorchCAM's extractors: TorchCAM's arguments and scaling, `xcam_fn`'s methods."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from inspect import Signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xcam_fn.compat.common import Remembers, last_spatial_layer, signature, unit
from xcam_fn.maps import resize
from xcam_fn.methods import METHODS
from xcam_fn.network.target_layer import find
from xcam_fn.targets import class_index, per_image, resolve
from xcam_fn.torch_state import is_readable

__all__ = ["OutputTarget"]

OutputTarget = Callable[[Any], Tensor]
logger = logging.getLogger(__name__)

_OURS = {"batch_size": "chunk_size"}  # options that go by another name here
_SHARED = {"input_shape": (3, 224, 224), "enable_hooks": True, "reshape_transform": None}
_UNSEEN = (
    "the input to explain is not known, since extractors register no hooks: pass the images as "
    "input_tensor=x, or create the extractor with model = xcam_fn.compat.torchcam.remember(model) and run "
    "this model first"
)
_OTHER = (
    "scores is not the model's output for the input; expected that output. If scores is computed from it, "
    "pass input_tensor=(input, output), or use xcam_fn.compat.torchcam.remember(model), which remembers both"
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
    """Wrap a model to remember its last forward, which an extractor of the wrapped model then explains.

    Args:
        model: the network; it is not copied, and its layers keep their names.

    Returns:
        A module with the model's outputs and attributes. Its last input and output, with the autograd graph,
        stay in memory until the next forward in the same thread.
    """
    return Remembering(model)


def last_call(model: nn.Module) -> tuple[Tensor, Any] | None:
    """Return the last (input, output) of a model that remembers them, else None."""
    return getattr(model.here, "last", None) if isinstance(model, Remembering) else None


def locate_candidate_layer(mod: nn.Module, input_shape: tuple[int, ...] = (3, 224, 224)) -> str | None:
    """Return the name of the last module whose output has more than one position, or None.

    Args:
        mod: the network; it is run on zeros.
        input_shape: shape of one image, (C, *size).
    """
    return last_spatial_layer(network_of(mod), input_shape)


def network_of(model: nn.Module) -> Any:
    return model.model if isinstance(model, Remembering) else model


class _CAM(Remembers):
    """An extractor: it remembers its arguments and is called like TorchCAM's.

    Args:
        model: the network, in evaluation mode, or `remember(network)`.
        target_layer: a name, a module of the model, or a list of them; None for `locate_candidate_layer`.
        input_shape: shape of one image, (C, *size), used if target_layer is None.
        enable_hooks: ignored; there are no hooks.
        reshape_transform: arranges the layer's output as (B, K, *spatial).

    Raises:
        ValueError: the layer is not in the model.
        TypeError: an argument has the wrong type.
    """

    method: ClassVar[Any] = None
    own: ClassVar[dict[str, Any]] = {}
    explains_scores: ClassVar[bool] = False
    base_cam: Any = None  # the extractor that this one wraps, if any
    scaled: Callable[[Tensor], Tensor] = staticmethod(
        lambda cam: cam
    )  # applied before layers' maps are fused

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        found = _signature(self.own).bind(*args, **kwargs)
        found.apply_defaults()
        given = found.arguments
        self.model, layers, place = given["model"], given["target_layer"], given["reshape_transform"]
        if not (place is None or callable(place)):
            raise TypeError(f"reshape_transform must be a function, got {type(place).__name__}")
        if layers is None:
            name = None if place else locate_candidate_layer(self.model, given["input_shape"])
            if name is None:
                raise ValueError("target_layer=None finds no layer; expected a layer's name or a module")
            logger.warning(f"target_layer=None: using {name!r}")
            layers = name
        self.target_names = [self._name(one) for one in (layers if isinstance(layers, list) else [layers])]
        if given.get("fc_layer") is not None:
            self._name(given["fc_layer"])  # checked only: xcam_fn's method finds the linear layer itself
        if "fc_layer" in self.own and len(self.target_names) > 1:
            raise ValueError(f"target_layer={self.target_names}; CAM expects one layer")
        self.reshape_transform = place
        vars(self).update({name: given[name] for name in self.own})

    def _name(self, layer: Any) -> str:
        found, _ = find(network_of(self.model), layer)
        return layer if isinstance(layer, str) else found

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
        """Return the maps of a class, (B, *spatial) for each layer.

        Args:
            class_idx: a class, or one for each image.
            scores: the model's output (B, classes), or scores computed from it, such as its softmax; gradient
                methods then explain those.
            normalized: scale each map to [0, 1].
            targets: instead of class_idx, a function from an image's output to a score, or one per image.
            input_tensor: the model's input (B, C, *size), or (input, output); None if the model remembers
                both.
            **options: `retain_graph`, which is ignored, and the method's own, such as `eps`.

        Raises:
            ValueError: a value is out of range, or the input is not known.
            TypeError: an argument has the wrong type.
        """
        if (class_idx is None) == (targets is None):
            raise ValueError("expected exactly one of class_idx and targets")
        if targets is not None and self.method.name in ("cam", "legrad"):
            raise ValueError(f"{type(self).__name__} does not support targets; expected class_idx")
        seen = self.seen(input_tensor)
        cls: Any = class_idx
        if targets is not None:
            cls = per_image(targets if isinstance(targets, list) else [targets] * len(seen[0]))
        elif isinstance(scores, Tensor):
            cls = class_index(class_idx, scores, "class_idx")
        return self.maps(cls, scores, normalized, seen, **options)

    def compute_cams(self, *args: Any, **options: Any) -> list[Tensor]:
        """Return the same as calling the extractor."""
        return self(*args, **options)

    def seen(self, given: Any) -> tuple[Tensor, Any]:
        """Return the input and, if known, the output of the forward to explain."""
        found = given if isinstance(given, tuple) else (given, None)
        found = last_call(self.model) if given is None else found
        if found is None:
            raise ValueError(_UNSEEN)
        return found[0].detach(), found[1]

    def maps(self, cls: Any, scores: Any, normalized: bool, seen: Any, **options: Any) -> list[Tensor]:
        """Return the maps of a class or a target, in the form that `xcam_fn`'s methods take."""
        if self.explains_scores and scores is None:
            raise ValueError("scores is required: expected the model's output")
        if self.explains_scores and scores is not seen[1]:
            cls = _explained(cls, scores, seen[1])
        options.pop("retain_graph", None)
        options |= {_OURS.get(name, name): getattr(self, name) for name in self.own if name != "fc_layer"}
        run = lambda layer, **more: self.method(  # noqa: E731
            network_of(self.model), layer, seen[0], cls, postprocess=None, **more, **options
        ).detach()
        cams = self.raw(run)
        return [unit(cam) for cam in cams] if normalized else cams

    def raw(self, run: Callable[..., Tensor]) -> list[Tensor]:
        """Return the maps before scaling; `run` maps a layer to its map."""
        cams = [run(name, to_spatial=self.reshape_transform) for name in self.target_names]
        return cams if self.method.name == "cam" else [cam.relu() for cam in cams]

    @classmethod
    def fuse_cams(cls, cams: list[Tensor], target_shape: tuple[int, ...] | None = None) -> Tensor:
        """Return the maximum of several layers' maps at each position, (B, *target_shape).

        Args:
            cams: the maps, (B, *spatial) for each layer.
            target_shape: the size of the result; None for that of the largest map.
        """
        every = stacked(cams, target_shape, cls.scaled)
        return cams[0] if len(cams) == 1 else every.amax(0)

    def enable_hooks(self) -> None:
        """Do nothing: there are no hooks."""

    disable_hooks = remove_hooks = reset_hooks = enable_hooks
    hook_handles = property(lambda _: [])

    def __repr__(self) -> str:
        shown = {} if self.base_cam is None else {"base_method": type(self.base_cam).__name__}
        shown |= {} if "batch_size" in self.own else {"target_layer": self.target_names}
        shown |= {name: getattr(self, name) for name in self.own if name != "fc_layer"}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"


def _explained(cls: Any, scores: Any, output: Any) -> Callable[[Any], Tensor]:
    """Return a target: the class's score in `scores`, which are the output or computed from it."""
    score = resolve(cls)
    if isinstance(scores, Tensor) and scores.requires_grad and isinstance(output, Tensor):
        try:
            (G,) = torch.autograd.grad(score(scores).sum(), output, retain_graph=True)
        except RuntimeError as error:
            raise ValueError(_OTHER) from error
        return lambda y: (G * y).flatten(1).sum(1)

    def compared(y: Any) -> Tensor:
        if isinstance(scores, Tensor) and isinstance(y, Tensor) and is_readable(y):
            near = 0.01 * float(y.detach().abs().max())  # tolerance for reduced precision
            if scores.shape != y.shape or bool(((scores - y).abs() > near).any()):
                raise ValueError(_OTHER)
        return score(y)

    return compared


def stacked(cams: Any, shape: Sequence[int] | None, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `change` to the maps (B, *spatial) of several layers, then resize them: (L, B, *shape)."""
    if not isinstance(cams, list) or not all(isinstance(cam, Tensor) for cam in cams):
        raise TypeError(f"cams must be a list of tensors, one for each layer, got {type(cams).__name__}")
    if not cams:
        raise ValueError("cams is an empty list; expected the maps of at least one layer")
    largest = tuple(map(max, zip(*(cam.shape[1:] for cam in cams), strict=True)))
    return torch.stack([resize(change(cam), shape or largest) for cam in cams])


def _signature(own: dict[str, Any]) -> Signature:
    """Return the signature of an extractor, with its own parameters after the layer."""
    return signature("model", target_layer=None, **own, **_SHARED)


def extractor(module: str, name: str, method: str, scores: bool = False, **own: Any) -> Any:
    """Return one of TorchCAM's classes: `xcam_fn`'s method as TorchCAM defines it, with its own arguments."""
    found = METHODS[method].variant("torchcam")
    about = {"__doc__": f"{found.title}: {found.summary}.", "__signature__": _signature(own)}
    about |= {"__module__": module, "method": found, "own": own, "explains_scores": scores}
    return type(name, (_CAM,), about)
