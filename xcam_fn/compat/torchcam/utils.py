"""TorchCAM's `overlay_mask`."""

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Colormap
from PIL import Image


def overlay_mask(
    img: Image.Image, mask: Image.Image, colormap: Colormap | str = "jet", alpha: float = 0.7
) -> Image.Image:
    """The picture with the colored mask over it.

    Args:
        img: the picture, gray or RGB.
        mask: the heatmap as a gray picture, resized to the picture and squared before it is colored.
        colormap: matplotlib's, or its name.
        alpha: the picture's share, in [0, 1); the mask has the rest.

    Raises:
        TypeError: img or mask is no picture of Pillow's.
        ValueError: alpha is no float in [0, 1), or img has other bands.
    """
    if not isinstance(img, Image.Image) or not isinstance(mask, Image.Image):
        kinds = f"{type(img).__name__} and {type(mask).__name__}"
        raise TypeError(f"img and mask arguments need to be PIL.Image, and are {kinds}")
    if not isinstance(alpha, float) or not 0 <= alpha < 1:
        raise ValueError(f"alpha argument is expected to be of type float between 0 and 1, and is {alpha!r}")
    if len(img.getbands()) not in (1, 3):
        raise ValueError(f"img argument needs to be a grayscale or RGB image, and is {img.mode}")
    if len(mask.getbands()) != 1:
        raise ValueError(f"mask argument needs to be a grayscale image, and is {mask.mode}")
    relevance = np.asarray(mask.resize(img.size, resample=Image.Resampling.BICUBIC))
    colors = Image.fromarray(mpl.colormaps.get_cmap(colormap)(relevance**2, bytes=True)[..., :3])
    bands = np.asarray(img).astype(np.uint8)  # as they are, whatever they mean
    picture = Image.fromarray(bands if bands.ndim == 3 else np.stack([bands] * 3, -1))
    return Image.blend(colors, picture, alpha)
