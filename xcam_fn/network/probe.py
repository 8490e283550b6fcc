"""Measures where a layer's output lies on the image: changes patches, and finds what responds."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xcam_fn.network.calls import Key, ModuleCall, features_of, run_changed
from xcam_fn.perturb import normal
from xcam_fn.torch_state import Convolution, is_readable, is_wrapped, outside_transforms

Grid = tuple[int, ...]
_TINY = torch.finfo(torch.float32).tiny

# The changed patches, as fractions of each axis: no two share a row or column, swapping axes gives other
# patches, and each lies inside one cell of every grid up to 32.
_PATCHES = ((0.118, 0.294, 0.706), (0.294, 0.882, 0.118), (0.882, 0.706, 0.882))
_ENOUGH = 0.8  # share of the largest response to a patch that makes a position the patch's own
_SETTLED = 0.4  # the same, if an earlier call has settled the layout
_SLOPE = 0.3  # least slope of response centers against patch positions, for maps to lie as the image does
_LEAST = 0.01  # excess of a response's share over that of a position that responds to all patches alike
_STANDS_OUT = 2.0  # how much more a patch's own position responds than others, for three axes or frames
# The orders in which the axes of a grid may be flattened into a row, slowest first.
_ORDERS: dict[int, tuple[Grid, ...]] = {1: ((0,),), 2: ((0, 1), (1, 0)), 3: ((0, 1, 2), (2, 1, 0), (1, 2, 0))}
_Key = tuple[str, int, bool]  # a call, and whether its last axis is taken as the channels
_SINGLE = 2  # this many calls are measured one by one, each in its own forward; then all others in one


class Place(NamedTuple):
    """How a row of tokens lies on the image: number of prefix tokens, grid, and axes, slowest first."""

    prefix: int
    grid: Grid
    order: Grid

    @property
    def turned(self) -> bool:
        """Whether columns come before rows."""
        return self.order[-1] < self.order[0]


class Fold(NamedTuple):
    """Frames folded into the batch axis: the number per clip, and whether clips follow one another."""

    frames: int
    by_clip: bool


class _Found(NamedTuple):
    """The responses to the changed patches.

    Attributes:
        answers: how much each position of a call responds to each patch, (3, T), with mean 1.
        folds: the calls whose rows are frames of clips.
        is_ordered: the first maps of a network for clips or volumes respond along the input's first axis.
        counts: the numbers of positions of the convolutions' maps.
    """

    answers: dict[_Key, Tensor]
    folds: dict[Key, Fold]
    is_ordered: bool
    counts: frozenset[int] = frozenset()


class Probe:
    """A network's responses to three changed patches of an image; forwards run only when needed.

    Args:
        root: the network; it is only read.
        x: (B, C, *size); patches of the first image are changed.
    """

    def __init__(self, root: nn.Module, x: Tensor) -> None:
        self.root, self.x, self.size = root, x, tuple(x.shape[2:])
        self._locals: dict[int, Place | None] = {}
        self._known: dict[Key | None, _Found] = {}  # by single call; None for all calls

    def _found(self, call: ModuleCall) -> _Found:
        """The responses of a call, measured alone, or with all calls if several are needed (slower)."""
        key = call.key
        if key not in self._known and (len(self.size) == 3 or len(self._known) >= _SINGLE):
            key = None
        if key not in self._known:
            self._known[key] = self._measure(key)
        return self._known[key]

    def _measure(self, only: Key | None) -> _Found:
        if is_wrapped(next(iter(self.root.parameters()), self.x.new_zeros(()))):
            return _Found({}, {}, True)  # under vmap over models nothing can be read
        with outside_transforms(), torch.no_grad():
            images = _changed(self.x[:1].detach() if is_readable(self.x) else made_up(self.x))
            for batches in ([images], list(images.split(1))):  # the network may take one image at a time
                with contextlib.suppress(ValueError, TypeError):
                    return _measured(self.root, batches, only)
        return _Found({}, {}, True)

    def _shares(self, call: ModuleCall, *, is_last: bool) -> Tensor | None:
        """The share of each position's answers to each patch, (3, T)."""
        answers = self._found(call).answers.get((*call.key, is_last))
        return None if answers is None else _shares(answers)

    def tokens(self, call: ModuleCall) -> Place | None:
        """How a call's output (B, T, K) lies on the image; None if it does not, or not in order."""
        shares, count = self._shares(call, is_last=True), call.shape[1]
        if shares is None or self._is_one_map(call):
            return None
        if len(self.size) != 3:
            place = next(self._places(shares, count), None)
        else:
            place = self._local(call, count)
            start = torch.tensor([0 if place is None else place.prefix])
            if place is not None and _fits(shares, place.grid, start, place.order) < _SETTLED:
                place = None
        return place

    def _is_one_map(self, call: ModuleCall) -> bool:
        """Whether a call's output (B, T, K) is one map without channels, as of depths: T and K its axes."""
        answers, grid = self._found(call).answers.get((*call.key, False)), call.shape[1:]
        columns = grid[0] * self.size[-1] / self.size[0]
        if answers is None or not math.floor(columns) <= grid[1] <= math.ceil(columns):
            return False
        return _slope_of(answers.square(), grid, _upright(grid)) > 2 * _SLOPE

    def holds_levels(self, call: ModuleCall, place: Place) -> bool:
        """Whether what a grid leaves of a call's tokens are as many as other maps of the network have places.

        They are those of other levels then, as a detector's encoder reads several in one row.
        """
        largest, sums = math.prod(place.grid), {0}
        for count in self._found(call).counts:
            sums |= {total + count for total in sums if 1 < count < largest}
        return call.shape[1] > largest and call.shape[1] - largest in sums

    def _places(self, shares: Tensor, count: int) -> Iterator[Place]:
        for grid in _grids(count, self.size):
            starts = torch.arange(count - math.prod(grid) + 1)
            for order in _ORDERS[len(grid)]:
                fits = _fits(shares, grid, starts, order)
                if fits.max() >= _ENOUGH:
                    yield Place(int(fits.argmax()), grid, order)

    def _local(self, call: ModuleCall, count: int) -> Place | None:
        """How this many tokens lie on a clip or volume, from the first call whose responses are local.

        In later calls, attention along one axis responds all along it, and any order would fit.
        """
        if count not in self._locals:
            known = self._found(call).answers.items()
            rows = [answers for (*_, is_last), answers in known if is_last and answers.shape[1] == count]
            found = (
                place for row in rows for place in self._places(_shares(row), count) if _is_local(row, place)
            )
            self._locals[count] = next(found, None)
        return self._locals[count]

    def folded(self, call: ModuleCall) -> Fold | None:
        """How a call's rows are frames of clips; None if they are not."""
        return self._found(call).folds.get(call.key)

    def moves(self, call: ModuleCall) -> bool:
        """Whether a call's output depends on the image, as far as that can be measured."""
        found = [answers for key, answers in self._found(call).answers.items() if key[:2] == call.key]
        return not found or any(bool(answers.any()) for answers in found)

    def is_last(self, call: ModuleCall) -> bool:
        """Whether a call's maps fit the image better with channels last than channels first."""
        found = {last: self._shares(call, is_last=last) for last in (False, True)}
        fold = self.folded(call)
        frames = () if fold is None else (fold.frames,)
        grids = {False: (*frames, *call.shape[2:]), True: (*frames, *call.shape[1:-1])}
        slopes = {k: -1.0 if s is None else _slope(s, grids[k], _upright(grids[k])) for k, s in found.items()}
        return slopes[True] > slopes[False]

    def maps(self, call: ModuleCall, grid: Grid, *, is_last: bool) -> Place | None:
        """How maps of a grid lie on the image, with channels first or last; None if they do not.

        Maps that cannot be measured, as when the network takes only these images, are taken as they are.
        """
        shares, order = self._shares(call, is_last=is_last), _upright(grid)
        if shares is None:
            return Place(0, grid, order)
        if not self._found(call).is_ordered:
            return None
        fit, slope = _fit(shares, grid, order), _slope(shares, grid, order)
        for other in itertools.permutations(order):
            own = tuple(grid[other.index(axis)] for axis in order)
            is_better = _fit(shares, own, other) >= _ENOUGH
            # Patches lie further right in part where they lie lower, so that exchanged axes have a slope too.
            if fit < _ENOUGH and (is_better or _slope(shares, grid, other) > max(2 * _SLOPE, slope)):
                return Place(0, own, other) if other == order[::-1] else None
        if fit >= _ENOUGH or slope > _SLOPE:
            return Place(0, grid, order)
        if fit < _SETTLED:
            return None
        rows = self._all().answers.values()  # maps of few places are settled by others of their grid
        rows = [_shares(row) for row in rows if row.shape == shares.shape]
        return Place(0, grid, order) if any(_fit(row, grid, order) >= _ENOUGH for row in rows) else None

    def _all(self) -> _Found:
        """What was measured of all calls."""
        if None not in self._known:
            self._known[None] = self._measure(None)
        return self._known[None]


def made_up(like: Tensor) -> Tensor:
    """A concrete image, in place of one whose values cannot be read."""
    shape = (1, *map(int, like.shape[1:]))
    count = torch.Size(shape).numel()
    return torch.linspace(-1, 1, count, dtype=like.dtype, device=like.device).reshape(shape)


def _changed(image: Tensor) -> Tensor:
    """The image three times, (3, C, *size), with noise added to a different patch of each."""
    # One noise for all channels of a clip: if they are its frames, all respond alike.
    channels = 1 if image.ndim == 5 else image.shape[1]
    noise = normal(0, 0, (channels, *image.shape[2:]), like=image) * 4 * (float(image.std()) or 1.0)
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


def _measured(root: nn.Module, batches: list[Tensor], only: Key | None) -> _Found:
    rows, axes = len(batches[0]), batches[0].ndim
    seen: dict[Key, list[Tensor]] = {}
    found: dict[_Key, Tensor] = {}
    folds: dict[Key, Fold] = {}
    ordered: list[bool] = []
    counts: set[int] = set()

    def see(call: ModuleCall, output: Any) -> None:
        if isinstance(call.module, Convolution) and len(call.shape) == axes:
            counts.add(math.prod(call.shape[2:]))
        if only is not None and call.key != only:
            return
        values = features_of(output)
        in_batch = values is not None and (values.ndim, axes) == (4, 5)
        if values is None or values.ndim < 3 or (len(values) % rows if in_batch else len(values) != rows):
            return
        parts = seen.setdefault(call.key, [])
        parts.append(values.clone() if len(batches) > 1 else values)
        if len(parts) < len(batches):
            return
        values = torch.cat(seen.pop(call.key))
        if in_batch:
            unfolded = _unfolded(values)
            if unfolded is None:
                ordered.append(False)
                return
            ordered.append(True)
            folds[call.key], values = unfolded
        found[*call.key, True] = _answers_of(values)
        if values.ndim == 3 and axes == 4:
            found[*call.key, False] = _answers_of(values[..., None])
        if values.ndim > 3:
            found[*call.key, False] = _answers_of(values.movedim(2 if in_batch else 1, -1))
        if (values.ndim, axes, ordered) == (5, 5, []) and min(values.shape[1:3]) > 1:
            along = [_answers_of(values.movedim(axis, 1).flatten(2)) for axis in (1, 2)]
            ordered.append(any(_is_local(each, Place(0, each.shape[1:], (0,))) for each in along))

    for batch in batches:
        run_changed(root, batch, see=see)
    return _Found(found, folds, all(ordered[:1]), frozenset(counts))


def _unfolded(values: Tensor) -> tuple[Fold, Tensor] | None:
    """Values (3 * T, ...) as (3, T, ...), if each patch's frame responds to it in one of two orders."""
    for by_clip in (True, False):
        order = (3, -1) if by_clip else (-1, 3)
        frames = values.unflatten(0, order).transpose(0, 0 if by_clip else 1)
        count = frames.shape[1]
        if _is_local(_answers_of(frames.flatten(2)), Place(0, (count,), (0,))):
            return Fold(count, by_clip), frames
    return None


def _answers_of(values: Tensor) -> Tensor:
    """How much each position of values (3, ..., K) responds to each patch, (3, T).

    Responses are relative to those of all positions to that patch, since some patches have larger effects.
    """
    one, two, three = values.flatten(1, -2).float()
    near, far, across = ((a - b).norm(dim=-1) for a, b in ((one, two), (one, three), (two, three)))
    answers = torch.stack([near + far - across, near + across - far, far + across - near]).clamp(min=0)
    return (answers / answers.mean(1, keepdim=True).clamp(min=_TINY)).cpu()


def _shares(answers: Tensor) -> Tensor:
    """The share of each position's responses to each patch, (3, T)."""
    return answers / answers.sum(0).clamp(min=_TINY)


def _upright(grid: Grid) -> Grid:
    return tuple(range(len(grid)))


def _slope(shares: Tensor, grid: Grid, order: Grid) -> float:
    """The slope of the response centers against the patches' positions, along the axis where it is smallest.

    With a large receptive field, many positions around a patch's own respond to it.
    """
    return _slope_of((shares - 1 / 3).clamp(min=0), grid, order)


def _slope_of(weights: Tensor, grid: Grid, order: Grid) -> float:
    """The same of the centers of any weights (3, T) of the positions."""
    weights, slopes = weights.reshape(3, *grid), []
    for axis, length in enumerate(grid):
        along = weights.movedim(axis + 1, 1).reshape(3, length, -1).sum(2)
        middles = (torch.arange(length) + 0.5) / length
        center = (along * middles).sum(1) / along.sum(1).clamp(min=_TINY)
        patch = torch.tensor([one[order[axis]] for one in _PATCHES])
        patch = patch - patch.mean()
        slopes.append(float((center * patch).sum() / patch.square().sum()) if length > 1 else 1.0)
    return min(slopes)


def _fits(shares: Tensor, grid: Grid, starts: Tensor, order: Grid) -> Tensor:
    """For each start of the grid, how well its positions at the patches respond to them, at most 1."""
    # Above chance and above most positions: if all respond alike, none is a patch's own.
    usual = shares.median(1, keepdim=True).values.clamp(min=1 / 3)
    above = (shares - usual) / (shares.amax(1, keepdim=True) - usual).clamp(min=_LEAST)
    positions = _positions(grid, order)
    own = [row[starts + positions[cell]] for row, cell in zip(above, _cells(grid), strict=True)]
    return torch.stack(own).amin(0)


def _fit(shares: Tensor, grid: Grid, order: Grid) -> float:
    """How far maps of a grid answer to the patches where these are, at most 1."""
    return float(_fits(shares, grid, torch.zeros(1, dtype=torch.int64), order))


def _is_local(answers: Tensor, place: Place) -> bool:
    """Whether each patch's position stands out along each axis, and from all positions not next to it."""
    positions = _positions(place.grid, place.order) + place.prefix
    for row, cell in zip(answers, _cells(place.grid), strict=True):
        values = row[positions]
        far = values.clone()
        far[tuple(slice(max(0, i - 1), i + 2) for i in cell)] = 0
        lines = [values[(*cell[:i], slice(None), *cell[i + 1 :])] for i in range(len(cell))]
        others = [(line.sum() - values[cell]) / (len(line) - 1) for line in lines if len(line) > 1]
        if not values[cell] > _STANDS_OUT * max([far.max(), *others]):
            return False
    return True


def _cells(grid: Grid) -> list[Grid]:
    """The cells of a grid in which the patches lie."""
    return [tuple(int(p * n) for p, n in zip(patch, grid, strict=False)) for patch in _PATCHES]


def _positions(grid: Grid, order: Grid) -> Tensor:
    """The index in the row of tokens of each cell of a grid, (*grid)."""
    rows = torch.arange(math.prod(grid)).reshape([grid[axis] for axis in order])
    return rows.permute([order.index(axis) for axis in range(len(grid))])


@functools.lru_cache(maxsize=64)
def _grids(count: int, size: Grid) -> list[Grid]:
    """The grids with the image's proportions that use half to all of `count` tokens, largest first."""
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
