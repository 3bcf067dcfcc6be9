"""SQLite databases of MLflow: first use by several jobs, files that cannot be used, and moved ones. The tables are made
up, except where a test says so."""

import os
import sqlite3
import tempfile
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import filelock
import pytest

from pipeline.errors import UserError
from pipeline.runtime.tracking import database
from pipeline.runtime.tracking.database import check_database, prepare_database, sqlite_file, sqlite_uri

REVISIONS, HEAD = database._schema_revisions()
OLDER = min(REVISIONS - {HEAD})


def make_database(file: Path, revision: str | None = HEAD, runs: int = 0, *tables: str) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("create table experiments (experiment_id, artifact_location)")
        connection.execute("create table runs (run_uuid, artifact_uri)")
        connection.execute("create table logged_models (artifact_location)")
        connection.execute("create table model_versions (source, storage_location)")
        for table in tables:
            connection.execute(f"create table {table} (x)")
        if revision:
            connection.execute("create table alembic_version (version_num)")
            connection.execute("insert into alembic_version values (?)", (revision,))
        for number in range(runs):
            connection.execute("insert into runs values (?, 'file:///x')", (number,))


def run_ids(file: Path) -> list[int]:
    with closing(sqlite3.connect(file)) as connection:
        return [number for (number,) in connection.execute("select run_uuid from runs")]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A database file that does not exist; its tables are made slowly, which `creations` counts."""
    monkeypatch.setattr(database, "SETTLED_AFTER_S", 0.01)
    return tmp_path / "storage" / "mlflow.db"


@pytest.fixture
def creations(file, monkeypatch):
    creations: list[Path] = []

    def make_tables(partial: Path) -> None:
        assert partial != file
        creations.append(partial)
        time.sleep(0.05)
        make_database(partial)

    monkeypatch.setattr(database, "_make_tables", make_tables)
    return creations


def prepare_at_once(file: Path, count: int = 4) -> list[Exception]:
    errors, barrier = [], threading.Barrier(count)

    def prepare() -> None:
        barrier.wait()
        try:
            prepare_database(sqlite_uri(file))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=prepare) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("state", ["missing", "empty", "half made"])
def test_one_of_several_jobs_makes_the_tables(file, creations, state):
    file.parent.mkdir()
    if state == "empty":
        file.touch()
    elif state == "half made":
        make_database(file, OLDER, 0, "_alembic_tmp_experiments")
    assert prepare_at_once(file) == [] and len(creations) == 1
    check_database(sqlite_uri(file))
    aside = {path.name for path in file.parent.iterdir()} - {"mlflow.db", ".mlflow.db.lock"}
    assert len(aside) == (state == "half made") and all(name.endswith(".broken") for name in aside)


@pytest.mark.parametrize("error", [OSError(95, "Operation not supported"), NotImplementedError("no flock")])
def test_without_locks_the_fastest_job_publishes_its_tables(file, creations, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    assert prepare_at_once(file) == [] and 1 <= len(creations) <= 4
    check_database(sqlite_uri(file))
    assert [path.name for path in file.parent.iterdir()] == ["mlflow.db"]


def test_a_lock_that_is_never_released_is_told_and_given_up(file, creations, monkeypatch, caplog):
    monkeypatch.setattr(database, "WAIT_MESSAGE_AFTER_S", 0.05)
    monkeypatch.setattr(database, "MAX_WAIT_S", 0.1)
    file.parent.mkdir()
    with filelock.FileLock(file.parent / ".mlflow.db.lock"):
        prepare_database(sqlite_uri(file))
    message = f"waiting for another job, which creates the tracking database {file}"
    assert len(creations) == 1 and message in caplog.messages


def test_a_job_that_is_killed_while_it_makes_the_tables_leaves_none(file, creations, monkeypatch):
    def killed(partial: Path) -> None:
        partial.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(database, "_make_tables", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_database(sqlite_uri(file))
    assert not file.exists()
    file.with_name("mlflow.db.123.partial").touch()  # by SIGKILL
    prepare_database(sqlite_uri(file))
    check_database(sqlite_uri(file))
    assert {path.name for path in file.parent.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}


def test_a_half_made_database_that_another_program_works_on_is_left_alone(file, creations, monkeypatch):
    monkeypatch.setattr(database, "MAX_SETTLING_S", 0.0)
    file.parent.mkdir()
    make_database(file, None)
    monkeypatch.setattr(database.time, "sleep", lambda seconds: make_database_grow(file))
    with pytest.raises(UserError, match="another program holds it"):
        prepare_database(sqlite_uri(file))
    assert not creations and file.exists()


def make_database_grow(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(f"create table t{time.monotonic_ns()} as select randomblob(9000)")


def write_garbage_after_the_header(file: Path) -> None:
    make_database(file)
    content = bytearray(file.read_bytes())
    content[100:1000] = b"\xff" * 900
    file.write_bytes(content)


def cut(file: Path) -> None:
    make_database(file)
    os.truncate(file, file.stat().st_size - 4096)


def make_foreign_database(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("create table songs (title)")


BAD_FILES = {
    "text": (lambda file: file.write_text("no database " * 20), "is not a SQLite database.*mv .* resend"),
    "folder": (lambda file: file.mkdir(), "Is a directory.*tracking.uri"),
    "cut": (cut, "is damaged .*bytes are missing.*mv .* resend"),
    "garbage": (write_garbage_after_the_header, "malformed.*mv .* resend"),
    "foreign": (make_foreign_database, "of another program .*songs.*tracking.uri"),
    "newer": (lambda file: make_database(file, "f" * 12, 1), "newer MLflow.*pip install --upgrade mlflow"),
    "older": (lambda file: make_database(file, OLDER, 1), "older MLflow.*cp .* mlflow db upgrade sqlite:///"),
    "half upgraded": (
        lambda file: make_database(file, OLDER, 1, "_alembic_tmp_runs"),
        "half made.*Restore a backup, or move it away .* resend",
    ),
    "half made, with runs": (lambda file: make_database(file, None, 1), "half made.* resend"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_used_is_named_with_the_remedy_and_kept(file, creations, name):
    make, message = BAD_FILES[name]
    file.parent.mkdir()
    make(file)
    content = file.read_bytes() if file.is_file() else None
    for use in (check_database, prepare_database):
        with pytest.raises(UserError, match=message) as caught:
            use(sqlite_uri(file))
        assert str(file) in str(caught.value)
    assert not creations and (file.read_bytes() if file.is_file() else None) == content


@contextmanager
def as_another_user(folder: Path):
    """Root may write all files."""
    if os.geteuid():
        yield
        return
    folder.chmod(folder.stat().st_mode | 0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(("file_mode", "folder_mode"), [(0o444, 0o777), (0o644, 0o555), (0o000, 0o777)])
def test_a_database_that_may_not_be_written_is_named(file_mode, folder_mode):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "storage"
        folder.mkdir()
        make_database(folder / "mlflow.db", HEAD, 1)
        (folder / "mlflow.db").chmod(file_mode)
        folder.chmod(folder_mode)
        with as_another_user(Path(name)), pytest.raises(UserError) as caught:
            check_database(sqlite_uri(folder / "mlflow.db"))
        folder.chmod(0o755)
        assert "let this user write" in str(caught.value) and "free some" not in str(caught.value)


def test_a_database_that_another_job_writes_is_no_error(file, monkeypatch):
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.01)
    file.parent.mkdir()
    make_database(file, HEAD, 1)
    with closing(sqlite3.connect(file, isolation_level=None)) as writer:
        writer.execute("begin exclusive")
        check_database(sqlite_uri(file))


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_a_uri_without_a_file_is_named(uri):
    with pytest.raises(UserError, match="sqlite:////folder/mlflow.db"):
        sqlite_file(uri)


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_moved_database_names_the_artifacts_beside_it(tmp_path, is_copied):
    old, new = tmp_path / "old é", tmp_path / "new"
    (old / "mlartifacts").mkdir(parents=True)
    make_database(old / "mlflow.db", HEAD)
    location, elsewhere = (old / "mlartifacts").as_uri(), "s3://bucket/mlartifacts"
    with closing(sqlite3.connect(old / "mlflow.db")) as connection, connection:
        connection.executemany("insert into experiments values (?, ?)", [(1, location), (2, elsewhere), (0, "mlruns")])
        connection.executemany(
            "insert into runs values (?, ?)", [(1, f"{location}/1/artifacts"), (2, elsewhere + "/2")]
        )
        connection.execute("insert into model_versions values ('runs:/1/model', ?)", (f"{location}/1/model",))
    if is_copied:
        (new / "mlartifacts").mkdir(parents=True)
        (new / "mlflow.db").write_bytes((old / "mlflow.db").read_bytes())
    else:
        old.rename(new)
    prepare_database(sqlite_uri(new / "mlflow.db"))
    with closing(sqlite3.connect(new / "mlflow.db")) as connection:
        values = {
            row
            for table in ("experiments", "runs", "model_versions")
            for row in connection.execute(f"select * from {table}")
        }
    location = (new / "mlartifacts").as_uri()
    assert values == {
        *((1, location), (2, elsewhere), (0, "mlruns"), (1, f"{location}/1/artifacts"), (2, elsewhere + "/2")),
        ("runs:/1/model", f"{location}/1/model"),
    }
