"""Methods and metrics over a data set, written down as they come, continued where a run stopped."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypedDict, Unpack, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from xcam_fn import checks
from xcam_fn.evaluate.batch import Explain, Plan, Row, Task
from xcam_fn.evaluate.cluster import prepared
from xcam_fn.evaluate.dataset import Photograph
from xcam_fn.evaluate.here import computed_here, in_order
from xcam_fn.evaluate.items import Images, Items, as_images
from xcam_fn.evaluate.mosaic import Mosaic
from xcam_fn.evaluate.seen import as_given, content, described, digest, identity
from xcam_fn.evaluate.shards import Shard, hardware, note, shard_of
from xcam_fn.evaluate.store import KEPT, Store, beside, writing
from xcam_fn.methods.catalog import METHODS, accepted, as_method, name_of
from xcam_fn.methods.method import Method
from xcam_fn.methods.together import Methods, Run, named_methods
from xcam_fn.metrics.judged import by_name
from xcam_fn.metrics.table import GRID, LOCALIZATION, METRICS, STANDARD
from xcam_fn.models.load import LoadedModel
from xcam_fn.network.split import default_layer, split
from xcam_fn.scoring.running import Precision, Running, check_running

_PATIENCE = 1.0  # seconds without a write, in which what was found may be lost
PACKAGES = ("xcam-fn", "torch", "torchvision", "numpy", "pillow")


class RunOptions(TypedDict, total=False):
    """How a run computes its scores, and what it does with its folder."""

    precision: Precision
    compile: bool
    chunk_size: int | None
    retry: bool
    beside: bool
    keep: Sequence[str]
    about: Mapping[str, Any]
    shard: str | None
    ray: str | None
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
    shard: str | None = None
    ray: str | None = None
    progress: bool = False


class Outcome(NamedTuple):
    """The outcome of a run, including what was done before it was resumed.

    Attributes:
        photographs: number of photographs, for a shard those of the shard; each cell of a mosaic counts.
        unreadable: number of photographs that could not be read.
        results: pairs of a photograph and a method with scores.
        failures: pairs that failed.
        folder: the folder of the results.
    """

    photographs: int
    unreadable: int
    results: int
    failures: int
    folder: Path


def run(
    network: LoadedModel | Sequence[LoadedModel],
    photographs: Any,
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
    """Run every method and metric on every photograph, skipping what the folder already holds.

    Unreadable photographs and failing methods are recorded, and the run continues. Batches are formed from
    the whole list, so a resumed run gives the same numbers.

    Args:
        network: a network from `models.load`, or your own `LoadedModel`; or a list of the same network on
            several devices, which share the batches.
        photographs: photographs from `dataset.photographs`, a folder or CSV file that it accepts, or any data
            set of (x, label, name): a Hugging Face data set, an indexable one with a length, or an iterable
            with the same order each time, such as a DataLoader or WebDataset. x is a path, the bytes of a
            file, a PIL image, an array (h, w, 3), or a prepared tensor (3, h, w); label is an index, a name
            or None. Or mosaics from `mosaics_of`: one call of a method explains the classes of all cells, and
            each cell counts as a photograph.
        methods: names of methods ("gradcam+sscam" is the fusion of two), functions, or a mapping from names
            to these.
        metric_names: names of `METRICS`; None for `STANDARD`, `GRID` for mosaics, or `LOCALIZATION` for
            photographs with regions.
        output: the folder, whose results.sqlite holds all results.
        layer: a name, or None for `default_layer`.
        explain: explain the "predicted" class of each photograph or its "label".
        batch_size: photographs per batch, ≥ 1; it changes speed and memory.
        variant: a library of `VARIANTS` whose definitions to use.
        options: keywords of the methods; at least one method must accept each.
        precision: "float32" or "bfloat16", of the scoring forward passes.
        compile: compile the network for scoring.
        chunk_size: perturbed images per forward pass; None chooses automatically.
        retry: retry what failed before.
        beside: if the folder holds a run with other settings, use the next free one of output_2, output_3 …
        keep: which of "pictures", "heatmaps" and "curves" to keep besides the scores, for the report: about
            14 kB per photograph, and 3 kB and 1 kB per heatmap.
        about: further settings that the results depend on, such as the seed of the sample; a run with other
            values is a different run.
        shard: "2/4" for the second of four parts, in whole batches, for `evaluate.merge`; "env" reads the
            part from the variables of a Slurm array, torchrun or Kubernetes.
        ray: the address of a Ray cluster, or "local" for a temporary one on this machine. This process
            collects and writes the results.
        progress: show a progress bar on stderr.

    Returns:
        How many photographs and results there are.

    Raises:
        ValueError: a name is not known, a value is out of range, a label is missing, or the folder holds a
            run with other settings or is in use by another run.
        TypeError: no method accepts an option, or an item of the data set is invalid.
        ConnectionError: there is no Ray cluster at the address.
        OSError: the folder cannot be written to, or the disk is full; earlier results are safe.
    """
    chosen = named_methods(methods, variant, **(options or {}))
    if unknown := [name for name in how if name not in _Options._fields]:
        known = ", ".join(sorted(_Options._fields))
        raise TypeError(f"run() has no option {unknown[0]!r}; its options are {known}")
    asked = _Options(**how)
    for name in asked.keep:
        checks.check_choice("keep", name, KEPT)
    networks = [network] if isinstance(network, LoadedModel) else list(network)
    weights = {_fingerprint(each.model) for each in networks}
    if len(weights) != 1:
        raise ValueError(
            f"network: {len(networks)} with different weights; expected one, or copies on several devices"
        )
    if asked.ray is not None and len(networks) > 1:
        raise ValueError(f"ray: got {len(networks)} devices, but each actor uses one; give one device")
    shard = shard_of(asked.shard)
    images = as_images(photographs, networks[0].categories)
    first, images = _peeked(images)
    _check(images, first, explain, batch_size, shard)
    running = Running(asked.precision, asked.compile, chunk_size=asked.chunk_size)
    plan = _plan(networks[0], first, chosen, _checked_metrics(metric_names, first), layer, explain, running)
    given = {name: described(value) for name, value in (options or {}).items()}
    keep = [name for name in KEPT if name in asked.keep]
    plain = json.loads(json.dumps(dict(asked.about), default=described))
    about = {**plain, **_own_options(methods), "keep": keep, "variant": variant, "options": given}
    settings = _settings(plan, weights.pop(), images, photographs, batch_size, shard, about)
    plan = plan._replace(methods={name: _scored_alike(run, running) for name, run in chosen.items()})
    plans = [plan._replace(network=each) for each in networks]
    on_ray = None if asked.ray is None else prepared(plan, images, asked.ray, settings["versions"])
    place = beside(Path(output), settings) if asked.beside else Path(output)
    with writing(place, settings) as store:
        if asked.retry:
            store.forget_failures()
        work = _Work(plan, images, batch_size, shard, store, asked.progress)
        if on_ray is None:
            note(place, [hardware([each.device for each in networks])])
            work.write(computed_here(plans, work.tasks()))
        else:
            work.write(on_ray(work.tasks(), functools.partial(note, place)))
        note(place, rows=work.end * plan.cells, step=batch_size * plan.cells)
        return Outcome(work.rows, len(store.unreadable()), *store.counts(), place)


*_own, _ = inspect.signature(run).parameters.values()
run.__dict__["__signature__"] = inspect.signature(run).replace(parameters=[*_own, *by_name(_Options)])


def _peeked(
    images: Images | Iterator[Photograph],
) -> tuple[Photograph | Mosaic, Images | Iterator[Photograph]]:
    """The first image, and all of them."""
    if isinstance(images, Sequence):
        first = images[0] if images else None
    else:
        first = next(images, None)
        images = itertools.chain([first], images) if first is not None else images
    if first is None:
        raise ValueError("photographs is empty; expected at least one")
    return first, images


def _plan(
    network: LoadedModel,
    first: Photograph | Mosaic,
    methods: Mapping[str, Run],
    metric_names: Sequence[str],
    layer: str | None,
    explain: Explain,
    running: Running,
) -> Plan:
    """How each batch is computed, checked before anything is written."""
    side, cells = network.preset.crop, 1
    if isinstance(first, Mosaic):
        side, cells = first.side, first.n**2
    size = side, side
    if isinstance(first, Photograph) and isinstance(first.path, Tensor):
        height, width = as_given(first.path, network.preset)[0].shape[2:]
        size = height, width
    blank = torch.zeros(1, 3, *size, device=network.device)
    check_running(running, blank)
    layer = default_layer(network.model, blank) if layer is None else layer
    split(network.model, layer, blank)  # raises where there is no such layer
    return Plan(network, methods, metric_names, layer, explain, running, cells, size)


def _checked_metrics(metric_names: Sequence[str] | None, first: Photograph | Mosaic) -> Sequence[str]:
    """The names of the metrics, each possible for the photographs."""
    local = dict.fromkeys((*GRID, *LOCALIZATION))
    is_tiled = isinstance(first, Mosaic)
    is_located = not is_tiled and first.region is not None
    if metric_names is None:
        return GRID if is_tiled else LOCALIZATION if is_located else STANDARD
    if not metric_names or len(set(metric_names)) != len(metric_names):
        raise ValueError(f"metrics={list(metric_names)!r}; expected at least one name, without repeats")
    for name in metric_names:
        checks.check_choice("metrics", name, tuple(METRICS))
        if is_tiled and name not in local:
            raise ValueError(f"metrics={name!r} does not apply to mosaics; expected {', '.join(local)}")
        if not is_tiled and name in local and (name == "grid_pointing" or not is_located):
            wanted = "evaluate mosaics" if name == "grid_pointing" else "give boxes, evaluate mosaics"
            raise ValueError(f"metrics={name!r} needs the object's region; {wanted}, or use another metric")
    return metric_names


def _check(
    images: Images | Iterator[Photograph],
    first: Photograph | Mosaic,
    explain: str,
    batch_size: int,
    shard: Shard | None,
) -> None:
    checks.check_choice("explain", explain, get_args(Explain))
    checks.check_count("batch_size", batch_size)
    if shard and isinstance(images, Sequence) and shard.of > (batches := -(-len(images) // batch_size)):
        raise ValueError(f"shard='{shard}': the run has {batches} batches; expected at most as many shards")
    photographs = images if isinstance(images, Sequence) and not isinstance(images, Items) else [first]
    kinds = {(p.n, p.side) if isinstance(p, Mosaic) else p.region is None for p in photographs}
    if len(kinds) > 1:
        wanted = "all with a region, all without, or mosaics of one size"
        raise ValueError(f"photographs: {len(kinds)} different kinds; expected {wanted}")
    unlabeled = [photograph.name for photograph in photographs if photograph.label is None]
    if explain == "label" and unlabeled:
        many = f"{len(unlabeled)} of {len(photographs)} photographs have no label, such as {unlabeled[0]!r}"
        remedy = "give a CSV file of labels, or use explain='predicted'"
        raise ValueError(f"explain='label': {many}; {remedy}")


def _settings(
    plan: Plan,
    weights: str,
    images: Images | Iterator[Photograph],
    given: Any,
    batch_size: int,
    shard: Shard | None,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """What the results depend on, as the store keeps it."""
    return {
        "model": plan.network.name,
        "weights": weights,
        "preset": plan.network.preset,
        "categories": plan.network.categories,
        "photographs": _known_by(images, given),
        **about,
        "methods": _titles(plan.methods),
        "metrics": list(plan.metric_names),
        "layer": plan.layer,
        "explain": plan.explain,
        "batch size": batch_size,
        "precision": plan.running.precision,
        "compile": plan.running.compile,
        "chunk size": plan.running.chunk_size,
        "shard": shard and str(shard),
        "versions": {package: version(package) for package in PACKAGES},
    }


def _own_options(methods: Methods) -> dict[str, dict[str, str]]:
    """The options of methods that are not given by name, as the store keeps them, where they have any."""
    named = methods if isinstance(methods, Mapping) else {name_of(each): each for each in methods}
    given = {name: as_method(each) for name, each in named.items() if not isinstance(each, str)}
    found = {
        name: described(method.options)
        for name, method in given.items()
        if isinstance(method, Method) and method.options and method is not METHODS.get(method.name)
    }
    return {"own options": found} if found else {}


def _titles(methods: Mapping[str, Run]) -> dict[str, str]:
    """The title of each method; its name where another has the same title."""
    titles = {name: getattr(run, "title", name) for name, run in methods.items()}
    count = Counter(titles.values())
    return {name: title if count[title] == 1 else name for name, title in titles.items()}


def _known_by(images: Images | Iterator[Photograph], given: Any) -> str:
    """What tells a list from another; of what is read item by item the kind, for its contents are kept."""
    if isinstance(images, Sequence) and not isinstance(images, Items):
        return digest(map(_identity, images))
    kind = type(images.data if isinstance(images, Items) else given)
    many = f"{len(images)} items" if isinstance(images, Items) else "items"
    return f"{many} of {kind.__module__}.{kind.__qualname__}"


def _identity(photograph: Photograph | Mosaic) -> bytes:
    """What tells an image of a list from others; the contents of files are kept with the results."""
    is_file = isinstance(photograph, Mosaic) or isinstance(photograph.path, (str, os.PathLike))
    return identity(photograph) + (b"" if is_file else str(content(photograph)).encode())


def _scored_alike(run: Run, running: Running) -> Run:
    """The method with the metrics' precision, compilation and chunks, where it takes them."""
    given = {name: value for name, value in running._asdict().items() if value != getattr(Running(), name)}
    return functools.partial(run, **accepted(run, given))


def _fingerprint(model: nn.Module) -> str:
    """What tells one set of parameters from another."""
    raw = lambda value: value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()  # noqa: E731
    state = model.state_dict().items()
    return digest(part for name, value in state for part in (name.encode(), raw(value)))


class _Work:
    """The batches of a run: what is missing of them, and what is found of them, in the store.

    Attributes:
        rows: how many rows the run has, as far as they were looked through.
        end: how many images the data set has, once it was looked through.
    """

    def __init__(
        self,
        plan: Plan,
        images: Images | Iterator[Photograph],
        batch_size: int,
        shard: Shard | None,
        store: Store,
        progress: bool,
    ) -> None:
        self._plan, self._images, self._step, self._store = plan, images, batch_size, store
        self._shard = shard or Shard(1, 1)
        self.rows = self.end = 0
        total = (
            self._shard.share(len(images), batch_size) * plan.cells if isinstance(images, Sequence) else None
        )
        self._bar = tqdm(total=total, unit="photo", disable=not progress)

    def write(self, computed: Generator[tuple[Task, Iterable[Row]]]) -> None:
        """Write down what is found, as it comes."""
        with self._bar, contextlib.closing(computed) as found:
            for task, rows in found:
                self._write(rows)
                self._bar.update(len(task.images) * self._plan.cells)

    def _write(self, rows: Iterable[Row]) -> None:
        """Write a batch in one transaction, or in one a second where methods take longer."""
        waiting: list[Row] = []
        last = time.monotonic()
        for row in rows:
            waiting.append(row)
            if time.monotonic() - last > _PATIENCE:
                self._store.write(waiting)
                waiting, last = [], time.monotonic()
        self._store.write(waiting)

    def tasks(self) -> Iterator[Task]:
        """The batches in which something is missing; what is known of files that changed is forgotten."""
        unreadable, known, cells = self._store.unreadable(), self._store.contents(), self._plan.cells
        for number, (start, batch) in enumerate(self._batches()):
            self.end = start + len(batch)
            if number % self._shard.of != self._shard.number - 1:
                continue
            stale = set(self._stale(start, batch, known))
            if stale:
                self._store.forget(stale)
            rows = {i: range(i * cells, (i + 1) * cells) for i in range(start, self.end)}
            numbers = [i for i, some in rows.items() if some[0] not in unreadable or some[0] in stale]
            pairs = [(n, name) for i in numbers for n in rows[i] for name in self._plan.methods]
            done = self._store.done(start * cells, self.end * cells)
            there = {pair for pair in pairs if pair in done and pair[0] not in stale}
            self.rows += len(rows) * cells
            if len(there) < len(pairs):
                yield Task(start, batch, numbers, there)
            else:
                if not self._bar.disable:
                    self._bar.initial += len(rows) * cells  # no part of the speed
                self._bar.update(len(rows) * cells)
        if gone := [n for n in known if n >= self.end * cells]:
            self._store.forget(gone)

    def _stale(self, start: int, batch: Images, known: Mapping[int, str | None]) -> Iterator[int]:
        """The rows of images that have another content than the store knows."""
        for i in range(start, start + len(batch)):
            some = range(i * self._plan.cells, (i + 1) * self._plan.cells)
            if some[0] in known or some[-1] in known:
                now = content(batch[i - start])
                yield from (n for n in some if n in known and now not in (None, known[n]))

    def _batches(self) -> Iterator[tuple[int, Images]]:
        """The number of the first image of each batch, and its images."""
        if isinstance(self._images, Sequence):
            for start in range(0, len(self._images), self._step):
                yield start, self._images[start : start + self._step]
        else:
            yield from in_order(self._images, self._step)
