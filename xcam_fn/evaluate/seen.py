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
    row, region = ImageRow(number, photograph.name, content=content(photograph)), None
    if isinstance(photograph, Mosaic):
        names = [f"{photograph.name}, cell {i}: {p.name}" for i, p in enumerate(photograph.members, 1)]
        labels, prepare = photograph.label, photograph.prepared
        region = cell_masks(photograph.n, (photograph.side, photograph.side))
    else:
        names, labels = [photograph.name], (photograph.label,)
        prepare = lambda preset: images.prepare(photograph.path, preset)  # noqa: E731
    rows = [
        row._replace(number=number + i, name=name, label=label)
        for i, (name, label) in enumerate(zip(names, labels, strict=True))
    ]
    try:
        x, picture = prepare(preset)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        return Seen([row._replace(error=reason) for row in rows])
    file = encoded(picture, "JPEG", quality=_PICTURE_QUALITY)
    return Seen([row._replace(picture=file) for row in rows], x, region)


def content(photograph: Photograph | Mosaic) -> str | None:
    """What tells a file's content from another; None where there is no file that can be read."""
    if isinstance(photograph, Mosaic):
        parts = [content(member) for member in photograph.members]
        return None if None in parts else digest(str(part).encode() for part in parts)
    return _content(photograph.path)


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
