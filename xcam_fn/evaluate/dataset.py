"""The photographs of a data set and their labels, sampled the same way each time."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xcam_fn.arguments import Count, Length, check
from xcam_fn.models.images import is_image_file
from xcam_fn.models.load import find_class
from xcam_fn.names import missing

if TYPE_CHECKING:
    from xcam_fn.evaluate.regions import Region

_FILE_COLUMNS = ("file", "path", "image", "filename", "photo")
_CLASS_COLUMNS = ("class", "label", "target", "category")


class Photograph(NamedTuple):
    """A photograph of a data set.

    Attributes:
        name: its identifier, the path relative to the data set; bytes that are not UTF-8 are escaped.
        path: its path, or the image itself: anything that `images.load` takes, or a prepared tensor
            (3, h, w).
        label: the index of its class, or None if unknown.
        region: the location of its objects, from `regions.located`, or None if unknown.
    """

    name: str
    path: Any
    label: int | None
    region: Region | None = None


def photographs(
    data: str | os.PathLike[str],
    categories: Sequence[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    num_images: int | None = None,
    seed: int = 0,
) -> list[Photograph]:
    """The photographs of a data set, or a sample of them.

    Args:
        data: a folder of photographs, a folder with one folder per class, or a CSV file of paths (relative to
            its folder) and, optionally, classes. Classes are indices or names; if there are as many folders
            as classes, they are matched in alphabetical order.
        categories: the names of the classes, in order.
        labels: a CSV file of file names and classes, used instead of the folders.
        num_images: number of photographs to sample, ≥ 1; None for all. A larger sample contains a smaller
            one.
        seed: seed of the sample.

    Returns:
        The photographs, in the order of the sample, or sorted by name if all are used. Files are not opened.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: there is no photograph, or a CSV file cannot be read or names an unknown class.
    """
    check("seed", seed, Length)
    check("num_images", num_images, Count | None)
    root = Path(data)
    if not (root.is_dir() or root.is_file()):
        raise missing("data", root, "folder or CSV file")
    found = _of_folder(root, categories) if root.is_dir() else _rows(root, categories)
    if labels is not None:
        found = _labeled(found, Path(labels), categories)
    if not found:
        wanted = "files such as .jpg or .png, one folder of them per class, or a CSV file of them"
        raise ValueError(f"data {str(root)!r} holds no photographs; expected {wanted}")
    return sampled(found, num_images, seed)


def sampled(found: Any, num_images: int | None, seed: int) -> Any:
    """A sample of a list of photographs or of `Items`, in its order; all where no more are there."""
    check("seed", seed, Length)
    if num_images is None or num_images >= len(found):
        return found
    order = np.random.default_rng(seed).permutation(len(found))[:num_images].tolist()
    return [found[i] for i in order] if isinstance(found, list) else found.take(order)


def _of_folder(root: Path, categories: Sequence[str]) -> list[Photograph]:
    """The photographs in a folder or, where it has none itself, in its folders, which are classes."""
    if flat := _images(root):
        return [Photograph(path.name, path, None) for path in flat]
    folders = {path: files for path in sorted(root.iterdir()) if path.is_dir() and (files := _images(path))}
    try:
        classes: Sequence[int | None] = [find_class(folder.name, categories) for folder in folders]
    except ValueError:  # the names say nothing: the place among all classes does, where all are there
        classes = range(len(folders)) if len(folders) == len(categories) else [None] * len(folders)
    return [
        Photograph(f"{folder.name}/{path.name}", path, index)
        for (folder, files), index in zip(folders.items(), classes, strict=True)
        for path in files
    ]


def _images(folder: Path) -> list[Path]:
    named = (path for path in folder.iterdir() if is_image_file(path))
    return sorted(path for path in named if not path.name.startswith(".") and not path.is_dir())


def _labeled(found: list[Photograph], file: Path, categories: Sequence[str]) -> list[Photograph]:
    """The photographs with labels by file name, or by their path below the data set's folder."""
    if not file.is_file():
        raise missing("labels", file, "file")
    known: dict[str, int] = {}
    for row in _rows(file, categories):
        if row.label is not None and known.setdefault(row.name, row.label) != row.label:
            both = f"{row.name!r} has classes {known[row.name]} and {row.label}"
            raise ValueError(f"labels {str(file)!r}: {both}; expected one")
    alike = Counter(p.path.name for p in found if p.name not in known)
    for name in known:
        if alike[name] > 1:
            such = next(p.name for p in found if p.path.name == name)
            remedy = f"name their paths below the data set, such as {such!r}"
            raise ValueError(f"labels {str(file)!r}: {alike[name]} photographs are named {name!r}; {remedy}")
    if not any(p.name in known or p.path.name in known for p in found):
        none = f"none of its {len(known)} files is among the {len(found)} photographs"
        raise ValueError(f"labels {str(file)!r}: {none}; expected columns of file names and classes")
    return [p._replace(label=known.get(p.name, known.get(p.path.name))) for p in found]


def _rows(file: Path, categories: Sequence[str]) -> list[Photograph]:
    """What each row of a CSV file names; without a header the columns are the path and the class."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            rows = [(line, row) for line, row in enumerate(csv.reader(opened), 1) if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        wanted = "expected rows of a path and a class"
        raise ValueError(f"{str(file)!r} is not a CSV file ({error}); {wanted}") from None
    first = rows[0][1] if rows else []
    other = {";", "\t"} & set(first[0]) if len(first) == 1 else set()
    if other and not (file.parent / first[0]).exists():
        raise ValueError(f"{str(file)!r}: its columns are separated by {other.pop()!r}; expected commas")
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    columns = [
        next((header.index(c) for c in of if c in header), None) for of in (_FILE_COLUMNS, _CLASS_COLUMNS)
    ]
    rows, columns = (rows, [0, 1]) if columns[0] is None else (rows[1:], columns)
    found = []
    for line, row in rows:
        name, text = (row[at].strip() if at is not None and at < len(row) else "" for at in columns)
        if not name:
            raise ValueError(f"{str(file)!r}, line {line}: the path is missing; expected a path and a class")
        try:
            found.append(Photograph(name, file.parent / name, find_class(text, categories) if text else None))
        except ValueError as error:
            raise ValueError(f"{str(file)!r}, line {line}: {error}") from None
    return found
