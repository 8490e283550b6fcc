"""Where the objects of photographs are: boxes and masks, from files of a few kinds."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

import numpy as np

from xcam_fn.evaluate.dataset import Photograph
from xcam_fn.models import images
from xcam_fn.names import missing

Box = tuple[float, float, float, float]
# What entries that are not as they should be raise.
_WRONG = (ValueError, LookupError, TypeError, OverflowError)


class Region(NamedTuple):
    """Where the objects of a photograph are, in its own pixels.

    Attributes:
        source: the file and the entry that say so.
        boxes: (left, top, right, bottom) each, the last two excluded; their union counts.
        mask: an image of the photograph's size, instead of boxes; nonzero pixels are inside.
        size: (width, height) of the photograph according to the file, if it gives one.
    """

    source: str
    boxes: tuple[Box, ...] = ()
    mask: Path | None = None
    size: tuple[int, int] | None = None

    def drawn(self, size: tuple[int, int]) -> np.ndarray:
        """The region of a photograph of that width and height, (height, width), True inside.

        Raises:
            ValueError: the region is of a photograph of another size.
        """
        inside = np.zeros(size[::-1], bool) if self.mask is None else images.load_mask(self.mask)
        said = self.size if self.mask is None else inside.shape[::-1]
        if said not in (None, size):
            sizes = f"it is for {said[0]} x {said[1]} pixels, but the photograph has {size[0]} x {size[1]}"
            raise ValueError(f"{self.source}: {sizes}; expected the same size")
        for box in self.boxes:
            try:
                left, top, right, bottom = _right(box, size)
            except ValueError as error:
                raise ValueError(f"{self.source}: {error}") from None
            rows, columns = (slice(math.floor(a), math.ceil(b)) for a, b in ((top, bottom), (left, right)))
            inside[rows, columns] = True
        return inside


class Located(NamedTuple):
    """The photographs whose objects' places are known.

    Attributes:
        photographs: each with its region.
        without: how many have none.
        problems: the problems in the files, one line for each entry that is left out.
    """

    photographs: list[Photograph]
    without: int
    problems: list[str]


def located(photographs: Sequence[Photograph], source: str | os.PathLike[str]) -> Located:
    """Return the photographs with their regions from a file or folder of annotations.

    All boxes of a photograph count, whatever their class: remove boxes of classes that are not explained.

    Args:
        photographs: photographs, as from `dataset.photographs`.
        source: a COCO file (.json), a PASCAL VOC file (.xml), or a folder of VOC files or mask images, named
            like their photographs. VOC counts pixels from 1 and includes the last.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a file cannot be read at all, or no photograph has a region.
    """
    place, problems = Path(source), []
    if not place.exists():
        raise missing("boxes", place, "file or folder")
    by_name: dict[str, list[int]] = defaultdict(list)
    for i, photograph in enumerate(photographs):
        for key in {photograph.name, photograph.path.name, photograph.path.stem}:
            by_name[key].append(i)
    regions: dict[int, Region] = {}
    for name, region in _regions(place, problems):
        found = by_name.get(name) or by_name.get(Path(name).name) or by_name.get(Path(name).stem) or []
        if len(found) != 1:
            many = "no photograph" if not found else f"{len(found)} photographs"
            problems.append(f"{region.source}: {many} named {name!r}; expected one")
        elif region.boxes or region.mask:
            regions[found[0]] = region
    if not regions:
        none = f"none of the {len(photographs)} photographs has a region in it"
        wanted = "a COCO file, PASCAL VOC files, or mask images, named like the photographs"
        first = f" ({problems[0]})" if problems else ""
        raise ValueError(f"boxes {str(place)!r}: {none}{first}; expected {wanted}")
    some = [photographs[i]._replace(region=regions[i]) for i in sorted(regions)]
    return Located(some, len(photographs) - len(some), problems)


def _regions(place: Path, problems: list[str]) -> Iterator[tuple[str, Region]]:
    """The name of each photograph that a file or the files of a folder know, and its region."""
    files = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
    for file in files:
        kind = file.suffix.lower()
        try:
            if kind == ".json":
                yield from _coco(file, problems)
            elif kind == ".xml":
                yield _voc(file, problems)
            elif place.is_dir() and images.is_image_file(file):
                yield file.name, Region(str(file), mask=file)
        except (*_WRONG, RecursionError, ET.ParseError) as error:
            wanted = "COCO images and annotations" if kind == ".json" else "a PASCAL VOC annotation"
            problem = _problem(str(file), error, wanted)
            if len(files) == 1:
                raise ValueError(f"boxes {problem}") from None
            problems.append(problem)


def _coco(file: Path, problems: list[str]) -> Iterator[tuple[str, Region]]:
    content = json.loads(file.read_text(encoding="utf-8"))
    known = {image["id"]: (str(image["file_name"]), _size(image)) for image in content["images"]}
    boxes: dict[Any, list[Box]] = defaultdict(list)
    for number, each in enumerate(content["annotations"], 1):
        source = f"{file}: annotation {number}"
        try:
            left, top, width, height = map(float, each["bbox"])
            of = each["image_id"]
            box = _right((left, top, left + width, top + height), known[of][1])
        except _WRONG as error:
            problems.append(_problem(source, error, "image_id of an image, bbox [left, top, width, height]"))
        else:
            boxes[of].append(box)
    for of, some in boxes.items():
        yield known[of][0], Region(f"{file}: image {of}", tuple(some), size=known[of][1])


def _voc(file: Path, problems: list[str]) -> tuple[str, Region]:
    root, boxes = ET.parse(file).getroot(), []
    size = _size({side.tag: side.text for side in root.findall("size/*")})
    for number, each in enumerate(root.findall("object"), 1):
        try:
            at = {corner.tag: float(corner.text or "") for corner in each.findall("bndbox/*")}
            left, top = (at[tag] - 1 if at[tag] else 0.0 for tag in ("xmin", "ymin"))
            boxes.append(_right((left, top, at["xmax"], at["ymax"]), size))
        except _WRONG as error:
            problems.append(_problem(f"{file}: object {number}", error, "bndbox with xmin, ymin, xmax, ymax"))
    return file.with_suffix("").name, Region(str(file), tuple(boxes), size=size)


def _problem(source: str, error: Exception, wanted: str) -> str:
    said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return f"{source}: {' '.join(said.split())}; expected {wanted}"


def _size(sides: dict[str, Any]) -> tuple[int, int] | None:
    """What a file says of a photograph's width and height; 0 stands for what it does not know."""
    width, height = (int(sides.get(side) or 0) for side in ("width", "height"))
    return (width, height) if width and height else None


def _right(box: Box, size: tuple[int, int] | None) -> Box:
    """The box, which holds a pixel and lies in its photograph, but for one pixel that rounding may cost."""
    left, top, right, bottom = box
    width, height = size or (math.inf, math.inf)
    if math.isfinite(sum(box)) and 0 <= left < right <= width + 1 and 0 <= top < bottom <= height + 1:
        return box
    within = f" within {width} x {height} pixels" if size else ""
    shown = ", ".join(f"{edge:g}" for edge in box)
    wanted = f"left < right and top < bottom{within}"
    raise ValueError(f"the box ({shown}) is negative, empty or outside; expected {wanted}")
