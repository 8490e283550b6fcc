"""The command `xcam`: arguments in, text out. What takes long to import is imported where it is used."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from cyclopts import App, CycloptsError, Parameter

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor

    from xcam_fn.methods import Method
    from xcam_fn.models import LoadedModel

_TOP = 5
_DPI = 130
_PAIRS = ("gradcam+sscam", "gradcam_pp+iscam", "xgradcam+ablationcam")
_BAD_INPUT = 2
_NOTHING_READ = 1
_INTERRUPTED = 130

app = App(
    name="xcam",
    help="Class activation maps: which parts of a photograph made a network see what it saw.",
    version=lambda: importlib.metadata.version("xcam-fn"),
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)


class _Explanation(NamedTuple):
    """What came out for one photograph."""

    picture: np.ndarray
    probabilities: Tensor
    cls: int
    layer: str
    maps: dict[str, np.ndarray]  # method names to (h, w)
    remarks: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of the command, after having run it.

    Args:
        arguments: what follows `xcam` on the command line; `sys.argv[1:]` by default.

    Returns:
        0; 1 where none of several photographs could be read; 2 for bad input; 130 for Ctrl-C.
    """
    try:
        status = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`head`, say) has all it wanted; without this, Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (CycloptsError, ValueError, TypeError, OSError) as error:
        _say("error", error)
        return _BAD_INPUT
    return status or 0


@app.command(usage="Usage: xcam explain PHOTO... [OPTIONS]")
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
        methods: one or more methods; `xcam methods` lists them, and gradcam+sscam is the fusion of two.
            [default: gradcam]
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
    from xcam_fn import images, models, plot

    plot.check_style(colormap=colormap, alpha=alpha)
    options = _options(option or [])
    chosen = [_method(name, variant, options) for name in dict.fromkeys(methods or ["gradcam"])]
    _check_taken(options, chosen)
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
            _say("warning", error)
            unreadable += 1
            continue
        explanation = _explained(loaded, chosen, layer, cls, x.to(device), picture)
        lines = _report(photo, loaded, explanation)
        figure = plot.heatmaps(
            picture,
            {method.title: explanation.maps[method.name] for method in chosen},
            caption=_caption(loaded, explanation),
            colormap=colormap,
            alpha=alpha,
        )
        lines += _write(figure, explanation.maps if save_maps else {}, output / name)
        _print("\n".join(lines))
    if unreadable:
        _say("warning", f"{unreadable} of {len(photos)} photographs could not be read")
    return _NOTHING_READ if unreadable == len(photos) else 0


@app.command(usage="Usage: xcam gallery PHOTO [OPTIONS]")
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

    from xcam_fn import images, models, plot
    from xcam_fn.targets import logits

    plot.check_style(colormap=colormap, alpha=alpha)
    names = list(dict.fromkeys(pairs or _PAIRS))
    for name in names:
        if name.count("+") != 1:
            raise ValueError(f"--pairs {name!r}: expected two methods and a plus, such as gradcam+scorecam")
    options = _options(option or [])
    parts = {name: [_method(part, variant, options) for part in (*name.split("+"), name)] for name in names}
    chosen = list({method.name: method for row in parts.values() for method in row}.values())
    _check_taken(options, chosen)
    loaded = models.load(model, weights=weights, device=device)
    x, picture = images.prepare(photo, loaded.preset)
    x = x.to(device)
    with torch.no_grad():
        probabilities = logits(loaded.model(x))[0].softmax(-1)
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
        f"{loaded.categories[cls]} (class {cls}), {_percent(float(probabilities[cls]))}" for cls in classes
    )
    output.mkdir(parents=True, exist_ok=True)
    figure = plot.grid(picture, rows, caption=f"{caption}; {loaded.name}", colormap=colormap, alpha=alpha)
    _print("\n".join(_write(figure, {}, output / f"{_names([photo], output)[0]}_gallery")))


@app.command
def methods() -> None:
    """List the methods: name, title, paper and what it does."""
    import xcam_fn as xf

    rows = [(name, m.title, m.paper, m.summary) for name, m in xf.METHODS.items()]
    print(_table([("name", "title", "paper", "what it does"), *rows]))


@app.command
def layers(model: str, /, *, weights: str | None = None) -> None:
    """List the layers that a model runs, in order, with type and output shape; the default has a star.

    Args:
        model: lite0, a classification model of torchvision, or timm:NAME.
        weights: a checkpoint of your own for the model. The layers are the same without.
    """
    import torch

    import xcam_fn as xf

    loaded = xf.models.load(model, weights=weights or "random")
    x = torch.zeros(1, 3, loaded.preset.crop, loaded.preset.crop)
    default = xf.default_layer(loaded.model, x)
    shapes = xf.layers(loaded.model, x)
    last_call = [name for name in shapes if default in (name, name.partition("#")[0])][-1]
    rows = [
        (
            f"{'*' if name == last_call else ' '} {name}",
            type(loaded.model.get_submodule(name.partition("#")[0])).__name__,
            " x ".join(map(str, shape[1:])),
        )
        for name, shape in shapes.items()
    ]
    print(_table([("  layer", "type", "output"), *rows]))


# One photograph


def _explained(
    loaded: LoadedModel,
    methods: list[Method],
    layer: str | None,
    cls: int | None,
    x: Tensor,
    picture: np.ndarray,
) -> _Explanation:
    import torch

    import xcam_fn as xf

    with torch.no_grad():
        probabilities = xf.targets.logits(loaded.model(x))[0].softmax(-1)
    index = int(probabilities.argmax()) if cls is None else cls
    found = _all_maps(loaded, methods, layer, x, index)
    maps = {name: heatmaps[0].float().cpu().numpy() for name, heatmaps in found.items()}
    remarks = [
        f"{method.title}: {_why_empty(method, loaded, layer, x, index)}"
        for method in methods
        if not maps[method.name].any()
    ]
    return _Explanation(
        picture, probabilities, index, layer or xf.default_layer(loaded.model, x), maps, remarks
    )


def _all_maps(
    loaded: LoadedModel, methods: list[Method], layer: str | None, x: Tensor, cls: Any
) -> dict[str, Tensor]:
    import xcam_fn as xf

    watched = sys.stderr.isatty() and any("progress" in inspect.signature(m).parameters for m in methods)
    options: dict[str, Any] = {"progress": True} if watched else {}
    return xf.explain_all(loaded.model, layer, x, cls, {m.name: m for m in methods}, **options)


def _why_empty(method: Method, loaded: LoadedModel, layer: str | None, x: Tensor, cls: int) -> str:
    """What a heatmap of zeros comes from. The raw map tells, where making it once more is cheap."""
    empty = "the heatmap is zero everywhere"
    if method.family != "gradient":
        return f"{empty}, likely because no region adds to the class"
    raw = method(loaded.model, layer, x, cls, postprocess=None)
    if not raw.any():
        return f"{empty}, likely because the gradient vanished: the layer does not change the class's score"
    if raw.max() <= 0:
        return f"{empty}: all contributions are negative and dropped, the layer speaks against the class"
    return f"{empty}: every place contributes the same"


def _report(photo: Path, loaded: LoadedModel, explanation: _Explanation) -> list[str]:
    probabilities = explanation.probabilities
    top = probabilities.topk(min(_TOP, len(probabilities)))
    rows = [
        (f"  {index}", loaded.categories[index], _percent(value))
        for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]
    explained = f"  explained: {_caption(loaded, explanation)}"
    return [str(photo), _table(rows), explained, *(f"  {remark}" for remark in explanation.remarks)]


def _caption(loaded: LoadedModel, explanation: _Explanation) -> str:
    cls = explanation.cls
    name = loaded.categories[cls]
    shown = f"{name} (class {cls})" if name != str(cls) else f"class {cls}"
    probability = _percent(float(explanation.probabilities[cls]))
    return f"{shown}, {probability}; {loaded.name}, layer {explanation.layer}"


def _percent(probability: float) -> str:
    return f"{probability:.1%}" if probability >= 0.0005 else "<0.1%"


def _write(figure: Figure, maps: dict[str, np.ndarray], stem: Path) -> list[str]:
    """Writes the files, and says which."""
    import numpy as np

    written = [stem.with_name(f"{stem.name}.png")]
    figure.savefig(written[0], dpi=_DPI)
    for method, heatmap in maps.items():
        written.append(stem.with_name(f"{stem.name}_{method}.npy"))
        np.save(written[-1], heatmap)
    return [f"  wrote {path}" for path in written]


# Small things


def _method(name: str, variant: str | None, options: dict[str, Any]) -> Method:
    from xcam_fn import find_method

    if Path(name).is_file():
        raise ValueError(f"method {name!r} is not known; it is a file: photographs come before --methods")
    return find_method(name, variant=variant, **options)


def _options(given: list[str]) -> dict[str, Any]:
    """What --option NAME=VALUE says, VALUE as Python reads it and else as text."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise ValueError(f"--option {text!r}: expected NAME=VALUE, such as num_samples=10")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _check_taken(options: dict[str, Any], methods: list[Method]) -> None:
    from xcam_fn.methods.together import named_methods

    try:
        named_methods({method.name: method for method in methods}, **options)
    except TypeError as error:
        raise ValueError(f"--option: {error}") from None


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


def _print(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text)  # as print, above a bar if there is one


def _say(kind: str, what: object) -> None:
    from tqdm import tqdm

    tqdm.write(f"xcam: {kind}: {' '.join(str(what).split())}", file=sys.stderr)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
