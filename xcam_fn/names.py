"""Names and paths as people give them, checked without torch: the command refuses wrong ones at once."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

DINOV2 = "dinov2-focus"
LITE_CROPS = {"lite0": 224, "lite1": 240, "lite2": 260}
EXPECTED_MODEL = (
    f"expected 'lite0', {DINOV2!r}, a classification model of torchvision such as 'resnet50', or 'timm:NAME'"
)


def nearest(name: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """Return "did you mean …?" with the names that are nearest to an unknown one, or else `otherwise`."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else otherwise


def listed(words: Sequence[str], most: int, conjunction: str) -> str:
    """Return words as in a sentence, "a, b and c", of many the first and how many more there are."""
    *some, last = words if len(words) <= most else [*words[:most], f"{len(words) - most} more"]
    return f"{', '.join(some)} {conjunction} {last}" if some else last


def letters(name: str) -> str:
    """Return a method's name without what libraries spell in different ways."""
    return re.sub(r"[\s_,-]", "", name.casefold()).replace("++", "pp").replace("plusplus", "pp")


def unknown_method(name: str, known: Iterable[str]) -> str:
    """Return the message for a name that is none of the methods'."""
    known = list(known)
    hint = nearest(name, known, nearest(letters(name), known, "expected the name of a method"))
    return f"method {name!r} is not known; {hint} (`xcam methods` lists them)"


def type_of(value: object) -> str:
    """Return an object's type with its article, such as "an int"."""
    name = type(value).__name__
    return f"a{'n' * (name[0] in 'aeioAEIO')} {name}"


def missing(what: str, path: str | Path, expected: str) -> FileNotFoundError:
    """Return the error for a path where there is nothing."""
    return FileNotFoundError(f"{what} {str(path)!r}: no such {expected}; check the path")


def needed(module: str, without: str, kind: type[Exception] = ValueError) -> Any:
    """Return a module of a package that need not be installed; raise what to do without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise kind(without) from error


def check_file(what: str, path: Path, expected: str) -> None:
    """Raise where there is no regular file at the path; a pipe or a device could be read for ever."""
    if not path.exists():
        raise missing(what, path, "file")
    if not path.is_file():
        kind = "folder" if path.is_dir() else "pipe, socket or device"
        raise ValueError(f"{what} {str(path)!r} is a {kind}; expected {expected}")


def names_of_methods() -> set[str]:
    """Return what the families list in their `__all__`, read without importing them."""
    found: set[str] = set()
    for file in Path(__file__).with_name("methods").glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and target.id == "__all__":
                found |= {str(one.value) for one in ast.walk(node) if isinstance(one, ast.Constant)}
    return found


def check_model(name: str) -> None:
    """Raise where a name can be none of a network's; what a prefix or a file stands for is seen later.

    Any function of torchvision's files of models may be one: importing them takes seconds.
    """
    own = (*LITE_CROPS, DINOV2)
    if ":" in name or name in own:
        return
    home = importlib.util.find_spec("torchvision")
    folders = [] if home is None else home.submodule_search_locations or []
    code = [
        file.read_text("utf-8") for folder in folders for file in Path(folder, "models").glob("[a-z]*.py")
    ]
    known = [*own, *re.findall(r"^def ([a-z]\w*)", "\n".join(code), re.M)]
    if code and name not in known:
        raise unknown_model(name, known)


def unknown_model(name: str, known: Iterable[str]) -> ValueError:
    """Return the error for a name that is none of a network's."""
    return ValueError(f"model {name!r} is not known; {nearest(name.casefold(), known, EXPECTED_MODEL)}")
