"""Every file operation below a folder, counted: at one of them the process is stopped or killed."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir", "os.truncate", "shutil.rmtree")
_active: list[Steps] = []


class Steps:
    """Within the block, file operations on paths below ``root`` are counted.

    Python's own are seen by an audit hook, before they are done; the swap of two folders by standing in for it.

    Args:
        root: The folder.
        stop_at: Number, from 1, of the operation that fails with EIO, once.
        kill: Send this process SIGKILL there instead.
    """

    def __init__(self, root: Path, *, stop_at: int, kill: bool = False) -> None:
        self.root, self.stop_at, self.kill = os.path.realpath(root), stop_at, kill
        self.count = 0
        self.stopped = False

    def __enter__(self) -> Steps:
        folders: Any = importlib.import_module("lightning_ft.core.folders")
        self._folders, self._exchange = folders, folders.exchange
        folders.exchange = self._swap
        if not _hooked:
            sys.addaudithook(_hook)
            _hooked.append(True)
        _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _active.remove(self)
        self._folders.exchange = self._exchange

    def _swap(self, one: Path, other: Path) -> bool:
        self.step("swap", one)
        done: bool = self._exchange(one, other)
        self.step("swapped", one)
        return done

    def step(self, event: str, path: Any) -> None:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        # Names alone are of the descent of `shutil.rmtree`.
        if not isinstance(path, str | Path) or not (str(path).startswith(self.root) or os.sep not in str(path)):
            return
        self.count += 1
        if self.count != self.stop_at:
            return
        self.stopped = True
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.EIO, f"{event} number {self.count}", str(path))


_hooked: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for steps in _active:
        if event in EVENTS and arguments:
            steps.step(event, arguments[0])
