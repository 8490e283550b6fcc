"""Perturbed inputs and their scores: pure functions of an index, built and scored a chunk at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from xcam_fn import checks
from xcam_fn.arguments import Count, Length, Positive, check, checked, unchecked

Perturb = Callable[..., Tensor]
Baseline = Tensor | float | Callable[[Tensor], Tensor]
Index = Int[Tensor, ""] | Length


@checked
def perturbation_scores(
    score: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "B C *size"],
    perturb: Perturb,
    which: Int[Tensor, " P"],
    parameters: tuple[Tensor, ...],
    *,
    beside: tuple[Tensor, ...] = (),
    chunk_size: Count,
    progress: bool = False,
) -> Tensor:
    """The scores of P perturbed images, (P, n), in order, with memory use of one chunk of them.

    Args:
        score: perturbed images (p, C, *size) and which images of x they come from, (p,), to scores (p, n).
        x: (B, C, *size), the images.
        perturb: `(image, *beside, *parameters) -> image`, a pure function of one image (C, *size), its
            `beside` values, and one perturbation's parameters; `vmap` builds a chunk of them.
        which: (P,), the index of each perturbation's image, 0 … B − 1.
        parameters: tensors (P, ...), the parameters of each perturbation.
        beside: tensors (B, ...), further values of each image, such as its baseline.
        chunk_size: perturbed images per forward pass, ≥ 1; it changes memory and speed, not the scores.
        progress: show a progress bar on standard error that counts forward passes of one image.

    Raises:
        ValueError: a score that is not finite (it says of which perturbation), or a chunk_size out of range.
        MemoryError: a chunk does not fit; it says which chunk_size to try.
    """
    if checks.is_readable(which) and not (which.min() >= 0 and which.max() < len(x)):
        ends = [int(end) for end in which.aminmax()]
        raise ValueError(f"which holds {ends[0]} to {ends[1]}; expected indices of images, 0 to {len(x) - 1}")
    for name, count, given in (("beside", len(x), beside), ("parameters", len(which), parameters)):
        if any(each.ndim == 0 or len(each) != count for each in given):
            raise ValueError(f"{name} have shapes {[tuple(e.shape) for e in given]}; expected ({count}, ...)")
    scores: list[Tensor] = []
    for chunk in _chunks(len(which), chunk_size, progress):
        images = which[chunk]
        is_one = len(x) == 1  # nothing to gather: one image is perturbed in every way
        given = [each[0] if is_one else each[images] for each in (x, *beside)]
        axes = (*[None if is_one else 0] * len(given), *[0] * len(parameters))
        build = torch.vmap(perturb, in_dims=axes)
        try:  # a perturbed chunk gets no name, by which it would stay while the next one is made
            found = score(build(*given, *(p[chunk] for p in parameters)), images)
        except RuntimeError as error:
            if checks.is_out_of_memory(error):
                said = f"chunk_size={chunk_size}: a chunk of perturbed images does not fit into memory"
                raise MemoryError(f"{said}; try chunk_size={max(1, chunk_size // 4)}") from error
            raise
        fits = lambda found, images=images: found.ndim in (1, 2) and len(found) == len(images)  # noqa: E731
        checks.check_returned("score", found, "scores (p, n), one row for each perturbed image", fits)
        _check_finite(found, images, chunk.start)
        _keep(scores, found, chunk, len(which))
    return scores[0] if len(scores) == 1 else torch.cat(scores)


def _keep(scores: list[Tensor], found: Tensor, chunk: slice, count: int) -> None:
    """Put a chunk's scores with the others, in one tensor where nothing is recorded.

    Many small ones, each allocated beside a chunk, would keep the allocator from using its place again.
    """
    if found.requires_grad or not checks.is_readable(found):
        scores.append(found)
        return
    if not scores:
        scores.append(found.new_empty(count, *found.shape[1:]))
    scores[0][chunk] = found


def _chunks(count: int, chunk_size: int, progress: bool) -> Iterator[slice]:
    from tqdm import tqdm  # noqa: PLC0415, an import that only a scored perturbation has to wait for

    with tqdm(total=count, unit="forward", leave=False, disable=None if progress else True) as bar:
        for start in range(0, count, chunk_size):
            chunk = slice(start, min(start + chunk_size, count))
            yield chunk
            bar.update(chunk.stop - chunk.start)


def _check_finite(scores: Tensor, images: Tensor, start: int) -> None:
    finite = torch.isfinite(scores.detach())
    if checks.is_readable(scores) and not finite.all():
        bad = int((~finite).flatten(1).any(1).nonzero()[0])
        which = f"perturbation {start + bad} (image {int(images[bad])})"
        raise ValueError(f"the score of {which} is {scores[bad].tolist()}; expected finite numbers")


class DistinctMaps(NamedTuple):
    """The maps of a batch that need a forward of their own, and where their scores belong.

    Attributes:
        maps: (P, *spatial).
        which: (P,), the image that each map is of.
        places: (B * K,), for every channel of every image the row of `maps` that it equals.
        constant: (B * K,), where a map is constant: its normalized mask is zero, and it is in no row.
    """

    maps: Tensor
    which: Tensor
    places: Tensor
    constant: Tensor


@checked
def distinct_maps(A: Float[Tensor, "B K L *spatial"]) -> DistinctMaps:
    """The maps that differ: constant ones are left out, equal ones of an image are kept once.

    Under a transform or a compilation, where values cannot be looked at, it is every channel, in order.

    Args:
        A: (B, K, *spatial), features.
    """
    B, K = A.shape[:2]
    rows = A.flatten(0, 1)
    which = torch.arange(B, device=A.device).repeat_interleave(K)
    every = torch.arange(B * K, device=A.device)
    if not checks.is_readable(A):
        return DistinctMaps(rows, which, every, torch.zeros_like(every, dtype=torch.bool))
    flat = rows.detach().flatten(1)
    constant = flat.amax(1) == flat.amin(1)
    _, group = torch.unique(torch.cat([which[:, None].to(flat), flat], 1), dim=0, return_inverse=True)
    first = torch.full_like(every, B * K).scatter_reduce(0, group, every, "amin")[group]
    kept = (first == every) & ~constant
    places = (kept.cumsum(0) - 1)[first].clamp(min=0)
    return DistinctMaps(rows[kept], which[kept], places, constant)


def scatter_scores(
    scores: Float[Tensor, "P n"], found: DistinctMaps, constant: Float[Tensor, "B n"]
) -> Tensor:
    """The scores of all channels, (B, K, n), from those of the distinct maps and of a mask of zeros.

    Args:
        scores: (P, n), of the distinct maps.
        found: the distinct maps.
        constant: (B, n), the score that every constant map shares.
    """
    B = len(constant)
    shared = constant.repeat_interleave(len(found.places) // B, 0)
    own = scores[found.places] if len(scores) else shared
    return torch.where(found.constant[:, None], shared, own).reshape(B, -1, scores.shape[-1])


@checked
def baseline_images(baseline: Baseline, x: Float[Tensor, "B C *size"]) -> Tensor:
    """The baseline images, which stand for hidden pixels, (B, C, *size).

    Args:
        baseline: a number, a tensor that broadcasts against x, or a callable of x, such as `blurred`.
        x: (B, C, *size), the images.

    Raises:
        ValueError: the baseline does not broadcast against x, or is not finite.
        TypeError: the baseline is none of these.
    """
    given = baseline(x) if callable(baseline) else baseline
    check("baseline", given, Tensor | float)
    start = torch.as_tensor(given, dtype=x.dtype, device=x.device)
    checks.check_tensor("baseline", start)
    try:
        return start.expand_as(x)
    except RuntimeError:
        wanted = f"a number, a callable of x, or a shape that broadcasts against x, {tuple(x.shape)}"
        raise ValueError(f"baseline has shape {tuple(start.shape)}; expected {wanted}") from None


@checked
def blurred(x: Float[Tensor, "B C *size"], *, width: Count = 51, std: Positive = 50.0) -> Tensor:
    """The images blurred by a Gaussian, (B, C, *size), reflected at the border.

    Args:
        x: (B, C, *size), the images.
        width: width of the kernel, an odd number of pixels; reduced if the image is too small to reflect.
        std: standard deviation of the Gaussian, > 0, pixels.
    """
    for axis in range(2, x.ndim):
        reach = min(width // 2, x.shape[axis] - 1)
        offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
        kernel = torch.exp(-(offsets**2) / (2 * std**2))
        lines = x.movedim(axis, -1)
        padded = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (reach, reach), mode="reflect")
        smooth = F.conv1d(padded, (kernel / kernel.sum())[None, None])
        x = smooth.reshape(lines.shape).movedim(-1, axis)
    return x


# -- randomness: a function of the seed and an index, the same on every device and for every chunk ----------

_GAMMA, _FIRST, _SECOND = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@checked
def uniform(seed: int, index: Index, shape: tuple[Length, ...], *, like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) that depend only on the seed and the index (SplitMix64, counter-based).

    Args:
        seed: any integer.
        index: number of the draw; a 0-d tensor under vmap.
        shape: shape of the result.
        like: a tensor with the device and dtype of the result.

    References:
        Steele et al., Fast Splittable Pseudorandom Number Generators (doi:10.1145/2660193.2660195).
    """
    checks.check_amount("shape", shape, *shape)
    _check_float(like)
    count = math.prod(shape)
    counter = torch.arange(count, device=like.device) + torch.as_tensor(index, device=like.device) * count
    start = _mixed(torch.tensor((seed * 2 + 1) % 2**62, device=like.device) * _GAMMA)
    bits = _shifted(_mixed(start + (counter + 1) * _GAMMA), 40)
    return (bits.to(torch.float32) * 2.0**-24).reshape(shape).to(like.dtype)


@checked
def normal(seed: int, index: Index, shape: tuple[Length, ...], *, like: Tensor) -> Tensor:
    """Standard normal numbers that depend only on the seed and the index (Box–Muller), as in `uniform`."""
    _check_float(like)
    radius, angle = unchecked(uniform)(seed, index, (2, *shape), like=like.float())
    return (torch.sqrt(-2 * torch.log1p(-radius)) * torch.cos(2 * math.pi * angle)).to(like.dtype)


def _check_float(like: Tensor) -> None:
    if not like.is_floating_point():
        raise TypeError(f"like has dtype {like.dtype}; expected a floating-point tensor")


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift; int64's own keeps the sign


@checked
def grid_mask(
    seed: int,
    index: Index,
    size: Sequence[Count],
    *,
    grid: Count,
    keep: Annotated[float, ("above", 0), ("at_most", 1)],
    like: Tensor,
) -> Tensor:
    """RISE's mask, (*size), in [0, 1]: a random grid of kept and dropped cells, upsampled and shifted.

    Args:
        seed: any integer.
        index: number of the mask; a 0-d tensor under vmap.
        size: size of the mask, pixels.
        grid: cells along each axis, ≥ 1.
        keep: the probability that a cell is kept, in (0, 1].
        like: a tensor with the device and dtype of the result.

    References:
        Petsiuk et al. (arXiv:1806.07421), section 3.2.
    """
    axes = len(size)
    checks.check_amount("grid", grid, *[grid + 1] * axes)
    checks.check_amount("size", tuple(size), *size)
    _check_float(like)
    draws = unchecked(uniform)(seed, index, ((grid + 1) ** axes + axes,), like=like.float())
    mask = (draws[:-axes] < keep).to(like.dtype).reshape([grid + 1] * axes)
    for axis, length in enumerate(size):
        cell = math.ceil(length / grid)
        shift = torch.floor(draws[-axes + axis] * cell)
        place = (torch.arange(length, device=like.device) + shift + 0.5) / cell - 0.5
        nodes = torch.arange(grid + 1, device=like.device)
        interpolation = (1 - (place.clamp(0, grid)[:, None] - nodes).abs()).relu().to(like.dtype)
        mask = torch.einsum("i...,li->...l", mask, interpolation)  # its axis goes last: all turn around once
    return mask
