"""A run in parts: which batches a part has, on what machine it ran, and one run made of all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xcam_fn.evaluate.store import FILE, Store, reading, writing

_NOTES = "run.json"
# The variables by which a part knows its number: that, the first number, and how many there are.
_VARIABLES = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT"),
    ("RANK", None, "WORLD_SIZE"),
    ("JOB_COMPLETION_INDEX", None, "JOB_COMPLETIONS"),
)


class Shard(NamedTuple):
    """A part of a run: every so many batches.

    Attributes:
        number: which, from 1.
        of: how many parts there are.
    """

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def share(self, count: int, batch_size: int) -> int:
        """How many of so many images are in it."""
        batches = range((self.number - 1) * batch_size, count, batch_size * self.of)
        return sum(min(batch_size, count - start) for start in batches)


def shard_of(text: str | None) -> Shard | None:
    """The shard that a text such as "2/4" names, or the variables of a scheduler for "env".

    Raises:
        ValueError: it is no shard, or the variables say none or more than one.
    """
    if text is None:
        return None
    if text == "env":
        return _of_variables(os.environ)
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"shard={text!r}: expected i/n with 1 <= i <= n, such as 2/4, or 'env'")
    return Shard(int(found[1]), int(found[2]))


def _of_variables(variables: Mapping[str, str]) -> Shard:
    known = [names for names in _VARIABLES if names[0] in variables and names[2] in variables]
    if len(known) != 1:
        said = " and ".join(names[0] for names in known) if known else "no variable of a scheduler"
        wanted = " or ".join(f"{name} with {count}" for name, _, count in _VARIABLES)
        raise ValueError(f"shard='env': {said} is set; expected one of {wanted}, or give i/n")
    name, first, count = known[0]
    try:
        index = int(variables[name]) - (int(variables.get(first, 0)) if first else 0)
        return shard_of(f"{index + 1}/{int(variables[count])}") or Shard(1, 1)
    except ValueError:
        said = f"{name}={variables[name]} with {count}={variables[count]}"
        raise ValueError(f"shard='env': {said} is no shard; number them without gaps, or give i/n") from None


# -- where it ran -------------------------------------------------------------------------------------------


def hardware(devices: Iterable[torch.device]) -> dict[str, Any]:
    """The machine that computes: its processor, the devices that are used, and the threads of a forward."""
    names = [torch.cuda.get_device_name(each) if each.type == "cuda" else str(each) for each in devices]
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "processor": f"{processor}, {capability}",
        "devices": sorted(names),
        "threads": torch.get_num_threads(),
    }


def notes(folder: Path) -> dict[str, Any]:
    """The machines that computed a run; once it ended, the rows of the data set, and those of a batch."""
    none = {"machines": [], "rows": None, "step": None}
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        return none | json.loads((folder / _NOTES).read_text(encoding="utf-8"))
    return none


def note(folder: Path, machines: Iterable[Mapping[str, Any]] = (), **ended: int | None) -> None:
    """Add to what is noted beside the store of a run, which this process writes to."""
    known = notes(folder)
    every = [*known["machines"], *machines]
    known["machines"] = [machine for i, machine in enumerate(every) if machine not in every[:i]]
    known |= ended
    written = folder / f"{_NOTES}.new"
    written.write_text(json.dumps(known, indent=1), encoding="utf-8")
    written.replace(folder / _NOTES)


# -- one run of all -----------------------------------------------------------------------------------------


class Merged(NamedTuple):
    """The outcome of a merge.

    Attributes:
        results: pairs of a photograph and a method with scores.
        failures: pairs that failed.
        missing: descriptions of missing shards and rows.
        twice: descriptions of shards that were computed more than once; the first complete one counts.
        machines: the machines that computed the shards, without duplicates.
        unreadable: number of photographs that could not be read.
    """

    results: int
    failures: int
    missing: list[str]
    twice: list[str]
    machines: list[dict[str, Any]]
    unreadable: int = 0


class _Part(NamedTuple):
    """The store of a shard."""

    folder: Path
    settings: dict[str, Any]
    shard: Shard
    notes: dict[str, Any]
    lacking: int | float  # rows that are not done; infinite where it has not ended


def merge(
    runs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], *, partial: bool = False
) -> Merged:
    """Merge the shards of a run into the run that one machine would have written.

    Merging again gives the same result, and `run` without `shard` can continue the merged run.

    Args:
        runs: the folders of all shards, in any order.
        output: the folder of the merged run.
        partial: merge what is there even if something is missing.

    Raises:
        ValueError: a folder holds no shard, the shards have different settings, or something is missing.
        FileNotFoundError: a folder holds no run.
    """
    place, parts = Path(output), [_part(Path(run)) for run in runs]
    if not parts:
        raise ValueError("runs is empty; expected the folders of all shards")
    first = parts[0]
    for part in parts:
        if part.folder.resolve() == place.resolve():
            raise ValueError(f"output {str(place)!r} is one of the shards; choose another folder")
        if changed := _differing(first, part):
            raise ValueError(f"runs: {first.folder} and {part.folder} are not shards of one run: {changed}")
    of = first.shard.of
    whole = {i: [part for part in parts if part.shard.number == i] for i in range(1, of + 1)}
    twice = [
        f"shard {i}/{of} is in {' and in '.join(str(part.folder) for part in some)}"
        for i, some in whole.items()
        if len(some) > 1
    ]
    # The first of equals is the one with the least missing.
    best = {i: min(some, key=attrgetter("lacking")) for i, some in whole.items() if some}
    missing = [f"shard {i}/{of} is in no folder" for i in whole if i not in best]
    missing += [f"{part.folder}: {_words(part)}" for part in best.values() if part.lacking != 0]
    if missing and not partial:
        remedy = "run the missing shards, or merge without them (--partial)"
        raise ValueError(f"runs: {'; '.join(missing)}; {remedy}")
    with writing(place, {**first.settings, "shard": None}) as store:
        for part in best.values():
            store.absorb(part.folder / FILE)
        if not missing:
            store.forget([number for number in store.contents() if number >= first.notes["rows"]])
        counts, unreadable = store.counts(), len(store.unreadable())
    machines = [machine for part in best.values() for machine in part.notes["machines"]]
    ended = {name: None if missing else first.notes[name] for name in ("rows", "step")}
    note(place, machines, **ended)
    return Merged(*counts, missing, twice, notes(place)["machines"], unreadable)


def _part(folder: Path) -> _Part:
    with reading(folder) as store:
        settings, known = store.settings(), notes(folder)
        if settings.get("shard") is None:
            raise ValueError(f"{str(folder)!r} holds a whole run; expected one written with --shard")
        shard = shard_of(settings["shard"])
        assert shard is not None
        return _Part(folder, settings, shard, known, _undone(store, len(settings["methods"]), shard, known))


def _undone(store: Store, methods: int, shard: Shard, known: Mapping[str, Any]) -> int | float:
    """How many rows of a shard are not done."""
    if None in (known["rows"], known["step"]):
        return math.inf
    there, unreadable = Counter(number for number, _ in store.done(0, sys.maxsize)), store.unreadable()
    missing = [n for n in store.contents() if n not in unreadable and there[n] < methods]
    return len(missing) + shard.share(known["rows"], known["step"]) - len(store.contents())


def _differing(first: _Part, other: _Part) -> str:
    """How the settings of two shards differ, in words."""
    pairs: list[tuple[str, Any, Any]] = [
        (name, first.settings.get(name), other.settings.get(name))
        for name in {**first.settings, **other.settings}
        if name != "shard"
    ]
    pairs.append(("the number of shards", first.shard.of, other.shard.of))
    if None not in (first.notes["rows"], other.notes["rows"]):
        pairs.append(("the number of rows", first.notes["rows"], other.notes["rows"]))
    return "; ".join(f"{name} is {a!r} and {b!r}" for name, a, b in pairs if a != b)


def _words(part: _Part) -> str:
    what = "has not ended" if part.lacking == math.inf else f"has not done {part.lacking} photographs"
    return f"shard {part.shard} {what}"
