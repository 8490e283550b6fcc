"""XplainCAM's scripts, with their arguments: `python -m xcam_fn.compat.xplaincam.eval_latency DATA`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
import torch
from cyclopts import App, Parameter
from tqdm import tqdm

import xcam_fn as xf
from xcam_fn import checks, cli
from xcam_fn.cli.options import Flag, Names
from xcam_fn.cli.text import saved_table, show, table
from xcam_fn.compat.xplaincam import cam
from xcam_fn.compat.xplaincam.metrics import AvgDropConf, InsertionDeletion
from xcam_fn.compat.xplaincam.utils import load_image, sample_images_flat

Script = Literal["drop_increase_evaluation", "del_inser_evaluation", "eval_latency"]
DataPath = Annotated[Path, Parameter(name=("--data-path", "--data_path"))]
_COLUMNS: dict[str, tuple[str, ...]] = {
    "drop_increase_evaluation": ("CAM Method", "Model", "Average Drop", "Increase in Confidence"),
    "del_inser_evaluation": ("CAM Method", "Model", "Deletion", "Insertion"),
    "eval_latency": ("CAM Method", "Average Latency (s)"),
}
_NAMES = [
    "GradCAM", "GradCAM++", "XGradCAM", "ScoreCAM", "GroupCAM", "AblationCAM", "ISCAM", "UnionCAM",
    "FusionCAM",
]  # fmt: skip
_MODES = ("Deletion", "Insertion")


def evaluate(
    script: Script, data_path: DataPath, *, model: str = "vgg16", weights: str | None = None,
    output_csv: Path | None = None, num_images: int | None = None, image_size: int = 224, seed: int = 0,
    methods: Names = None, target_layer: str | None = None, class_index: Path | None = None,  # noqa: ARG001
    device: str | None = None, plot_curves: Flag = False, save_plot_path: Path | None = None,
) -> None:  # fmt: skip
    """Compute one of XplainCAM's tables for the photographs of a folder.

    Args:
        script: the script whose table to compute.
        data_path: the folder.
        model: the network, as for `xcam explain`.
        weights: a checkpoint, or random. [default: the published weights]
        output_csv: file to write the table to.
        num_images: photographs to sample. [default: 100, or 50 for the latency]
        image_size: side of the square that photographs are resized to, in pixels.
        seed: seed of the sample.
        methods: XplainCAM's classes. [default: those of its table]
        target_layer: name of the layer. [default: the convolution registered last]
        class_index: a file of class names; ignored, as in XplainCAM.
        device: where to compute. [default: cuda if available]
        plot_curves: draw the mean deletion and insertion curves.
        save_plot_path: folder to save the curves in.
    """
    device, timed = device or ("cuda" if torch.cuda.is_available() else "cpu"), script == "eval_latency"
    own = xf.models.load(model, weights=weights, device=device).model
    chosen = {name: _method(name, own, target_layer) for name in methods or _NAMES}
    layer = cam.BaseCAM(own, target_layer).target_layer_name
    net = cam.at_hook(own, layer)
    paths = sample_images_flat(data_path, num_images or (50 if timed else 100), seed)
    xs = (load_image(path, image_size).to(device) for path in tqdm(paths, unit="photo", disable=None))
    if timed:
        taken = xf.latency.timings(net, layer, list(xs), chosen, rounds=len(paths))
        rows = [(name, taken[name].mean) for name in chosen]
    else:
        found: dict[str, list[Any]] = {name: [] for name in chosen}
        for x in xs:
            with torch.no_grad():
                cls = int(own(x).argmax(1))
            for name, heatmap in xf.explain_all(net, layer, x, cls, chosen).items():
                found[name].append(_scores(script, own, x, heatmap, cls))
        means = {name: np.mean([scores for scores, _ in each], 0) for name, each in found.items()}
        rows = [(name, model, *means[name]) for name in chosen]
        if script == "del_inser_evaluation" and (plot_curves or save_plot_path):
            _plot(found, means, len(paths), save_plot_path)
    cells = [_COLUMNS[script], *([c if isinstance(c, str) else f"{c:.4f}" for c in row] for row in rows)]
    show(f"averages over {len(paths)} photographs\n{table(cells)}")
    if output_csv:
        show(saved_table(cells, output_csv))


def _method(name: str, model: Any, layer: str | None) -> xf.Method[...]:
    checks.check_choice("--methods", name, ("GradCAM++", *cam.__all__))
    made: Any = getattr(cam, name.replace("++", "pp"))
    return made(model, **({"target_layer": layer} if made.layered else {})).method()


def _scores(script: Script, model: Any, x: Any, heatmap: Any, cls: int) -> tuple[list[float], list[Any]]:
    """Return the two numbers of a table's row, and their curves, if any."""
    if script == "drop_increase_evaluation":
        return list(AvgDropConf(model, heatmap, x, cls).summary().values()), []
    curves = [InsertionDeletion(model).compute(x, heatmap, cls, mode, return_steps=True) for mode in _MODES]
    return [float(curve["auc"]) for curve in curves], [curve["steps"] for curve in curves]


def _plot(found: dict[str, list[Any]], means: dict[str, Any], count: int, folder: Path | None) -> None:
    for i, mode in enumerate(_MODES):
        results = {
            name: {"auc": means[name][i], "steps": np.mean([curves[i] for _, curves in each], 0)}
            for name, each in found.items()
        }
        file = folder and folder / f"all_{mode.lower()}s_{count}.png"
        InsertionDeletion.plot_curves(results, mode, title=f"{mode} curves, n = {count}", save_path=file)


def start(script: Script) -> NoReturn:
    """Run a script with the shell's arguments."""
    app = App(help_format="plaintext", usage=f"Usage: python -m {__package__}.{script} DATA [OPTIONS]")
    app.default(evaluate)
    raise SystemExit(cli.main([script, *sys.argv[1:]], app))
