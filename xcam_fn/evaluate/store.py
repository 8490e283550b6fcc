"""The results of a run in one SQLite file: what is written is whole, and only one run writes."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

FILE = "results.sqlite"
_LOCK = "results.lock"
_APPLICATION = 0x7863616D  # "xcam", by which a file of ours is known
_VERSION = 1
_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE images (
    number INTEGER PRIMARY KEY, name TEXT NOT NULL, label INTEGER, class INTEGER, probability REAL,
    picture BLOB, error TEXT
);
CREATE TABLE results (
    number INTEGER NOT NULL, method TEXT NOT NULL, heatmap BLOB, error TEXT, PRIMARY KEY (number, method)
);
CREATE TABLE scores (
    number INTEGER NOT NULL, method TEXT NOT NULL, metric TEXT NOT NULL, value REAL NOT NULL,
    fractions BLOB, curve BLOB, PRIMARY KEY (number, method, metric)
);
"""


class OtherSettingsError(ValueError):
    """The folder holds a run with other settings."""


class ImageRow(NamedTuple):
    """A photograph of a run.

    Attributes:
        number: its place in the run.
        name: by which it is known.
        label: the index of its class, where it is known.
        cls: the index of the class that was explained.
        probability: of that class.
        picture: what the network saw, as a JPEG file.
        error: why it could not be read, or None.
    """

    number: int
    name: str
    label: int | None = None
    cls: int | None = None
    probability: float | None = None
    picture: bytes | None = None
    error: str | None = None


class Score(NamedTuple):
    """What a metric found.

    Attributes:
        value: the score; of a curve the area.
        fractions: (T,), where it is a curve.
        curve: (T,), the scores along it.
    """

    value: float
    fractions: np.ndarray | None = None
    curve: np.ndarray | None = None


class Result(NamedTuple):
    """What a method made of a photograph.

    Attributes:
        number: the photograph's.
        method: by name.
        scores: by metric.
        heatmap: small, as a PNG file.
        error: why there is none, or None.
    """

    number: int
    method: str
    scores: dict[str, Score]
    heatmap: bytes | None = None
    error: str | None = None


class Store:
    """The results of a run. Each write is one transaction."""

    def __init__(self, connection: sqlite3.Connection, file: Path) -> None:
        self._connection, self._file = connection, file

    @property
    def folder(self) -> Path:
        """Where the run is."""
        return self._file.parent

    def settings(self) -> dict[str, Any]:
        """The settings that the run was begun with."""
        return {name: json.loads(value) for name, value in self._all("SELECT * FROM settings")}

    def images(self) -> list[ImageRow]:
        """The photographs, in the order of the run."""
        return [ImageRow(*row) for row in self._all("SELECT * FROM images ORDER BY number")]

    def results(self) -> list[Result]:
        """What the methods made of the photographs, in the order of the photographs."""
        scores: dict[tuple[int, str], dict[str, Score]] = {}
        for number, method, metric, value, *arrays in self._all("SELECT * FROM scores"):
            scores.setdefault((number, method), {})[metric] = Score(value, *map(_unpacked, arrays))
        rows = self._all("SELECT number, method, heatmap, error FROM results ORDER BY number, method")
        return [
            Result(number, method, scores.get((number, method), {}), heatmap, error)
            for number, method, heatmap, error in rows
        ]

    def done(self) -> set[tuple[int, str]]:
        """Which methods are done on which photographs, failures among them."""
        return set(self._all("SELECT number, method FROM results"))

    def counts(self) -> tuple[int, int]:
        """How many results have scores, and how many are failures."""
        return self._all("SELECT count(*) - count(error), count(error) FROM results")[0]

    def unreadable(self) -> set[int]:
        """Which photographs could not be read."""
        return {number for (number,) in self._all("SELECT number FROM images WHERE error IS NOT NULL")}

    def write_image(self, image: ImageRow) -> None:
        """Add a photograph, or say the same of it again."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?)", image)

    def write_result(self, result: Result) -> None:
        """Add what a method made of a photograph, with its scores."""
        number, method, scores, *rest = result
        rows = (
            (number, method, metric, score.value, *map(_packed, score[1:]))
            for metric, score in scores.items()
        )
        with self._transaction() as connection:
            connection.execute("INSERT INTO results VALUES (?, ?, ?, ?)", (number, method, *rest))
            connection.executemany("INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?)", rows)

    def forget_failures(self) -> None:
        """Take out what failed, so that it is tried again."""
        with self._transaction() as connection:
            for table in ("results", "images"):
                connection.execute(f"DELETE FROM {table} WHERE error IS NOT NULL")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Make the tables and write the settings down."""
        with self._transaction() as connection:
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            rows = [(name, json.dumps(value)) for name, value in settings.items()]
            connection.executemany("INSERT INTO settings VALUES (?, ?)", rows)
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {_VERSION}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._connection as connection:  # commits, or rolls back where something fails
                connection.execute("BEGIN IMMEDIATE")
                yield connection
        except sqlite3.OperationalError as error:
            raise OSError(
                f"{str(self._file)!r} could not be written ({error}); what was written before is safe: "
                "make room and run the same command again"
            ) from None

    def _all(self, query: str) -> list[Any]:
        return self._connection.execute(query).fetchall()


def _packed(array: np.ndarray | None) -> bytes | None:
    return None if array is None else np.asarray(array, "<f8").tobytes()


def _unpacked(content: bytes | None) -> np.ndarray | None:
    return None if content is None else np.frombuffer(content, "<f8")


@contextlib.contextmanager
def writing(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> Iterator[Store]:
    """The store of a run to be begun or continued; no other run can write to it meanwhile.

    Args:
        folder: where the run is, or is to be.
        settings: what the results depend on, as JSON can hold it.

    Raises:
        ValueError: another run writes there, or the run there has other settings: which ones is said.
        OSError: the folder cannot be written to.
    """
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise ValueError(f"output {str(place)!r} is a file; expected a folder")
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / _LOCK, timeout=0).acquire()
    except Timeout:
        raise ValueError(
            f"output {str(place)!r}: another run is writing there; wait for it, or choose another folder"
        ) from None
    except OSError as error:
        raise OSError(
            f"output {str(place)!r} cannot be written to ({error.strerror or error}); choose another folder"
        ) from None
    with lock, _connected(place / FILE, "rwc") as (store, is_new):
        if is_new:
            store.begin(settings)
        else:
            _check_same(place, store.settings(), json.loads(json.dumps(dict(settings))))
        yield store


@contextlib.contextmanager
def reading(folder: str | os.PathLike[str]) -> Iterator[Store]:
    """The store of a run, to be read; the run may go on meanwhile.

    Args:
        folder: where the run is.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the file there is not of a run.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no {FILE}; expected a folder that `xcam evaluate` wrote"
        )
    with _connected(file, "ro") as (store, is_new):
        if is_new:
            raise ValueError(f"{str(file)!r} is empty; run `xcam evaluate` first")
        yield store


@contextlib.contextmanager
def _connected(file: Path, mode: str) -> Iterator[tuple[Store, bool]]:
    """The store in the file, and whether it is new; raises where what the file holds is not ours."""
    questions = ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_schema")
    with contextlib.ExitStack() as stack:
        try:
            address = f"{file.resolve().as_uri()}?mode={mode}"
            connection = sqlite3.connect(address, uri=True, timeout=30, isolation_level=None)
            store = Store(stack.enter_context(contextlib.closing(connection)), file)
            application, version, tables = (store._all(question)[0][0] for question in questions)
        except sqlite3.OperationalError as error:
            raise OSError(f"{str(file)!r} cannot be opened ({error}); choose another folder") from None
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{str(file)!r} is not a file of results ({error}); choose another folder"
            ) from None
        is_new = application == 0 and not tables
        if not is_new and (application, version) != (_APPLICATION, _VERSION):
            raise ValueError(
                f"{str(file)!r} is a database of another program or of another version; choose another folder"
            )
        yield store, is_new


def _check_same(place: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    changed = [name for name, value in here.items() if there.get(name) != value]
    differing = [f"{name} was {there.get(name)!r} and is {here[name]!r}" for name in changed]
    if differing:
        raise OtherSettingsError(
            f"output {str(place)!r} holds a run with other settings: {'; '.join(differing)}. Choose another "
            "folder, or start a run beside it (--beside)"
        )
