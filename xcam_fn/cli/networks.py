"""The commands that need no photograph: `methods`, `layers` and `export`."""

from __future__ import annotations

from pathlib import Path

import xcam_fn as xf
from xcam_fn.cli.options import (
    ClassName,
    LayerOf,
    check_image_size,
    class_index,
    classifier,
    is_own,
    numbered,
    sized,
    unknown_size,
)
from xcam_fn.cli.text import show, table
from xcam_fn.names import check_model


def methods() -> None:
    """List the methods: name, title, paper, what each computes, and the structure it needs."""
    rows = [
        (name, m.title, m.paper, m.summary + (f" (needs {m.needs})" if m.needs else ""))
        for name, m in xf.METHODS.items()
    ]
    print(table([("name", "title", "paper", "what it does"), *rows]))


def layers(model: str, /, *, weights: str | None = None, image_size: int | None = None) -> None:
    """List the layers that a model runs, in order, with type and output shape; a star marks the default.

    Args:
        model: lite0, dinov2-focus, a torchvision classification model, timm:NAME, or FILE.py:FUNCTION for
            your own function that returns a network.
        weights: your own checkpoint for the model; the layers are the same without it.
        image_size: side length of the images in pixels. [default: the model's]
    """
    check_model(model)
    check_image_size(image_size)
    if is_own(model):
        loaded = classifier(model, weights)
    else:
        loaded = xf.models.load(model, weights=weights or "random")
    loaded = sized(loaded, image_size)
    if not loaded.preset.crop:
        raise unknown_size(model, "--image-size N")
    shapes, default = xf.models.describe.layers_and_default(loaded)
    rows = [("  layer", "type", "output")]
    for name, shape in shapes.items():
        kind = type(loaded.model.get_submodule(name.partition("#")[0])).__name__
        rows.append((f"{'*' if name == default else ' '} {name}", kind, " x ".join(map(str, shape[1:]))))
    print(table(rows))


def export(
    *,
    network: LayerOf = LayerOf(),
    method: str = "gradcam",
    class_: ClassName = None,
    size: int | None = None,
    output: Path | None = None,
    page: Path | None = None,
    cdn: bool = False,
) -> None:
    """Export a network together with its explanation, as one file that predicts and explains.

    Args:
        network: the network, and its target layer.
        method: gradcam, gradcam_pp, xgradcam, layercam, hirescam or ablationcam.
        class_: the class to explain, an index or a name. [default: the predicted class]
        size: side length of the images in pixels. [default: the model's]
        output: the file, .onnx or .pt2. [default: MODEL_METHOD.onnx, unless --page is given]
        page: a folder for a page that explains photographs in the browser. ONNX Runtime is downloaded into
            it, once; the page itself needs no network.
        cdn: download nothing; the page loads ONNX Runtime from cdn.jsdelivr.net each time it is opened.
    """
    if output is not None and output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"--output {str(output)!r}: expected a name that ends in .onnx or .pt2")
    if cdn and page is None:
        raise ValueError("--cdn needs --page FOLDER")
    if size is not None and page is not None:
        raise ValueError(f"--size {size} with --page: a page uses the model's own size; leave --size out")
    if size is not None and size < 1:
        raise ValueError(f"--size {size} is out of range; expected at least 1 pixel")
    if is_own(network.model) and page is not None:
        raise ValueError(f"--page with --model {network.model}: its preprocessing is unknown; give --output")
    loaded = classifier(network.model, network.weights)
    if not (side := size or loaded.preset.crop):
        raise unknown_size(network.model, "--size N")
    x = xf.export.sample_images(side)
    cls = class_index(class_, numbered(loaded, x))
    if page is not None:
        made = xf.export.page(loaded, page, network.layer, method, cls=cls, cdn=cdn)
        needs = "loads ONNX Runtime from cdn.jsdelivr.net" if cdn else "needs no network"
        show(f"wrote {made}, which {needs}\nto see it: python -m http.server -d {page}, then localhost:8000")
        if output is None:
            return
    output = output or Path(f"{network.model.replace(':', '_')}_{method}.onnx")
    write = xf.export.onnx if output.suffix == ".onnx" else xf.export.pt2
    done = write(loaded.model, network.layer, x, output, method, cls=cls)
    show(f"wrote {done.path}; its heatmaps differ from PyTorch's by at most {done.difference:.1e}")
