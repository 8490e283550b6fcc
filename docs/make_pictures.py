"""Draw the site's pictures, of one and the same photograph: one for each method, and the figures of pages.

python docs/make_pictures.py                     # those that are not there yet
python docs/make_pictures.py gradcam front       # these, anew
python docs/make_pictures.py dog_cat --photo dog_cat.jpg    # of a photograph that is not in the repository

Each call writes the tables of methods anew, as docs/make_tables.py does. The pictures are committed: drawing
all of them takes many minutes, building the site seconds.
"""

from __future__ import annotations

import argparse
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import skimage.data
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

import hooks
import make_tables
import xcam_fn as xf

PICTURES = Path(__file__).parent / "pictures"
SCALE = 2  # the photograph is shown in more pixels than the network sees
POINTS = 0.05  # a map whose mean is lower is one of points, drawn up to its 99th percentile to be seen at all
INCHES = 9.5


def main() -> None:
    """Draw what the command line names, or what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="methods or figures; what is missing by default")
    parser.add_argument("--photo", help="a photograph of a bull mastiff and a tiger cat, for dog_cat")
    arguments = parser.parse_args()
    if "dog_cat" in arguments.names and not arguments.photo:
        parser.error(
            "dog_cat is drawn of a photograph that is not in the repository; name it by --photo FILE"
        )
    for name in arguments.names or _missing():
        print(name, flush=True)
        if name in xf.METHODS:
            _write(_explained(name), _path_of(name))
        elif name == "dog_cat":
            _write(_dog_cat(arguments.photo), _path_of(name))
        else:
            _write(FIGURES[name](), _path_of(name))
    make_tables.main()


def _missing() -> list[str]:
    methods = [name for name in xf.METHODS if "no_picture" not in hooks.prose()[name]]
    return [name for name in (*methods, *FIGURES) if not _path_of(name).is_file()]


def _path_of(name: str) -> Path:
    if name in xf.METHODS:
        return PICTURES / "methods" / f"{name}.webp"
    return PICTURES / f"{name}.{'png' if name == 'icon' else 'webp'}"


def _write(picture: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, quality=82, method=6)


# -- one photograph -----------------------------------------------------------------------------------------


@functools.cache
def _network() -> xf.models.LoadedModel:
    return xf.models.load("lite0")


@functools.cache
def _cat() -> tuple[Tensor, np.ndarray]:
    """The photograph as the network sees it, and as it is shown."""
    preset = _network().preset
    assert isinstance(preset.resize, int)
    large = preset._replace(crop=SCALE * preset.crop, resize=SCALE * preset.resize)
    photograph = skimage.data.chelsea()
    return xf.images.prepare(photograph, preset)[0], xf.images.prepare(photograph, large)[1]


def _explained(name: str) -> np.ndarray:
    x, photograph = _cat()
    heatmap = xf.METHODS[name](_network().model, None, x)
    if heatmap.mean() < POINTS:
        heatmap = (heatmap / heatmap.quantile(0.99)).clamp(max=1)
    return xf.plot.overlay(photograph, heatmap)


# -- the figures of pages -----------------------------------------------------------------------------------


def _tiles(names: list[str], columns: int) -> np.ndarray:
    """The photograph and the pictures of methods, which have to be there already, titled, in rows."""
    gap, side = 8, _cat()[1].shape[0]
    tiles = {"photograph": Image.fromarray(_cat()[1])}
    tiles |= {xf.METHODS[name].title: Image.open(_path_of(name)) for name in names}
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + gap) - gap), "white")
    for number, (title, tile) in enumerate(tiles.items()):
        top, left = (part * (side + gap) for part in divmod(number, columns))
        sheet.paste(tile, (left, top))
        ImageDraw.Draw(sheet).text(
            (left + 16, top + side - 16), title, "white", ImageFont.load_default(26), "ls", stroke_width=2,
            stroke_fill="#00000080",
        )  # fmt: skip
    return np.asarray(sheet)


def _front() -> np.ndarray:
    return _tiles(["gradcam", "integrated_gradients", "rise"], columns=2)


def _methods() -> np.ndarray:
    names = ["gradcam", "layercam", "scorecam", "ablationcam", "groupcam", "rise", "integrated_gradients"]
    small = Image.fromarray(_tiles(names, columns=4))
    small.thumbnail((1000, 1000))
    return np.asarray(small)


def _transformer() -> np.ndarray:
    """Of four photographs in one, what a DINOv2 finds like each of three of them."""
    network = xf.models.load("dinov2-focus")

    def eighth(net: Any, x: Tensor) -> Tensor:
        options = {"norm": True, "stop_early": True, "intermediates_only": True, "output_fmt": "NLC"}
        ((_, prefix),) = net.forward_intermediates(x, indices=[7], return_prefix_tokens=True, **options)
        return prefix[:, 0]

    tower, sources = xf.bind(network.model, eighth), ("chelsea", "coffee", "rocket", "astronaut")
    photographs = [getattr(skimage.data, name)() for name in sources]
    quarters = [xf.images.prepare(each, network.preset)[1] for each in photographs]
    rows = [np.concatenate(pair, 1) for pair in (quarters[:2], quarters[2:])]
    x, picture = xf.images.prepare(np.concatenate(rows), network.preset)
    embeddings = [tower(xf.images.prepare(each, network.preset)[0])[0].detach() for each in photographs]
    similar = [xf.targets.similarity(each) for each in embeddings]
    maps = {}
    for i, title in enumerate(("the cat", "the cup", "the rocket")):
        others = [each for j, each in enumerate(similar) if j != i]
        contrast = similar[i] - sum(others[1:], others[0]) * (1 / 3)
        maps[f"like {title}"] = xf.chefer(tower, None, x, contrast, signed=True)
    return _png(xf.plot.heatmaps(picture, maps), dpi=85)


def _fusion() -> np.ndarray:
    x, photograph = _cat()
    methods = ["gradcam", "reciprocam", "gradcam+reciprocam"]
    maps = xf.explain_all(_network().model, None, x, methods=methods)
    titles = ("Grad-CAM", "Recipro-CAM", "fused")
    return _png(xf.plot.heatmaps(photograph, dict(zip(titles, maps.values(), strict=True))), dpi=85)


def _curves() -> np.ndarray:
    x, _ = _cat()
    maps = xf.explain_all(_network().model, None, x, methods=["gradcam", "groupcam", "xgradcam", "randomcam"])
    curves = {xf.METHODS[name].title: xf.insertion(_network().model, x, heat) for name, heat in maps.items()}
    return _png(xf.plot.curves(curves, title="Insertion"), dpi=100)


def _tutorial() -> np.ndarray:
    x, photograph = _cat()
    methods = {"Grad-CAM": "gradcam", "Layer-CAM": "layercam", "Score-CAM": "scorecam"}
    maps = xf.explain_all(_network().model, None, x, methods=list(methods.values()))
    return _pixels(xf.plot.heatmaps(photograph, dict(zip(methods, maps.values(), strict=True))))


def _layers() -> np.ndarray:
    x, photograph = _cat()
    maps = {name: xf.layercam(_network().model, name, x) for name in ("_blocks.4", "_blocks.10", "_swish")}
    return _pixels(xf.plot.heatmaps(photograph, maps))


def _insertion() -> np.ndarray:
    x, photograph = _cat()
    heat = xf.gradcam(_network().model, None, x)
    curve = xf.insertion(_network().model, x, heat)
    return _pixels(xf.plot.curves({"Grad-CAM": curve}, photograph, heat))


def _wrappers() -> np.ndarray:
    x, photograph = _cat()
    rows = [
        ["gradcam", "smooth(gradcam)", "eigen_smooth(gradcam)"],
        ["layercam", "multi_layer(layercam)", "sess(layercam)"],
    ]
    maps = [{name: xf.find_method(name)(_network().model, None, x) for name in row} for row in rows]
    return _pixels(xf.plot.grid(photograph, maps))


def _concepts() -> np.ndarray:
    x, photograph = _cat()
    found = xf.concepts(_network().model, None, x, num_concepts=5)
    return _pixels(xf.plot.concepts(photograph, list(found.maps[0])))


def _dog_cat(photo: str) -> np.ndarray:
    """The picture of the README: two classes of one photograph, by six methods."""
    network = _network()
    x, photograph = xf.images.prepare(photo, network.preset)
    methods = ["gradcam", "scorecam", "ablationcam", "groupcam", "finercam", "fusioncam"]
    rows = []
    for cls in (243, 282):
        maps = xf.explain_all(network.model, None, x, cls, methods)
        title = network.categories[cls]
        rows.append({f"{xf.METHODS[name].title}\n{title}": heat for name, heat in maps.items()})
    return _png(xf.plot.grid(photograph, rows), dpi=85)


def _frames() -> np.ndarray:
    x, photograph = _cat()
    return _pixels(xf.plot.frames(photograph, xf.gradcam(_network().model, None, x)))


def _beside(*names: str) -> tuple[Tensor, np.ndarray]:
    """Photographs of skimage side by side, as the network sees them and as they are shown."""
    pairs = [xf.images.prepare(getattr(skimage.data, name)(), _network().preset) for name in names]
    return torch.cat([x for x, _ in pairs], -1), np.concatenate([shown for _, shown in pairs], 1)


def _counterfactuals() -> np.ndarray:
    x, photographs = _beside("chelsea", "coffee")
    cat, espresso = xf.targets.logit(282), xf.targets.logit(967)
    targets = {"tiger cat": cat, "− tiger cat": -cat, "espresso − tiger cat": espresso - cat}
    maps = {title: xf.hirescam(_network().model, None, x, target) for title, target in targets.items()}
    return _pixels(xf.plot.heatmaps(photographs, maps, columns=2))


def _alike() -> np.ndarray:
    x, photograph = _cat()
    cat = xf.targets.logit(282)
    targets = {
        "tiger cat": cat,
        "tiger cat − Egyptian cat": cat - xf.targets.logit(285),
        "log odds": xf.targets.log_odds(282),
        "contrast": xf.targets.contrast(282, weight=1.0),
    }
    maps = {title: xf.hirescam(_network().model, None, x, target) for title, target in targets.items()}
    return _png(xf.plot.heatmaps(photograph, maps, columns=5), dpi=80)


def _segmentation() -> np.ndarray:
    """What Lite0, its last layer applied at every position, finds of two cats."""
    (top, shown), (bottom, below) = _beside("chelsea", "coffee"), _beside("chelsea", "rocket")
    x, photographs = torch.cat([top, bottom.flip(-1)], -2), np.concatenate([shown, below[:, ::-1]])
    cats = list(range(281, 286))
    others = [index for index in range(1000) if index not in cats]

    def dense(net: Any, x: Tensor) -> Tensor:
        y = F.conv2d(net.extract_features(x), net._fc.weight[..., None, None], net._fc.bias)
        y = torch.stack([y[:, some].logsumexp(1) for some in (others, cats)], 1)
        return F.interpolate(y, size=x.shape[2:], mode="bilinear")

    segmenter = xf.bind(_network().model, dense)
    found = segmenter(x).detach()[0].argmax(0)
    upper = found.clone()
    upper[x.shape[2] // 2 :] = 0
    segment = xf.targets.segment
    maps = {
        "found to be cat": found.float(),
        "HiResCAM of cat": xf.hirescam(segmenter, None, x, segment(1)),
        "HiResCAM of the upper cat": xf.hirescam(segmenter, None, x, segment(1, upper)),
        "HiResCAM of the lower cat": xf.hirescam(segmenter, None, x, segment(1, found - upper)),
        "Grad-CAM of the upper cat": xf.gradcam(segmenter, None, x, segment(1, upper)),
    }
    return _png(xf.plot.heatmaps(photographs, maps, columns=3), dpi=80)


def _icon() -> np.ndarray:
    """A heatmap of a few cells."""
    cells = np.array(
        [[0.15, 0.3, 0.2, 0.05], [0.35, 0.75, 0.6, 0.2], [0.3, 0.9, 1.0, 0.45], [0.1, 0.4, 0.55, 0.3]]
    )
    colors = (mpl.colormaps["inferno"](cells)[..., :3] * 255).astype(np.uint8)
    large = Image.fromarray(colors).resize((96, 96), Image.Resampling.NEAREST).convert("RGBA")
    shape = Image.new("L", large.size)
    ImageDraw.Draw(shape).rounded_rectangle((0, 0, 95, 95), radius=18, fill=255)
    large.putalpha(shape)
    return np.asarray(large)


FIGURES: dict[str, Callable[[], np.ndarray]] = {
    "icon": _icon,
    "front": _front,
    "methods": _methods,
    "transformer": _transformer,
    "fusion": _fusion,
    "curves": _curves,
    "tutorial": _tutorial,
    "layers": _layers,
    "insertion": _insertion,
    "frames": _frames,
    "wrappers": _wrappers,
    "concepts": _concepts,
    "counterfactuals": _counterfactuals,
    "alike": _alike,
    "segmentation": _segmentation,
}


def _pixels(figure: Figure) -> np.ndarray:
    """The figure as wide as the page's text, so that its lettering is as large as the text's."""
    width, height = figure.get_size_inches()
    if width > INCHES:
        figure.set_size_inches(INCHES, height * INCHES / width)
    return _png(figure, dpi=130)


def _png(figure: Figure, dpi: int) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return np.asarray(Image.open(file).convert("RGB"))


if __name__ == "__main__":
    main()
