"""A PostgreSQL server of the tests' own, which they can stop and start at will."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest

PASSWORD = "s3cret/passw:rd"
_OWNER = "postgres"  # who runs it where the tests are run by root: the server refuses root
_DEADLINE_S = 60


def find_programs() -> Path:
    """The directory of the newest `pg_ctl`; the test is skipped where there is none."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: float(path.parts[-3]), reverse=True
    )
    if on_path := shutil.which("pg_ctl"):
        found.append(Path(on_path).resolve())
    if not found:
        pytest.skip("PostgreSQL is not installed: .ci/install-postgresql does that")
    return found[0].parent


class Server:
    """A running server.

    Attributes:
        port: where it listens, on 127.0.0.1.
    """

    def __init__(self) -> None:
        self._programs = find_programs()
        self._place = Path(tempfile.mkdtemp(prefix="fr-pg-", dir="/tmp"))  # short: sockets have short names
        self._data = self._place / "data"
        self.port = _free_port()
        if os.getuid() == 0:
            owner = pwd.getpwnam(_OWNER)
            os.chown(self._place, owner.pw_uid, owner.pw_gid)
        password = self._place / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        self._run("initdb", "--auth=scram-sha-256", "-U", "admin", f"--pwfile={password}", "--no-sync")
        settings = {
            "listen_addresses": "'127.0.0.1'",
            "port": self.port,
            "unix_socket_directories": f"'{self._place}'",
            "fsync": "off",  # the machine itself does not go away
        }
        with (self._data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in settings.items())
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._run("pg_ctl", "start", "-w", "-t", str(_DEADLINE_S), "-l", str(self._place / "log"))

    def stop(self) -> None:
        """End it at once, as if it had crashed."""
        self._run("pg_ctl", "stop", "-m", "immediate", "-w", "-t", str(_DEADLINE_S))

    def remove(self) -> None:
        """Stop it for good."""
        if (self._data / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self._place)

    def database(self) -> Database:
        """A new database."""
        return Database(self)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), "-D", str(self._data), *arguments]
        if os.getuid() == 0:
            command = ["runuser", "-u", _OWNER, "--", *command]
        # No pipe: the server would hold it open for as long as it lives.
        with tempfile.TemporaryFile() as output:
            answer = subprocess.run(
                command, stdout=output, stderr=output, timeout=_DEADLINE_S + 30, cwd="/", check=False
            )
            output.seek(0)
            assert answer.returncode == 0, output.read().decode()


class Database:
    """A database of a server, with a user of its own who may do all things in it.

    Attributes:
        url: with the password.
        shown: the same as messages should have it.
    """

    def __init__(self, server: Server) -> None:
        self.name = f"d{uuid.uuid4().hex[:10]}"
        self._server = server
        self._ask("postgres", f'CREATE DATABASE "{self.name}"')
        self.add_role(self.name)
        self.ask(f'GRANT ALL ON SCHEMA public TO "{self.name}"')
        self.url = self.url_of(self.name)
        self.shown = f"postgresql+psycopg://{self.name}@127.0.0.1:{server.port}/{self.name}"

    def add_role(self, name: str) -> None:
        """One that may log in."""
        self._ask("postgres", f"CREATE ROLE \"{name}\" LOGIN PASSWORD '{PASSWORD}'")

    def url_of(self, role: str) -> str:
        quoted = PASSWORD.replace("/", "%2F").replace(":", "%3A")
        return f"postgresql+psycopg://{role}:{quoted}@127.0.0.1:{self._server.port}/{self.name}"

    def ask(self, text: str, values: Sequence[Any] = ()) -> list[Any]:
        """Do this as the server's administrator; the rows, if there are any."""
        return self._ask(self.name, text, values)

    def _ask(self, database: str, text: str, values: Sequence[Any] = ()) -> list[Any]:
        where = {"host": "127.0.0.1", "port": self._server.port, "dbname": database}
        with psycopg.connect(**where, user="admin", password=PASSWORD, autocommit=True) as connection:
            cursor = connection.execute(text, values or None)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
