"""Measurements as rows, one for each case and library."""

from __future__ import annotations

import contextlib
import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import libraries, networks, timing
from benchmarks.cases import CURVES, TABLE, Case, Setting
from benchmarks.libraries import BARE, BFLOAT16, COMPILED, LIBRARIES, LOOP, OURS, Library

ROOT = Path(__file__).parent.parent
STATISTICS = ("q1", "median", "q3")


class Record(NamedTuple):
    """One case and library.

    Attributes:
        task, network, batch, size, classes, layer: the case.
        maps: the number of maps of the layer.
        library: the library's name.
        error: the error that it raised, or "".
        rounds: how often it was timed.
        share: the share of the work that was run; seconds are scaled to all of it.
        seconds: quartiles.
        in_forwards: quartiles of the ratio to a forward of the same batch in the same round.
        to_ours: quartiles of the ratio to our exact computation.
        to_loop: the median speedup over the plain loop.
        setup: the extra seconds of the first call.
        correlation: with our exact map in the library's definition; the smallest of the batch.
        difference: the largest, of scores from the exact ones, or of XplainCAM's map from our variant.
        memory: peak in MiB above that of a process with network and images loaded.
    """

    task: str
    network: str
    batch: int
    size: int
    classes: int
    layer: str
    maps: int
    library: str
    error: str = ""
    rounds: int = 0
    share: float = 1.0
    seconds: tuple[float, ...] = ()
    in_forwards: tuple[float, ...] = ()
    to_ours: tuple[float, ...] = ()
    to_loop: float | None = None
    setup: float | None = None
    correlation: float | None = None
    difference: float | None = None
    memory: float | None = None

    @property
    def case(self) -> Case:
        """The case."""
        return Case(self.task, self.network, self.batch, self.size, self.classes, self.layer or None)


def measured(
    setting: Setting, known: dict[str, Library], seconds: float, memory_seconds: float = 0
) -> list[Record]:
    """Measure a case for all libraries in turns, except those that do not support it."""
    case = setting.case
    with contextlib.ExitStack() as stack:
        jobs = {name: library(setting, stack) for name, library in known.items()}
        calls = {name: job.call for name, job in jobs.items() if job is not None}
        rough = timing.measure(calls, seconds)
    shares = {name: job.share for name, job in jobs.items() if job is not None}
    results = {name: result.scaled(shares[name]) for name, result in rough.items()}
    exact, loop = results.get(OURS), results.get(LOOP)
    records = []
    for name, result in results.items():
        found: dict[str, Any] = {}
        if result.error:
            timing.progress(f"  {name}: {result.error}")
        elif result.seconds:
            to_loop = timing.ratios(loop, result)
            found = {
                "seconds": _quartiles(result.seconds),
                "in_forwards": _quartiles(timing.ratios(result, results.get(BARE))),
                "to_ours": _quartiles(timing.ratios(result, exact)),
                "to_loop": float(np.median(to_loop)) if to_loop else None,
                "setup": max(0.0, result.first - result.median)
                if name in (OURS, COMPILED, BFLOAT16)
                else None,
                **_agreement(name, setting, result, exact),
            }
        # The compiler's own memory would hide that of the method.
        if memory_seconds and name not in (LOOP, COMPILED, BFLOAT16) and name in LIBRARIES:
            found["memory"] = memory_of(case, name, memory_seconds)
        records.append(
            Record(
                *case[:5],
                case.layer or "",
                setting.maps,
                name,
                result.error,
                len(result.seconds),
                shares[name],
                **found,
            )
        )
    return records


def _quartiles(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in np.quantile(values, (0.25, 0.5, 0.75))) if values else ()


def _agreement(
    name: str, setting: Setting, result: timing.Result, exact: timing.Result | None
) -> dict[str, float]:
    """How well a library agrees with ours, if both did all of the work."""
    if exact is None or exact.error or result.share < 1 or name in (BARE, OURS):
        return {}
    if setting.case.task in (CURVES, TABLE):
        return {"difference": float((result.value - exact.value).abs().max())}
    if isinstance(exact.value, dict):
        return {
            "correlation": min(
                networks.correlation(result.value[key], exact.value[key]) for key in exact.value
            )
        }
    expected = torch.as_tensor(libraries.expected(name, setting, exact.value))
    if setting.cls is not None:
        expected = expected.flatten(0, 1)
    found = {"correlation": networks.correlation(result.value, expected)}
    if name == libraries.XPLAINCAM:  # its maps are normalized like ours
        found["difference"] = float((result.value - expected).abs().max())
    return found


def memory_of(case: Case, library: str, seconds: float) -> float | None:
    """The peak in MiB of one call, in its own process with a time limit; None if it fails."""
    command = [sys.executable, "-m", "benchmarks.memory", case.dumps(), library, str(seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        timing.progress(f"  memory of {library}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])["bytes"] / 2**20


# -- files --------------------------------------------------------------------------------------------------

_SPREAD = ("seconds", "in_forwards", "to_ours")


def save(records: Sequence[Record], path: Path) -> None:
    """Write the records as CSV."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        header = [
            f"{field}_{statistic}" if statistic else field
            for field in Record._fields
            for statistic in (STATISTICS if field in _SPREAD else ("",))
        ]
        rows.writerow(header)
        for record in records:
            row: list[str] = []
            value: Any
            for field, value in zip(Record._fields, record, strict=True):
                row += [_text(part) for part in (value or ("",) * 3 if field in _SPREAD else (value,))]
            rows.writerow(row)


def read(path: Path) -> list[Record]:
    """Read the records of a file."""
    records = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            fields: dict[str, Any] = {}
            for field in Record._fields:
                if field in _SPREAD:
                    values = [row[f"{field}_{statistic}"] for statistic in STATISTICS]
                    fields[field] = tuple(float(value) for value in values if value)
                elif field in ("task", "network", "layer", "library", "error"):
                    fields[field] = row[field]
                elif field in ("batch", "size", "classes", "maps", "rounds"):
                    fields[field] = int(row[field])
                else:
                    fields[field] = float(row[field]) if row[field] else None
            records.append(Record(**fields))
    return records


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
