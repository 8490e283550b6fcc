"""The commands for data sets: `evaluate`, `merge`, `report` and `latency`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

import xcam_fn as xf
from xcam_fn.cli.options import (
    Flag,
    Names,
    Question,
    check_folder,
    check_spelling,
    code_of,
    unknown_size,
)
from xcam_fn.cli.text import SOME_FAILED, saved_table, say, say_left_out, show, table
from xcam_fn.names import missing, nearest

_METRICS = "docs/metrics.md lists them"
_HUGGING_FACE = "hf:"
_PROBLEMS = 5  # of a file of boxes that are said one by one
Kept = Annotated[
    list[Literal["pictures", "heatmaps", "curves", "none"]] | None,
    Parameter(consume_multiple=True, negative=(), show_choices=False),
]
Photos = Annotated[list[Path] | None, Parameter(consume_multiple=True, negative=())]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Sample:
    """Which photographs of a data set.

    Attributes:
        num_images: how many photographs to sample; 0 for all.
        seed: seed of the sample.
        labels: a CSV file of file names and classes.
        boxes: annotations for localization metrics: a COCO file, PASCAL VOC files, or mask images named like
            the photographs; photographs without one are left out.
    """

    num_images: int = 100
    seed: int = 0
    labels: Path | None = None
    boxes: Path | None = None

    def __post_init__(self) -> None:
        """Raise where a number is out of range."""
        if self.num_images < 0:
            raise ValueError(f"--num-images {self.num_images}: expected a number ≥ 1, or 0 for all")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: expected a number ≥ 0")

    def check_files(self) -> None:
        """Raise where a file is not there, before torch is imported."""
        for what, file, kind in (("labels", self.labels, "file"), ("boxes", self.boxes, "file or folder")):
            if file is not None and not file.exists():
                raise missing(what, file, kind)

    def photographs(self, data: Path, categories: list[str]) -> Any:
        """Return the photographs of the data set that are sampled, and say which have no right region."""
        count = self.num_images or None
        if str(data).startswith(_HUGGING_FACE):
            if self.labels or self.boxes:
                raise ValueError(f"--labels and --boxes do not apply to {data}; leave them out")
            found = xf.evaluate.hugging_face(str(data).removeprefix(_HUGGING_FACE), categories)
            return xf.dataset.sampled(found, count, self.seed)
        found = self.all(data, categories)
        if self.boxes is not None:
            known = xf.evaluate.located(found, self.boxes)
            for problem in known.problems[:_PROBLEMS]:
                say("warning", problem)
            if len(known.problems) > _PROBLEMS:
                say("warning", f"{len(known.problems)} entries of {self.boxes} are left out in total")
            if known.without:
                say("left out", f"{known.without} of {len(found)} photographs have no region")
            found = known.photographs
        return xf.dataset.sampled(found, count, self.seed)

    @property
    def about(self) -> dict[str, Any]:
        """What a run depends on beside the photographs."""
        return {} if self.boxes is None else {"boxes": str(self.boxes)}

    def all(self, data: Path, categories: list[str]) -> list[xf.dataset.Photograph]:
        """Return all photographs of the data set."""
        return xf.dataset.photographs(data, categories, labels=self.labels, seed=self.seed)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Tiled:
    """Mosaics of photographs, in which it is known where each class is.

    Attributes:
        mosaics: evaluate N x N mosaics, --num-images of them, by whether each class's map lies in its cell.
            [default: no mosaics]
        confidence: the least predicted probability of a photograph in a mosaic; the highest are taken first.
        mosaic_size: resize mosaics to this side, in pixels, for a network with a fixed input size. [default:
            each photograph keeps its usual size]
    """

    mosaics: int | None = None
    confidence: float = 0.5
    mosaic_size: int | None = None

    def check(self, sample: Sample, data: Path) -> None:
        """Raise where mosaics cannot be made, before torch is imported."""
        if self.mosaics is None:
            return
        if str(data).startswith(_HUGGING_FACE):
            raise ValueError(f"--mosaics needs a folder of photographs or a CSV file, got {data}")
        if self.mosaics < 2:
            raise ValueError(f"--mosaics {self.mosaics}: expected at least 2 photographs per row")
        if sample.boxes is not None:
            raise ValueError("--boxes and --mosaics exclude each other; give one of them")
        if sample.num_images == 0:
            raise ValueError("--mosaics needs --num-images N, the number of mosaics, at least 1, got 0")

    def of(
        self, sample: Sample, data: Path, loaded: xf.models.LoadedModel, explain: str
    ) -> list[xf.evaluate.Mosaic]:
        """Return mosaics of the photographs of the data set, and say how sure the network is of these."""
        assert self.mosaics is not None
        drawn = xf.evaluate.mosaics_of(
            loaded, sample.all(data, loaded.categories),
            count=sample.num_images, n=self.mosaics, confidence=self.confidence, explain=explain,
            side=self.mosaic_size, seed=sample.seed, progress=sys.stderr.isatty(),
        )  # fmt: skip
        if drawn.unreadable:
            name, reason = next(iter(drawn.unreadable.items()))
            say("warning", f"{len(drawn.unreadable)} photographs could not be read, such as {name}: {reason}")
        sure = {
            p.path: s for each in drawn.mosaics for p, s in zip(each.members, each.probabilities, strict=True)
        }
        ends = f"{min(sure.values()):.2f} to {max(sure.values()):.2f}"
        cells = self.mosaics**2
        show(
            f"{len(drawn.mosaics)} mosaics of {len(sure)} out of {drawn.seen} photographs, those with the "
            f"highest predicted probability ({ends}); a map that ignores the class scores {1 / cells:.3g}"
        )
        return drawn.mosaics

    @property
    def about(self) -> dict[str, Any]:
        """What a run depends on."""
        if self.mosaics is None:
            return {}
        return {"mosaics": self.mosaics, "confidence": self.confidence, "mosaic size": self.mosaic_size}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run computes, where its results are, and which are kept.

    Attributes:
        output: the folder of the results; `xcam report` turns them into tables and a page.
        beside: if the folder holds a run with other settings, start a new run in a folder next to it.
        retry: retry what failed before.
        keep: what to keep besides the scores, for the report: pictures, heatmaps, curves, or none. [default:
            all three]
        shard: compute one part of the run, such as 2/4; env reads the part from the variables of a Slurm
            array, torchrun or Kubernetes. `xcam merge` joins the parts.
        ray: compute on the Ray cluster at this address, HOST:PORT or auto; without an address, on a cluster
            started on this machine for the run.
    """

    output: Path = Path("xcam_results")
    beside: Flag = False
    retry: Flag = False
    keep: Kept = None
    shard: str | None = None
    ray: Annotated[list[str] | None, Parameter(consume_multiple=(0, 1), negative=())] = None

    def __post_init__(self) -> None:
        """Raise where a choice is wrong."""
        check_folder(self.output)
        if len(self.keep or ()) > 1 and "none" in (self.keep or ()):
            raise ValueError(f"--keep {' '.join(self.keep or ())}: expected none alone, or what to keep")

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of `evaluate.run`."""
        from xcam_fn.evaluate.store import KEPT

        ray = None if self.ray is None else (self.ray or ["local"])[0]
        keep = KEPT if self.keep is None else () if self.keep == ["none"] else self.keep
        given = {"output": self.output, "beside": self.beside, "retry": self.retry, "keep": keep}
        return given | {"shard": self.shard, "ray": ray}


def evaluate(
    data: Annotated[Path, Parameter(name="DATA")],
    /,
    *,
    how: Question = Question(),
    methods: Names = None,
    metrics: Names = None,
    explain: Literal["predicted", "label"] = "predicted",
    batch_size: int = 1,
    precision: Literal["float32", "bfloat16"] = "float32",
    compile: Flag = False,
    place: Place = Place(),
    sample: Sample = Sample(),
    tiled: Tiled = Tiled(),
) -> int:
    """Evaluate methods on a data set. Run the same command again to continue where it stopped.

    Args:
        data: a folder of photographs, flat or with one folder per class; a CSV file of paths and classes; or
            hf:FOLDER for a Hugging Face data set written by save_to_disk.
        how: the network, and how the maps are computed.
        methods: one or more methods, or all; `xcam methods` lists them. [default: gradcam]
        metrics: one or more metrics, as docs/metrics.md lists them. [default: average_drop,
            increase_in_confidence, insertion and deletion; localization metrics with --boxes or --mosaics]
        explain: explain the predicted class of each photograph, or its label.
        batch_size: photographs per batch.
        precision: precision of the scoring forward passes.
        compile: compile the network for scoring.
        place: where to compute, and what to keep where.
        sample: which photographs.
        tiled: mosaics of them.
    """
    if not (data.exists() or str(data).startswith(_HUGGING_FACE)):
        raise missing("data", data, "folder or CSV file")
    how.check_files()
    for name in methods or ():
        check_spelling(name)
    for name in metrics or ():
        if name not in dir(xf):
            raise ValueError(f"metric {name!r} is not known; {nearest(name, dir(xf), _METRICS)}")
    tiled.check(sample, data)
    sample.check_files()
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: expected a number ≥ 1")
    device, *others = how.device.split(",")
    loaded, chosen = _loaded(replace(how, device=device), methods)
    if tiled.mosaics is None:
        photographs = sample.photographs(data, loaded.categories)
    else:
        photographs = tiled.of(sample, data, loaded, explain)
    code = code_of([how.model, *(methods or ())])
    about = {"seed": sample.seed, "num images": sample.num_images, **({"code": code} if code else {})}
    outcome = xf.evaluate.run(
        [loaded, *(replace(how, device=other).load() for other in others)],
        photographs,
        chosen,
        metrics,
        layer=how.layer,
        explain=explain,
        batch_size=batch_size,
        variant=how.variant,
        options=how.options,
        precision=precision,
        compile=compile,
        about=about | sample.about | tiled.about,
        progress=sys.stderr.isatty(),
        **place.options,
    )
    count, next_step = outcome.photographs, f"`xcam report {outcome.folder}` writes the report"
    if place.shard is not None:
        next_step = "`xcam merge` joins all shards"
    what = "photographs" if tiled.mosaics is None else "cells"
    show(f"{count} {what}, {outcome.results} results in {outcome.folder}; {next_step}")
    if outcome.unreadable or outcome.failures:
        unread = f"{outcome.unreadable} of {count} {what} could not be read"
        say("warning", f"{unread}, and {outcome.failures} results failed; the report says why")
    return SOME_FAILED if outcome.unreadable or outcome.failures or not outcome.results else 0


def merge(
    runs: Annotated[list[Path], Parameter(name="RUN")], /, *, output: Path, partial: Flag = False
) -> int:
    """Merge the shards of a run into one run. Merging again gives the same result.

    Args:
        runs: the folders that `xcam evaluate --shard` wrote to, all of them.
        output: the folder of the merged run.
        partial: merge what is there even if something is missing.
    """
    _check_runs(runs, output)
    merged = xf.evaluate.merge(runs, output, partial=partial)
    for kind, found in (("missing", merged.missing), ("done twice", merged.twice)):
        for what in found:
            say(kind, what)
    if len(merged.machines) > 1:
        listed = "; ".join(" ".join(map(str, machine.values())) for machine in merged.machines)
        say("warning", f"the shards ran on other hardware, so last digits may differ: {listed}")
    show(f"{merged.results} results in {output}; `xcam report {output}` writes the report")
    if merged.unreadable or merged.failures:
        unread = f"{merged.unreadable} photographs could not be read"
        say("warning", f"{unread}, and {merged.failures} results failed; the report says why")
    return SOME_FAILED if merged.unreadable or merged.failures else 0


def report(
    folders: Annotated[list[Path], Parameter(name="DIR", negative=())],
    /,
    *,
    output: Path | None = None,
    format: Literal["parquet", "csv"] | None = None,
) -> int:
    """Rank the methods in the results of `xcam evaluate`, and write tables, curves and a page.

    Args:
        folders: folders that `xcam evaluate` wrote: one run, or several, such as runs of other networks.
        output: the folder to write to. [default: the run's own; xcam_report for several runs]
        format: also write all scores to scores.parquet or scores.csv, with the columns run, image, method,
            metric and value; parquet needs pyarrow.
    """
    _check_runs(folders, output)
    found = [xf.report.read(folder) for folder in folders]
    place = output or (folders[0] if len(folders) == 1 else Path("xcam_report"))
    show(table(xf.report.table(*found)))
    show("\n".join(xf.report.advice(xf.report.board(*found))))
    if failures := sum(len(run.failures) for run in found):
        say("warning", f"{failures} failures; report.html lists them")
    written = xf.report.write(found, place)
    written += [xf.report.write_scores(found, place, format)] if format else []
    show("\n".join(f"wrote {path}" for path in written))
    return 0


def _check_runs(folders: list[Path], output: Path | None) -> None:
    """Raise where a folder is none of a run, or the output is a file, before torch is imported."""
    for folder in folders:
        if not (folder / "results.sqlite").is_file():
            wanted = "a folder that `xcam evaluate` wrote"
            raise FileNotFoundError(f"{str(folder)!r} holds no results.sqlite; expected {wanted}")
    if output is not None:
        check_folder(output)


def latency(
    *,
    how: Question = Question(),
    methods: Names = None,
    photo: Photos = None,
    batch_size: int = 1,
    rounds: int | None = None,
    output: Path | None = None,
) -> None:
    """Time methods and the network's forward pass, in seconds per image after warm-up.

    Args:
        how: the network, and how the maps are computed.
        methods: one or more methods, or all; `xcam methods` lists them. [default: gradcam]
        photo: photographs to explain, the next one in each round. [default: noise, the worst case for
            perturbation methods]
        batch_size: copies of an image per batch.
        rounds: how often to time each. [default: 5, or the number of photographs if larger]
        output: a CSV file to write the table to.
    """
    import torch

    from xcam_fn import checks

    rounds = max(5, len(photo or ())) if rounds is None else rounds
    checks.check_count("rounds", rounds)
    checks.check_count("batch_size", batch_size)
    loaded, chosen = _loaded(how, methods)
    side, noise = loaded.preset.crop, torch.Generator().manual_seed(0)
    batches = [
        xf.images.prepare(each, loaded.preset)[0].expand(batch_size, -1, -1, -1) for each in photo or ()
    ]
    batches = batches or [torch.randn(batch_size, 3, side, side, generator=noise)]
    settings = {"rounds": rounds, "variant": how.variant, "options": how.options}
    xs = [batch.contiguous().to(how.device) for batch in batches]
    found = xf.latency.timings(loaded.model, how.layer, xs, chosen, **settings)
    rows = [("method", *xf.latency.Timing._fields)]
    rows += [(name, *(f"{seconds:.6f}" for seconds in timing)) for name, timing in found.items()]
    images = f"{len(xs)} photograph{'s' * (len(xs) > 1)}" if photo else "noise"
    show(f"seconds per image, {images}, {rounds} rounds; first: the first call, not included in the others")
    show(table(rows))
    if output is not None:
        show(saved_table(rows, output))


def _loaded(
    how: Question, names: list[str] | None
) -> tuple[xf.models.LoadedModel, dict[str, str | xf.Method]]:
    """The network, and methods: the library's by name, for variant and options are a run's settings.

    Of all methods those that need what the network lacks are left out, and that is said.
    """
    import torch

    from xcam_fn.methods.together import explained_where_possible

    methods = how.methods(names or ["gradcam"])
    loaded, lacking = how.load(), {}
    if not loaded.preset.crop:
        raise unknown_size(loaded.name, "--image-size N to scale photographs to [0, 1]")
    if names == ["all"]:
        x = torch.zeros(1, 3, loaded.preset.crop, loaded.preset.crop, device=how.device)
        demanding = {method.name: method for method in methods.values() if method.needs}
        _, lacking = explained_where_possible(loaded.model, how.layer, x, None, demanding)
        say_left_out(lacking)
    named = {method.name: method if ":" in name else name for name, method in methods.items()}
    return loaded, {name: method for name, method in named.items() if name not in lacking}
