"""Methods and metrics over a data set, written down as they come, continued where a run stopped."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from xcam_fn import checks
from xcam_fn.evaluate.dataset import Photograph
from xcam_fn.evaluate.store import ImageRow, Result, Score, Store, beside, writing
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import accepted, heatmaps_of
from xcam_fn.methods.together import Methods, Run, named_methods
from xcam_fn.metrics.curves import Curve
from xcam_fn.metrics.judged import Explainer, Judged, by_name, one_class_scoring
from xcam_fn.metrics.table import METRICS, STANDARD, scored
from xcam_fn.models import images
from xcam_fn.models.load import LoadedModel
from xcam_fn.network.split import default_layer, split
from xcam_fn.scoring.running import Precision, Running, check_running

_HEATMAP_PIXELS = 112
_PICTURE_QUALITY = 85
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
    about: Mapping[str, Any]
    progress: bool


class _Options(NamedTuple):
    """The defaults of `RunOptions`."""

    precision: Precision = "float32"
    compile: bool = False
    chunk_size: int | None = None
    retry: bool = False
    beside: bool = False
    about: Mapping[str, Any] = MappingProxyType({})
    progress: bool = False


class Outcome(NamedTuple):
    """What a run came to, what was done before included.

    Attributes:
        photographs: how many there are.
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
    photographs: Sequence[Photograph]
    methods: Mapping[str, Run]
    metric_names: Sequence[str]
    layer: str
    explain: Explain
    batch_size: int
    running: Running


def run(
    network: LoadedModel,
    photographs: Sequence[Photograph],
    methods: Methods,
    metric_names: Sequence[str] = STANDARD,
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
        photographs: as `dataset.photographs` lists them.
        methods: names of methods ("gradcam+sscam" is the fusion of two), functions, or a mapping from names
            to these.
        metric_names: names of `METRICS`.
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
    _check(photographs, metric_names, explain, batch_size)
    if unknown := [name for name in how if name not in _Options._fields]:
        known = ", ".join(sorted(_Options._fields))
        raise TypeError(f"run() has no option {unknown[0]!r}; its options are {known}")
    asked = _Options(**how)
    running = Running(asked.precision, asked.compile, chunk_size=asked.chunk_size)
    blank = torch.zeros(1, 3, network.preset.crop, network.preset.crop, device=_device(network.model))
    check_running(running, blank)
    layer = default_layer(network.model, blank) if layer is None else layer
    split(network.model, layer, blank)  # raises where there is no such layer
    named = [p._replace(name=p.name.encode(errors="backslashreplace").decode()) for p in photographs]
    plan = _Plan(network, named, chosen, metric_names, layer, explain, batch_size, running)
    settings = _settings(plan, asked.about, variant, options or {})
    plan = plan._replace(methods={name: _scored_alike(run, running) for name, run in chosen.items()})
    place = beside(Path(output), settings) if asked.beside else Path(output)
    with writing(place, settings) as store:
        if asked.retry:
            store.forget_failures()
        contents = {n: (there, _content(named[n].path)) for n, there in store.contents().items()}
        store.forget([n for n, (there, here) in contents.items() if here not in (None, there)])
        for seen, missing in _batches(plan, store, asked.progress):
            _judge(plan, store, seen, missing)
        return Outcome(len(named), len(store.unreadable()), *store.counts(), place)


*_own, _ = inspect.signature(run).parameters.values()
run.__dict__["__signature__"] = inspect.signature(run).replace(parameters=[*_own, *by_name(_Options)])


def _check(
    photographs: Sequence[Photograph], metric_names: Sequence[str], explain: str, batch_size: int
) -> None:
    if not photographs:
        raise ValueError("photographs is empty; expected one or more")
    if not metric_names or len(set(metric_names)) != len(metric_names):
        raise ValueError(f"metrics={list(metric_names)!r}; expected one or more names, each once")
    for name in metric_names:
        checks.check_choice("metrics", name, tuple(METRICS))
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
        "photographs": _digest(f"{p.name}\n{p.label}\n".encode() for p in plan.photographs),
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


def _scored_alike(run: Run, running: Running) -> Run:
    """The method with the metrics' precision, compilation and chunks, where it takes them."""
    given = {name: value for name, value in running._asdict().items() if value != getattr(Running(), name)}
    return functools.partial(run, **accepted(run, given))


def _fingerprint(model: nn.Module) -> str:
    """What tells one set of parameters from another."""
    raw = lambda value: value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()  # noqa: E731
    state = model.state_dict().items()
    return _digest(part for name, value in state for part in (name.encode(), raw(value)))


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters(), torch.zeros(0)).device


def _content(path: Path) -> str | None:
    """What tells a file's content from another; None where there is no file that can be read."""
    with contextlib.suppress(OSError):
        if path.is_file():  # a pipe would be waited for
            with path.open("rb") as file:
                return hashlib.file_digest(file, "blake2b").hexdigest()[:16]
    return None


# -- what comes in ------------------------------------------------------------------------------------------


def _batches(
    plan: _Plan, store: Store, progress: bool
) -> Iterator[tuple[list[tuple[ImageRow, Tensor | None]], dict[str, set[int]]]]:
    """The batches in which something is missing, read ahead of the network, and what is missing in them."""
    done, unreadable = store.done(), store.unreadable()
    count, pending = len(plan.photographs), []
    for start in range(0, count, plan.batch_size):
        readable = [n for n in range(start, min(start + plan.batch_size, count)) if n not in unreadable]
        missing = {name: {n for n in readable if (n, name) not in done} for name in plan.methods}
        if any(missing.values()):
            pending.append((readable, missing))
    already = count - sum(len(numbers) for numbers, _ in pending)
    bar = tqdm(total=count, initial=already, unit="photo", disable=not progress)
    with ThreadPoolExecutor(1) as pool, bar:
        coming = (pool.submit(lambda some: [_read(plan, n) for n in some], numbers) for numbers, _ in pending)
        ahead = deque(itertools.islice(coming, _AHEAD))
        for numbers, missing in pending:
            ahead.extend(itertools.islice(coming, 1))
            yield ahead.popleft().result(), missing
            bar.update(len(numbers))


def _read(plan: _Plan, number: int) -> tuple[ImageRow, Tensor | None]:
    """What is known of a photograph, and it as the network sees it, or None with the reason in the row."""
    name, path, label = plan.photographs[number]
    row = ImageRow(number, name, label, content=_content(path))
    try:
        x, picture = images.prepare(path, plan.network.preset)
    except (ValueError, OSError) as error:
        return row._replace(error=" ".join(str(error).split())), None
    return row._replace(picture=_encoded(picture, "JPEG", quality=_PICTURE_QUALITY)), x


# -- what is found ------------------------------------------------------------------------------------------


def _judge(plan: _Plan, store: Store, read: Sequence[Any], missing: Mapping[str, set[int]]) -> None:
    """Write down what the network saw of a batch, and what is missing of the methods' results."""
    for row, x in read:
        if x is None:
            store.write_image(row)
    seen = [(row, x) for row, x in read if x is not None]
    if not seen:
        return
    batch = _Batch(plan, [row for row, _ in seen], torch.cat([x for _, x in seen]))
    for row in batch.rows:
        store.write_image(row)
    for name, numbers in missing.items():
        for result in batch.results(name) if numbers else ():
            if result.number in numbers:
                store.write_result(result)


class _Batch:
    """Photographs that are explained together, each for its own class."""

    def __init__(self, plan: _Plan, rows: Sequence[ImageRow], x: Tensor) -> None:
        model, x = plan.network.model, x.to(_device(plan.network.model))
        cls: Any = None if plan.explain == "predicted" else [row.label for row in rows]
        with one_class_scoring(model, x, cls, **plan.running._asdict()) as self._scoring:
            explained = self._scoring.explained
        self._plan, self._cls = plan, torch.as_tensor(explained.cls, device=x.device)
        self._call = Call(model, plan.layer, x, self._cls, records=len(plan.methods) > 1)
        found = zip(rows, self._cls.tolist(), explained.own[:, 0].tolist(), strict=True)
        self.rows = [row._replace(cls=cls, probability=probability) for row, cls, probability in found]

    def results(self, name: str) -> Iterator[Result]:
        """What a method makes of each photograph, one after the other where all at once fails."""
        try:
            yield from self._results(name)
        except Exception as error:  # a method may raise anything; it is written down with the photograph
            if len(self.rows) > 1:
                for row, x in zip(self.rows, self._call.x.split(1), strict=True):
                    yield from _Batch(self._plan, [row], x).results(name)
                return
            kind = "" if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: "
            yield Result(self.rows[0].number, name, {}, error=kind + " ".join(str(error).split()))

    def _results(self, name: str) -> list[Result]:
        method, call = self._plan.methods[name], self._call
        heatmaps = heatmaps_of(method, call)
        is_finite = torch.isfinite(heatmaps).flatten(1).all(1)
        heatmaps = torch.where(is_finite[:, None, None], heatmaps, 0.0)
        explain = Explainer(method, call.model, call.layer, self._cls)
        with torch.no_grad():
            found = scored(Judged(self._scoring, heatmaps, explain), self._plan.metric_names)
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
    return _encoded((small * 255).round().clamp(0, 255).byte().cpu().numpy(), "PNG")


def _encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()
