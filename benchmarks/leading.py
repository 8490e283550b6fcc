"""Which method leads: XplainCAM's and those that search for their map, on photographs that none was tuned on.

python -m benchmarks.leading PHOTOGRAPHS [--networks lite0 …] [--layers _blocks.15 default] [--kept FOLDER]

Every second photograph is taken. Maps and scores are kept in a folder, and not computed again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import xcam_fn as xf
from benchmarks.report import table
from xcam_fn.metrics import METRICS
from xcam_fn.metrics.judged import Judged, one_class_scoring

METHODS = (
    "gradcam", "gradcam_pp", "xgradcam", "layercam", "groupcam", "scorecam", "ablationcam", "iscam",
    "unioncam", "fusioncam", "opticam", "curvecam",
)  # fmt: skip
JUDGED = ("average_drop", "increase_in_confidence", "insertion", "deletion")
FORMULAS: list[Any] = [METRICS[name].formula for name in JUDGED]
HEADER = ["method", *(METRICS[name].title for name in JUDGED), "Complexity", "In its cell"]
STEPS = 20  # of a curve


def main(arguments: Sequence[str] | None = None) -> None:
    """Explain, judge, test, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leading", description=__doc__)
    parser.add_argument("photographs", type=Path, help="a folder")
    parser.add_argument("--networks", nargs="+", default=["lite0"], help="as for xcam_fn.models.load")
    parser.add_argument("--layers", nargs="+", default=["_blocks.15", "default"], help="of each network")
    parser.add_argument("--count", type=int, default=None, help="photographs at most; all by default")
    parser.add_argument("--without", nargs="+", default=[], help="methods that are left out")
    parser.add_argument("--mosaics", action="store_true", help="also look at mosaics of four photographs")
    parser.add_argument("--kept", type=Path, default=Path("leading"), help="where maps and scores are kept")
    options = parser.parse_args(arguments)
    options.kept.mkdir(parents=True, exist_ok=True)
    names = [name for name in METHODS if name not in options.without]
    for network in options.networks:
        loaded = xf.models.load(network)
        files = sorted(options.photographs.glob("*.jpg"))[1::2][: options.count]
        x = torch.cat([xf.images.prepare(file, loaded.preset)[0] for file in files])
        for layer in options.layers:
            at = f"{options.kept}/{network}~{layer}~{len(x)}"
            scores = judged(loaded.model, layer, x, names, at, mosaics=options.mosaics)
            print(f"## {network}, layer {layer}, {len(x)} photographs\n\n{leaderboard(scores)}\n", flush=True)


def judged(
    model: nn.Module, layer: str, x: Tensor, names: Sequence[str], at: str, *, mosaics: bool
) -> dict[str, Tensor]:
    """The scores of each method, (B, 6): the four metrics, what its map covers, what is in the right cell."""
    cls = torch.cat([model(one[None]).detach().argmax(1) for one in x])

    def mapped(images: Sequence[Tensor], classes: Sequence[Tensor], few: Sequence[str]) -> dict[str, Tensor]:
        few_samples: Any = {"iscam": {"num_samples": 2}}
        methods = {n: xf.find_method(n, **few_samples.get(n, {})) for n in few}
        place = None if layer == "default" else layer
        found = [
            xf.explain_all(model, place, one, c, methods) for one, c in zip(images, classes, strict=True)
        ]
        return {name: torch.cat([each[name] for each in found]) for name in few}

    def scored(name: str) -> Tensor:
        rows = []
        for one, c, heatmap in zip(x.split(1), cls.tolist(), maps[name].split(1), strict=True):
            with one_class_scoring(model, one, c) as scoring:
                it = Judged(scoring, heatmap.clamp(0, 1))
                found = [of(it) for of in FORMULAS[:2]] + [of(it, steps=STEPS).auc for of in FORMULAS[2:]]
            rows.append(torch.cat([*found, heatmap.mean()[None]]))
        return torch.stack(rows)

    maps = kept(f"{at}~maps", names, lambda few: mapped(x.split(1), cls.split(1), few))
    scores = kept(f"{at}~scores", names, lambda few: {name: scored(name) for name in few})
    half = F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)[: len(x) // 4 * 4].split(4)
    tiled = [torch.cat([torch.cat([*four[:2]], 2), torch.cat([*four[2:]], 2)], 1)[None] for four in half]
    four = cls[None].split(4, 1)[: len(tiled)]
    located = kept(f"{at}~mosaics", names, lambda few: mapped(tiled, four, few)) if mosaics else {}
    for name in names:
        own = x.new_full((len(x),), torch.nan)
        if mosaics:
            cells = F.adaptive_avg_pool2d(located[name], 2).flatten(2)  # (mosaics, 4 classes, 4 cells)
            own[: 4 * len(tiled)] = (cells.diagonal(dim1=1, dim2=2) / cells.sum(2).clamp(min=1e-9)).flatten()
        scores[name] = torch.cat([scores[name], own[:, None]], 1)
    return scores


def kept(
    at: str, names: Sequence[str], compute: Callable[[list[str]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What lies in a file for each method; those that are missing are computed together and put there."""
    missing = [name for name in names if not Path(f"{at}~{name}.pt").exists()]
    for name, found in compute(missing).items() if missing else ():
        torch.save(found, f"{at}~{name}.pt")
    return {name: torch.load(f"{at}~{name}.pt") for name in names}


def leaderboard(scores: dict[str, Tensor]) -> str:
    """Means with 95 % intervals and p values: Wilcoxon's test against the last method, corrected by Holm."""
    *others, last = scores
    differences = [(scores[last] - scores[name])[:, :4].double().numpy() for name in others]
    tested: list[Any] = [stats.wilcoxon(each, axis=0) for each in differences]
    raw = np.array([one.pvalue for one in tested])
    corrected, rows = dict(zip(others, holm(raw), strict=True)), []
    for name, found in scores.items():
        cells = []
        for i, column in enumerate(found.double().T.numpy()):
            values, rng = column[~np.isnan(column)], np.random.default_rng(0)
            if not len(values):
                cells.append("–")
                continue
            ends = stats.bootstrap((values,), np.mean, rng=rng, method="percentile").confidence_interval
            p = f" p {corrected[name][i]:.2g}" if name != last and i < 4 else ""
            cells.append(f"{values.mean():.3f} ({ends.low:.2f}–{ends.high:.2f}){p}")
        rows.append([xf.METHODS[name].title, *cells])
    return table(HEADER, rows)


def holm(p: np.ndarray) -> np.ndarray:
    """P values (methods, metrics) corrected for their number, all together; NaN where nothing differs."""
    p = np.nan_to_num(p, nan=1.0)
    order = p.flatten().argsort()
    scaled = np.maximum.accumulate(p.flatten()[order] * (p.size - np.arange(p.size))).clip(max=1)
    return scaled[order.argsort()].reshape(p.shape)


if __name__ == "__main__":
    main()
