"""Where a study lives: a journal file, or a database that machines share."""

from __future__ import annotations

import os
import random
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


def open_storage(url: str | None, out: Path) -> BaseStorage:
    """A storage of Optuna.

    Args:
        url: Of a database, such as ``postgresql://user@host/name``; None for a journal in ``out``.
        out: The folder of the study.

    Raises:
        ImportError: Optuna, or the database's driver, is not installed.
    """
    try:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ImportError('a study of seeds needs Optuna: pip install "lightning-ft[seeds]"') from error
    if url is not None:
        return _database(url)
    out.mkdir(parents=True, exist_ok=True)
    file = str(out / "study.journal")
    # Where the system has no such lock, Optuna's own.
    lock: Any = JournalLock(file) if find_spec("fcntl") else None
    return JournalStorage(JournalFileBackend(file, lock_obj=lock))


def _database(url: str) -> BaseStorage:
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    # The driver of the extra; a bare postgresql:// may mean another one.
    if url.startswith(("postgresql://", "postgres://")):
        url = f"postgresql+psycopg://{url.partition('://')[2]}"
    for again in (True, True, True, True, False):
        try:
            # A connection that the server closed in the hours of a training is opened anew.
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except (IntegrityError, ProgrammingError, OperationalError):  # another worker makes the tables just now
            if not again:
                raise
            time.sleep(random.random())
    raise AssertionError("unreachable")


def close_storage(storage: BaseStorage) -> None:
    """Close the connections of a database."""
    from optuna.storages import RDBStorage

    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


class JournalLock:
    """A lock on a journal file that ends with the process that holds it, and mends what a killed one left.

    Optuna's own locks are files: one whose owner was killed stops all others for half a minute, and two workers that
    lose patience at once may each remove the other's. The kernel frees this one. A line that was half written is cut
    off: its writer died before it could rely on it.

    Args:
        file: The journal.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self._handle: int | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        import fcntl

        self._handle = os.open(f"{self.file}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        self._mend()
        return True

    def release(self) -> None:
        """Give it back."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _mend(self) -> None:
        with open(self.file, "rb+") as journal:
            if not journal.seek(0, os.SEEK_END):
                return
            journal.seek(-1, os.SEEK_END)
            if journal.read(1) != b"\n":
                journal.seek(0)
                journal.truncate(journal.read().rfind(b"\n") + 1)
