"""Compares XplainCAM's methods and the methods that optimize their map, on held-out photographs.

python -m benchmarks.leading PHOTOGRAPHS uses every second one. Maps and scores are kept in a folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import xcam_fn as xf
from benchmarks.report import table
from xcam_fn.evaluate.comparison import intervals
from xcam_fn.metrics import METRICS
from xcam_fn.metrics.judged import Judged, one_class_scoring

METHODS = (
    "gradcam", "gradcam_pp", "xgradcam", "layercam", "groupcam", "scorecam", "ablationcam", "iscam",
    "unioncam", "fusioncam", "opticam", "curvecam",
)  # fmt: skip
JUDGED: list[Any] = [METRICS[n] for n in ("average_drop", "increase_in_confidence", "insertion", "deletion")]
HEADER = ["method", *(metric.title for metric in JUDGED), "Complexity", "In its cell"]
Kept = dict[str, Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    """Explain, judge, test, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leading", description=__doc__)
    parser.add_argument("photographs", type=Path, help="a folder")
    parser.add_argument("--networks", nargs="+", default=["lite0"], help="as for xcam_fn.models.load")
    parser.add_argument("--layers", nargs="+", default=["_blocks.15", "default"], help="of each network")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="the last is compared with the others")
    parser.add_argument("--count", type=int, help="photographs at most; all by default")
    parser.add_argument("--mosaics", type=int, default=0, help="number of mosaics of four photographs")
    parser.add_argument("--kept", type=Path, default=Path("leading"), help="folder for maps and scores")
    options = parser.parse_args(arguments)
    options.kept.mkdir(exist_ok=True)
    for network in options.networks:
        loaded = xf.models.load(network)
        files = sorted(options.photographs.glob("*.jpg"))[1::2][: options.count]
        x = torch.cat([xf.images.prepare(file, loaded.preset)[0] for file in files])
        for layer in options.layers:
            at = f"{options.kept}/{network}~{layer}~{len(x)}"
            scores = judged(loaded.model, layer, x, options.methods, at, options.mosaics)
            print(f"## {network}, layer {layer}, {len(x)} photographs\n\n{leaderboard(scores)}\n")


def judged(model: nn.Module, layer: str, x: Tensor, names: Sequence[str], at: str, mosaics: int) -> Kept:
    """The scores of each method, (B, 6): the four metrics, complexity, and the share in the right cell."""
    cls = torch.cat([model(one[None]).detach().argmax(1) for one in x])

    def mapped(images: Sequence[Tensor], classes: Sequence[Tensor], few: Sequence[str]) -> Kept:
        of = {n: xf.iscam.with_options(num_samples=2) if n == "iscam" else xf.METHODS[n] for n in few}
        place = None if layer == "default" else layer
        found = [xf.explain_all(model, place, one, c, of) for one, c in zip(images, classes, strict=True)]
        return {name: torch.cat([each[name] for each in found]) for name in few}

    def scored(name: str) -> Tensor:
        rows = []
        for one, c, heatmap in zip(x.split(1), cls.tolist(), maps[name].split(1), strict=True):
            with one_class_scoring(model, one, c) as scoring:
                it = Judged(scoring, heatmap.clamp(0, 1))
                found = [m.formula(it) for m in JUDGED[:2]]
                found += [m.formula(it, steps=20).auc for m in JUDGED[2:]]
            rows.append(torch.cat([*found, heatmap.mean()[None], torch.tensor([torch.nan])]))
        return torch.stack(rows)

    maps = kept(f"{at}~maps", names, lambda few: mapped(x.split(1), cls.split(1), few))
    scores = kept(f"{at}~scores", names, lambda few: {name: scored(name) for name in few})
    if mosaics:
        smaller = F.interpolate(x[: 4 * mosaics], scale_factor=0.5, mode="bilinear", antialias=True)
        tiled = rearrange(smaller, "(m a b) c h w -> m 1 c (a h) (b w)", a=2, b=2)
        four = cls[: 4 * mosaics].reshape(-1, 1, 4)
        for name, found in kept(f"{at}~mosaics", names, lambda few: mapped([*tiled], [*four], few)).items():
            sums = F.adaptive_avg_pool2d(found, 2).flatten(2) + 1e-12  # (mosaics, 4 classes, 4 cells)
            scores[name][: 4 * mosaics, -1] = (sums.diagonal(dim1=1, dim2=2) / sums.sum(2)).flatten()
    return scores


def kept(at: str, names: Sequence[str], compute: Callable[[list[str]], Kept]) -> Kept:
    """Load each method's file; the missing ones are computed together and saved."""
    missing = [name for name in names if not Path(f"{at}~{name}.pt").exists()]
    for name, found in compute(missing).items() if missing else ():
        torch.save(found, f"{at}~{name}.pt")
    return {name: torch.load(f"{at}~{name}.pt") for name in names}


def leaderboard(scores: Kept) -> str:
    """Means with 95 % intervals and p values: Wilcoxon's test against the last method, Holm's correction."""
    *others, last = scores
    tested: list[Any] = [stats.wilcoxon((scores[last] - scores[n])[:, :4].double(), axis=0) for n in others]
    corrected = dict(zip(others, holm(np.nan_to_num([one.pvalue for one in tested], nan=1.0)), strict=True))
    rows = []
    for name, found in scores.items():
        rows.append([xf.METHODS[name].title])
        for i, (mean, low, high, count) in enumerate(zip(*intervals(found.double().numpy()), strict=True)):
            p = f" p {corrected[name][i]:.2g}" if name != last and i < 4 else ""
            rows[-1] += [f"{mean:.3f} ({low:.2f}–{high:.2f}){p}"] if count else []
    return table(HEADER[: len(rows[0])], rows)


def holm(p: np.ndarray) -> np.ndarray:
    """Return p values (methods, metrics) with Holm's correction over all of them."""
    order = p.argsort(axis=None)
    scaled = np.maximum.accumulate(p.flat[order] * np.arange(p.size, 0, -1)).clip(max=1)
    return scaled[order.argsort()].reshape(p.shape)


if __name__ == "__main__":
    main()
