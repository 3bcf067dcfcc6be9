"""SQLite databases of MLflow: created by one process, checked before use, and independent of their folder's path.

MLflow creates its tables in some sixty steps on the first connection, without a lock: two processes that do so at once
leave the database broken. Here the tables are made in a file of another name, which then gets the database's name, so
that no process ever sees half of them.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shlex
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from glob import escape
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from pipeline.errors import UserError
from pipeline.files import PARTIAL_SUFFIX, rename_durably, sync, write_advice

log = logging.getLogger(__name__)

ARTIFACTS = "mlartifacts"
"""Folder of the artifacts, beside the database."""
WAIT_MESSAGE_AFTER_S, MAX_WAIT_S = 5.0, 120.0
SETTLED_AFTER_S = 5.0
"""Another program, such as `mlflow ui`, may be making the tables of a database that changes."""
MAX_SETTLING_S = 60.0
BUSY_TIMEOUT_S = 5.0
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_MAGIC = b"SQLite format 3\0"
_SEEDED_TABLES = {"alembic_version", "experiments", "experiment_tags", "workspaces"}
"""Tables that have rows in a database without runs."""
_SIDE_FILES = ("-journal", "-wal", "-shm")
_MIGRATION_PREFIX = "_alembic_tmp_"
_empty_database: bytes | None = None
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns with URIs of artifacts."""


def is_sqlite(uri: str) -> bool:
    return uri.startswith(("sqlite:", "sqlite+"))


def sqlite_uri(file: Path) -> str:
    """Return the URI of a database file: SQLAlchemy quotes what would be a part of the URI."""
    if not set("%?") & set(str(file)):
        return f"sqlite:///{file}"
    from sqlalchemy.engine import URL

    # With the driver, as MLflow creates the folder of what follows sqlite:///, which is quoted here.
    return URL.create("sqlite+pysqlite", database=str(file)).render_as_string()


def sqlite_file(uri: str) -> Path:
    """Return the file of a SQLite URI. Raises: UserError: The URI names none."""
    if uri.startswith("sqlite:////") and not set("%?") & set(uri):  # of `sqlite_uri`; SQLAlchemy takes long to import
        return Path(uri.removeprefix("sqlite:///")).resolve()

    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        database = make_url(uri).database
    except ArgumentError:
        database = None
    if not database or database == ":memory:" or database.startswith("file:"):
        raise UserError(
            f"the tracking database {uri} names no file: a database file looks like sqlite:////folder/mlflow.db"
        )
    return Path(database).resolve()


def artifact_location(uri: str) -> str:
    """Return the URI of the folder of the artifacts of a SQLite database."""
    return (sqlite_file(uri).parent / ARTIFACTS).as_uri()


def check_database(uri: str) -> None:
    """Check, without importing MLflow, that a SQLite database can be used or created.

    Raises:
        UserError: It cannot, with a remedy.
    """
    file = sqlite_file(uri)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(
            f"the tracking database {file} cannot be used: {error.strerror}: {error.filename}; "
            f"{write_advice(error, '--tracking.uri')}"
        ) from error
    _Contents.read(file).check(uri)


def prepare_database(uri: str) -> None:
    """Create the database, if it is missing or only half made, and let it name the artifacts beside it.

    Raises:
        UserError: It cannot be used, with a remedy.
    """
    file = sqlite_file(uri)
    if _Contents.read(file).check(uri):
        _relocate_artifacts(file)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with _creation_lock(file) as is_locked:
        contents = _Contents.read(file)
        if contents.check(uri):
            return
        if contents.exists:
            if not is_locked or not _is_settled(file):
                raise UserError(
                    f"the tracking database {file} is half made, and another program holds it: end that program, or "
                    "wait for it"
                )
            _set_aside(file)
        if is_locked:
            for partial in file.parent.glob(f"{escape(file.name)}.*{PARTIAL_SUFFIX}*"):  # left by a killed job
                partial.unlink(missing_ok=True)
        _create(file)


@dataclass(frozen=True)
class _Contents:
    """Content of a database file."""

    file: Path
    exists: bool = False
    """False if the file is missing or empty."""
    is_busy: bool = False
    """Whether another process is writing, so that nothing could be read."""
    tables: frozenset[str] = frozenset()
    has_data: bool = False
    """Whether a table has rows besides those of a new database."""
    revision: str | None = None
    """Version of MLflow's schema."""

    @classmethod
    def read(cls, file: Path) -> _Contents:
        """Raises: UserError: The file is no SQLite database, is damaged, or cannot be read or written."""
        try:
            with file.open("rb") as stream:
                header = stream.read(100)
                size = os.fstat(stream.fileno()).st_size
        except FileNotFoundError:
            return cls(file)
        except OSError as error:
            raise UserError(
                f"the tracking database {file} cannot be read: {error.strerror}; "
                f"{write_advice(error, '--tracking.uri')}"
            ) from error
        if not header:
            return cls(file)
        if not header.startswith(_MAGIC):
            raise UserError(f"the tracking database {file} is not a SQLite database: {_replacement(file)}")
        if (missing := _num_missing_bytes(header, size)) > 0:
            raise UserError(
                f"the tracking database {file} is damaged ({missing} bytes are missing at its end): "
                f"{_replacement(file)}"
            )
        try:
            with closing(sqlite3.connect(file, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as connection:
                return cls._query(file, connection)
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF in _BUSY:
                return cls(file, exists=True, is_busy=True)
            if error.sqlite_errorcode == sqlite3.SQLITE_READONLY_DBMOVED:  # another job set it aside at this moment
                return cls.read(file)
            raise _database_error(file, error) from error

    @classmethod
    def _query(cls, file: Path, connection: sqlite3.Connection) -> _Contents:
        def values(query: str) -> list[Any]:
            return [value for (value,) in connection.execute(query)]

        connection.execute("begin immediate")
        tables = frozenset(values("select name from sqlite_master where type = 'table' and name not like 'sqlite_%'"))
        revisions = values("select version_num from alembic_version") if "alembic_version" in tables else []
        has_data = any(values(f'select exists (select 1 from "{table}")') != [0] for table in tables - _SEEDED_TABLES)
        (version,) = values("pragma user_version")
        connection.execute(f"pragma user_version = {version}")  # fails where the file or its folder is read-only
        connection.execute("rollback")
        return cls(file, True, False, tables, has_data, revisions[0] if revisions else None)

    def check(self, uri: str) -> bool:
        """Return whether MLflow can use the database as it is; else it can be made anew, as it holds no data.

        Raises: UserError: Neither, with a remedy.
        """
        if not self.exists:
            return False
        revisions, head = _schema_revisions()
        if self.is_busy or self.revision == head:
            return True
        file, is_half_made = self.file, any(table.startswith(_MIGRATION_PREFIX) for table in self.tables)
        if self.tables and "experiments" not in self.tables and not is_half_made and self.revision is None:
            names = ", ".join(sorted(self.tables)[:3])
            raise UserError(
                f"the tracking database {file} is of another program (it has the tables {names}): give another file "
                "with --tracking.uri sqlite:////FOLDER/mlflow.db"
            )
        if self.revision is not None and self.revision not in revisions:
            raise UserError(
                f"the tracking database {file} has the schema {self.revision} of a newer MLflow: update this one "
                "(pip install --upgrade mlflow), or give another database with --tracking.uri"
            )
        if not self.has_data:
            return False
        if is_half_made or self.revision is None:
            raise UserError(
                f"the tracking database {file} is half made: the creation or upgrade of its tables was interrupted. "
                f"Restore a backup, or {_replacement(file)}"
            )
        backup = shlex.join(["cp", str(file), f"{file}.backup"])
        raise UserError(
            f"the tracking database {file} has the schema {self.revision} of an older MLflow: back it up and upgrade "
            f"it ({backup} && {shlex.join(['mlflow', 'db', 'upgrade', uri])}), then rerun the same command"
        )


def _num_missing_bytes(header: bytes, size: int) -> int:
    """Return how many bytes a file is shorter than its header says (https://www.sqlite.org/fileformat.html)."""
    page_size = int.from_bytes(header[16:18]) or 1
    page_size = 1 << 16 if page_size == 1 else page_size
    num_pages = int.from_bytes(header[28:32])
    is_valid = len(header) == 100 and header[24:28] == header[92:96]
    uses_wal = header[18:19] == b"\2"  # write-ahead log
    return page_size * num_pages - size if is_valid and not uses_wal else 100 - len(header)


@cache
def _schema_revisions() -> tuple[frozenset[str], str]:
    """Return all versions of MLflow's schema, and the newest: those of the installed MLflow, which is not imported."""
    spec = importlib.util.find_spec("mlflow")
    assert spec and spec.origin
    texts = [path.read_text() for path in (Path(spec.origin).parent / "store/db_migrations/versions").glob("*.py")]
    revisions, previous = (
        {match[1] for text in texts if (match := re.search(rf"^{name}\b[^=\n]*= *[\"'](\w+)", text, re.MULTILINE))}
        for name in ("revision", "down_revision")
    )
    (head,) = revisions - previous
    return frozenset(revisions), head


@contextmanager
def _database_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _database_error(file, error) from error


def _database_error(file: Path, error: sqlite3.Error) -> UserError:
    code = error.sqlite_errorcode & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        remedy = _replacement(file)
    elif code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        remedy = "let this user write the file and its folder, or give another database with --tracking.uri"
    elif code in _BUSY:
        remedy = "wait for the program that writes it, or end it, then rerun the same command"
    elif code == sqlite3.SQLITE_FULL:
        remedy = "free some disk space, or give another database with --tracking.uri"
    else:
        remedy = "check its file system, or give another database with --tracking.uri"
    return UserError(f"the tracking database {file} cannot be used: {error}; {remedy}")


def _replacement(file: Path) -> str:
    """Return the remedy for a database that cannot be read."""
    aside = shlex.join(["mv", str(file), f"{file}.damaged"])
    return (
        f"move it away ({aside}), then mmap-clip resend STORAGE fills a new one with the runs of a storage; or give "
        "another database with --tracking.uri"
    )


@cache
def _report_waiting(file: Path) -> None:
    """Log it once, not for each of the runs of a benchmark."""
    log.warning("waiting for another job, which creates the tracking database %s", file)


@contextmanager
def _creation_lock(file: Path) -> Iterator[bool]:
    """Let one process after the other create the database; yield False where locks are not possible or take too long:
    then two may, and the faster publishes."""
    lock = FileLock(file.with_name(f".{file.name}.lock"))
    try:
        try:
            lock.acquire(timeout=WAIT_MESSAGE_AFTER_S)
        except Timeout:
            _report_waiting(file)
            lock.acquire(timeout=MAX_WAIT_S)
    except Timeout:
        log.warning("another job holds %s for %d s; going on without it", lock.lock_file, MAX_WAIT_S)
    except (OSError, NotImplementedError) as error:
        log.info("%s cannot be locked: %s", lock.lock_file, error)  # some network file systems have no locks
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _is_settled(file: Path) -> bool:
    """Wait until the file has not changed for a while; return False if it goes on changing."""
    log.warning(
        "the tracking database %s is half made and holds no run; waiting whether another program makes it", file
    )
    deadline = time.monotonic() + MAX_SETTLING_S
    while True:
        previous = file.stat()
        time.sleep(SETTLED_AFTER_S)
        current = file.stat()
        if (previous.st_mtime_ns, previous.st_size) == (current.st_mtime_ns, current.st_size):
            return True
        if time.monotonic() > deadline:
            return False


def _set_aside(file: Path) -> None:
    aside = file.with_name(f"{file.name}.{time.strftime('%Y%m%d-%H%M%S')}.broken")
    for suffix in _SIDE_FILES:
        if (part := file.with_name(file.name + suffix)).exists():
            rename_durably(part, aside.with_name(aside.name + suffix))
    rename_durably(file, aside)
    log.warning("the tracking database %s was half made and held no run: moved to %s, creating a new one", file, aside)


def _create(file: Path) -> None:
    """Create a database with MLflow's tables, unless another process is faster."""
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        _make_tables(partial)
        sync(partial)
        if file.exists() and not file.stat().st_size:
            file.unlink()
        try:
            os.link(partial, file)
        except FileExistsError:
            log.info("another process created %s", file)
        except OSError:  # a file system without hard links
            rename_durably(partial, file)
    finally:
        for suffix in ("", *_SIDE_FILES):
            partial.with_name(partial.name + suffix).unlink(missing_ok=True)


def _make_tables(file: Path) -> None:
    """Write a database without runs. MLflow takes a second for it: the later ones of a process are copies of its first,
    which has no path in it."""
    global _empty_database
    if _empty_database is not None:
        file.write_bytes(_empty_database)
        return
    from mlflow.store.db import utils

    mlflow_db = cast(Any, utils)  # untyped
    engine = mlflow_db.create_sqlalchemy_engine(sqlite_uri(file))
    try:
        mlflow_db._initialize_tables(engine)
    finally:
        engine.dispose()
    _empty_database = file.read_bytes()


def find_experiment(uri: str, name: str, run_id: str, tag: str, value: str) -> str:
    """Return the id of the experiment with this name if it has this run with this tag, else "". MLflow is not imported,
    unless the database is made.

    Raises:
        UserError: The database cannot be used, with a remedy.
    """
    prepare_database(uri)
    query = (
        "select experiment_id from experiments join runs using (experiment_id) join tags using (run_uuid) "
        "where experiments.name = ? and experiments.lifecycle_stage = 'active' and runs.lifecycle_stage = 'active' "
        "and run_uuid = ? and tags.key = ? and tags.value = ?"
    )
    file = sqlite_file(uri)
    with _database_errors(file), closing(sqlite3.connect(file, timeout=20)) as connection:
        (row,) = connection.execute(query, (name, run_id, tag, value)).fetchall() or [("",)]
    return str(row[0])


def _relocate_artifacts(file: Path) -> None:
    """Replace the URIs of artifacts in a database that was moved or copied together with them: MLflow stores absolute
    paths."""
    artifacts = file.parent / ARTIFACTS
    with _database_errors(file), closing(sqlite3.connect(file, timeout=20, isolation_level=None)) as connection:
        used = connection.execute("select distinct artifact_location from experiments").fetchall()
        for (previous,) in used:
            if not _is_moved(previous, artifacts):
                continue
            connection.execute("begin immediate")
            for table, column in _LOCATIONS:
                connection.execute(
                    f"update {table} set {column} = ?1 || substr({column}, length(?2) + 1) "
                    f"where {column} = ?2 or substr({column}, 1, length(?2) + 1) = ?2 || '/'",
                    (artifacts.as_uri(), previous),
                )
            connection.execute("commit")
            log.info("%s was moved: its artifacts are now in %s", file, artifacts)


def _is_moved(location: str | None, artifacts: Path) -> bool:
    """Return whether the location of an experiment is an earlier path of the artifacts beside the database."""
    url = urlsplit(location or "")
    previous = Path(unquote(url.path))
    if url.scheme != "file" or previous.name != ARTIFACTS or location == artifacts.as_uri():
        return False
    if not previous.exists():
        return True
    return artifacts.exists() and not previous.samefile(artifacts)
