"""The photographs of a data set and their labels, sampled the same way each time."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from xcam_fn import checks
from xcam_fn.models.images import FORMATS
from xcam_fn.models.load import find_class

_FILE_COLUMNS = ("file", "path", "image", "filename", "photo")
_CLASS_COLUMNS = ("class", "label", "target", "category")


class Photograph(NamedTuple):
    """A photograph of a data set.

    Attributes:
        name: its path below the data set's folder, by which it is known; what is no UTF-8 in it is escaped.
        path: where it is.
        label: the index of its class, or None where it is not known.
    """

    name: str
    path: Path
    label: int | None


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
        data: a folder of photographs, a folder of one folder a class, or a CSV file of paths (below its own
            folder) and, if there are any, classes. Classes are indices or names; as many folders as there are
            classes are taken in alphabetical order.
        categories: the names of the classes, in order.
        labels: a CSV file of file names and classes, in place of what the folders say.
        num_images: how many to sample, ≥ 1; None for all. A larger sample holds the smaller one.
        seed: of the sample.

    Returns:
        The photographs, in the order of the sample, or of their names where all are wanted. Files are not
        opened.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: there is no photograph, or a CSV file cannot be read or names an unknown class.
    """
    checks.check_seed(seed)
    if num_images is not None:
        checks.check_count("num_images", num_images)
    root = Path(data)
    if root.is_dir():
        found = _of_folder(root, categories)
    elif root.is_file():
        found = _of_table(root, categories)
    else:
        raise FileNotFoundError(f"data {str(root)!r}: no such folder or CSV file; check the path")
    if labels is not None:
        found = _labeled(found, Path(labels), categories)
    if not found:
        raise ValueError(
            f"data {str(root)!r} holds no photographs; expected files such as .jpg or .png, one folder a "
            "class with such files, or a CSV file that names them"
        )
    if num_images is None or num_images >= len(found):
        return found
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[i] for i in order[:num_images]]


def _of_folder(root: Path, categories: Sequence[str]) -> list[Photograph]:
    """The photographs in a folder or, where it has none itself, in its folders, which are classes."""
    flat = _images(root)
    if flat:
        return [Photograph(_text(path.name), path, None) for path in flat]
    folders = sorted(path for path in root.iterdir() if path.is_dir() and _images(path))
    indices = _classes_of(folders, categories)
    return [
        Photograph(_text(f"{folder.name}/{path.name}"), path, index)
        for folder, index in zip(folders, indices, strict=True)
        for path in _images(folder)
    ]


def _text(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def _images(folder: Path) -> list[Path]:
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and not path.is_dir()
    )


def _classes_of(folders: list[Path], categories: Sequence[str]) -> Sequence[int | None]:
    """The class of each folder: its name or, where names say nothing, its place among all classes."""
    try:
        return [find_class(folder.name, categories) for folder in folders]
    except ValueError:
        is_complete = len(folders) == len(categories)
        return range(len(folders)) if is_complete else [None] * len(folders)


def _of_table(file: Path, categories: Sequence[str]) -> list[Photograph]:
    return [Photograph(name, file.parent / name, label) for name, label in _rows(file, categories)]


def _labeled(found: list[Photograph], file: Path, categories: Sequence[str]) -> list[Photograph]:
    """The photographs with labels by file name, or by their path below the data set's folder."""
    if not file.is_file():
        raise FileNotFoundError(f"labels {str(file)!r}: no such file; check the path")
    known = {name: label for name, label in _rows(file, categories) if label is not None}
    if not any(p.name in known or p.path.name in known for p in found):
        raise ValueError(
            f"labels {str(file)!r}: none of its {len(known)} files is among the {len(found)} photographs; "
            "expected file names in one column and classes in another"
        )
    return [p._replace(label=known.get(p.name, known.get(p.path.name))) for p in found]


def _rows(file: Path, categories: Sequence[str]) -> list[tuple[str, int | None]]:
    """The file name and the class of each row of a CSV file; without a header these are the columns."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            rows = [(line, row) for line, row in enumerate(csv.reader(opened), 1) if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{str(file)!r} is not a CSV file ({error}); expected rows of a path and a class"
        ) from None
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    name_at = next((header.index(column) for column in _FILE_COLUMNS if column in header), None)
    class_at = next((header.index(column) for column in _CLASS_COLUMNS if column in header), None)
    if name_at is None:
        name_at, class_at = 0, 1
    else:
        rows = rows[1:]
    found = []
    for line, row in rows:
        name, text = (
            row[at].strip() if at is not None and at < len(row) else "" for at in (name_at, class_at)
        )
        if not name:
            raise ValueError(f"{str(file)!r}, line {line}: there is no path; expected a path and a class")
        found.append((name, _class(file, line, text, categories) if text else None))
    return found


def _class(file: Path, line: int, text: str, categories: Sequence[str]) -> int:
    try:
        return find_class(text, categories)
    except ValueError as error:
        raise ValueError(f"{str(file)!r}, line {line}: {error}") from None
