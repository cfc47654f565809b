"""The curve store: what trials have reported so far, in one SQLite file, so that no training is ever done twice.

A curve is everything that one trial reports when it is trained: row n is its n-th report (or the failure that came
instead), with the seconds it took. A curve is addressed by its content: a dict of whatever decides the reports (task,
configuration, seed, code version). Rows are written once and never change: whoever asks again, from whichever process,
gets the first measurement. Each curve may have a checkpoint, from which a further row can be trained; checkpoints are
dropped, least recently used first, when all together exceed the limit (the rows stay).

A row is committed as it is written, so a kill loses none; a power cut may lose the last ones, never the file. Rows are
not limited (a hundred bytes to a kilobyte each), and the file does not shrink: dropped checkpoints make room in it.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.context import UserError, to_json

WAIT_SECONDS = 60.0  # for another process to finish writing; a write takes milliseconds
VERSION = 1  # of the tables below
SCHEMA = """
CREATE TABLE curves (
    id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, key TEXT NOT NULL, origin TEXT NOT NULL);
CREATE TABLE rows (
    curve INTEGER NOT NULL REFERENCES curves(id), number INTEGER NOT NULL, row TEXT NOT NULL,
    PRIMARY KEY (curve, number)) WITHOUT ROWID;
CREATE TABLE checkpoints (
    curve INTEGER PRIMARY KEY REFERENCES curves(id), rows INTEGER NOT NULL, used INTEGER NOT NULL,
    bytes INTEGER NOT NULL, content BLOB NOT NULL);
CREATE INDEX by_use ON checkpoints(used);
"""


@dataclass(frozen=True)
class Row:
    """One report of a curve, or the failure that ended it (``report`` is None then).

    ``seconds``: what it took, if the report itself has no busy seconds by kind. ``details``: of a failure, what the
    attempt had spent (``backends.context.TrialFailed``).
    """

    report: dict[str, Any] | None
    seconds: float = 0.0
    failure: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return to_json({k: v for k, v in self.__dict__.items() if v not in (None, {}, 0.0)})

    @classmethod
    def from_json(cls, text: str) -> "Row":
        return cls(**{"report": None, **json.loads(text)})


@dataclass
class Curve:
    """A curve of the store: ``rows`` as far as this process has read them."""

    id: int
    rows: list[Row]

    @property
    def ended(self) -> bool:
        """Whether the curve ends with a failure: there is no further row."""
        return bool(self.rows) and self.rows[-1].failure is not None


class CurveStore:
    """The file at ``path``, made if it is missing, shared by any number of processes of one machine.

    ``max_bytes``: limit for all checkpoints together. ``origin``: JSON-able note of where new curves are measured
    (hardware, versions). Errors: UserError if the file is no curve store or cannot be opened.
    """

    def __init__(self, path: str | Path, max_bytes: int = 2**31, origin: Mapping[str, Any] | None = None):
        self.path, self.max_bytes = Path(path), max_bytes
        self._origin = _canonical(origin or {})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
            with self._transaction():
                self._make_tables()
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"cannot use {path} as a curve store: {error}; name another file") from None

    def _make_tables(self) -> None:
        """In an empty file. Errors: UserError for somebody else's database."""
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == VERSION:
            return
        if version != 0:
            raise UserError(f"{self.path} is a curve store of version {version}, not {VERSION}; name another file")
        if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise UserError(f"{self.path} is a database, but no curve store; name another file")
        for statement in SCHEMA.split(";"):
            self._db.execute(statement)
        self._db.execute(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> "CurveStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def curve(self, key: Mapping[str, Any]) -> Curve:
        """The curve with this content (JSON-able), with all its rows; an empty one if there is none yet."""
        text = _canonical(key)
        digest = hashlib.sha256(text.encode()).hexdigest()
        found = self._db.execute("SELECT id FROM curves WHERE digest = ?", (digest,)).fetchone()
        if found is None:
            insert = "INSERT INTO curves (digest, key, origin) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
            self._db.execute(insert, (digest, text, self._origin))
            found = self._db.execute("SELECT id FROM curves WHERE digest = ?", (digest,)).fetchone()
        curve = Curve(found[0], [])
        self.refresh(curve)
        return curve

    def refresh(self, curve: Curve) -> None:
        """Read the rows that other processes have added."""
        query = "SELECT row FROM rows WHERE curve = ? AND number > ? ORDER BY number"
        curve.rows += [Row.from_json(text) for (text,) in self._db.execute(query, (curve.id, len(curve.rows)))]

    def append(self, curve: Curve, row: Row) -> None:
        """Add the next row; if another process has measured it meanwhile, that one counts. After a failure there is
        none."""
        if curve.ended:
            return
        insert = "INSERT INTO rows VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        self._db.execute(insert, (curve.id, len(curve.rows) + 1, row.to_json()))
        self.refresh(curve)

    def complete(self, curve: Curve, rows: Sequence[Row]) -> int:
        """Add those of a curve's ``rows`` that are missing, all or none; returns how many were."""
        with self._transaction():
            self.refresh(curve)
            missing = [] if curve.ended else rows[len(curve.rows) :]
            for row in missing:
                self.append(curve, row)
        return len(missing)

    # ---- checkpoints

    def save_checkpoint(self, curve: Curve, rows: int, content: bytes) -> None:
        """Keep ``content``, written after ``rows`` reports, unless a further one is there or it exceeds the limit."""
        if len(content) > self.max_bytes:
            return
        with self._transaction():
            self._db.execute(
                "INSERT INTO checkpoints VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET rows = excluded.rows, "
                "used = excluded.used, bytes = excluded.bytes, content = excluded.content "
                "WHERE excluded.rows > checkpoints.rows",
                (curve.id, rows, self._now(), len(content), content),
            )
            self._trim()

    def checkpoint(self, curve: Curve) -> bytes | None:
        """The curve's checkpoint, None if there is none (any more)."""
        found = self._db.execute("SELECT content FROM checkpoints WHERE curve = ?", (curve.id,)).fetchone()
        if found is None:
            return None
        self._db.execute("UPDATE checkpoints SET used = ? WHERE curve = ?", (self._now(), curve.id))
        return bytes(found[0])

    def _now(self) -> int:
        """A number greater than every ``used`` so far."""
        return self._db.execute("SELECT coalesce(max(used), 0) + 1 FROM checkpoints").fetchone()[0]

    def _trim(self) -> None:
        total = self._db.execute("SELECT coalesce(sum(bytes), 0) FROM checkpoints").fetchone()[0]
        for curve, size in self._db.execute("SELECT curve, bytes FROM checkpoints ORDER BY used").fetchall():
            if total <= self.max_bytes:
                return
            self._db.execute("DELETE FROM checkpoints WHERE curve = ?", (curve,))
            total -= size

    # ---- the whole

    def counts(self) -> dict[str, int]:
        """Number of curves, rows, checkpoints and bytes in checkpoints."""
        tables = ("SELECT count(*) FROM curves", "SELECT count(*) FROM rows", "SELECT count(*) FROM checkpoints",
                  "SELECT coalesce(sum(bytes), 0) FROM checkpoints")  # fmt: skip
        numbers = [self._db.execute(query).fetchone()[0] for query in tables]
        return dict(zip(("curves", "rows", "checkpoints", "checkpoint_bytes"), numbers, strict=True))

    def export(self) -> Iterator[tuple[dict[str, Any], dict[str, Any], list[Row]]]:
        """(key, origin, rows) of every curve that has rows, in the order they came in."""
        query = "SELECT id, key, origin FROM curves WHERE id IN (SELECT curve FROM rows) ORDER BY id"
        for identity, key, origin in self._db.execute(query).fetchall():
            curve = Curve(identity, [])
            self.refresh(curve)
            yield json.loads(key), json.loads(origin), curve.rows

    def put(self, key: Mapping[str, Any], origin: Mapping[str, Any], rows: Sequence[Row]) -> int:
        """Add a whole curve measured elsewhere and return how many rows were new; rows that are there already stay."""
        mine, self._origin = self._origin, _canonical(origin)
        try:
            return self.complete(self.curve(key), rows)
        finally:
            self._origin = mine

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._db)


class _Transaction:
    """All or nothing; waits for its turn to write."""

    def __init__(self, db: sqlite3.Connection):
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None:
                self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:  # SQLite has rolled back by itself if, for one, the disk is full
                self._db.execute("ROLLBACK")


def _canonical(value: Mapping[str, Any]) -> str:
    """JSON whose text depends on the content only."""
    return json.dumps(json.loads(to_json(dict(value))), sort_keys=True, separators=(",", ":"))
