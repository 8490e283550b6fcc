"""The results of a run in one SQLite file: what is written is whole, and only one run writes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

FILE = "results.sqlite"
_LOCK = "results.lock"
_APPLICATION = 0x7863616D  # "xcam", by which a file of ours is known
_VERSION = 2
_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE images (
    number INTEGER PRIMARY KEY, name TEXT NOT NULL, label INTEGER, class INTEGER, probability REAL,
    picture BLOB, error TEXT, content TEXT, checksum INTEGER NOT NULL
);
CREATE TABLE results (
    number INTEGER NOT NULL REFERENCES images, method TEXT NOT NULL, heatmap BLOB, error TEXT,
    checksum INTEGER NOT NULL, PRIMARY KEY (number, method)
);
CREATE TABLE scores (
    number INTEGER NOT NULL, method TEXT NOT NULL, metric TEXT NOT NULL, value REAL NOT NULL,
    fractions BLOB, curve BLOB, checksum INTEGER NOT NULL, PRIMARY KEY (number, method, metric),
    FOREIGN KEY (number, method) REFERENCES results
);
"""
_TABLES = {sql.split()[2]: sql.strip() for sql in _SCHEMA.split(";") if sql.strip()}
# The rows of each table, and how many others belong to each: that a row is lost shows in those that it is of.
_OF_RESULT = "SELECT count(*) FROM scores AS s WHERE s.number = r.number AND s.method = r.method"
_ROWS = {
    "settings": "SELECT *, (SELECT count(*) FROM settings) FROM settings",
    "images": "SELECT *, 0 FROM images",
    "results": f"SELECT *, ({_OF_RESULT}) FROM results AS r",
    "scores": "SELECT *, 0 FROM scores",
}


class ImageRow(NamedTuple):
    """A photograph of a run: classes by index, what the network saw as a JPEG file, or why it saw nothing."""

    number: int
    name: str
    label: int | None = None
    cls: int | None = None  # that was explained
    probability: float | None = None
    picture: bytes | None = None
    error: str | None = None
    content: str | None = None  # tells its file from one with other content


class Score(NamedTuple):
    """What a metric found: the score, of a curve the area; where it is one, the (T,) fractions and scores."""

    value: float
    fractions: np.ndarray | None = None
    curve: np.ndarray | None = None


class Result(NamedTuple):
    """What a method made of a photograph: scores by metric and a small PNG file, or why there is none."""

    number: int
    method: str
    scores: dict[str, Score]
    heatmap: bytes | None = None
    error: str | None = None


class Store:
    """The results of a run. Each write is one transaction."""

    def __init__(self, connection: sqlite3.Connection, file: Path) -> None:
        self._connection, self._file = connection, file

    def settings(self) -> dict[str, Any]:
        """The settings that the run was begun with."""
        return {name: json.loads(value) for name, value, _ in self._all("SELECT * FROM settings")}

    def images(self) -> list[ImageRow]:
        """The photographs, in the order of the run."""
        return [ImageRow(*row) for *row, _ in self._all("SELECT * FROM images ORDER BY number")]

    def results(self) -> list[Result]:
        """What the methods made of the photographs, in the order of the photographs."""
        scores: dict[tuple[int, str], dict[str, Score]] = {}
        for number, method, metric, value, *arrays, _ in self._all("SELECT * FROM scores"):
            scores.setdefault((number, method), {})[metric] = Score(value, *map(_unpacked, arrays))
        rows = self._all("SELECT * FROM results ORDER BY number, method")
        return [Result(n, method, scores.get((n, method), {}), *rest) for n, method, *rest, _ in rows]

    def contents(self) -> dict[int, str | None]:
        """What tells the photographs' files from others, by number."""
        return dict(self._all("SELECT number, content FROM images"))

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
        with self._transaction():
            self._insert("images", image)

    def write_result(self, result: Result) -> None:
        """Add what a method made of a photograph, with its scores."""
        number, method, scores, *rest = result
        with self._transaction():
            self._insert("results", (number, method, *rest), len(scores))
            for metric, (value, *arrays) in scores.items():
                self._insert("scores", (number, method, metric, float(value), *map(_packed, arrays)))

    def forget(self, numbers: Iterable[int]) -> None:
        """Take out photographs with all that was made of them."""
        with self._transaction():
            for number, table in itertools.product(numbers, ("scores", "results", "images")):
                self._connection.execute(f"DELETE FROM {table} WHERE number = ?", [number])

    def absorb(self, file: Path) -> None:
        """Add all that another store holds, but for its settings."""
        self._connection.execute("ATTACH DATABASE ? AS other", [str(file)])
        with self._transaction():
            for table in ("images", "results", "scores"):
                self._connection.execute(f"INSERT OR REPLACE INTO {table} SELECT * FROM other.{table}")
        self._connection.execute("DETACH DATABASE other")

    def forget_failures(self) -> None:
        """Take out what failed, so that it is tried again."""
        with self._transaction():
            for table in ("results", "images"):
                self._connection.execute(f"DELETE FROM {table} WHERE error IS NOT NULL")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Make the tables and write the settings down."""
        with self._transaction():
            for statement in _TABLES.values():
                self._connection.execute(statement)
            for name, value in settings.items():
                self._insert("settings", (name, json.dumps(value)), len(settings))
            self._connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._connection.execute(f"PRAGMA user_version = {_VERSION}")

    def lost(self) -> str | None:
        """What is wrong with the file, in words; None where all is as it was written."""
        try:
            schema = {sql for (sql,) in self._all("SELECT sql FROM sqlite_schema")}
            if missing := [name for name, sql in _TABLES.items() if sql not in schema]:
                return f"it has lost its table {missing[0]!r}"
            if (found := self._all("PRAGMA integrity_check")) != [("ok",)]:
                return found[0][0]
            if not self._all("SELECT 1 FROM settings"):
                return "its settings are lost"
            for table, query in _ROWS.items():
                for *row, checksum, others in self._connection.execute(query):
                    if checksum != _checksum(row, others):
                        return f"rows of {table!r} have changed or are lost"
            orphans = self._all("PRAGMA foreign_key_check")
            return f"rows that those of {orphans[0][0]!r} belong to are lost" if orphans else None
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            return str(error)

    def differing(self, settings: Mapping[str, Any]) -> list[str]:
        """How other settings than the run's differ from them, in words."""
        there, here = self.settings(), json.loads(json.dumps(dict(settings)))
        changed = [name for name, value in here.items() if there.get(name) != value]
        return [f"{name} was {there.get(name)!r} and is {here[name]!r}" for name in changed]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with self._connection:  # commits, or rolls back where something fails
                self._connection.execute("BEGIN IMMEDIATE")
                yield
        except sqlite3.DatabaseError as error:
            remedy = "what was written before is safe: make room and run the same command again"
            raise OSError(f"{str(self._file)!r} could not be written ({error}); {remedy}") from None

    def _insert(self, table: str, row: Sequence[Any], others: int = 0) -> None:
        places = ", ".join("?" * (len(row) + 1))
        query = f"INSERT OR REPLACE INTO {table} VALUES ({places})"
        self._connection.execute(query, (*row, _checksum(row, others)))

    def _all(self, query: str) -> list[Any]:
        return self._connection.execute(query).fetchall()


def _checksum(row: Sequence[Any], others: int) -> int:
    """A number by which it shows that a row, or how many others belong to it, has changed."""
    return zlib.crc32(json.dumps([*row, others], default=repr).encode())


def _packed(array: np.ndarray | None) -> bytes | None:
    return None if array is None else np.asarray(array, "<f8").tobytes()


def _unpacked(content: bytes | None) -> np.ndarray | None:
    return None if content is None else np.frombuffer(content, "<f8")


@contextlib.contextmanager
def writing(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> Iterator[Store]:
    """The store of a run to be begun or continued; no other run can write to it meanwhile."""
    place = Path(folder)
    output, other = f"output {str(place)!r}", "choose another folder"
    if place.exists() and not place.is_dir():
        raise ValueError(f"{output} is a file; expected a folder")
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / _LOCK, timeout=0).acquire()
    except Timeout:
        raise ValueError(f"{output}: another run is writing there; wait for it, or {other}") from None
    except OSError as error:
        raise OSError(f"{output} cannot be written to ({error.strerror or error}); {other}") from None
    with lock, _connected(place / FILE, "rwc") as (store, is_new):
        if is_new:
            store.begin(settings)
        elif differing := store.differing(settings):
            remedy = "Choose another folder, or start a run beside it (--beside)"
            raise ValueError(f"{output} holds a run with other settings: {'; '.join(differing)}. {remedy}")
        yield store


def beside(output: Path, settings: Mapping[str, Any]) -> Path:
    """The folder, or the first of output_2, output_3 … that holds no run with other settings."""
    for n in itertools.count(1):
        place = output if n == 1 else output.with_name(f"{output.name}_{n}")
        if not (place / FILE).is_file():
            return place
        with _connected(place / FILE, "rw") as (store, is_new):
            if is_new or not store.differing(settings):
                return place
    raise AssertionError


@contextlib.contextmanager
def reading(folder: str | os.PathLike[str]) -> Iterator[Store]:
    """The store of a run, to be read; the run may go on meanwhile."""
    file = Path(folder) / FILE
    if not file.is_file():
        wanted = "a folder that `xcam evaluate` wrote"
        raise FileNotFoundError(f"{str(folder)!r} holds no {FILE}; expected {wanted}")
    with _connected(file, "rw") as (store, is_new):  # a killed run's last write is rolled back
        if is_new:
            raise ValueError(f"{str(file)!r} is empty; run `xcam evaluate` first")
        yield store


@contextlib.contextmanager
def _connected(file: Path, mode: str) -> Iterator[tuple[Store, bool]]:
    """The store in the file, and whether it is new; raises where what it holds is not ours or is damaged."""
    where, other = repr(str(file)), "choose another folder"
    with contextlib.ExitStack() as stack:
        try:
            address = f"{file.resolve().as_uri()}?mode={mode}"
            connection = sqlite3.connect(address, uri=True, timeout=30, isolation_level=None)
            store = Store(stack.enter_context(contextlib.closing(connection)), file)
            known = tuple(store._all(f"PRAGMA {name}")[0][0] for name in ("application_id", "user_version"))
            is_new = known[0] == 0 and not store._all("SELECT 1 FROM sqlite_schema")
        except sqlite3.OperationalError as error:
            raise OSError(f"{where} cannot be opened ({error}); {other}") from None
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{where} is not a file of results ({error}); {other}") from None
        if not is_new and known != (_APPLICATION, _VERSION):
            raise ValueError(f"{where} is a database of another program or of another version; {other}")
        if not is_new and (lost := store.lost()):
            remedy = "Put a copy of it in its place, or delete it and run again"
            raise ValueError(f"{where} is damaged: {' '.join(lost.split())}. {remedy}")
        yield store, is_new
