"""Classify and explain a photograph for the app's `page`.

The app writes no files: the page embeds all pictures. It does not download weights either.
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
    "insertion": "Pixels are revealed on a blurred image, the most relevant first: the sooner the "
    "probability rises, the better the map.",
    "deletion": "Pixels are removed, the most relevant first: the sooner the probability falls, the better "
    "the map.",
}
_LAYOUT: Any = {"trim_blocks": True, "keep_trailing_newline": True}
_TEMPLATES = Environment(loader=PackageLoader("xcam_fn.app"), autoescape=select_autoescape(), **_LAYOUT)
_DOLLAR = ("$", "&#36;")  # gradio substitutes ${…} in HTML

Choices = list[tuple[str, Any]]
Watch = Callable[[int], None]


class StoppedError(Exception):
    """The explanation was canceled."""


class Seen(NamedTuple):
    """A photograph as a network sees it."""

    x: Tensor  # (1, 3, h, w), the network's input
    picture: np.ndarray  # (h, w, 3), the same image as pixels
    probabilities: Tensor  # (classes,)


class Asked(NamedTuple):
    """What was asked for: the arguments of `models.load` and `explain_all`, enough to write the code."""

    photo: str
    model: str
    weights: str | None
    layer: str
    cls: int
    category: str
    methods: tuple[str, ...]
    device: str = "cpu"


class Found(NamedTuple):
    """The results so far, by method name."""

    maps: dict[str, Tensor]  # (1, h, w)
    curves: dict[str, dict[str, Curve]]  # "insertion" and "deletion"
    remarks: dict[str, str]  # why a map is empty, or why there is none


def load(name: str, weights: str | None, device: str) -> LoadedModel:
    """Return the network from `models.load`, with published or other weights, without a download.

    Errors do not say what is wrong with a path: that would let the page's users probe for files.
    """
    place = None if weights else models.download_place(name)
    if place is not None and not place.exists():
        raise ValueError(
            f"the weights of model {name!r} are not on this machine, and the app does not download any; "
            f"give the path of a checkpoint, or 'random', or run `xcam explain PHOTO --model {name}` first, "
            "which downloads them"
        )
    try:
        return models.load(name, weights=weights or None, device=device).classifying()
    except Exception:
        if weights in (None, "", "random"):
            raise
        raise ValueError(
            f"model {name!r} cannot load weights {weights!r}; expected a checkpoint of this model, or "
            f"'random' (`xcam layers {name} --weights {weights}` says why)"
        ) from None


def check_size(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if a photograph has too many pixels, without decoding it."""
    expected = f"expected at most {MAX_MEGAPIXELS} megapixels; resize it first"
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
    """Return the photograph as the network sees it, with the class probabilities."""
    check_size(path)
    try:
        x, picture = images.prepare(path, loaded.preset)
    except ValueError as error:  # users do not know an upload's folder
        raise ValueError(str(error).replace(str(path), Path(path).name)) from error
    x = x.to(device)
    return Seen(x, picture, describe.probabilities(loaded, x).cpu())


def layer_choices(loaded: LoadedModel, device: str) -> tuple[Choices, str]:
    """Return the layers that have maps, each (label with its size, name), and the default layer's name."""
    shapes, default = describe.layers_and_default(loaded, device)
    shown = {name: f"{name}  {'×'.join(map(str, shape[1:]))}" for name, shape in shapes.items()}
    shown[default] += ", default"
    return [(text, name) for name, text in shown.items()], default


def channels(choices: Choices, layer: str | None) -> int | None:
    """Return the number of channels of a layer in `layer_choices`, or None if it is not listed."""
    size = next((text.removeprefix(name) for text, name in choices if name == layer), None)
    return None if size is None else int(size.split("×")[0])


def class_choices(categories: Sequence[str], probabilities: Float[Tensor, " classes"] | None) -> Choices:
    """Return the classes, each (label, index), the five most likely first if there is a photograph."""
    top = [] if probabilities is None else describe.likeliest(probabilities)
    names = [describe.class_name(cls, categories) for cls in range(len(categories))]
    first = {cls: f"{names[cls]}, {describe.percent(probability)}" for cls, probability in top}
    rest = {cls: name for cls, name in enumerate(names) if cls not in first}
    return [(text, cls) for cls, text in (first | rest).items()]


def method_choices(channels: int | None) -> Choices:
    """Return the methods, each (label, name); labels give the number of forwards if there are many."""
    shown = []
    for name, method in METHODS.items():
        number = None if channels is None else method.forwards(channels)
        slow = "slow: " if number is not None and number >= SLOW_FORWARDS else ""
        shown.append((method.title + (f" ({slow}{number:,} forwards)" if number else ""), name))
    return shown


# -- the explanation ----------------------------------------------------------------------------------------


def explain(loaded: LoadedModel, asked: Asked, x: Float[Tensor, "1 C h w"], watch: Watch) -> Iterator[Found]:
    """Yield the results after each method; an error becomes a remark.

    Before each scoring forward, `watch` is called with the number of images; it may raise `StoppedError`.
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
        except Exception as error:  # a method may raise anything; the page shows it
            found.remarks[name] = reason(error)
        else:
            found.maps[name] = heatmap
        yield found


def judge(
    loaded: LoadedModel, asked: Asked, x: Float[Tensor, "1 C h w"], found: Found, watch: Watch
) -> Iterator[Found]:
    """Yield the results after the curves of each map."""
    how = _watched(loaded.model, x, watch)
    for name, heatmap in found.maps.items():
        watch(0)
        judged = evaluate.judged(loaded.model, x, {name: heatmap}, asked.cls, list(CURVES), **how)
        found.curves[name] = judged[name]  # pyright: ignore[reportArgumentType] (these two are curves)
        yield found


def _watched(model: nn.Module, x: Tensor, watch: Watch) -> dict[str, Any]:
    """Return keywords that make methods and metrics score as by default, and call `watch`."""
    with torch.no_grad():
        run, *_ = running_model(model, x, Running())

    def scorer(batch: Tensor) -> Any:
        watch(len(batch))
        return run(batch)

    return {"scorer": scorer, "chunk_size": default_chunk_size(x, model)}


def code(asked: Asked, alpha: float, *, curves: bool = False) -> str:
    """Return the program that makes the same pictures, to run in the photograph's folder."""
    quoted = {name: json.dumps(value, ensure_ascii=False) for name, value in asked._asdict().items()}
    printable = "".join(letter if letter.isprintable() else " " for letter in asked.category)
    name = " ".join(printable.split())  # one line: text after a line break would run as code
    category = "" if name == str(asked.cls) else name
    shown = quoted | {"category": category, "moved": asked.device != "cpu", "alpha": f"{alpha:g}"}
    return _TEMPLATES.get_template("code.txt").render(shown, curves=curves)


# -- what the page shows ------------------------------------------------------------------------------------


def overlays(picture: np.ndarray, found: Found, asked: Asked | None = None) -> str:
    """Return HTML: the photograph (h, w, 3), and each method's heatmap over it or why there is none.

    The browser blends the two, with the opacity `--xcam-alpha`.
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
    """Return a heatmap (h, w) in color, with its values as opacity."""
    black = np.zeros((*heatmap.shape, 3), np.uint8)
    colors = plot.overlay(black, heatmap, alpha=1.0, alpha_follows_heatmap=False)
    return np.dstack([colors, np.round(255 * heatmap).astype(np.uint8)])


def _note(name: str, found: Found) -> str:
    areas = describe.values_of(found.curves.get(name, {}))
    measured = ", ".join(f"{metric} {area:.3f}" for metric, area in areas.items())
    return "; ".join(filter(None, [found.remarks.get(name), measured]))


def curves(found: Found) -> str:
    """Return HTML: a figure of the insertion curves of all methods so far, and one of deletion.

    The legend is HTML too, so its lines wrap on a narrow screen.
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
    """Return a curve's dashes as an SVG dash array."""
    dashes = DASHES[number % len(DASHES)]
    return "" if isinstance(dashes, str) else " ".join(f"{1.6 * length:g}" for length in dashes[1])


def safe(text: str) -> Markup:
    """Escape a text for HTML, and for gradio's substitution of `${…}`."""
    return Markup(str(escape(text)).replace(*_DOLLAR))


def _html(template: str, **values: Any) -> str:
    return _TEMPLATES.get_template(template).render(values).replace(*_DOLLAR)


def _url(pixels: np.ndarray) -> str:
    return embedded(encoded(pixels, "PNG"), "png")
