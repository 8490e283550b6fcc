"""The commands that explain photographs: `explain`, `compare` and `gallery`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from cyclopts import Parameter
from tqdm import tqdm

import xcam_fn as xf
from xcam_fn.cli.options import (
    ClassName,
    Drawing,
    Flag,
    Names,
    class_index,
    method_name,
    numbered,
    unknown_size,
)
from xcam_fn.cli.text import SOME_FAILED, saved, say, say_left_out, show, table

_LEGEND = "average drop, increase in confidence, area under insertion and deletion curves"
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
    """Explain photographs: print the five most probable classes and draw one heatmap per method.

    Your own network (--model FILE.py:FUNCTION) also takes arrays (.npy), volumes (.nii, .nii.gz), signals
    (.wav, .flac, .ogg) and short clips (.mp4, .avi, .mov, .mkv, .webm), with their values unchanged.

    Args:
        photos: one or more files, before the options.
        how: the network, and how the maps are computed and drawn.
        class_: the class to explain, an index or a name such as "tabby cat". [default: the predicted class]
        methods: one or more methods, or all; `xcam methods` lists them, and gradcam+sscam is the fusion of
            two. [default: gradcam]
        save_maps: also save the heatmaps, as .npy files, or as .nii.gz with the affine of a volume.
    """
    methods = methods or ["gradcam"]
    photos = how.photographs(photos or [], methods)

    from xcam_fn.cli import inputs

    explainer = _Explainer(how, methods, leave_out=methods == ["all"])
    if explainer.loaded.categories:
        class_index(class_, explainer.loaded)  # refused before anything is read
    unreadable = 0
    alone = len(photos) == 1
    named = _named(photos, how.output)
    for photo, name in tqdm(named, total=len(photos), unit="photo", disable=alone or None):
        try:
            given = inputs.read(photo) if inputs.is_data(photo) else explainer.photograph(photo)
        except (ValueError, OSError) as error:
            if alone:
                raise
            say("warning", error)
            unreadable += 1
            continue
        x = given.x.to(how.device)
        found = explainer.explain(x, class_index(class_, explainer.named(x)))
        lines = given.write(
            how.output / name, found.maps, found.caption, how.style, photos if save_maps else None
        )
        show("\n".join([how.shown(photo), *found.lines, *lines]))
    if unreadable:
        say("warning", f"{unreadable} of {len(photos)} photographs could not be read")
    return SOME_FAILED if unreadable else 0


def compare(
    photo: Annotated[Path | None, Parameter(name="PHOTO")] = None,
    /,
    *,
    how: Drawing = Drawing(),
    class_: ClassName = None,
    methods: Names = None,
) -> None:
    """Compare methods on a photograph: draw all side by side, with their scores and curves.

    Args:
        photo: an image file, before the options.
        how: the network, and how the maps are computed and drawn.
        class_: the class to explain, an index or a name such as "tabby cat". [default: the predicted class]
        methods: one or more methods, or all. [default: all]
    """
    methods = methods or ["all"]
    (photo,) = how.photographs([photo], methods)
    explainer = _Explainer(how, methods, leave_out=methods == ["all"])
    x, picture = explainer.prepare(photo)
    explained = explainer.explain(x, class_index(class_, explainer.loaded))
    maps = {title: heatmap[None] for title, heatmap in explained.titled.items()}
    found: dict[str, Any] = xf.evaluate.judged(explainer.loaded.model, x, maps, explained.cls)
    scores = {title: xf.models.describe.values_of(row) for title, row in found.items()}
    caption = f"{explained.caption}; {_LEGEND}"
    notes = {title: _note(*row.values()) for title, row in scores.items()}
    overlays = xf.plot.heatmaps(picture, explained.titled, caption=caption, notes=notes, **how.style)
    figures = {"compare": overlays}
    for name in ("insertion", "deletion"):
        about, curves = xf.evaluate.METRICS[name], {title: row[name] for title, row in found.items()}
        figures[name] = xf.plot.curves(curves, best=about.best, title=about.title)
    written = [saved(figure, how.output / f"{photo.stem}_{name}.png") for name, figure in figures.items()]
    headings = ["method", *(xf.evaluate.METRICS[name].title for name in xf.evaluate.STANDARD)]
    rows = [[title, *(f"{value:.4f}" for value in row.values())] for title, row in scores.items()]
    show("\n".join([how.shown(photo), *explained.lines, table([headings, *rows]), *written]))


def gallery(
    photo: Annotated[Path | None, Parameter(name="PHOTO")] = None,
    /,
    *,
    how: Drawing = Drawing(),
    class_: Annotated[list[str] | None, Parameter(name="--class", negative=())] = None,
    pairs: Names = None,
) -> None:
    """Draw fusions of maps: a row per pair, with its gradient map, its region map and their fusion.

    Args:
        photo: an image file, before the options.
        how: the network, and how the maps are computed and drawn.
        class_: a class to explain, an index or a name; repeatable. [default: the predicted class]
        pairs: methods to fuse. [default: gradcam+sscam gradcam_pp+iscam xgradcam+ablationcam]
    """
    (photo,) = how.photographs([photo], pairs or ())
    names = list(dict.fromkeys(map(method_name, pairs or _PAIRS)))
    for name in names:
        if name.count("+") != 1:
            raise ValueError(f"--pairs {name!r}: expected two methods joined by +, such as gradcam+scorecam")
    parts = [(*name.split("+"), name) for name in names]
    explainer = _Explainer(how, [name for row in parts for name in row])
    loaded, describe = explainer.loaded, xf.models.describe
    x, picture = explainer.prepare(photo)
    probabilities = describe.probabilities(loaded, x)
    named = class_ or [str(int(probabilities.argmax()))]
    classes = [xf.models.find_class(name, loaded.categories) for name in named]
    maps = explainer.maps(x, x.new_tensor([classes], dtype=int))
    rows = [
        {
            f"{title}\n{loaded.categories[cls]}": maps[method][0, i]
            for i, cls in enumerate(classes)
            for method, title in zip(row, (row[0].title, row[1].title, "fused"), strict=True)
        }
        for row in ([explainer.methods[name] for name in part] for part in parts)
    ]
    shown = [
        f"{describe.class_name(cls, loaded.categories)}, {describe.percent(float(probabilities[cls]))}"
        for cls in classes
    ]
    figure = xf.plot.grid(picture, rows, caption="; ".join([*shown, loaded.name]), **how.style)
    show(saved(figure, how.output / f"{photo.stem}_gallery.png"))


class _Explanation(NamedTuple):
    """One photograph explained: its maps (h, w), and what is said of them."""

    cls: int
    maps: dict[xf.Method, Any]
    caption: str
    lines: list[str]

    @property
    def titled(self) -> dict[str, Any]:
        return {method.title: heatmap for method, heatmap in self.maps.items()}


class _Explainer:
    """A network and the methods that explain it; all is checked before a photograph is read."""

    def __init__(self, how: Drawing, names: Sequence[str], *, leave_out: bool = False) -> None:
        xf.plot.check_style(**how.style)
        self.how, self.leave_out = how, leave_out  # leave out methods that do not fit the network?
        self.methods = how.methods(names, **({"progress": True} if sys.stderr.isatty() else {}))
        self.loaded = how.load()

    def photograph(self, photo: Path) -> Any:
        """A photograph, drawn under all heatmaps in one figure."""
        from xcam_fn.cli.inputs import Photograph

        x, picture = self.prepare(photo)
        return Photograph(x, lambda: picture)

    def prepare(self, photo: Path) -> tuple[Any, Any]:
        """The photograph as the network takes it, (1, 3, h, w), and as a picture (h, w, 3)."""
        if not self.loaded.preset.crop:
            remedy = "--image-size N to scale it to [0, 1], or a preprocessed array (.npy)"
            raise unknown_size(self.loaded.name, remedy)
        x, picture = xf.images.prepare(photo, self.loaded.preset)
        return x.to(self.how.device), picture

    def named(self, x: Any) -> xf.models.LoadedModel:
        """The network, its classes numbered by what it returns where nobody named them."""
        self.loaded = numbered(self.loaded, x)
        return self.loaded

    def maps(self, x: Any, cls: Any) -> dict[xf.Method, Any]:
        """The heatmaps of the methods that fit the network."""
        from xcam_fn.methods.together import explained_where_possible

        named = {method.name: method for method in self.methods.values()}
        found, lacking = explained_where_possible(self.loaded.model, self.how.layer, x, cls, named)
        if lacking and not self.leave_out:
            raise next(iter(lacking.values()))
        say_left_out(lacking)
        return {m: found[m.name] for m in self.methods.values() if m.name in found}

    def explain(self, x: Any, cls: int | None) -> _Explanation:
        """The heatmaps of one class, or of the likeliest one, in words."""
        describe, loaded, layer = xf.models.describe, self.loaded, self.how.layer
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
        return _Explanation(index, maps, caption, [table(rows), f"  explained: {caption}", *remarks])


def _note(drop: float, increase: float, insertion: float, deletion: float) -> str:
    gained = "yes" if increase else "no"
    return f"drop {drop:.3f}, increase {gained}\nins. {insertion:.3f}, del. {deletion:.3f}"


def _named(photos: list[Path], output: Path) -> Iterator[tuple[Path, str]]:
    """Each photograph with a name for its files: its own, numbered where another has it already."""
    taken = {photo.resolve() for photo in photos}
    for photo in photos:
        stem = Path(photo.name.removesuffix(".gz")).stem
        names = (stem + (f"_{n}" if n > 1 else "") for n in itertools.count(1))
        name = next(name for name in names if (output / f"{name}.png").resolve() not in taken)
        taken.add((output / f"{name}.png").resolve())
        yield photo, name
