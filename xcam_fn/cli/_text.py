"""What the commands share: what they print, and how options and methods are read."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xcam_fn.methods import Method

NOTHING_READ = 1  # the exit status where of several photographs none could be read


def method_names(given: list[str]) -> list[str]:
    """The names that are meant, each once; "all" stands for those of `METHODS`."""
    from xcam_fn import METHODS

    return list(METHODS) if given == ["all"] else list(dict.fromkeys(given))


def named_method(name: str, variant: str | None, options: dict[str, Any]) -> Method:
    """The method of that name, with another library's definition and other options."""
    from xcam_fn import find_method

    if Path(name).is_file():
        raise ValueError(f"method {name!r} is not known; it is a file: photographs come before --methods")
    return find_method(name, variant=variant, **options)


def options_of(given: list[str]) -> dict[str, Any]:
    """What --option NAME=VALUE says, VALUE as Python reads it and else as text."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise ValueError(f"--option {text!r}: expected NAME=VALUE, such as num_samples=10")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def check_taken(options: dict[str, Any], methods: list[Method]) -> None:
    """Raise where an option is taken by none of the methods."""
    from xcam_fn.methods.together import named_methods

    try:
        named_methods({method.name: method for method in methods}, **options)
    except TypeError as error:
        raise ValueError(f"--option: {error}") from None


def show(text: str) -> None:
    """Print, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(text)


def say(kind: str, what: object) -> None:
    """Print a warning or an error in one line on stderr."""
    from tqdm import tqdm

    tqdm.write(f"xcam: {kind}: {' '.join(str(what).split())}", file=sys.stderr)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
