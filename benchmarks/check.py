"""Measures a few cases again and fails if one is over 25 % slower than in the committed table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cases, networks, timing
from benchmarks.libraries import BARE, LIBRARIES, OURS
from benchmarks.records import Record, measured, read
from benchmarks.report import table

COMMITTED = Path(__file__).parent / "results" / "benchmarks.csv"
ALLOWED = 1.25


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, compare and print; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    parser.add_argument("--against", type=Path, default=COMMITTED, help="the table to compare with")
    parser.add_argument("--seconds", type=float, default=20, help="time limit for the rounds of each case")
    options = parser.parse_args(arguments)
    before = {record.case: record for record in read(options.against) if record.library == OURS}
    compared = []
    for case in cases.quick():
        timing.progress(case.key)
        setting = cases.prepared(case, networks.load(case.network))
        known = {name: LIBRARIES[name] for name in (BARE, OURS)}
        found = {record.library: record for record in measured(setting, known, options.seconds)}
        if case in before:
            compared.append((before[case], found[OURS]))
    if not compared:
        print(f"{options.against} has none of the cases; run python -m benchmarks to measure them")
        return 1
    rows = [
        [then.case.key, *(f"{record.in_forwards[1]:.2f}" for record in (then, now)), f"{lost(then, now):.2f}"]
        for then, now in compared
    ]
    print(table(["case", "in forwards, before", "now", "ratio"], rows))
    failed = [then.case.key for then, now in compared if lost(then, now) > ALLOWED]
    if failed:
        print(f"over 25 % slower: {', '.join(failed)}")
    return bool(failed)


def lost(then: Record, now: Record) -> float:
    """The slowdown, in forward passes; the lower quartile, to tolerate a busy machine."""
    return now.in_forwards[0] / then.in_forwards[1]


if __name__ == "__main__":
    sys.exit(main())
