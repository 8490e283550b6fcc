"""Measures the cost of writing, resuming and reporting a large run.

python -m benchmarks.reporting                       # 50,000 photographs × 10 methods × 4 metrics
python -m benchmarks.reporting --photographs 2000    # seconds

The scores are random, each method a little better than the last; with --files every photograph has a picture
and heatmaps. Each part runs in its own process, to measure its peak memory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from xcam_fn.evaluate.store import ImageRow, Result, Score, writing

METRICS = ("average_drop", "increase_in_confidence", "insertion", "deletion")
STEPS = 113
BATCH = 100


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the store, then resume and report it, and print the cost of each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reporting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--photographs", type=int, default=50_000)
    parser.add_argument("--methods", type=int, default=10)
    parser.add_argument("--files", action="store_true", help="store a picture and a heatmap of each")
    parser.add_argument("--folder", type=Path, help="folder to keep; a temporary one by default")
    parser.add_argument("--part", choices=PARTS, help="run only this part, in this process")
    options = parser.parse_args(arguments)
    if options.part:
        start, begun = time.perf_counter(), time.process_time()
        PARTS[options.part](options)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        busy = time.process_time() - begun
        took = f"{time.perf_counter() - start:.1f} s ({busy:.1f} s CPU time)"
        print(f"{options.part}: {took}, peak {peak:.0f} MiB", flush=True)
        return
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        same = [f"--photographs={options.photographs}", f"--methods={options.methods}", f"--folder={folder}"]
        same += ["--files"] * options.files
        for part in PARTS:
            command = [sys.executable, "-m", "benchmarks.reporting", *same, f"--part={part}"]
            subprocess.run(command, check=True, env=os.environ)
        for file in ("results.sqlite", "report.html"):
            print(f"{file}: {(folder / file).stat().st_size / 1e6:.1f} MB")


def settings(options: argparse.Namespace) -> dict[str, object]:
    """The settings of the run."""
    names = [f"method_{i}" for i in range(options.methods)]
    keep = ["pictures", "heatmaps", "curves"] if options.files else ["curves"]
    return {
        "model": "synthetic", "layer": "last", "methods": {n: n.title() for n in names},
        "metrics": [*METRICS], "categories": ["cat"], "variant": None, "versions": {}, "keep": keep,
    }  # fmt: skip


def write(options: argparse.Namespace) -> None:
    """Write the store, with a transaction per hundred photographs."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)
    picture = encoded(Image.fromarray(noise).resize((224, 224)), "JPEG")
    maps = [encoded(Image.fromarray(noise[..., c]).resize((112, 112)), "PNG") for c in range(3)]
    with writing(options.folder, settings(options)) as store:
        for start in range(0, options.photographs, BATCH):
            numbers = range(start, min(start + BATCH, options.photographs))
            images = [ImageRow(n, f"{n:06}.jpg", None, 0, 0.5, picture, content=f"{n:016}") for n in numbers]
            store.write([*images, *results(rng, numbers, options.methods, maps)])


def results(rng: np.random.Generator, numbers: range, methods: int, maps: list[bytes]) -> Iterator[Result]:
    """Random results of photographs: some are hard for all methods."""
    fractions = np.linspace(0, 1, STEPS)
    for n in numbers:
        hard = rng.normal(0, 0.2)
        for i in range(methods):
            drop, up, down = np.clip(0.4 + hard + 0.002 * i + rng.normal(0, 0.1, 3), 0, 1)
            curves = rng.random((2, STEPS))
            scores = {
                "average_drop": Score(drop),
                "increase_in_confidence": Score(float(drop < 0.2)),
                "insertion": Score(up, fractions, curves[0]),
                "deletion": Score(down, fractions, curves[1]),
            }
            yield Result(n, f"method_{i}", scores, maps[(n + i) % 3])


def encoded(image: Image.Image, kind: str) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def resume(options: argparse.Namespace) -> None:
    """Open the run to resume it, and look up the finished results of each batch of eight."""
    with writing(options.folder, settings(options)) as store:
        contents = store.contents()
        found = sum(len(store.done(start, start + 8)) for start in range(0, options.photographs, 8))
    assert found == options.methods * len(contents) == options.methods * options.photographs


def report(options: argparse.Namespace) -> None:
    """Run `xcam report`."""
    from xcam_fn.cli import main as xcam

    assert xcam(["report", str(options.folder)]) == 0


PARTS = {"write": write, "resume": resume, "report": report}

if __name__ == "__main__":
    main()
