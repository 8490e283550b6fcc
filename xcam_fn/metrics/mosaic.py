"""Mosaics of images of distinct classes, in which the location of each class is known."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from xcam_fn import checks
from xcam_fn.arguments import Count, Share, checked, unchecked
from xcam_fn.perturb import uniform


class Mosaics(NamedTuple):
    """Mosaics of n × n images, their cells counted row by row.

    Attributes:
        images: (M, C, nH, nW), or the requested size.
        classes: (M, n²), the class of the image in each cell; pass them to a method as `cls`.
        members: (M, n²), the index of the image in each cell.
    """

    images: Tensor
    classes: Tensor
    members: Tensor


@checked
def mosaics(
    images: Float[Tensor, "N C H W"],
    classes: Int[Tensor, " N"],
    probabilities: Float[Tensor, " N"],
    *,
    count: Count,
    n: Count = 2,
    confidence: Share = 0.5,
    size: Sequence[int] | None = None,
    seed: int = 0,
) -> Mosaics:
    """Return mosaics of images of distinct classes with confident predictions.

    The most confident images are used, as many as there are cells; if there are fewer, images repeat about
    equally often. Their positions in the mosaics are random.

    Args:
        images: (N, C, H, W), prepared images.
        classes: (N,), the class to explain for each.
        probabilities: (N,), the predicted probability of that class.
        count: number of mosaics.
        n: images per row and per column, ≥ 1.
        confidence: the minimum probability of an image; above 0.5 no other class is as probable.
        size: (height, width) to resize mosaics to, for a network with a fixed input size, multiples of n;
            None keeps the images' size, (nH, nW).
        seed: seed of the mosaics.

    Returns:
        `Mosaics(images, classes, members)`; the probabilities are `probabilities[members]`.

    Raises:
        ValueError: too few images of distinct classes are confident enough, or a value does not fit.
        TypeError: an argument has the wrong type.

    References:
        Rao et al., Towards Better Understanding Attribution Methods (arXiv:2205.10435).
    """
    checks.check_amount("count", count, count, n * n, *images.shape[1:])
    members = chosen(
        classes.tolist(), probabilities.tolist(), n=n, count=count, confidence=confidence, seed=seed
    )
    which = torch.tensor(members, device=images.device)
    tiled = torch.cat([arranged(images[each], n, size) for each in which])
    return Mosaics(tiled, classes.to(which.device)[which], which)


def arranged(images: Tensor, n: int, size: Sequence[int] | None = None) -> Tensor:
    """The mosaic (1, C, nH, nW) of n² images (n², C, H, W), or at another size."""
    rows = [torch.cat(list(row), 2) for row in images.reshape(n, n, *images.shape[1:])]
    mosaic = torch.cat(rows, 1)[None]
    if size is None:
        return mosaic
    cell_masks(n, size)  # raises if a cell's size is not an integer
    return F.interpolate(mosaic, tuple(size), mode="bilinear", antialias=True)


def cell_masks(n: int, size: Sequence[int]) -> Bool[Tensor, "cells H W"]:
    """The mask of each cell of a mosaic, (n², H, W), row by row."""
    if len(size) != 2 or any(side < 1 or side % n for side in size):
        raise ValueError(f"mosaic of size {tuple(size)}; expected height and width to be multiples of n={n}")
    rows, columns = (torch.arange(side) // (side // n) for side in size)
    return rows[:, None] * n + columns == torch.arange(n * n)[:, None, None]


def chosen(
    classes: Sequence[int],
    probabilities: Sequence[float],
    *,
    n: int,
    count: int,
    confidence: float,
    seed: int,
) -> list[list[int]]:
    """The images of the n² cells of each of `count` mosaics, chosen as `mosaics` describes."""
    pool, cells = _surest(classes, probabilities, n * n, count, confidence), n * n
    like, used, found = torch.zeros(0, dtype=torch.float64), Counter[int](), []
    for number in range(count):
        draws = unchecked(uniform)(seed, number, (len(pool),), like=like).tolist()
        drawn = sorted(range(len(pool)), key=lambda at, draws=draws: (used[at], draws[at]))
        of_class: dict[int, int] = {}
        for at in drawn:
            of_class.setdefault(classes[pool[at]], at)
        picked = list(of_class.values())[:cells]
        used.update(picked)
        found.append([pool[at] for at in sorted(picked, key=draws.__getitem__)])
    return found


def _surest(
    classes: Sequence[int], probabilities: Sequence[float], cells: int, count: int, confidence: float
) -> list[int]:
    """The most confident images, enough for all cells if there are as many, always enough for one mosaic."""
    order = sorted(range(len(classes)), key=lambda i: -probabilities[i])
    surest = {classes[i]: probabilities[i] for i in reversed(order)}  # the most confident of each class
    sure = [i for i in order if probabilities[i] >= confidence]
    if len(kinds := {classes[i] for i in sure}) < cells:
        has = f"{len(kinds)} class(es) reach it ({len(sure)} of {len(order)} images)"
        remedy = f"add images of {cells - len(surest)} more class(es)"
        if len(surest) >= cells:
            least = sorted(surest.values(), reverse=True)[cells - 1]
            remedy = f"use confidence={math.floor(least * 1000) / 1000:g}"
        raise ValueError(f"confidence={confidence:g}: {has}, but a mosaic needs {cells}; {remedy}")
    pool, kinds = [], set[int]()
    for i in sure:
        if len(pool) >= count * cells and len(kinds) >= cells:
            break
        pool.append(i)
        kinds.add(classes[i])
    return pool
