"""Measures what the same map costs in each library, on this machine, in one run.

python -m benchmarks                # everything: an hour on two cores
python -m benchmarks --quick        # minutes
python -m benchmarks --tasks scorecam --networks resnet50 --batches 1 16 --sizes 224 448
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

import xcam_fn as xf
from benchmarks import cases, growth, libraries, networks, report, timing
from benchmarks.libraries import BARE, LIBRARIES, OURS
from benchmarks.records import Record, measured, read, save

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the report."""
    options = parsed(arguments)
    mpl.use("agg")
    load = timing.load()
    known = {name: LIBRARIES[name] for name in options.libraries}
    known |= dict(libraries.from_file(path) for path in options.library)
    if options.xplaincam is not None:
        known[libraries.XPLAINCAM] = libraries.xplaincam(options.xplaincam)
    memory_seconds = 0 if options.no_memory else options.memory_seconds
    options.output.mkdir(parents=True, exist_ok=True)
    if options.growth:
        panels = growth.measured_panels(known, options.seconds / 4, memory_seconds)
        save([record for points in panels.values() for _, record in points], options.output / "growth.csv")
        _draw(report.growth_figure(panels), options.output / "growth.png")
        return
    asked = any((options.tasks, options.networks, options.batches, options.sizes))
    chosen = cases.quick() if options.quick else cases.default()
    if asked:
        chosen = cases.product(
            options.tasks or ["gradcam"],
            options.networks or ["lite0"],
            options.batches or [1],
            options.sizes or [224],
        )
    stem = "selection" if asked else "quick" if options.quick else "benchmarks"
    kept = options.output / f"{stem}.csv"
    records: list[Record] = read(kept) if options.resume and kept.exists() else []
    done = {record.case for record in records}
    text = ""
    with timing.empty_compile_cache():
        for case in [case for case in chosen if case not in done]:
            timing.progress(case.key)
            setting = cases.prepared(case, None, options.sample, options.peer_sample)
            records += measured(setting, known, options.seconds, memory_seconds)
            # Written after each case, so an interrupted run keeps its measurements.
            command = " ".join(["python -m benchmarks", *(sys.argv[1:] if arguments is None else arguments)])
            text = report.markdown(records, timing.machine(load), command)
            (options.output / f"{stem}.md").write_text(text, encoding="utf-8")
            save(records, options.output / f"{stem}.csv")
    _draw(report.figure(records), options.output / f"{stem}.png")
    print(text)


def _task(name: str) -> str:
    """Check that a task's name is known."""
    if name not in (cases.CURVES, cases.TABLE):
        try:
            xf.find_method(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return name


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few cases only")
    parser.add_argument("--growth", action="store_true", help="how cost grows, as figures instead of a table")
    parser.add_argument(
        "--tasks", nargs="+", type=_task, metavar="TASK",
        help=f"cases of your own: methods, smooth(gradcam), {cases.CURVES} or {cases.TABLE}",
    )  # fmt: skip
    parser.add_argument("--networks", nargs="+", choices=networks.NETWORKS, help="the networks to run")
    parser.add_argument("--batches", nargs="+", type=int, metavar="B", help="numbers of images per batch")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="PIXELS", help="image sizes")
    parser.add_argument(
        "--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), help="the libraries to measure"
    )
    parser.add_argument(
        "--library",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="your own libraries: files with NAME and build(task, model, layer, x, cls)",
    )
    parser.add_argument("--xplaincam", type=Path, metavar="PATH", help="a checkout of Xplain-CAM")
    parser.add_argument("--seconds", type=float, default=45, help="limit for each case's rounds")
    parser.add_argument("--sample", type=int, default=96, help="maps or steps in a plain loop, at most")
    parser.add_argument("--peer-sample", type=int, default=96, help="maps in another library, at most")
    parser.add_argument("--resume", action="store_true", help="skip cases that an earlier run has measured")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--memory-seconds", type=float, default=20, help="limit for each memory measurement")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the report")
    options = parser.parse_args(arguments)
    for name in (BARE, OURS):
        if name not in options.libraries:
            options.libraries.append(name)
    if cases.TABLE in (options.tasks or ()) and set(options.networks or ["lite0"]) != {"lite0"}:
        parser.error(f"--tasks {cases.TABLE} requires --networks lite0")
    return options


def _draw(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
