"""Evaluates methods for a trained transformer on mosaics: DINOv2 with a head that recognizes photographs.

python -m benchmarks.prototypes PHOTOGRAPHS OUTPUT, and then `xcam report OUTPUT`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import xcam_fn as xf

METHODS = (
    "gradcam", "hirescam", "layercam", "finercam", "legrad", "attention_rollout", "eigencam", "reciprocam",
)  # fmt: skip
SIGNED = ("chefer", "agcam")  # run as in their papers, and also without the ReLU


def eighth(net: Any, x: Tensor) -> Tensor:
    """The class token after the eighth block; the last four blocks were trained further for saliency."""
    options = {"norm": True, "stop_early": True, "intermediates_only": True, "output_fmt": "NLC"}
    ((_, prefix),) = net.forward_intermediates(x, indices=[7], return_prefix_tokens=True, **options)
    return F.normalize(prefix[:, 0], dim=1)


def network(photographs: Sequence[xf.dataset.Photograph]) -> xf.models.LoadedModel:
    """DINOv2 with a class per photograph: how much more x resembles its mirror image than the others'."""
    loaded = xf.models.load("dinov2-focus")
    tower: nn.Module = xf.bind(loaded.model, eighth)
    mirrored = [xf.images.prepare(each.path, loaded.preset)[0].flip(-1) for each in photographs]
    prototypes = torch.cat([tower(one).detach() for one in mirrored])
    head = 40 * F.normalize(prototypes - prototypes.mean(0), dim=1)
    model = xf.bind(loaded.model, lambda net, x: eighth(net, x) @ head.T)
    names = [each.name for each in photographs]
    return loaded._replace(model=model, categories=names, name="dinov2-focus, prototypes at block 8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate the methods on mosaics of 2 × 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prototypes", description=__doc__)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--mosaics", type=int, default=40)
    parser.add_argument("--side", type=int, default=224, help="side of a mosaic in pixels")
    options = parser.parse_args(arguments)
    photographs = xf.dataset.photographs(options.photographs, ())
    net = network(photographs)
    drawn = xf.evaluate.mosaics_of(net, photographs, count=options.mosaics, side=options.side)
    methods: dict[str, Any] = {name: name for name in METHODS}
    for name in SIGNED:
        methods[name] = name
        methods[f"{name}, signed"] = xf.METHODS[name].with_options(signed=True)
    print(xf.evaluate.run(net, drawn.mosaics, methods, output=options.output, progress=True))


if __name__ == "__main__":
    main()
