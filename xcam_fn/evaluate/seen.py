"""What a network sees of the photographs of a run, and what tells one file from another."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from xcam_fn.evaluate.dataset import Photograph
from xcam_fn.evaluate.mosaic import Mosaic
from xcam_fn.evaluate.store import ImageRow
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


def seen(photograph: Photograph | Mosaic, number: int, preset: Preset) -> Seen:
    """What the network sees, or why it sees nothing.

    Args:
        photograph: one, or a mosaic of several.
        number: of the first of its rows.
        preset: how the network wants its images.
    """
    if isinstance(photograph, Mosaic):
        names = [f"{photograph.name}, cell {i}: {p.name}" for i, p in enumerate(photograph.members, 1)]
        labels, look = photograph.label, _of_mosaic
    else:
        names, labels, look = [photograph.name], (photograph.label,), _of_photograph
    known = content(photograph)
    rows = [
        ImageRow(number + i, name, label, content=known)
        for i, (name, label) in enumerate(zip(names, labels, strict=True))
    ]
    try:
        x, picture, region = look(photograph, preset)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        return Seen([row._replace(error=reason) for row in rows])
    file = encoded(picture, "JPEG", quality=_PICTURE_QUALITY)
    return Seen([row._replace(picture=file) for row in rows], x, region)


def _of_mosaic(mosaic: Any, preset: Preset) -> tuple[Tensor, np.ndarray, Tensor]:
    return *mosaic.prepared(preset), cell_masks(mosaic.n, (mosaic.side, mosaic.side))


def _of_photograph(photograph: Any, preset: Preset) -> tuple[Tensor, np.ndarray, Tensor | None]:
    loaded, region = images.load(photograph.path), None
    if photograph.region is not None:
        region = images.prepare_mask(photograph.region.drawn(loaded.size), preset)[None]
        if not region.any():
            source = photograph.region.source
            raise ValueError(f"{source}: the region is empty, or outside of what the network sees of it")
    return *images.prepare(loaded, preset), region


def content(photograph: Photograph | Mosaic) -> str | None:
    """What tells a file's content from another; None where there is no file that can be read."""
    if isinstance(photograph, Mosaic):
        parts = [content(member) for member in photograph.members]
        return None if None in parts else digest(str(part).encode() for part in parts)
    mask = None if photograph.region is None else photograph.region.mask
    found = _content(photograph.path)
    return found if mask is None or found is None else digest([found.encode(), str(_content(mask)).encode()])


def _content(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        if path.is_file():  # a pipe would be waited for
            with path.open("rb") as file:
                return hashlib.file_digest(file, "blake2b").hexdigest()[:16]
    return None


def digest(parts: Iterable[Any]) -> str:
    """What tells some bytes from others, in 16 letters."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    """The pixels as a file of that kind."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()
