"""The results of a run in one SQLite file: what is written is whole, and only one run writes.

A result is one row: its scores as float64 in the order of the metrics, its curves as float32, whose
fractions stand once in `layouts`. Pictures and heatmaps stand in tables of their own, read by number.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Float64, Int

FILE = "results.sqlite"
KEPT = ("pictures", "heatmaps", "curves")
"""What a run may keep beside the scores."""
_LOCK = "results.lock"
_APPLICATION = 0x7863616D  # "xcam", by which a file of ours is known
_VERSION = 3
_WAIT = 600  # seconds that a run waits for a report that is read from it
_CHUNK = 8192  # rows that are in memory at a time
_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE images (
    number INTEGER PRIMARY KEY, name TEXT NOT NULL, label INTEGER, class INTEGER, probability REAL,
    error TEXT, content TEXT, checksum INTEGER NOT NULL
);
CREATE TABLE layouts (number INTEGER PRIMARY KEY, fractions TEXT NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE results (
    number INTEGER NOT NULL REFERENCES images, method TEXT NOT NULL, error TEXT, scores BLOB,
    layout INTEGER REFERENCES layouts, curves BLOB, checksum INTEGER NOT NULL, PRIMARY KEY (number, method)
);
CREATE TABLE pictures (number INTEGER PRIMARY KEY, file BLOB NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE heatmaps (
    number INTEGER NOT NULL, method TEXT NOT NULL, file BLOB NOT NULL, checksum INTEGER NOT NULL,
    PRIMARY KEY (number, method)
);
"""
_TABLES = {sql.split()[2]: sql.strip() for sql in _SCHEMA.split(";") if sql.strip()}
# What is looked at when a file is opened: rows, and how many others belong to each. Pictures and heatmaps are
# counted then, and looked at where they are read.
_ROWS = {
    "settings": "SELECT *, (SELECT count(*) FROM settings) FROM settings",
    **{table: f"SELECT *, 0 FROM {table}" for table in ("images", "layouts", "results")},
}
_OF_IMAGE = ("heatmaps", "pictures", "results", "images")
_OWNERS = {"pictures": "images", "heatmaps": "results"}  # where they are kept, each without an error has one


class ImageRow(NamedTuple):
    """A photograph of a run: classes by index, what the network saw as a JPEG file, or why it saw nothing."""

    number: int
    name: str
    label: int | None = None
    cls: int | None = None  # that was explained
    probability: float | None = None
    picture: bytes | None = None  # written; read by `Store.picture`
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
    heatmap: bytes | None = None  # written; read by `Store.heatmaps`
    error: str | None = None


class Block(NamedTuple):
    """Results of one method, failures left out.

    Attributes:
        method: by name.
        numbers: of the photographs.
        values: the score of each metric of the run.
        curves: of each metric that has them, the fractions (T,) and the scores (n, T).
    """

    method: str
    numbers: Int[np.ndarray, " n"]
    values: Float64[np.ndarray, "n metrics"]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]


class DamagedError(ValueError):
    """A file of results is not as it was written."""


class Store:
    """The results of a run. Each write is one transaction."""

    def __init__(self, connection: sqlite3.Connection, file: Path) -> None:
        self._connection, self._file = connection, file

    def settings(self) -> dict[str, Any]:
        """The settings that the run was begun with."""
        return {name: json.loads(value) for name, value, _ in self._all("SELECT * FROM settings")}

    @functools.cached_property
    def _metrics(self) -> list[str]:
        return self.settings().get("metrics", [])

    @functools.cached_property
    def _keep(self) -> Sequence[str]:
        """What is kept beside the scores."""
        return self.settings().get("keep", ())

    def images(self) -> list[ImageRow]:
        """The photographs, in the order of the run, without their pictures."""
        rows = self._all("SELECT number, name, label, class, probability, NULL, error, content FROM images")
        return list(itertools.starmap(ImageRow, rows))

    def failures(self) -> list[tuple[int, str, str]]:
        """The number, the method and the reason of each result that is a failure."""
        return self._all("SELECT number, method, error FROM results WHERE error IS NOT NULL ORDER BY 1, 2")

    def blocks(self) -> Iterator[Block]:
        """The results in chunks of each method, in the order of the photographs."""
        columns, layouts = "method, layout, number, scores, curves", self._layouts()
        query = f"SELECT {columns} FROM results WHERE error IS NULL ORDER BY number, method"
        rows = self._connection.execute(query)
        while chunk := rows.fetchmany(_CHUNK):
            groups: dict[tuple[str, int | None], list[Any]] = {}
            for method, layout, *rest in chunk:
                groups.setdefault((method, layout), []).append(rest)
            for (method, layout), group in groups.items():
                numbers, scores, curves = zip(*group, strict=True)
                values = np.frombuffer(b"".join(scores), "<f8").reshape(len(group), -1)
                found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
                if layout is not None:
                    each = np.frombuffer(b"".join(curves), "<f4").reshape(len(group), -1)
                    ends = np.cumsum([len(fractions) for fractions in layouts[layout].values()])
                    parts = np.split(each, ends[:-1], axis=1)
                    found = {m: (f, p) for (m, f), p in zip(layouts[layout].items(), parts, strict=True)}
                yield Block(method, np.array(numbers), values, found)

    def picture(self, number: int) -> bytes | None:
        """What the network saw of a photograph, as a JPEG file; None where it was not kept."""
        return next((file for _, file in self._files("pictures", number)), None)

    def heatmaps(self, number: int) -> dict[str, bytes]:
        """The heatmaps of a photograph by method, as PNG files; those that were not kept are left out."""
        return {method: file for _, method, file in self._files("heatmaps", number)}

    def contents(self) -> dict[int, str | None]:
        """What tells the photographs' files from others, by number."""
        return dict(self._all("SELECT number, content FROM images"))

    def done(self, start: int, stop: int) -> set[tuple[int, str]]:
        """Which methods are done on which of the photographs from `start` on, failures among them."""
        query = "SELECT number, method FROM results WHERE number >= ? AND number < ?"
        return set(self._all(query, start, stop))

    def counts(self) -> tuple[int, int]:
        """How many results have scores, and how many are failures."""
        return self._all("SELECT count(*) - count(error), count(error) FROM results")[0]

    def unreadable(self) -> set[int]:
        """Which photographs could not be read."""
        return {number for (number,) in self._all("SELECT number FROM images WHERE error IS NOT NULL")}

    def write(self, rows: Iterable[ImageRow | Result]) -> None:
        """Add photographs and what methods made of them, or say the same of them again."""
        with self._transaction():
            self._put(rows)

    def forget(self, numbers: Iterable[int]) -> None:
        """Take out photographs with all that was made of them."""
        with self._transaction():
            for number in numbers:
                self._drop(number)

    def _drop(self, number: int) -> None:
        for table in _OF_IMAGE:
            self._connection.execute(f"DELETE FROM {table} WHERE number = ?", [number])

    def absorb(self, file: Path) -> None:
        """Replace what is held of the photographs of another store by all that it holds of them."""
        self._connection.execute("ATTACH DATABASE ? AS other", [str(file)])
        with self._transaction():
            for table in _OF_IMAGE:
                self._connection.execute(
                    f"DELETE FROM {table} WHERE number IN (SELECT number FROM other.images)"
                )
            for table in ("images", "pictures", "heatmaps"):
                self._connection.execute(f"INSERT OR REPLACE INTO {table} SELECT * FROM other.{table}")
            layouts = self._all("SELECT number, fractions FROM other.layouts")
            own = {number: self._layout(fractions) for number, fractions in layouts}
            for *row, layout, curves, _ in self._connection.execute("SELECT * FROM other.results"):
                self._insert("results", (*row, own.get(layout), curves))
        self._connection.execute("DETACH DATABASE other")

    def forget_failures(self) -> None:
        """Take out what failed, so that it is tried again."""
        with self._transaction():
            for table in ("results", "images"):
                self._connection.execute(f"DELETE FROM {table} WHERE error IS NOT NULL")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Make the tables and write the settings down."""
        with self._transaction():
            self._begin(settings)

    def _begin(self, settings: Mapping[str, Any]) -> None:
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
                return f"its table {missing[0]!r} is missing"
            return self._changed(_ROWS, _checksum) or self._miscounted()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            return str(error)

    def _miscounted(self) -> str | None:
        for table, owner in _OWNERS.items():
            of_owner = f"SELECT count(*) - count(error) FROM {owner}"
            if table in self._keep and self._all(f"SELECT count(*) FROM {table}") != self._all(of_owner):
                return f"rows of {table!r} or of {owner!r} are missing"
        return None

    def _changed(self, rows: Mapping[str, str], checksum: Callable[[Sequence[Any]], int]) -> str | None:
        """What is wrong with the rows of these tables."""
        for table in rows:
            if (found := self._all(f"PRAGMA integrity_check({table})")) != [("ok",)]:
                return found[0][0]
        if not self._all("SELECT 1 FROM settings"):
            return "its settings are missing"
        for table, query in rows.items():
            for *row, known, others in self._connection.execute(query):
                if known != checksum([*row, others]):
                    return f"rows of {table!r} are changed or missing"
        orphans = [each for table in rows for each in self._all(f"PRAGMA foreign_key_check({table})")]
        return f"rows that {orphans[0][0]!r} refers to are missing" if orphans else None

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
            remedy = "earlier results are safe: check the disk and run the same command again"
            raise OSError(f"{str(self._file)!r} could not be written ({error}); {remedy}") from None

    def _put(self, rows: Iterable[ImageRow | Result]) -> None:
        for row in rows:
            if isinstance(row, ImageRow):
                *known, picture, error, content = row
                if error is not None:  # it may have been readable before
                    self._drop(row.number)
                self._insert("images", (*known, error, content))
                if picture is not None and "pictures" in self._keep:
                    self._insert("pictures", (row.number, picture))
            else:
                made = (None, None, None) if row.error else self._packed(row.scores)
                if row.error is not None:
                    which = row.number, row.method
                    self._connection.execute("DELETE FROM heatmaps WHERE number = ? AND method = ?", which)
                self._insert("results", (row.number, row.method, row.error, *made))
                if row.heatmap is not None and "heatmaps" in self._keep:
                    self._insert("heatmaps", (row.number, row.method, row.heatmap))

    def _packed(self, scores: Mapping[str, Score]) -> tuple[bytes, int | None, bytes | None]:
        """The scores, the layout of the curves, and the curves."""
        found = [(name, scores[name]) for name in self._metrics]
        values = np.array([score.value for _, score in found], "<f8").tobytes()
        curves = [score.curve for _, score in found if score.curve is not None]
        if not curves or "curves" not in self._keep:
            return values, None, None
        layout = {name: [*map(float, f)] for name, (_, f, _) in found if f is not None}
        return values, self._layout(json.dumps(layout)), np.concatenate(curves).astype("<f4").tobytes()

    def _layout(self, fractions: str) -> int:
        """The number of a layout, which is added where it is new."""
        same = self._all("SELECT number FROM layouts WHERE fractions = ?", fractions)
        number = same[0][0] if same else self._all("SELECT count(*) FROM layouts")[0][0]
        if not same:
            self._insert("layouts", (number, fractions))
        return number

    def _layouts(self) -> dict[int, dict[str, np.ndarray]]:
        """Of each layout the fractions of the metrics that have curves."""
        arrays = lambda text: {name: np.array(each) for name, each in json.loads(text).items()}  # noqa: E731
        return {number: arrays(text) for number, text, _ in self._all("SELECT * FROM layouts")}

    def _insert(self, table: str, row: Sequence[Any], others: int = 0) -> None:
        row = [None if value != value else value for value in row]  # noqa: PLR0124  (SQLite has no NaN)
        places = ", ".join("?" * (len(row) + 1))
        query = f"INSERT OR REPLACE INTO {table} VALUES ({places})"
        self._connection.execute(query, (*row, _checksum([*row, others])))

    def _files(self, table: str, number: int) -> list[Any]:
        """The rows of a photograph in a table that is looked at only now."""
        owned = f"SELECT count(*) - count(error) FROM {_OWNERS[table]} WHERE number = ?"
        try:
            rows = self._all(f"SELECT * FROM {table} WHERE number = ?", number)
            is_lost = table in self._keep and len(rows) != self._all(owned, number)[0][0]
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise DamagedError(_damaged(self._file, str(error))) from None
        if is_lost or any(checksum != _checksum([*row, 0]) for *row, checksum in rows):
            raise DamagedError(_damaged(self._file, f"rows of {table!r} are changed or missing"))
        return [row for *row, _ in rows]

    def _all(self, query: str, *values: Any) -> list[Any]:
        return self._connection.execute(query, values).fetchall()


def _checksum(row: Iterable[Any]) -> int:
    """A number by which it shows that a row has changed."""
    found = 0
    for value in row:
        found = zlib.crc32(value if isinstance(value, bytes) else f"{value!r},".encode(), found)
    return found


def _damaged(file: Path, why: str) -> str:
    remedy = "Restore it from a copy, or delete it and run again"
    return f"{str(file)!r} is damaged: {' '.join(why.split())}. {remedy}"


@contextlib.contextmanager
def writing(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> Iterator[Store]:
    """The store of a run to be begun or continued; no other run can write to it meanwhile."""
    place = Path(folder)
    output, other = f"output {str(place)!r}", "choose another folder"
    if place.exists() and not place.is_dir():
        raise ValueError(f"{output} is a file; expected a folder")
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = _locked(place)
    except OSError as error:
        raise OSError(f"{output} cannot be written to ({error.strerror or error}); {other}") from None
    with lock, _connected(place / FILE, "rwc", is_locked=True) as (store, is_new):
        if is_new:
            store.begin(settings)
        elif differing := store.differing(settings):
            remedy = "Choose another folder, or start a run beside it (--beside)"
            raise ValueError(f"{output} holds a run with other settings: {'; '.join(differing)}. {remedy}")
        yield store


def _locked(place: Path) -> Any:
    """The lock of a run's folder, held."""
    try:
        return FileLock(place / _LOCK, timeout=0).acquire()
    except Timeout:
        remedy = "wait for it, or choose another folder"
        raise ValueError(f"output {str(place)!r}: another run is writing there; {remedy}") from None


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
    """The store of a run as it is now, to be read; the run may go on meanwhile."""
    file = Path(folder) / FILE
    if not file.is_file():
        wanted = "a folder written by `xcam evaluate`"
        raise FileNotFoundError(f"{str(folder)!r} holds no {FILE}; expected {wanted}")
    with _connected(file, "rw") as (store, is_new):  # a killed run's last write is rolled back
        if is_new:
            raise ValueError(f"{str(file)!r} is empty; run `xcam evaluate` first")
        yield store


@contextlib.contextmanager
def _connected(file: Path, mode: str, *, is_locked: bool = False) -> Iterator[tuple[Store, bool]]:
    """The store in the file, and whether it is new; raises where what it holds is not ours or is damaged."""
    where, other = repr(str(file)), "choose another folder"
    with contextlib.ExitStack() as stack:
        try:
            address = f"{file.resolve().as_uri()}?mode={mode}"
            connection = sqlite3.connect(address, uri=True, timeout=_WAIT, isolation_level=None)
            store = Store(stack.enter_context(contextlib.closing(connection)), file)
            known = tuple(store._all(f"PRAGMA {name}")[0][0] for name in ("application_id", "user_version"))
            is_new = known[0] == 0 and not store._all("SELECT 1 FROM sqlite_schema")
        except sqlite3.OperationalError as error:
            raise OSError(f"{where} cannot be opened ({error}); {other}") from None
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{where} is not a file of results ({error}); {other}") from None
        if known == (_APPLICATION, 2):
            with contextlib.nullcontext() if is_locked else _locked(file.parent):
                _bring_up_to_date(store)
        elif not is_new and known != (_APPLICATION, _VERSION):
            raise ValueError(f"{where} is a database of another program or version of xcam_fn; {other}")
        if not is_locked:
            connection.execute("BEGIN")  # all that is read is of one moment
        if not is_new and (lost := store.lost()):
            raise DamagedError(_damaged(file, lost))
        yield store, is_new


# -- files of version 2 -------------------------------------------------------------------------------------

_OF_RESULT = "SELECT count(*) FROM scores AS s WHERE s.number = r.number AND s.method = r.method"
_ROWS_2 = {
    "settings": "SELECT *, (SELECT count(*) FROM settings) FROM settings",
    "images": "SELECT *, 0 FROM images",
    "results": f"SELECT *, ({_OF_RESULT}) FROM results AS r",
    "scores": "SELECT *, 0 FROM scores",
}


def _bring_up_to_date(store: Store) -> None:
    """Write a file of version 2 anew, in one transaction; raises where it is damaged."""
    try:
        wrong = store._changed(_ROWS_2, lambda row: zlib.crc32(json.dumps(row, default=repr).encode()))
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        wrong = str(error)
    if wrong:
        raise DamagedError(_damaged(store._file, wrong))
    with store._transaction():
        settings = store.settings() | {"keep": KEPT}
        for table in _ROWS_2:
            store._connection.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
        store._begin(settings)
        images = store._connection.execute("SELECT * FROM old_images ORDER BY number")
        results = store._connection.execute("SELECT * FROM old_results ORDER BY number, method")
        store._put(ImageRow(*row) for *row, _ in images)
        store._put(_result_2(store, *row) for *row, _ in results)
        for table in reversed(_ROWS_2):
            store._connection.execute(f"DROP TABLE old_{table}")


def _result_2(store: Store, number: int, method: str, heatmap: bytes | None, error: str | None) -> Result:
    query = "SELECT metric, value, fractions, curve FROM old_scores WHERE number = ? AND method = ?"
    array = lambda content: None if content is None else np.frombuffer(content, "<f8")  # noqa: E731
    rows = store._all(query, number, method)
    return Result(number, method, {m: Score(v, array(f), array(c)) for m, v, f, c in rows}, heatmap, error)
