"""Methods and metrics over a data set, written down as they come, continued where a run stopped."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from xcam_fn import checks
from xcam_fn.evaluate.dataset import Photograph
from xcam_fn.evaluate.mosaic import Mosaic
from xcam_fn.evaluate.seen import Seen, content, digest, encoded, seen
from xcam_fn.evaluate.store import KEPT, Result, Score, Store, beside, writing
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import accepted, heatmaps_of
from xcam_fn.methods.together import Methods, Run, named_methods
from xcam_fn.metrics.curves import Curve
from xcam_fn.metrics.judged import Explainer, Judged, by_name
from xcam_fn.metrics.table import GRID, LOCALIZATION, METRICS, STANDARD, scored
from xcam_fn.models.load import LoadedModel
from xcam_fn.network.split import default_layer, split
from xcam_fn.scoring.running import Precision, Running, check_running, scoring_of

_HEATMAP_PIXELS = 112
_PATIENCE = 1.0  # seconds without a write, in which what was found may be lost
_AHEAD = 2  # batches that are read while the network runs
_PACKAGES = ("xcam-fn", "torch", "torchvision", "numpy", "pillow")

Explain = Literal["predicted", "label"]


class RunOptions(TypedDict, total=False):
    """How a run computes its scores, and what it does with its folder."""

    precision: Precision
    compile: bool
    chunk_size: int | None
    retry: bool
    beside: bool
    keep: Sequence[str]
    about: Mapping[str, Any]
    progress: bool


class _Options(NamedTuple):
    """The defaults of `RunOptions`."""

    precision: Precision = "float32"
    compile: bool = False
    chunk_size: int | None = None
    retry: bool = False
    beside: bool = False
    keep: Sequence[str] = KEPT
    about: Mapping[str, Any] = MappingProxyType({})
    progress: bool = False


class Outcome(NamedTuple):
    """What a run came to, what was done before included.

    Attributes:
        photographs: how many there are; of mosaics each cell counts.
        unreadable: of these, how many could not be read.
        results: pairs of a photograph and a method that have scores.
        failures: pairs that have none.
        folder: where they are.
    """

    photographs: int
    unreadable: int
    results: int
    failures: int
    folder: Path


class _Plan(NamedTuple):
    """What a run does, checked before anything is written."""

    network: LoadedModel
    photographs: Sequence[Photograph] | Sequence[Mosaic]
    methods: Mapping[str, Run]
    metric_names: Sequence[str]
    layer: str
    explain: Explain
    batch_size: int
    running: Running

    @property
    def n(self) -> int:
        """How many photographs there are in a row of a mosaic, 1 where there is none."""
        first = self.photographs[0]
        return first.n if isinstance(first, Mosaic) else 1

    @property
    def cells(self) -> int:
        """How many classes of each image are explained."""
        return self.n**2

    @property
    def side(self) -> int:
        """Of the square that the network sees, pixels."""
        first = self.photographs[0]
        return first.side if isinstance(first, Mosaic) else self.network.preset.crop


def run(
    network: LoadedModel,
    photographs: Sequence[Photograph] | Sequence[Mosaic],
    methods: Methods,
    metric_names: Sequence[str] | None = None,
    *,
    output: str | os.PathLike[str],
    layer: str | None = None,
    explain: Explain = "predicted",
    batch_size: int = 1,
    variant: str | None = None,
    options: Mapping[str, Any] | None = None,
    **how: Unpack[RunOptions],
) -> Outcome:
    """Run every method and metric on every photograph; what a folder holds already is not done again.

    A photograph that cannot be read and a method that fails on one are written down, and the rest goes on.
    Batches are made up of the whole list, so that a run that is continued finds the same numbers.

    Args:
        network: what `models.load` returns, or the same of your own.
        photographs: as `dataset.photographs` lists them, or mosaics, as `mosaics_of` makes them: in one call
            a method explains the class of each cell, and each is a photograph of the run.
        methods: names of methods ("gradcam+sscam" is the fusion of two), functions, or a mapping from names
            to these.
        metric_names: names of `METRICS`; None for `STANDARD`, of mosaics for `GRID`, of photographs that have
            regions for `LOCALIZATION`.
        output: the folder; its results.sqlite holds all that was found.
        layer: a name, or None for `default_layer`.
        explain: the "predicted" class of each photograph or its "label".
        batch_size: photographs at a time, ≥ 1; it changes speed and memory.
        variant: a library of `VARIANTS` whose definitions the names stand for.
        options: keywords of the methods; at least one has to take each.
        precision: "float32" or "bfloat16", of the forwards that score.
        compile: compile the network that scores.
        chunk_size: perturbed images in one forward; None chooses.
        retry: try again what failed in the run so far.
        beside: where the folder holds a run with other settings, use the next of output_2, output_3 … that
            does not.
        keep: of "pictures", "heatmaps" and "curves" what is kept beside the scores, for the report's page and
            figures: some 14 kB a photograph, 3 kB and 1 kB a heatmap.
        about: what else the results depend on, such as the seed of the sample: a run with other values is
            another.
        progress: show a bar on stderr.

    Returns:
        How many photographs and results there are.

    Raises:
        ValueError: a name is not known, a value is out of range, a label is missing, or the folder holds a
            run with other settings or is written to by another run.
        TypeError: no method takes an option.
        OSError: the folder cannot be written to, or the disk is full; what was written before is safe.
    """
    chosen = named_methods(methods, variant, **(options or {}))
    _check(photographs, explain, batch_size)
    metric_names = _checked_metrics(metric_names, photographs)
    if unknown := [name for name in how if name not in _Options._fields]:
        known = ", ".join(sorted(_Options._fields))
        raise TypeError(f"run() has no option {unknown[0]!r}; its options are {known}")
    asked = _Options(**how)
    for name in asked.keep:
        checks.check_choice("keep", name, KEPT)
    running = Running(asked.precision, asked.compile, chunk_size=asked.chunk_size)
    named: Any = [p._replace(name=p.name.encode(errors="backslashreplace").decode()) for p in photographs]
    plan = _Plan(network, named, chosen, metric_names, layer or "", explain, batch_size, running)
    blank = torch.zeros(1, 3, plan.side, plan.side, device=_device(network.model))
    check_running(running, blank)
    plan = plan._replace(layer=default_layer(network.model, blank) if layer is None else layer)
    split(network.model, plan.layer, blank)  # raises where there is no such layer
    about = {**asked.about, "keep": [name for name in KEPT if name in asked.keep]}
    settings = _settings(plan, about, variant, options or {})
    plan = plan._replace(methods={name: _scored_alike(run, running) for name, run in chosen.items()})
    place = beside(Path(output), settings) if asked.beside else Path(output)
    with writing(place, settings) as store:
        if asked.retry:
            store.forget_failures()
        here = functools.cache(lambda i: content(named[i]))
        known = store.contents().items()
        store.forget([n for n, there in known if here(n // plan.cells) not in (None, there)])
        for seen, missing in _batches(plan, store, asked.progress):
            _judge(plan, store, seen, missing)
        return Outcome(len(named) * plan.cells, len(store.unreadable()), *store.counts(), place)


*_own, _ = inspect.signature(run).parameters.values()
run.__dict__["__signature__"] = inspect.signature(run).replace(parameters=[*_own, *by_name(_Options)])


def _checked_metrics(
    metric_names: Sequence[str] | None, photographs: Sequence[Photograph] | Sequence[Mosaic]
) -> Sequence[str]:
    """The names of the metrics, each possible for the photographs."""
    first, local = photographs[0], dict.fromkeys((*GRID, *LOCALIZATION))
    is_tiled = isinstance(first, Mosaic)
    is_located = not is_tiled and first.region is not None
    if metric_names is None:
        return GRID if is_tiled else LOCALIZATION if is_located else STANDARD
    if not metric_names or len(set(metric_names)) != len(metric_names):
        raise ValueError(f"metrics={list(metric_names)!r}; expected one or more names, each once")
    for name in metric_names:
        checks.check_choice("metrics", name, tuple(METRICS))
        if is_tiled and name not in local:
            raise ValueError(f"metrics={name!r} is not one of mosaics; expected {', '.join(local)}")
        if not is_tiled and name in local and (name == "grid_pointing" or not is_located):
            wanted = "evaluate mosaics" if name == "grid_pointing" else "give boxes, evaluate mosaics"
            raise ValueError(f"metrics={name!r} asks where an object is; {wanted}, or another metric")
    return metric_names


def _check(photographs: Sequence[Photograph] | Sequence[Mosaic], explain: str, batch_size: int) -> None:
    if not photographs:
        raise ValueError("photographs is empty; expected one or more")
    kinds = {(p.n, p.side) if isinstance(p, Mosaic) else p.region is None for p in photographs}
    if len(kinds) > 1:
        wanted = "photographs, all with a region or none, or mosaics of one size"
        raise ValueError(f"photographs: {len(kinds)} kinds; expected {wanted}")
    checks.check_choice("explain", explain, get_args(Explain))
    checks.check_count("batch_size", batch_size)
    unlabeled = [photograph.name for photograph in photographs if photograph.label is None]
    if explain == "label" and unlabeled:
        many = f"{len(unlabeled)} of {len(photographs)} photographs have no label, such as {unlabeled[0]!r}"
        remedy = "name a CSV file of labels, or explain the predicted classes"
        raise ValueError(f"explain='label': {many}; {remedy}")


def _settings(
    plan: _Plan, about: Mapping[str, Any], variant: str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What the results depend on, as the store keeps it."""
    return {
        "model": plan.network.name,
        "weights": _fingerprint(plan.network.model),
        "preset": plan.network.preset,
        "categories": plan.network.categories,
        "photographs": digest(map(_identity, plan.photographs)),
        **about,
        "methods": {name: getattr(run, "title", name) for name, run in plan.methods.items()},
        "metrics": list(plan.metric_names),
        "layer": plan.layer,
        "explain": plan.explain,
        "variant": variant,
        "options": {name: repr(value) for name, value in options.items()},
        "batch size": plan.batch_size,
        "precision": plan.running.precision,
        "compile": plan.running.compile,
        "chunk size": plan.running.chunk_size,
        "versions": {package: version(package) for package in _PACKAGES},
    }


def _identity(photograph: Photograph | Mosaic) -> bytes:
    region = getattr(photograph, "region", None)
    where = "" if region is None else f"{region.boxes}\n"
    return f"{photograph.name}\n{photograph.label}\n{where}".encode()


def _scored_alike(run: Run, running: Running) -> Run:
    """The method with the metrics' precision, compilation and chunks, where it takes them."""
    given = {name: value for name, value in running._asdict().items() if value != getattr(Running(), name)}
    return functools.partial(run, **accepted(run, given))


def _fingerprint(model: nn.Module) -> str:
    """What tells one set of parameters from another."""
    raw = lambda value: value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()  # noqa: E731
    state = model.state_dict().items()
    return digest(part for name, value in state for part in (name.encode(), raw(value)))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters(), torch.zeros(0)).device


# -- what comes in ------------------------------------------------------------------------------------------


def _batches(plan: _Plan, store: Store, progress: bool) -> Iterator[tuple[list[Seen], dict[str, set[int]]]]:
    """The batches in which something is missing, read ahead of the network, and what is missing in them."""
    count = len(plan.photographs) * plan.cells
    with ThreadPoolExecutor(1) as pool, tqdm(total=count, unit="photo", disable=not progress) as bar:
        coming = (
            (pool.submit(_read, plan, numbers), numbers, missing)
            for numbers, missing in _missing(plan, store, bar)
        )
        ahead = deque(itertools.islice(coming, _AHEAD))
        while ahead:
            reading, numbers, missing = ahead.popleft()
            ahead.extend(itertools.islice(coming, 1))
            yield reading.result(), missing
            bar.update(len(numbers))


def _missing(plan: _Plan, store: Store, bar: tqdm[Any]) -> Iterator[tuple[list[int], dict[str, set[int]]]]:
    """The batches in which something is missing; the others count as done."""
    unreadable, count, step = store.unreadable(), int(bar.total), plan.batch_size * plan.cells
    for start in range(0, count, step):
        stop = min(start + step, count)
        readable, done = [n for n in range(start, stop) if n not in unreadable], store.done(start, stop)
        missing = {name: {n for n in readable if (n, name) not in done} for name in plan.methods}
        wanted = readable if any(missing.values()) else []
        bar.update(stop - start - len(wanted))
        if wanted:
            yield wanted, missing


def _read(plan: _Plan, numbers: Sequence[int]) -> list[Seen]:
    """The images that rows of these numbers are of."""
    which, preset = dict.fromkeys(number // plan.cells for number in numbers), plan.network.preset
    return [seen(plan.photographs[i], i * plan.cells, preset) for i in which]


# -- what is found ------------------------------------------------------------------------------------------


def _judge(plan: _Plan, store: Store, read: Sequence[Seen], missing: Mapping[str, set[int]]) -> None:
    """Write down what the network saw of a batch, and what is missing of the methods' results.

    It is one transaction, or one in each second where methods take longer.
    """
    rows, results = [row for each in read if each.x is None for row in each.rows], []
    if readable := [each for each in read if each.x is not None]:
        batch, last = _Batch(plan, readable), time.monotonic()
        rows += batch.rows
        for name, numbers in missing.items():
            found = batch.results(name) if numbers else ()
            results += [result for result in found if result.number in numbers]
            if time.monotonic() - last > _PATIENCE:
                store.write(rows, results)
                rows, results, last = [], [], time.monotonic()
    store.write(rows, results)


class _Batch:
    """Images that are explained together, each for its own class or classes."""

    def __init__(self, plan: _Plan, read: Sequence[Seen]) -> None:
        model, rows = plan.network.model, [row for each in read for row in each.rows]
        x = torch.cat([each.x for each in read if each.x is not None]).to(_device(model))
        regions = [each.region for each in read if each.region is not None]
        self._region = torch.cat(regions).to(x.device) if regions else None
        cls: Any = None if plan.explain == "predicted" else [row.label for row in rows]
        if plan.cells > 1:
            cls = [[row.label for row in each.rows] for each in read]
        few = None if set(plan.metric_names) - {*GRID, *LOCALIZATION} else 0
        with scoring_of(model, x, cls, "probability", plan.running, forwards=few) as self._scoring:
            explained = self._scoring.explained
        self._plan, self._read, self._cls = plan, read, torch.as_tensor(explained.cls, device=x.device)
        self._call = Call(model, plan.layer, x, self._cls, records=len(plan.methods) > 1)
        found = zip(rows, self._cls.flatten().tolist(), explained.own.flatten().tolist(), strict=True)
        self.rows = [row._replace(cls=cls, probability=probability) for row, cls, probability in found]

    def results(self, name: str) -> Iterator[Result]:
        """What a method makes of each photograph, one after the other where all at once fails."""
        try:
            yield from self._results(name)
        except Exception as error:  # a method may raise anything; it is written down with the photograph
            if len(self._read) > 1:
                for each in self._read:
                    yield from _Batch(self._plan, [each]).results(name)
                return
            kind = "" if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: "
            reason = kind + " ".join(str(error).split())
            yield from (Result(row.number, name, {}, error=reason) for row in self.rows)

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
