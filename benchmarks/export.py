"""Compares exported files with the library's own maps: largest difference and time per image.

python -m benchmarks.export [--networks lite0 …] [--methods gradcam …]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import xcam_fn as xf
from benchmarks import networks, timing
from benchmarks.report import table

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 3, 16)
NETWORKS = ("resnet18", "lite0", "mobilenet_v3_small", "densenet121", "convnext_tiny", "vgg11")
NOTES = """The largest difference between the heatmaps of the exported file and the library's own, in [0, 1],
for batches of B photographs; and milliseconds per image at B = 1 in ONNX Runtime and in eager PyTorch, taking
turns: medians. Lite0 has its published weights, the other networks random ones."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, compare, time, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="which networks")
    parser.add_argument("--methods", nargs="+", default=["gradcam", "ablationcam"], help="which methods")
    options = parser.parse_args(arguments)
    load, rows, text = timing.load(), [], ""
    for name in options.networks:
        loaded = xf.models.load(name, weights=None if name == "lite0" else "random")
        for method in xf.export.METHODS_THAT_EXPORT if name == "lite0" else options.methods:
            timing.progress(f"{name}: {method}")
            rows.append([name, method, *measured(loaded, method)])
            header = [
                "network",
                "method",
                *(f"B = {batch}" for batch in BATCHES),
                "onnxruntime, ms",
                "eager, ms",
            ]
            text = "\n\n".join(
                ["# Exported files", timing.machine(load), table(header, rows, left=2), NOTES.strip() + "\n"]
            )
            (RESULTS / "export.md").write_text(text, encoding="utf-8")
    print(text)


def measured(loaded: xf.models.LoadedModel, method: str) -> list[str]:
    """Return the table cells of one exported file."""
    x = networks.photographs(loaded.preset, max(BATCHES))
    explain = xf.METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        done = xf.export.onnx(loaded.model, None, x[:1], Path(folder) / "model.onnx", method)
        session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    cells = []
    for batch in BATCHES:
        found = session.run(["heatmap"], {"image": x[:batch].numpy()})[0]
        expected = explain(loaded.model, None, x[:batch])
        cells.append(f"{float((torch.as_tensor(found) - expected).abs().max()):.1e}")
    one = x[:1].numpy()
    calls = {
        "onnxruntime": lambda: session.run(None, {"image": one}),
        "eager": lambda: explain(loaded.model, None, x[:1]),
    }
    results = timing.measure(calls, 5)
    return [*cells, *(f"{1000 * float(np.median(result.seconds)):.1f}" for result in results.values())]


if __name__ == "__main__":
    main()
