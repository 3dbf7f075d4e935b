"""A folder is replaced whole: stopped at every file operation, killed, raced, on systems with a swap and without."""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lightning_ft.core.exchange import exchange
from lightning_ft.core.folders import atomic_folder
from tests.steps import Steps

FOLDERS = importlib.import_module("lightning_ft.core.folders")
EXCHANGE = importlib.import_module("lightning_ft.core.exchange")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ours(folder: Path) -> bool:
    return (folder / "mark").is_file()


def content(name: str, folder: int) -> bytes:
    file = os.open(name, os.O_RDONLY, dir_fd=folder)
    try:
        return os.read(file, 9)
    finally:
        os.close(file)


def write(target: Path, version: str) -> None:
    """Two files and a folder, which belong together."""
    with atomic_folder(target, replace=ours) as path:
        (path / "mark").write_text(version)
        (path / "in").mkdir()
        (path / "in" / "deep").write_text(version)


def read(folder: Path) -> str:
    """The version of a whole folder."""
    (version,) = {(folder / "mark").read_text(), (folder / "in" / "deep").read_text()}
    assert names(folder) == ["in", "mark"]
    return version


@pytest.fixture(params=[True, False], ids=["swap", "two renames"])
def swaps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    if not request.param:
        monkeypatch.setattr(FOLDERS, "exchange", lambda one, other: False)
    return request.param


def test_replaced_folder_is_kept_for_one_step_back(tmp_path: Path, swaps: bool) -> None:
    for version in "abc":
        write(tmp_path / "out", version)
    assert (read(tmp_path / "out"), read(tmp_path / "out.previous")) == ("c", "b")
    assert names(tmp_path) == ["out", "out.previous"]
    assert exchange(tmp_path / "out.previous", tmp_path / "out")
    assert (read(tmp_path / "out"), read(tmp_path / "out.previous")) == ("b", "c")


def test_failing_block_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", "a")

    def fail(path: Path) -> None:
        (path / "mark").write_text("b")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"), atomic_folder(tmp_path / "out", replace=ours) as path:
        fail(path)
    assert read(tmp_path / "out") == "a"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("path", ["out", "out.previous"])
@pytest.mark.parametrize("file", [True, False])
def test_what_is_not_ours_is_refused(tmp_path: Path, path: str, file: bool) -> None:
    write(tmp_path / "out", "a")
    if path == "out":
        (tmp_path / "out" / "mark").unlink()
    if file and path == "out":
        (tmp_path / "out" / "in" / "deep").unlink()
        (tmp_path / "out" / "in").rmdir()
        (tmp_path / "out").rmdir()
    if file:
        (tmp_path / path).touch()
    elif path != "out":
        (tmp_path / path).mkdir()
        (tmp_path / path / "mine").touch()
    with pytest.raises(
        FileExistsError, match=f"{path} exists and is not an empty folder, nor one that was written here"
    ):
        write(tmp_path / "out", "b")
    assert (tmp_path / path).exists()


def test_a_folder_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        (path / "a").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()

    with pytest.raises(FileExistsError, match="is not an empty folder"), atomic_folder(tmp_path / "out") as path:
        fill(path)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["mine"]


def test_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "real", "a")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    write(tmp_path / "out", "b")
    assert (tmp_path / "out").is_symlink()
    assert (read(tmp_path / "real"), read(tmp_path / "real.previous")) == ("b", "a")


def test_the_folder_has_usual_permissions(tmp_path: Path) -> None:
    write(tmp_path / "out", "a")
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_stopped_at_every_step(tmp_path: Path, swaps: bool) -> None:
    """An error at each file operation: the old folder or the new one, and the next run leaves no litter."""
    stopped = 0
    for number in range(1, 200):
        place = tmp_path / str(number)
        place.mkdir()
        write(place / "out", "a")
        write(place / "out", "b")
        steps = Steps(place, stop_at=number)
        with steps, suppress(OSError):
            write(place / "out", "c")
        stopped += steps.stopped
        found = read(place / "out")
        assert found in "bc"
        if (place / "out.previous").exists():
            assert read(place / "out.previous") < found
        write(place / "out", "d")
        assert read(place / "out") == "d"
        assert names(place) == ["out", "out.previous"]
        assert read(place / "out.previous") == found
        if not steps.stopped:
            break
    assert stopped >= 8


KILLED = """
import os, signal, sys
from pathlib import Path
from lightning_ft.core import folders
from lightning_ft.core.folders import atomic_folder
if sys.argv[2] == "rename":
    folders.exchange = lambda one, other: False
with atomic_folder(sys.argv[1], replace=lambda folder: True) as path:
    (path / "mark").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_deleted(tmp_path: Path) -> None:
    write(tmp_path / "out", "a")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out"), ""], check=False)
    assert done.returncode == -9
    assert len(names(tmp_path)) == 2
    (tmp_path / f".out.{os.getpid()}.mine").mkdir()  # not named as ours are
    write(tmp_path / "out", "b")
    assert names(tmp_path) == [f".out.{os.getpid()}.mine", "out", "out.previous"]


@pytest.mark.parametrize("locks", [True, False])
def test_a_living_process_keeps_its_folder(tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not locks:

        def refuse(*_: Any) -> None:
            raise OSError(errno.ENOTSUP, "no locks here")

        monkeypatch.setattr(fcntl, "flock", refuse)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".out.{gone.pid}.0.tmp").mkdir()
    with atomic_folder(tmp_path / "out") as path:
        assert names(tmp_path) == [path.name]
        write(tmp_path / "out", "b")
        assert path.is_dir()
        (path / "mark").touch()
        (tmp_path / "out" / "mark").unlink()
        (tmp_path / "out" / "in" / "deep").unlink()
        (tmp_path / "out" / "in").rmdir()
    assert names(tmp_path) == ["out"]


def test_several_at_once(tmp_path: Path, swaps: bool) -> None:
    """Threads that replace one folder again and again, and a reader that never sees half of one."""
    write(tmp_path / "out", "start")
    errors: list[BaseException] = []
    done = threading.Event()

    def work(name: str) -> None:
        try:
            for round_ in range(10):
                write(tmp_path / "out", f"{name}{round_}")
        except BaseException as error:  # noqa: BLE001  reported below
            errors.append(error)

    def look() -> None:
        try:
            while not done.is_set():
                # One descriptor: both files are of the folder that was there at this moment.
                folder = os.open(tmp_path / "out", os.O_RDONLY)
                # A file may be gone by now, when the folder is two versions old.
                with suppress(FileNotFoundError):
                    assert len({content(name, folder) for name in ("mark", "in/deep")}) == 1
                os.close(folder)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "xyz"]
    reader = threading.Thread(target=look)
    if swaps:
        reader.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    if swaps:
        reader.join()
    assert not errors
    assert read(tmp_path / "out")[1:] == "9"
    assert names(tmp_path) == ["out", "out.previous"]


def test_who_comes_in_the_middle_of_a_swap_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two renames the earlier folder lies where what killed processes left lies, too."""
    write(tmp_path / "out", "a")
    others: list[threading.Thread] = []
    real = FOLDERS.exchange

    def swap(one: Path, other: Path) -> bool:
        done: bool = real(one, other)
        if not others:
            others.append(threading.Thread(target=write, args=(tmp_path / "out", "c")))
            others[0].start()
            others[0].join(0.5)
        return done

    monkeypatch.setattr(FOLDERS, "exchange", swap)
    write(tmp_path / "out", "b")
    others[0].join()
    assert (read(tmp_path / "out"), read(tmp_path / "out.previous")) == ("c", "b")
    assert names(tmp_path) == ["out", "out.previous"]


def test_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path / "a") == ["b"]
    with pytest.raises(FileNotFoundError, match="none"):
        exchange(tmp_path / "a", tmp_path / "none")
    # Without the function of the C library, and without either.
    library = EXCHANGE.ctypes.CDLL(None, use_errno=True)

    class Old:
        syscall = library.syscall

    monkeypatch.setattr(EXCHANGE.ctypes, "CDLL", lambda *_, **__: Old)
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path / "a") == ["a"]
    monkeypatch.setattr(EXCHANGE.platform, "machine", lambda: "other")
    assert not exchange(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(EXCHANGE.sys, "platform", "win32")
    assert not exchange(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path / "a") == ["a"]


def test_a_file_system_without_a_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EXCHANGE, "_renameat2", lambda: lambda one, other: -1)
    monkeypatch.setattr(EXCHANGE.ctypes, "get_errno", lambda: errno.EINVAL)
    assert not exchange(tmp_path, tmp_path)
    monkeypatch.setattr(EXCHANGE.ctypes, "get_errno", lambda: errno.EBUSY)
    write(tmp_path / "out", "a")
    with pytest.raises(OSError, match="a mount point cannot be renamed: name a folder inside it"):
        write(tmp_path / "out", "b")
    assert read(tmp_path / "out") == "a"
    assert names(tmp_path) == ["out"]
