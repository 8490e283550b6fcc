"""The commands for data sets: `evaluate`, `report` and `latency`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from xcam_fn.cli._text import (
    NOTHING_READ,
    check_taken,
    fitting,
    method_names,
    named_method,
    options_of,
    own_methods,
    say,
    show,
    table,
)

if TYPE_CHECKING:
    from xcam_fn.models.load import LoadedModel

_RESULTS = Path("xcam_results")
_WARMUP = 2


def evaluate(
    data: Annotated[Path, Parameter(name="DATA")],
    /,
    *,
    model: str = "lite0",
    weights: str | None = None,
    layer: str | None = None,
    methods: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    metrics: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    num_images: int = 100,
    seed: int = 0,
    labels: Path | None = None,
    explain: Literal["predicted", "label"] = "predicted",
    batch_size: int = 1,
    variant: str | None = None,
    option: Annotated[list[str] | None, Parameter(negative=())] = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    compile: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    output: Path = _RESULTS,
    beside: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    retry: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    device: str = "cpu",
) -> int:
    """Evaluate methods on a data set, photograph by photograph; run again, it continues where it stopped.

    Args:
        data: a folder of photographs, flat or one folder a class, or a CSV file of paths and classes.
        model: lite0, a classification model of torchvision, or timm:NAME.
        weights: a checkpoint of your own (a state dict), or random.
        layer: whose maps are used; `xcam layers MODEL` lists them. [default: the last convolution's]
        methods: one or more methods, or all; `xcam methods` lists them. [default: gradcam]
        metrics: one or more of average_drop, increase_in_confidence, insertion, deletion, road, complexity,
            coherency and adcc. [default: the first four]
        num_images: how many photographs to sample; 0 for all.
        seed: of the sample.
        labels: a CSV file of file names and classes.
        explain: the predicted class of each photograph, or its label.
        batch_size: photographs at a time.
        variant: whose definitions to compute: xplaincam, torchcam or pytorch-grad-cam. [default: the papers']
        option: a keyword of the methods, such as num_samples=10, once for each. [default: the methods' own]
        precision: of the forwards that score.
        compile: compile the network that scores.
        output: the folder of the results; `xcam report` makes tables and a page of them.
        beside: where the folder holds a run with other settings, start one beside it.
        retry: try again what failed before.
        device: where to compute, such as cpu or cuda.
    """
    from xcam_fn import evaluate, models
    from xcam_fn.evaluate import dataset

    options, names = _chosen(methods, option, variant)
    if num_images < 0:
        raise ValueError(f"--num-images {num_images}: expected 1 or more, or 0 for all")
    loaded = models.load(model, weights=weights, device=device)
    photographs = dataset.photographs(
        data, loaded.categories, labels=labels, num_images=num_images or None, seed=seed
    )
    outcome = evaluate.run(
        loaded,
        photographs,
        fitting(names, loaded, layer, variant) if methods == ["all"] else own_methods(names, variant),
        metrics or evaluate.STANDARD,
        output=output,
        layer=layer,
        explain=explain,
        batch_size=batch_size,
        variant=variant,
        options=options,
        precision=precision,
        compile=compile,
        retry=retry,
        beside=beside,
        about={"seed": seed, "num images": num_images},
        progress=sys.stderr.isatty(),
    )
    return _told(outcome)


def _told(outcome: Any) -> int:
    show(
        f"{outcome.photographs} photographs, {outcome.results} results in {outcome.folder}; "
        f"`xcam report {outcome.folder}` makes tables and a page of them"
    )
    if outcome.unreadable or outcome.failures:
        say(
            "warning",
            f"{outcome.unreadable} of {outcome.photographs} photographs could not be read, and "
            f"{outcome.failures} results are failures; the report says why",
        )
    return 0 if outcome.results else NOTHING_READ


def report(folder: Annotated[Path, Parameter(name="DIR")], /, *, output: Path | None = None) -> int:
    """Make tables, curves and a page of what `xcam evaluate` found.

    Args:
        folder: that `xcam evaluate` wrote to.
        output: the folder to write to. [default: the same]
    """
    from xcam_fn.evaluate import report

    found = report.read(folder)
    show(table(report.table(found)))
    failures = [image for image in found.images if image.error] + [r for r in found.results if r.error]
    if failures:
        say("warning", f"{len(failures)} failures; report.html lists them")
    show("\n".join(f"wrote {path}" for path in report.write(found, output or folder)))
    return 0


def latency(
    *,
    model: str = "lite0",
    weights: str | None = None,
    layer: str | None = None,
    methods: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    photo: Path | None = None,
    batch_size: int = 1,
    rounds: int = 5,
    variant: str | None = None,
    option: Annotated[list[str] | None, Parameter(negative=())] = None,
    output: Path | None = None,
    device: str = "cpu",
) -> None:
    """Time methods: seconds an image after warm-up, in turn, the bare forward beside them.

    Args:
        model: lite0, a classification model of torchvision, or timm:NAME.
        weights: a checkpoint of your own (a state dict), or random.
        layer: whose maps are used; `xcam layers MODEL` lists them. [default: the last convolution's]
        methods: one or more methods, or all; `xcam methods` lists them. [default: gradcam]
        photo: what to explain. [default: noise, for which perturbation methods have most to do]
        batch_size: images at a time.
        rounds: how often each is timed.
        variant: whose definitions to compute: xplaincam, torchcam or pytorch-grad-cam. [default: the papers']
        option: a keyword of the methods, such as num_samples=10, once for each. [default: the methods' own]
        output: a CSV file to write the table to.
        device: where to compute, such as cpu or cuda.
    """
    import csv

    from xcam_fn import checks, models
    from xcam_fn.evaluate.latency import Timing, timings
    from xcam_fn.models import images

    options, names = _chosen(methods, option, variant)
    checks.check_count("rounds", rounds)
    checks.check_count("batch_size", batch_size)
    loaded = models.load(model, weights=weights, device=device)
    x = _noise(loaded, batch_size) if photo is None else images.prepare(photo, loaded.preset)[0]
    x = x.expand(batch_size, -1, -1, -1).contiguous().to(device)
    chosen = fitting(names, loaded, layer, variant) if methods == ["all"] else own_methods(names, variant)
    found = timings(loaded.model, layer, x, chosen, rounds=rounds, variant=variant, options=options)
    rows = [("method", *Timing._fields), *((name, *(f"{v:.6f}" for v in t)) for name, t in found.items())]
    show(table([(row[0], *row[1:]) for row in rows]))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        show(f"wrote {output}")


def _noise(loaded: LoadedModel, batch_size: int) -> Any:
    import torch

    side = loaded.preset.crop
    return torch.randn(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))


def _chosen(
    methods: list[str] | None, option: list[str] | None, variant: str | None
) -> tuple[dict[str, Any], list[str]]:
    """The options, and the names of the methods, each checked."""
    options = options_of(option or [])
    names = method_names(methods or ["gradcam"])
    check_taken(options, [named_method(name, variant, {}) for name in names])
    return options, names
