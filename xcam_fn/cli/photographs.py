"""The commands that explain photographs: `explain` and `gallery`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from cyclopts import Parameter

from xcam_fn.cli._text import (
    NOTHING_READ,
    check_taken,
    method_names,
    named_method,
    options_of,
    say,
    show,
    table,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor

    from xcam_fn.methods import Method
    from xcam_fn.models.load import LoadedModel

_DPI = 130
_LEGEND = "drop and increase of confidence, area of insertion and of deletion"
_PAIRS = ("gradcam+sscam", "gradcam_pp+iscam", "xgradcam+ablationcam")


class _Explanation(NamedTuple):
    """What came out for one photograph."""

    picture: np.ndarray
    probabilities: Tensor
    cls: int
    layer: str
    maps: dict[str, np.ndarray]  # method names to (h, w)
    remarks: list[str]


def explain(
    photos: Annotated[list[Path] | None, Parameter(name="PHOTO", negative=())] = None,
    /,
    *,
    model: str = "lite0",
    weights: str | None = None,
    layer: str | None = None,
    class_: Annotated[str | None, Parameter(name="--class")] = None,
    methods: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    variant: str | None = None,
    option: Annotated[list[str] | None, Parameter(negative=())] = None,
    output: Path = Path("xcam_output"),
    save_maps: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    colormap: str = "viridis",
    alpha: float = 0.5,
    device: str = "cpu",
) -> int:
    """Explain photographs: the five likeliest classes, and a figure with a heatmap per method.

    Args:
        photos: one or more image files, before the options.
        model: lite0, a classification model of torchvision, or timm:NAME.
        weights: a checkpoint of your own (a state dict), or random.
        layer: whose maps are used; `xcam layers MODEL` lists them. [default: the last convolution's]
        class_: the class to explain, an index or a name such as "tabby cat". [default: the likeliest]
        methods: one or more methods, or all; `xcam methods` lists them, and gradcam+sscam is the fusion of
            two. [default: gradcam]
        variant: whose definitions to compute: xplaincam, torchcam or pytorch-grad-cam. [default: the papers']
        option: a keyword of the methods, such as num_samples=10, once for each. [default: the methods' own]
        output: the folder to write to.
        save_maps: write the heatmaps too, as .npy files.
        colormap: a name of matplotlib's, such as viridis or jet.
        alpha: how much the colors cover the photograph, 0 to 1.
        device: where to compute, such as cpu or cuda.
    """
    if not photos:
        raise ValueError("no photograph was named; expected one or more before the options")
    from xcam_fn import models, plot
    from xcam_fn.models import images

    plot.check_style(colormap=colormap, alpha=alpha)
    options = options_of(option or [])
    chosen = [named_method(name, variant, options) for name in method_names(methods or ["gradcam"])]
    check_taken(options, chosen)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {str(output)!r} is a file; expected a folder")
    loaded = models.load(model, weights=weights, device=device)
    cls = None if class_ is None else models.find_class(class_, loaded.categories)
    output.mkdir(parents=True, exist_ok=True)
    unreadable = 0
    for photo, name in _with_progress(photos, _names(photos, output)):
        try:
            x, picture = images.prepare(photo, loaded.preset)
        except (ValueError, OSError) as error:
            if len(photos) == 1:
                raise
            say("warning", error)
            unreadable += 1
            continue
        explanation = _explained(
            loaded, chosen, layer, cls, x.to(device), picture, leave_out=methods == ["all"]
        )
        lines = _report(photo, loaded, explanation)
        figure = plot.heatmaps(
            picture,
            {m.title: explanation.maps[m.name] for m in chosen if m.name in explanation.maps},
            caption=_caption(loaded, explanation),
            colormap=colormap,
            alpha=alpha,
        )
        lines += _write(figure, explanation.maps if save_maps else {}, output / name)
        show("\n".join(lines))
    if unreadable:
        say("warning", f"{unreadable} of {len(photos)} photographs could not be read")
    return NOTHING_READ if unreadable == len(photos) else 0


def compare(
    photo: Annotated[Path, Parameter(name="PHOTO")],
    /,
    *,
    model: str = "lite0",
    weights: str | None = None,
    layer: str | None = None,
    class_: Annotated[str | None, Parameter(name="--class")] = None,
    methods: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    variant: str | None = None,
    option: Annotated[list[str] | None, Parameter(negative=())] = None,
    output: Path = Path("xcam_output"),
    colormap: str = "viridis",
    alpha: float = 0.5,
    device: str = "cpu",
) -> None:
    """Compare methods on a photograph: all side by side, each with its four scores, and their curves.

    Args:
        photo: an image file, before the options.
        model: lite0, a classification model of torchvision, or timm:NAME.
        weights: a checkpoint of your own (a state dict), or random.
        layer: whose maps are used; `xcam layers MODEL` lists them. [default: the last convolution's]
        class_: the class to explain, an index or a name such as "tabby cat". [default: the likeliest]
        methods: one or more methods, or all. [default: all]
        variant: whose definitions to compute: xplaincam, torchcam or pytorch-grad-cam. [default: the papers']
        option: a keyword of the methods, such as num_samples=10, once for each. [default: the methods' own]
        output: the folder to write to.
        colormap: a name of matplotlib's, such as viridis or jet.
        alpha: how much the colors cover the photograph, 0 to 1.
        device: where to compute, such as cpu or cuda.
    """
    import torch

    from xcam_fn import evaluate, models, plot
    from xcam_fn.models import describe, images

    plot.check_style(colormap=colormap, alpha=alpha)
    options = options_of(option or [])
    chosen = [named_method(name, variant, options) for name in method_names(methods or ["all"])]
    check_taken(options, chosen)
    loaded = models.load(model, weights=weights, device=device)
    cls = None if class_ is None else models.find_class(class_, loaded.categories)
    x, picture = images.prepare(photo, loaded.preset)
    x = x.to(device)
    explanation = _explained(loaded, chosen, layer, cls, x, picture, leave_out=methods in (None, ["all"]))
    maps = {
        m.title: torch.from_numpy(explanation.maps[m.name])[None].to(x)
        for m in chosen
        if m.name in explanation.maps
    }
    found: dict[str, Any] = evaluate.judged(loaded.model, x, maps, explanation.cls)
    scores = {title: describe.values_of(row) for title, row in found.items()}
    headings = [evaluate.METRICS[name].title for name in evaluate.STANDARD]
    rows = [[title, *(f"{value:.4f}" for value in row.values())] for title, row in scores.items()]
    lines = [*_report(photo, loaded, explanation), table([["method", *headings], *rows])]
    stem = output / _names([photo], output)[0]
    output.mkdir(parents=True, exist_ok=True)
    figure = plot.heatmaps(
        picture,
        {title: heatmap[0] for title, heatmap in maps.items()},
        caption=f"{_caption(loaded, explanation)}; {_LEGEND}",
        notes={title: _note(row) for title, row in scores.items()},
        colormap=colormap,
        alpha=alpha,
    )
    lines += _write(figure, {}, stem.with_name(f"{stem.name}_compare"))
    for name in ("insertion", "deletion"):
        about = evaluate.METRICS[name]
        drawn = plot.curves(
            {title: row[name] for title, row in found.items()}, best=about.best, title=about.title
        )
        lines += _write(drawn, {}, stem.with_name(f"{stem.name}_{name}"))
    show("\n".join(lines))


def gallery(
    photo: Annotated[Path, Parameter(name="PHOTO")],
    /,
    *,
    model: str = "lite0",
    weights: str | None = None,
    layer: str | None = None,
    class_: Annotated[list[str] | None, Parameter(name="--class", negative=())] = None,
    pairs: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    variant: str | None = None,
    option: Annotated[list[str] | None, Parameter(negative=())] = None,
    output: Path = Path("xcam_output"),
    colormap: str = "viridis",
    alpha: float = 0.5,
    device: str = "cpu",
) -> None:
    """Show how maps fuse: a row for each pair, with its gradient map, its region map and the fusion of both.

    Args:
        photo: an image file, before the options.
        model: lite0, a classification model of torchvision, or timm:NAME.
        weights: a checkpoint of your own (a state dict), or random.
        layer: whose maps are used; `xcam layers MODEL` lists them. [default: the last convolution's]
        class_: a class to explain, an index or a name; once for each. [default: the likeliest]
        pairs: methods to fuse. [default: gradcam+sscam gradcam_pp+iscam xgradcam+ablationcam]
        variant: whose definitions to compute: xplaincam, torchcam or pytorch-grad-cam. [default: the papers']
        option: a keyword of the methods, such as num_samples=10, once for each. [default: the methods' own]
        output: the folder to write to.
        colormap: a name of matplotlib's, such as viridis or jet.
        alpha: how much the colors cover the photograph, 0 to 1.
        device: where to compute, such as cpu or cuda.
    """
    import torch

    from xcam_fn import models, plot
    from xcam_fn.models import describe, images

    plot.check_style(colormap=colormap, alpha=alpha)
    names = list(dict.fromkeys(pairs or _PAIRS))
    for name in names:
        if name.count("+") != 1:
            raise ValueError(f"--pairs {name!r}: expected two methods and a plus, such as gradcam+scorecam")
    options = options_of(option or [])
    parts = {
        name: [named_method(part, variant, options) for part in (*name.split("+"), name)] for name in names
    }
    chosen = list({method.name: method for row in parts.values() for method in row}.values())
    check_taken(options, chosen)
    loaded = models.load(model, weights=weights, device=device)
    x, picture = images.prepare(photo, loaded.preset)
    x = x.to(device)
    probabilities = describe.probabilities(loaded, x)
    classes = [models.find_class(c, loaded.categories) for c in class_ or [str(int(probabilities.argmax()))]]
    maps = _all_maps(loaded, chosen, layer, x, torch.tensor([classes], device=x.device))
    rows = [
        {
            f"{title}\n{loaded.categories[cls]}": maps[method.name][0, i].float().cpu().numpy()
            for i, cls in enumerate(classes)
            for method, title in zip(row, (row[0].title, row[1].title, "fused"), strict=True)
        }
        for row in parts.values()
    ]
    caption = "; ".join(
        f"{loaded.categories[cls]} (class {cls}), {describe.percent(float(probabilities[cls]))}"
        for cls in classes
    )
    output.mkdir(parents=True, exist_ok=True)
    figure = plot.grid(picture, rows, caption=f"{caption}; {loaded.name}", colormap=colormap, alpha=alpha)
    show("\n".join(_write(figure, {}, output / f"{_names([photo], output)[0]}_gallery")))


# One photograph


def _note(scores: dict[str, float]) -> str:
    drop, increase, insertion, deletion = scores.values()
    gained = "yes" if increase else "no"
    return f"drop {drop:.3f}, increase {gained}\ninsertion {insertion:.3f} deletion {deletion:.3f}"


def _explained(
    loaded: LoadedModel,
    methods: list[Method],
    layer: str | None,
    cls: int | None,
    x: Tensor,
    picture: np.ndarray,
    *,
    leave_out: bool,
) -> _Explanation:
    """One photograph explained; with `leave_out` without the methods that do not fit the network."""
    import xcam_fn as xf
    from xcam_fn.models import describe

    probabilities = describe.probabilities(loaded, x)
    index = int(probabilities.argmax()) if cls is None else cls
    found = _all_maps(loaded, methods, layer, x, index, leave_out=leave_out)
    maps = {name: heatmaps[0].float().cpu().numpy() for name, heatmaps in found.items()}
    remarks = [
        f"{method.title}: {describe.why_empty(method, loaded.model, layer, x, index)}"
        for method in methods
        if method.name in maps and not maps[method.name].any()
    ]
    return _Explanation(
        picture, probabilities, index, layer or xf.default_layer(loaded.model, x), maps, remarks
    )


def _all_maps(
    loaded: LoadedModel,
    methods: list[Method],
    layer: str | None,
    x: Tensor,
    cls: Any,
    *,
    leave_out: bool = False,
) -> dict[str, Tensor]:
    from xcam_fn.methods.together import explained_where_possible, named_methods

    watched = sys.stderr.isatty() and any("progress" in inspect.signature(m).parameters for m in methods)
    options: dict[str, Any] = {"progress": True} if watched else {}
    chosen = named_methods({m.name: m for m in methods}, **options)
    found, lacking = explained_where_possible(loaded.model, layer, x, cls, chosen)
    for name, error in lacking.items():
        if not leave_out:
            raise error
        say("left out", f"{name}: {error}")
    return found


def _report(photo: Path, loaded: LoadedModel, explanation: _Explanation) -> list[str]:
    from xcam_fn.models import describe

    rows = [
        (f"  {index}", loaded.categories[index], describe.percent(probability))
        for index, probability in describe.likeliest(explanation.probabilities)
    ]
    explained = f"  explained: {_caption(loaded, explanation)}"
    return [str(photo), table(rows), explained, *(f"  {remark}" for remark in explanation.remarks)]


def _caption(loaded: LoadedModel, explanation: _Explanation) -> str:
    from xcam_fn.models import describe

    cls = explanation.cls
    return describe.caption(loaded, cls, float(explanation.probabilities[cls]), explanation.layer)


def _write(figure: Figure, maps: dict[str, np.ndarray], stem: Path) -> list[str]:
    """Writes the files, and says which."""
    import numpy as np

    written = [stem.with_name(f"{stem.name}.png")]
    figure.savefig(written[0], dpi=_DPI)
    for method, heatmap in maps.items():
        written.append(stem.with_name(f"{stem.name}_{method}.npy"))
        np.save(written[-1], heatmap)
    return [f"  wrote {path}" for path in written]


def _names(photos: list[Path], output: Path) -> list[str]:
    """A name for each photograph's files: its own, numbered where another has it already."""
    taken = {photo.resolve() for photo in photos}
    names = []
    for photo in photos:
        name, number = photo.stem, 1
        while (output / f"{name}.png").resolve() in taken:
            number += 1
            name = f"{photo.stem}_{number}"
        taken.add((output / f"{name}.png").resolve())
        names.append(name)
    return names


def _with_progress(photos: list[Path], names: list[str]) -> Iterator[tuple[Path, str]]:
    """The pairs, with a bar on stderr where there are several and a person is watching."""
    from tqdm import tqdm

    pairs = list(zip(photos, names, strict=True))
    yield from tqdm(pairs, unit="photo", disable=None if len(pairs) > 1 else True)
