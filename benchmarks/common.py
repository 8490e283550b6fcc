"""What the benchmarks share: networks, a photograph, timing in turn, the machine, tables."""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import gc
import io
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import skimage.data
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import xcam_fn as xf

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("xcam-fn", "torch", "torchvision", "grad-cam", "torchcam", "captum")
MISSING = "–"

# Name to title and layer; None is the network's default layer.
NETWORKS: dict[str, tuple[str, str | None]] = {
    "resnet50": ("ResNet-50", "layer4"),
    "vgg19": ("VGG-19", "features.35"),
    "densenet121": ("DenseNet-121", "features"),
    "lite0": ("EfficientNet-Lite0", None),
}

Call = Callable[[], Any]


class Network(NamedTuple):
    """A network to be explained at a layer.

    Attributes:
        name: its key in `NETWORKS`.
        title: its name in print.
        model: the network, in evaluation mode.
        layer: the name of the layer, as our functions take it.
        preset: how it wants its images.
    """

    name: str
    title: str
    model: nn.Module
    layer: str
    preset: xf.images.Preset


class Result(NamedTuple):
    """What one way of computing a map took.

    Attributes:
        value: what its first call returned, or None.
        first: seconds of the first call.
        seconds: of the later calls, one a round.
        error: "" where it ran, the error's class where it failed, "–" where there is nothing to run.
    """

    value: Any
    first: float
    seconds: list[float]
    error: str

    @property
    def median(self) -> float:
        """The median of the later calls, in seconds."""
        return float(np.median(self.seconds))


# ---------------------------------------------------------------------------------------------------------
# Networks and images
# ---------------------------------------------------------------------------------------------------------


def networks(names: Sequence[str]) -> Iterator[Network]:
    """The networks by name, one at a time: Lite0 as published, the others with seeded random weights."""
    for name in names:
        title, layer = NETWORKS[name]
        with torch.random.fork_rng(devices=[]):  # nothing of the global random state is used up
            loaded = xf.models.load(name, weights=None if name == "lite0" else "random")
        if layer is None:
            x = torch.zeros(1, 3, loaded.preset.crop, loaded.preset.crop)
            layer = xf.default_layer(copy.deepcopy(loaded.model), x)  # of a copy: ours starts knowing nothing
        yield Network(name, title, loaded.model, layer, loaded.preset)


def for_peer(network: Network) -> tuple[nn.Module, str]:
    """A deep copy of the network for a library that hooks modules, and the layer by its name in the copy.

    Lite0 runs one ReLU6 twice, and a hook cannot say which call is meant. The copy has a ReLU6 of its own
    after each batch norm instead, which computes the same.
    """
    model = copy.deepcopy(network.model)
    if network.name != "lite0":
        return model, network.layer
    for name in ("_bn0", "_bn1"):
        setattr(model, name, nn.Sequential(model.get_submodule(name), nn.ReLU6()).eval())
    model._swish = nn.Identity()
    return model, "_bn1"


def photographs(preset: xf.images.Preset, batch: int) -> Tensor:
    """A photograph of a cat, (1, 3, h, w), or up to 16 shifted and flipped crops of it, (batch, 3, h, w)."""
    cat = skimage.data.chelsea()
    if batch == 1:
        return xf.images.prepare(cat, preset)[0]
    crops = [cat[:, start : start + 311] for start in range(0, 160, 20)]
    crops += [crop[:, ::-1] for crop in crops]
    return torch.cat([xf.images.prepare(crop, preset)[0] for crop in crops[:batch]])


def normalized(cam: Tensor, size: Sequence[int]) -> Tensor:
    """What other libraries leave to their caller: a raw map (B, H, W) at the input's size, in [0, 1]."""
    cam = F.interpolate(cam[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
    cam = cam - cam.amin((1, 2), keepdim=True)
    return cam / cam.amax((1, 2), keepdim=True).clamp_min(1e-12)


def correlation(maps: Any, expected: Any) -> float:
    """The smallest correlation of two batches of maps (B, h, w); equal maps have 1, constant ones too."""
    worst = 1.0
    for a, b in zip(torch.as_tensor(maps).double(), torch.as_tensor(expected).double(), strict=True):
        if torch.allclose(a, b, atol=1e-6):
            continue
        u, v = a - a.mean(), b - b.mean()
        norm = u.norm() * v.norm()
        worst = min(worst, float((u * v).sum() / norm) if norm > 0 else 0.0)
    return worst


# ---------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------


def alternate(
    calls: dict[str, Call], repeats: int, warmup: int = 1, *, primed: bool = False
) -> dict[str, list[float]]:
    """Seconds of each call, timed in turn, A B C A B C …, so that the machine's moods hit all alike.

    Args:
        calls: what is timed, by name.
        repeats: timed rounds.
        warmup: rounds before those.
        primed: run each call once more right before it is timed, so that each finds its own weights in the
            cache and not those of the call before it. For calls of milliseconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup + repeats):
        gc.collect()
        for name, call in calls.items():
            if primed:
                call()
            elapsed = timed(call)[1]
            if number >= warmup:
                seconds[name].append(elapsed)
    return seconds


def timed(call: Call) -> tuple[Any, float]:
    """What a call returned and the seconds it took, without the garbage collector."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        value = call()
        return value, time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()


def measure(calls: dict[str, Call | None], repeats: int, *, primed: bool = False) -> dict[str, Result]:
    """The first call of each on its own, then those that did not fail in turn. None is nothing to run."""
    results = {name: _first(call) for name, call in calls.items()}
    running = {name: call for name, call in calls.items() if call and not results[name].error}
    seconds = alternate(running, repeats, warmup=0, primed=primed)
    return {name: result._replace(seconds=seconds.get(name, [])) for name, result in results.items()}


def _first(call: Call | None) -> Result:
    if call is None:
        return Result(None, 0.0, [], MISSING)
    try:
        value, elapsed = timed(call)
    except Exception as error:  # whatever another library raises is its result
        print(f"  {type(error).__name__}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        return Result(None, 0.0, [], type(error).__name__)
    return Result(value, elapsed, [], "")


def guarded(build: Callable[[], Call]) -> Call:
    """What `build` returns; where it fails, a call that fails the same way."""
    try:
        return build()
    except Exception as error:  # as in `_first`
        failure = error

    def failed() -> Any:
        raise failure

    return failed


def quiet(call: Call) -> Call:
    """The call without what it prints to stderr, such as a progress bar."""

    def silent() -> Any:
        with contextlib.redirect_stderr(io.StringIO()):
            return call()

    return silent


def ratios(result: Result, reference: Result) -> list[float]:
    """How many times the reference's seconds a result took, by round; empty where either did not run."""
    if not (result.seconds and reference.seconds):
        return []
    return [a / b for a, b in zip(result.seconds, reference.seconds, strict=True)]


# ---------------------------------------------------------------------------------------------------------
# Reports
# ---------------------------------------------------------------------------------------------------------


def machine(load: float) -> str:
    """The machine, the versions and the load average when the benchmark began, in one line."""
    parts = (
        _processor(),
        f"{os.cpu_count()} cores",
        f"{torch.get_num_threads()} threads",
        torch.backends.cpu.get_cpu_capability(),
        f"load {load:.2f} at the start",
        f"Python {platform.python_version()}",
        *(f"{name} {version(name)}" for name in PACKAGES),
    )
    return ", ".join(parts)


def load() -> float:
    """The load average of the last minute; on a busy machine no number below means much."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median and, of more than two values, the quartiles: "1.04 (1.03–1.06)"."""
    if not values:
        return MISSING
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    if len(values) < 3:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in [header, rule, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append([row[0].ljust(widths[0]), *cells[1:]])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def record(result: Result, reference: Result, agreement: float | None, **case: Any) -> dict[str, Any]:
    """One row of the CSV: the case, its seconds, its ratio to the reference and its correlation with ours."""
    row: dict[str, Any] = {**case, "error": result.error, "repeats": len(result.seconds)}
    for key, values in (("seconds", result.seconds), ("ratio", ratios(result, reference))):
        quartiles = np.quantile(values, (0.25, 0.5, 0.75)) if values else (None, None, None)
        names = (f"{key}_q1", f"{key}_median", f"{key}_q3")
        row.update({name: _rounded(value) for name, value in zip(names, quartiles, strict=True)})
    row["first_call_seconds"] = _rounded(result.first or None)
    row["correlation"] = _rounded(agreement)
    return row


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def write(output: Path, name: str, text: str, records: Sequence[dict[str, Any]]) -> None:
    """The report as NAME.md and its numbers as NAME.csv in a folder; the report is printed too."""
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.md").write_text(text)
    with (output / f"{name}.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        rows.writeheader()
        rows.writerows(records)
    print(text)


def arguments(description: str, known: Sequence[str]) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer networks and rounds, one image")
    parser.add_argument("--networks", nargs="+", choices=known, help="which networks")
    parser.add_argument("--repeats", type=int, help="timed rounds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the report")
    return parser


def progress(what: str) -> None:
    """Say on stderr what is being measured."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)
