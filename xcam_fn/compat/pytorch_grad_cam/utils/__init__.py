"""Functions that arrange tokens, find modules and project features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from xcam_fn import projections


def swinT_reshape_transform(tensor: Tensor, height: int = 7, width: int = 7) -> Tensor:  # noqa: N802
    """Arrange tokens (B, height · width, K) as maps (B, K, height, width)."""
    return rearrange(tensor, "b (h w) k -> b k h w", h=height, w=width)


def vit_reshape_transform(tensor: Tensor, height: int = 14, width: int = 14) -> Tensor:
    """Arrange tokens (B, 1 + height · width, K), without the first, as maps (B, K, height, width)."""
    return swinT_reshape_transform(tensor[:, 1:], height, width)


def fasterrcnn_reshape_transform(_: Any) -> Tensor:
    """Not supported: raise ValueError. A layer that returns one tensor needs no such function."""
    raise ValueError(
        "fasterrcnn_reshape_transform is not supported; explain one layer, model.backbone.body.layer4"
    )


def find_layer_predicate_recursive(
    model: nn.Module, predicate: Callable[[nn.Module], Any]
) -> list[nn.Module]:
    """Return the modules inside a model for which the predicate is true, in order."""
    every = (module for _, module in model.named_modules(remove_duplicate=False))
    return [module for module in every if module is not model and predicate(module)]


def find_layer_types_recursive(model: nn.Module, layer_types: Any) -> list[nn.Module]:
    """Return the modules inside a model that have one of the types."""
    return find_layer_predicate_recursive(model, lambda layer: type(layer) in layer_types)


def _of_array(projection: Callable[..., Tensor]) -> Callable[..., np.ndarray]:
    """Return a projection of `xcam_fn`, with its sign, for arrays (B, K, *spatial), with NaN as 0."""

    def project(activation_batch: np.ndarray, *kernel_and_gamma: Any, **options: Any) -> np.ndarray:
        options |= zip(("kernel", "gamma"), kernel_and_gamma, strict=False)
        return projection(torch.from_numpy(np.nan_to_num(activation_batch)), **options).float().numpy()

    return project


get_2d_projection = _of_array(projections.principal_component)
get_2d_projection_kernel = _of_array(projections.kernel_component)
get_2d_projection_with_sign_correction = _of_array(projections.peak_component)
