"""A PostgreSQL of its own on loopback, with a password, for the Prefect server of the tests."""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

_PLACES = "/usr/lib/postgresql/*/bin"
"""Where Debian puts what `initdb` and `pg_ctl` are part of; they are not on the path there."""
_USER = "postgres"
_SETTINGS = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off", "max_connections": "60"}
"""Without fsync a database survives its own death, not that of the machine."""


def programs() -> Path | None:
    """Return the folder of PostgreSQL's programs; None if it is not installed."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/").glob(f"{_PLACES[1:]}/"))
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


def free_port() -> int:
    """Return a port on loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Postgres:
    """A database in a temporary folder. It refuses to run as root, so then it runs as the user that its package made."""

    def __init__(self, bin_folder: Path, environment: Mapping[str, str]) -> None:
        """Make the database and start it; `environment` is all that its processes get."""
        self._bin, self._environment = bin_folder, environment
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._port, self._password = free_port(), secrets.token_hex(8)
        if os.getuid() == 0:
            os.chown(self.folder, pwd.getpwnam(_USER).pw_uid, pwd.getpwnam(_USER).pw_gid)
        words = self.folder.with_suffix(".password")
        words.write_text(self._password)
        words.chmod(0o644)
        try:
            options = ["--auth=scram-sha-256", f"--pwfile={words}", "--username=prefect", "--no-sync", "--no-locale"]
            self._run("initdb", f"--pgdata={self.folder}", "--encoding=UTF8", *options)
        finally:
            words.unlink()
        settings = "".join(f"{name} = '{value}'\n" for name, value in {**_SETTINGS, "port": str(self._port)}.items())
        with (self.folder / "postgresql.conf").open("a") as file:
            file.write(settings)
        self.start()

    @property
    def url(self) -> str:
        """What Prefect's server connects to."""
        return f"postgresql+asyncpg://prefect:{self._password}@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        """Start it, and return when it answers."""
        self._run("pg_ctl", "start", f"--pgdata={self.folder}", f"--log={self.folder}/log", "--wait", "--timeout=60")

    def stop(self) -> None:
        """Break all connections and stop it, as a crash would."""
        self._run("pg_ctl", "stop", f"--pgdata={self.folder}", "--mode=immediate", "--wait", "--timeout=60")

    def close(self) -> None:
        """Stop it, if it runs, and delete it."""
        if (self.folder / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        as_user = ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups"] if os.getuid() == 0 else []
        done = subprocess.run(
            [*as_user, str(self._bin / program), *arguments],
            cwd="/",
            env={**self._environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if program == "initdb" else subprocess.DEVNULL,  # the server keeps it open
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{program} ended with code {done.returncode}: {done.stdout or self._log()}"

    def _log(self) -> str:
        log = self.folder / "log"
        return log.read_text(errors="replace")[-2000:] if log.exists() else "no log"
