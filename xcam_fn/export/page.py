"""A page that explains photographs in the browser, with the ONNX file that it runs."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import shutil
import urllib.request
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

RUNTIME = "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/"
RUNTIME_FILES = {  # as npm has them, each with its hash in the form of HTML's `integrity`
    "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
}


def page(
    loaded: LoadedModel,
    folder: str | os.PathLike[str],
    layer: Layer = None,
    method: str = "gradcam",
    *,
    cls: int | None = None,
    cdn: bool = False,
) -> Path:
    """Write a page that explains photographs in the browser, with all files it needs; return its path.

    Any file server shows it, `python -m http.server` for one. ONNX Runtime (14 MB) is downloaded once, from
    cdn.jsdelivr.net, unless its files are in the folder already; the page itself then needs no network.

    Args:
        loaded: the network with its preset and categories, from `models.load`.
        folder: the folder to write to; it is created if missing.
        layer: a name, a module of the model, or None for `default_layer`.
        method: one of `METHODS_THAT_EXPORT`.
        cls: the class to explain; None for the predicted class.
        cdn: leave the download to the browser, which then needs the network each time the page is opened.

    Raises:
        ValueError: as for `onnx`; or the page does not support the network's image resizing.
        ImportError: the extra "export" is not installed.
        OSError: a file cannot be written or downloaded.
    """
    preset = loaded.preset
    checks.check_choice("preset.interpolation", preset.interpolation, ("bilinear", "bicubic"))
    folder = Path(folder)
    runtime = {} if cdn else {name: _runtime_file(folder / name) for name in RUNTIME_FILES}
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
        "runtime": {"url": RUNTIME if cdn else "./", "files": RUNTIME_FILES},
    }
    for file, content in runtime.items():
        (folder / file).write_bytes(content)
    (folder / "page.json").write_text(json.dumps(settings), encoding="utf-8")
    shutil.copytree(_browser(), folder, dirs_exist_ok=True)
    return folder / "index.html"


def sample_images(size: int, device: torch.device | str = "cpu") -> Float[Tensor, "2 3 h w"]:
    """Two images of noise, the same each time, for where only the size of the images is known."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, size, size, generator=generator).to(device)


def _colors() -> list[int]:
    """256 colors from low to high, each as one number 0xRRGGBB."""
    table = np.round(mpl.colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(int)
    return (table @ np.array([1 << 16, 1 << 8, 1])).tolist()


def _runtime_file(path: Path) -> bytes:
    """A file of ONNX Runtime for browsers: the one that is there, or else downloaded."""
    there = path.read_bytes() if path.is_file() else b""
    if _integrity(there) == RUNTIME_FILES[path.name]:
        return there
    url = RUNTIME + path.name
    remedy = f"use cdn=True (--cdn), or copy the file from npm's onnxruntime-web into {path.parent}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url} cannot be downloaded ({error}); {remedy}") from error
    if _integrity(content) != RUNTIME_FILES[path.name]:
        raise OSError(f"{url} returned a file with a wrong checksum; {remedy}")
    return content


def _integrity(content: bytes) -> str:
    return "sha384-" + base64.b64encode(hashlib.sha384(content).digest()).decode()


def _browser() -> Path:
    """The page's own files: in a wheel beside this module, in a checkout among the documentation."""
    here = Path(__file__).parents[1]
    for folder in (here / "browser", here.parent / "docs" / "browser"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("the page's files are missing from the installation; reinstall xcam-fn")
