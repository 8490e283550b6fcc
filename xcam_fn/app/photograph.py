"""What the app does with a photograph, as functions; `page` calls them.

The app writes nothing: what it shows is sent to the browser within the page, and weights that are not on
this machine yet are not downloaded.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup, escape
from PIL import Image
from torch import Tensor, nn

from xcam_fn import evaluate, models, plot
from xcam_fn.evaluate.seen import embedded, encoded, reason
from xcam_fn.methods import METHODS, find_method
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import heatmaps_of
from xcam_fn.metrics import Curve
from xcam_fn.models import describe, images
from xcam_fn.models.load import LoadedModel
from xcam_fn.plot.figures import COLORS, CURVE_INCHES, DASHES
from xcam_fn.scoring.running import Running, default_chunk_size, running_model

MAX_MEGABYTES = 20
MAX_MEGAPIXELS = 50
SLOW_FORWARDS = 2000
CURVES = {
    "insertion": "The most relevant pixels are shown first, the rest is blurred: the sooner the probability "
    "rises, the better the map.",
    "deletion": "The most relevant pixels are taken away first: the sooner the probability falls, the better "
    "the map.",
}
_LAYOUT: Any = {"trim_blocks": True, "keep_trailing_newline": True}
_TEMPLATES = Environment(loader=PackageLoader("xcam_fn.app"), autoescape=select_autoescape(), **_LAYOUT)
_DOLLAR = ("$", "&#36;")  # gradio fills in ${…} of what it shows

Choices = list[tuple[str, Any]]
Watch = Callable[[int], None]


class StoppedError(Exception):
    """The explanation was canceled."""


class Seen(NamedTuple):
    """A photograph as a network sees it."""

    x: Tensor  # (1, 3, h, w), what the network is given
    picture: np.ndarray  # (h, w, 3), the same as pixels
    probabilities: Tensor  # (classes,)


class Asked(NamedTuple):
    """What was asked for, as `models.load` and `explain_all` take it, which is all that the code needs."""

    photo: str
    model: str
    weights: str | None
    layer: str
    cls: int
    category: str
    methods: tuple[str, ...]
    device: str = "cpu"


class Found(NamedTuple):
    """What was found so far, by the names of methods."""

    maps: dict[str, Tensor]  # (1, h, w)
    curves: dict[str, dict[str, Curve]]  # of insertion and of deletion
    remarks: dict[str, str]  # why a map is empty, or why there is none


def load(name: str, weights: str | None, device: str) -> LoadedModel:
    """The network, as `models.load` gives it with the published weights or others, without a download.

    What is wrong with a path is not said: who may use the page could ask for it which files there are.
    """
    place = None if weights else models.download_place(name)
    if place is not None and not place.exists():
        raise ValueError(
            f"the weights of model {name!r} are not on this machine, and the app downloads none; give the "
            f"path of a checkpoint, or 'random', or have `xcam explain PHOTO --model {name}` fetch them"
        )
    try:
        return models.load(name, weights=weights or None, device=device).classifying()
    except Exception:
        if weights in (None, "", "random"):
            raise
        expected = f"a checkpoint of it, or 'random' (`xcam layers {name} --weights {weights}` says why)"
        raise ValueError(f"model {name!r} cannot have weights {weights!r}; expected {expected}") from None


def check_size(path: str | os.PathLike[str]) -> None:
    """Raise where a photograph has more pixels than are taken; it is not decoded for that."""
    expected = f"expected at most {MAX_MEGAPIXELS} megapixels; make it smaller first"
    named = f"image {Path(path).name!r} is"
    ignored = warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)
    try:
        with ignored, Image.open(path, formats=images.FORMATS) as opened:
            width, height = opened.size
    except Image.DecompressionBombError:
        raise ValueError(f"{named} far too large; {expected}") from None
    except Exception:  # a broken file makes Pillow raise almost anything
        return
    megapixels = width * height / 1_000_000
    if megapixels > MAX_MEGAPIXELS:
        raise ValueError(f"{named} {width} x {height} pixels ({megapixels:.0f} megapixels); {expected}")


def see(loaded: LoadedModel, path: str | os.PathLike[str], device: str) -> Seen:
    """The photograph as the network sees it, and what it takes it for."""
    check_size(path)
    try:
        x, picture = images.prepare(path, loaded.preset)
    except ValueError as error:  # the folder of an upload says nothing to whoever made it
        raise ValueError(str(error).replace(str(path), Path(path).name)) from error
    x = x.to(device)
    return Seen(x, picture, describe.probabilities(loaded, x).cpu())


def layer_choices(loaded: LoadedModel, device: str) -> tuple[Choices, str]:
    """The layers that have maps, each (what to show, name) with its size, and the name of the default one."""
    shapes, default = describe.layers_and_default(loaded, device)
    shown = {name: f"{name}  {'×'.join(map(str, shape[1:]))}" for name, shape in shapes.items()}
    shown[default] += ", default"
    return [(text, name) for name, text in shown.items()], default


def channels(choices: Choices, layer: str | None) -> int | None:
    """How many channels a layer of `layer_choices` has; None where it is not among them."""
    size = next((text.removeprefix(name) for text, name in choices if name == layer), None)
    return None if size is None else int(size.split("×")[0])


def class_choices(categories: Sequence[str], probabilities: Float[Tensor, " classes"] | None) -> Choices:
    """The classes, each (what to show, index), the five likeliest first where there is a photograph."""
    top = [] if probabilities is None else describe.likeliest(probabilities)
    names = [describe.class_name(cls, categories) for cls in range(len(categories))]
    first = {cls: f"{names[cls]}, {describe.percent(probability)}" for cls, probability in top}
    rest = {cls: name for cls, name in enumerate(names) if cls not in first}
    return [(text, cls) for cls, text in (first | rest).items()]


def method_choices(channels: int | None) -> Choices:
    """The methods, each (what to show, name), with what those cost that run the network often."""
    shown = []
    for name, method in METHODS.items():
        number = None if channels is None else method.forwards(channels)
        slow = "slow: " if number is not None and number >= SLOW_FORWARDS else ""
        shown.append((method.title + (f" ({slow}{number:,} forwards)" if number else ""), name))
    return shown


# -- the explanation ----------------------------------------------------------------------------------------


def explain(loaded: LoadedModel, asked: Asked, x: Float[Tensor, "1 C h w"], watch: Watch) -> Iterator[Found]:
    """Yield the maps found so far, one after the other; what fails is a remark.

    `watch` is called with the number of images before each forward that scores, and may raise `StoppedError`.
    """
    how = _watched(loaded.model, x, watch)
    call = Call(loaded.model, asked.layer, x, asked.cls)
    found = Found({}, {}, {})
    for name in asked.methods:
        watch(0)
        scores = "scorer" in inspect.signature(METHODS[name]).parameters
        method = find_method(name, **(how if scores else {}))
        try:
            heatmap = heatmaps_of(method, call)
            if not torch.isfinite(heatmap).all():
                raise ValueError("the heatmap holds NaN or infinite values")  # noqa: TRY301 (as what raises)
            if not heatmap.any():
                why = describe.why_empty(METHODS[name], loaded.model, asked.layer, x, asked.cls)
                found.remarks[name] = why
        except StoppedError:
            raise
        except Exception as error:  # a method may raise anything; the page says what
            found.remarks[name] = reason(error)
        else:
            found.maps[name] = heatmap
        yield found


def judge(
    loaded: LoadedModel, asked: Asked, x: Float[Tensor, "1 C h w"], found: Found, watch: Watch
) -> Iterator[Found]:
    """Yield what was found with the curves of one map after the other."""
    how = _watched(loaded.model, x, watch)
    for name, heatmap in found.maps.items():
        watch(0)
        judged = evaluate.judged(loaded.model, x, {name: heatmap}, asked.cls, list(CURVES), **how)
        found.curves[name] = judged[name]  # pyright: ignore[reportArgumentType] (these two are curves)
        yield found


def _watched(model: nn.Module, x: Tensor, watch: Watch) -> dict[str, Any]:
    """The keywords with which methods and metrics run the network as they do by themselves, but watched."""
    with torch.no_grad():
        run, *_ = running_model(model, x, Running())

    def scorer(batch: Tensor) -> Any:
        watch(len(batch))
        return run(batch)

    return {"scorer": scorer, "chunk_size": default_chunk_size(x, model)}


def code(asked: Asked, alpha: float, *, curves: bool = False) -> str:
    """The program that makes the same pictures, to be run in the folder of the photograph."""
    quoted = {name: json.dumps(value, ensure_ascii=False) for name, value in asked._asdict().items()}
    printable = "".join(letter if letter.isprintable() else " " for letter in asked.category)
    name = " ".join(printable.split())  # in one line: what follows a line break would be run
    category = "" if name == str(asked.cls) else name
    shown = quoted | {"category": category, "moved": asked.device != "cpu", "alpha": f"{alpha:g}"}
    return _TEMPLATES.get_template("code.txt").render(shown, curves=curves)


# -- what the page shows ------------------------------------------------------------------------------------


def overlays(picture: np.ndarray, found: Found, asked: Asked | None = None) -> str:
    """The photograph (h, w, 3) and each heatmap over it, as HTML; methods without a map are shown as such.

    The browser blends them, as `--xcam-alpha` says.
    """
    photograph = _url(picture)
    panels = [{"photograph": photograph, "title": "Photograph", "note": "as the network sees it"}]
    for name in asked.methods if asked else ():
        panel = {"title": METHODS[name].title, "note": found.remarks.get(name, "not computed yet")}
        if name in found.maps and asked:
            panel |= {"photograph": photograph, "heatmap": _url(_colored(found.maps[name][0].cpu().numpy()))}
            panel |= {"note": _note(name, found), "file": f"{Path(asked.photo).stem}_{name}.png"}
        panels.append(panel)
    ramp = _colored(np.linspace(0, 1, 128)[None])[..., :3]
    return _html("overlays.html", panels=panels, legend=_url(ramp) if found.maps else "")


def _colored(heatmap: np.ndarray) -> UInt8[np.ndarray, "h w 4"]:
    """The heatmap (h, w) in color, its opacity the heatmap itself."""
    black = np.zeros((*heatmap.shape, 3), np.uint8)
    colors = plot.overlay(black, heatmap, alpha=1.0, alpha_follows_heatmap=False)
    return np.dstack([colors, np.round(255 * heatmap).astype(np.uint8)])


def _note(name: str, found: Found) -> str:
    areas = describe.values_of(found.curves.get(name, {}))
    measured = ", ".join(f"{metric} {area:.3f}" for metric, area in areas.items())
    return "; ".join(filter(None, [found.remarks.get(name), measured]))


def curves(found: Found) -> str:
    """The curves of all methods so far, a figure for insertion and one for deletion, as HTML.

    The legend is HTML, whose lines are broken where the screen is narrow.
    """
    if not found.curves:
        return ""
    figures = []
    for metric, meaning in CURVES.items():
        about = evaluate.METRICS[metric]
        named = {METHODS[name].title: both[metric] for name, both in found.curves.items()}
        figure, file = plot.curves(named, best=about.best, title=about.title), io.BytesIO()
        if legend := figure.axes[-1].get_legend():
            legend.remove()
            figure.set_size_inches(*CURVE_INCHES)
        figure.savefig(file, format="svg")
        lines = [
            {"title": title, "area": float(curve.auc), "color": COLORS[i % len(COLORS)], "dashes": _dashes(i)}
            for i, (title, curve) in enumerate(named.items())
        ]
        lines.sort(key=lambda line: line["area"], reverse=about.best == "highest")
        url = embedded(file.getvalue(), "svg+xml")
        figures.append({"metric": metric, "meaning": meaning, "url": url, "lines": lines})
    return _html("curves.html", figures=figures)


def _dashes(number: int) -> str:
    """The dashes of a curve, as SVG writes them."""
    dashes = DASHES[number % len(DASHES)]
    return "" if isinstance(dashes, str) else " ".join(f"{1.6 * length:g}" for length in dashes[1])


def safe(text: str) -> Markup:
    """The text as HTML, also where `${…}` is filled in."""
    return Markup(str(escape(text)).replace(*_DOLLAR))


def _html(template: str, **values: Any) -> str:
    return _TEMPLATES.get_template(template).render(values).replace(*_DOLLAR)


def _url(pixels: np.ndarray) -> str:
    return embedded(encoded(pixels, "PNG"), "png")
