"""A PostgreSQL server of a test's own, on a free port, with data that go when it ends."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def programs() -> Path:
    """The folder of ``initdb`` and ``postgres``: Debian keeps them out of the PATH."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = versions[-1] if versions else shutil.which("initdb")
    if found is None:
        pytest.fail("no PostgreSQL server is installed: apt-get install postgresql (Debian), or put initdb in the PATH")
    return Path(found).resolve().parent


@contextmanager
def postgres_server() -> Iterator[str]:
    """The URL of a database of a server that runs meanwhile."""
    place = Path(tempfile.mkdtemp(prefix="postgres-"))
    data, user = place / "data", None
    if os.geteuid() == 0:  # it refuses to run as root
        user = next(name for name in ("postgres", "nobody") if name in {entry.pw_name for entry in pwd.getpwall()})
        shutil.chown(place, user)
        place.chmod(0o700)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(*command: str) -> None:
        done = subprocess.run(command, user=user, cwd="/", env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    env = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(place)}
    control = str(programs() / "pg_ctl")
    try:
        call(
            str(programs() / "initdb"), "-D", str(data), "-U", "tester", "--auth=trust", "--encoding=UTF8", "--no-sync"
        )
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {place} -c fsync=off -c max_connections=50"
        call(control, "-D", str(data), "-l", str(place / "log"), "-w", "-o", options, "start")
        yield f"postgresql://tester@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run(
            [control, "-D", str(data), "-m", "immediate", "stop"], user=user, cwd="/", env=env, capture_output=True
        )
        shutil.rmtree(place, ignore_errors=True)
