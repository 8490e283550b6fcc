"""Photographs of any kind, read and prepared as a network expects them."""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from xcam_fn import checks
from xcam_fn.arguments import check, hints_of
from xcam_fn.names import check_file

Source = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

# What decodes pixels, and nothing that runs another program (EPS) or is fetched from elsewhere.
_WANTED = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")
FORMATS = [name for name in _WANTED if name in set(Image.registered_extensions().values())]

# As torchvision names them, and as it resizes PIL images.
_FILTERS = {each.name.lower(): each for each in Image.Resampling}
_FILTERS["nearest-exact"] = Image.Resampling.NEAREST

_EXPECTED = "a path, the bytes of a file, a PIL image, or an array (h, w), (h, w, 1), (h, w, 3) or (h, w, 4)"
_LONGEST_RATIO = 32
_LONGEST_SIDE = 2**15  # PIL counts bytes of an image in 32 bits
_ROUNDING = 1e-4


class Preset(NamedTuple):
    """The preprocessing of a network's images.

    Attributes:
        crop: side of the square that the network takes, pixels.
        resize: length of the shorter side before the center crop, or (height, width), pixels.
        mean: subtracted from each channel, in units of [0, 1].
        std: divides each channel after that.
        interpolation: "bilinear", "bicubic" or another of torchvision's names.
    """

    crop: int
    resize: int | tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bilinear"


def example() -> Path:
    """Return the path of a photograph of a cat, which the extra `demo` brings (scikit-image's, CC0).

    Raises:
        ValueError: scikit-image is not installed.
    """
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise ValueError('the example photograph needs scikit-image; pip install "xcam-fn[demo]"')
    return Path(found.origin).parent / "data" / "chelsea.png"


def load(image: Source) -> Image.Image:
    """Return the image in RGB, with its EXIF orientation applied and transparent parts over white.

    Args:
        image: a path, the bytes of a file, a PIL image of any mode, or an array (h, w), (h, w, 1), (h, w, 3)
            or (h, w, 4) of bool, uint8, uint16 or of floats in [0, 1]. 16-bit values are scaled, not clipped.
            Files must be in one of `FORMATS`.

    Returns:
        A PIL image of mode "RGB"; the argument is unchanged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, is truncated or is too large, or values are out of range.
        TypeError: `image` is none of the above.
    """
    if isinstance(image, bytes):
        named = f"image of {len(image)} bytes"
        return _to_rgb(_decoded(io.BytesIO(image), named), named)
    if isinstance(image, (str, os.PathLike)):
        return _to_rgb(_read(Path(image)), f"image {str(image)!r}")
    if isinstance(image, np.ndarray):
        image = _from_array(image, "image")
    if not isinstance(image, Image.Image):
        raise TypeError(f"image must be {_EXPECTED}, got {type(image).__name__}")
    if 0 in image.size:
        raise ValueError(f"image is {image.width} x {image.height} pixels; expected at least one pixel")
    return _to_rgb(ImageOps.exif_transpose(image), "image")


def prepare(image: Source, preset: Preset) -> tuple[Float32[Tensor, "1 3 h w"], UInt8[np.ndarray, "h w 3"]]:
    """Return the network's input and the same image as pixels.

    Args:
        image: as for `load`.
        preset: the network's preprocessing, such as `models.load(name).preset`.

    Returns:
        (x, picture): the normalized batch of one, (1, 3, h, w), and its pixels, (h, w, 3).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, or the preset contradicts itself.
        TypeError: `image` is not of a kind that `load` takes.
    """
    for key, hint in hints_of(Preset).items():
        check(f"preset.{key}", getattr(preset, key, None), hint)
    sides = [preset.resize] if isinstance(preset.resize, int) else list(preset.resize)
    if not (0 < preset.crop <= min(sides) and max(sides) <= _LONGEST_SIDE):
        sizes = f"crop={preset.crop} with resize={preset.resize}"
        wanted = f"0 < crop ≤ resize ≤ {_LONGEST_SIDE}, so that no black padding is added"
        raise ValueError(f"preset: {sizes}; expected {wanted}")
    checks.check_choice("preset: interpolation", preset.interpolation, tuple(_FILTERS))
    picture = _framed(load(image), preset, preset.interpolation)
    pixels = torch.from_numpy(picture).permute(2, 0, 1).float().div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preset.mean, preset.std))
    return pixels.sub(mean).div(std)[None].contiguous(), picture


def prepare_mask(mask: Bool[np.ndarray, "h w"], preset: Preset) -> Bool[Tensor, "crop crop"]:
    """Return a mask, resized and cropped as `prepare` does with the image.

    Args:
        mask: (h, w), of the image's original size.
        preset: the network's preprocessing.

    Returns:
        True where at least half of a pixel is inside.
    """
    framed = _framed(Image.fromarray(mask.astype(np.uint8) * 255), preset, "bilinear")
    return torch.from_numpy(framed >= 128)


def load_mask(path: Path) -> Bool[np.ndarray, "h w"]:
    """Return where a mask image of any mode is nonzero; for a palette image, the index counts.

    Raises:
        ValueError: the file is no image, or cannot be read.
    """
    image = _read(path)
    values = np.asarray(image.convert("RGB") if len(image.getbands()) > 1 else image)
    return (values != 0).reshape(*values.shape[:2], -1).any(-1)


def is_image_file(path: Path) -> bool:
    """Whether the name of a file is that of an image of a known format."""
    return Image.registered_extensions().get(path.suffix.lower()) in FORMATS


def _framed(image: Image.Image, preset: Preset, interpolation: str) -> np.ndarray:
    """The square of an image that the network sees."""
    # Of a strip the middle: the rest is cropped away anyway, and resizing it could take any memory.
    shorter = min(image.size)
    middle = _center(image, *(min(side, _LONGEST_RATIO * shorter) for side in image.size))
    if isinstance(preset.resize, int):
        width, height = (preset.resize * side // shorter for side in middle.size)
    else:
        height, width = preset.resize
    resized = middle.resize((width, height), _FILTERS[interpolation])
    return np.array(_center(resized, preset.crop, preset.crop))


def _center(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of an image that is as large or larger."""
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def shares_of_white(values: np.ndarray, argument: str, remedy: str) -> Float64[np.ndarray, "..."]:
    """The values of pixels, of any type whose range is known, in [0, 1]."""
    if values.dtype in (np.uint8, np.uint16):
        return values / np.iinfo(values.dtype).max
    if values.dtype.kind not in "fb":
        kinds = "bool, uint8, uint16 or floats in [0, 1]; image.astype(np.uint8) if values are 0 to 255"
        raise ValueError(f"{argument} has dtype {values.dtype} of unknown range; expected {kinds}")
    return unit_floats(values, argument, remedy)


def unit_floats(values: np.ndarray, argument: str, remedy: str) -> Float64[np.ndarray, "..."]:
    """The values, which may be outside [0, 1] by rounding only, within it."""
    if not np.isfinite(values).all():
        raise checks.not_finite(argument)
    if values.min() < -_ROUNDING or values.max() > 1 + _ROUNDING:
        ends = f"{values.min():.4g} to {values.max():.4g}"
        raise ValueError(f"{argument} has values from {ends}; expected [0, 1] ({remedy})")
    return values.astype(np.float64).clip(0, 1)


def _read(path: Path) -> Image.Image:
    """The image of a file as Pillow decodes it, upright."""
    check_file("image", path, "an image file")
    return _decoded(path, f"image {str(path)!r}")


def _decoded(file: Path | io.BytesIO, named: str) -> Image.Image:
    """The same of an open file."""
    try:
        with Image.open(file, formats=FORMATS) as opened:
            opened.load()
            return ImageOps.exif_transpose(opened)
    except (PermissionError, MemoryError):
        raise
    except (UnidentifiedImageError, ImportError):  # the latter where ultralytics stands in Pillow's place
        known = f"{', '.join(FORMATS)}, with 8 bits per channel, or gray with 16 bits or floats"
        raise ValueError(f"{named} is not an image file of a supported format; expected {known}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{named} is too large: {error}; make it smaller first") from None
    except Exception as error:  # a broken file makes Pillow's decoders raise almost anything
        raise ValueError(f"{named} is damaged or truncated: {error}; copy it again") from error


def _to_rgb(image: Image.Image, argument: str) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in {"I", "F"}:
        values = np.asarray(image)
        deep = values.astype(np.uint16)  # mode "I" holds 16-bit files as 32-bit integers
        is_unclear = image.mode == "I" and 0 < values.max() <= 255  # it may as well hold files of 8 bits
        if values.dtype.kind != "f" and np.array_equal(deep, values) and not is_unclear:
            values = deep
        image = _from_array(values, argument)
    if image.has_transparency_data:
        over_white = Image.new("RGBA", image.size, "white")
        over_white.alpha_composite(image.convert("RGBA"))
        image = over_white
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _from_array(values: np.ndarray, argument: str) -> Image.Image:
    if values.ndim not in (2, 3) or values.shape[2:] not in {(), (1,), (3,), (4,)}:
        wanted = "(h, w), (h, w, 1), (h, w, 3) or (h, w, 4)"
        remedy = "np.moveaxis(image, 0, -1) moves channels last"
        raise ValueError(f"{argument} has shape {values.shape}; expected {wanted} ({remedy})")
    if values.size == 0:
        raise ValueError(f"{argument} has shape {values.shape}; expected at least one pixel")
    values = values[..., 0] if values.shape[2:] == (1,) else values
    if values.dtype != np.uint8:
        remedy = "divide by 255, or undo the normalization"
        values = np.round(shares_of_white(values, argument, remedy) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values))
