"""The SQLite file under the chat store: opened, upgraded, changed in transactions, mended when it is damaged.

Every error of SQLite and of the file system leaves as a StoreError that says which of them it is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from tinychat.base.errors import TinychatError
from tinychat.chats import salvage
from tinychat.chats.records import CHAT, MESSAGE

PATIENCE = 10.0  # seconds until another program's lock is an error
CHECKED_WHOLE = (
    1 << 22
)  # bytes up to which a file is checked when it is opened; a large one shows as it is read
LARGEST_ID = 1 << 53
T = TypeVar("T")

# What makes version n of version n - 1: add a tuple of statements, never change one.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE IF NOT EXISTS chats (
        id INTEGER PRIMARY KEY AUTOINCREMENT, title TEXT NOT NULL, model TEXT NOT NULL, system TEXT,
        params TEXT NOT NULL, leaf INTEGER, created REAL NOT NULL, updated REAL NOT NULL, deleted REAL)""",
        "CREATE INDEX IF NOT EXISTS chats_by_time ON chats (updated)",
        """CREATE TABLE IF NOT EXISTS messages (
        id INTEGER PRIMARY KEY AUTOINCREMENT, chat INTEGER NOT NULL REFERENCES chats (id) ON DELETE CASCADE,
        parent INTEGER, role TEXT NOT NULL, content TEXT NOT NULL, model TEXT,
        prompt_text TEXT NOT NULL DEFAULT '', prompt_ids BLOB, ids BLOB, finish_reason TEXT, stats TEXT,
        created REAL NOT NULL)""",
        "CREATE INDEX IF NOT EXISTS messages_by_chat ON messages (chat)",
    ),
    # Chats that version 1 removed are still to be read in the file: the next purge wipes it.
    (
        "INSERT OR IGNORE INTO chats (id, title, model, params, created, updated, deleted) "
        "SELECT 0, '', '', '{}', 0, 0, 0 WHERE EXISTS (SELECT 1 FROM sqlite_sequence)",
    ),
    # Files that messages brought along, as JSON; they were part of what was said before.
    ("ALTER TABLE messages ADD COLUMN attachments TEXT",),
    # Calls of tools in an answer (as JSON), all that was written with them, and whose result a message is.
    (
        "ALTER TABLE messages ADD COLUMN tool_calls TEXT",
        "ALTER TABLE messages ADD COLUMN tool_call_id TEXT",
        "ALTER TABLE messages ADD COLUMN written TEXT",
    ),
)
VERSION = len(MIGRATIONS)
WORDS = (
    "CREATE VIRTUAL TABLE IF NOT EXISTS words "
    "USING fts5(content, tokenize='unicode61 remove_diacritics 2', prefix='1 2')"
)


class StoreError(TinychatError):
    """The chats cannot be read or written now. `cause`: full, locked, read-only, damaged, failing, closed."""

    def __init__(self, cause: str, path: Path, detail: object = ""):
        self.cause = cause
        super().__init__(
            *{
                "full": (f"The disk with {path} is full.", "Free some space on it."),
                "locked": (f"{path} is locked by another program.", "Close that program, or wait for it."),
                "read-only": (
                    f"{path} cannot be written: it, its folder or its disk is read-only.",
                    "Make it writable, or set TINYCHAT_HOME to a folder of yours.",
                ),
                "damaged": (f"{path} is damaged: {detail}.", "Move it away to start afresh."),
                "failing": (
                    f"The disk with {path} does not work: {detail}.",
                    "Check the disk and the space on it, or set TINYCHAT_HOME to a folder on another one.",
                ),
                "closed": (f"{path} is closed.", "Open it again."),
            }[cause]
        )


# Words of SQLite's own messages (its codes come with Python 3.11); whatever else it says is the file's fault.
_CAUSES = (
    ("locked", ("is locked", "locking protocol")),
    ("full", ("disk is full",)),
    ("read-only", ("readonly", "access permission")),
    ("failing", ("i/o error", "unable to open", "out of memory", "too big", "interrupted", "large file")),
    ("closed", ("closed database",)),
)
_ERRNOS = {errno.ENOSPC: "full", errno.EDQUOT: "full", errno.EFBIG: "full"} | dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM), "read-only"
)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Errors of SQLite and of the file system become StoreErrors about `path`."""
    try:
        yield
    except sqlite3.Error as e:
        said = str(e).lower()
        cause = next((c for c, parts in _CAUSES if any(p in said for p in parts)), "damaged")
        if cause == "damaged" and isinstance(e, sqlite3.ProgrammingError):
            raise  # a mistake of ours
        if cause == "failing" and "unable to open" in said and not os.access(path.parent, os.W_OK):
            cause = "read-only"
        if cause == "failing" and not _has_room(path):
            cause = "full"
        raise StoreError(cause, path, e) from e
    except (
        UnicodeDecodeError,
        OverflowError,
    ) as e:  # of names that are quoted, of numbers that are no counts
        raise StoreError("damaged", path, type(e).__name__) from e
    except OSError as e:
        raise StoreError(_ERRNOS.get(e.errno or 0, "failing"), path, e.strerror or e) from e


class Database:
    """One SQLite file, used from any thread; `path` None keeps it in memory.

    `generation` counts the files that this was: a new one when it was damaged (`notice` says so), or deleted
    or replaced by another program. Who has rows of an earlier one writes them again. Raises StoreError, and
    TinychatError for a file of a newer tinychat.
    """

    def __init__(self, path: Path | None, full_text: bool = True):
        self.path = path or Path(":memory:")
        self.in_memory = path is None
        self.full_text = self._wants_full_text = full_text
        self.notice = ""
        self.generation = 0
        self.patience = PATIENCE
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._doubted = -1  # the generation that was checked because its disk seemed to be full
        self._unchecked: sqlite3.Connection | None = None  # while it is being opened
        self._file: tuple[int, int] | None = None
        self._run(lambda: None, self.patience)

    def read(self, sql: str, *args: object) -> list[tuple]:
        """All rows of a query."""
        return self._run(lambda: self._connection.execute(sql, args).fetchall(), self.patience)

    def change(self, work: Callable[[sqlite3.Connection], T], patience: float | None = None) -> T:
        """Do `work` in a transaction, wholly or not at all. It is done again if the file had to be mended.

        patience: seconds to wait for another program's lock.
        """

        def transaction() -> T:
            db = self._connection
            db.execute("BEGIN IMMEDIATE")
            try:
                out = work(db)
                db.execute("COMMIT")
                return out
            except BaseException:
                with suppress(sqlite3.Error):  # a full disk may have ended the transaction already
                    db.execute("ROLLBACK")
                raise

        return self._run(transaction, self.patience if patience is None else patience)

    def wipe(self) -> None:
        """Leave nothing in the file of what was removed: neither in free pages, nor in the index of words,
        nor in the log.
        """

        def work() -> None:
            db = self._connection
            if self.full_text:
                db.execute("INSERT INTO words (words) VALUES ('optimize')")
            db.execute("VACUUM")
            (busy, *_) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy and not self.in_memory:
                raise StoreError("locked", self.path)

        self._run(work, self.patience)

    def close(self) -> None:
        """Idempotent."""
        with self._lock, suppress(sqlite3.Error):
            if self._db is not None:
                self._db.close()
                self._file = None

    def _run(self, work: Callable[[], T], patience: float) -> T:
        with self._lock:
            try:
                with translated(self.path):
                    self._be_open(patience)
                    return work()
            except StoreError as e:
                if self.in_memory or not (e.cause == "damaged" or self._is_wrong(e)):
                    raise
            with translated(self.path):
                self._mend()
                self._open(patience)
                return work()

    def _is_wrong(self, e: StoreError) -> bool:
        """Whether it is the file's own fault that it cannot be written: it has a wrong idea of its size, or a
        format that is only read, on a disk that has room and is writable. Looked at once: it may be large.
        """
        if e.cause not in ("full", "read-only") or self._doubted == self.generation:
            return False
        self._doubted = self.generation
        with suppress(OSError, sqlite3.Error):
            disk = os.statvfs(self.path.parent)
            if e.cause == "full":
                room = disk.f_bavail * disk.f_frsize > 4 * self.path.stat().st_size + (1 << 26)
                return room and self._connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",)
            if os.access(self.path, os.W_OK) and not disk.f_flag & os.ST_RDONLY:
                self._forget()  # closing a file takes the locks of all who have it open in this process
                with self.path.open("rb") as f:
                    return max(f.read(20)[18:], default=0) > 2
        return False

    # The file

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._db is None:  # what failed to open was never used
            raise StoreError("closed", self.path)
        return self._db

    def _be_open(self, patience: float) -> None:
        if self._db is None or (self._file is not None and self._file != _identity(self.path)):
            self._open(patience)
        else:
            self._connection.execute(f"PRAGMA busy_timeout = {int(patience * 1000)}")

    def _open(self, patience: float) -> None:
        self._forget()
        if not self.in_memory:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))  # nobody else's business
        db = self._unchecked = connect(self.path if not self.in_memory else ":memory:", patience)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if VERSION < version < 100:  # a larger one is damage
            raise TinychatError(
                f"{self.path} was written by a newer tinychat.", "Update tinychat, or move the file away."
            )
        if not 0 <= version <= VERSION:
            raise StoreError("damaged", self.path, f"version {version}")
        if version < VERSION:
            migrate(db, version)
        self.full_text = self._wants_full_text and index_words(db)
        self._check(db)
        self._db = db
        self._file = None if self.in_memory else _identity(self.path)
        self.generation += 1

    def _forget(self) -> None:
        for db in (self._db, self._unchecked):
            if db is not None:
                with suppress(sqlite3.Error):
                    db.close()
        self._db = self._unchecked = None

    def _check(self, db: sqlite3.Connection) -> None:
        """Find damage here, not in the middle of a chat. A large file is not read for it."""
        for table, columns in (("chats", CHAT), ("messages", MESSAGE)):
            if not self._columns(db, table).issuperset(columns.split(", ")):
                raise StoreError("damaged", self.path, f"columns of {table}")
            for (number,) in db.execute(f"SELECT max(id) FROM {table} UNION SELECT min(id) FROM {table}"):
                if number is not None and not 0 <= number < LARGEST_ID:
                    raise StoreError("damaged", self.path, f"numbers of {table}")
        for (number,) in db.execute("SELECT seq FROM sqlite_sequence WHERE name IN ('chats', 'messages')"):
            if type(number) is not int or not 0 <= number < LARGEST_ID:
                raise StoreError("damaged", self.path, "numbers")
        if self.full_text:
            for table in ("words_data", "words_content", "words_docsize"):  # else nothing new would be found
                self._columns(db, table)
            db.execute("""SELECT rowid FROM words WHERE words MATCH '"a"' LIMIT 1""").fetchone()
        if not self.in_memory and self.path.stat().st_size < CHECKED_WHOLE:
            (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise StoreError("damaged", self.path, found)

    def _columns(self, db: sqlite3.Connection, table: str) -> set[str]:
        """The names of a table's columns. Raises StoreError where `id` does not number its rows."""
        columns = db.execute(f"PRAGMA table_info({table})").fetchall()
        if ("id", "INTEGER", 1) not in [(c[1], c[2], c[5]) for c in columns]:
            raise StoreError("damaged", self.path, f"columns of {table}")
        return {c[1] for c in columns}

    def _mend(self) -> None:
        """Save what the damaged file still holds into a new one, and set the damaged one aside."""
        before = _identity(self.path)
        self._forget()
        guard = os.open(self.path.with_name(f"{self.path.name}.mending"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)
            if _identity(self.path) != before:
                return  # another program has mended it meanwhile
            fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            try:
                os.close(os.open(fresh, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600))
                db = connect(fresh, PATIENCE)
                migrate(db, 0)
                chats, messages = salvage.save(self.path, db, self._wants_full_text and index_words(db))
                db.close()
                aside = self._free_name()
                log = self.path.with_name(f"{self.path.name}-wal")
                if log.exists() and log.stat().st_size:
                    os.rename(log, f"{aside}-wal")
                os.rename(self.path, aside)
                for end in ("-wal", "-shm"):
                    with suppress(FileNotFoundError):
                        os.unlink(f"{self.path}{end}")
                os.rename(fresh, self.path)
            finally:
                for end in ("", "-journal"):
                    with suppress(FileNotFoundError):
                        os.unlink(f"{fresh}{end}")
        finally:
            with suppress(OSError):
                os.unlink(f"{self.path}.mending")
            os.close(guard)
        saved = (
            f"{chats} chats with {messages} messages were saved from it" if chats else "a new one was begun"
        )
        self.notice = f"The stored chats were damaged and set aside as {aside}; {saved}."

    def _free_name(self) -> Path:
        name = f"{self.path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
        names = [name, *(f"{name}-{n}" for n in range(2, 1000))]
        return next(p for n in names if not (p := self.path.with_name(n)).exists())


def connect(path: Path | str, patience: float) -> sqlite3.Connection:
    """A connection as every part uses it: nothing begins a transaction by itself, what is removed is
    overwritten, text that is not UTF-8 is read all the same.
    """
    db = sqlite3.connect(path, timeout=patience, check_same_thread=False, isolation_level=None)
    db.text_factory = lambda data: data.decode("utf-8", "replace")
    db.execute("PRAGMA secure_delete = ON")
    if path == ":memory:":
        db.execute("PRAGMA temp_store = MEMORY")  # what spills over must not reach a disk either
    return db


def migrate(db: sqlite3.Connection, version: int) -> None:
    """Bring a file of an earlier version (0: an empty one) to this one, wholly or not at all."""
    db.execute("BEGIN IMMEDIATE")
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()  # another program may have been faster
        for statements in MIGRATIONS[version:]:
            for statement in statements:
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


def index_words(db: sqlite3.Connection) -> bool:
    """Have an index of words; False where SQLite was built without FTS5 (search reads the messages then)."""
    try:
        if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'words'").fetchone():
            db.execute("SELECT 1 FROM words LIMIT 0")
            return True
        db.execute("BEGIN IMMEDIATE")
        db.execute(WORDS)
        db.execute("INSERT INTO words (rowid, content) SELECT id, content FROM messages")
        db.execute("COMMIT")
    except sqlite3.OperationalError as e:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        if "no such module" not in str(e):
            raise
        return False
    return True


def _has_room(path: Path) -> bool:
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return True  # that is not what is wrong
    return disk.f_bavail * disk.f_frsize >= 1 << 16


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_dev, about.st_ino
