"""Where a layer's output lies on the image, measured: patches are changed, and what answers is found."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xcam_fn.network.calls import Key, ModuleCall, features_of, run_changed
from xcam_fn.perturb import normal
from xcam_fn.torch_state import is_readable, is_wrapped, outside_transforms

Grid = tuple[int, ...]

# The patches that are changed, as shares of each axis: no two in one row and column, others where axes are
# exchanged, and inside of one cell of every grid up to 32.
_PATCHES = ((0.118, 0.294, 0.706), (0.294, 0.882, 0.118), (0.882, 0.706, 0.882))
_ENOUGH = 0.8  # of the largest answer to a patch, for a position to be the patch's own
_SLOPE = 0.3  # of the centers of answers over the patches' places, for maps to lie as the image does
_LEAST = 0.01  # by which that answer's share has to exceed the one of a position that answers to all alike


class Place(NamedTuple):
    """How positions in a row lie on the image: how many stand before, their grid, if columns come first."""

    prefix: int
    grid: Grid
    turned: bool


class Probe:
    """A network's answers to three changed patches of an image, from a forward that is run when first asked.

    Args:
        root: the network; it is only read.
        x: (B, C, *size), of which the first image is changed.
    """

    def __init__(self, root: nn.Module, x: Tensor) -> None:
        self.root, self.x, self.size = root, x, tuple(x.shape[2:])

    @functools.cached_property
    def _shares(self) -> dict[tuple[str, int, bool], Tensor]:
        """By call and layout (channels last), the share of each position's answers to each patch, (3, T)."""
        if is_wrapped(next(iter(self.root.parameters()), self.x.new_zeros(()))):
            return {}  # under vmap over models nothing can be read
        with outside_transforms(), torch.no_grad():
            images = _changed(self.x[:1].detach() if is_readable(self.x) else made_up(self.x))
            for batches in ([images], list(images.split(1))):  # it may take one image at a time
                with contextlib.suppress(ValueError, TypeError):
                    return _measured(self.root, batches)
        return {}

    def tokens(self, call: ModuleCall) -> Place | None:
        """How a call's output (B, T, K) lies on the image; None where it does not, or not in order."""
        shares = self._shares.get((*call.key, True))
        if shares is None:
            return None
        for grid in _grids(call.shape[1], self.size):
            starts = torch.arange(call.shape[1] - math.prod(grid) + 1)
            for turned in (False, True):
                fits = _fits(shares, grid, starts, turned=turned)
                if fits.max() >= _ENOUGH:
                    return Place(int(fits.argmax()), grid, turned)
        return None

    def moves(self, call: ModuleCall) -> bool:
        """Whether a call's output depends on the image, as far as that could be measured."""
        found = [shares for key, shares in self._shares.items() if key[:2] == call.key]
        return not found or any(bool(shares.any()) for shares in found)

    def is_last(self, call: ModuleCall) -> bool:
        """Whether a call's maps lie on the image better with their channels last than first."""
        found = {last: self._shares.get((*call.key, last)) for last in (False, True)}
        grids = {False: call.shape[2:], True: call.shape[1:-1]}
        slopes = {k: -1.0 if s is None else _slope(s, grids[k], turned=False) for k, s in found.items()}
        return slopes[True] > slopes[False]

    def maps(self, call: ModuleCall, grid: Grid, *, is_last: bool) -> Place | None:
        """How maps of a grid lie on the image, their channels first or last; None where they do not.

        What could not be measured, as of a network that takes these images alone, is taken as it is.
        """
        shares = self._shares.get((*call.key, is_last))
        if shares is None:
            return Place(0, grid, turned=False)
        for turned in (False, True):
            own = grid[::-1] if turned else grid
            fits = _fits(shares, own, torch.zeros(1, dtype=torch.int64), turned=turned).max() >= _ENOUGH
            if fits or _slope(shares, grid, turned=turned) > _SLOPE:
                return Place(0, own, turned)
        return None


def made_up(like: Tensor) -> Tensor:
    """One image of numbers, in the place of one whose values cannot be read."""
    shape = (1, *map(int, like.shape[1:]))
    count = torch.Size(shape).numel()
    return torch.linspace(-1, 1, count, dtype=like.dtype, device=like.device).reshape(shape)


def _changed(image: Tensor) -> Tensor:
    """The image three times, (3, C, *size), noise added to another patch of each."""
    noise = normal(0, 0, tuple(image.shape[1:]), like=image) * 4 * (float(image.std()) or 1.0)
    images = []
    for patch in _PATCHES:
        mask = torch.zeros(image.shape[2:], dtype=image.dtype, device=image.device)
        sides = [max(1, length // 64) for length in mask.shape]
        starts = [
            int(p * length) - side // 2 for p, length, side in zip(patch, mask.shape, sides, strict=False)
        ]
        mask[tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))] = 1
        images.append(image + mask * noise)
    return torch.cat(images)


def _measured(root: nn.Module, batches: list[Tensor]) -> dict[tuple[str, int, bool], Tensor]:
    rows = sum(map(len, batches))
    seen: dict[Key, list[Tensor]] = {}
    found: dict[tuple[str, int, bool], Tensor] = {}

    def see(call: ModuleCall, output: Any) -> None:
        values = features_of(output)
        if values is None or values.ndim < 3 or len(values) != rows // len(batches):
            return
        parts = seen.setdefault(call.key, [])
        parts.append(values.clone() if len(batches) > 1 else values)
        if len(parts) == len(batches):
            values = torch.cat(seen.pop(call.key))
            for is_last in (True, False) if values.ndim > 3 else (True,):
                found[*call.key, is_last] = _shares_of(values if is_last else values.movedim(1, -1))

    for batch in batches:
        run_changed(root, batch, see=see)
    return found


def _shares_of(values: Tensor) -> Tensor:
    """What share of each position's answers is to each patch, (3, T), for values (3, ..., K).

    Answers are counted in those of all positions to the patch, as one patch may stand out more than another.
    """
    one, two, three = values.flatten(1, -2).float()
    near, far, across = ((a - b).norm(dim=-1) for a, b in ((one, two), (one, three), (two, three)))
    answers = torch.stack([near + far - across, near + across - far, far + across - near]).clamp(min=0)
    tiny = torch.finfo(answers.dtype).tiny
    answers = answers / answers.mean(1, keepdim=True).clamp(min=tiny)
    return (answers / answers.sum(0).clamp(min=tiny)).cpu()


def _slope(shares: Tensor, grid: Grid, *, turned: bool) -> float:
    """How far the centers of what answers to the patches move with them, along the axis where they do least.

    A convolution that sees much of the input answers to a patch in many places around the patch's own.
    """
    above = (shares - 1 / 3).clamp(min=0).reshape(3, *grid)
    slopes = []
    for axis, length in enumerate(grid):
        along = above.movedim(axis + 1, 1).reshape(3, length, -1).sum(2)
        middles = (torch.arange(length) + 0.5) / length
        center = (along * middles).sum(1) / along.sum(1).clamp(min=torch.finfo(along.dtype).tiny)
        patch = torch.tensor([one[len(grid) - 1 - axis if turned else axis] for one in _PATCHES])
        patch = patch - patch.mean()
        slopes.append(float((center * patch).sum() / patch.square().sum()) if length > 1 else 1.0)
    return min(slopes)


def _fits(shares: Tensor, grid: Grid, starts: Tensor, *, turned: bool) -> Tensor:
    """How far the positions that a grid has at the patches answer to them, at most 1, for each start."""
    # More than by chance, and than most positions do: where all answer alike, no one is a patch's own.
    usual = shares.median(1, keepdim=True).values.clamp(min=1 / 3)
    above = (shares - usual) / (shares.amax(1, keepdim=True) - usual).clamp(min=_LEAST)
    order = range(len(grid))[:: -1 if turned else 1]
    found = []
    for row, patch in zip(above, _PATCHES, strict=True):
        position = 0
        for axis in order:
            position = position * grid[axis] + int(patch[axis] * grid[axis])
        found.append(row[starts + position])
    return torch.stack(found).amin(0)


@functools.lru_cache(maxsize=64)
def _grids(count: int, size: Grid) -> list[Grid]:
    """The grids of half to all of so many tokens that have the image's proportions, the largest first."""
    *depth, height, width = size
    found = [
        (first, rows, columns)
        for first in range(1, max([1, *depth]) + 1)
        for rows in range(1, min(height, count // first) + 1)
        for columns in {math.floor(rows * width / height), math.ceil(rows * width / height)}
        if 0 < columns <= width and rows * columns > 1 and count <= 2 * first * rows * columns <= 2 * count
    ]
    found.sort(key=lambda grid: (-math.prod(grid), grid))
    return [grid[0 if depth else 1 :] for grid in found]
