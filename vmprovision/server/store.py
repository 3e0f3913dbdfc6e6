"""Keep VMs and templates in a database: SQLite, or PostgreSQL.

Every change is one transaction. On SQLite a writer locks the database from its first
statement on (``BEGIN IMMEDIATE``), so two writers cannot deadlock.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, event, insert, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

from vmprovision.errors import ImageSpaceError, PlanError, VmprovisionError
from vmprovision.host.cache import make_private
from vmprovision.server.tables import events, installation

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine

MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_SECONDS = 30.0
FULL = ("disk is full", os.strerror(errno.ENOSPC))  # as SQLite and PostgreSQL have it
MIGRATION_LOCK = 7_806_113_042  # any number that no other program uses


class DatabaseError(VmprovisionError):
    """The database cannot be used now, whatever it was asked for."""


class DatabaseSpaceError(DatabaseError, ImageSpaceError):
    """The disk of the database is full."""


class Store:
    """A database whose tables are up to date; threads share it."""

    def __init__(self, url: str) -> None:
        """Connect, and bring the tables up to date.

        Raises:
            PlanError: the URL is invalid.
            VmprovisionError: the database cannot be used.
        """
        try:
            self._engine = _make_engine(url)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as exc:
            raise PlanError(
                f"the database cannot be used: {exc}",
                hint="give a path for SQLite, or postgresql://USER@HOST/NAME",
            ) from exc
        self._writing = self._engine.execution_options(immediate=True)
        try:
            self._migrate()
            with self.write() as connection:
                self.installation = _installation(connection)
        except (DBAPIError, OSError) as exc:
            cause = exc.orig if isinstance(exc, DBAPIError) else exc
            shown = self._engine.url.render_as_string(hide_password=True)
            raise VmprovisionError(
                f"the database {shown} cannot be used: {cause}",
                hint="check --database, and that its server runs",
            ) from exc

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a connection that sees one state of the database, and changes nothing.

        Raises:
            DatabaseError: it cannot be used now.
        """
        with _failures(self._engine), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """Open a transaction, committed at the end of the block and rolled back on an error.

        Raises:
            DatabaseError: it cannot be used now.
        """
        with _failures(self._engine), self._writing.begin() as connection:
            yield connection

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def _migrate(self) -> None:
        """Bring the tables up to date; a server that starts at the same time waits."""
        logging.getLogger("alembic").setLevel(logging.WARNING)
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        with self._writing.begin() as connection:
            if connection.dialect.name == "postgresql":
                lock = text("SELECT pg_advisory_xact_lock(:number)")
                connection.execute(lock, {"number": MIGRATION_LOCK})
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


@contextlib.contextmanager
def _failures(engine: Engine) -> Iterator[None]:
    """Translate what a database says that cannot work now.

    Raises:
        DatabaseError: its disk is full, or it cannot be reached.
    """
    try:
        yield
    except OperationalError as exc:
        shown = engine.url.render_as_string(hide_password=True)
        message = f"the database {shown} cannot be used: {exc.orig}"
        if any(words in str(exc.orig) for words in FULL):
            raise DatabaseSpaceError(message, hint="make room on its disk: df -h") from exc
        hint = "nothing is lost; check that its server runs, and try again"
        raise DatabaseError(message, hint=hint) from exc


def _make_engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return create_engine(parsed, pool_pre_ping=True, pool_size=20)
    if parsed.database:
        path = Path(parsed.database)
        make_private(path.parent)
        # it has tokens until they are in their guests; SQLite's other files get the same mode
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    return engine


def _on_connect(connection: sqlite3.Connection, _: object) -> None:
    """Set up a connection of SQLite: this class begins transactions, not the sqlite3 module."""
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA foreign_keys = ON")


def _on_begin(connection: Connection) -> None:
    is_immediate = connection.get_execution_options().get("immediate", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_immediate else "BEGIN")


def _installation(connection: Connection) -> str:
    """Return the name by which the servers of this database recognise their domains."""
    known = connection.scalar(select(installation.c.id))
    if known is None:
        known = str(uuid.uuid4())
        connection.execute(insert(installation).values(id=known))
    return str(known)


def add_event(connection: Connection, vm_id: str, at: float, kind: str, message: str) -> None:
    """Write an event of a VM."""
    values: dict[str, Any] = {"vm_id": vm_id, "at": at, "kind": kind, "message": message}
    connection.execute(insert(events).values(values))
