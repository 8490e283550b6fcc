"""What a network sees of the photographs of a run, and what tells one file from another."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.ExifTags import Base
from torch import Tensor

from xcam_fn import checks
from xcam_fn.evaluate.dataset import Photograph
from xcam_fn.evaluate.mosaic import Mosaic
from xcam_fn.evaluate.store import ImageRow
from xcam_fn.methods.method import Method
from xcam_fn.metrics.mosaic import cell_masks
from xcam_fn.models import images
from xcam_fn.models.images import Preset

_PICTURE_QUALITY = 85


class Seen(NamedTuple):
    """One image of a run.

    Attributes:
        rows: what is known of it, one for each class that is explained; the reason where it is not seen.
        x: (1, 3, h, w), as the network sees it.
        region: (rows, h, w), where the object of each row is, where that is known.
    """

    rows: list[ImageRow]
    x: Tensor | None = None
    region: Tensor | None = None


def seen(photograph: Photograph | Mosaic, number: int, preset: Preset, size: tuple[int, int]) -> Seen:
    """What the network sees, or why it sees nothing.

    Args:
        photograph: one, or a mosaic of several.
        number: of the first of its rows.
        preset: how the network wants its images.
        size: (height, width) of what it sees, pixels.
    """
    if isinstance(photograph, Mosaic):
        names = [f"{photograph.name}, cell {i}: {p.name}" for i, p in enumerate(photograph.members, 1)]
        labels, look = photograph.label, _of_mosaic
    else:
        names, labels, look = [photograph.name], (photograph.label,), _of_photograph
    known = content(photograph)
    rows = [
        ImageRow(number + i, escaped(name), label, content=known)
        for i, (name, label) in enumerate(zip(names, labels, strict=True))
    ]
    try:
        x, picture, region = look(photograph, preset)
    except Exception as error:  # a data set may raise anything where an item is read
        return Seen([row._replace(error=reason(error)) for row in rows])
    if x.shape[2:] != size:
        sides = " x ".join(map(str, x.shape[2:]))
        wanted = f"{size[0]} x {size[1]}, the size of the first"
        return Seen([row._replace(error=f"x is {sides} pixels; expected {wanted}") for row in rows])
    file = encoded(picture, "JPEG", quality=_PICTURE_QUALITY)
    return Seen([row._replace(picture=file) for row in rows], x, region)


def _of_mosaic(mosaic: Any, preset: Preset) -> tuple[Tensor, np.ndarray, Tensor]:
    return *mosaic.prepared(preset), cell_masks(mosaic.n, (mosaic.side, mosaic.side))


def _of_photograph(photograph: Any, preset: Preset) -> tuple[Tensor, np.ndarray, Tensor | None]:
    if isinstance(photograph.path, Exception):
        raise photograph.path
    if isinstance(photograph.path, Tensor):
        return *as_given(photograph.path, preset), None
    loaded, region = images.load(photograph.path), None
    if photograph.region is not None:
        region = images.prepare_mask(photograph.region.drawn(loaded.size), preset)[None]
        if not region.any():
            source = photograph.region.source
            raise ValueError(f"{source}: the region is empty, or outside the network's crop of the image")
    return *images.prepare(loaded, preset), region


def as_given(x: Tensor, preset: Preset) -> tuple[Tensor, np.ndarray]:
    """A tensor as the network takes it, and the picture that the preset would have made it of."""
    if x.ndim != 3 or x.shape[0] != 3 or 0 in x.shape or not x.is_floating_point():
        shape = f"{x.dtype} of shape {tuple(x.shape)}"
        wanted = "preprocessed floats (3, h, w), or an array (h, w, 3) of uint8 to be preprocessed"
        raise ValueError(f"x is {shape}; expected {wanted}")
    x = x.detach().cpu().float()
    checks.check_tensor("x", x)
    mean, std = (torch.tensor(each)[:, None, None] for each in (preset.mean, preset.std))
    pixels = (x * std + mean).clamp(0, 1).mul(255).round().byte()
    return x[None], pixels.movedim(0, -1).numpy()


def identity(photograph: Photograph | Mosaic) -> bytes:
    """What a list says of an image: its name, its label, and where its object is or a mosaic's side."""
    if isinstance(photograph, Mosaic):
        place = str(photograph.side)
    else:
        place = "" if photograph.region is None else str(photograph.region.boxes)
    return f"{escaped(photograph.name)}\n{photograph.label}\n{place}\n".encode()


def content(photograph: Photograph | Mosaic) -> str | None:
    """What tells an image from another, by what a list says of it too; None where it cannot be read."""
    if isinstance(photograph, Mosaic):
        parts = [content(member) for member in photograph.members]
    elif isinstance(photograph.path, Exception):
        return None
    else:
        mask = None if photograph.region is None else photograph.region.mask
        parts = [*_bytes(photograph.path), *([] if mask is None else [_content(mask)])]
    if None in parts:
        return None
    return digest([identity(photograph), *parts])


def _bytes(image: Any) -> Iterator[str | bytes | None]:
    """What an image is made of, or what tells its file from others; None where that cannot be read."""
    if isinstance(image, (str, os.PathLike)):
        yield _content(Path(image))
    elif isinstance(image, bytes):
        yield image
    elif isinstance(image, Image.Image):
        yield f"{image.mode} {image.size} {image.getexif().get(Base.Orientation)}"
        yield image.tobytes()
    else:
        values = image.detach().cpu().contiguous().reshape(-1) if isinstance(image, Tensor) else image
        yield f"{values.dtype} {tuple(values.shape)}"
        yield (values.view(torch.uint8).numpy() if isinstance(values, Tensor) else values).tobytes()


def _content(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        if path.is_file():  # a pipe would be waited for
            with path.open("rb") as file:
                return hashlib.file_digest(file, "blake2b").hexdigest()[:16]
    return None


def escaped(name: str) -> str:
    """The name of a file, which need not be text, as text."""
    return name.encode(errors="backslashreplace").decode()


def described(value: Any) -> str:
    """An option's value as text, the same in every process, that tells it from others as far as that goes."""
    if isinstance(value, functools.partial):
        return f"{described(value.func)}{value.args}{described(value.keywords)}"
    if isinstance(value, Method):
        return f"{value.name}{described(value.options)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {described(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} {digest(_bytes(value))}"
    if callable(value):  # its repr holds an address
        kind = value if hasattr(value, "__qualname__") else type(value)
        return f"{kind.__module__}.{kind.__qualname__}"
    return repr(value)


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    kind = "" if isinstance(error, (ValueError, TypeError, OSError)) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


def digest(parts: Iterable[Any]) -> str:
    """What tells some bytes from others, in 16 letters."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    """The pixels as a file of that kind."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def embedded(content: bytes, kind: str) -> str:
    """The content of an image file of that kind as an address, for HTML."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
