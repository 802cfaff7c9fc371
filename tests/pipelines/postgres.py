"""A real PostgreSQL server on the loopback, in a temporary folder, for the length of some tests."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import sqlalchemy

from pipelines.local_servers import free_port
from pipelines.sweep.urls import with_driver

USER, PASSWORD = "ptv2", "s3cret-word"
ACCOUNT = "postgres"
"""Whose server it is where the tests run as root, which PostgreSQL refuses to."""


def programs() -> Path | None:
    """Return the folder of `initdb` and `pg_ctl`; Debian keeps them off the path."""
    found = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    candidates = [*([Path(found).resolve().parent] if found else []), *folders]
    return next((folder for folder in candidates if (folder / "initdb").exists()), None)


class Postgres:
    """A running server."""

    def __init__(self, folder: Path, host: str, port: int) -> None:
        self._folder = folder
        self._host = host
        self._port = port
        self._numbers = count()

    def url(self, database: str = "postgres", password: str = PASSWORD) -> str:
        return f"postgresql://{USER}:{password}@{self._host}:{self._port}/{database}"

    def new_database(self, like: str | None = None) -> str:
        """Return the URL of an empty database, or of a copy of one, by its URL."""
        template = "" if like is None else f" TEMPLATE {like.rpartition('/')[2]}"
        name = f"test{next(self._numbers)}"
        engine = sqlalchemy.create_engine(with_driver(self.url()), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            if like is not None:
                # pools of this process, which connect again; a template has to be left alone
                connection.execute(
                    sqlalchemy.text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE datname = :name"
                    ),
                    {"name": like.rpartition("/")[2]},
                )
            connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}{template}"))
        engine.dispose()
        return self.url(name)

    def control(self, *arguments: str) -> None:
        """Run `pg_ctl`, such as with `restart -m immediate`."""
        log = self._folder / "server.log"
        _run("pg_ctl", "-D", str(self._folder / "data"), "-l", str(log), "-w", *arguments)


@contextmanager
def server(host: str = "127.0.0.1") -> Iterator[Postgres]:
    """Yield a server with a password, of the tests alone, on an address of this machine."""
    folder, port = Path(tempfile.mkdtemp(prefix="pg-")), free_port()
    postgres = Postgres(folder, host, port)
    try:
        words = folder / "password"
        words.write_text(PASSWORD)
        for path in (folder, words):
            if os.getuid() == 0:
                shutil.chown(path, ACCOUNT, ACCOUNT)
        settings = ["-U", USER, "--auth=scram-sha-256", f"--pwfile={words}", "--no-sync"]
        _run("initdb", "-D", str(folder / "data"), "--encoding=UTF8", "--locale=C", *settings)
        with (folder / "data" / "postgresql.conf").open("a") as stream:
            stream.write(
                f"listen_addresses = '{host}'\nport = {port}\nfsync = off\n"
                f"unix_socket_directories = '{folder}'\n"
            )
        with (folder / "data" / "pg_hba.conf").open("a") as stream:
            stream.write("host all all samenet scram-sha-256\n")
        postgres.control("start")
        yield postgres
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            postgres.control("stop", "-m", "immediate")
        shutil.rmtree(folder)


def is_possible() -> bool:
    """Tell whether a server can be started here."""
    if programs() is None:
        return False
    return os.getuid() != 0 or ACCOUNT in {entry.pw_name for entry in pwd.getpwall()}


def _run(program: str, *arguments: str) -> None:
    folder = programs()
    assert folder is not None, "PostgreSQL is installed"
    subprocess.run(
        [str(folder / program), *arguments],
        check=True,
        stdin=subprocess.DEVNULL,
        # not a pipe: the server would inherit it, and nobody would see its end
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        user=ACCOUNT if os.getuid() == 0 else None,
        group=ACCOUNT if os.getuid() == 0 else None,
        extra_groups=[] if os.getuid() == 0 else None,
    )
