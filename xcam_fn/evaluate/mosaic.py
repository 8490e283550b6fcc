"""Mosaics of the photographs of a data set that a network is sure of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from xcam_fn import checks
from xcam_fn.arguments import Count, Share, check
from xcam_fn.evaluate.dataset import Photograph
from xcam_fn.metrics.mosaic import arranged, cell_masks, chosen
from xcam_fn.models import images
from xcam_fn.models.images import Preset
from xcam_fn.models.load import LoadedModel
from xcam_fn.scoring.running import Running, scoring_of

_BATCH = 8


class Mosaic(NamedTuple):
    """A mosaic of n × n photographs, their cells counted row by row.

    Attributes:
        name: its identifier, a number.
        members: the photograph in each cell, whose label is the class to explain there.
        probabilities: the predicted probability of that class for each photograph alone.
        side: side of the square that the network takes, pixels, a multiple of n.
    """

    name: str
    members: tuple[Photograph, ...]
    probabilities: tuple[float, ...]
    side: int

    @property
    def n(self) -> int:
        """How many photographs there are in a row."""
        return round(len(self.members) ** 0.5)

    @property
    def label(self) -> tuple[int, ...]:
        """The class of each cell."""
        return tuple(cast(int, member.label) for member in self.members)

    def prepared(self, preset: Preset) -> tuple[Tensor, np.ndarray]:
        """What the network is given, (1, 3, side, side), and a picture of it, as `images.prepare`."""
        pairs = [images.prepare(member.path, preset) for member in self.members]
        size = None if self.side == self.n * preset.crop else (self.side, self.side)
        x = arranged(torch.cat([x for x, _ in pairs]), self.n, size)
        pixels = torch.stack([torch.from_numpy(picture).movedim(-1, 0).float() for _, picture in pairs])
        small = preset.crop // self.n * self.n  # each cell has a row: its picture is as a photograph's
        picture = arranged(pixels, self.n, (small, small))[0].movedim(0, -1)
        return x, picture.round().clamp(0, 255).byte().numpy()


class Drawn(NamedTuple):
    """Mosaics, and the photographs they were drawn from.

    Attributes:
        mosaics: the mosaics.
        seen: number of photographs that were classified.
        unreadable: names of photographs that could not be read, with the reason.
    """

    mosaics: list[Mosaic]
    seen: int
    unreadable: Mapping[str, str]


def mosaics_of(
    network: LoadedModel,
    photographs: Sequence[Photograph],
    *,
    count: Count,
    n: Count = 2,
    confidence: Share = 0.5,
    explain: str = "predicted",
    side: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Drawn:
    """Return mosaics of the photographs with the most confident predictions, for `evaluate.run`.

    The network classifies each photograph once; they are chosen as in `metrics.mosaics`.

    Args:
        network: a network from `models.load`, or your own `LoadedModel`.
        photographs: photographs, as from `dataset.photographs`.
        count: number of mosaics.
        n: photographs per row and per column.
        confidence: the minimum probability of a photograph.
        explain: explain the "predicted" class of each photograph or its "label"; the probability is that of
            this class.
        side: resize mosaics to this side, pixels, a multiple of n; None keeps each photograph's usual size.
        seed: seed of the mosaics.
        progress: show a progress bar on stderr.

    Returns:
        `Drawn(mosaics, seen, unreadable)`.

    Raises:
        ValueError: too few photographs of distinct classes are confident enough, or a value is out of range.
        TypeError: an argument has the wrong type.
    """
    check("count", count, Count)
    check("n", n, Count)
    check("confidence", confidence, Share)
    check("seed", seed, int)
    checks.check_choice("explain", explain, ("predicted", "label"))
    side = n * network.preset.crop if side is None else side
    cell_masks(n, (side, side))  # raises where a cell is not of whole pixels
    some = [p for p in photographs if explain == "predicted" or p.label is not None]
    found: list[tuple[Photograph, float]] = []
    unreadable: dict[str, str] = {}
    for start in tqdm(range(0, len(some), _BATCH), unit="batch", disable=not progress):
        found += _predicted(network, some[start : start + _BATCH], explain, unreadable)
    members = chosen(
        [cast(int, p.label) for p, _ in found], [probability for _, probability in found],
        n=n, count=count, confidence=confidence, seed=seed,
    )  # fmt: skip
    made = []
    for number, cells in enumerate(members, 1):
        some, probabilities = zip(*(found[i] for i in cells), strict=True)
        made.append(Mosaic(f"mosaic {number}", some, probabilities, side))
    return Drawn(made, len(found), unreadable)


def _predicted(
    network: LoadedModel, part: Sequence[Photograph], explain: str, unreadable: dict[str, str]
) -> list[tuple[Photograph, float]]:
    """The photographs that can be read, each with the class to explain as its label, and its probability."""
    read: list[tuple[Photograph, Tensor]] = []
    for photograph in part:
        try:
            read.append((photograph, images.prepare(photograph.path, network.preset)[0]))
        except (ValueError, OSError) as error:
            unreadable[photograph.name] = " ".join(str(error).split())
    if not read:
        return []
    x = torch.cat([x for _, x in read]).to(network.device)
    cls = None if explain == "predicted" else [cast(int, photograph.label) for photograph, _ in read]
    with scoring_of(network.model, x, cls, "probability", Running(), forwards=0) as scoring:
        found = torch.as_tensor(scoring.explained.cls).tolist(), scoring.explained.own[:, 0].tolist()
    return [(each._replace(label=c), p) for (each, _), c, p in zip(read, *found, strict=True)]
