"""Writes that are whole or absent: beside the target first, then one rename."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_ft.core.folders import atomic_folder

__all__ = ["atomic_file", "atomic_folder", "replace", "sha256"]


@contextmanager
def atomic_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside ``target`` to write to; renamed onto ``target`` when the block ends without an error.

    The temporary file lies in the target's own folder, since a rename is atomic only within one file system.

    Args:
        target: The file to write or replace. Its folder is made when absent.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "labels.txt"
        >>> with atomic_file(target) as path:
        ...     _ = path.write_text("positive")
        >>> target.read_text()
        'positive'
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hex digest of a file, which may be larger than memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def replace(source: Path, target: Path) -> None:
    """Rename ``source`` onto ``target``, a file or a folder (a sharded checkpoint), whatever lies there.

    A folder with content cannot be replaced in one step: it is moved aside first, and lost only when the new one
    is in place.
    """
    if not target.is_dir():
        os.replace(source, target)
        return
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(target, aside)
    os.replace(source, target)
    shutil.rmtree(aside, ignore_errors=True)
