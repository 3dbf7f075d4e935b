"""One step in which two folders change places."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

_HERE = -100
"""``AT_FDCWD``: paths are as the process sees them."""

_SYSCALLS = {"x86_64": 316, "aarch64": 276, "riscv64": 276, "ppc64le": 357, "s390x": 347}
"""Number of ``renameat2`` in Linux, for C libraries that have no function for it (musl)."""

_UNKNOWN = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What a kernel or a file system answers that cannot do it."""


def exchange(one: Path, other: Path) -> bool:
    """Let two paths of one file system change places, so that neither is missing at any moment.

    ``renameat2(RENAME_EXCHANGE)`` of Linux, ``renamex_np(RENAME_SWAP)`` of macOS.

    Args:
        one: A file or a folder.
        other: Another.

    Returns:
        Whether it was done; False where the system or the file system has no such step.

    Raises:
        OSError: It failed: a path is missing, or is a mount point.
    """
    call = _renamex() if sys.platform == "darwin" else _renameat2() if sys.platform == "linux" else None
    if call is None:
        return False
    if call(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _renameat2() -> Callable[[bytes, bytes], int] | None:
    library = ctypes.CDLL(None, use_errno=True)
    swap = ctypes.c_uint(2)
    if hasattr(library, "renameat2"):
        return lambda one, other: int(library.renameat2(_HERE, one, _HERE, other, swap))
    number = _SYSCALLS.get(platform.machine())
    if number is None:
        return None
    return lambda one, other: int(library.syscall(ctypes.c_long(number), _HERE, one, _HERE, other, swap))


def _renamex() -> Callable[[bytes, bytes], int] | None:
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renamex_np"):
        return None
    return lambda one, other: int(library.renamex_np(one, other, ctypes.c_uint(2)))
