"""A gallery on the disk: enrolled prints with their templates. It knows nothing of networks.

A folder holds `gallery.sqlite` (names, fingers, digests, pictures) and `templates_G.rows` (`gallery.rows`), which is
mapped into memory. SQLite decides what there is: rows are appended to the array and brought to the disk before the
transaction that names them commits, and until `compact` no row is used again. So a kill at any moment loses at most
what had not been committed, and leaves rows that nothing names. `compact` writes the rows that are left to a new array,
and one transaction switches.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from ifvit.errors import UserError
from ifvit.files import to_disk
from ifvit.gallery.rows import as_rows, likeness, row_type

FORMAT = 2  # 1 knew no subjects
NAME = "gallery.sqlite"
PATIENCE = 20.0  # seconds that a process waits for another one that writes
BLOCK = 1 << 16  # rows that are copied at once
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE prints (
    row INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, digest TEXT NOT NULL,
    database TEXT NOT NULL, finger TEXT NOT NULL, subject TEXT NOT NULL DEFAULT '');
CREATE INDEX of_finger ON prints (database, finger);
CREATE INDEX of_digest ON prints (digest);
CREATE TABLE pictures (row INTEGER PRIMARY KEY, png BLOB NOT NULL);
"""


@dataclass(frozen=True)
class Entry:
    """A print that is enrolled, or to be: `picture` is a PNG that shows it as the networks take it."""

    name: str
    digest: str  # of its file
    database: str
    finger: str
    picture: bytes = b""
    subject: str = ""  # whose finger it is; '' where that is not known

    @property
    def person(self) -> tuple[str, str]:
        """Database and subject; where that is not known a person has one finger."""
        return self.database, self.subject or self.finger


class Gallery:
    """An open gallery. All that it does to the folder is done by one transaction each."""

    def __init__(self, folder: Path, connection: sqlite3.Connection):
        self.folder, self._db = folder, connection
        if int(self._meta("format")) == 1:
            self._add_subjects()
        if int(self._meta("format")) != FORMAT:
            raise UserError(f"{folder} was made by another version of this package; enrol the prints anew.")
        self.checkpoint, self.width = self._meta("checkpoint"), int(self._meta("width"))
        self._type = row_type(self.width)

    @classmethod
    def create(cls, folder: Path, checkpoint: str, width: int) -> "Gallery":
        """A new one, or the one that is there, for templates of `width` numbers made by a checkpoint (its digest)."""
        if folder.exists() and not folder.is_dir() or folder.is_dir() and any(folder.iterdir()) and not _there(folder):
            raise UserError(f"{folder} is no gallery, and not empty; give another --gallery.")
        folder.mkdir(parents=True, exist_ok=True)
        db = _connect(folder / NAME)
        with _writing(db, folder):
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                for statement in filter(str.strip, SCHEMA.split(";")):
                    db.execute(statement)
                told = {"format": FORMAT, "checkpoint": checkpoint, "width": width, "generation": 0, "next": 0}
                db.executemany("INSERT INTO meta VALUES (?, ?)", [(k, str(v)) for k, v in told.items()])
                (folder / _array(0)).touch()
                to_disk(folder)
        return cls(folder, db)._bound_to(checkpoint)

    @classmethod
    def open(cls, folder: Path, checkpoint: str | None = None) -> "Gallery":
        """One that is there; `checkpoint`: the digest of the one that must have made it. UserError for another."""
        if not _there(folder):
            raise UserError(f"There is no gallery at {folder}; make one with python -m ifvit.enroll DIR --gallery G.")
        with _readable(folder):
            found = cls(folder, _connect(folder / NAME))
        return found._bound_to(checkpoint) if checkpoint else found

    def _bound_to(self, checkpoint: str) -> "Gallery":
        if self.checkpoint != checkpoint:
            raise UserError(
                f"{self.folder} was made with another checkpoint, and their templates cannot be compared; give that "
                "one's --checkpoint, or enrol the prints in another folder."
            )
        return self

    def _ask(self, what: str, *values) -> list[tuple]:
        """Rows of a query. UserError where the file is damaged."""
        with _readable(self.folder):
            return self._db.execute(what, values).fetchall()

    def _meta(self, key: str) -> str:
        ((value,),) = self._ask("SELECT value FROM meta WHERE key = ?", key)
        return value

    def __len__(self) -> int:
        return self._ask("SELECT count(*) FROM prints")[0][0]

    @property
    def fingers(self) -> int:
        return self._ask("SELECT count(*) FROM (SELECT 1 FROM prints GROUP BY database, finger)")[0][0]

    def entries(self) -> list[Entry]:
        """All of them by name, without their pictures."""
        ask = "SELECT name, digest, database, finger, x'', subject FROM prints ORDER BY name"
        return [Entry(*told) for told in self._ask(ask)]

    def fingers_of_persons(self) -> dict[tuple[str, str], int]:
        """How many fingers of each person (`Entry.person`) are enrolled."""
        person = "CASE subject WHEN '' THEN finger ELSE subject END"
        ask = f"SELECT database, {person}, count(DISTINCT finger) FROM prints GROUP BY 1, 2"
        return {(database, subject): count for database, subject, count in self._ask(ask)}

    def known(self, names: Sequence[str]) -> dict[str, str]:
        """Name -> digest of those that are enrolled."""
        return dict(row for n in names for row in self._ask("SELECT name, digest FROM prints WHERE name = ?", n))

    def has(self, digest: str) -> bool:
        """Whether a file with this content is enrolled, whatever its name."""
        return bool(self._ask("SELECT 1 FROM prints WHERE digest = ?", digest))

    def add(self, entries: Sequence[Entry], templates: Float32[np.ndarray, "N E"], replace: bool = False) -> None:
        """Enrols prints, all or none. UserError for a name that is taken, unless it is to be replaced."""
        with _writing(self._db, self.folder):
            if replace:
                self._delete([e.name for e in entries])
            elif taken := self.known([e.name for e in entries]):
                raise UserError(f"{next(iter(taken))} is enrolled already; give --replace, or another name.")
            first = int(self._meta("next"))
            self._append(first, templates)
            for row, e in enumerate(entries, first):
                about = (row, e.name, e.digest, e.database, e.finger, e.subject)
                self._db.execute("INSERT INTO prints VALUES (?, ?, ?, ?, ?, ?)", about)
                self._db.execute("INSERT INTO pictures VALUES (?, ?)", (row, e.picture))
            self._set("next", first + len(entries))

    def remove(self, names: Sequence[str]) -> None:
        """Takes prints out, all or none. UserError for a name that is not enrolled."""
        with _writing(self._db, self.folder):
            there = self.known(names)
            if missing := [name for name in names if name not in there]:
                raise UserError(
                    f"{missing[0]} is not enrolled in {self.folder}; python -m ifvit.gallery list names all."
                )
            self._delete(names)

    def compact(self) -> int:
        """Writes the array anew without rows that nothing names; returns how many there were."""
        with _writing(self._db, self.folder):
            rows = self._rows()
            before = int(self._meta("next"))
            new = self.folder / _array(int(self._meta("generation")) + 1)
            templates = self._mapped()
            with new.open("wb") as file:
                for at in range(0, len(rows), BLOCK):
                    file.write(templates[rows[at : at + BLOCK]].tobytes())
                _to_disk(file)
            to_disk(self.folder)  # the new name too
            for n, row in enumerate(rows):  # ascending, so that no number is taken twice
                self._db.execute("UPDATE prints SET row = ? WHERE row = ?", (n, row))
                self._db.execute("UPDATE pictures SET row = ? WHERE row = ?", (n, row))
            self._set("next", len(rows))
            self._set("generation", int(self._meta("generation")) + 1)
        with _writing(self._db, self.folder):  # nobody else is writing an array
            for file in self.folder.glob(_array("*")):  # the old one, and what a kill has left
                if file != self._file():
                    file.unlink(missing_ok=True)
        return before - len(rows)

    def likest(self, probes: Float32[np.ndarray, "R E"], count: int) -> list[Entry]:
        """The `count` enrolled prints likest to a probe in any of its R turns, the best first, with pictures."""
        with self._reading():
            templates = self._mapped()
            away = -likeness(templates, probes)
            wanted = count
            while True:
                every = wanted >= len(away)
                some = np.arange(len(away)) if every else np.argpartition(away, wanted)[:wanted]
                found = [e for row in some[np.argsort(away[some], kind="stable")] for e in self._at(int(row))]
                if len(found) >= count or every:
                    return found[:count]
                wanted *= 2  # some of these rows were of prints that are removed

    def all(self) -> list[Entry]:
        """All enrolled prints, with pictures."""
        with self._reading():
            return [e for row in self._rows() for e in self._at(row)]

    def _rows(self) -> list[int]:
        """Those of all enrolled prints, ascending."""
        return [row for (row,) in self._ask("SELECT row FROM prints ORDER BY row")]

    def _at(self, row: int) -> list[Entry]:
        """The print of a row, or none: rows of prints that were removed stay in the array."""
        columns = "name, digest, database, finger, png, subject"
        ask = f"SELECT {columns} FROM prints JOIN pictures USING (row) WHERE prints.row = ?"
        return [Entry(*told) for told in self._ask(ask, row)]

    def _add_subjects(self) -> None:
        """Makes a gallery of format 1 one of this format: of its prints the subjects are not known."""
        with _writing(self._db, self.folder):
            if int(self._meta("format")) == 1:  # another process may have done it meanwhile
                self._db.execute("ALTER TABLE prints ADD COLUMN subject TEXT NOT NULL DEFAULT ''")
                self._set("format", 2)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """A transaction that sees the gallery as it is now, whatever others write meanwhile."""
        self._ask("BEGIN")
        try:
            yield
        finally:
            self._ask("COMMIT")

    def _delete(self, names: Sequence[str]) -> None:
        for name in names:
            self._db.execute("DELETE FROM pictures WHERE row IN (SELECT row FROM prints WHERE name = ?)", (name,))
            self._db.execute("DELETE FROM prints WHERE name = ?", (name,))

    def _set(self, key: str, value: int) -> None:
        self._db.execute("UPDATE meta SET value = ? WHERE key = ?", (str(value), key))

    def _file(self) -> Path:
        return self.folder / _array(int(self._meta("generation")))

    def _append(self, first: int, templates: np.ndarray) -> None:
        """Rows from `first` on; what a kill has left there is written over."""
        with self._file().open("r+b") as file:
            if file.seek(0, os.SEEK_END) < first * self._type.itemsize:
                raise self._truncated()
            file.seek(first * self._type.itemsize)
            file.write(as_rows(templates).tobytes())
            file.truncate()
            _to_disk(file)

    def _mapped(self) -> np.ndarray:
        """The templates of all rows that were ever named, those that are removed too."""
        count = int(self._meta("next"))
        if not count:
            return np.zeros(0, self._type)
        try:
            return np.memmap(self._file(), self._type, "r", shape=(count,))
        except (OSError, ValueError) as e:
            raise self._truncated() from e

    def _truncated(self) -> UserError:
        return UserError(f"{self._file()} is missing or cut; enrol the prints anew, in another folder.")


def _array(generation: int | str) -> str:
    return f"templates_{generation}.rows"


def _there(folder: Path) -> bool:
    return (folder / NAME).is_file()


def _connect(path: Path) -> sqlite3.Connection:
    """Transactions are begun by hand; a commit returns when it is on the disk."""
    db = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
    db.execute("PRAGMA synchronous = FULL")
    return db


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """UserError where SQLite cannot read what lies in the folder."""
    try:
        yield
    except (sqlite3.Error, ValueError) as e:  # ValueError: a row is not there, or no number in it
        if getattr(e, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
            raise UserError(f"{folder} cannot be read, another process holds it; try again.") from e
        raise UserError(f"{folder / NAME} is damaged ({e}); enrol the prints anew, in another folder.") from e


@contextlib.contextmanager
def _writing(db: sqlite3.Connection, folder: Path) -> Iterator[None]:
    """A transaction that no other process writes beside. UserError where the disk or another process is in the way."""
    try:
        db.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as e:
        raise UserError(f"{folder} cannot be written ({e}); another process may hold it: try again.") from e
    try:
        yield
        db.execute("COMMIT")
    except BaseException as e:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        if isinstance(e, sqlite3.Error | OSError):
            raise UserError(f"{folder} cannot be written ({e}); make room, then try again.") from e
        raise


def _to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())
