"""TorchCAM's extractors with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xcam_fn.arguments import Count, Length, check
from xcam_fn.compat.common import unit
from xcam_fn.compat.torchcam.methods import core
from xcam_fn.compat.torchcam.methods.core import _CAM, extractor, network_of
from xcam_fn.methods import METHODS
from xcam_fn.targets import contrast

__all__ = [
    "FinerCAM", "GradCAM", "GradCAMpp", "LayerCAM", "LeGrad", "RefineCAM", "SmoothGradCAMpp", "XGradCAM",
]  # fmt: skip

GradCAM = extractor(__name__, "GradCAM", "gradcam", True)
GradCAMpp = extractor(__name__, "GradCAMpp", "gradcam_pp", True)
SmoothGradCAMpp = extractor(__name__, "SmoothGradCAMpp", "smoothgradcam_pp", num_samples=4, std=0.3)
XGradCAM = extractor(__name__, "XGradCAM", "xgradcam", True)
LayerCAM = extractor(__name__, "LayerCAM", "layercam", True)
LayerCAM.scaled = staticmethod(lambda cam: torch.tanh(2 * cam))  # equation 9 of its paper


class RefineCAM(_CAM):
    """RefineCAM: the product of another extractor's maps (base_method) at two layers or more."""

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
            raise ValueError(f"target_layer={target_layer!r}; expected a list of at least two target layers")
        if not (isinstance(base_method, type) and issubclass(base_method, _CAM)):
            raise TypeError(f"base_method={base_method!r}; expected a CAM extractor class")
        self.base_cam = base_method(model, target_layer, input_shape=input_shape, **base_kwargs)
        self.model, self.target_names = model, self.base_cam.target_names

    def __call__(
        self,
        class_idx: int | list[int] | None = None,
        scores: Any = None,
        normalized: bool = True,
        target_shape: tuple[int, ...] | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """Return [product], at target_shape or the largest layer's size; other arguments as in `_CAM`."""
        return [self.fuse_cams(self.base_cam(class_idx, scores, **options), target_shape, normalized)]

    @classmethod
    def fuse_cams(
        cls, cams: list[Tensor], target_shape: tuple[int, ...] | None = None, normalized: bool = True
    ) -> Tensor:
        """Return the product of several layers' maps, each scaled to [0, 1] before it is resized."""
        product = core.stacked(cams, target_shape, unit).prod(0)
        return unit(product) if normalized else product


class FinerCAM(_CAM):
    """Finer-CAM: base_method's maps of a class minus gamma times the num_references most similar classes."""

    own: ClassVar[dict[str, Any]] = {"gamma": 0.6, "num_references": 3}

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
        for name, value, least, expected in (
            ("gamma", gamma, 0, "a real number, finite and non-negative"),
            ("num_references", num_references, 1, "a positive integer"),
        ):
            if isinstance(value, bool) or not isinstance(value, int if least else (int, float)):
                raise TypeError(f"{name}={value!r}; expected {expected}")
            if not least <= value < math.inf:
                raise ValueError(f"{name}={value}; expected {expected}")
        self.gamma, self.num_references = float(gamma), num_references
        self.base_cam = base_method(model, target_layer, input_shape=input_shape, **base_kwargs)
        self.model, self.target_names = model, self.base_cam.target_names
        self.fuse_cams = self.base_cam.fuse_cams

    def __call__(
        self,
        class_idx: int | list[int] | None = None,
        scores: Tensor | None = None,
        comparison_idx: int | list[int] | list[list[int]] | None = None,
        normalized: bool = True,
        *,
        targets: Any = None,
        input_tensor: Tensor | tuple[Tensor, Any] | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """Return the maps; comparison_idx are the classes to subtract, None for the most similar ones."""
        if targets is not None:
            raise ValueError("FinerCAM does not support targets; expected class_idx")
        if not isinstance(scores, Tensor):
            kind = ValueError if scores is None else TypeError
            raise kind("scores is required: scores must be a tensor, the model's output")
        cls = contrast(class_idx, comparison_idx, self.gamma, count=self.num_references)
        return self.base_cam.maps(cls, scores, normalized, self.base_cam.seen(input_tensor), **options)


class LeGrad(_CAM):
    """LeGrad of the chosen blocks of a transformer, combined in one map.

    Args:
        model: the network, in evaluation mode, or `remember(network)`.
        target_layer: one block or more, names or modules.
        score_projection: maps a block's tokens to logits (B, classes); None for a VisionTransformer of
            torchvision, whose head gets the mean of the tokens, as in TorchCAM.
        prefix_tokens: the number of tokens that are not patches, ≥ 0.
        grid_shape: (height, width) of the grid of patches; None if it is square.
        enable_hooks: accepted; there are no hooks.

    Raises:
        ValueError: a block is not in the model, or a value is out of range.
        TypeError: an argument has the wrong type.
    """

    method = METHODS["legrad"].variant("torchcam")

    def __init__(
        self,
        model: nn.Module,
        target_layer: nn.Module | str | list[nn.Module | str],
        *,
        score_projection: Callable[[Tensor], Tensor] | None = None,
        prefix_tokens: int = 1,
        grid_shape: tuple[int, int] | None = None,
        enable_hooks: bool = True,
    ) -> None:
        if target_layer is None or target_layer == []:
            raise ValueError(f"target_layer={target_layer}; expected one explicit target block or more")
        check("score_projection", score_projection, Callable | None)
        check("prefix_tokens", prefix_tokens, Length)
        if not (grid_shape is None or (isinstance(grid_shape, tuple) and len(grid_shape) == 2)):
            raise TypeError(f"grid_shape={grid_shape!r}; expected a tuple of two integers, or None")
        for side in grid_shape or ():
            check("grid_shape", side, Count)
        network = network_of(model)
        if score_projection is None and not (hasattr(network, "heads") and hasattr(network, "encoder")):
            raise ValueError("score_projection=None works only with torchvision's VisionTransformer")
        self.score_projection = score_projection or (lambda t: network.heads(network.encoder.ln(t.mean(1))))
        self.prefix_tokens, self.grid_shape = prefix_tokens, grid_shape
        super().__init__(model, target_layer, enable_hooks=enable_hooks)

    def raw(self, run: Callable[..., Tensor]) -> list[Tensor]:
        """Return the map of all blocks, in a list."""
        head, place = self.score_projection, self._patches
        return [run(None, blocks=self.target_names, head=head, to_spatial=place)]

    def _patches(self, tokens: Tensor) -> Tensor:
        """Arrange the patch tokens of (B, T, K) as (B, K, *grid)."""
        patches = tokens[:, self.prefix_tokens :].movedim(1, -1)
        count = patches.shape[-1]
        grid = self.grid_shape or (math.isqrt(count), math.isqrt(count))
        if math.prod(grid) != count or not count:
            has = f"grid_shape={self.grid_shape} and prefix_tokens={self.prefix_tokens}"
            raise ValueError(f"{has} do not fit {tokens.shape[1]} tokens: {count} patches do not make {grid}")
        return patches.unflatten(-1, grid)
