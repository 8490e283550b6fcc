"""A page that explains photographs in the browser, with the ONNX file that it runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from xcam_fn import checks
from xcam_fn.export.file import onnx
from xcam_fn.methods import METHODS
from xcam_fn.methods.catalog import own_name
from xcam_fn.models.load import LoadedModel
from xcam_fn.network.split import default_layer
from xcam_fn.network.target_layer import Layer

_PAGE_FILES = ("index.html", "page.css", "page.js", "image.js", "package.json")


def page(
    loaded: LoadedModel,
    folder: str | os.PathLike[str],
    layer: Layer = None,
    method: str = "gradcam",
    *,
    cls: int | None = None,
) -> Path:
    """Write a page that explains photographs in the browser, with the ONNX file that it runs; its path.

    `npm install` in the folder fetches the runtime; any file server shows the page then.

    Args:
        loaded: the network with its preset and categories, from `models.load`.
        folder: where to write; it is made where it is not there.
        layer: a name, a module of the model, or None for `default_layer`.
        method: one of `METHODS_THAT_EXPORT`.
        cls: the class that is explained; None for the predicted one.

    Raises:
        ValueError: as `onnx`; or the network's images are resized in a way that the page does not know.
        ImportError: the extra "export" is not installed.
        OSError: a file cannot be written.
    """
    preset = loaded.preset
    checks.check_choice("preset.interpolation", preset.interpolation, ("bilinear", "bicubic"))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    x = sample_images(preset.crop, loaded.device)
    name = layer if isinstance(layer, str | nn.Module) else default_layer(loaded.model, x)
    onnx(loaded.model, name, x, folder / "model.onnx", method, cls=cls)
    settings = {
        "file": "model.onnx",
        "model": loaded.name,
        "method": METHODS[own_name(method)].title,
        "layer": name if isinstance(name, str) else type(name).__name__,
        "categories": loaded.categories,
        **preset._asdict(),
        "colors": _colors(),
    }
    (folder / "page.json").write_text(json.dumps(settings), encoding="utf-8")
    for file in _page_files():
        shutil.copyfile(file, folder / file.name)
    return folder / "index.html"


def sample_images(size: int, device: torch.device | str = "cpu") -> Float[Tensor, "2 3 h w"]:
    """Two images of noise, the same each time, for where only the size of the images is known."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, size, size, generator=generator).to(device)


def _colors() -> list[int]:
    """256 colors from low to high, each as one number 0xRRGGBB."""
    table = np.round(mpl.colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(int)
    return (table @ np.array([1 << 16, 1 << 8, 1])).tolist()


def _page_files() -> list[Path]:
    """The page's own files: in a wheel beside this module, in a checkout among the documentation."""
    here = Path(__file__).parents[1]
    for folder in (here / "browser", here.parent / "docs" / "browser"):
        if folder.is_dir():
            return [folder / name for name in _PAGE_FILES]
    raise FileNotFoundError("the page's files were not installed with xcam_fn; install it again")
