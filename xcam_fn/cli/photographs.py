"""The commands that explain photographs: `explain`, `compare` and `gallery`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from cyclopts import Parameter

from xcam_fn.cli.options import ClassName, Drawing, Flag, Names
from xcam_fn.cli.text import NOTHING_READ, say, show, table

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor

    from xcam_fn.methods import Method
    from xcam_fn.models.load import LoadedModel

_DPI = 130
_LEGEND = "drop and increase of confidence, area of insertion and of deletion"
_PAIRS = ("gradcam+sscam", "gradcam_pp+iscam", "xgradcam+ablationcam")


def explain(
    photos: Annotated[list[Path] | None, Parameter(name="PHOTO", negative=())] = None,
    /,
    *,
    how: Drawing = Drawing(),
    class_: ClassName = None,
    methods: Names = None,
    save_maps: Flag = False,
) -> int:
    """Explain photographs: the five likeliest classes, and a figure with a heatmap per method.

    Args:
        photos: one or more image files, before the options.
        how: the network, and how the maps are computed and drawn.
        class_: the class to explain, an index or a name such as "tabby cat". [default: the likeliest]
        methods: one or more methods, or all; `xcam methods` lists them, and gradcam+sscam is the fusion of
            two. [default: gradcam]
        save_maps: write the heatmaps too, as .npy files.
    """
    if not photos:
        raise ValueError("no photograph was named; expected one or more before the options")
    from xcam_fn import plot

    explainer = _explainer(how, methods or ["gradcam"], leave_out=methods == ["all"])
    cls = explainer.find_class(class_)
    how.output.mkdir(parents=True, exist_ok=True)
    unreadable = 0
    for photo, name in _with_progress(photos, _names(photos, how.output)):
        try:
            prepared = explainer.prepare(photo)
        except (ValueError, OSError) as error:
            if len(photos) == 1:
                raise
            say("warning", error)
            unreadable += 1
            continue
        found = explainer.explain(*prepared, cls)
        figure = plot.heatmaps(found.picture, found.titled, caption=found.caption, **how.style)
        lines = [str(photo), *found.lines, _saved(figure, how.output / f"{name}.png")]
        if save_maps:
            lines += [_saved(m, how.output / f"{name}_{method.name}.npy") for method, m in found.maps.items()]
        show("\n".join(lines))
    if unreadable:
        say("warning", f"{unreadable} of {len(photos)} photographs could not be read")
    return NOTHING_READ if unreadable == len(photos) else 0


def compare(
    photo: Annotated[Path, Parameter(name="PHOTO")],
    /,
    *,
    how: Drawing = Drawing(),
    class_: ClassName = None,
    methods: Names = None,
) -> None:
    """Compare methods on a photograph: all side by side, each with its four scores, and their curves.

    Args:
        photo: an image file, before the options.
        how: the network, and how the maps are computed and drawn.
        class_: the class to explain, an index or a name such as "tabby cat". [default: the likeliest]
        methods: one or more methods, or all. [default: all]
    """
    from xcam_fn import evaluate, plot
    from xcam_fn.models import describe

    explainer = _explainer(how, methods or ["all"], leave_out=methods in (None, ["all"]))
    cls = explainer.find_class(class_)
    x, picture = explainer.prepare(photo)
    explained = explainer.explain(x, picture, cls)
    maps = {title: heatmap[None] for title, heatmap in explained.titled.items()}
    found: dict[str, Any] = evaluate.judged(explainer.loaded.model, x, maps, explained.cls)
    scores = {title: describe.values_of(row) for title, row in found.items()}
    headings = [evaluate.METRICS[name].title for name in evaluate.STANDARD]
    rows = [[title, *(f"{value:.4f}" for value in row.values())] for title, row in scores.items()]
    figures = {
        "compare": plot.heatmaps(
            picture,
            explained.titled,
            caption=f"{explained.caption}; {_LEGEND}",
            notes={title: _note(row) for title, row in scores.items()},
            **how.style,
        )
    }
    for name in ("insertion", "deletion"):
        about = evaluate.METRICS[name]
        lines = {title: row[name] for title, row in found.items()}
        figures[name] = plot.curves(lines, best=about.best, title=about.title)
    how.output.mkdir(parents=True, exist_ok=True)
    (stem,) = _names([photo], how.output)
    written = [_saved(figure, how.output / f"{stem}_{name}.png") for name, figure in figures.items()]
    show("\n".join([str(photo), *explained.lines, table([["method", *headings], *rows]), *written]))


def gallery(
    photo: Annotated[Path, Parameter(name="PHOTO")],
    /,
    *,
    how: Drawing = Drawing(),
    class_: Annotated[list[str] | None, Parameter(name="--class", negative=())] = None,
    pairs: Names = None,
) -> None:
    """Show how maps fuse: a row for each pair, with its gradient map, its region map and the fusion of both.

    Args:
        photo: an image file, before the options.
        how: the network, and how the maps are computed and drawn.
        class_: a class to explain, an index or a name; once for each. [default: the likeliest]
        pairs: methods to fuse. [default: gradcam+sscam gradcam_pp+iscam xgradcam+ablationcam]
    """
    import torch

    from xcam_fn import plot
    from xcam_fn.models import describe

    names = list(dict.fromkeys(pairs or _PAIRS))
    for name in names:
        if name.count("+") != 1:
            raise ValueError(f"--pairs {name!r}: expected two methods and a plus, such as gradcam+scorecam")
    parts = [(*name.split("+"), name) for name in names]
    explainer = _explainer(how, [name for row in parts for name in row])
    x, picture = explainer.prepare(photo)
    probabilities = describe.probabilities(explainer.loaded, x)
    classes = [explainer.find_class(c) for c in class_ or [str(int(probabilities.argmax()))]]
    maps = explainer.maps(x, torch.tensor([classes], device=x.device))
    categories = explainer.loaded.categories
    rows = [
        {
            f"{title}\n{categories[cls]}": maps[method][0, i]
            for i, cls in enumerate(classes)
            for method, title in zip(row, (row[0].title, row[1].title, "fused"), strict=True)
        }
        for row in ([explainer.methods[name] for name in part] for part in parts)
    ]
    caption = "; ".join(
        f"{categories[cls]} (class {cls}), {describe.percent(float(probabilities[cls]))}" for cls in classes
    )
    figure = plot.grid(picture, rows, caption=f"{caption}; {explainer.loaded.name}", **how.style)
    how.output.mkdir(parents=True, exist_ok=True)
    (stem,) = _names([photo], how.output)
    show(_saved(figure, how.output / f"{stem}_gallery.png"))


# One photograph


class _Explanation(NamedTuple):
    """One photograph explained: its maps (h, w), and what is said of them."""

    picture: np.ndarray
    cls: int
    maps: dict[Method, Tensor]
    caption: str
    lines: list[str]

    @property
    def titled(self) -> dict[str, Tensor]:
        return {method.title: heatmap for method, heatmap in self.maps.items()}


@dataclass(frozen=True)
class _Explainer:
    """A network and the methods that explain it; with `leave_out` those that do not fit are left out."""

    how: Drawing
    methods: dict[str, Method]
    leave_out: bool
    loaded: LoadedModel

    def find_class(self, name: str | None) -> Any:
        from xcam_fn import models

        return None if name is None else models.find_class(name, self.loaded.categories)

    def prepare(self, photo: Path) -> tuple[Tensor, np.ndarray]:
        from xcam_fn.models import images

        x, picture = images.prepare(photo, self.loaded.preset)
        return x.to(self.how.device), picture

    def maps(self, x: Tensor, cls: Any) -> dict[Method, Tensor]:
        from xcam_fn.methods.together import explained_where_possible

        named: dict[str, Any] = {method.name: method for method in self.methods.values()}
        found, lacking = explained_where_possible(self.loaded.model, self.how.layer, x, cls, named)
        for name, error in lacking.items():
            if not self.leave_out:
                raise error
            say("left out", f"{name}: {error}")
        return {m: found[m.name] for m in self.methods.values() if m.name in found}

    def explain(self, x: Tensor, picture: np.ndarray, cls: int | None) -> _Explanation:
        import xcam_fn as xf
        from xcam_fn.models import describe

        loaded, layer = self.loaded, self.how.layer
        probabilities = describe.probabilities(loaded, x)
        index = int(probabilities.argmax()) if cls is None else cls
        maps = {method: heatmaps[0] for method, heatmaps in self.maps(x, index).items()}
        shown_layer = layer or xf.default_layer(loaded.model, x)
        caption = describe.caption(loaded, index, float(probabilities[index]), shown_layer)
        rows = [
            (f"  {i}", loaded.categories[i], describe.percent(probability))
            for i, probability in describe.likeliest(probabilities)
        ]
        remarks = [
            f"  {method.title}: {describe.why_empty(method, loaded.model, layer, x, index)}"
            for method, heatmap in maps.items()
            if not heatmap.any()
        ]
        return _Explanation(picture, index, maps, caption, [table(rows), f"  explained: {caption}", *remarks])


def _explainer(how: Drawing, names: Sequence[str], *, leave_out: bool = False) -> _Explainer:
    """All that is checked before a photograph is read, the network loaded last."""
    from xcam_fn import plot

    plot.check_style(**how.style)
    methods = how.methods(names, **({"progress": True} if sys.stderr.isatty() else {}))
    if how.output.exists() and not how.output.is_dir():
        raise ValueError(f"--output {str(how.output)!r} is a file; expected a folder")
    return _Explainer(how, methods, leave_out, how.load())


def _note(scores: dict[str, float]) -> str:
    drop, increase, insertion, deletion = scores.values()
    gained = "yes" if increase else "no"
    return f"drop {drop:.3f}, increase {gained}\ninsertion {insertion:.3f} deletion {deletion:.3f}"


def _saved(what: Figure | Tensor, path: Path) -> str:
    """Write a figure, or a map as an array, and say where."""
    import numpy as np
    import torch

    if isinstance(what, torch.Tensor):
        np.save(path, what.float().cpu().numpy())
    else:
        what.savefig(path, dpi=_DPI)
    return f"  wrote {path}"


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
