"""What the commands share: what they print, and how options and methods are read."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xcam_fn.methods import Method
    from xcam_fn.models.load import LoadedModel

NOTHING_READ = 1  # the exit status where of several photographs none could be read


def method_names(given: list[str]) -> list[str]:
    """The names that are meant, each once; "all" stands for those of `METHODS`."""
    from xcam_fn import METHODS

    return list(METHODS) if given == ["all"] else list(dict.fromkeys(given))


def named_method(name: str, variant: str | None, options: dict[str, Any]) -> Method:
    """The method of that name, with another library's definition and other options.

    `FILE.py:NAME` and `package.module:NAME` are methods of the reader's own.
    """
    from xcam_fn import find_method
    from xcam_fn.methods.catalog import with_accepted

    if Path(name).is_file():
        raise ValueError(f"method {name!r} is not known; it is a file: photographs come before --methods")
    if ":" not in name:
        return find_method(name, variant=variant, **options)
    own = _own_method(name)
    return with_accepted(own, options)


def _own_method(name: str) -> Method:
    """The method that a file or a module of the reader's own holds."""
    import importlib.util

    from xcam_fn.methods import Method

    home, _, attribute = name.rpartition(":")
    expected = "expected FILE.py:NAME or package.module:NAME, such as my_methods.py:absolute_cam"
    if home.endswith(".py"):
        if not Path(home).is_file():
            raise ValueError(f"method {name!r}: there is no file {home!r}; {expected}")
        spec = importlib.util.spec_from_file_location(Path(home).stem, home)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(home)
        except ImportError as error:
            raise ValueError(f"method {name!r}: {home!r} cannot be imported ({error}); {expected}") from None
    found = getattr(module, attribute, None)
    if not isinstance(found, Method):
        there = [key for key, value in vars(module).items() if isinstance(value, Method)]
        raise ValueError(
            f"method {name!r}: {home} has no method {attribute!r}; it has {', '.join(there) or 'none'}. "
            "xcam_fn.from_gradients makes one of a weighting function"
        )
    return found


def own_methods(names: Sequence[str], variant: str | None) -> dict[str, str | Method]:
    """The methods by name, those of the reader's own as functions."""
    chosen = {name: named_method(name, variant, {}) for name in names}
    return {method.name: method if ":" in name else name for name, method in chosen.items()}


def fitting(
    names: Sequence[str], loaded: LoadedModel, layer: str | None, variant: str | None
) -> dict[str, str | Method]:
    """The methods by name, without those that need what the network lacks: what is left out is said."""
    import torch

    from xcam_fn.checks import StructureError

    x = torch.zeros(1, 3, loaded.preset.crop, loaded.preset.crop)
    x = x.to(next(loaded.model.parameters(), x).device)
    kept = []
    for name in names:
        method = named_method(name, variant, {})
        try:
            if method.needs:
                method(loaded.model, layer, x)
            kept.append(name)
        except StructureError as error:
            say("left out", f"{name}: {error}")
    return own_methods(kept, variant)


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
