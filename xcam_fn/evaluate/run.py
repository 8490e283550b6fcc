"""Methods and metrics over a data set, written down as they come, continued where a run stopped."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from xcam_fn import checks, metrics
from xcam_fn.evaluate.dataset import Photograph
from xcam_fn.evaluate.store import ImageRow, OtherSettingsError, Result, Score, Store, writing
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import accepted, heatmaps_of
from xcam_fn.methods.together import Methods, Run, named_methods
from xcam_fn.metrics.of_map import Curve
from xcam_fn.models import images
from xcam_fn.models.load import LoadedModel
from xcam_fn.network.split import default_layer, split
from xcam_fn.perturb import blurred
from xcam_fn.scoring.running import Running, Scoring, check_running, scoring_of
from xcam_fn.targets import Classes

_HEATMAP_PIXELS = 112
_PICTURE_QUALITY = 85
_AHEAD = 2  # batches that are read while the network runs
_PACKAGES = ("xcam-fn", "torch", "torchvision", "numpy", "pillow")

Explain = Literal["predicted", "label"]


_OF_HEATMAP = ("confidence", "insertion", "deletion")  # what of a case depends on the heatmap alone


class Case:
    """A heatmap to be judged, with what metrics need for it; what several need is computed once."""

    def __init__(
        self, scoring: Scoring, smooth: Tensor, heatmap: Tensor, again: Callable[[], Tensor] | None = None
    ) -> None:
        self.scoring, self.smooth, self.heatmap = scoring, smooth, heatmap
        self._again = again

    def like(self, others: Iterable[Case]) -> Case:
        """The case itself, knowing what another found out about the same heatmap (two methods may agree)."""
        for other in others:
            if torch.equal(other.heatmap, self.heatmap):
                found = {name: value for name, value in vars(other).items() if name in _OF_HEATMAP}
                vars(self).update(found)
        return self

    @cached_property
    def confidence(self) -> tuple[Tensor, Tensor]:
        """The scores of the images and of what the heatmaps show, (B,) each."""
        return metrics.confidence(self.scoring, self.heatmap)

    @cached_property
    def coherency(self) -> Tensor:
        """As `metrics.coherency`, (B,)."""
        if self._again is None:
            raise ValueError(
                "coherency and adcc need the method, not only its heatmap; use metrics.coherency"
            )
        return self._again()

    def adcc(self) -> Tensor:
        """As `metrics.adcc`, (B,)."""
        kept = 1 - metrics.drop(*self.confidence)
        return metrics.harmonic_mean(self.coherency, 1 - metrics.complexity(self.heatmap), kept)

    @cached_property
    def insertion(self) -> Curve:
        """As `metrics.insertion`, with the steps of the paper."""
        return metrics.inserted(self.scoring, self.heatmap, self.smooth, metrics.step_pixels(self.scoring.x))

    @cached_property
    def deletion(self) -> Curve:
        """As `metrics.deletion`, with the steps of the paper."""
        return metrics.deleted(self.scoring, self.heatmap, 0.0, metrics.step_pixels(self.scoring.x))


class Metric(NamedTuple):
    """A metric that a data set is evaluated by.

    Attributes:
        title: its name in print.
        best: "highest" or "lowest".
        score: from a case to (B,) or a curve.
    """

    title: str
    best: Literal["highest", "lowest"]
    score: Callable[[Case], Tensor | Curve]


METRICS: Mapping[str, Metric] = {
    "average_drop": Metric("Average drop", "lowest", lambda case: metrics.drop(*case.confidence)),
    "increase_in_confidence": Metric(
        "Increase in confidence", "highest", lambda case: metrics.increase(*case.confidence)
    ),
    "insertion": Metric("Insertion", "highest", lambda case: case.insertion),
    "deletion": Metric("Deletion", "lowest", lambda case: case.deletion),
    "road": Metric("ROAD", "highest", lambda case: metrics.removed(case.scoring, case.heatmap).value),
    "complexity": Metric("Complexity", "lowest", lambda case: metrics.complexity(case.heatmap)),
    "coherency": Metric("Coherency", "highest", lambda case: case.coherency),
    "adcc": Metric("ADCC", "highest", Case.adcc),
}
STANDARD = ("average_drop", "increase_in_confidence", "insertion", "deletion")


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


class _Prepared(NamedTuple):
    """Photographs of one batch, read and prepared; for one that cannot be read, why."""

    x: list[Tensor]
    pictures: list[np.ndarray]
    numbers: list[int]
    errors: dict[int, str]
    labels: Any = None  # the classes to explain; None for the predicted ones

    def only(self, i: int) -> _Prepared:
        """The batch of one of them."""
        labels = None if self.labels is None else [self.labels[i]]
        return _Prepared([self.x[i]], [self.pictures[i]], [self.numbers[i]], {}, labels)


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
    precision: str = "float32",
    compile: bool = False,
    chunk_size: int | None = None,
    retry: bool = False,
    beside: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
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
    how = Running(precision, compile, None, chunk_size)  # pyright: ignore[reportArgumentType]
    blank = _blank(network)
    check_running(how, blank)
    layer = default_layer(network.model, blank) if layer is None else layer
    split(network.model, layer, blank)  # raises where there is no such layer
    settings = {
        "model": network.name,
        "weights": _fingerprint(network.model),
        "categories": network.categories,
        "photographs": _digest(f"{p.name}\n{p.label}\n".encode() for p in photographs),
        **(about or {}),
        "methods": {name: getattr(run, "title", name) for name, run in chosen.items()},
        "metrics": list(metric_names),
        "layer": layer,
        "explain": explain,
        "variant": variant,
        "options": {name: repr(value) for name, value in (options or {}).items()},
        "batch size": batch_size,
        "precision": precision,
        "compile": compile,
        "chunk size": chunk_size,
        "versions": {package: version(package) for package in _PACKAGES},
    }
    chosen = _scored_alike(chosen, how)
    wanted = {name: METRICS[name] for name in metric_names}
    with _opened(Path(output), settings, beside=beside) as store:
        if retry:
            store.forget_failures()
        for prepared, missing in _batches(store, network, photographs, list(chosen), batch_size, progress):
            for number, error in prepared.errors.items():
                photograph = photographs[number]
                store.write_image(ImageRow(number, photograph.name, photograph.label, error=error))
            if prepared.numbers:
                batch = _Batch(network, layer, wanted, how, _told(prepared, photographs, explain))
                batch.write_images(store, photographs)
                for method, numbers in missing.items():
                    for result in batch.results(method, chosen[method]):
                        if result.number in numbers:
                            store.write_result(result)
        return _outcome(store, photographs)


def judged(
    model: nn.Module,
    x: Float[Tensor, "B C *size"],
    heatmaps: Mapping[str, Float[Tensor, "B *size"]],
    cls: Classes = None,
    metric_names: Sequence[str] = STANDARD,
    **how: Any,
) -> dict[str, dict[str, Float[Tensor, " B"] | Curve]]:
    """The scores of heatmaps, from here or from elsewhere, on one batch.

    Args:
        model: the network, in evaluation mode.
        x: (B, C, *size), prepared images.
        heatmaps: names to heatmaps in [0, 1].
        cls: None for the predicted class of each image, an int, B ints, or a target. It is fixed once.
        metric_names: names of `METRICS`; those that need the method itself are not possible.
        **how: how the model is run: precision, compile, scorer, chunk_size, progress.

    Returns:
        {name: {metric: scores or curve}}.

    Raises:
        ValueError: a metric is not known or needs the method, or a heatmap does not fit.
    """
    for name in metric_names:
        checks.check_choice("metric_names", name, tuple(METRICS))
    with scoring_of(model, x, cls, "probability", Running(**how)) as scoring:
        smooth = blurred(x)
        found, cases = {}, []
        for name, heatmap in heatmaps.items():
            cases.append(Case(scoring, smooth, heatmap).like(cases))
            found[name] = {metric: METRICS[metric].score(cases[-1]) for metric in metric_names}
        return found


class _Batch:
    """Photographs that are explained together, each for its own class."""

    def __init__(
        self,
        network: LoadedModel,
        layer: str,
        wanted: Mapping[str, Metric],
        how: Running,
        prepared: _Prepared,
    ) -> None:
        self._network, self._layer, self._wanted, self._how = network, layer, wanted, how
        self._prepared, self._model = prepared, network.model
        device = next(self._model.parameters(), torch.zeros(0)).device
        self._x = torch.cat(prepared.x).to(device)
        with scoring_of(self._model, self._x, prepared.labels, "probability", how) as scoring:
            self._scoring = scoring
            self._smooth = blurred(self._x)
        self._cls: Any = torch.as_tensor(scoring.explained.cls, device=device)
        self._call = Call(self._model, layer, self._x, self._cls)
        self._cases: list[Case] = []

    def write_images(self, store: Store, photographs: Sequence[Photograph]) -> None:
        """Write down what the network saw, and the class that is explained."""
        own = self._scoring.explained.own[:, 0]
        for i, number in enumerate(self._prepared.numbers):
            name, _, label = photographs[number]
            picture = _encoded(self._prepared.pictures[i], "JPEG", quality=_PICTURE_QUALITY)
            store.write_image(ImageRow(number, name, label, int(self._cls[i]), float(own[i]), picture))

    def results(self, name: str, method: Run) -> Iterator[Result]:
        """What a method makes of each photograph, one after the other where all at once fails."""
        numbers = self._prepared.numbers
        try:
            yield from self._results(name, method)
        except Exception as error:  # a method may raise anything; it is written down with the photograph
            if len(numbers) == 1:
                kind = "" if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: "
                yield Result(numbers[0], name, {}, error=kind + " ".join(str(error).split()))
                return
            for i in range(len(numbers)):
                alone = self._prepared.only(i)
                yield from _Batch(self._network, self._layer, self._wanted, self._how, alone).results(
                    name, method
                )

    def _results(self, name: str, method: Run) -> list[Result]:
        x, cls = self._x, self._cls
        heatmaps = heatmaps_of(method, self._call)
        is_finite = torch.isfinite(heatmaps).flatten(1).all(1)
        heatmaps = torch.where(is_finite[:, None, None], heatmaps, 0.0)

        def again() -> Tensor:
            return metrics.coherency(method, self._model, self._layer, x, cls, heatmap=heatmaps)

        case = Case(self._scoring, self._smooth, heatmaps, again).like(self._cases)
        self._cases.append(case)
        with torch.no_grad():
            found = {metric: wanted.score(case) for metric, wanted in self._wanted.items()}
        return [
            Result(
                number,
                name,
                {metric: _score(value, i) for metric, value in found.items()},
                _small(heatmaps[i]),
            )
            if is_finite[i]
            else Result(number, name, {}, error="the heatmap holds NaN or infinite values")
            for i, number in enumerate(self._prepared.numbers)
        ]


def _score(found: Tensor | Curve, i: int) -> Score:
    if isinstance(found, Curve):
        return Score(
            float(found.auc[i]),
            found.fractions.double().cpu().numpy(),
            found.scores[i].double().cpu().numpy(),
        )
    return Score(float(found[i]))


def _small(heatmap: Tensor) -> bytes:
    size = [min(_HEATMAP_PIXELS, side) for side in heatmap.shape]
    small = F.interpolate(heatmap[None, None].float(), size, mode="area")[0, 0]
    return _encoded((small * 255).round().clamp(0, 255).byte().cpu().numpy(), "PNG")


def _encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


# -- what comes in ------------------------------------------------------------------------------------------


def _batches(
    store: Store,
    network: LoadedModel,
    photographs: Sequence[Photograph],
    methods: Sequence[str],
    batch_size: int,
    progress: bool,
) -> Iterator[tuple[_Prepared, dict[str, set[int]]]]:
    """The batches in which something is missing, read ahead of the network, and what is missing in them."""
    done, unreadable = store.done(), store.unreadable()
    pending = []
    for numbers in np.array_split(
        np.arange(len(photographs)), range(batch_size, len(photographs), batch_size)
    ):
        readable = {int(n) for n in numbers} - unreadable
        missing = {method: {n for n in readable if (n, method) not in done} for method in methods}
        if any(missing.values()):
            pending.append((sorted(readable), {method: some for method, some in missing.items() if some}))
    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(
            total=len(photographs), initial=len(photographs) - sum(len(numbers) for numbers, _ in pending),
            unit="photo", disable=not progress,
        ) as bar,
    ):  # fmt: skip
        ahead = []
        for i, (numbers, missing) in enumerate(pending):
            while len(ahead) < min(len(pending), i + 1 + _AHEAD):
                ahead.append(pool.submit(_prepare, network, photographs, pending[len(ahead)][0]))
            yield ahead[i].result(), missing
            ahead[i] = None
            bar.update(len(numbers))


def _prepare(network: LoadedModel, photographs: Sequence[Photograph], numbers: Sequence[int]) -> _Prepared:
    prepared = _Prepared([], [], [], {})
    for number in numbers:
        try:
            x, picture = images.prepare(photographs[number].path, network.preset)
        except (ValueError, OSError) as error:
            prepared.errors[number] = " ".join(str(error).split())
            continue
        prepared.x.append(x)
        prepared.pictures.append(picture)
        prepared.numbers.append(number)
    return prepared


def _told(prepared: _Prepared, photographs: Sequence[Photograph], explain: Explain) -> _Prepared:
    """The same with the classes to explain, where they are not the predicted ones."""
    if explain == "predicted":
        return prepared
    return prepared._replace(labels=[photographs[number].label for number in prepared.numbers])


def _blank(network: LoadedModel) -> Tensor:
    """An image of the network's kind, on its device."""
    device = next(network.model.parameters(), torch.zeros(0)).device
    return torch.zeros(1, 3, network.preset.crop, network.preset.crop, device=device)


def _scored_alike(chosen: Mapping[str, Run], how: Running) -> dict[str, Run]:
    """The methods with the metrics' precision, compilation and chunks, where they take them."""
    asked = {key: value for key, value in how._asdict().items() if value != Running._field_defaults[key]}
    return {name: functools.partial(run, **accepted(run, asked)) for name, run in chosen.items()}


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
        raise ValueError(
            f"explain='label': {len(unlabeled)} of {len(photographs)} photographs have no label, such as "
            f"{unlabeled[0]!r}; name a CSV file of labels, or explain the predicted classes"
        )


@contextlib.contextmanager
def _opened(output: Path, settings: Mapping[str, Any], *, beside: bool) -> Iterator[Store]:
    with contextlib.ExitStack() as stack:
        places = (output if n == 1 else output.with_name(f"{output.name}_{n}") for n in itertools.count(1))
        for place in places:
            try:
                yield stack.enter_context(writing(place, settings))
            except OtherSettingsError:
                if not beside:
                    raise
            else:
                return


def _fingerprint(model: nn.Module) -> str:
    """What tells one set of parameters from another."""
    state = model.state_dict()
    return _digest(
        part
        for name, value in state.items()
        for part in (
            name.encode(),
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data,
        )
    )


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _outcome(store: Store, photographs: Sequence[Photograph]) -> Outcome:
    failed = [error is not None for error in store.errors()]
    return Outcome(
        len(photographs), len(store.unreadable()), failed.count(False), failed.count(True), store.folder
    )
