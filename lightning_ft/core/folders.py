"""Folders that appear whole, or replace another in one step."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_ft.core.exchange import exchange

TAKEN = -1
"""In the place of a descriptor: another process holds the lock."""

_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)
PREVIOUS = ".previous"
"""What is added to the name of a folder that was replaced."""


@contextmanager
def atomic_folder(target: str | os.PathLike[str], *, replace: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """An empty folder beside ``target`` to fill, which takes its place when the block ends without an error.

    Every file is on the disk before that. A folder that is replaced changes places with the new one in a single step
    (:func:`lightning_ft.core.exchange.exchange`): who opens ``target`` sees the old one or the new one, whole, and
    never none. It is then kept as ``target.previous`` (of a folder ``served``, ``served.previous``), one step of
    rollback (``exchange(target.previous, target)``); the one that lay there is deleted. A reader that has files of the
    old folder open reads on.

    Where the system or the file system has no such step (Windows, NFS), it takes two renames: for a moment ``target``
    is missing, and a process killed in this moment leaves the old folder as ``target.previous``, whole.

    Several processes, or threads, may write to one target: the last to finish wins. What a killed one left beside it
    is deleted by the next: each holds a lock of its folder (``flock``; where there is none, its process id counts),
    which the system drops with the process. A process that is killed just after the new folder took its place may
    lose the folder before it, which was not ``target.previous`` yet.

    Args:
        target: The folder to create. It may exist if it is empty, or if ``replace`` says so. A link is followed.
        replace: Whether a folder with content is one of yours, which may be replaced; by default none is, since what
            a folder holds is not ours to delete.

    Yields:
        The folder to fill.

    Raises:
        FileExistsError: ``target`` or ``target.previous`` is a file, or a folder with content that is not yours.
        OSError: It cannot be renamed, being a mount point.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "served"
        >>> for text in ("old", "new"):
        ...     with atomic_folder(target, replace=lambda folder: (folder / "a").is_file()) as path:
        ...         _ = (path / "a").write_text(text)
        >>> (target / "a").read_text(), (target.parent / "served.previous" / "a").read_text()
        ('new', 'old')
    """
    # Of a link the folder that it points to is replaced, never the link.
    place = Path(os.path.realpath(target))
    previous = place.with_name(place.name + PREVIOUS)
    place.parent.mkdir(parents=True, exist_ok=True)
    with _turn(place.parent):
        for path in (place, *((previous,) if _full(place) else ())):
            _check(path, replace)
        _clean(place)
    with _beside(place) as temporary:
        yield temporary
        _sync(temporary)
        with _turn(place.parent):
            _put(temporary, place, previous, replace)
        _sync_one(place.parent)


def _full(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _check(path: Path, replace: Callable[[Path], bool] | None) -> None:
    if not _full(path) or (replace is not None and path.is_dir() and replace(path)):
        return
    else_ours = "" if replace is None else ", nor one that was written here"
    raise FileExistsError(f"{path} exists and is not an empty folder{else_ours}: name another one, or move it away")


def _put(temporary: Path, place: Path, previous: Path, replace: Callable[[Path], bool] | None) -> None:
    """Let the new folder take its place; what is at ``temporary`` afterwards is deleted by the caller.

    The steps are tried until one fits: where there are no locks, another process may do the same at any moment.
    """
    try:
        while True:
            if _rename(temporary, place):
                return
            _check(place, replace)
            with suppress(FileNotFoundError):
                if exchange(temporary, place):
                    break
                if _in_two_steps(temporary, place, previous):
                    return
        while True:
            if _rename(temporary, previous):
                return
            with suppress(FileNotFoundError):
                if exchange(temporary, previous):
                    return
                shutil.rmtree(previous)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise OSError(
                error.errno, "a mount point cannot be renamed: name a folder inside it", str(place)
            ) from error
        raise


def _in_two_steps(temporary: Path, place: Path, previous: Path) -> bool:
    """Whether it was done; False when another process was faster."""
    aside = temporary.with_name(f"{temporary.name}.old")
    with suppress(FileNotFoundError):
        os.replace(previous, aside)
    try:
        os.replace(place, previous)
        return _rename(temporary, place)
    except BaseException:
        with suppress(OSError):
            os.replace(previous, place)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _rename(source: Path, target: Path) -> bool:
    """Whether it was done: it is where there is nothing, or an empty folder."""
    try:
        os.replace(source, target)
    except OSError as error:
        # Windows refuses any rename onto a folder.
        if error.errno in _OCCUPIED or (os.name == "nt" and isinstance(error, PermissionError)):
            return False
        raise
    return True


# ---- the folder beside


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """One process after another, each for a few renames; all at once where there are no locks."""
    lock = _lock(folder, wait=True)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A new folder that no other process takes for abandoned; deleted in the end, if it is still there."""
    lock: int | None
    while True:
        temporary = place.with_name(f".{place.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        temporary.mkdir()
        lock = _lock(temporary)
        if temporary.is_dir() and lock != TAKEN:
            break  # else another process took it for abandoned before it was locked
    try:
        yield temporary
    finally:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
        finally:
            if lock is not None and lock >= 0:
                os.close(lock)


def _lock(folder: Path, *, wait: bool = False) -> int | None:
    """A descriptor that holds the folder's lock; TAKEN if another process does, None if there are no locks."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return TAKEN
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return TAKEN
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _clean(place: Path) -> None:
    """Delete what processes that are gone left beside ``place``."""
    for left in place.parent.glob(f".{glob.escape(place.name)}.*.tmp*"):
        number = left.name.removeprefix(f".{place.name}.").split(".")[0]
        if not number.isdigit():
            continue
        lock = _lock(left)
        if lock == TAKEN or (lock is None and _alive(int(number))):
            continue
        try:
            shutil.rmtree(left, ignore_errors=True)
        finally:
            if lock is not None:
                os.close(lock)


def _alive(process: int) -> bool:
    if os.name == "nt":
        return True  # there, signal 0 is Ctrl-C
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True


# ---- the disk


def _sync(folder: Path) -> None:
    """Wait until every file and folder is on the disk: a rename may get there before what it renames."""
    for root, _, files in os.walk(folder):
        for name in files:
            _sync_one(Path(root) / name)
        _sync_one(Path(root))


def _sync_one(path: Path) -> None:
    if os.name == "nt":
        return  # it opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
