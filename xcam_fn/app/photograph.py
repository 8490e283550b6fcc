"""What the app does with a photograph, as functions; `_app_page` is the page that calls them.

The app writes nothing: what it shows is sent to the browser within the page, and weights that are not on
this machine yet are not downloaded.
"""

from __future__ import annotations

import base64
import html
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
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from xcam_fn import evaluate, models, plot
from xcam_fn.methods import METHODS, find_method
from xcam_fn.methods.call import Call
from xcam_fn.methods.catalog import heatmaps_of
from xcam_fn.metrics.of_map import Curve
from xcam_fn.models import describe, images
from xcam_fn.models.load import LoadedModel
from xcam_fn.network.split import layers
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

Choices = list[tuple[str, Any]]
Watch = Callable[[int], None]

# What a method runs through the network, where that is known beforehand: so many images, or so many for each
# channel of the layer (1, or what the keyword says).
_IMAGES = {"rise": "num_masks", "groupcam": "num_groups"}
_IMAGES_A_CHANNEL = {"scorecam": None, "sscam": "num_samples", "iscam": "num_samples", "unioncam": None,
                     "fusioncam": None}  # fmt: skip


class StoppedError(Exception):
    """Whoever asked does not want the answer any more."""


class Seen(NamedTuple):
    """A photograph as a network sees it.

    Attributes:
        x: (1, 3, h, w), what the network is given.
        picture: (h, w, 3), the same as pixels.
        probabilities: (classes,).
    """

    x: Tensor
    picture: np.ndarray
    probabilities: Tensor


class Asked(NamedTuple):
    """What was asked for, which is all that the code needs.

    Attributes:
        photo: the file's name.
        model: as for `models.load`.
        weights: as for `models.load`.
        layer: a name of `layers`.
        cls: the class's index.
        category: the class's name.
        methods: names of `METHODS`.
        device: where to compute.
    """

    photo: str
    model: str
    weights: str | None
    layer: str
    cls: int
    category: str
    methods: tuple[str, ...]
    device: str = "cpu"


class Found(NamedTuple):
    """What was found so far, by the names of methods.

    Attributes:
        maps: heatmaps (1, h, w).
        curves: "insertion" and "deletion" to curves.
        remarks: why a map is empty, or why there is none.
    """

    maps: dict[str, Tensor]
    curves: dict[str, dict[str, Curve]]
    remarks: dict[str, str]


def load(name: str, weights: str | None, device: str) -> LoadedModel:
    """The network, as `models.load` gives it, without a download.

    Args:
        name: as for `models.load`.
        weights: as for `models.load`; empty for the published ones, which have to be on this machine.
        device: as for `models.load`.

    Raises:
        ValueError: as `models.load`, or the published weights would have to be downloaded.
        OSError: as `models.load`.
    """
    place = None if weights else models.download_place(name)
    if place is not None and not place.exists():
        raise ValueError(
            f"the weights of model {name!r} are not on this machine, and the app downloads none; give the "
            f"path of a checkpoint, or 'random', or have `xcam explain PHOTO --model {name}` fetch them"
        )
    return models.load(name, weights=weights or None, device=device)


def check_size(path: str | os.PathLike[str]) -> None:
    """Raise where a photograph has more pixels than are taken; it is not decoded for that.

    Args:
        path: the file. One that is no image is left for `images.load` to refuse.

    Raises:
        ValueError: there are too many pixels.
    """
    name = Path(path).name
    expected = f"expected at most {MAX_MEGAPIXELS} megapixels; make it smaller first"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                width, height = opened.size
    except Image.DecompressionBombError:
        raise ValueError(f"image {name!r} is far too large; {expected}") from None
    except Exception:  # a broken file makes Pillow raise almost anything
        return
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        megapixels = width * height / 1_000_000
        raise ValueError(
            f"image {name!r} is {width} x {height} pixels ({megapixels:.0f} megapixels); {expected}"
        )


def see(loaded: LoadedModel, path: str | os.PathLike[str], device: str) -> Seen:
    """The photograph as the network sees it, and what it takes it for.

    Args:
        loaded: the network.
        path: the file.
        device: where the network is.

    Raises:
        ValueError: the file is no image, or too large.
        OSError: the file cannot be read.
    """
    check_size(path)
    try:
        x, picture = images.prepare(path, loaded.preset)
    except ValueError as error:  # the folder of an upload says nothing to whoever made it
        raise ValueError(str(error).replace(str(path), Path(path).name)) from error
    x = x.to(device)
    return Seen(x, picture, describe.probabilities(loaded, x).cpu())


def layer_choices(loaded: LoadedModel, device: str) -> tuple[Choices, str]:
    """The layers that have maps, each with its size, and the name of the default one.

    Args:
        loaded: the network.
        device: where it is.

    Returns:
        ((what to show, name) for each, name).
    """
    blank = torch.zeros(1, 3, loaded.preset.crop, loaded.preset.crop, device=device)
    shapes = layers(loaded.model, blank)
    default = describe.default_call(loaded.model, blank, list(shapes))
    shown = {name: f"{name}  {'×'.join(map(str, shape[1:]))}" for name, shape in shapes.items()}
    shown[default] += ", default"
    return [(text, name) for name, text in shown.items()], default


def channels(choices: Choices, layer: str | None) -> int | None:
    """How many channels a layer of `layer_choices` has, None where it is not among them."""
    size = next((text.removeprefix(name) for text, name in choices if name == layer), None)
    return None if size is None else int(size.split("×")[0])


def class_choices(categories: Sequence[str], probabilities: Float[Tensor, " classes"] | None) -> Choices:
    """The classes, the five likeliest first, with their probabilities.

    Args:
        categories: the name of each.
        probabilities: (classes,), or None where there is no photograph yet.

    Returns:
        (what to show, index) for each.
    """
    top = [] if probabilities is None else describe.likeliest(probabilities)
    first = [
        (f"{describe.class_name(cls, categories)}, {describe.percent(probability)}", cls)
        for cls, probability in top
    ]
    taken = {cls for cls, _ in top}
    rest = [(describe.class_name(cls, categories), cls) for cls in range(len(categories)) if cls not in taken]
    return first + rest


def forwards(name: str, channels: int) -> int | None:
    """How many images, at most and but for a few, a method runs through the network for a photograph.

    Args:
        name: a key of `METHODS`.
        channels: of the layer.

    Returns:
        The number; None for methods that need a few forwards, or whose number is not known beforehand.
    """
    keyword = _IMAGES.get(name, _IMAGES_A_CHANNEL.get(name))
    number = inspect.signature(METHODS[name]).parameters[keyword].default if keyword else 1
    if name in _IMAGES:
        return number
    return channels * number if name in _IMAGES_A_CHANNEL else None


def method_choices(channels: int | None) -> Choices:
    """The methods, with what those cost that run the network often.

    Args:
        channels: of the layer, or None where it is not known.

    Returns:
        (what to show, name) for each.
    """
    return [(_priced(name, channels), name) for name in METHODS]


def _priced(name: str, channels: int | None) -> str:
    title = METHODS[name].title
    number = None if channels is None else forwards(name, channels)
    if number is None:
        return title
    return f"{title} ({'slow: ' if number >= SLOW_FORWARDS else ''}{number:,} forwards)"


# -- the explanation ----------------------------------------------------------------------------------------


def explain(loaded: LoadedModel, asked: Asked, x: Float[Tensor, "1 C h w"], watch: Watch) -> Iterator[Found]:
    """The maps one after the other, then the curves; what fails is a remark, and the rest goes on.

    Args:
        loaded: the network.
        asked: what is wanted of it.
        x: (1, C, h, w), the prepared photograph.
        watch: called with the number of images before each forward that scores; it may raise `StoppedError`.

    Yields:
        All that was found so far, after each map and each pair of curves.

    Raises:
        StoppedError: `watch` did.
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
                remark = describe.why_empty(METHODS[name], loaded.model, asked.layer, x, asked.cls)
                found.remarks[name] = remark
        except StoppedError:
            raise
        except Exception as error:  # a method may raise anything; the page says what
            found.remarks[name] = _reason(error)
        else:
            found.maps[name] = heatmap
        yield found
    for name, heatmap in found.maps.items():
        watch(0)
        judged = evaluate.judged(loaded.model, x, {name: heatmap}, asked.cls, list(CURVES), **how)
        found.curves[name] = judged[name]  # pyright: ignore[reportArgumentType] (these two are curves)
        yield found


def _watched(model: nn.Module, x: Tensor, watch: Watch) -> dict[str, Any]:
    """The keywords with which methods and metrics run the network as they do by themselves, but watched."""
    with torch.no_grad():
        run = running_model(model, x, Running())

    def scorer(batch: Tensor) -> Any:
        watch(len(batch))
        return run(batch)

    return {"scorer": scorer, "chunk_size": default_chunk_size(x, model)}


def _reason(error: Exception) -> str:
    kind = "" if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


def code(asked: Asked, alpha: float) -> str:
    """The program that makes the same pictures.

    Args:
        asked: what was asked for.
        alpha: how much the colors cover the photograph, 0 to 1.

    Returns:
        Python, to be run in the folder of the photograph.
    """
    keywords = {"weights": asked.weights, "device": asked.device if asked.device != "cpu" else None}
    given = "".join(f", {name}={_quoted(value)}" for name, value in keywords.items() if value)
    moved = f"\nx = x.to({_quoted(asked.device)})" if asked.device != "cpu" else ""
    category = "" if asked.category == str(asked.cls) else f"  # {asked.category}"
    return f"""\
import xcam_fn as xf

network = xf.models.load({_quoted(asked.model)}{given})
x, picture = xf.images.prepare({_quoted(asked.photo)}, network.preset){moved}
cls = {asked.cls}{category}
maps = xf.explain_all(network.model, {_quoted(asked.layer)}, x, cls, {_quoted(asked.methods)})
maps = {{xf.METHODS[name].title: heatmaps for name, heatmaps in maps.items()}}
overlays = xf.plot.heatmaps(picture, {{title: m[0] for title, m in maps.items()}}, alpha={alpha:g})
overlays.savefig("overlays.png")

scores = xf.evaluate.judged(network.model, x, maps, cls, ["insertion", "deletion"])
for metric, best in (("insertion", "highest"), ("deletion", "lowest")):
    curves = {{title: found[metric] for title, found in scores.items()}}
    figure = xf.plot.curves(curves, best=best, title=metric.capitalize())
    figure.savefig(f"{{metric}}.png")
"""


def _quoted(value: str | tuple[str, ...]) -> str:
    return json.dumps(value, ensure_ascii=False)


# -- what the page shows ------------------------------------------------------------------------------------


def overlays(picture: np.ndarray, found: Found, asked: Asked | None = None) -> str:
    """The photograph and each heatmap over it, as HTML; the browser blends them, as `--xcam-alpha` says.

    Args:
        picture: (h, w, 3), uint8.
        found: what was found so far.
        asked: what was asked for; methods without a map yet are shown as such.
    """
    photograph = _image(_url(picture), "the photograph as the network sees it")
    panels = [_panel(photograph, "Photograph", "as the network sees it")]
    for name in asked.methods if asked else ():
        method = METHODS[name]
        if name in found.maps:
            colors = plot.overlay(picture, found.maps[name][0], alpha=1.0)
            shown = photograph + _image(_url(colors), f"heatmap of {method.title}", "xcam-heatmap")
            panels.append(_panel(shown, method.title, _note(name, found)))
        else:
            shown = '<div class="xcam-missing"></div>'
            panels.append(_panel(shown, method.title, found.remarks.get(name, "not computed yet")))
    return f'{_legend() if found.maps else ""}<div class="xcam-panels">{"".join(panels)}</div>'


def _note(name: str, found: Found) -> str:
    parts = [found.remarks[name]] if name in found.remarks else []
    if name in found.curves:
        areas = describe.values_of(found.curves[name])
        parts.append(", ".join(f"{metric} {area:.3f}" for metric, area in areas.items()))
    return "; ".join(parts)


def _panel(shown: str, title: str, note: str) -> str:
    return (
        f'<figure><div class="xcam-picture">{shown}</div>'
        f"<figcaption><strong>{safe(title)}</strong><br>{safe(note)}</figcaption></figure>"
    )


def curves(found: Found) -> str:
    """The curves of all methods so far, a figure for insertion and one for deletion, as HTML.

    Args:
        found: what was found so far.

    Returns:
        The HTML, empty where there are no curves.
    """
    if not found.curves:
        return ""
    figures = (
        f'<figure><div class="xcam-scrolled">{_drawn(found, metric)}</div>'
        f"<figcaption>{meaning}</figcaption></figure>"
        for metric, meaning in CURVES.items()
    )
    return f'<div class="xcam-curves">{"".join(figures)}</div>'


def _drawn(found: Found, metric: str) -> str:
    about = evaluate.METRICS[metric]
    named = {METHODS[name].title: both[metric] for name, both in found.curves.items()}
    file = io.BytesIO()
    plot.curves(named, best=about.best, title=about.title).savefig(file, format="svg")
    kind = "xcam-wide" if len(named) > 1 else ""  # with a legend beside the curves
    return _image(_data("image/svg+xml", file.getvalue()), f"{metric} curves", kind)


def _legend() -> str:
    """The colors from the least to the most relevant, as HTML."""
    ramp = np.linspace(0, 1, 128)[None]
    colors = plot.overlay(np.zeros((1, 128)), ramp, alpha=1.0)
    bar = _image(_url(colors), "colors from the least to the most relevant")
    return f'<div class="xcam-legend">least relevant {bar} most relevant</div>'


def safe(text: str) -> str:
    """The text as HTML, also where `${…}` is filled in."""
    return html.escape(text).replace("$", "&#36;")


def _url(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return _data("image/png", file.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _image(url: str, alt: str, kind: str = "") -> str:
    return f'<img src="{url}" alt="{safe(alt)}" class="{kind}">'
