"""Pictures and maps as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xcam_fn.maps import resize
from xcam_fn.names import needed

_JET = 2  # cv2.COLORMAP_JET


def opencv() -> Any:
    """Return the optional module cv2, needed for the same colors as theirs."""
    remedy = "pip install opencv-python-headless, or draw with xcam_fn.plot"
    return needed("cv2", f"OpenCV is not installed; {remedy}")


def preprocess_image(img: np.ndarray, mean: Any = (0.5,) * 3, std: Any = (0.5,) * 3) -> Tensor:
    """Normalize a picture (h, w, C), uint8 or in [0, 1], as a batch of one, (1, C, h, w)."""
    from torchvision.transforms import functional as F  # noqa: PLC0415 (slow to import)

    return F.normalize(F.to_tensor(img.copy()), list(mean), list(std))[None]


def deprocess_image(img: np.ndarray) -> np.ndarray:
    """Show any values as a picture, uint8: the mean is gray, a standard deviation a tenth of the range."""
    values = (img - img.mean()) / (img.std() + 1e-5) * 0.1 + 0.5
    return (values.clip(0, 1) * 255).astype(np.uint8)


def show_cam_on_image(
    img: np.ndarray, mask: np.ndarray, use_rgb: bool = False, colormap: int = _JET, image_weight: float = 0.5
) -> np.ndarray:
    """Overlay a map (h, w), in one of OpenCV's colormaps, on a picture (h, w, 3) in [0, 1]; uint8."""
    if not (img.max() <= 1 and 0 <= image_weight <= 1):
        given = f"img reaches {img.max()}, image_weight={image_weight}"
        raise ValueError(f"{given}; expected img in [0, 1] (img / 255) and image_weight from 0 to 1")
    colors = opencv().applyColorMap((255 * mask).astype(np.uint8), colormap)
    colors = (colors[..., ::-1] if use_rgb else colors).astype(np.float32) / 255
    shown = (1 - image_weight) * colors + image_weight * img
    return (255 * (shown / shown.max())).astype(np.uint8)


def scale_cam_image(cam: Any, target_size: Sequence[int] | None = None) -> np.ndarray:
    """Scale each map (B, *spatial) to [0, 1], then resize it to target_size, in pixels, last axis first."""
    shifted = [one - np.min(one) for one in cam]
    maps = np.array([one / (1e-7 + np.max(one)) for one in shifted], np.float32)
    size = maps.shape[1:] if target_size is None else tuple(target_size)[::-1]
    if len(size) == 2:
        return resize(torch.from_numpy(maps), size).numpy()
    from scipy.ndimage import zoom  # noqa: PLC0415 (slow to import)

    factors = [1, *(to / own for own, to in zip(maps.shape[1:], size, strict=True))]
    return maps if target_size is None else np.asarray(zoom(maps, factors))


def scale_accross_batch_and_channels(tensor: np.ndarray, target_size: Sequence[int]) -> np.ndarray:
    """Scale each map of (B, K, *spatial) with `scale_cam_image`."""
    found = scale_cam_image(tensor.reshape(-1, *tensor.shape[2:]), target_size)
    return found.reshape(*tensor.shape[:2], *found.shape[1:])


def show_factorization_on_image(
    img: np.ndarray,
    explanations: np.ndarray,
    colors: Any = None,
    image_weight: float = 0.5,
    concept_labels: Sequence[str] | None = None,
) -> np.ndarray:
    """Overlay each pixel's strongest concept, of (n, h, w), on a picture (h, w, 3) in [0, 1]; uint8."""
    from matplotlib import colormaps  # noqa: PLC0415 (slow to import)

    if concept_labels is not None:
        raise ValueError("concept_labels is not supported; xcam_fn.plot.concepts draws concepts with names")
    cv2, count = opencv(), len(explanations)
    colors = colormaps["gist_rainbow"](np.arange(count) / count) if colors is None else np.stack(colors)
    wheel = cv2.cvtColor((colors[None, :, :3] * 255).astype(np.uint8), cv2.COLOR_RGB2HSV)[0]
    shown = wheel[explanations.argmax(0)]
    shown[..., 2] = (255 * explanations.max(0)).astype(np.uint8)
    shown = cv2.cvtColor(shown, cv2.COLOR_HSV2RGB).astype(np.float32) / 255
    return ((img * image_weight + shown * (1 - image_weight)) * 255).astype(np.uint8)
