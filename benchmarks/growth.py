"""Measures how cost grows with the batch, the number of maps, the image size and the number of methods."""

from __future__ import annotations

import sys

from benchmarks import timing
from benchmarks.cases import GRADIENT, Case, prepared
from benchmarks.libraries import LOOP, OURS, Library
from benchmarks.records import Record, measured

# With 16, 40, 320 and 1280 maps.
_LAYERS = ("_blocks.0", "_blocks.4", "_blocks.15", "_conv_head")
_PANELS: dict[str, list[Case]] = {
    "images in a batch (Grad-CAM)": [Case("gradcam", "lite0", batch) for batch in (1, 4, 16)],
    "pixels a side (Grad-CAM)": [Case("gradcam", "lite0", 1, size) for size in (112, 224, 448)],
    "methods (gradient)": [Case(",".join(GRADIENT[:count]), "lite0") for count in (1, 3, 5)],
    "maps (Score-CAM)": [Case("scorecam", "lite0", layer=layer) for layer in _LAYERS],
}


def measured_panels(
    known: dict[str, Library], seconds: float, memory_seconds: float
) -> dict[str, list[tuple[float, Record]]]:
    """Return the measurements of each panel, by point."""
    panels: dict[str, list[tuple[float, Record]]] = {}
    for title, cases in _PANELS.items():
        panels[title] = []
        for case in cases:
            timing.progress(f"growth: {case.key}")
            setting = prepared(case, sample=32, peer_sample=32 if case.task == "scorecam" else sys.maxsize)
            at = _position(title, case, setting.maps)
            names = {
                name: library for name, library in known.items() if name != LOOP and OURS + "," not in name
            }
            panels[title] += [(at, record) for record in measured(setting, names, seconds, memory_seconds)]
    return panels


def _position(title: str, case: Case, maps: int) -> float:
    if title.startswith("images"):
        return case.batch
    if title.startswith("pixels"):
        return case.size
    return maps if title.startswith("maps") else case.task.count(",") + 1
