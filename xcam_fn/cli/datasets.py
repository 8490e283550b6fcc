"""The commands for data sets: `evaluate`, `report` and `latency`."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

import xcam_fn as xf
from xcam_fn.cli.options import Flag, Names, Question
from xcam_fn.cli.text import NOTHING_READ, say, say_left_out, show, table

Photos = Annotated[list[Path] | None, Parameter(consume_multiple=True, negative=())]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Sample:
    """Which photographs of a data set.

    Attributes:
        num_images: how many photographs to sample; 0 for all.
        seed: of the sample.
        labels: a CSV file of file names and classes.
    """

    num_images: int = 100
    seed: int = 0
    labels: Path | None = None

    def photographs(self, data: Path, categories: list[str]) -> list[xf.dataset.Photograph]:
        """Return the photographs of the data set that are sampled."""
        count = self.num_images or None
        return xf.dataset.photographs(data, categories, labels=self.labels, num_images=count, seed=self.seed)


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
    output: Path = Path("xcam_results"),
    beside: Flag = False,
    retry: Flag = False,
    sample: Sample = Sample(),
) -> int:
    """Evaluate methods on a data set, photograph by photograph; run again, it continues where it stopped.

    Args:
        data: a folder of photographs, flat or one folder a class, or a CSV file of paths and classes.
        how: the network, and how the maps are computed.
        methods: one or more methods, or all; `xcam methods` lists them. [default: gradcam]
        metrics: one or more names of `METRICS`, as docs/metrics.md lists them. [default: average_drop,
            increase_in_confidence, insertion and deletion]
        explain: the predicted class of each photograph, or its label.
        batch_size: photographs at a time.
        precision: of the forwards that score.
        compile: compile the network that scores.
        output: the folder of the results; `xcam report` makes tables and a page of them.
        beside: where the folder holds a run with other settings, start one beside it.
        retry: try again what failed before.
        sample: which photographs.
    """
    if sample.num_images < 0:
        raise ValueError(f"--num-images {sample.num_images}: expected 1 or more, or 0 for all")
    loaded, chosen = _loaded(how, methods)
    outcome = xf.evaluate.run(
        loaded,
        sample.photographs(data, loaded.categories),
        chosen,
        metrics or xf.evaluate.STANDARD,
        output=output,
        layer=how.layer,
        explain=explain,
        batch_size=batch_size,
        variant=how.variant,
        options=how.options,
        precision=precision,
        compile=compile,
        retry=retry,
        beside=beside,
        about={"seed": sample.seed, "num images": sample.num_images},
        progress=sys.stderr.isatty(),
    )
    count, next_step = outcome.photographs, f"`xcam report {outcome.folder}` makes tables and a page of them"
    show(f"{count} photographs, {outcome.results} results in {outcome.folder}; {next_step}")
    if outcome.unreadable or outcome.failures:
        unread = f"{outcome.unreadable} of {count} photographs could not be read"
        say("warning", f"{unread}, and {outcome.failures} results are failures; the report says why")
    return 0 if outcome.results else NOTHING_READ


def report(folder: Annotated[Path, Parameter(name="DIR")], /, *, output: Path | None = None) -> int:
    """Make tables, curves and a page of what `xcam evaluate` found.

    Args:
        folder: that `xcam evaluate` wrote to.
        output: the folder to write to. [default: the same]
    """
    found = xf.report.read(folder)
    show(table(xf.report.table(found)))
    if failures := sum(bool(each.error) for each in [*found.images, *found.results]):
        say("warning", f"{failures} failures; report.html lists them")
    show("\n".join(f"wrote {path}" for path in xf.report.write(found, output or folder)))
    return 0


def latency(
    *,
    how: Question = Question(),
    methods: Names = None,
    photo: Photos = None,
    batch_size: int = 1,
    rounds: int | None = None,
    output: Path | None = None,
) -> None:
    """Time methods: seconds an image after warm-up, in turn, the bare forward beside them.

    Args:
        how: the network, and how the maps are computed.
        methods: one or more methods, or all; `xcam methods` lists them. [default: gradcam]
        photo: photographs to explain, the next in each round. [default: noise, for which perturbation
            methods have most to do]
        batch_size: copies of an image at a time.
        rounds: how often each is timed. [default: 5, or once for each photograph where there are more]
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
    show(f"seconds an image, of {images}, in {rounds} rounds; first: of a first call, which they leave out")
    show(table(rows))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        show(f"wrote {output}")


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
    if names == ["all"]:
        x = torch.zeros(1, 3, loaded.preset.crop, loaded.preset.crop, device=how.device)
        demanding = {method.name: method for method in methods.values() if method.needs}
        _, lacking = explained_where_possible(loaded.model, how.layer, x, None, demanding)
        say_left_out(lacking)
    named = {method.name: method if ":" in name else name for name, method in methods.items()}
    return loaded, {name: method for name, method in named.items() if name not in lacking}
