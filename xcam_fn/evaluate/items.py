"""Any data set as the photographs of a run: lists, folders, data sets, and what is only read in order."""

from __future__ import annotations

import functools
import operator
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from xcam_fn.evaluate.dataset import Photograph, photographs
from xcam_fn.evaluate.mosaic import Mosaic
from xcam_fn.models.load import find_class
from xcam_fn.names import needed, type_of

Images = Sequence[Photograph] | Sequence[Mosaic]
_EXPECTED = "expected (x, label, name): an image, a class or None, and a string"
_IMAGES = (str, os.PathLike, bytes, np.ndarray, Tensor)


class Items(Sequence[Photograph]):
    """The photographs of a map-style data set, each read when it is asked for.

    Args:
        data: has a length, and an item for each number.
        photograph: an item and its number to a photograph.
        numbers: which items, in which order; None for all.
    """

    def __init__(
        self, data: Any, photograph: Callable[[Any, int], Photograph], numbers: Sequence[int] | None = None
    ) -> None:
        self.data, self._photograph = data, photograph
        self._numbers = range(len(data)) if numbers is None else numbers
        self._lock = threading.Lock()  # data sets need not be read in several threads

    def __reduce__(self) -> Any:
        return Items, (self.data, self._photograph, self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Photograph: ...
    @overload
    def __getitem__(self, index: slice) -> Items: ...
    def __getitem__(self, index: int | slice) -> Photograph | Items:
        if isinstance(index, slice):
            return self.take(self._numbers[index])
        number = int(self._numbers[index])
        try:
            with self._lock:
                item = self.data[number]
            return self._photograph(item, number)
        except TypeError:  # the data set is wrong, not one of its images
            raise
        except Exception as error:  # reading may raise anything; it is written down as the photograph's
            return Photograph(f"item {number}", error, None)

    def take(self, numbers: Sequence[int]) -> Items:
        """Those items of the data set."""
        taken = Items(self.data, self._photograph, numbers)
        taken._lock = self._lock
        return taken


def as_images(data: Any, categories: Sequence[str]) -> Images | Iterator[Photograph]:
    """The photographs of any data set.

    Args:
        data: as for `evaluate.run`.
        categories: the names of the network's classes, in order.

    Returns:
        A sequence, or, of what can only be read in order, an iterator.

    Raises:
        ValueError: there is nothing in it, or each reading would give another order.
        TypeError: it is no data set, or its items are not (x, label, name).
    """
    if isinstance(data, (str, os.PathLike)):
        return photographs(data, categories)
    if isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler):
        remedy = "a run can only be resumed in the same order; use shuffle=False"
        raise ValueError(f"photographs: the DataLoader shuffles; {remedy}")
    if isinstance(data, Mapping) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        wanted = "a list of photographs, a data set of (x, label, name), a folder or a CSV file"
        raise TypeError(f"photographs is {type_of(data)}; expected {wanted}")
    is_map = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not is_map or isinstance(data, (DataLoader, IterableDataset)):
        return _in_order(data, functools.partial(_of_triple, categories))
    if not len(data):
        raise ValueError("photographs is empty; expected at least one")
    if hasattr(data, "features") and hasattr(data, "cast_column"):
        return _of_hugging_face(data, categories)
    if isinstance(data, Items) or isinstance(data[0], (Photograph, Mosaic)):
        return data
    return Items(data, functools.partial(_of_triple, categories))


def hugging_face(path: str, categories: Sequence[str]) -> Items:
    """The photographs of a Hugging Face data set on this machine.

    Args:
        path: a folder written by `save_to_disk` of the package datasets, of a single split.
        categories: the names of the network's classes, in order.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the package is not installed, or the columns are not one of images and one of classes.
    """
    datasets = needed("datasets", f"data 'hf:{path}' needs the package datasets; pip install datasets")
    place = Path(path)
    if (place / "dataset_dict.json").is_file():
        splits = " or ".join(f"hf:{each.parent}" for each in sorted(place.glob("*/state.json")))
        raise ValueError(f"data 'hf:{path}' holds several splits; give one: {splits}")
    if not (place / "state.json").is_file():
        wanted = "a folder written by save_to_disk of the package datasets"
        raise FileNotFoundError(f"data 'hf:{path}': no data set there; expected {wanted}")
    return _of_hugging_face(datasets.load_from_disk(path), categories)


def _of_hugging_face(data: Any, categories: Sequence[str]) -> Items:
    """The items of a `datasets.Dataset`: its column of images, and of classes if there is one."""
    kinds = {name: type(feature).__name__ for name, feature in data.features.items()}
    pictures, labels = ([name for name, kind in kinds.items() if kind == k] for k in ("Image", "ClassLabel"))
    if len(pictures) != 1 or len(labels) > 1:
        remedy = "expected one Image and at most one ClassLabel; choose them with select_columns"
        raise ValueError(f"photographs: the columns are {kinds}; {remedy}")
    undecoded = type(data.features[pictures[0]])(decode=False)
    classes = class_numbers(data.features[labels[0]].names, categories) if labels else {}
    rows = data.select_columns([*pictures, *labels]).cast_column(pictures[0], undecoded)
    return Items(rows, functools.partial(_of_row, *pictures, labels[0] if labels else None, classes))


def class_numbers(names: Sequence[str], categories: Sequence[str]) -> dict[int, int]:
    """The network's classes for those of a data set: by name, or by number where there are as many.

    Args:
        names: of the data set's classes, in order.
        categories: of the network's.

    Returns:
        The network's class by the data set's; empty where the names are not known.
    """
    try:
        found = [find_class(name, categories) for name in names]
    except ValueError:
        found = []
    if len(set(found)) == len(names):
        return dict(enumerate(found))
    return {i: i for i in range(len(names))} if len(names) == len(categories) else {}


def _of_row(picture: str, label: str | None, classes: Mapping[int, int], row: Any, number: int) -> Photograph:
    """The photograph of a row of a `datasets.Dataset`."""
    stored = row[picture]
    if stored is None:
        raise ValueError(f"row {number} has no image")
    cls = classes.get(row[label]) if label else None
    name = Path(stored["path"]).name if stored["path"] else f"row {number}"
    content = stored["bytes"]
    return Photograph(name, Path(stored["path"]) if content is None else content, cls)


def _of_triple(categories: Sequence[str], item: Any, number: int) -> Photograph:
    """The photograph of an item (x, label, name)."""
    if isinstance(item, Photograph):
        return item
    if not isinstance(item, (tuple, list)) or len(item) != 3:
        many = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise TypeError(f"photographs: item {number} is {type_of(item)}{many}; {_EXPECTED}")
    x, label, name = item
    if not isinstance(name, str):
        raise TypeError(f"photographs: the name of item {number} is {type_of(name)}; {_EXPECTED}")
    if not (isinstance(x, _IMAGES) or hasattr(x, "getbands")):
        kinds = "a path, the bytes of a file, a PIL image, an array (h, w, 3), or a tensor (3, h, w)"
        raise TypeError(f"photographs: x of item {number} is {type_of(x)}; expected {kinds}")
    try:
        query = label if label is None or isinstance(label, str) else operator.index(label)
    except TypeError:
        kind = type_of(label)
        raise TypeError(f"photographs: the label of item {number} is {kind}; {_EXPECTED}") from None
    cls = None if query is None else find_class(query, categories)
    return Photograph(name, Path(x) if isinstance(x, (str, os.PathLike)) else x, cls)


def _in_order(data: Iterable[Any], photograph: Callable[[Any, int], Photograph]) -> Iterator[Photograph]:
    """The photographs of what can only be read in order, which may come in batches."""
    number, iterator = 0, iter(data)
    while True:
        try:
            found = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"photographs: the data set fails at item {number}: {words}") from error
        for number, item in enumerate(_unbatched(found), number):  # noqa: B020
            try:
                yield photograph(item, number)
            except ValueError as error:  # one label is wrong
                yield Photograph(f"item {number}", error, None)
        number += 1


def _unbatched(found: Any) -> Iterable[Any]:
    """The items of a batch: a list of items, or (images, labels, names) as a DataLoader collates them."""
    if not isinstance(found, (tuple, list)) or not found:
        return [found]
    if all(isinstance(each, (tuple, list)) and len(each) == 3 and isinstance(each[2], str) for each in found):
        return found
    is_collated = len(found) == 3 and isinstance(found[2], (tuple, list))
    return zip(*found, strict=True) if is_collated else [found]
