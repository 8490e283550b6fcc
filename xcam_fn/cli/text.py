"""What commands print: lines, warnings and tables."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

SOME_FAILED = 1  # the exit status
_IN_A_SHELL = {  # what errors name in Python
    r"layer=None finds one": "leaving out --layer finds one",
    r"layer=None": "no --layer",
    r"xcam_fn\.layers\(model, x\)": "`xcam layers MODEL`",
    r", or pass to_spatial=.*": "",
    r"\b(explain|metrics|precision|shard)='([^']*)'": r"--\1 \2",
}


def show(text: str) -> None:
    """Print, above a progress bar if there is one."""
    _write(text, sys.stdout)


def say(kind: str, what: object) -> None:
    """Print a warning or an error in one line on stderr, by the names that things have in a shell."""
    line = " ".join(str(what).split())
    for python, shell in _IN_A_SHELL.items():
        line = re.sub(python, shell, line)
    _write(f"xcam: {kind}: {line}", sys.stderr)


def say_left_out(lacking: Mapping[str, Exception]) -> None:
    """Print for each method that does not fit the network why it is left out."""
    for name, error in lacking.items():
        say("left out", f"{name}: {error}")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def saved(figure: Any, path: Path) -> str:
    """Write a figure, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return f"  wrote {path}"


def saved_table(rows: Iterable[Sequence[Any]], path: Path) -> str:
    """Write rows into a CSV file, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return f"wrote {path}"


def _write(text: str, file: Any) -> None:
    """Print what can be printed, and escape the rest: names of files need not be text."""
    encoding = file.encoding or "utf-8"
    tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=file)
