"""XplainCAM's utilities: photographs, figures, and the target layer."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from xcam_fn import plot
from xcam_fn.compat.common import last_spatial_layer
from xcam_fn.maps import minmax
from xcam_fn.models import images

__all__ = [
    "convert_to_gray", "load_class_index", "load_image", "locate_candidate_layer", "resolve_target_layer",
    "sample_images_flat", "visualize_cam",
]  # fmt: skip

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WITHOUT_WINDOWS = ("agg", "cairo", "pdf", "pgf", "ps", "svg", "template")


def visualize_cam(
    img: Tensor,
    cams: Mapping[str, Tensor],
    figure_title: str | None = None,
    save_path: Any = None,
    alpha: float = 0.5,
    nrow: int | None = None,
) -> None:
    """Draw an image (1, 3, H, W) in [0, 1] and its overlays, `nrow` pictures in a row; save and show it."""
    maps = {name: unit_map(cam) for name, cam in cams.items()}
    columns = nrow or 1 + len(maps)
    figure = plot.heatmaps(
        img, maps, alpha=alpha, alpha_follows_heatmap=False, colormap="jet", columns=columns
    )
    if figure_title:
        figure.suptitle(figure_title)
    saved_and_shown(figure, save_path, dpi=200)


def unit_map(cam: Tensor) -> Tensor:
    """Scale one map to [0, 1], (h, w)."""
    return minmax(torch.as_tensor(cam).detach().squeeze(), 2)


def saved_and_shown(figure: Figure, path: Any, *, dpi: int, closed: bool = False) -> None:
    """Save a figure, creating its folder; hand it to pyplot; show it if the backend has windows."""
    from matplotlib import pyplot as plt  # noqa: PLC0415, it may start a window system

    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi, bbox_inches="tight")
    manager: Any = plt.figure(figsize=figure.get_size_inches()).canvas.manager
    manager.canvas.figure = figure
    figure.set_canvas(manager.canvas)
    if plt.get_backend().lower() not in _WITHOUT_WINDOWS:
        plt.show()
    if closed:
        plt.close(manager.num)


def load_image(path: Any, size: int) -> Tensor:
    """Return the photograph resized to a square, with ImageNet normalization, (1, 3, size, size)."""
    return images.prepare(path, images.Preset(size, (size, size), MEAN, STD))[0]


def sample_images_flat(folder: Any, n: int, seed: int | None = None) -> list[Path]:
    """Return a random sample of up to n photographs of a folder; with the same seed, XplainCAM's sample.

    Raises:
        RuntimeError: the folder has no photographs.
    """
    found = [path for kind in ("*.JPEG", "*.jpg", "*.jpeg", "*.png") for path in Path(folder).glob(kind)]
    if not found:
        raise RuntimeError(
            f"folder {str(folder)!r} has no photographs; expected .JPEG, .jpg, .jpeg or .png files"
        )
    return random.Random(seed).sample(found, min(n, len(found)))


def load_class_index(path: Any) -> dict[int, str]:
    """Return the class names in a JSON file such as {"281": ["n02123045", "tabby"]}."""
    return {int(index): names[1] for index, names in json.loads(Path(path).read_text("utf-8")).items()}


def locate_candidate_layer(mod: nn.Module, input_shape: tuple[int, ...] = (3, 224, 224)) -> str | None:
    """Return the name of the last module whose maps are larger than one pixel, or None."""
    return last_spatial_layer(mod, input_shape)


def resolve_target_layer(model: nn.Module, user_target_layer: str | None = None) -> str:
    """Return the named layer, or by default that of `locate_candidate_layer`.

    Raises:
        ValueError: no layer returns maps.
    """
    found = user_target_layer or locate_candidate_layer(model)
    if found is None:
        raise ValueError(f"user_target_layer=None: no layer of {type(model).__name__} returns maps; name one")
    return found


def convert_to_gray(x: Tensor, percentile: float = 99) -> Tensor:  # noqa: ARG001
    """Return Σ|x| over channels, (B, 1, H, W). The percentile is ignored, as in XplainCAM."""
    return x.abs().sum(1, keepdim=True)
