"""One batch of a run: the methods and the metrics on the images that are explained together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from xcam_fn.evaluate.items import Images
from xcam_fn.evaluate.seen import Seen, encoded, reason, seen
from xcam_fn.evaluate.store import ImageRow, Result, Score
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import heatmaps_of
from xcam_fn.methods.together import Run
from xcam_fn.metrics.curves import Curve
from xcam_fn.metrics.judged import Explainer, Judged
from xcam_fn.metrics.table import GRID, LOCALIZATION, scored
from xcam_fn.models.load import LoadedModel
from xcam_fn.scoring.running import Running, scoring_of

_HEATMAP_PIXELS = 112

Explain = Literal["predicted", "label"]
Row = ImageRow | Result


class Plan(NamedTuple):
    """How each batch of a run is computed.

    Attributes:
        network: what is explained.
        methods: by name.
        metric_names: of `METRICS`.
        layer: the target layer, by name.
        explain: the "predicted" class of each image or its "label".
        running: how images are scored.
        cells: how many classes of each image are explained: of a mosaic's cells.
        size: (height, width) of the network's input, pixels.
    """

    network: LoadedModel
    methods: Mapping[str, Run]
    metric_names: Sequence[str]
    layer: str
    explain: Explain
    running: Running
    cells: int
    size: tuple[int, int]


class Task(NamedTuple):
    """A batch that results are missing of.

    Attributes:
        start: the number of its first image.
        images: the images, in order; a shorter sequence is the first of them.
        numbers: of the images that are read; the others are known to be unreadable.
        done: rows and methods that are there already.
    """

    start: int
    images: Images
    numbers: Sequence[int]
    done: Collection[tuple[int, str]] = ()


def read(plan: Plan, task: Task) -> list[Seen]:
    """What the network sees of the images of a batch."""
    return [_read(plan, task, i) for i in task.numbers]


def _read(plan: Plan, task: Task, i: int) -> Seen:
    image = task.images[i - task.start]
    found = seen(image, i * plan.cells, plan.network.preset, plan.size)
    if found.x is not None and plan.explain == "label" and image.label is None:
        return Seen([row._replace(error="it has no label to explain") for row in found.rows])
    return found


def rows_of(plan: Plan, task: Task, found: Sequence[Seen]) -> Iterator[Row]:
    """What the network saw of a batch, and what is missing of the methods' results."""
    yield from (row for each in found if each.x is None for row in each.rows)
    readable = [each for each in found if each.x is not None]
    if not readable:
        return
    try:
        batch = _Batch(plan, readable)
    except Exception as error:  # a network may raise anything; it is written down with the photograph
        if len(readable) > 1:
            for each in readable:
                yield from rows_of(plan, task, [each])
            return
        yield from (row._replace(picture=None, error=reason(error)) for row in readable[0].rows)
        return
    yield from batch.rows
    for name in plan.methods:
        missing = {row.number for row in batch.rows if (row.number, name) not in task.done}
        results = batch.results(name) if missing else ()
        yield from (result for result in results if result.number in missing)


class _Batch:
    """Images that are explained together, each for its own class or classes."""

    def __init__(self, plan: Plan, found: Sequence[Seen]) -> None:
        model, rows = plan.network.model, [row for each in found for row in each.rows]
        x = torch.cat([each.x for each in found if each.x is not None]).to(plan.network.device)
        regions = [each.region for each in found if each.region is not None]
        self._region = torch.cat(regions).to(x.device) if regions else None
        cls: Any = None if plan.explain == "predicted" else [row.label for row in rows]
        if plan.cells > 1:
            cls = [[row.label for row in each.rows] for each in found]
        few = None if set(plan.metric_names) - {*GRID, *LOCALIZATION} else 0
        with scoring_of(model, x, cls, "probability", plan.running, forwards=few) as self._scoring:
            explained = self._scoring.explained
        self._plan, self._found, self._cls = plan, found, torch.as_tensor(explained.cls, device=x.device)
        self._call = Call(model, plan.layer, x, self._cls, records=len(plan.methods) > 1)
        known = zip(rows, self._cls.flatten().tolist(), explained.own.flatten().tolist(), strict=True)
        self.rows = [row._replace(cls=cls, probability=probability) for row, cls, probability in known]

    def results(self, name: str) -> Iterator[Result]:
        """What a method makes of each photograph, one after the other where all at once fails."""
        try:
            yield from self._results(name)
        except Exception as error:  # a method may raise anything; it is written down with the photograph
            if len(self._found) > 1:
                for each in self._found:
                    yield from _Batch(self._plan, [each]).results(name)
                return
            yield from (Result(row.number, name, {}, error=reason(error)) for row in self.rows)

    def _results(self, name: str) -> list[Result]:
        method, call = self._plan.methods[name], self._call
        heatmaps = heatmaps_of(method, call)
        heatmaps = heatmaps.flatten(0, 1) if self._plan.cells > 1 else heatmaps
        is_finite = torch.isfinite(heatmaps).flatten(1).all(1)
        heatmaps = torch.where(is_finite[:, None, None], heatmaps, 0.0)
        explain = Explainer(method, call.model, call.layer, self._cls)
        with torch.no_grad():
            found = scored(Judged(self._scoring, heatmaps, explain, self._region), self._plan.metric_names)
        return [
            Result(row.number, name, {m: _score(value, i) for m, value in found.items()}, _small(heatmaps[i]))
            if is_finite[i]
            else Result(row.number, name, {}, error="the heatmap holds NaN or infinite values")
            for i, row in enumerate(self.rows)
        ]


def _score(found: Tensor | Curve, i: int) -> Score:
    if isinstance(found, Tensor):
        return Score(float(found[i]))
    curve = (found.fractions, found.scores[i])
    return Score(float(found.auc[i]), *(values.double().cpu().numpy() for values in curve))


def _small(heatmap: Tensor) -> bytes:
    size = [min(_HEATMAP_PIXELS, side) for side in heatmap.shape]
    small = F.interpolate(heatmap[None, None].float(), size, mode="area")[0, 0]
    return encoded((small * 255).round().clamp(0, 255).byte().cpu().numpy(), "PNG")
