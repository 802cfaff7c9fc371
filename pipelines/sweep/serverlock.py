"""A study held against sweeps on other machines, by a lock of the PostgreSQL server."""

import hashlib
from contextlib import suppress

import sqlalchemy
from sqlalchemy.exc import DBAPIError

from pipelines.errors import PipelineError

# so that the server knows within a minute that a machine is gone, and lets its lock go
KEEPALIVES = "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"


class ServerLock:
    """An advisory lock on a name; it is its connection's, and goes with it."""

    def __init__(self, url: str, name: str) -> None:
        """Take nothing yet."""
        digest = hashlib.sha256(name.encode()).digest()
        self._key = int.from_bytes(digest[:8], "big", signed=True)
        self._name = name
        self._engine = sqlalchemy.create_engine(
            url,
            poolclass=sqlalchemy.pool.NullPool,
            # no transaction is left open for as long as a sweep takes
            isolation_level="AUTOCOMMIT",
            connect_args={"connect_timeout": 10, "options": KEEPALIVES},
        )
        self._connection: sqlalchemy.Connection | None = None

    def take(self) -> None:
        """Take the lock, or take it again if the server lost it, as one that was restarted has.

        Raises:
            PipelineError: Another holds it.
            DBAPIError: The server is away.
        """
        if self._connection is not None:
            try:
                self._connection.execute(sqlalchemy.text("SELECT 1"))
                return
            except DBAPIError:
                self.release()
        connection = self._engine.connect()
        asked = sqlalchemy.text("SELECT pg_try_advisory_lock(:key)")
        if not connection.execute(asked, {"key": self._key}).scalar():
            connection.close()
            raise PipelineError(
                f"sweep: another machine works on {self._name}; wait for it or stop it"
            )
        self._connection = connection

    def release(self) -> None:
        """Let the lock go."""
        connection, self._connection = self._connection, None
        if connection is not None:
            # one that the server has closed is gone already
            with suppress(DBAPIError):
                connection.close()
